"""Inference: prompts read in pieces, tokens written in a compiled loop, memories kept and restored."""

from hola_jax.inference.generator import Completion, Delta, Generator, Request, generate
from hola_jax.inference.prefix import Prefix
from hola_jax.inference.sampling import GREEDY, Sampling

__all__ = ["GREEDY", "Completion", "Delta", "Generator", "Prefix", "Request", "Sampling", "generate"]
