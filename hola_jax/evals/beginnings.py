"""What prompts begin with together, so that it is read once: a tree whose edges are whole pieces of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Beginning(NamedTuple):
    """Some prompts, by their numbers, have their first `length` tokens in common."""

    tokens: np.ndarray  # those behind the beginning that this one goes on from: a piece; of the root, none
    length: int
    alone: list[int]  # prompts that share no further piece; of each, a token at least is left
    longer: list[Beginning]  # beginnings that go on from here, that of the most prompts first


def beginnings(prompts: Sequence[np.ndarray], piece: int) -> Beginning:
    """The root, which is empty: every prompt is `alone` once in its tree, and every other node has two at least below it."""
    root = Beginning(np.zeros(0, np.int32), 0, [], [])
    stack = [(list(range(len(prompts))), root)]
    while stack:
        numbers, here = stack.pop()
        stop = here.length + piece
        groups: dict[bytes, list[int]] = {}
        for n in numbers:
            if len(prompts[n]) > stop:
                groups.setdefault(np.asarray(prompts[n][here.length : stop], np.int32).tobytes(), []).append(n)
            else:
                here.alone.append(n)
        for group in sorted(groups.values(), key=len, reverse=True):
            if len(group) == 1:
                here.alone.append(group[0])
            else:
                here.longer.append(Beginning(prompts[group[0]][here.length : stop], stop, [], []))
                stack.append((group, here.longer[-1]))
    return root


def tokens_read(root: Beginning, prompts: Sequence[np.ndarray]) -> int:
    """How many tokens go through a model that reads each beginning once."""
    count, stack = 0, [root]
    while stack:
        here = stack.pop()
        count += len(here.tokens) + sum(len(prompts[n]) - here.length for n in here.alone)
        stack += here.longer
    return count
