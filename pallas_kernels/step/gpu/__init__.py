"""One token of HOLA's memory on a Hopper GPU: decoding, with the memory changed in place."""

from pallas_kernels.step.gpu.operation import step

__all__ = ["step"]
