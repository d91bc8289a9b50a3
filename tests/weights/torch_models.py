"""The same models in plain torch, around what transformers has of them; run as a script it writes golden.npz.

Gated DeltaNet follows flash-linear-attention's layer definition, with the gated delta rule of transformers' Qwen3-Next at
its core; the Transformer is transformers' Llama. Nothing here uses hola_jax.

    make test-torch && .venv-torch/bin/python -m tests.weights.torch_models
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from tests.weights.made import CASES, SEEN, TOKENS, made

RULES = {"chunk": torch_chunk_gated_delta_rule, "recurrent": torch_recurrent_gated_delta_rule}


def norm(x, scale, epsilon):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * scale


def convolved(x, kernel):
    """SiLU of the causal depthwise convolution; kernel [channels, 1, width]."""
    padded = F.pad(x.transpose(1, 2), (kernel.shape[-1] - 1, 0))
    return F.silu(F.conv1d(padded, kernel, groups=kernel.shape[0])).transpose(1, 2)


def delta_mixer(x, w, said, rule):
    def part(name):
        return convolved(x @ w[f"{name}_proj.weight"].T, w[f"{name}_conv1d.weight"])

    width, heads = said["head_dim"], len(w["A_log"])
    q, k = (part(name).unflatten(-1, (-1, width)) for name in "qk")
    v = part("v").unflatten(-1, (heads, -1))
    q, k = (y.repeat_interleave(heads // y.shape[2], dim=2) for y in (q, k))
    beta = torch.sigmoid(x @ w["b_proj.weight"].T) * (2 if said.get("allow_neg_eigval") else 1)
    g = -torch.exp(w["A_log"]) * F.softplus(x @ w["a_proj.weight"].T + w["dt_bias"])
    options = {"initial_state": None, "output_final_state": False, "use_qk_l2norm_in_kernel": True}
    o = norm(RULES[rule](q, k, v, g=g, beta=beta, **options)[0], w["o_norm.weight"], said["norm_eps"])
    if said["use_gate"]:
        o = o * F.silu(x @ w["g_proj.weight"].T).unflatten(-1, (heads, -1))
    return o.flatten(-2) @ w["o_proj.weight"].T


def delta_logits(tensors, said, tokens, rule):
    def below(prefix):
        return {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}

    x = tensors["model.embeddings.weight"][tokens]
    for number in range(said["num_hidden_layers"]):
        w = below(f"model.layers.{number}.")
        attn = {key.removeprefix("attn."): y for key, y in w.items() if key.startswith("attn.")}
        x = x + delta_mixer(norm(x, w["attn_norm.weight"], said["norm_eps"]), attn, said, rule)
        y = norm(x, w["mlp_norm.weight"], said["norm_eps"])
        inner = F.silu(y @ w["mlp.gate_proj.weight"].T) * (y @ w["mlp.up_proj.weight"].T)
        x = x + inner @ w["mlp.down_proj.weight"].T
    head = tensors["model.embeddings.weight" if said["tie_word_embeddings"] else "lm_head.weight"]
    return norm(x, tensors["model.norm.weight"], said["norm_eps"]) @ head.T


LLAMA = [("embeddings", "embed_tokens"), ("attn_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")]


def transformer_logits(tensors, said, tokens):
    config = LlamaConfig(
        vocab_size=said["vocab_size"],
        hidden_size=said["hidden_size"],
        intermediate_size=said["intermediate_size"],
        num_hidden_layers=said["num_hidden_layers"],
        num_attention_heads=said["num_heads"],
        num_key_value_heads=said["num_kv_heads"],
        rms_norm_eps=said["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": said["rope_theta"]},
        max_position_embeddings=said["max_position_embeddings"],
        tie_word_embeddings=said["tie_word_embeddings"],
        attn_implementation="eager",
    )
    names = {}
    for key, x in tensors.items():
        for old, new in LLAMA:
            key = key.replace(f".{old}.", f".{new}.")
        names[key.replace(".attn.", ".self_attn.")] = x
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(names)
    return model(tokens).logits


def logits(folder: Path, rule="chunk"):
    """[2, 70, vocabulary] of the folder's model on TOKENS."""
    tensors, said = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    tokens = torch.from_numpy(TOKENS)
    with torch.no_grad():
        if said["model_type"] == "transformer":
            return transformer_logits(tensors, said, tokens).numpy()
        return delta_logits(tensors, said, tokens, rule).numpy()


def main():
    with tempfile.TemporaryDirectory() as folder:
        found = {name: logits(made(name, Path(folder) / name))[:, SEEN] for name in CASES}
    np.savez_compressed(Path(__file__).with_name("golden.npz"), **found)
    for name, x in found.items():
        print(f"{name}: {list(x.shape)}, between {x.min():.2f} and {x.max():.2f}")


if __name__ == "__main__":
    main()
