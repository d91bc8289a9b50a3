"""The paper's mathematics as pure functions on arrays: the state, the exact cache, and the read over it. No Flax."""

from hola_jax.memory.hola import hola_memory
from hola_jax.memory.linear import LinearState, init_linear_state, linear_memory
from hola_jax.memory.lola import lola_memory
from hola_jax.memory.lola_state import LolaParams, LolaState, init_lola_state
from hola_jax.memory.slots import SlotState, init_slot_state, slot_memory
from hola_jax.memory.state import CacheParams, MemoryConfig, MemoryState, cached_positions, init_state

__all__ = [
    "CacheParams",
    "LinearState",
    "LolaParams",
    "LolaState",
    "MemoryConfig",
    "MemoryState",
    "SlotState",
    "cached_positions",
    "hola_memory",
    "init_linear_state",
    "init_lola_state",
    "init_slot_state",
    "init_state",
    "linear_memory",
    "lola_memory",
    "slot_memory",
]
