"""One prefix scan for every memory: along the chunks of a device, and along the devices of a mesh axis.

A memory is a monoid that acts on a state: `act(element, state)` takes the state past the run of tokens that `element`
summarises, and `combine(left, right)` summarises two neighbouring runs, so that

    act(combine(left, right), state) == act(right, act(left, state)).

The state S has affine maps as elements, the exact cache has top-W row sets (there act and combine coincide).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

Element = Any  # pytree; the leading axis counts elements where several are meant
State = Any

Strategy = Literal["sequential", "associative"]


def prefix_scan(
    act: Callable[[Element, State], State],
    combine: Callable[[Element, Element], Element] | None,
    elements: Element,
    initial: State,
    strategy: Strategy,
) -> tuple[State, State]:
    """(states before each element, stacked on a leading axis; the state after the last).

    "sequential" needs `act` alone and does the least work; "associative" has logarithmic depth.
    """
    if strategy == "sequential":
        final, before = lax.scan(lambda state, element: (act(element, state), state), initial, elements)
        return before, final
    assert combine is not None, "an associative scan needs the monoid's combine"
    runs = lax.associative_scan(jax.vmap(combine), elements)
    after = jax.vmap(act, in_axes=(0, None))(runs, initial)
    before = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest[:-1]]), initial, after)
    return before, jax.tree.map(lambda leaf: leaf[-1], after)


def axis_scan(
    act: Callable[[Element, State], State], element: Element, initial: State, axis_name: str
) -> tuple[State, State]:
    """(the state before this device's run, the state after the last device's), inside shard_map over `axis_name`.

    What travels is one element per device: nothing of the length of its run.
    """
    gathered = lax.all_gather(element, axis_name)
    before, final = prefix_scan(act, None, gathered, initial, "sequential")
    index = lax.axis_index(axis_name)
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), before), final
