"""What a HOLA memory is made of: its configuration, its trainables, and its state of constant size."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from hola_jax.array_types import Array, Bool, Float, Int32

Score = Literal["surprise", "residual", "write", "recency", "random", "attention", "recall", "learned"]
Read = Literal["rmsnorm", "unit_l2"]
Scan = Literal["auto", "associative", "sequential"]
Write = Literal["arrival", "eviction"]
Pytree = TypeVar("Pytree")

RESCORED = ("attention", "recall")  # scores of a pair that change while it is held
WRITTEN = ("surprise", "residual", "write")  # magnitudes that are fixed when a pair is written
EMPTY = -1  # position of a cache row that holds no token


def _real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """How one layer remembers.

    window       W, rows of the exact cache; 0 keeps only the running block
    block        C, tokens of a block; a token competes for the cache when its block is complete
    chunk        c, tokens of a delta-rule chunk: changes speed, not meaning; divides `block`
    score        what a token must be large in to stay: "surprise" beta|e|, "residual" |e|, "write" beta|v|,
                 "recency" its position, "random" a fixed hash of its position, head and `seed`. These are fixed when the
                 token is written. Two are not: "attention", the softmax weights that reads gave it so far, added up
                 (H2O); "recall" |S' k^ - v|, how wrong S gives it back, measured anew after each block (LoLA). And
                 "learned" is what the layer gives, fixed when the token is written, with a gradient of its own (LTE)
    read         how the visible set is read: "rmsnorm" (sharp, decoupled) or "unit_l2" (unit vectors, learned temperature)
    scan         how chunks are joined: "sequential" carries the state, "associative" is a parallel prefix scan,
                 "auto" picks by a measured rule (see `delta_rule.choose_scan`)
    state_scale  factor on the state's output; None is K ** -0.5
    seed         of the "random" score
    read_energy  share of its softmax weights that a read keeps, in (0, 1]: the fewest of the visible entries, the null sink
                 among them, whose weights reach it, renormalised (equals of the smallest kept stay too). None keeps all
    write        when a pair is written to the state: "arrival", when it comes, held by the cache or not (HOLA); "eviction",
                 when the cache drops it, so that it is in one of the two (LoLA), for the score "recall" alone
    sparsity     of the "learned" score: only tokens whose logit is positive compete, and training holds their share down to
                 this, in (0, 1]; the cache may hold fewer than W. None: all compete
    read_power   whether a read multiplies a pair's softmax weight by its score to a learned power, which is 0 at first
    fade         tokens in which a score loses a factor of e, so that of equals the later token stays. None: it never does
    read_credit  what the softmax weights that reads gave a pair, added up, add to the logarithm of its score; negative:
                 what was read gives way
    same_key     cosine of two stored keys from which on the later pair takes the earlier's place, and the larger of both
                 scores, when a block is complete. None keeps both
    budget       rows that all heads of a layer hold together, none more than `window`; None: `window` each

    The last five are not in the paper. `read_power`, `fade` and `read_credit` are of the scores that are fixed magnitudes:
    surprise, residual and write.
    """

    window: int = 64
    block: int = 256
    chunk: int = 64
    score: Score = "surprise"
    read: Read = "rmsnorm"
    scan: Scan = "auto"
    state_scale: float | None = None
    seed: int = 0
    read_energy: float | None = None
    write: Write = "arrival"
    sparsity: float | None = None
    read_power: bool = False
    fade: float | None = None
    read_credit: float = 0.0
    same_key: float | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("window", 0), ("block", 1), ("chunk", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"MemoryConfig.{name} is {value!r}; it must be an integer of at least {least}")
        if self.block % self.chunk:
            raise ValueError(
                f"MemoryConfig.chunk={self.chunk} does not divide block={self.block}; "
                f"use one of {[d for d in range(1, self.block + 1) if self.block % d == 0]}"
            )
        for name, choices in (("score", Score), ("read", Read), ("scan", Scan), ("write", Write)):
            allowed = get_args(choices)
            if getattr(self, name) not in allowed:
                raise ValueError(f"MemoryConfig.{name} is {getattr(self, name)!r}; it must be one of {list(allowed)}")
        if self.write == "eviction" and self.score != "recall":
            raise ValueError(
                f"MemoryConfig.write='eviction' is of score='recall', and score is {self.score!r}: a pair that the "
                "state lacks must be scored by what the state would answer"
            )
        if self.write == "eviction" and self._beside_the_score:
            raise ValueError(
                f"MemoryConfig.write='eviction' does not go with {self._beside_the_score}: what is dropped is absorbed, and "
                "a score alone may drop it"
            )
        if self.state_scale is not None and not _real(self.state_scale):
            raise ValueError(f"MemoryConfig.state_scale is {self.state_scale!r}; it must be None or a finite number")
        energy = self.read_energy
        if energy is not None and not (_real(energy) and 0 < energy <= 1):
            raise ValueError(f"MemoryConfig.read_energy is {energy!r}; it must be None or a share in (0, 1]")
        sparsity = self.sparsity
        if sparsity is not None and not (_real(sparsity) and 0 < sparsity <= 1):
            raise ValueError(f"MemoryConfig.sparsity is {sparsity!r}; it must be None or a share in (0, 1]")
        if sparsity is not None and self.score != "learned":
            raise ValueError(
                f"MemoryConfig.sparsity={sparsity} is of score='learned', whose sign it teaches, and score is {self.score!r}"
            )
        self._check_choice()

    def _check_choice(self) -> None:
        if not isinstance(self.read_power, bool):
            raise ValueError(f"MemoryConfig.read_power is {self.read_power!r}; it must be True or False")
        if self.fade is not None and not (_real(self.fade) and self.fade > 0):
            raise ValueError(f"MemoryConfig.fade is {self.fade!r}; it must be None or a number of tokens above 0")
        if not _real(self.read_credit):
            raise ValueError(f"MemoryConfig.read_credit is {self.read_credit!r}; it must be a finite number")
        if self.same_key is not None and not (_real(self.same_key) and 0 < self.same_key < 1):
            raise ValueError(f"MemoryConfig.same_key is {self.same_key!r}; it must be None or a cosine between 0 and 1")
        budget = self.budget
        if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 1):
            raise ValueError(f"MemoryConfig.budget is {budget!r}; it must be None or an integer of at least 1")
        weighed = [name for name in ("read_power", "fade", "read_credit") if getattr(self, name)]
        if weighed and self.score not in WRITTEN:
            raise ValueError(
                f"MemoryConfig.{weighed[0]} is {getattr(self, weighed[0])!r} and the score {self.score!r}; it is of the "
                f"scores {', '.join(WRITTEN)}"
            )
        if self.read_power and len(weighed) > 1:
            raise ValueError(
                f"MemoryConfig.read_power goes with scores as they are, and {weighed[1]} is {getattr(self, weighed[1])!r}"
            )

    def scale(self, key_dim: int) -> float:
        """The factor on the state's output."""
        return key_dim**-0.5 if self.state_scale is None else self.state_scale

    @property
    def read_options(self) -> str:
        """What says which `CacheParams` there must be."""
        return f"read={self.read!r}" + (", read_power=True" if self.read_power else "")

    @property
    def rescored(self) -> str:
        """Why blocks are ranked one after the other: what one drops might have been worth keeping later. Empty where all can
        be ranked at once."""
        why = self._beside_the_score or (f"score={self.score!r}" if self.score in RESCORED else "")
        return why and f"{why} is decided anew at each block's end"

    @property
    def _beside_the_score(self) -> str:
        """What else decides at a block's end."""
        values = {"read_credit": self.read_credit or None, "same_key": self.same_key, "budget": self.budget}
        return ", ".join(f"{name}={value!r}" for name, value in values.items() if value is not None)

    @property
    def read_weight(self) -> float:
        """What a softmax weight adds to the score of the pair that it is given to."""
        return 1.0 if self.score == "attention" else self.read_credit

    @property
    def only_xla(self) -> str:
        """Why no kernel runs this memory; empty where some may."""
        if self.score == "learned":
            return "score='learned' has a gradient of its own, which no kernel gives"
        if self.read_power or self.fade is not None:
            name = "read_power" if self.read_power else "fade"
            return f"{name}={getattr(self, name)!r} changes what a score does, which no kernel knows"
        return self.rescored and f"{self.rescored}, which no kernel does"

    def meaning(self) -> MemoryConfig:
        """This configuration without the fields that change only how fast the result comes."""
        return dataclasses.replace(self, chunk=1, scan="auto")


class CacheParams(NamedTuple):
    """What the exact cache learns. The read "rmsnorm" needs the two scales, the read "unit_l2" the temperature, and
    `read_power` the power."""

    query_scale: Float[Array, " K"] | None
    key_scale: Float[Array, " K"] | None
    sink_logit: Float[Array, " H"]
    gate_logit: Float[Array, " H"]
    temperature: Float[Array, " H"] | None = None
    power: Float[Array, " H"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MemoryState:
    """All that a layer remembers of a prefix; its size does not depend on how long the prefix was.

    A token is visible while its position is at least `document_start`, so nothing needs to be erased when a document
    ends. The running block holds the tokens whose positions lie in the block that `position` points into.
    """

    fast_weights: Float[Array, "B H K V"]  # S, float32
    cache_keys: Float[Array, "B H W K"]  # normalised for the read, best score first
    cache_values: Float[Array, "B H W V"]
    cache_scores: Float[Array, "B H W"]  # float32; -inf where a row is empty
    cache_positions: Int32[Array, "B H W"]  # EMPTY where a row is empty
    block_keys: Float[Array, "B h C K"]
    block_values: Float[Array, "B H C V"]
    block_scores: Float[Array, "B H C"]  # float32
    position: Int32[Array, " B"]  # real tokens seen so far
    document: Int32[Array, " B"]  # segment id of the last real token; 0 before any
    document_start: Int32[Array, " B"]  # position at which that document began
    config: MemoryConfig = dataclasses.field(metadata={"static": True})
    cache_betas: Float[Array, "B H W"] | None = None  # float32; None but where pairs are written late
    block_betas: Float[Array, "B H C"] | None = None
    scorer: Any = None  # what a layer remembers that makes the "learned" scores; the memory carries it and no more

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def init_state(
    config: MemoryConfig,
    batch: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    dtype: DTypeLike = jnp.float32,
    *,
    key_heads: int | None = None,
) -> MemoryState:
    """The memory of an empty prefix; `dtype` is that of the exact keys and values (fast weights are float32)."""
    key_heads = heads if key_heads is None else key_heads
    window, block, late = config.window, config.block, config.write == "eviction"

    def zeros(*shape: int, dtype: DTypeLike = dtype) -> Array:
        return jnp.zeros((batch, *shape), dtype)

    return MemoryState(
        fast_weights=zeros(heads, key_dim, value_dim, dtype=jnp.float32),
        cache_keys=zeros(heads, window, key_dim),
        cache_values=zeros(heads, window, value_dim),
        cache_scores=jnp.full((batch, heads, window), -jnp.inf, jnp.float32),
        cache_positions=jnp.full((batch, heads, window), EMPTY, jnp.int32),
        block_keys=zeros(key_heads, block, key_dim),
        block_values=zeros(heads, block, value_dim),
        block_scores=zeros(heads, block, dtype=jnp.float32),
        position=zeros(dtype=jnp.int32),
        document=zeros(dtype=jnp.int32),
        document_start=zeros(dtype=jnp.int32),
        config=config.meaning(),
        cache_betas=zeros(heads, window, dtype=jnp.float32) if late else None,
        block_betas=zeros(heads, block, dtype=jnp.float32) if late else None,
    )


def cached_positions(state: MemoryState) -> Int32[Array, "B H W"]:
    """Positions of the tokens that the exact cache holds, best score first; -1 where a row is empty."""
    return state.cache_positions


def select(which: Bool[Array, " B"], new: Pytree, old: Pytree) -> Pytree:
    """`new` in the named rows of the batch, which is the first axis of every leaf; `old` in the others."""
    return jax.tree.map(lambda a, b: jnp.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)
