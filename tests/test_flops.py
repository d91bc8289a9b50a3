"""The analytic count of operations, which MFU is measured by, beside the compiler's.

The compiler counts a loop's body once, so the two are comparable where each loop runs once: one layer, one chunk, one block.
"""

from typing import get_args

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from hola_jax import LanguageModel, MemoryConfig, ModelConfig, functional
from hola_jax.config import Mixer, flops_per_token

TOKENS = 64


@pytest.mark.parametrize("mixer", get_args(Mixer))
def test_the_analytic_count_is_the_compilers(mixer):
    memory = MemoryConfig(window=16, block=TOKENS, chunk=TOKENS)
    config = ModelConfig(vocab_size=512, dim=256, layers=1, heads=2, mixer=mixer, memory=memory, slots=32)
    forward, params = functional(nnx.eval_shape(lambda: LanguageModel(config)))
    tokens = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
    lowered = jax.jit(lambda params, tokens: forward(params, tokens)[0]).lower(params, tokens)
    counted = lowered.cost_analysis()["flops"]
    # What is not a matrix product (norms, gates, softmax) is in the compiler's count alone.
    assert counted == pytest.approx(flops_per_token(config, TOKENS) * TOKENS, rel=0.06)
