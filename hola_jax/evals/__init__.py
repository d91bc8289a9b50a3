"""What a language model is measured by: perplexity, recall probes, RULER, and the tasks of the lm-eval package.

cells = prepare(["passkey@2k", "wikitext=FILE"], setting)     # samples; whatever is wrong is said here
measured = cells[0].measure(ModelScorer(model), done)         # scores

The adapter to the lm-eval package is `hola_jax.evals.harness`, which needs that package.
"""

from hola_jax.evals.scorer import ModelScorer, Scored, Scorer
from hola_jax.evals.tasks import Cell, Measured, Setting, parse, prepare
from hola_jax.evals.text import Tokenizer

__all__ = ["Cell", "Measured", "ModelScorer", "Scored", "Scorer", "Setting", "Tokenizer", "parse", "prepare"]
