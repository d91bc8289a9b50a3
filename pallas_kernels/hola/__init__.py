"""HOLA's whole memory on a TPU in one kernel: the state, the exact cache and the read over it, forward and backward."""

from pallas_kernels.hola.operation import Earlier, Hola, Learned, fits, hola

__all__ = ["Earlier", "Hola", "Learned", "fits", "hola"]
