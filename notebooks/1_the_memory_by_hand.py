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
# # 1. The memory by hand
#
# **Question.** What does one head of a HOLA layer remember of the tokens it has read, and can we compute it
# ourselves, equation by equation, and get what the library gets?
#
# HOLA (arXiv 2607.02303) has two memories side by side: a matrix $S$ that every token is written into, and a
# small cache that keeps a few tokens exactly as they were. Below is the whole of it in NumPy, in float64, for one
# row and one head.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from hola_jax.memory import CacheParams, MemoryConfig, cached_positions, hola_memory, init_state

plt.style.use("tableau-colorblind10")
BLUE, ORANGE = "C0", "C1"

T, K, V = 40, 8, 6  # tokens; width of a key and of a value
W, C = 4, 8  # rows of the cache; tokens of a block

# %% [markdown]
# ## What comes in
#
# A layer makes five things of each token: a query, a key and a value, how firmly to write, $\beta_t \in (0, 1)$,
# and how much of the past to keep, $\alpha_t = e^{g_t}$. Here they are drawn at random. To give the memory
# something to find, most tokens repeat one of three key-value pairs, and every seventh is new.

# %%
draw = np.random.default_rng(0)
known_keys, known_values = draw.normal(size=(3, K)), draw.normal(size=(3, V))
which = draw.integers(3, size=T)
new = np.arange(T) % 7 == 3
told_before = ~new & np.array([which[t] in which[:t][~new[:t]] for t in range(T)])

k = np.where(new[:, None], draw.normal(size=(T, K)), known_keys[which] + 0.1 * draw.normal(size=(T, K)))
v = np.where(new[:, None], draw.normal(size=(T, V)), known_values[which] + 0.1 * draw.normal(size=(T, V)))
q = k + 0.3 * draw.normal(size=(T, K))
beta = draw.uniform(0.5, 1.0, size=T)
g = -draw.uniform(0.0, 0.02, size=T)

# %% [markdown]
# ## The state, and what surprises it
#
# The state is asked what it knows of the new key, and the difference to the value that came is written back:
#
# $$e_t = v_t - \alpha_t\, \hat k_t^\top S_{t-1}, \qquad S_t = \alpha_t S_{t-1} + \beta_t\, \hat k_t e_t^\top, \qquad
#   o^{state}_t = K^{-1/2}\, \hat q_t^\top S_t$$
#
# with $\hat k = k / \sqrt{|k|^2 + 10^{-6}}$, and $\hat q$ alike. How much was written is the **surprise**:
#
# $$m_t = \beta_t\, |e_t|$$


# %%
def unit(x):
    return x / np.sqrt(np.sum(x * x) + 1e-6)


S = np.zeros((K, V))
m, o_state = np.zeros(T), np.zeros((T, V))
for t in range(T):
    e = v[t] - np.exp(g[t]) * unit(k[t]) @ S
    S = np.exp(g[t]) * S + beta[t] * np.outer(unit(k[t]), e)
    o_state[t] = K**-0.5 * unit(q[t]) @ S
    m[t] = beta[t] * np.linalg.norm(e)

# %% [markdown]
# ## The cache
#
# Tokens stand in blocks of $C$. Block $n$ finds in its cache the $W$ tokens with the largest $m$ among all
# earlier blocks, of two equal ones the earlier:
#
# $$\text{cache}_n = \operatorname{top}_W \{(m_s, s) : s < nC\}$$
#
# Since $m_s$ is fixed once it is written, the best of everything are the best of (the best so far, the last
# block). That is why a cache of $W$ rows is enough, for any $T$.

# %%
cache = [np.zeros(0, int)]
for n in range(T // C):
    candidates = np.concatenate([cache[n], np.arange(n * C, (n + 1) * C)])
    order = np.lexsort((candidates, -m[candidates]))  # by m, the largest first; then by position
    cache.append(candidates[order[:W]])

for n, kept in enumerate(cache):
    best_of_all = np.lexsort((np.arange(n * C), -m[: n * C]))[:W]
    assert set(kept) == set(best_of_all)
    print(f"in front of block {n} the cache holds", kept.tolist())

# %% [markdown]
# ## The read
#
# Token $t$ sees the cache of its block, its own block up to itself, and a **null sink**, an entry with a learned
# logit and value zero: where to look when there is nothing to be found. At most $W + C + 1$ entries. The read is
# sharp attention over them, of keys and queries brought to root mean square 1 and scaled by learned
# $\gamma_q, \gamma_k$:
#
# $$o^{cache}_t = \sum_j \operatorname{softmax}_j\!\big(\tilde q_t^\top \tilde k_j / \sqrt K\big)\, v_j, \qquad
#   o_t = o^{state}_t + \sigma(\text{gate})\, o^{cache}_t$$

# %%
query_scale, key_scale = draw.uniform(0.8, 1.6, size=(2, K))
sink_logit, gate_logit = 0.5, -1.0


def rms_norm(x, scale):
    return x / np.sqrt(np.mean(x * x) + 1e-6) * scale


weights, out = np.zeros((T, T)), np.zeros((T, V))
for t in range(T):
    visible = np.concatenate([cache[t // C], np.arange(t // C * C, t + 1)]).astype(int)
    logits = [rms_norm(q[t], query_scale) @ rms_norm(k[s], key_scale) / np.sqrt(K) for s in visible]
    powers = np.exp([*logits, sink_logit])
    weights[t, visible] = powers[:-1] / powers.sum()
    out[t] = o_state[t] + 1 / (1 + np.exp(-gate_logit)) * weights[t] @ v

# %% [markdown]
# ## The library
#
# `hola_memory` takes the same arrays with a batch and heads, `[B, T, H, K]`, and gives all tokens at once: the
# state in chunks, the caches of all blocks by a prefix scan. It must be the same thing.


# %%
def arrays(part):
    """The tokens of a slice as the library wants them: B = H = 1, float32."""
    wide = [jnp.asarray(x[None, part, None], jnp.float32) for x in (q, k, v)]
    return *wide, *(jnp.asarray(x[None, part, None], jnp.float32) for x in (beta, g))


def scalar(x):
    return jnp.full(1, x, jnp.float32)


params = CacheParams(jnp.float32(query_scale), jnp.float32(key_scale), scalar(sink_logit), scalar(gate_logit))
config = MemoryConfig(window=W, block=C, chunk=C)
memory = jax.jit(partial(hola_memory, config=config))
answer, state = memory(*arrays(slice(T)), params)

difference = float(np.abs(answer[0, :, 0] - out).max())
print(f"largest difference between our outputs and the library's: {difference:.1e}")
print("kept by the library:", cached_positions(state)[0, 0].tolist())
assert difference < 1e-5
assert cached_positions(state)[0, 0].tolist() == cache[-1].tolist()
np.testing.assert_allclose(state.fast_weights[0, 0], S, atol=1e-5)

# %% [markdown]
# **The plot**: the surprise of each token, and what the cache holds after the last block. Pairs that come for the
# first time stand out, because the state could not know them; repetitions fall towards zero. Nobody told the
# cache which tokens matter.

# %%
figure, axes = plt.subplots(figsize=(8, 3.2))
held = np.isin(np.arange(T), cache[-1])
axes.bar(np.arange(T), m, color=np.where(told_before, BLUE, ORANGE), width=0.7)
axes.plot(np.flatnonzero(held), m[held] + 0.12, "kv", markersize=7)
for n in range(0, T // C, 2):
    axes.axvspan(n * C - 0.5, (n + 1) * C - 0.5, color="0.94", zorder=0)
axes.bar(0, 0, color=BLUE, label="a pair that came before")
axes.bar(0, 0, color=ORANGE, label="a new pair")
axes.plot([], [], "kv", label=f"kept, the {W} largest")
axes.set(xlabel="token (shading: blocks)", ylabel=r"surprise $m_t = \beta_t |e_t|$", xlim=(-0.5, T - 0.5))
axes.set_title("What surprises the state is kept")
axes.legend(loc="upper center", ncols=3)
axes.set_ylim(0, 1.25 * m.max())
plt.show()

print(f"mean surprise of new pairs {m[~told_before].mean():.2f}, of repeated ones {m[told_before].mean():.2f}")
assert not told_before[held].any()

# %% [markdown]
# **The second plot**: where each token may look, and how much weight it puts there. The steps on the diagonal are
# the running blocks; the bars below it are rows of the cache, which stand there until something more surprising
# comes.

# %%
figure, axes = plt.subplots(figsize=(5.4, 4.6))
image = axes.imshow(np.where(weights > 0, weights, np.nan), cmap="viridis_r", vmin=0, vmax=1, aspect="auto")
axes.set(
    xlabel="token that is read", ylabel="token that reads", title="Exact reads: a few old tokens, and the running block"
)
figure.colorbar(image, label="weight of the read (the rest: null sink)")
plt.show()

visible = np.count_nonzero(weights, axis=1) + 1
print(f"entries that a token sees, null sink included: at most {visible.max()}; W + C + 1 = {W + C + 1}, whatever T is")
assert visible.max() <= W + C + 1

# %% [markdown]
# ## One meaning, however it is read
#
# Nothing above depended on how many tokens come at a time. So a prompt read at once, read in two pieces cut in
# the middle of a block, and read token by token leave the same memory, of the same size.

# %%
empty = init_state(config, batch=1, heads=1, key_dim=K, value_dim=V)
assert (T // 2) % C  # in the middle of a block
first, halfway = memory(*arrays(slice(0, T // 2)), params, state=empty)
second, pieces = memory(*arrays(slice(T // 2, T)), params, state=halfway)
one_by_one, single = [], empty
for t in range(T):
    token, single = memory(*arrays(slice(t, t + 1)), params, state=single)
    one_by_one.append(token)

for name, got, left in (
    ("in two pieces", jnp.concatenate([first, second], axis=1), pieces),
    ("token by token", jnp.concatenate(one_by_one, axis=1), single),
):
    apart = float(jnp.abs(got - answer).max())
    assert apart < 1e-5 and jnp.array_equal(cached_positions(left), cached_positions(state))
    assert left.nbytes == state.nbytes
    print(f"{name}: outputs differ by at most {apart:.1e}, the same tokens are kept, {left.nbytes:,} bytes as before")

print(f"\nANSWER: a page of NumPy is HOLA's memory to {difference:.0e}; it kept tokens {sorted(cache[-1].tolist())}.")

# %% [markdown]
# ## What to try next
#
# * Set `beta` to 0 for one of the new tokens: it surprises as much, is not written, and is not kept. $\beta$ is
#   how a layer says that noise is noise.
# * `MemoryConfig(score="residual")` ranks by $|e_t|$ alone, `"recency"` by position: which tokens does each keep?
#   Notebook 3 asks that of longer streams.
# * `window=0` and `gate_logit=-inf` is Gated DeltaNet; `block >= T` is causal softmax attention added to it. Both
#   are tests in `tests/laws`.
# * `hola_jax/memory/reference.py` is the same in JAX, with the paper's equation numbers, documents and gradients.
