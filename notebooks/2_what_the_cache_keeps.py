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
# # 2. What the cache keeps, in pictures
#
# **Question.** A long text is mostly things the model has seen before, with a few facts in between that are told
# once. Which tokens does a cache of $W$ rows still hold when the facts are asked for, and where do the reads of
# the questions look?
#
# We make such a stream ourselves, so that we know what is in it, and look into one memory with no model around
# it.

# %%
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm

from hola_jax.diagnostics import memory_insight
from hola_jax.memory import CacheParams, MemoryConfig, cached_positions, hola_memory

plt.style.use("tableau-colorblind10")
BLUE, ORANGE, BROWN, LIGHT = "C0", "C1", "C5", "C2"

T, K, V = 384, 32, 32  # tokens; width of a key and of a value
W, C = 16, 32  # rows of the cache; tokens of a block
FACTS = 8  # told once; one more is told and later corrected

# %% [markdown]
# ## A stream of designed surprise
#
# * **Known**: six key-value pairs, again and again. Soon the state has them.
# * **Facts**: each a key and a value that were never seen, told once, far from the end.
# * **One fact is corrected**: the same key comes again with another value.
# * At the end a **question** for each: its key as the query, and nothing to write ($\beta = 0$).

# %%
KNOWN, FACT, CORRECTION, QUESTION = range(4)
draw = np.random.default_rng(7)
kind = np.full(T, KNOWN)
told = np.sort(draw.choice(np.arange(40, 250), FACTS + 1, replace=False))
kind[told] = FACT
corrected, correction = told[2], 270
kind[correction] = CORRECTION
questions = np.arange(T - FACTS - 1, T)
kind[questions] = QUESTION
answers = np.where(told == corrected, correction, told)  # the token that each question should find

pool_keys, pool_values = draw.normal(size=(6, K)), draw.normal(size=(6, V))
which = draw.integers(6, size=T)
known = (kind == KNOWN)[:, None]
k = np.where(known, pool_keys[which] + 0.05 * draw.normal(size=(T, K)), draw.normal(size=(T, K)))
v = np.where(known, pool_values[which] + 0.05 * draw.normal(size=(T, V)), draw.normal(size=(T, V)))
k[correction] = k[corrected]
q = k.copy()
q[questions] = k[answers]
v[questions] = 0
beta = np.where(kind == QUESTION, 0.0, 0.9)

inputs = [jnp.asarray(x[None, :, None], jnp.float32) for x in (q, k, v, beta, np.full(T, -0.001))]
params = CacheParams(jnp.ones(K), jnp.ones(K), sink_logit=jnp.zeros(1), gate_logit=jnp.zeros(1))
surprise = MemoryConfig(window=W, block=C, chunk=C)

# %% [markdown]
# `memory_insight` runs the memory's own functions and hands out what they hold: the scores, the cache that each
# block finds, the weights of each read. (Of a whole model, `insight(model, tokens)` gives the same for every
# layer and head.)

# %%
found = memory_insight(*inputs, params, config=surprise)
scores, kept, weights = (np.asarray(x) for x in (found.scores[:, 0], found.kept[:, 0], found.weights[:, 0]))

_, state = jax.jit(partial(hola_memory, config=surprise))(*inputs, params)
assert np.array_equal(kept[-1], cached_positions(state)[0, 0])  # what is shown is what the memory has

names = {KNOWN: "known pair", FACT: "fact", CORRECTION: "correction", QUESTION: "question"}
for each, name in names.items():
    of = scores[(kind == each) & (np.arange(T) >= C)]  # the first block meets an empty state
    print(f"mean surprise of a {name:<11} {of.mean():5.2f}   ({len(of)} tokens)")

# %% [markdown]
# **Picture 1: the score over time.** $m_t = \beta_t |e_t|$ is large for facts, at once, and large again for the
# correction: the state had learnt the old value, and the new one contradicts it. Known pairs sink as the state
# learns them. A question writes nothing, so it scores nothing.

# %%
figure, axes = plt.subplots(figsize=(8, 3.2))
looks = {KNOWN: (BLUE, ".", 4), FACT: (ORANGE, "o", 7), CORRECTION: (BROWN, "D", 7), QUESTION: (LIGHT, "|", 7)}
for each, (colour, marker, size) in looks.items():
    at = np.flatnonzero(kind == each)
    axes.plot(at, scores[at], marker, color=colour, markersize=size, label=names[each])
asked_in = questions[0] // C  # the block in which the questions stand
cached = kept[asked_in][kept[asked_in] >= 0]
bar = scores[cached].min()
axes.axhline(bar, color="black", linewidth=0.8, linestyle="--")
axes.text(T, bar + 0.1, f"smallest of the {W} kept", ha="right", va="bottom", fontsize=9)
axes.set(xlabel="token", ylabel=r"surprise $\beta_t |e_t|$", xlim=(-5, T + 5), ylim=(-0.3, 1.3 * scores.max()))
axes.set_title("A fact surprises once; what is known, no more")
axes.legend(ncols=4, loc="upper center")
plt.show()

# %% [markdown]
# **Picture 2: the cache as a raster.** Row $n$ is the cache that block $n$ finds, a mark for each token in it. A
# column that goes on is a token that was not evicted. With surprise the columns of the facts go on to the end; a
# cache of the latest tokens, of the same size, is a diagonal, and at the end holds nothing that is asked for. A
# random choice keeps what is common.

# %%
scored = {name: dataclasses.replace(surprise, score=name) for name in ("surprise", "recency", "random")}
caches = {name: np.asarray(memory_insight(*inputs, params, config=one).kept[:, 0]) for name, one in scored.items()}
wanted = np.isin(np.arange(T), answers)

figure, panels = plt.subplots(1, 3, figsize=(10, 3.4), sharey=True)
for axes, (name, rows) in zip(panels, caches.items(), strict=True):
    block, place = np.nonzero(rows >= 0)
    position = rows[block, place]
    for mine, colour, marker, label in (
        (~wanted[position], BLUE, ".", "another token"),
        (wanted[position], ORANGE, "s", "a token that will be asked for"),
    ):
        axes.plot(position[mine], block[mine], marker, color=colour, markersize=4, label=label)
    axes.plot([0, T], [0, T / C], color="0.7", linewidth=0.8)  # the running block
    axes.set(xlabel="position of the kept token", title=f'score "{name}"', xlim=(-5, T + 5))
panels[0].set_ylabel("block that finds the cache")
panels[0].invert_yaxis()
figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=2, bbox_to_anchor=(0.5, -0.08))
figure.suptitle("What each block finds in its cache")
figure.tight_layout()
plt.show()

share = {name: float(np.isin(answers, rows[asked_in]).mean()) for name, rows in caches.items()}
for name, held in share.items():
    print(f"score {name:<9} holds {held:.0%} of what is asked for, when it is asked")
assert share["surprise"] == 1 and share["recency"] == 0

# %% [markdown]
# **Picture 3: where the questions look.** Each row is one question; each column one row of its cache, and last
# its own block and the null sink. The queries are the keys of the facts, so a read should put its weight on one
# entry. What is in the cache is found; note the corrected fact: both values are there, under one key, and the
# read is split between them. The state has overwritten the old one. **An exact memory does not forget what was
# corrected**: that is what the state beside it is for.

# %%
columns = np.sort(cached)
rest = weights[questions][:, asked_in * C :].sum(axis=1)
image = np.column_stack([weights[questions][:, columns], rest, 1 - weights[questions].sum(axis=1)])
labels = [*map(str, columns), "block", "sink"]

figure, axes = plt.subplots(figsize=(8, 3.8))
shown = axes.imshow(np.maximum(image, 1e-4), cmap="cividis_r", norm=LogNorm(1e-3, 1), aspect="auto")
axes.set_xticks(range(len(labels)), labels, rotation=60)
axes.set_yticks(range(len(answers)), [f"{a}" if a != correction else f"{corrected}, corrected at {a}" for a in answers])
axes.set(xlabel="position of the token that is read", ylabel="question: asks for token")
axes.set_title("Each question reads the row of its fact")
figure.colorbar(shown, label="weight of the read")
plt.show()

once = answers != correction
on_answer = weights[questions, answers]
print(f"weight on the right token, of facts told once: {on_answer[once].mean():.2f}")
split = weights[questions[~once], [corrected, correction]]
print(f"of the corrected fact: {split[0]:.2f} on the old value, {split[1]:.2f} on the new")

key = k[correction] / np.linalg.norm(k[correction])
says = key @ np.asarray(state.fast_weights[0, 0])  # what the state answers to that key
old, new = np.linalg.lstsq(v[[corrected, correction]].T, says, rcond=None)[0]
print(f"what the state says to its key: {old:.2f} of the old value, {new:.2f} of the new")
assert new > 0.6 and abs(old) < 0.3
assert np.all(weights[questions].argmax(axis=1)[once] == answers[once]) and on_answer[once].min() > 0.5
assert np.allclose(*split, atol=1e-3)

# %%
print(
    f"ANSWER: {W} rows of {T} tokens hold {share['surprise']:.0%} of the {FACTS + 1} tokens that are asked for; the latest "
    f"{W} hold {share['recency']:.0%}, {W} at random {share['random']:.0%}."
)

# %% [markdown]
# ## What to try next
#
# * Make `FACTS` larger than `W`: which facts are lost first, and are they in the state?
# * Give the known pairs more noise than 0.05. At which noise do they begin to push facts out? Notebook 3 tries
#   other scores on a stream with noise in it.
# * Ask for the corrected fact with the gate shut (`gate_logit=-jnp.inf`): what does the state alone say?
# * Look into a model: `hola_jax.diagnostics.insight(model, tokens)` for one from `trained(folder)` (notebook 6),
#   or `make demo`, which shows these pictures for a text on a page that can be clicked.
