"""An exported model says what the model says, in a process that has jax and nothing of ours."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from hola_jax import LanguageModel, functional, weights
from hola_jax.inference import artifact
from hola_jax.inference.export import export
from tests.laws.mixers import small
from tests.weights.broken import BROKEN
from train import cli

PROMPTS = [list(range(1, 12)), [7, 30, 2]]  # two pieces of 8 tokens, and a row that is padding in the second
NEXT = np.array([[3, 4, 5, 6], [9, 8, 7, 6]], np.int32)
TOLERANCE = 2e-5  # of size 1, in float32; the same operations, cut into programs elsewhere

CHILD = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hola_jax", "train", "pallas_kernels", "flax", "orbax", "safetensors", "flatbuffers"):
            raise ImportError(name + " is not here")

sys.meta_path.insert(0, Nothing())
sys.path.insert(0, sys.argv[1])
import json
import numpy as np
from load import Model

prompts, tokens = json.loads(sys.argv[2])
model = Model(sys.argv[1], "cpu")
logits, state = model.read(prompts)
found = [np.asarray(logits)]
for column in np.array(tokens).T:
    logits, state = model.step(column[:, None], state)
    found.append(np.asarray(logits))
assert not any(name.startswith(("hola_jax", "flax")) for name in sys.modules)
np.save(sys.argv[3], np.stack(found, axis=1))
"""


def made(mixer, **fields):
    config = small(mixer, vocab_size=31, **fields)
    params = functional(LanguageModel(config, seed=2))[1]
    return config, jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)  # logits of size 1


def own_logits(config, params):
    """Of the model itself, each row alone: after the prompt and after each of NEXT."""
    forward = jax.jit(functional(LanguageModel(config))[0])
    rows = [np.array([[*prompt, *more]], np.int32) for prompt, more in zip(PROMPTS, NEXT, strict=True)]
    found = [np.asarray(forward(params, row)[0])[:, -5:] for row in rows]
    return np.concatenate(found)


def exported_logits(model):
    logits, state = model.read(PROMPTS)
    found = [logits]
    for column in NEXT.T:
        logits, state = model.step(column[:, None], state)
        found.append(logits)
    return np.stack(found, axis=1)


def test_an_export_runs_where_hola_jax_cannot_be_imported(tmp_path):
    config, params = made("hola")
    sizes = export(tmp_path / "out", config, params, rows=2, piece=8)
    assert set(sizes) == {f"{name}.stablehlo" for name in ("start", "prefill", "step")} | {
        "model.safetensors",
        "export.json",
        "load.py",
    }
    names = [str(tmp_path / "out"), json.dumps([PROMPTS, NEXT.tolist()]), str(tmp_path / "logits.npy")]
    subprocess.run([sys.executable, "-I", "-c", CHILD, *names], check=True, cwd=tmp_path)
    expected = own_logits(config, params)
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["gsa", "transformer"])  # slots, all keys and values; HOLA's above is all the others
def test_every_kind_of_memory_exports(mixer, tmp_path):
    config, params = made(mixer, tie_embeddings=False)
    export(tmp_path / "out", config, params, rows=2, piece=8)
    model = artifact.Model(tmp_path / "out")
    np.testing.assert_allclose(exported_logits(model), own_logits(config, params), atol=TOLERANCE)
    assert model.about["platforms"] == ["cpu", "cuda", "tpu"]
    assert model.about["state_bytes"] == sum(x.nbytes for x in jax.tree.leaves(model.start()))


def test_bfloat16_halves_the_matrices_and_spares_the_vectors(tmp_path):
    config, params = made("gated_deltanet", layers=1, dtype="bfloat16")
    export(tmp_path / "out", config, params, piece=4, dtype="bfloat16", platforms=["cpu"])
    held = artifact.tensors(tmp_path / "out" / "model.safetensors")
    assert {x.dtype.name for name, x in held.items() if x.ndim - name.startswith("blocks.") > 1} == {"bfloat16"}
    assert held["blocks.mixer.decay.A_log"].dtype == np.float32
    model = artifact.Model(tmp_path / "out")
    assert np.isfinite(model.read([[1, 2, 3]])[0]).all()


@pytest.fixture(scope="module")
def small_export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    weights.save(folder / "hf", *made("gated_deltanet", layers=1))
    arguments = ["--rows", "2", "--piece", "4", "--platforms", "cpu", "tpu"]
    cli.main(["export", str(folder / "hf"), str(folder / "out"), *arguments])
    return folder / "out"


def test_the_command_says_sizes_and_rows_do_not_touch(small_export, capsys):
    model = artifact.Model(small_export)
    assert (model.rows, model.piece, model.about["platforms"]) == (2, 4, ["cpu", "tpu"])
    _, state = model.read([[1, 2, 3, 4, 5], [6]])
    still = model.step([[0], [3]], state, [[0], [1]])[1]
    after, expected = model.step([[7], [1]], still)[0][0], model.step([[7], [2]], state)[0][0]
    np.testing.assert_array_equal(after, expected)  # the row that stood still
    with pytest.raises(SystemExit, match="is there already"):
        cli.main(["export", str(small_export.parent / "hf"), str(small_export)])
    with pytest.raises(SystemExit, match="takes FROM and OUT"):
        cli.main(["export", str(small_export)])


def test_what_an_export_cannot_take_is_named(small_export, tmp_path):
    model = artifact.Model(small_export)
    for prompts, words in [
        ([[1]], "1 prompts; this export takes 2"),
        ([[1], []], "at least one"),
        ([[1], [31]], "0 to 30"),
    ]:
        with pytest.raises(ValueError, match=words):
            model.read(prompts)
    with pytest.raises(ValueError, match=r"tokens has shape \(2, 2\); this export takes \(2, 1\)"):
        model.step(np.ones((2, 2)), model.start())
    said = json.loads((small_export / "export.json").read_text())
    for file in small_export.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "export.json").write_text(json.dumps({**said, "platforms": ["tpu"]}))
    with pytest.raises(ValueError, match="was exported for tpu, and this is cpu"):
        artifact.Model(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": 0}, "rows is 0"),
        ({"piece": 1}, "piece is 1"),
        ({"platforms": ["cpu", "metal"]}, "platforms has metal"),
    ],
)
def test_wrong_options_are_named_before_any_work(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        export(tmp_path / "out", small("hola"), {}, **options)
    assert not (tmp_path / "out").exists()


def test_the_loader_reads_what_safetensors_writes(tmp_path):
    held = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones((), np.float32),
        "c": np.zeros((0, 2), np.float32),
    }
    save_file(held, tmp_path / "x", metadata={"format": "pt"})
    found = artifact.tensors(tmp_path / "x")
    assert found.keys() == held.keys()
    for name, x in held.items():
        assert found[name].shape == x.shape and found[name].tobytes() == x.tobytes()


@pytest.mark.parametrize("name", BROKEN)
def test_the_loader_refuses_a_file_that_lies(name, tmp_path: Path):
    (tmp_path / "x").write_bytes(BROKEN[name])
    with pytest.raises(ValueError, match=r"x (is cut short|has a damaged header|has \d+ bytes)"):
        artifact.tensors(tmp_path / "x")
