"""HOLA's exact cache for Hopper GPUs: the softmax read of [cache | running block | null sink] in Mosaic GPU kernels."""

from pallas_kernels.cache.gpu.call import cached_read

__all__ = ["cached_read"]
