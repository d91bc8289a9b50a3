"""The sharding table knows every parameter of every mixer. That a step's results lie where it says: test_step.py."""

import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec as P

from hola_jax.config import MemoryConfig
from tests.laws.mixers import MIXERS
from tests.train.small import tiny
from train.layout import Layout
from train.mesh import MeshConfig, make_mesh
from train.shardings import CLASSES, TABLE, path_name, spec_of

LEVERS = [
    ("gla", {"norm": "dynamic_tanh", "residual": "attention"}),
    ("transformer", {"norm": "sandwich", "qk_norm": "heads"}),
]


@pytest.mark.parametrize(("mixer", "fields"), [*((mixer, {}) for mixer in MIXERS), *LEVERS])
def test_every_parameter_has_a_class(mixer, fields):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    layout = Layout(tiny(mixer, tie_embeddings=False, **fields), mesh)
    assert not layout.undivided
    for (path, spec), shape in zip(
        jax.tree.leaves_with_path(layout.specs, is_leaf=lambda x: isinstance(x, P)),
        jax.tree.leaves(layout.params),
        strict=True,
    ):
        assert spec == spec_of(path_name(path)) and len(spec) == shape.ndim


def test_the_temperature_of_the_other_read_has_one_too():
    memory = MemoryConfig(window=3, block=8, chunk=4, read="unit_l2")
    assert Layout(tiny(memory=memory), make_mesh(MeshConfig())).specs["blocks"]["mixer"]["cache"]["temperature"]


def test_every_class_is_in_the_table():
    assert set(CLASSES.values()) | {"tokens_bt"} == {field.name for field in dataclasses.fields(TABLE)}


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(ValueError, match=r"no class for the parameter 'blocks.mixer.new'; add it"):
        spec_of("blocks.mixer.new")


def test_what_the_mesh_does_not_divide_stays_whole_and_is_said():
    layout = Layout(tiny(vocab_size=63), make_mesh(MeshConfig(tensor=2, fsdp=4)))
    assert layout.specs["embedding"] == P(None, "fsdp")
    assert layout.undivided == ["embedding [63, 32]: 63 is no multiple of tensor=2, so whole along it"]
