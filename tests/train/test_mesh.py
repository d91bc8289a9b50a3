"""The mesh: its shape from its configuration, and what cannot be one."""

import jax
import pytest

from train.mesh import AXES, MeshConfig, check_batch, make_mesh


def test_data_takes_what_the_other_axes_leave():
    mesh = make_mesh(MeshConfig(fsdp=2, sequence=2))
    assert mesh.axis_names == AXES and tuple(mesh.shape.values()) == (2, 2, 1, 2)


def test_slices_lie_along_data():
    mesh = make_mesh(MeshConfig(fsdp=4, slices=2))
    numbers = [[device.id for device in row.flatten()] for row in mesh.devices]
    assert numbers == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"fsdp": 3}, "does not use 8 devices exactly"),
        ({"data": 4}, "set mesh.data to -1"),
        ({"tensor": 0}, "mesh.tensor is 0; it must be an integer of at least 1"),
        ({"data": 0}, "at least 1 or -1"),
        ({"fsdp": 4, "slices": 4}, "mesh.slices is 4; it must divide the data axis, which has 2 devices"),
    ],
)
def test_what_is_no_mesh_is_named(fields, reason):
    with pytest.raises(ValueError, match=reason):
        make_mesh(MeshConfig(**fields), jax.devices())


def test_batches_that_cannot_be_cut_are_named():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))
    check_batch(mesh, 8, 2, 64, 32)
    with pytest.raises(ValueError, match="global_batch is 12; it must be a multiple of 8: 2 data x 2 fsdp"):
        check_batch(mesh, 12, 2, 64, 32)
    with pytest.raises(ValueError, match="make it a multiple of 64, such as 128"):
        check_batch(mesh, 8, 2, 100, 32)
