"""Weights from and to the rest of the world: Hugging Face folders, as tables of keys. Safetensors only, never pickle.

config, params = hola_jax.weights.load("FOLDER")       # config.json + safetensors, one file or several
hola_jax.weights.save("OTHER", config, params)         # and back, bit for bit
forward, _ = hola_jax.functional(hola_jax.LanguageModel(config))
"""

from hola_jax.weights.huggingface import configuration, list_keys, load, save

__all__ = ["configuration", "list_keys", "load", "save"]
