"""The gated delta rule on a TPU, forward and backward, with the state resident on the chip."""

from pallas_kernels.delta_rule.operation import DeltaRule, delta_rule

__all__ = ["DeltaRule", "delta_rule"]
