"""HOLA's whole training step at the 340M preset's shapes compiles by kernels for TPUs that are not there.

It takes a minute: of other TPUs, and of Gated DeltaNet, the kernels alone are compiled (test_hola.py, test_delta_rule.py).
"""

import pytest

from tests.pallas_kernels import tpus

pytestmark = [pytest.mark.slow, tpus.needed]
STEP = ("v5e:2x2", "configs/hola_340m.py", "--mesh.data=2", "--mesh.tensor=2", "--global-batch=16")
# Of Gated DeltaNet's step by its kernels, on the same four chips; docs/performance.md has the command that counts them.
GATED_DELTANETS_BYTES = 117.5e9


@pytest.fixture(scope="module")
def step():
    return tpus.told("from tests.pallas_kernels.compile_train_step import compiled", {"step": STEP})("step")


def test_a_step_divided_by_rows_and_heads_compiles_within_the_default_limits(step):
    """Forward, forward again for the backward pass (remat), and backward, each with half of the heads."""
    assert step["implementation"] == "pallas_tpu"
    assert step["kernels"] == {"hola_forward": 2, "hola_backward": 1}
    assert step["heads"] == 2 and step["limits"] == [] and step["unknown_loops"] == []


def test_it_moves_few_more_bytes_than_gated_deltanets(step):
    """To and from the HBM of one of four chips, by shapes: every kernel's and fusion's operands and results, loops as often
    as they run; arrays that the compiler keeps in the chip's fast memory move nothing."""
    assert step["traffic"] <= 1.10 * GATED_DELTANETS_BYTES
