"""The mixers under test. Whoever adds a mixer adds it here, and every law of test_mixers.py holds for it."""

from hola_jax.config import MemoryConfig, ModelConfig

MIXERS = ["hola", "gated_deltanet", "deltanet", "kda", "gla", "gsa", "lola", "transformer"]

TOKENS = 13  # a multiple of neither the block nor the chunk
# The programs of a TPU's kernels, by the interpreter, where a mixer has some: with how many tokens, so that there are two
# blocks and two chunks. The delta rule's chunk is 64; of HOLA's kernel it is here the block of 8.
BY_KERNELS = {"hola by kernels": TOKENS, "gated_deltanet by kernels": 67}
BY_SCORE = {  # whose path is not that of "surprise"
    "hola by eviction": {"score": "recall", "write": "eviction"},
    "hola by learned": {"score": "learned"},
}


def small(mixer: str, **fields: object) -> ModelConfig:
    """A model whose blocks, chunks and cache are full several times over within TOKENS. `mixer` may be of BY_KERNELS and
    BY_SCORE."""
    ranked = BY_SCORE.get(mixer, {})
    mixer = "hola" if mixer in BY_SCORE else mixer
    if mixer in BY_KERNELS:
        mixer, fields = mixer.removesuffix(" by kernels"), {"implementation": "interpret", **fields}
    sizes = dict(vocab_size=31, dim=32, layers=2, heads=2, key_dim=8, value_dim=8, slots=4, mlp_dim=32, decay_rank=4)
    sizes["feature_dim"] = 4
    memory = MemoryConfig(window=3, block=8, chunk=4, **ranked)
    return ModelConfig(**{**sizes, "mixer": mixer, "memory": memory, "max_length": 16, "dtype": "float32", **fields})
