"""Eight devices on the host for every test, quick compiles, and shapes checked against the annotations."""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest

# All tests run on the host's devices. Where libtpu is installed, to compile for TPUs, jax would also look for a chip, and
# libtpu complain on the console that there is none.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Before jax makes its backend. The tests run small programs once: less optimisation halves the time to compile them.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)
# What one file compiles serves the others, pytest's workers and the processes that tests start: they inherit these names.
# The folder is made by the first process, empty, and goes when that one ends.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="hola-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
from jaxtyping import install_import_hook

CHECKED = [
    "align",
    "by_kernels",
    "by_xla",
    "cache_read",
    "decay",
    "delta_rule",
    "devices",
    "diagonal",
    "exact_cache",
    "norms",
    "piece",
    "poison",
]
CHECKED += ["eviction", "learned", "reference", "reference_linear", "rescored", "scan", "token", "triangular"]
CHECKED += ["lola", "lola_stores", "reference_lola"]
_hook = install_import_hook([f"hola_jax.memory.{name}" for name in CHECKED], "beartype.beartype")


# The longest first: where two workers take a file at a time, neither is left alone with one of these at the end.
LONGEST = [
    "test_notebooks.py",
    "train/test_step.py",
    "laws/test_implementations.py",
    "pallas_kernels/test_hola.py",
    "train/test_two_processes.py",
    "pallas_kernels/test_train_step_compile.py",
    "train/test_faults.py",
    "laws/test_devices.py",
    "train/data/test_prepare.py",
    "train/test_demo.py",
    "train/test_study.py",
]


def pytest_collection_modifyitems(items):
    order = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish():
    """What was imported stays: Python's collector need not go through it again while programs are traced, nor often through
    what tracing makes, which is many small objects and few cycles. A tenth less."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Drop compiled programs behind a file where they are many: a process may hold some 65,000 memory maps, and every
    program takes a few. Where the system runs out of them, XLA's compiler crashes instead of saying so.
    """
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()
