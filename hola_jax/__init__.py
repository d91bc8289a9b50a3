"""HOLA (Hippocampal Linear Attention) and its rivals in JAX.

model = hola_jax.LanguageModel(hola_jax.preset("hola-tiny"))
logits, state = model(tokens)                      # a whole sequence
logits, state = model(next_token, state=state)     # or one token more
hola_jax.generate(model, [1, 2, 3]).tokens         # a prompt, continued
"""

from hola_jax import memory
from hola_jax.config import MemoryConfig, ModelConfig
from hola_jax.inference import Generator, Sampling, generate
from hola_jax.model import LanguageModel, functional
from hola_jax.presets import preset

__all__ = [
    "Generator",
    "LanguageModel",
    "MemoryConfig",
    "ModelConfig",
    "Sampling",
    "__version__",
    "functional",
    "generate",
    "memory",
    "preset",
]

__version__ = "0.1.0"
