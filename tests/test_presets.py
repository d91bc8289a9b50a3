"""The paper's models have the paper's sizes. Nothing is allocated here."""

import dataclasses

import jax
import pytest

from hola_jax import LanguageModel, MemoryConfig, functional, preset
from hola_jax.config import flops_per_token, parameter_count
from hola_jax.model import init_state, state_bytes
from hola_jax.presets import PRESETS


def counted(name: str) -> int:
    shapes = jax.eval_shape(lambda: functional(LanguageModel(preset(name)))[1])
    return sum(x.size for x in jax.tree.leaves(shapes))


# Every row at one scale, and one row at every scale: a scale changes numbers alone.
@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("-46m") or name.startswith("transformer-")])
def test_the_formula_counts_what_is_there(name: str) -> None:
    assert counted(name) == parameter_count(preset(name))["total"]


def test_gated_deltanet_340m_has_the_published_count_and_hola_12480_more() -> None:
    assert counted("gdn-340m") == 366_763_200
    assert counted("hola-340m") == 366_763_200 + 12_480
    for name in ("hola-recency", "hola-same-key"):  # so weights of the one are weights of the other
        assert counted(f"{name}-340m") == counted("hola-340m") and preset(f"{name}-340m").memory != MemoryConfig()


@pytest.mark.parametrize(("scale", "millions"), [("340m", 334.0), ("170m", 167.0), ("46m", 44.2)])
def test_names_count_parameters_without_the_embedding(scale: str, millions: float) -> None:
    assert round(parameter_count(preset(f"gdn-{scale}"))["non_embedding"] / 1e6, 1) == millions


@pytest.mark.parametrize("row", ["transformer", "deltanet", "kda", "gla", "gsa", "lola"])
def test_the_rows_of_a_scale_are_of_one_size(row: str) -> None:
    total = parameter_count(preset(f"{row}-340m"))["total"]
    assert abs(total / 350e6 - 1) < 0.05


def test_options_are_counted() -> None:
    tiny = preset("kda-tiny")
    for fields in (
        {"output_gate": False, "tie_embeddings": False},
        {"mixer": "hola", "key_heads": 1, "key_dim": 8, "value_dim": 12, "conv_width": 3},
        {"mixer": "hola", "memory": dataclasses.replace(tiny.memory, read="unit_l2")},
        {"mixer": "gla", "key_heads": 1, "mlp_dim": 100},
        {"mixer": "transformer", "norm": "dynamic_tanh", "qk_norm": "heads"},
    ):
        config = dataclasses.replace(tiny, **fields)
        shapes = jax.eval_shape(lambda config=config: functional(LanguageModel(config))[1])
        assert sum(x.size for x in jax.tree.leaves(shapes)) == parameter_count(config)["total"]


def test_an_unknown_preset_is_told_the_right_one() -> None:
    with pytest.raises(ValueError, match="did you mean 'gdn-340m'"):
        preset("gdn-350m")


def test_only_the_transformer_pays_for_length() -> None:
    for name in ("hola-340m", "gdn-340m", "gsa-340m", "lola-340m"):
        config = preset(name)
        assert state_bytes(config) == state_bytes(dataclasses.replace(config, max_length=2**20))
    transformer = preset("transformer-340m")
    longer = dataclasses.replace(transformer, max_length=2 * transformer.max_length)
    assert state_bytes(longer) > 1.99 * state_bytes(transformer)
    assert flops_per_token(transformer, 8192) > flops_per_token(transformer, 2048) + 1e6
    assert flops_per_token(preset("hola-340m"), 8192) == flops_per_token(preset("hola-340m"), 2048)


def test_operations_are_about_two_for_each_parameter() -> None:
    for name in PRESETS:
        config = preset(name)
        ratio = flops_per_token(config, 2048) / (2 * parameter_count(config)["total"])
        assert 1 < ratio < (3.0 if "tiny" in name else 1.3), (name, ratio)


def test_state_bytes_are_those_of_the_state() -> None:
    config = preset("hola-tiny")
    assert state_bytes(config, 3) == sum(x.nbytes for x in jax.tree.leaves(init_state(config, 3)))
