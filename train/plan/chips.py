"""What is known of a chip: data-sheet figures, and the assumptions that turn them into a prediction.

To correct a figure or add a chip, edit CHIPS: everything else of `hola plan` reads it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """memory              bytes of HBM that a program can have
    flops               peak operations per second in bfloat16, dense
    bandwidth           bytes per second of the HBM
    link                TPU: bytes per second that a chip sends along one axis of the torus, one direction.
                        GPU: bytes per second that a chip sends to the others of its host
    network             GPU: bytes per second that a chip sends to other hosts
    float32_passes      bfloat16 passes that a float32 product costs: (by default, at the highest precision)
    matmul_efficiency   share of `flops` that large products reach
    memory_efficiency   share of `bandwidth` and of the links that large transfers reach
    launch              seconds that starting one kernel costs; on a TPU the compiler's estimates have it
    clock               TPU: cycles per second, to read the compiler's own estimates
    target              GPU: (compute capability, cores, device memory, clock in GHz), for the compiler
    wraps               TPU: an axis of a multiple of so many chips is a ring, a shorter one a line
    """

    kind: Literal["tpu", "gpu", "cpu"]
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float = 0.0
    float32_passes: tuple[float, float] = (1.0, 6.0)
    matmul_efficiency: float = 0.7
    memory_efficiency: float = 0.8
    launch: float = 0.0
    clock: float = 0.0
    target: tuple[tuple[int, int], int, int, float] | None = None
    wraps: int = 4


def _hopper(memory: float, bandwidth: float, cores: int = 132) -> Chip:
    # float32 products run as TF32 by default, at half of the rate of bfloat16; with all digits, outside the tensor cores.
    return Chip(
        "gpu",
        memory
        * 0.92,  # what is left beside the CUDA context and NCCL's buffers; needs XLA_PYTHON_CLIENT_MEM_FRACTION=.92
        989e12,
        bandwidth,
        link=450e9,  # NVLink
        network=50e9,  # one 400 Gbit/s card to each GPU
        float32_passes=(2.0, 989 / 67),
        launch=2e-6,
        target=((9, 0), cores, int(memory), 1.98),
    )


CHIPS: dict[str, Chip] = {  # memory of a TPU: what libtpu lets a program have
    "v4": Chip("tpu", 30.75 * GIB, 275e12, 1228e9, link=45e9, clock=1.05e9),
    "v5e": Chip("tpu", 15.75 * GIB, 197e12, 819e9, link=45e9, clock=1.5e9, wraps=16),
    "v5p": Chip("tpu", 95.73 * GIB, 459e12, 2765e9, link=90e9, clock=1.75e9),
    "v6e": Chip("tpu", 31.24 * GIB, 918e12, 1640e9, link=90e9, clock=1.75e9, wraps=16),
    "h100": _hopper(80e9, 3.35e12),
    "h200": _hopper(141e9, 4.8e12),
    # Stands in where a plan is tried without any chip: its figures are round numbers, of no machine.
    "cpu": Chip("cpu", 4 * GIB, 1e11, 1e10, link=1e9, float32_passes=(1.0, 1.0)),
}


def target_config(name: str) -> str:
    """The description of a GPU that XLA compiles for without having one."""
    target = CHIPS[name].target
    if target is None:
        raise ValueError(f"{name} is no GPU that is described here; add its `target` to train.plan.chips.CHIPS")
    (major, minor), cores, memory, clock = target
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_core": 228 * 1024,
        "shared_memory_per_block_optin": 227 * 1024,
        "threads_per_core_limit": 2048,
        "core_count": cores,
        "fpus_per_core": 128,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "memory_bandwidth": int(CHIPS[name].bandwidth),
        "l2_cache_size": 50 * 2**20,
        "clock_rate_ghz": clock,
        "device_memory_size": memory,
    }
    facts = "\n".join(f"  {field}: {value}" for field, value in fields.items())
    capability = f"  cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return (
        f"gpu_device_info {{\n{facts}\n{capability}\n}}\n"
        'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 8 patch: 0 }\n'
        f'device_description_str: "NVIDIA {name.upper()}"\n'
    )
