"""Memories in files: restored bitwise, refused where they are another's, of one size whatever the context."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import hola_jax
from hola_jax import Generator, LanguageModel
from hola_jax.inference import GREEDY
from hola_jax.inference.prefix import empty
from hola_jax.inference.snapshot import meaning
from tests.inference.models import generator, model
from tests.laws.mixers import MIXERS, small
from train.data.tokenizers import Bytes

LONG = "It was the best of times, it was the worst"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mixer", ["hola", "transformer"])
def test_a_restored_memory_goes_on_as_the_saved_one(mixer: str, tmp_path: Path) -> None:
    g = generator(mixer)
    prefix = g.read([LONG, "ab"])
    size = g.save(tmp_path / "two.safetensors", prefix)
    restored = Generator(model(mixer), Bytes(), pieces=g.pieces, steps=4, width=2).load(tmp_path / "two.safetensors")
    assert restored.positions == [42, 2]
    jax.tree.map(np.testing.assert_array_equal, restored.memory, prefix.memory)
    assert g.generate(prefix=restored, max_tokens=6) == g.generate(prefix=prefix, max_tokens=6)
    assert g.generate(["!"], prefix=restored.drop(0), max_tokens=6)[0] == dataclasses.replace(
        g.generate(["ab!"], max_tokens=6)[0]
    )
    assert size == g.save(tmp_path / "more.safetensors", g.read(["more", "of it"], prefix)) + (
        len("[42, 2]") - len("[46, 7]")
    )
    assert sorted(os.listdir(tmp_path)) == ["more.safetensors", "two.safetensors"]


def test_another_process_goes_on_from_the_file(tmp_path: Path) -> None:
    g = generator()
    g.save(tmp_path / "prefix", g.read([LONG]))
    code = f"""
from tests.inference.models import generator
g = generator()
print(g.generate(prefix=g.load({str(tmp_path / "prefix")!r}), max_tokens=6)[0].tokens)
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == str(g.generate([LONG], max_tokens=6)[0].tokens)


def test_what_is_no_snapshot_of_this_model_is_refused(tmp_path: Path) -> None:
    g, path = generator(), tmp_path / "memory.safetensors"
    g.save(path, g.read([LONG]))
    others = {
        "other weights": LanguageModel(model().config, seed=2),
        "mixer is 'hola' there and 'gla' here": LanguageModel(small("gla", vocab_size=256, max_length=64, layers=1)),
        "memory is": LanguageModel(
            dataclasses.replace(model().config, memory=hola_jax.MemoryConfig(window=4, block=8, chunk=4))
        ),
    }
    for words, other in others.items():
        with pytest.raises(ValueError, match=words):
            Generator(other).load(path)
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="no snapshot, or a damaged one"):
            g.load(tmp_path / "cut")
    save_file({"x": np.zeros(3)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="its format is None"):
        g.load(tmp_path / "foreign")
    with pytest.raises(FileNotFoundError, match="there is no snapshot"):
        g.load(tmp_path / "absent")
    faster = dataclasses.replace(model().config, remat="full", implementation="xla")
    assert Generator(LanguageModel(faster, seed=1)).load(path).positions == [42]  # speed is no other model


def test_a_snapshot_from_before_a_setting_existed_is_of_a_model_that_leaves_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    g, path = generator(), tmp_path / "memory"

    def older(config: hola_jax.ModelConfig) -> dict[str, Any]:
        found = meaning(config)
        del found["residual"], found["memory"]["same_key"]
        return found

    monkeypatch.setattr("hola_jax.inference.snapshot.meaning", older)
    g.save(path, g.read([LONG]))
    monkeypatch.undo()
    assert g.load(path).positions == [42]
    memory = dataclasses.replace(model().config.memory, same_key=0.9)
    with pytest.raises(ValueError, match="of another model: memory is"):
        Generator(LanguageModel(dataclasses.replace(model().config, memory=memory), seed=1)).load(path)


def test_a_position_that_the_memory_does_not_have_is_refused(tmp_path: Path) -> None:
    g, path = generator(), tmp_path / "memory"
    g.save(path, g.read([LONG]))
    data = path.read_bytes()
    assert data.count(b'"[42]"') == 1
    path.write_bytes(data.replace(b'"[42]"', b'"[41]"'))
    with pytest.raises(ValueError, match="tell different positions"):
        g.load(path)


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g, path = generator(), tmp_path / "memory"
    g.save(path, g.read(["ab"]))
    before = path.read_bytes()

    def fails(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("hola_jax.weights.files.save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        g.save(path, g.read([LONG]))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["memory"]


def test_at_340m_a_context_of_any_length_fits_in_60_megabytes() -> None:
    config = hola_jax.preset("hola-340m")
    memory = jax.eval_shape(lambda: empty(config, 1))
    kept = memory.state.memory
    cache = [kept.cache_keys, kept.cache_values, kept.block_keys, kept.block_values]
    size = lambda arrays: sum(x.size * x.dtype.itemsize for x in arrays)  # noqa: E731
    assert {str(x.dtype) for x in cache} == {"bfloat16"} and 31e6 < size(cache) < 32e6
    assert kept.fast_weights.dtype == np.float32 and 25e6 < size([kept.fast_weights]) < 26e6
    assert size(jax.tree.leaves(memory)) < 60e6


@pytest.mark.parametrize("mixer", MIXERS)
def test_bytes_do_not_depend_on_the_length_that_was_asked_for(mixer: str) -> None:
    """Law 6, but for softmax attention, whose memory is its capacity."""
    sizes = []
    for length in (64, 4096):
        memory = jax.eval_shape(lambda length=length: empty(small(mixer, max_length=length), 1))
        sizes.append(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(memory)))
    assert (sizes[0] == sizes[1]) == (mixer != "transformer")


def test_greedy_from_a_snapshot_of_a_row_in_another_slot(tmp_path: Path) -> None:
    g = generator()
    g.save(tmp_path / "b", g.read([LONG, "ab"]).rows([1]))
    restored = g.load(tmp_path / "b")
    both = g.read(["xyz"]).insert(0, restored)
    wanted = g.generate(["ab"], max_tokens=5, sampling=GREEDY)[0]
    assert g.generate(prefix=both, max_tokens=5, sampling=GREEDY)[0] == wanted
