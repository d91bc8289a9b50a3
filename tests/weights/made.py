"""Hugging Face folders of random weights in flash-linear-attention's names, made without the code under test."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

TOKENS = np.random.RandomState(0).randint(0, 31, (2, 70))  # longer than a chunk
SEEN = slice(4, None, 11)  # the tokens whose logits are kept in golden.npz

COMMON = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "torch_dtype": "float32",
}
CASES = {
    "gated_deltanet": {
        **COMMON,
        "model_type": "gated_deltanet",
        "num_heads": 2,
        "num_v_heads": 4,
        "head_dim": 8,
        "expand_v": 1.5,
        "use_gate": True,
        "conv_size": 4,
        "norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "gated_deltanet_without_a_gate": {
        **COMMON,
        "model_type": "gated_deltanet",
        "num_heads": 2,
        "num_v_heads": None,
        "head_dim": 12,
        "expand_v": 1,
        "use_gate": False,
        "conv_size": 3,
        "norm_eps": 1e-6,
        "allow_neg_eigval": True,
        "tie_word_embeddings": False,
    },
    "transformer": {
        **COMMON,
        "model_type": "transformer",
        "num_heads": 4,
        "num_kv_heads": 2,
        "norm_eps": 1e-6,
        "rope_theta": 500.0,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    },
}


def shapes(said):
    """{key: shape}"""
    dim, inner = said["hidden_size"], said["intermediate_size"]
    delta = said["model_type"] == "gated_deltanet"
    width = said["head_dim"] if delta else dim // said["num_heads"]
    heads = (said["num_v_heads"] or said["num_heads"]) if delta else said["num_heads"]
    values = heads * int(width * said.get("expand_v", 1))
    keys = width * (said["num_heads"] if delta else said["num_kv_heads"])
    layer = {
        "attn_norm.weight": (dim,),
        "mlp_norm.weight": (dim,),
        "mlp.gate_proj.weight": (inner, dim),
        "mlp.up_proj.weight": (inner, dim),
        "mlp.down_proj.weight": (dim, inner),
        "attn.q_proj.weight": (keys if delta else dim, dim),
        "attn.k_proj.weight": (keys, dim),
        "attn.v_proj.weight": (values if delta else keys, dim),
        "attn.o_proj.weight": (dim, values),
    }
    if delta:
        layer |= {f"attn.{name}_conv1d.weight": (keys, 1, said["conv_size"]) for name in "qk"}
        layer |= {"attn.v_conv1d.weight": (values, 1, said["conv_size"]), "attn.o_norm.weight": (values // heads,)}
        layer |= {"attn.a_proj.weight": (heads, dim), "attn.b_proj.weight": (heads, dim)}
        layer |= {"attn.A_log": (heads,), "attn.dt_bias": (heads,)}
    if said.get("use_gate"):
        layer["attn.g_proj.weight"] = (values, dim)
    found = {"model.embeddings.weight": (said["vocab_size"], dim), "model.norm.weight": (dim,)}
    if not said["tie_word_embeddings"]:
        found["lm_head.weight"] = (said["vocab_size"], dim)
    for number in range(said["num_hidden_layers"]):
        found |= {f"model.layers.{number}.{key}": shape for key, shape in layer.items()}
    return found


def made(name, folder: Path) -> Path:
    """Writes the folder of a case; the numbers come from RandomState, whose stream is frozen."""
    said = CASES[name]
    draw, tensors = np.random.RandomState(7), {}
    for key, shape in shapes(said).items():
        scale = 0.5 if len(shape) == 1 or "conv1d" in key else 1.5 * shape[-1] ** -0.5
        offset = 1.0 if "norm" in key else 0.0
        tensors[key] = (offset + scale * draw.standard_normal(shape)).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(said))
    return folder
