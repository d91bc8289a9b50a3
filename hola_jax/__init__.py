"""HOLA (Hippocampal Linear Attention) and its rivals in JAX.

model = hola_jax.LanguageModel(hola_jax.preset("hola-tiny"))
logits, state = model(tokens)                      # a whole sequence
logits, state = model(next_token, state=state)     # or one token more
"""

from hola_jax import memory
from hola_jax.config import MemoryConfig, ModelConfig
from hola_jax.model import LanguageModel, functional
from hola_jax.presets import preset

__all__ = ["LanguageModel", "MemoryConfig", "ModelConfig", "__version__", "functional", "memory", "preset"]

__version__ = "0.1.0"
