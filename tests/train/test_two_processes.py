"""Two processes over loopback: of four devices each, one run; and an end for the one whose other half is gone.

To compile takes longer than all else here, so runs are of as many steps where they can be, and share their programs.
"""

import json
import shutil
import signal
import socket
import time

import numpy as np
import pytest

from tests.train.processes import finish, losses, run, start

pytestmark = pytest.mark.slow
RECIPE = ["--model.mixer=hola", "--steps=12", "--checkpoint.every=6", "--eval_every=12", "--eval_batches=2"]
# How a run ends does not depend on its mixer or on its devices, and this one compiles in a third of the time.
QUICK = ["--model.mixer=transformer", "--model.max_length=16"]
ENDLESS = [*QUICK, "--steps=1000000", "--checkpoint.every=1000000"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of a run of one process of one device."""
    folder = tmp_path_factory.mktemp("one") / "run"
    code, said = run(folder, *RECIPE)
    assert code == 0, said
    return folder


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_both(folder, *overrides, devices=4):
    together = ["--cluster.join=true", f"--cluster.coordinator=127.0.0.1:{free_port()}", "--cluster.processes=2"]
    return [start(folder, *together, f"--cluster.process={number}", *overrides, devices=devices) for number in (0, 1)]


def test_two_processes_are_one(tmp_path, one):
    """Rows and parameters are divided between the processes, and a row's tokens inside of each."""
    expected, mesh = losses(one), ["--mesh.fsdp=4", "--mesh.sequence=2", "--mesh.data=1"]
    for code, said in map(finish, start_both(tmp_path / "two", *RECIPE, *mesh)):
        assert code == 0, said
    np.testing.assert_allclose(losses(tmp_path / "two"), expected, rtol=1e-5)
    # From the middle on by one process of one device: the same rows, the same losses.
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "12")
    code, said = run(tmp_path / "two", *RECIPE)
    assert code == 0 and "from step 6, row 48 of the data" in said, said
    np.testing.assert_allclose(losses(tmp_path / "two"), expected, rtol=1e-5)
    held_out = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in (one, tmp_path / "two")]
    assert len(expected) == 12 and np.isclose(*(record["held_out_loss"] for record in held_out), rtol=1e-5)


def until(folder, steps, seconds=300):
    limit = time.monotonic() + seconds
    while len(losses(folder)) < steps and time.monotonic() < limit:
        time.sleep(0.1)


def test_sigterm_to_one_saves_and_stops_both(tmp_path):
    both = start_both(tmp_path / "run", *ENDLESS, devices=1)
    until(tmp_path / "run", 5)
    both[1].send_signal(signal.SIGTERM)
    for code, said in map(finish, both):
        assert code == 75, said
    stopped = losses(tmp_path / "run")[-1][0]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*")] == [
        str(stopped)
    ]  # and no half of one


@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_one_ends_the_other_with_a_word(tmp_path, victim):
    both = start_both(tmp_path / "run", "--cluster.heartbeat=10", "--cluster.step_timeout=30", *ENDLESS, devices=1)
    until(tmp_path / "run", 5)
    both[victim].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    code, said = finish(both[1 - victim], timeout=90)
    assert code not in (0, None) and time.monotonic() - begin < 60
    assert "another process is gone" in said or "heartbeat" in said or "coordination service" in said.lower(), said
    finish(both[victim])
