"""Faults, in processes: what is killed goes on, what cannot be written or read is said, and nothing is lost twice.

To begin a process takes longer than all of its steps. So one run is made and let alone, the others compile nothing anew
(all are of one step and as many steps, and share what is compiled), and what needs a run's end begins with a copy of it.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.train.data.made import small_disk
from tests.train.processes import finish, losses, run, start

pytestmark = pytest.mark.slow
WHOLE = ["--checkpoint.every=20", "--checkpoint.keep=4"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was let alone, with checkpoints of steps 140, 160, 180 and 200."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    code, said = run(folder, *WHOLE)
    assert code == 0, said
    return folder


@pytest.fixture(scope="module")
def undisturbed(whole):
    trace = losses(whole)
    assert [step for step, _ in trace] == list(range(1, 201)) and trace[-1][1] < trace[0][1]
    return trace


def until(condition, process, seconds=300):
    """Waits for the condition, or for the process to end; whether the condition was met."""
    limit = time.monotonic() + seconds
    while not (met := condition()) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)
    return met


def reached(folder):
    path = Path(folder) / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saving(folder):
    return any(Path(folder).glob("checkpoints/*tmp*"))


def test_kills_and_a_sigterm_at_random_moments_change_no_loss(tmp_path, undisturbed):
    """The second kill while a checkpoint is written. SIGTERM saves, exits with 75, and the run goes on from there."""
    folder, draw = tmp_path / "run", random.Random(0)
    for during_a_save in (False, True):
        process = start(folder, "--checkpoint.every=5", stdout=None, stderr=None)
        goal = reached(folder) + draw.randint(3, 40)
        assert until(lambda goal=goal: reached(folder) >= goal, process)
        assert not during_a_save or until(lambda: saving(folder), process, 10)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    process, goal = start(folder, "--checkpoint.every=1000"), reached(folder) + 20
    assert until(lambda: reached(folder) >= goal, process)
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 75 and "resuming" in said and "stopped by SIGTERM at step" in said, said
    stopped = int(said.split("stopped by SIGTERM at step ")[1].split(",")[0])
    code, said = run(folder, "--checkpoint.every=1000")
    assert code == 0 and f"from step {stopped}, row {8 * stopped}" in said, said
    assert losses(folder) == undisturbed


def test_damaged_checkpoints_are_said_and_the_newest_whole_one_is_used(tmp_path, whole, undisturbed):
    folder = shutil.copytree(whole, tmp_path / "run")
    truncated, half_written, undescribed = (folder / "checkpoints" / step for step in ("200", "180", "160"))
    for path in (truncated / "state").rglob("d/*"):
        os.truncate(path, path.stat().st_size // 2)
    files = sorted((path for path in half_written.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    for path in files[len(files) // 2 :]:
        path.unlink()
    for path in (undescribed / "about").iterdir():
        path.unlink()
    code, said = run(folder, *WHOLE)
    assert code == 0, said
    assert all(f"the checkpoint of step {step} cannot be read" in said for step in (200, 180, 160)), said
    assert "from step 140" in said
    assert losses(folder) == undisturbed
    assert len(list((folder / "damaged").iterdir())) == 3


def test_a_full_disk_stops_with_a_word_and_leaves_older_checkpoints(tmp_path, whole):
    folder = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "200")
    (folder / "metrics.jsonl").unlink()  # itself larger than a file may be here
    again = ["--checkpoint.every=2", "--checkpoint.keep=4", "--log_every=1000"]
    # Compiled programs are read as ever, and none is written: that is not what is to fail.
    small = {"env": dict(os.environ, TINY_DEVICES="1", JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="1000")}
    code, said = finish(start(folder, *again, before=small_disk(8), **small))
    assert code == 1 and "could not be written" in said and "those of steps 140, 160, 180 are intact" in said, said
    assert "200/200" in said and "its last checkpoint is not written" in said  # it trained on to the end
    code, said = run(folder, *again)
    assert code == 0 and "from step 180" in said, said


def test_a_loss_that_is_not_finite_is_skipped_and_too_many_stop_the_run(tmp_path, whole):
    # Rows of the made-up data have tokens below 32; a run that reads one number too many meets NaN.
    code, said = run(whole, "--nan_limit=3", "--data.name=spoilt")
    assert code == 1 and "other data" in said, said
    code, said = run(tmp_path / "spoilt", "--nan_limit=3", "--data.name=spoilt", "--checkpoint.every=5")
    assert code == 1 and "3 steps up to" in said and "the last good checkpoint is that of step 10" in said, said
    assert np.isfinite([loss for _, loss in losses(tmp_path / "spoilt")][:10]).all()
