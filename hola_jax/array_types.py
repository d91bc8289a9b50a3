"""The letters of the paper and of this code, and the array types that annotations are made of. Imports jax alone.

| letter | meaning                                                              |
|--------|----------------------------------------------------------------------|
| B, T   | batch, time                                                          |
| D, N   | model width, layers                                                  |
| H, h   | value heads; key heads (h divides H; each serves H / h value heads)  |
| K, V   | key and value width of one head                                      |
| W      | rows of the exact cache                                              |
| C      | cache block: tokens that are read exactly before they compete        |
| c, n   | delta-rule chunk (a compute choice, divides C); chunks or blocks     |

An annotation such as `Float[Array, "B T H K"]` is documentation in production and is checked in the tests.
"""

from jax import Array
from jaxtyping import Bool, Float, Int, Int32, UInt8

__all__ = ["Array", "Bool", "Float", "Int", "Int32", "UInt8"]
