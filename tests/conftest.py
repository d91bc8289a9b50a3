"""Eight devices on the host for every test, quick compiles, and shapes checked against the annotations."""

import gc
import os

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
CHECKED += ["reference", "reference_linear", "scan", "token", "triangular"]
_hook = install_import_hook([f"hola_jax.memory.{name}" for name in CHECKED], "beartype.beartype")


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file():
    """Drop compiled programs behind each file: a process may hold some 65,000 memory maps, and every program takes a few.

    Where the system runs out of them, XLA's compiler crashes instead of saying so.
    """
    yield
    jax.clear_caches()
    gc.collect()
