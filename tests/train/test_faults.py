"""Faults, in processes: what is killed goes on, what cannot be written or read is said, and nothing is lost twice."""

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.train.data.made import small_disk
from tests.train.processes import finish, losses, run, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    code, said = run(folder, "--checkpoint.every=5")
    assert code == 0, said
    trace = losses(folder)
    assert [step for step, _ in trace] == list(range(1, 201)) and trace[-1][1] < trace[0][1]
    return trace


def until(condition, process, seconds=120):
    """Waits for the condition, or for the process to end."""
    limit = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)


def reached(folder):
    path = Path(folder) / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saving(folder):
    return any(Path(folder).glob("checkpoints/*tmp*"))


def test_kill_at_ten_random_moments_changes_no_loss(tmp_path, undisturbed):
    folder, draw, during_a_save = tmp_path / "run", random.Random(0), 0
    for number in range(10):
        process = start(folder, "--checkpoint.every=5", stdout=None, stderr=None)
        goal = reached(folder) + draw.randint(3, 16)
        until(lambda goal=goal: reached(folder) >= goal, process)
        if number % 2:
            until(lambda: saving(folder), process, 10)
        during_a_save += saving(folder)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert during_a_save
    code, said = run(folder, "--checkpoint.every=5")
    assert code == 0 and "resuming" in said, said
    assert losses(folder) == undisturbed


def test_sigterm_saves_and_exits_with_75_and_the_run_goes_on(tmp_path, undisturbed):
    folder = tmp_path / "run"
    process = start(folder, "--checkpoint.every=1000")
    until(lambda: reached(folder) >= 20, process)
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 75 and "stopped by SIGTERM at step" in said, said
    stopped = int(said.split("stopped by SIGTERM at step ")[1].split(",")[0])
    code, said = run(folder, "--checkpoint.every=1000")
    assert code == 0 and f"from step {stopped}, row {8 * stopped}" in said, said
    assert losses(folder) == undisturbed


@pytest.mark.parametrize("damage", ["truncated", "half written", "without its description"])
def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_is_used(tmp_path, damage):
    folder = tmp_path / "run"
    assert run(folder, "--checkpoint.every=5", "--steps=20")[0] == 0
    newest = folder / "checkpoints" / "20"
    files = sorted((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if damage == "truncated":
        for path in (newest / "state").rglob("d/*"):
            os.truncate(path, path.stat().st_size // 2)
    elif damage == "half written":
        for path in files[len(files) // 2 :]:
            path.unlink()
    else:
        for path in (newest / "about").iterdir():
            path.unlink()
    code, said = run(folder, "--checkpoint.every=5")
    assert code == 0, said
    assert "the checkpoint of step 20 cannot be read" in said and "from step 15" in said
    assert len(losses(folder)) == 200
    assert list((folder / "damaged").iterdir())


def test_a_full_disk_stops_with_a_word_and_leaves_older_checkpoints(tmp_path):
    folder = tmp_path / "run"
    assert run(folder, "--steps=20", "--log_every=1000")[0] == 0
    uncached = {"env": dict(os.environ, TINY_DEVICES="1", JAX_ENABLE_COMPILATION_CACHE="0")}
    code, said = finish(start(folder, "--steps=40", "--log_every=1000", before=small_disk(4), **uncached))
    assert code == 1 and "could not be written" in said and "those of steps 10, 20 are intact" in said, said
    assert "40/40" in said and "its last checkpoint is not written" in said  # it trained on to the end
    code, said = run(folder, "--steps=40")
    assert code == 0 and "from step 20" in said, said


def test_a_loss_that_is_not_finite_is_skipped_and_too_many_stop_the_run(tmp_path):
    folder = tmp_path / "run"
    assert run(folder, "--steps=20")[0] == 0
    # Rows of the made-up data have tokens below 32; a run that reads one number too many meets NaN.
    code, said = run(folder, "--steps=40", "--nan_limit=3", "--data.name=spoilt")
    assert code == 1 and "other data" in said, said
    code, said = run(tmp_path / "spoilt", "--steps=40", "--nan_limit=3", "--data.name=spoilt", "--checkpoint.every=5")
    assert code == 1 and "3 steps up to" in said and "the last good checkpoint is that of step 10" in said, said
    assert np.isfinite([loss for _, loss in losses(tmp_path / "spoilt")][:10]).all()
