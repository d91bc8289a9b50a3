"""Keeps loops over tokens vector code on a CPU. XLA fuses all it can into such a loop: also the cutting of a layer's few
numbers out of the stack that a scan brings, and then LLVM leaves the whole loop scalar. Elsewhere nothing is lost by it."""

from __future__ import annotations

from typing import TypeVar

from jax import lax

T = TypeVar("T")


def made_first(few: T) -> T:
    """Arrays that are small beside the tokens, done before a loop over tokens uses them."""
    return lax.optimization_barrier(few)


def made_first_on_cpu(many: T) -> T:
    """The same for an array of as many numbers as the tokens have, of which others would make a copy for nothing."""
    return lax.platform_dependent(many, cpu=lax.optimization_barrier, default=lambda x: x)
