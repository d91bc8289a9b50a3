"""The whole training step at the 340M preset's shapes compiles by kernels for TPUs that are not there."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DIVIDED = ("--mesh.data=2", "--mesh.tensor=2", "--global-batch=16")
# The same layer shapes with less around them, which compiles in half the time.
SMALL = ("--model.layers=2", "--model.vocab_size=1024", "--model.remat=none", "--row=512", "--global-batch=4")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, a TPU's compiler, is not installed"),
]


@functools.cache
def step(topology, config, *settings):
    """What compile_train_step.py tells, in a process of its own: this one has made its backends."""
    quiet = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "XLA_FLAGS": ""}
    script = Path(__file__).with_name("compile_train_step.py")
    command = [sys.executable, str(script), topology, f"configs/{config}.py", *DIVIDED, *settings]
    environment = os.environ | quiet | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_step_divided_by_rows_and_heads_compiles_within_the_default_limits():
    """Forward, forward again for the backward pass (remat), and backward, each with half of the heads."""
    found = step("v5e:2x2", "hola_340m")
    assert found["implementation"] == "pallas_tpu"
    assert found["kernels"] == {"hola_forward": 2, "hola_backward": 1}
    assert found["heads"] == 2 and found["limits"] == [] and found["unknown_loops"] == []


def test_so_it_does_for_a_later_chip():
    """The kernels alone are compiled for v5p, too (test_hola.py)."""
    found = step("v6e:2x2", "hola_340m", *SMALL)
    assert found["kernels"] == {"hola_forward": 1, "hola_backward": 1}
    assert found["heads"] == 2 and found["limits"] == [] and found["unknown_loops"] == []


def test_holas_step_moves_few_more_bytes_than_gated_deltanets():
    """To and from the HBM of one of four chips, by shapes: every kernel's and fusion's operands and results, loops as often
    as they run; arrays that the compiler keeps in the chip's fast memory move nothing."""
    hola, gdn = (step("v5e:2x2", config) for config in ("hola_340m", "gdn_340m"))
    assert gdn["kernels"] == {"delta_rule_forward": 2, "delta_rule_backward": 1}
    assert hola["traffic"] <= 1.10 * gdn["traffic"]
