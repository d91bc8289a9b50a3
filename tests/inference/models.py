"""Small models, made once for a process, and a generator over each."""

import functools

from hola_jax import Generator, LanguageModel
from tests.laws.mixers import small
from train.data.tokenizers import Bytes

PIECES = (16,)


def model(mixer: str = "hola") -> LanguageModel:
    return _model(mixer)


@functools.cache
def _model(mixer: str) -> LanguageModel:
    return LanguageModel(small(mixer, vocab_size=256, max_length=64, layers=1), seed=1)


def generator(mixer: str = "hola") -> Generator:
    return _generator(mixer)


@functools.cache
def _generator(mixer: str) -> Generator:
    return Generator(model(mixer), Bytes(), pieces=PIECES, steps=4, width=2)
