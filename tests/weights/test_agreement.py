"""Logits of imported models agree with torch and transformers: with kept arrays always, live where torch is installed."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hola_jax import LanguageModel, functional, weights
from tests.weights.made import CASES, SEEN, TOKENS, made

GOLDEN = np.load(Path(__file__).with_name("golden.npz"))
TOLERANCE = 1e-4  # logits are of size 5: float32 with other orders of summation, two layers deep


def logits(folder):
    config, params = weights.load(folder)
    forward, _ = functional(LanguageModel(config))
    return np.asarray(jax.jit(forward)(params, TOKENS.astype(np.int32))[0])


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_torch(name, tmp_path):
    found = logits(made(name, tmp_path / name))
    assert np.abs(GOLDEN[name]).max() > 2
    np.testing.assert_allclose(found[:, SEEN], GOLDEN[name], atol=TOLERANCE)


def test_hola_with_its_gate_shut_is_the_gated_deltanet_that_torch_ran(tmp_path):
    folder = made("gated_deltanet", tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    for i in range(2):
        cache = {
            "sink": np.zeros(4),
            "gate": np.full(4, -1e9),
            "q_norm.weight": np.ones(8),
            "k_norm.weight": np.ones(8),
        }
        tensors |= {f"model.layers.{i}.attn.cache_{name}": x.astype(np.float32) for name, x in cache.items()}
    save_file(tensors, folder / "model.safetensors")
    memory = {"cache_window": 3, "cache_block": 8, "cache_score": "surprise", "cache_read": "rmsnorm"}
    said = {**json.loads((folder / "config.json").read_text()), **memory, "model_type": "hola"}
    (folder / "config.json").write_text(json.dumps(said))
    np.testing.assert_allclose(logits(folder)[:, SEEN], GOLDEN["gated_deltanet"], atol=TOLERANCE)


@pytest.mark.parametrize("rule", ["chunk", "recurrent"])
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_torch_live(name, rule, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.weights.torch_models import logits as torch_logits

    if CASES[name]["model_type"] == "transformer" and rule == "recurrent":
        pytest.skip("softmax attention has no delta rule")
    folder = made(name, tmp_path / name)
    theirs = torch_logits(folder, rule)
    np.testing.assert_allclose(logits(folder), theirs, atol=TOLERANCE)
    np.testing.assert_allclose(theirs[:, SEEN], GOLDEN[name], atol=TOLERANCE)
