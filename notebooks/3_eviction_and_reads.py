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
# # 3. What to evict, and how to read
#
# **Question.** The cache has two parts that can be chosen freely: the *score* by which a token may stay, and the
# *read* that finds it again. What does each choice get wrong?
#
# First without any training, on streams in which we know what matters; then what trained models did, from the
# result files in `docs/results`.

# %%
import dataclasses
import statistics
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import hola_jax
from configs.study import reads, scores
from hola_jax.config import parameter_count
from hola_jax.memory import CacheParams, MemoryConfig, cached_positions, hola_memory
from train.study.results import read_results, value

plt.style.use("tableau-colorblind10")
BLUE, ORANGE, GREY = "C0", "C1", "C2"

STREAMS, T, FACTS = 16, 512, 12
K, V, W, C = 16, 16, 16, 32

# %% [markdown]
# ## A stream that tempts every score
#
# | token | key, value | $\beta$ | what it is in a text |
# |---|---|---|---|
# | known | one of six pairs, over and over | 0.9 | what the state has learnt already |
# | noise | both new | 0.15 | nothing to remember: a trained $\beta$ says so |
# | fact | both new, told once | 0.9 | what will be asked for |
#
# None of the facts stands in the last two blocks, so only a cache can have them exactly.

# %%
KNOWN, NOISE, FACT = range(3)


def stream(seed: int) -> tuple[np.ndarray, ...]:
    """(k [T K], v [T V], beta [T], kind [T])"""
    draw = np.random.default_rng(seed)
    kind = np.where(draw.random(T) < 0.6, KNOWN, NOISE)
    kind[draw.choice(np.arange(C, T - 2 * C), FACTS, replace=False)] = FACT
    pool_keys, pool_values = draw.normal(size=(6, K)), draw.normal(size=(6, V))
    which, known = draw.integers(6, size=T), (kind == KNOWN)[:, None]
    k = np.where(known, pool_keys[which] + 0.05 * draw.normal(size=(T, K)), draw.normal(size=(T, K)))
    v = np.where(known, pool_values[which] + 0.05 * draw.normal(size=(T, V)), draw.normal(size=(T, V)))
    return k, v, np.where(kind == NOISE, 0.15, 0.9), kind


k, v, beta, kind = (np.stack(parts) for parts in zip(*map(stream, range(STREAMS)), strict=True))
one_head = [jnp.asarray(x[:, :, None], jnp.float32) for x in (k, k, v, beta, np.full((STREAMS, T), -0.002))]
params = CacheParams(jnp.ones(K), jnp.ones(K), sink_logit=jnp.zeros(1), gate_logit=jnp.zeros(1))

# %% [markdown]
# Seven scores: three of the write ($\beta|e|$, $|e|$, $\beta|v|$), the position, a hash, the attention received
# so far (H2O, arXiv 2306.14048) and how badly the state gives the pair back now (LoLA, arXiv 2505.23666). All
# else is the same. The implementation is the token-by-token reference, which compiles soonest.

# %%
NAMES = {
    "surprise": r"surprise $\beta|e|$",
    "residual": r"residual $|e|$",
    "write": r"write $\beta|v|$",
    "recency": "recency",
    "random": "random",
    "attention": "attention (H2O)",
    "recall": "recall error (LoLA)",
}
kept = {}
for score in NAMES:
    config = MemoryConfig(window=W, block=C, chunk=C, score=score)
    run = jax.jit(partial(hola_memory, config=config, implementation="reference"))
    kept[score] = np.asarray(cached_positions(run(*one_head, params)[1])[:, 0])  # [streams W]

holds = {score: np.take_along_axis(kind, np.maximum(rows, 0), axis=1) for score, rows in kept.items()}
assert all((rows >= 0).all() for rows in kept.values())  # every cache is full
counts = {score: [np.mean(np.sum(of == each, axis=1)) for each in (FACT, KNOWN, NOISE)] for score, of in holds.items()}
recalled = {score: found[0] / FACTS for score, found in counts.items()}
for score, share in recalled.items():
    print(f"score {score:<10} holds {share:4.0%} of the facts at the end")

# %% [markdown]
# **The plot**: what fills the cache at the end. Each rival is fooled by what it cannot see. $|e|$ keeps noise,
# since noise is never expected. $\beta|v|$ keeps what is written firmly, known or not. Attention keeps what is
# read often, which is what the state knows best, and what has just read itself. The recall error keeps what the
# state was told *not* to write. Only the product of both, the size of the write itself, is large for facts alone.

# %%
figure, axes = plt.subplots(figsize=(7.6, 3.6))
place, left = np.arange(len(NAMES)), np.zeros(len(NAMES))
for number, (label, colour, hatch) in enumerate([("facts", ORANGE, ""), ("known", BLUE, "//"), ("noise", GREY, "..")]):
    width = np.array([counts[score][number] for score in NAMES])
    axes.barh(place, width, left=left, color=colour, hatch=hatch, edgecolor="white", label=label)
    left += width
axes.axvline(FACTS, color="black", linewidth=0.8, linestyle="--")
axes.text(FACTS + 0.1, -0.75, f"{FACTS} facts were told", fontsize=9, va="bottom")
axes.set_yticks(place, list(NAMES.values()))
axes.invert_yaxis()
axes.set(xlabel=f"rows of the cache at the end (mean of {STREAMS} streams)", xlim=(0, W))
axes.set_title("What each score fills the cache with", pad=18)
axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
figure.tight_layout()
plt.show()
assert recalled["surprise"] > 0.7 > 0.3 > max(share for score, share in recalled.items() if score != "surprise")

# %% [markdown]
# ## How to read
#
# A read of $n$ visible entries finds one key among $n - 1$ others by a softmax. With unit vectors and a
# temperature $\tau$ the logits are $\tau \cos\theta$; RMSNorm with gains $\gamma_q, \gamma_k$ makes them
# $\gamma_q \gamma_k \sqrt K \cos\theta$. So it is the same read with $\tau = \gamma_q\gamma_k\sqrt K$, and what
# differs is where it *begins*: $\tau = 1$ for unit vectors, and $\sqrt K$ for RMSNorm. Of random keys in many
# dimensions the others have $\cos\theta \approx 0$, so the right one gets about
#
# $$w(\tau) = \frac{e^{\tau}}{e^{\tau} + (n - 1)\, e^{\tau^2 / 2K}}.$$

# %%
WIDE, ENTRIES = 256, 64 + 256  # K, and W + C, of the paper's 340M model
taus = np.geomspace(0.5, 64, 22)
draw = np.random.default_rng(0)
keys = draw.normal(size=(20, ENTRIES, WIDE))
keys /= np.linalg.norm(keys, axis=-1, keepdims=True)


def weight_on_the_right_one(noise: float) -> np.ndarray:
    """Mean weight of the entry that is asked for, by tau; queries are its key and so much noise."""
    query = keys[:, 0] + noise * draw.normal(size=(20, WIDE)) / np.sqrt(WIDE)
    query /= np.linalg.norm(query, axis=-1, keepdims=True)
    cosines = np.einsum("rk,rnk->rn", query, keys)
    logits = np.concatenate([taus[:, None, None] * cosines, np.zeros((len(taus), 20, 1))], axis=-1)  # ... and the sink
    return np.asarray(jax.nn.softmax(logits, axis=-1))[..., 0].mean(axis=1)


exact, noisy = weight_on_the_right_one(0.0), weight_on_the_right_one(1.0)
theory = 1 / (1 + ENTRIES * np.exp(taus**2 / (2 * WIDE) - taus))
flat, sharp = (float(np.interp(tau, taus, exact)) for tau in (1, WIDE**0.5))
print(f"of {ENTRIES} entries and the sink, the right one gets")
print(f"  {flat:.3f} by a flat read, tau = 1")
print(f"  {sharp:.3f} by RMSNorm at its start, tau = {WIDE**0.5:.0f}")
assert flat < 0.02 and sharp > 0.99 and np.abs(exact - theory).max() < 0.02

# %%
figure, axes = plt.subplots(figsize=(7, 3.5))
axes.semilogx(taus, theory, color="0.6", linewidth=4, label=r"$w(\tau)$", base=2)
axes.semilogx(taus, exact, "o-", color=BLUE, markersize=4, label="query = key", base=2)
axes.semilogx(taus, noisy, "s--", color=ORANGE, markersize=4, label="query = key + as much noise", base=2)
for tau, label in ((1, "unit vectors\nbegin here"), (WIDE**0.5, "RMSNorm\nbegins here")):
    axes.axvline(tau, color="black", linewidth=0.8, linestyle=":")
    axes.text(tau * 1.06, 0.5, label, fontsize=9)
axes.set(
    xlabel=r"sharpness $\tau$",
    ylabel="weight on the right entry",
    title=f"A flat read of {ENTRIES} entries finds nothing",
)
axes.legend(loc="upper left")
plt.show()

# %% [markdown]
# The library's own two reads agree with that: RMSNorm with gains of one is unit vectors with $\tau = \sqrt K$.

# %%
small = MemoryConfig(window=W, block=C, chunk=C)
unit = params._replace(query_scale=None, key_scale=None, temperature=jnp.full(1, K**0.5))
both = [
    jax.jit(partial(hola_memory, config=one, implementation="reference"))(*(x[:1, : 2 * C] for x in one_head), learnt)[
        0
    ]
    for one, learnt in ((small, params), (dataclasses.replace(small, read="unit_l2"), unit))
]
apart = float(jnp.abs(both[0] - both[1]).max())
print(f"the two reads differ by at most {apart:.1e}")
assert apart < 1e-4

# %% [markdown]
# ## And trained?
#
# The studies `configs/study/scores.py` and `reads.py` train small models on planted facts, three seeds of each
# row; their results are in the repository, one file a run (the read "attention" is a Transformer). What we saw
# without training says what *can* be recalled; whether it *is* also depends on training: gradients must find the
# read. In that task little is said twice, and $\beta$ learns what is noise: so $\beta|v|$ comes nearer to
# surprise than on the stream above.

# %%
folder = Path(hola_jax.__file__).parents[1] / "docs" / "results"
MEASURE = "12 facts"
trained = {}
for name, study in (("scores", scores.study), ("reads", reads.study)):
    results = read_results(study, folder / name)
    assert results, f"{folder / name} has no results; notebooks read those of a clone of the repository"
    trained[name] = {
        row: found
        for row in study.rows
        if (found := [value(study, MEASURE, result) for cell, result in results.items() if cell.row == row])
    }

figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True)
titles = {"scores": "which score (all read by unit vectors)", "reads": "which read"}
for axes, (name, rows) in zip(panels, trained.items(), strict=True):
    for place, found in enumerate(rows.values()):
        axes.plot(found, [place] * len(found), "o", color=BLUE, markersize=5, alpha=0.8)
        axes.plot(statistics.mean(found), place, "|", color=ORANGE, markersize=18, markeredgewidth=3)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.9")
    axes.set(xlabel=f"accuracy, {MEASURE}", title=titles[name], xlim=(-0.03, 1.03))
figure.suptitle("Trained: dots are seeds, bars their mean")
figure.tight_layout()
plt.show()

print(f"models of {parameter_count(reads.study.base.model)['total']:,} parameters, means over their seeds")
for name, rows in trained.items():
    print(f"{name}: " + ", ".join(f"{row} {statistics.mean(found):.2f}" for row, found in rows.items()))

# %%
best_rival = max((share, score) for score, share in recalled.items() if score != "surprise")
print(
    f"ANSWER: of {FACTS} facts among noise, surprise holds {recalled['surprise']:.0%} in {W} rows, the next best score, "
    f"{best_rival[1]}, {best_rival[0]:.0%}; of {ENTRIES} entries a flat read gives the right one {flat:.1%} of its weight, "
    f"a sharp one {sharp:.1%}."
)

# %% [markdown]
# ## What to try next
#
# * The order of the scores hangs on $\beta$: set the noise's to 0.9, as an untrained layer might. What does
#   surprise keep then, and which score does not care?
# * Retell each fact once, in the middle. Does it leave the cache? (The score is fixed when it is written;
#   `recall` is not.)
# * `MemoryConfig(read_energy=0.9)` drops the smallest entries of each read; how many are left at $\tau = 16$?
#   `hola_jax.diagnostics.entries_kept` tells for a model.
# * Train a row of your own: copy `configs/study/scores.py`, and `hola study` compares it with these
#   ([docs/studies.md](../docs/studies.md)).
