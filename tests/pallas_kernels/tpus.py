"""TPUs to compile for, which do not have to be there.

libtpu is loaded once and reads the environment, so a process of its own compiles. One does it for all cases of a test: to
begin takes longer than to compile a kernel.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
QUIET = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
QUIET |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # to compile is what is tested
EACH = """
import json, sys, traceback
from jax.experimental.topologies import get_topology_desc

def chip(name):
    return get_topology_desc(platform="tpu", topology_name=name).devices[0]

for case in json.loads(sys.argv[1]):
    try:
        found = {"told": compiled(*case)}
    except Exception:
        found = {"error": traceback.format_exc()}
    print("found", json.dumps(found), flush=True)
"""
needed = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, a TPU's compiler, is not installed"
)


def told(code: str, cases: dict[str, tuple[Any, ...]]) -> Callable[[str], Any]:
    """By a case's name, what `compiled` says of it: a function that the code defines, and that may ask for a `chip`."""
    command = [sys.executable, "-c", f"{code}\n{EACH}", json.dumps(list(cases.values()))]
    environment = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    lines = [line.removeprefix("found ") for line in done.stdout.splitlines() if line.startswith("found ")]
    found = dict(zip(cases, map(json.loads, lines), strict=False))

    def of(name: str) -> Any:
        assert name in found, f"the compiler ended with {done.returncode}: {done.stderr[-3000:]}"
        assert "error" not in found[name], found[name]["error"][-3000:]
        return found[name]["told"]

    return of
