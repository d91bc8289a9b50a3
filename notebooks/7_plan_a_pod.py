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
# # 7. Plan a pod
#
# **Question.** A model of seven billion parameters is to be trained on a TPU pod that we do not have yet. How
# must it be divided so that it fits, what may a step take, and how large a pod is worth asking for?
#
# `hola plan` answers this by compiling the real step for chips that are not there, in minutes. Here is the part
# that needs no compiler and takes seconds: exact bytes of what is kept, and a rough estimate of the rest, by
# which `hola plan` decides what to compile first.

# %%
import dataclasses
import importlib.util

import matplotlib.pyplot as plt
import numpy as np

from configs import hola_7b, hola_340m
from hola_jax.config import flops_per_token, parameter_count
from train.layout import Layout
from train.mesh import make_mesh
from train.plan.chips import GIB
from train.plan.memory import part_bytes
from train.plan.search import candidates
from train.plan.show import shape_name
from train.plan.topology import topology

plt.style.use("tableau-colorblind10")
BLUE, ORANGE, GREY = "C0", "C1", "C2"

if importlib.util.find_spec("libtpu"):  # describes TPUs that are not there
    config, pods, pod = hola_7b.config, ("v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:4x4x4", "v5p:4x4x8"), "v5p:4x4x4"
else:
    print(
        "libtpu is not installed (pip install libtpu; no TPU is needed): this plans the 340M for host devices in place of"
    )
    print("the 7B for a pod, and the figures of their chip are round numbers, of no machine")
    config = dataclasses.replace(hola_340m.config, global_batch=16, microbatches=2)
    pods, pod = ("cpu:8", "cpu:4", "cpu:2", "cpu:1"), "cpu:8"

places = {name: topology(name) for name in pods}
place = places[pod]
chip, chips = place.chip, len(place.devices)

# %% [markdown]
# ## What must be kept
#
# Parameters and the two moments of Adam are float32: $3 \times 4$ bytes for each parameter, held all the time;
# gradients and activations come on top. On one chip that is

# %%
count = parameter_count(config.model)["total"]
print(f"{count:,} parameters; {12 * count / GIB:.3f} GiB to keep, {16 * count / GIB:.3f} GiB with the gradient")
print(f"a chip of {pod} has {chip.memory / GIB:.1f} GiB, the {chips} of them {chips * chip.memory / GIB:,.0f} GiB")

# %% [markdown]
# ## How to divide it
#
# A mesh is four numbers whose product is the number of chips: **data** (rows of a batch; parameters whole on
# each), **fsdp** (rows too, parameters in parts), **tensor** (heads and channels), **sequence** (tokens of a row;
# the memory's scan joins the parts). `candidates` lists the meshes that divide model and batch, with rough bytes
# and seconds. What is kept can be had exactly, from shapes and shardings.

# %%
found = candidates(config, place)
kept = []  # exact: (parameters, moments) on one chip
for each in found:
    state = Layout(config.model, make_mesh(each.mesh, place.devices)).abstract_state()
    moments = part_bytes((state["optimizer"]["mu"], state["optimizer"]["nu"]))
    kept.append((part_bytes(state["params"]), moments))
    shards = each.mesh.fsdp * each.mesh.tensor
    assert moments == 2 * kept[-1][0]
    assert 4 * count / shards <= kept[-1][0] < 1.05 * 4 * count / shards + 2**20  # small ones are whole everywhere
    if shards == 1:
        assert kept[-1][0] == 4 * count  # the bytes of the plan are the parameters, counted by hand

axes_of = [
    dict(zip(("data", "fsdp", "tensor", "sequence"), shape, strict=True))
    for shape in ((c.mesh.data, c.mesh.fsdp, c.mesh.tensor, c.mesh.sequence) for c in found)
]
names = [shape_name(shape) for shape in axes_of]
fitting = [c for c in found if c.bytes <= chip.memory]
best = min(fitting, key=lambda c: c.seconds)
print(f"{len(found)} meshes of {chips} chips divide this model and its batch, {len(fitting)} fit by the estimate")

# %% [markdown]
# **The plot**: memory of one chip for each mesh. What is kept (exact) shrinks with fsdp and tensor alone; the
# rest, gradient and activations, is an estimate fitted to what the compiler needs. What is right of the line does
# not fit.

# %%
order = np.argsort([c.bytes for c in found])[::-1]
figure, axes = plt.subplots(figsize=(7.6, 0.26 * len(found) + 1.4))
kept_gib = np.array([sum(kept[i]) / GIB for i in order])
total = np.array([found[i].bytes / GIB for i in order])
places_of = np.arange(len(order))
axes.barh(places_of, kept_gib, color=BLUE, label="parameters and moments (exact)")
axes.barh(
    places_of,
    total - kept_gib,
    left=kept_gib,
    color=ORANGE,
    hatch="//",
    edgecolor="white",
    label="gradient, activations (estimate)",
)
axes.axvline(chip.memory / GIB, color="black", linestyle="--", label="memory of a chip")
axes.set_yticks(places_of, [names[i] for i in order], fontsize=8)
axes.set_xlim(right=1.05 * max(total.max(), chip.memory / GIB))
axes.set(xlabel="GiB on one chip", title=f"{count:,} parameters on {pod}: what fits")
axes.legend(loc="upper right")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Which of them is fast
#
# **The plot**: seconds of a step against memory. Seconds here are matrix products at 70% of the peak and
# collectives at the bandwidth of the links they cross, one after the other: a lower bound by which to rank, not a
# promise. Down and left of the line is where one wants to be.

# %%
figure, axes = plt.subplots(figsize=(7, 3.8))
for marker, colour, label, some in (
    ("o", BLUE, "fits", fitting),
    ("x", GREY, "does not", [c for c in found if c not in fitting]),
):
    axes.plot([c.bytes / GIB for c in some], [c.seconds for c in some], marker, color=colour, label=label)
here = (best.bytes / GIB, best.seconds)
axes.annotate(names[found.index(best)], here, xytext=(-6, -16), textcoords="offset points", fontsize=9)
axes.legend(loc="upper left")
axes.axvline(chip.memory / GIB, color="black", linestyle="--")
axes.text(chip.memory / GIB, axes.get_ylim()[1] * 0.97, " memory of a chip", va="top", fontsize=9)
axes.set(xlabel="GiB on one chip (estimate)", ylabel="seconds of a step (estimate)", title=f"Meshes of {pod}")
axes.set_ylim(bottom=0)
plt.show()

tokens = config.global_batch * config.row
operations = 3 * flops_per_token(config.model, config.row) * tokens


def mfu(seconds: float, devices: int) -> float:
    """Model operations over what the chips could do meanwhile."""
    return operations / (seconds * chip.flops * devices)


chosen = names[found.index(best)]
print(f"fastest that fits: {chosen}, {best.bytes / GIB:.3f} GiB of {chip.memory / GIB:.1f}")
rate = tokens / best.seconds
print(f"{best.seconds:.3g} s a step of {tokens:,} tokens: {rate:,.0f} tokens/s, MFU {mfu(best.seconds, chips):.0%}")

# %% [markdown]
# ## How large a pod
#
# **The plot**: the best mesh of pods of several sizes, for the same batch. The line is the smallest that fits,
# sped up perfectly; what lies above it is lost in talk.

# %%
best_of = {}
for name, each in places.items():
    room = [c for c in candidates(config, each) if c.bytes <= chip.memory]
    best_of[len(each.devices)] = min(room, key=lambda c: c.seconds) if room else None
    said = f"{best_of[len(each.devices)].seconds:.3g} s" if room else "no mesh fits"
    print(f"{name:<10} {len(each.devices):4d} chips: {said}")
sizes = sorted(size for size, one in best_of.items() if one)
smallest = sizes[0]

figure, axes = plt.subplots(figsize=(6.4, 3.6))
took = np.array([best_of[size].seconds for size in sizes])
axes.loglog(sizes, took, "o", color=BLUE, base=2, label="best mesh that fits")
axes.loglog(sizes, took[0] * smallest / np.array(sizes), color=GREY, base=2, label="perfect speed-up")
for size in sorted(set(best_of) - set(sizes)):
    axes.axvline(size, color=ORANGE, linestyle=":")
    axes.text(size, took.max(), " nothing fits", rotation=90, va="top", fontsize=9)
axes.set_xticks(sorted(best_of), [str(size) for size in sorted(best_of)])
axes.set_yticks(took, [f"{seconds:.3g}" for seconds in took])
axes.set(xlabel="chips", ylabel="seconds of a step (estimate)", title="More chips, the same batch")
axes.legend()
plt.show()
assert all(took[1:] < took[:-1]) and all(took >= took[0] * smallest / np.array(sizes) * (1 - 1e-6))

# %%
print(
    f"ANSWER: {count:,} parameters fit on {smallest} chips, the fewest of those tried; on {pod} the mesh is "
    f"{chosen}, {best.bytes / GIB:.2g} GiB of a chip's {chip.memory / GIB:.0f} and about {best.seconds:.3g} s a step, "
    f"MFU {mfu(best.seconds, chips):.0%} at best."
)

# %% [markdown]
# ## What to try next
#
# * Compile it: `hola plan configs/hola_7b.py --topology v5p:4x4x4` tells what the compiler makes of the first
#   three, term by term. There kernels take longer than their products alone, so the step is slower than here
#   ([docs/scale.md](../docs/scale.md)).
# * `dataclasses.replace(config, microbatches=8)`, or `remat="none"` of the model: how far do the bars move?
# * Rows of a million tokens, `row=2**20, global_batch=4`: which meshes are left, and what does the sequence axis
#   exchange?
# * Another chip: `v5e:16x16`, `v6e:4x4` or `h200:4x8`; `train/plan/chips.py` has one line for each.
