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
# # 6. From a checkpoint to a branching conversation
#
# **Question.** A long text has been read once. Can several conversations go on from there, today and tomorrow,
# without reading it again; what does such a memory weigh; and is a branch from it the same as a conversation from
# the beginning?
#
# We train a tiny HOLA (half a minute; it will not say anything wise), open its run folder as one opens any, and
# branch.

# %%
import dataclasses
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from hola_jax import Generator, MemoryConfig, ModelConfig, Sampling
from hola_jax.model import state_bytes
from train.config import CheckpointConfig, TrainConfig
from train.data.config import LibraryText
from train.loop import run
from train.optimizer import OptimizerConfig
from train.sources import library_files
from train.trained import trained

plt.style.use("tableau-colorblind10")

STEPS = 60  # a few thousand, and it writes Python
folder = Path(tempfile.mkdtemp(prefix="hola-notebook-"))

# %% [markdown]
# ## A run
#
# This is what `hola train` runs: from a configuration to checkpoints in a folder. The text is the standard
# library's own source, bytes as tokens.

# %%
config = TrainConfig(
    run=str(folder / "run"),
    model=ModelConfig(
        vocab_size=256,  # bytes
        dim=32,
        layers=2,
        heads=2,
        mlp_dim=64,
        dtype="float32",
        memory=MemoryConfig(window=8, block=16, chunk=16),
    ),
    data=LibraryText(),
    optimizer=OptimizerConfig(peak=1e-2, warmup=10),
    checkpoint=CheckpointConfig(every=STEPS),
    steps=STEPS,
    global_batch=8,
    row=64,
    log_every=20,
)
assert run(config) == 0

model, tokenizer = trained(folder / "run")
print(f"{tokenizer.name} as tokens, {model.config.layers} layers, trained {STEPS} steps")

# %% [markdown]
# ## Read once
#
# `Generator.read` gives the memory of a text, a **prefix**: for each layer and head the state $S$, $W$ rows of
# cache and the running block. `save` writes it to a file, `load` reads it back, here or on another machine that
# has the same model.

# %%
generator = Generator(model, tokenizer, width=2, pieces=(128,))  # one width and one length: two programs in all
book = library_files()[0].read_text()[:1500]
SAMPLING = Sampling(temperature=0.7)

prefix = generator.read([book])
size = generator.save(folder / "book.safetensors", prefix)
restored = generator.load(folder / "book.safetensors")
print(f"{restored.positions[0]} tokens read; their memory: {prefix.nbytes:,} bytes, {size:,} as a file")
assert restored.positions == prefix.positions

# %% [markdown]
# ## Branch
#
# `rows([0, 0])` is the same memory twice: two branches, each with a question of its own, computed as one batch. A
# prefix is never changed, so one can come back to it; and the end of a branch is a prefix again.
#
#     book ─┬─ "\ndef " ── answer
#           └─ "\nclass " ── answer ─┬─ "\n    def " ── answer
#                                    └─ "\n    return " ── answer

# %%
questions = ["\ndef ", "\nclass "]
branches = generator.generate(questions, prefix=restored.rows([0, 0]), max_tokens=24, sampling=SAMPLING, seed=[1, 2])
for question, answer in zip(questions, branches, strict=True):
    print(f"{question!r:12} -> {answer.text!r}")

second = generator.read([questions[1]], restored)
second = generator.read([branches[1].tokens], second)  # the branch with its answer, as a memory
deeper = ["\n    def ", "\n    return "]
leaves = generator.generate(deeper, prefix=second.rows([0, 0]), max_tokens=24, sampling=SAMPLING, seed=[3, 4])
for question, answer in zip(deeper, leaves, strict=True):
    print(f"{questions[1] + '...' + question!r:32} -> {answer.text!r}")

# %% [markdown]
# ## The same as from the beginning?
#
# The memory of a text is one thing, however it came about: read at once, in pieces, restored from a file, in a
# batch beside another branch. So each branch must be, token for token, what the model says when it is given the
# whole conversation from the start. Even where it is sampled: a draw depends on the row's seed and the position
# alone.

# %%
opening = [*tokenizer.encode([book + questions[1]])[0], *branches[1].tokens]
conversations = {
    "branch 1": (book + questions[0], 1, branches[0]),
    "branch 2": (book + questions[1], 2, branches[1]),
    "branch 2.1": ([*opening, *tokenizer.encode([deeper[0]])[0]], 3, leaves[0]),
    "branch 2.2": ([*opening, *tokenizer.encode([deeper[1]])[0]], 4, leaves[1]),
}
compared = 0
for name, (whole, seed, branch) in conversations.items():
    again = generator.generate([whole], max_tokens=24, sampling=SAMPLING, seed=seed)[0]
    assert again.tokens == branch.tokens, name
    compared += len(again.tokens)
    print(f"{name:<11} {len(again.tokens)} tokens, the same after {again.prompt_tokens} tokens of prompt")

# %% [markdown]
# ## What a memory weighs
#
# **The plot**: bytes of one row's memory by what it has read. HOLA's are the same after 50 tokens and after
# 1,500: measured, by reading. A Transformer of the same shape keeps a key and a value of every token, in every
# layer; its line is computed from its state's shapes.

# %%
tokens = np.asarray(tokenizer.encode([book])[0])
lengths = [length for length in (50, 100, 200, 400, 800, 1500) if length <= len(tokens)]
weighed = [generator.read([tokens[:length]]).nbytes for length in lengths]
rest = prefix.nbytes - state_bytes(model.config)  # the next token's logits, and which tokens were seen


def transformer_bytes(length: int) -> int:
    other = dataclasses.replace(model.config, mixer="transformer", max_length=length)
    return state_bytes(other) + rest


longer = [*lengths, 4000, 16_000, 64_000]
figure, axes = plt.subplots(figsize=(6.6, 3.6))
axes.loglog(longer, [transformer_bytes(length) for length in longer], "s--", color="C1", label="Transformer (computed)")
axes.axhline(weighed[0], color="C0", linewidth=0.8)
axes.loglog(lengths, weighed, "o", color="C0", label="HOLA (measured)")
axes.set(
    xlabel="tokens read", ylabel="bytes of one row's memory", title="HOLA's memory does not grow with what was read"
)
axes.legend()
plt.show()
assert len(set(weighed)) == 1

crossing = next(length for length in range(1, 10_000) if transformer_bytes(length) > weighed[0])
print(
    f"{weighed[0]:,} bytes after {lengths[0]} tokens and after {lengths[-1]}; a Transformer has more from {crossing} on"
)

# %%
print(
    f"ANSWER: {len(conversations)} branches from one saved memory of {weighed[0]:,} bytes say the {compared} tokens "
    f"that they say when all is read from the beginning. A Transformer's memory of {longer[-1]:,} tokens is "
    f"{transformer_bytes(longer[-1]) / weighed[0]:.0f} times as large."
)

# %% [markdown]
# ## What to try next
#
# * `make demo`, then `trained("runs/three/hola")` in place of our run: answers that are Python.
# * `Sampling(temperature=0.8)` and `prefix.rows([0] * 8)`: eight drafts of one continuation. A row's text depends
#   on its own seed alone.
# * `generator.stream(...)` gives text as it comes; `hola serve` does all this over HTTP
#   ([docs/inference.md](../docs/inference.md)).
# * Load the file with another model's generator: it is refused, and says why.
