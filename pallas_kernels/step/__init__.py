"""One token of HOLA's memory on a TPU: decoding, with the memory changed in place. `step.gpu` is its twin for GPUs."""

from pallas_kernels.step.arrays import Memory, Sizes
from pallas_kernels.step.limits import gpu_refuses, tpu_refuses
from pallas_kernels.step.operation import step

__all__ = ["Memory", "Sizes", "gpu_refuses", "step", "tpu_refuses"]
