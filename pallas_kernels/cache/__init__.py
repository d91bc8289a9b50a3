"""HOLA's exact cache for TPU: the softmax read of [cache | running block | null sink] with the top-W merge in it."""

from pallas_kernels.cache.arrays import Cache
from pallas_kernels.cache.call import cached_read, empty_cache

__all__ = ["Cache", "cached_read", "empty_cache"]
