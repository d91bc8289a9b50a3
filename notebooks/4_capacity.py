# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4. Capacity: facts against state size, W and C
#
# **Question.** How many facts does one head hold, in a state of $K \times V$ numbers, in $W$ rows of cache, in a
# block of $C$ tokens; and what does a fact cost in each?
#
# A fact is a random key with one of 64 values. It is told once, and asked for by its key; the answer is the
# nearest of the 64 values, so chance is 1/64. No model is trained: this is what the memories can hold at best.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from hola_jax.memory import CacheParams, MemoryConfig, hola_memory

plt.style.use("tableau-colorblind10")
STYLES = [("C0", "o-"), ("C1", "s--"), ("C5", "^-."), ("C3", "D:")]

KINDS, V = 64, 32  # different values, and how wide they are
HEADS = 8  # of independent facts each: repetitions of the experiment
WIDTHS = (8, 16, 32, 64)  # K
COUNTS = (4, 8, 16, 32, 64, 128, 256)  # facts
MOST = max(COUNTS)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def f32(x):
    return jnp.asarray(x, jnp.float32)


def params_of(width: int, gate: float = 0.0) -> CacheParams:
    return CacheParams(jnp.ones(width), jnp.ones(width), jnp.zeros(HEADS), jnp.full(HEADS, gate))


draw = np.random.default_rng(0)
codebook = unit(draw.normal(size=(KINDS, V)))
told = draw.integers(KINDS, size=(MOST, HEADS))

# %% [markdown]
# ## The state
#
# The delta rule with $\beta = 1$ puts the new value in the place of what its key meant before:
#
# $$S_t = S_{t-1} + \hat k_t (v_t - \hat k_t^\top S_{t-1})^\top
#       = (I - \hat k_t \hat k_t^\top) S_{t-1} + \hat k_t v_t^\top .$$
#
# So each new fact erases what lies along its key of every older one. For random keys the mean of
# $I - \hat k \hat k^\top$ is $(1 - 1/K) I$, and of a fact written $a$ facts ago there is left
#
# $$\mathbb E\,[\text{share of } v \text{ in } \hat k^\top S] = (1 - 1/K)^a \approx e^{-a/K}.$$
#
# One call measures it: a row of the batch for each $K$ (narrower keys are padded with zeros) and each number of
# facts (tokens behind those are padding, segment 0).

# %%
grid = [(width, count) for width in WIDTHS for count in COUNTS]
keys = {}  # of each width: [facts heads K]
for width in WIDTHS:
    narrow = unit(draw.normal(size=(MOST, HEADS, width)))
    keys[width] = np.pad(narrow, [(0, 0), (0, 0), (0, max(WIDTHS) - width)])
k = f32(np.stack([keys[width] for width, _ in grid]))
v = f32(np.broadcast_to(codebook[told], (len(grid), MOST, HEADS, V)))
ones = jnp.ones((len(grid), MOST, HEADS))
real = jnp.asarray([np.arange(MOST) < count for _, count in grid], jnp.int32)

alone = MemoryConfig(window=0, block=64, chunk=64)  # what is asked here is the state alone
run = jax.jit(partial(hola_memory, config=alone))
_, memory = run(k, k, v, ones, 0 * ones, params_of(max(WIDTHS)), segment_ids=real)
answers = np.einsum("bthk,bhkv->bthv", k, memory.fast_weights)  # of every key, [row fact head V]

share = np.sum(answers * v, axis=-1)  # how much of its own value
right = np.argmax(answers @ codebook.T, axis=-1) == told
recall = {(w, n): float(right[row, :n].mean()) for row, (w, n) in enumerate(grid)}

# %%
figure, axes = plt.subplots(figsize=(6.4, 3.6))
ages = np.arange(MOST)
worst = 0.0
for (colour, style), width in zip(STYLES, WIDTHS, strict=True):
    measured = share[grid.index((width, MOST))][::-1].mean(axis=-1)  # by age
    expected = (1 - 1 / width) ** ages
    coarse = measured.reshape(-1, 8).mean(axis=1)
    worst = max(worst, float(np.abs(coarse - expected.reshape(-1, 8).mean(axis=1)).max()))
    axes.plot(
        ages.reshape(-1, 8).mean(axis=1) / width, coarse, style[0], color=colour, markersize=4, label=f"K = {width}"
    )
axes.plot(np.linspace(0, 4), np.exp(-np.linspace(0, 4)), color="black", linewidth=1, label=r"$e^{-a/K}$")
axes.set(xlabel="age of a fact, in units of K", ylabel="share of its value left in the state", xlim=(0, 4))
axes.set_title("In the state a fact fades with age / K")
axes.legend()
plt.show()
print(f"measured and expected share differ by at most {worst:.2f} (means over 8 ages, {HEADS} heads)")
assert worst < 0.15

# %% [markdown]
# **The plot above**: all sizes fall on one curve once age is counted in units of $K$. **Below**: what that means
# for recall. A value is still recognised when a third or so of it is left, so a state holds about as many facts
# as its keys are wide.


# %%
def held(width: int, least: float = 0.9) -> float:
    """Facts at which recall falls below `least`, between the measured counts in log scale."""
    curve = [recall[width, count] for count in COUNTS]
    return float(np.exp(np.interp(-least, -np.array(curve), np.log(COUNTS))))


figure, axes = plt.subplots(figsize=(6.4, 3.6))
for (colour, style), width in zip(STYLES, WIDTHS, strict=True):
    axes.plot(COUNTS, [recall[width, n] for n in COUNTS], style, color=colour, label=f"K = {width}")
axes.axhline(1 / KINDS, color="0.6", linewidth=0.8)
axes.text(COUNTS[0], 1 / KINDS + 0.02, "chance", fontsize=9, color="0.4")
axes.set_xscale("log", base=2)
axes.set(xlabel="facts told", ylabel="share of them recalled", ylim=(0, 1.04))
axes.set_title(f"The state alone, K x {V} numbers")
axes.legend(title="width of a key")
plt.show()

for width in WIDTHS:
    print(f"K = {width:2d}: nine of ten are recalled up to {held(width):5.1f} facts, {held(width) / width:.2f} K")
assert sorted(WIDTHS, key=held) == list(WIDTHS)

# %% [markdown]
# ## What a fact costs
#
# A row of the cache holds one fact in $K + V$ numbers, exactly and at any age. The state holds its facts in $K V$
# numbers, more of them the wider the keys are.

# %%
print("numbers of memory for each fact (nine of ten recalled)")
print("   K   state: K V / facts   cache: K + V")
cost = {width: width * V / held(width) for width in WIDTHS}
for width in WIDTHS:
    print(f"{width:4d} {cost[width]:15.0f} {width + V:16d}")
assert cost[WIDTHS[0]] > WIDTHS[0] + V and cost[WIDTHS[-1]] < WIDTHS[-1] + V

# %% [markdown]
# With narrow keys the cache is the cheaper store, with wide ones the state, as long as its facts are recent. So
# the cache is not there because it stores more: it is there because what it stores does not fade, and because it
# *chooses*.
#
# ## The cache: W against C at the same memory
#
# Now $n$ facts, then 256 tokens of noise ($\beta = 0.15$, keys and values that mean nothing), then the questions.
# 64 exact entries in all, divided between the running block and the cache. The block sees the last tokens; the
# cache keeps what surprised. By then the state has forgotten, so what is recalled should be
#
# $$\min(1, W / n).$$

# %%
K, NOISE, MANY = 16, 256, 64
TOLD = (4, 8, 16, 32, 64)  # facts, a row of the batch for each
SPLITS = ((0, 64), (16, 48), (32, 32), (48, 16))  # W, C

facts, noise = unit(draw.normal(size=(MANY, HEADS, K))), unit(draw.normal(size=(NOISE, HEADS, K)))
said = unit(draw.normal(size=(NOISE, HEADS, V)))
ones, low = np.ones((MANY, HEADS)), np.full((NOISE, HEADS), 0.15)
sequence = [
    np.concatenate([facts, noise, facts]),  # q
    np.concatenate([facts, noise, 0 * facts]),  # k: a question leaves no trace
    np.concatenate([codebook[told[:MANY]], said, 0 * codebook[told[:MANY]]]),  # v
    np.concatenate([ones, low, 0 * ones]),  # beta
    np.zeros((2 * MANY + NOISE, HEADS)),  # log decay
]
given = [f32(np.broadcast_to(x, (len(TOLD), *x.shape))) for x in sequence]
first = np.array(TOLD)[:, None] > np.arange(
    MANY
)  # the facts of each row; the others are padding, as are their questions
real = jnp.asarray(np.concatenate([first, np.ones((len(TOLD), NOISE)), first], axis=1), jnp.int32)

recalled = {}
for window, block in SPLITS:
    config = MemoryConfig(window=window, block=block, chunk=16)
    out, memory = jax.jit(partial(hola_memory, config=config))(*given, params_of(K), segment_ids=real)
    right = np.argmax(np.asarray(out)[:, -MANY:] @ codebook.T, axis=-1) == told[:MANY]
    recalled[window, block] = np.array([right[row, :n].mean() for row, n in enumerate(TOLD)])
    print(f"W = {window:2d}, C = {block:2d}: recall", " ".join(f"{x:.2f}" for x in recalled[window, block]))

# %% [markdown]
# **The plot**: with a block alone almost nothing is left, whatever its size: the noise was longer. With a cache
# the curves are $\min(1, W/n)$: it holds as many facts as it has rows, after any delay. What a larger $C$ is good
# for, this task does not ask: it is the span in which everything can be looked up, and the span after which a
# token must have earned its row.

# %%
figure, axes = plt.subplots(figsize=(6.4, 3.6))
for (colour, style), ((window, block), found) in zip(STYLES, recalled.items(), strict=True):
    axes.plot(TOLD, found, style, color=colour, label=f"W = {window}, C = {block}")
    if window:
        many = np.geomspace(TOLD[0], TOLD[-1])
        axes.plot(many, np.minimum(1, window / many), color=colour, linewidth=3, alpha=0.3)
axes.set_xscale("log", base=2)
axes.set(xlabel=f"facts told, {NOISE} tokens of noise ago", ylabel="share of facts recalled", ylim=(0, 1.04))
axes.set_title("64 exact entries: W rows hold W facts, whenever they were told")
axes.legend(title="pale: min(1, W / n)", loc="center left", bbox_to_anchor=(1.01, 0.5))
figure.tight_layout()
plt.show()

for (window, _), found in recalled.items():
    if window:
        assert np.abs(found - np.minimum(1, window / np.array(TOLD))).max() < 0.1
assert recalled[0, 64].max() < 0.5

# %%
at = TOLD.index(16)
print(
    f"ANSWER: a state holds about {held(64) / 64:.1f} K facts and forgets them as exp(-age / K); at K = 64 a fact costs it "
    f"{cost[64]:.0f} numbers, and a cache {64 + V}. Of 16 facts, {NOISE} tokens ago, 64 exact entries that are all recent "
    f"recall {recalled[0, 64][at]:.0%}; with 16 of them chosen by surprise it is {recalled[16, 48][at]:.0%}."
)

# %% [markdown]
# ## What to try next
#
# * Of more facts than `W`, which are kept? Make some values twice as long, or tell some with $\beta = 0.5$, and
#   look at `cached_positions(memory)`.
# * $\beta = 0.5$ writes half of each fact. Does the state hold more facts or fewer? And if each is told twice?
# * Keys that are correlated, as real keys are: draw them from 8 directions with noise. Where does $e^{-a/K}$
#   break, and what is the effective $K$?
# * The trained counterpart: "24 facts" and "needle at 2048" in [docs/results.md](../docs/results.md), with W = C
#   = 16.
