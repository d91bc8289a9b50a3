"""A model out to a Hugging Face folder and in again: bit for bit, and every name and size held against the others."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hola_jax import LanguageModel, MemoryConfig, functional, weights
from hola_jax.weights.fields import hugging_face
from tests.laws.mixers import MIXERS, small
from tests.weights.broken import BROKEN

HAVE_TABLES = ["hola", "gated_deltanet", "transformer"]
HEADS = {"heads": 4, "key_heads": 2, "key_dim": 8, "value_dim": 12}
MODELS = {
    "hola": small("hola"),
    "hola, unit read, grouped heads": small(
        "hola",
        **HEADS,
        tie_embeddings=False,
        memory=MemoryConfig(window=3, block=12, chunk=4, read="unit_l2", seed=3, read_energy=0.9),
    ),
    "gdn": small("gated_deltanet", memory=MemoryConfig(block=64)),
    "gdn, no gate, grouped heads": small(
        "gated_deltanet", **HEADS, output_gate=False, conv_width=3, negative_eigenvalues=True, tie_embeddings=False
    ),
    "transformer": small("transformer", dim=16, norm_epsilon=1e-5, rope_theta=5e5),
    "transformer, grouped heads": small("transformer", heads=4, key_heads=2, key_dim=8, dtype="bfloat16"),
}


@functools.cache
def parameters(config, seed=0):
    params = functional(LanguageModel(config, seed))[1]
    draw = np.random.default_rng(seed)  # vectors begin as constants, which would hide one taken for another
    return jax.tree.map(lambda x: np.asarray(x) + draw.normal(size=x.shape).astype(np.float32), params)


def folder_of(config, path, **options) -> Path:
    weights.save(path, config, parameters(config), **options)
    return path


def tensors(folder: Path):
    return {key: x for file in sorted(folder.glob("*.safetensors")) for key, x in load_file(file).items()}


def rewritten(folder: Path, change, fields=None) -> Path:
    """The folder with its tensors as `change` makes them, and with other fields in config.json."""
    save_file(change(tensors(folder)), folder / "model.safetensors", metadata={"format": "pt"})
    said = {**json.loads((folder / "config.json").read_text()), **(fields or {})}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("name", MODELS)
def test_out_and_in_again_is_the_same_model_bit_for_bit(name, tmp_path):
    config = MODELS[name]
    params = parameters(config)
    weights.save(tmp_path / "out", config, params)
    found, again = weights.load(tmp_path / "out")
    same_bits(params, again)
    # These have a default in force.
    defaulted = ("memory", "slots", "decay_rank", "feature_dim", "mlp_dim", "key_heads")
    for field in dataclasses.fields(config):
        if field.name not in defaulted:
            assert getattr(found, field.name) == getattr(config, field.name), field.name
    assert (found.mlp_width, found.key_head_count) == (config.mlp_width, config.key_head_count)
    if config.mixer == "hola":
        assert found.memory == config.memory
    elif config.mixer == "gated_deltanet":
        assert found.memory.chunk == config.memory.chunk


@pytest.mark.parametrize("name", MODELS)
def test_in_and_out_again_is_the_same_folder_byte_for_byte(name, tmp_path):
    first = folder_of(MODELS[name], tmp_path / "first", dtype="bfloat16", shard_bytes=9000)
    config, params = weights.load(first, dtype=None)
    weights.save(tmp_path / "second", config, params, shard_bytes=9000)
    files = {file.name for file in first.iterdir()}
    assert files == {file.name for file in (tmp_path / "second").iterdir()} and len(files) > 3
    for file in files:
        assert (first / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


def test_flas_names_and_shapes(tmp_path):
    """Those of its Gated DeltaNet with a gate and a head of its own."""
    config = small("gated_deltanet", heads=4, key_heads=2, key_dim=8, value_dim=12, tie_embeddings=False, layers=1)
    found = {key: x.shape for key, x in tensors(folder_of(config, tmp_path / "a")).items()}
    layer = {
        "attn_norm.weight": (32,),
        "attn.q_proj.weight": (16, 32),
        "attn.k_proj.weight": (16, 32),
        "attn.v_proj.weight": (48, 32),
        "attn.a_proj.weight": (4, 32),
        "attn.b_proj.weight": (4, 32),
        "attn.g_proj.weight": (48, 32),
        "attn.o_proj.weight": (32, 48),
        "attn.q_conv1d.weight": (16, 1, 4),
        "attn.k_conv1d.weight": (16, 1, 4),
        "attn.v_conv1d.weight": (48, 1, 4),
        "attn.A_log": (4,),
        "attn.dt_bias": (4,),
        "attn.o_norm.weight": (12,),
        "mlp_norm.weight": (32,),
        "mlp.gate_proj.weight": (32, 32),
        "mlp.up_proj.weight": (32, 32),
        "mlp.down_proj.weight": (32, 32),
    }
    ends = {"model.embeddings.weight": (31, 32), "model.norm.weight": (32,), "lm_head.weight": (31, 32)}
    assert found == {**ends, **{f"model.layers.0.{key}": shape for key, shape in layer.items()}}
    said = json.loads((tmp_path / "a" / "config.json").read_text())
    assert said["model_type"] == "gated_deltanet" and said["architectures"] == ["GatedDeltaNetForCausalLM"]
    assert (said["num_heads"], said["num_v_heads"], said["head_dim"], said["expand_v"]) == (2, 4, 8, 1.5)


def test_sizes_that_config_json_leaves_out_come_from_the_shapes(tmp_path):
    config = MODELS["gdn, no gate, grouped heads"]
    folder = folder_of(config, tmp_path / "a")
    said = json.loads((folder / "config.json").read_text())
    told = {name: said[name] for name in ("model_type", "head_dim", "allow_neg_eigval", "torch_dtype")}
    (folder / "config.json").write_text(json.dumps(told))
    found, _ = weights.load(folder)
    assert (found.heads, found.key_heads, found.value_dim, found.conv_width) == (4, 2, 12, 3)
    assert (found.output_gate, found.tie_embeddings, found.layers, found.vocab_size) == (False, False, 2, 31)


def test_what_disagrees_is_listed_all_at_once(tmp_path):
    folder = folder_of(MODELS["gdn"], tmp_path / "a")
    fields = {
        "num_hidden_layers": 10**9,
        "expand_v": 2.0,
        "tie_word_embeddings": False,
        "num_heads": 7,
        "norm_eps": 1e-6,
    }

    def change(held):
        held["model.layers.0.attn.q_proj.bias"] = held.pop("model.layers.0.attn.dt_bias")
        held["model.layers.1.mlp.up_proj.weight"] = np.zeros((5, 5), np.int32)
        return {
            **held,
            "model.layers.0.attn.rotary.inv_freq": np.ones(2),
            "model.layers.1.attn.rotary.inv_freq": np.ones(2),
        }

    with pytest.raises(ValueError, match="is not the gated_deltanet that") as raised:
        weights.load(rewritten(folder, change, fields))
    assert str(raised.value).splitlines()[1:] == [
        "  config.json says num_hidden_layers=1000000000, the tensors 2",
        "  config.json says tie_word_embeddings=False, the tensors True",
        "  config.json says num_heads=7, the tensors 2",
        "  config.json says expand_v=2.0, the tensors 1.0",
        "  missing: model.layers.0.attn.dt_bias [2]",
        "  unknown: model.layers.0.attn.q_proj.bias F32[2]",
        "  unknown: model.layers.{0-1}.attn.rotary.inv_freq F64[2]",
        "  wrong: model.layers.1.mlp.up_proj.weight I32[5, 5], needed is [32, 32] of F32, BF16, F16",
    ]


def test_aliases_explain_other_names(tmp_path):
    config = MODELS["hola"]
    folder = folder_of(config, tmp_path / "a")

    def change(held):
        for i in range(2):
            held[f"model.layers.{i}.attn.mem.gain_q"] = held.pop(f"model.layers.{i}.attn.cache_q_norm.weight")[
                None, None
            ]
            held[f"model.layers.{i}.attn.rotary.inv_freq"] = np.ones(4, np.float32)
        return held

    rewritten(folder, change)
    said = json.loads((folder / "config.json").read_text())
    said = {name: value for name, value in said.items() if not name.startswith("cache_")}
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"does not say cache_window, cache_block, .* aliases, under \[config\]"):
        weights.load(folder)
    aliases = tmp_path / "aliases.toml"
    aliases.write_text("""
[keys]
"model.layers.{i}.attn.mem.gain_q" = "model.layers.{i}.attn.cache_q_norm.weight"
"model.layers.{i}.attn.rotary.inv_freq" = "ignore"
[config]
cache_window = 3
cache_block = 8
cache_score = "surprise"
cache_read = "rmsnorm"
""")
    found, params = weights.load(folder, aliases=aliases)
    same_bits(params, parameters(config))
    assert found.memory == config.memory
    for text, words in [
        ('[keys]\n"model.layers.{i}.attn.mem.gain_q" = "model.layers.{i}.attn.cache_q_nrm.weight"', "did you mean"),
        ('[keys]\n"model.norm.weight" = "model.layers.{i}.attn.A_log"', "both must have"),
        ('[kyes]\n"a" = "ignore"', "did you mean 'keys'"),
        ('[keys]\n"a" = "ignore"', "name keys that are not there: a"),
        ('[keys]\n"model.norm.weight" = "model.embeddings.weight"', "both mean model.embeddings.weight"),
        ("[keys", "is no TOML"),
    ]:
        aliases.write_text(text)
        with pytest.raises(ValueError, match=words):
            weights.load(folder, aliases=aliases)
    (tmp_path / "aliases.json").write_text(json.dumps({"config": {"model_type": "gated_deltanet"}}))
    with pytest.raises(ValueError, match=r"unknown: model.layers.\{0-1\}.attn.cache_gate F32\[2\]"):
        weights.load(folder, aliases=tmp_path / "aliases.json")


@pytest.mark.parametrize("mixer", sorted(set(MIXERS) - set(HAVE_TABLES)))
def test_a_mixer_without_a_table_is_refused_by_name(mixer, tmp_path):
    config = small(mixer)
    with pytest.raises(NotImplementedError, match=f"'{mixer}' has no table .* are hola, gated_deltanet, transformer"):
        weights.save(tmp_path / "a", config, functional(LanguageModel(config))[1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"attn": {"layers": [1], "num_heads": 2}}, NotImplementedError, r"attn=\{'layers'.* \(only None\)"),
        (
            {"use_short_conv": False, "hidden_act": "gelu"},
            NotImplementedError,
            "hidden_act='gelu'.*; use_short_conv=False",
        ),
        ({"model_type": "gated_deltanets"}, ValueError, "did you mean 'gated_deltanet'"),
        ({"model_type": "mamba2"}, ValueError, "must be one of hola, gated_deltanet, transformer"),
        ({"head_dim": "8"}, ValueError, "head_dim='8'; it must be an integer above 0"),
        ({"head_dim": 5}, ValueError, "16 channels, which 5 of"),
    ],
)
def test_what_no_model_here_does_is_refused_by_name(fields, error, words, tmp_path):
    folder = folder_of(MODELS["gdn"], tmp_path / "a")
    with pytest.raises(error, match=words):
        weights.load(rewritten(folder, dict, fields))


def test_a_stored_head_that_is_the_embedding_is_tied(tmp_path):
    folder = folder_of(MODELS["gdn"], tmp_path / "a")
    rewritten(folder, lambda held: {**held, "lm_head.weight": held["model.embeddings.weight"]})
    assert weights.load(folder)[0].tie_embeddings
    rewritten(folder, lambda held: {**held, "lm_head.weight": held["model.embeddings.weight"] + 1})
    with pytest.raises(ValueError, match=r"lm_head\.weight that is not its embedding"):
        weights.load(folder)


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_lies_is_refused_by_name(name, tmp_path):
    folder = folder_of(MODELS["gdn"], tmp_path / "a")
    (folder / "model.safetensors").write_bytes(BROKEN[name])
    for action in (weights.load, weights.list_keys):
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged, or no safetensors file \("):
            action(folder)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    folder = folder_of(MODELS["gdn"], tmp_path / "a")
    whole = (folder / "model.safetensors").read_bytes()
    for length in [0, 7, 8, 100, len(whole) // 2, len(whole) - 1]:
        (folder / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is damaged"):
            weights.load(folder)


def test_shards_that_are_missing_misplaced_or_elsewhere_are_named(tmp_path):
    folder = folder_of(MODELS["gdn"], tmp_path / "a", shard_bytes=9000)
    index = folder / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    assert len(set(said["weight_map"].values())) > 2
    for name, words in [
        ("../elsewhere.safetensors", "names the file '../elsewhere.safetensors', which is not in"),
        ("model-00002-of-00099.safetensors", "which is not in"),
        (said["weight_map"]["model.norm.weight"], "promises model.embeddings.weight in"),
    ]:
        places = {**said["weight_map"], "model.embeddings.weight": name}
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(ValueError, match=words):
            weights.load(folder)
    index.write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        weights.load(folder)


def test_pickles_are_never_read(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gated_deltanet"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin, but pickle is never read"):
        weights.load(tmp_path)


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    config = MODELS["gdn"]
    params = parameters(config)
    wrong = {**params, "embedding": params["embedding"][:-1]}
    with pytest.raises(ValueError, match=r"embedding is \(30, 32\), needed is \(31, 32\)"):
        weights.save(tmp_path / "a", config, wrong)

    def full(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("hola_jax.weights.files.save_file", full)
        with pytest.raises(OSError, match="no space"):
            weights.save(tmp_path / "a", config, params)
    assert not list(tmp_path.iterdir())
    folder_of(config, tmp_path / "a")
    with pytest.raises(FileExistsError, match="is there already"):
        folder_of(config, tmp_path / "a")


def test_keys_are_listed_with_shapes(tmp_path):
    listed = weights.list_keys(folder_of(MODELS["hola"], tmp_path / "a", shard_bytes=9000)).splitlines()
    assert "model.embeddings.weight  F32[31, 32]" in listed
    assert "model.layers.{0-1}.attn.cache_q_norm.weight  F32[8]" in listed
    assert (
        listed[-1]
        == f"{2 + 2 * 22} tensors, {sum(x.size for x in jax.tree.leaves(parameters(MODELS['hola']))):,} numbers"
    )


def test_a_transformer_whose_heads_are_not_dim_wide_cannot_be_described(tmp_path):
    with pytest.raises(NotImplementedError, match=r"key_dim=8 with 2 heads: .* 32 / 2"):
        folder_of(small("transformer"), tmp_path / "a")


@pytest.mark.parametrize(
    ("mixer", "fields"),
    [("hola", {"residual": "attention"}), ("hola", {"norm": "sandwich"}), ("transformer", {"qk_norm": "heads"})],
)
def test_a_rule_over_depth_or_another_norm_cannot_be_described(mixer, fields):
    ((name, value),) = fields.items()
    with pytest.raises(NotImplementedError, match=f"{name}='{value}': .* has no place for its parameters"):
        hugging_face(small(mixer, **fields))
