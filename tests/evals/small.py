"""A model of bytes, and a scorer that answers what a test tells it to."""

import numpy as np

from hola_jax import LanguageModel
from hola_jax.evals import Scored, Setting
from tests.laws.mixers import small
from train.data import tokenizers

BYTES = tokenizers.load("bytes")
WORDS = (["ashen", "brave", "calm", "dusty", "eager", "faint"], ["acorn", "beach", "cabin", "drum", "elbow", "fern"])


def model(mixer="hola", **fields):
    return LanguageModel(small(mixer, **{"vocab_size": 256, "max_length": 4096, **fields}), seed=1)


def setting(**fields):
    return Setting(**{"tokenizer": BYTES, "prefix": 255, "window": 64, "vocab_size": 256, "samples": 3, **fields})


class Told:
    """Knows the continuation of every prompt: `answer(text of the prompt)`. Rows are likely as far as `likely(row)` says."""

    vocab_size, longest = 256, None

    def __init__(self, answer=None, likely=None):
        self.answer, self.likely = answer, likely

    def greedy(self, prompts, max_tokens, until=None, done=lambda rows: None):
        done(len(prompts))
        return [np.frombuffer(self.answer(BYTES.decode(p)).encode(), np.uint8)[:max_tokens] for p in prompts]

    def loglikelihood(self, rows, done=lambda rows: None):
        done(len(rows))
        found = [np.asarray(self.likely(row), np.float32) for row in rows]
        return [Scored(logprob, logprob > -1) for logprob in found]
