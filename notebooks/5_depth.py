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
# # 5. Depth: what passes from layer to layer
#
# **Question.** A layer reads the sum of all that earlier layers said. What happens to that sum over depth, what
# changes if a layer *chooses* what to read (Attention Residuals, arXiv 2603.15031), and where do the reads over
# time go when there is nothing to look for (spikes and sinks, arXiv 2603.05498)?
#
# Four models, alike but for the rule or the mixer, learn bytes of the standard library's source for a few seconds
# each. `STEPS` says how long: thousands are what sinks and massive activations want.

# %%
import dataclasses

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from hola_jax import LanguageModel, MemoryConfig, ModelConfig, functional
from hola_jax.config import parameter_count
from hola_jax.diagnostics import depth_report
from hola_jax.losses import next_token_loss
from train.data.config import LibraryText
from train.data.loader import open_source

plt.style.use("tableau-colorblind10")
STYLES = [("C0", "o-"), ("C1", "s--"), ("C5", "^-.")]

STEPS, ROWS, ROW = 60, 4, 64  # raise STEPS to see more

# %% [markdown]
# ## The rules
#
# Call $v_0$ the embedding and $v_i$ what sub-layer $i$ (a mixer or an MLP) answers. Sub-layer $l$ reads
#
# $$\text{plain: } h_l = \sum_{i<l} v_i, \qquad \text{full: } h_l = \sum_{i<l} a_i v_i, \quad
#   a = \operatorname{softmax}_i\big(w_l^\top \operatorname{RMSNorm}(v_i)\big).$$
#
# The weights $a_i$ are made for each token, the query $w_l \in \mathbb R^D$ is learned and begins at zero, so at
# first a layer reads the mean. In blocks, the softmax is over the sums of blocks of layers, and inside of a block
# the sum is plain. In this library the rule is one field of the configuration, for every mixer.

# %%
base = ModelConfig(
    vocab_size=256,
    dim=32,
    layers=4,
    heads=2,
    mlp_dim=64,
    mixer="transformer",
    dtype="float32",
    memory=MemoryConfig(window=8, block=16, chunk=16),
)
configs = {
    "plain": base,
    "full": dataclasses.replace(base, residual="attention"),
    "blocks": dataclasses.replace(base, residual="block_attention", residual_blocks=2),
    "HOLA": dataclasses.replace(base, mixer="hola", gate_init=0.0),
}
for name, config in configs.items():
    count = parameter_count(config)
    print(f"{name:<7} {count['total']:,} parameters, {count['residual']:,} of them readers over depth")

# %% [markdown]
# ## Training, in a page
#
# `functional` gives the pure function behind a model; the whole run is one `lax.scan` over batches.

# %%
source = open_source(LibraryText(), split="train", vocab_size=256, row=ROW, seed=0)
batches = np.stack([[source[ROWS * step + row]["tokens"] for row in range(ROWS)] for step in range(STEPS)])
rate = optax.warmup_cosine_decay_schedule(0.0, 5e-3, STEPS // 10, STEPS, 5e-4)
adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95))
optimizer = optax.flatten(adam)  # one long vector: fewer operations to compile


def train(config: ModelConfig) -> tuple[LanguageModel, np.ndarray]:
    """(the model, its loss at each step)"""
    model = LanguageModel(config, seed=0)
    forward, params = functional(model)

    @jax.jit
    def run(params, batches):
        def step(carry, tokens):
            params, moments = carry

            def loss(params):
                return next_token_loss(forward(params, tokens[:, :-1])[0], tokens[:, 1:])

            value, gradient = jax.value_and_grad(loss)(params)
            updates, moments = optimizer.update(gradient, moments, params)
            return (optax.apply_updates(params, updates), moments), value

        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), batches)
        return params, losses

    params, losses = run(params, batches)
    nnx.update(model, params)
    return model, np.asarray(losses)


held_out = open_source(LibraryText(), split="held_out", vocab_size=256, row=ROW, seed=0)
looked_at = np.stack([held_out[row]["tokens"][:-1] for row in range(2)])
losses, reports = {}, {}
for name, config in configs.items():
    model, losses[name] = train(config)
    reports[name] = jax.tree.map(np.asarray, depth_report(model, looked_at))
    assert losses[name][-10:].mean() < losses[name][0] - 1, "it did not learn"
    print(
        f"{name:<7} loss {losses[name][0]:.2f} -> {losses[name][-10:].mean():.3f} nats a byte (mean of the last 10 steps)"
    )

# %% [markdown]
# ## What is read grows with depth, or does not
#
# **The plot**: the largest activation that each sub-layer reads. Under the plain rule it grows: every answer is
# added and nothing is ever taken away, so a late layer must speak louder to be heard. A softmax reads a weighted
# *mean*, which cannot be larger than the largest of its sources:
#
# $$\max |h_l| \le \max_{i<l} \max |v_i|.$$
#
# That bound is asserted below. Blocks are between: sums inside, means across.

# %%
depths = np.arange(2 * base.layers + 1)
figure, axes = plt.subplots(figsize=(7, 3.6))
for (colour, style), name in zip(STYLES, ("plain", "full", "blocks"), strict=True):
    axes.plot(depths, reports[name].reads.largest, style, color=colour, label=f"{name} residual")
names = [f"{layer} {part}" for layer in range(base.layers) for part in ("mixer", "MLP")]
axes.set_xticks(depths, [*names, "last norm"], rotation=30)
axes.set(xlabel="read by", ylabel="largest |activation|", title="A sum grows with depth, a softmax over depth does not")
axes.set_ylim(bottom=0)
axes.legend()
plt.show()

found = reports["full"]
sources = np.concatenate([found.reads.largest[:1], found.answers.largest])  # the embedding, then what was answered
assert np.all(found.reads.largest <= np.maximum.accumulate(sources) * (1 + 1e-5))
growth = {name: float(reports[name].reads.largest[-1] / reports[name].reads.largest[0]) for name in reports}
for name in ("plain", "full", "blocks"):
    print(f"{name:<7} the last norm reads {growth[name]:5.2f} times what the first layer reads")
assert growth["full"] < growth["plain"]

# %% [markdown]
# Which rule learns better is not for so few steps to say: the losses printed above are one seed each. The paper's
# ablation at 436M has validation losses of 1.766 plain, 1.737 full, 1.746 in blocks (arXiv 2603.15031);
# `configs/study/depth.py` compares them here, with seeds.
#
# ## Where reads go over time
#
# A softmax must spend its weight somewhere. A Transformer that finds nothing spends it on the first token: a
# **sink**, and the model grows a **spike**, a huge activation, to make that token easy to find. The measures:
# $\alpha_k$, the mean weight on token $k$ of all that come behind, and a head with $\alpha_1 > 0.3$ counts as a
# sink. HOLA's read has an entry for it, the null sink, so its reads can be divided up: null sink, cache, running
# block.

# %%
print(f"HOLA, depth by depth:\n{reports['HOLA'].table()}")

# %%
masses = reports["HOLA"].masses
parts = {"running block": masses.block, "cache": masses.cache, "null sink": masses.null_sink}
assert np.allclose(sum(parts.values()), 1, atol=1e-4)

figure, axes = plt.subplots(figsize=(7, 3.4))
heads = np.arange(masses.block.size)
below = np.zeros(masses.block.size)
for (label, mass), colour, hatch in zip(parts.items(), ("C0", "C1", "C2"), ("", "//", ".."), strict=True):
    axes.bar(heads, mass.ravel(), bottom=below, color=colour, hatch=hatch, edgecolor="white", label=label)
    below += mass.ravel()
axes.set_xticks(heads, [f"{n}.{h}" for n in range(base.layers) for h in range(base.heads)])
axes.set(xlabel="layer.head", ylabel="share of the reads", title="Where HOLA's reads go")
axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
figure.tight_layout()
plt.show()

even = float(np.mean(1 / np.arange(1, ROW + 1)))  # what token 1 has if every token reads evenly
first = reports["plain"].masses.first_token
print(f"with even reads the first token would have {even:.3f} of them")
for name in ("plain", "HOLA"):
    here = reports[name]
    print(
        f"{configs[name].mixer:<12} first token {here.masses.first_token.mean():.3f}, heads with a sink "
        f"{float(here.masses.sink_ratio):.0%}, largest activation {here.reads.ratio.max():.1f} times the median"
    )

# %%
print(
    f"ANSWER: through {2 * base.layers} sub-layers what is read grows {growth['plain']:.1f} times under the plain rule, "
    f"{growth['full']:.1f} times under a softmax over depth, {growth['blocks']:.1f} times in blocks. After {STEPS} steps "
    f"the null sink holds {masses.null_sink.mean():.0%} of HOLA's reads; a Transformer's first token has {first.mean():.2f} "
    f"of them, where {even:.2f} would be even."
)

# %% [markdown]
# ## What to try next
#
# * `STEPS = 5000`, `ROW = 256`: when does the first sink appear, and in which layer?
#   `hola train ... --depth_every=100` records the same numbers along a real run.
# * `norm="sandwich"` or `"dynamic_tanh"`, `qk_norm="heads"`: the levers that the spikes paper pulls
#   ([docs/depth.md](../docs/depth.md)). Each should take away spikes *or* sinks.
# * A HOLA with `residual="attention"`: does the null sink get more or less?
# * `configs/study/depth.py` compares rules and norms on planted facts, with seeds.
