"""The gated delta rule on Hopper GPUs, forward and backward, in Mosaic.

The floor for a token and head at K = V = 256 and chunks of 64 is 524,288 FLOPs and 4,104 bytes forward (q, k, v, o,
gates, and a bfloat16 state of each chunk) and 1,081,344 FLOPs backward. S is 256 KB in float32: more than the 227 KB of
shared memory that a block of threads may have, and all of a multiprocessor's registers. But columns of V do not meet
until the scores, so S is split by them. In order:

    matrices    all chunks at once     (I + L)^-1 by doubling blocks, three bfloat16 passes to a product; Q K' with decays
    states      chunks in order,       S in registers, a block of threads for each 64 columns of V: committed residuals,
                                       the state before each chunk, and the squares of the residuals, which a sum over
                                       the columns makes the scores
    outputs     all chunks at once     from what the walk left
    state_gradients
                chunks from the last on,   the gradient of S in registers, as S forward
    gradients   all chunks at once     the rest, a block of threads for each 64 columns of K

XLA makes gates and norms before them and goes back through both.

*Transposed.* The walks hold S' [V, K] and make [V, c] of it: tensor cores take a left operand from registers, so S goes
from one product to the next without shared memory. At K = 256 two warpgroups hold half the keys each, 64 registers a
thread, and add up what they predict; one alone spills.

*Precise where it ranks.* Scores choose what a cache keeps, so they must not depend on how they were computed. Raw keys and
queries are bfloat16 and exact as operands; what normalises, decays and weighs them multiplies float32 results instead.
What they meet, S and the residuals, is two bfloat16 parts: two passes in place of three, errors of 2^-17. Reads and
gradients, which rank nothing, are one pass. Of the products of c by K by V, a chunk then takes 2 passes to predict, 2 to
write and 1 to read: 5/3 of the floor's.

*Why the outputs are apart.* With them the walk would hold queries too, 64 KB that are not there, and more registers than
are. A chunk's reads wait for nothing, so another kernel makes them, for state, residuals and queries read again: 3,072
bytes of a token and head at K = V = 256. With the matrices, 9.0 KB are moved forward in all where the floor is 4.1 KB.

Saved for the backward pass, of a token and head at K = V = 256: q, k, v and gates as they are, the state before each chunk
in bfloat16 (2,048 bytes), residuals (512) and two [c, c] matrices (256). The gradients of S behind each chunk (2,048
bytes) live between the walk back and its end. Nothing is added by atomics: the same inputs give the same bits.

bfloat16 q, k and v alone: float32 keys would not be exact operands. K and V are 64, 128 or 256.
"""

from pallas_kernels.delta_rule.gpu.operation import delta_rule

__all__ = ["delta_rule"]
