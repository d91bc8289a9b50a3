"""One token of HOLA's memory on a TPU: decoding, with the memory changed in place."""

from pallas_kernels.step.operation import Memory, step

__all__ = ["Memory", "step"]
