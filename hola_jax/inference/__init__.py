"""From a trained model to text, to memories in files, and to other programs."""

from hola_jax.inference.generator import Completion, Delta, Generator, Request, generate
from hola_jax.inference.prefix import Prefix
from hola_jax.inference.sampling import GREEDY, Sampling

__all__ = ["GREEDY", "Completion", "Delta", "Generator", "Prefix", "Request", "Sampling", "generate"]
