"""Attention Residuals on a TPU: a softmax over sources, for many readers, forward and backward; and its last step back."""

from pallas_kernels.depth.limits import tpu_refuses
from pallas_kernels.depth.operation import Found, join_back, look, look_back

__all__ = ["Found", "join_back", "look", "look_back", "tpu_refuses"]
