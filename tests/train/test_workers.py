"""Processes, so many at a time: what fails is tried again and does not stop the others, and all stop with their parent."""

import signal
import subprocess
import sys
import time

import pytest

from tests.train.processes import ROOT
from train.workers import Job, Workers

SAYS = """
import os, pathlib, signal, sys, time
here, code = pathlib.Path(sys.argv[1]), sys.argv[2]
if code == "stay":
    signal.signal(signal.SIGTERM, lambda *_: (here.joinpath("saved").touch(), sys.exit(75)))
    here.joinpath("begun").touch()
    time.sleep(200)
with here.joinpath("at_work").open("a") as log:
    log.write("+")
    log.flush()
    time.sleep(0.3)
    log.write("-")
print("words of", sys.argv[3], os.environ.get("NPROC"))
sys.exit(int(code))
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Makes jobs of a module that ends with the code it is given."""
    (tmp_path / "says.py").write_text(SAYS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda name, code: Job(name, ("says", str(tmp_path), str(code), name), tmp_path / "logs" / f"{name}.log")


def test_a_failure_does_not_stop_the_others_and_is_tried_again(job):
    said = []
    failed = Workers(2, said.append, environment={"NPROC": "1"}).run([job("good", 0), job("bad", 3), job("last", 0)])
    assert len(failed) == 1 and "bad ended with 3: words of bad 1 (all of it in " in failed[0]
    assert (
        sum("bad ended with 3" in line for line in said) == 2 and sum("it is tried again" in line for line in said) == 1
    )
    assert sum("done [" in line for line in said) == 2 and any("done [2/3]" in line for line in said)
    assert job("bad", 3).log.read_text() == "words of bad 1\n" * 2


def test_no_more_at_a_time_than_may(job, tmp_path):
    looked = []
    workers = Workers(1, lambda line: None, lambda: looked.append(len(workers.at_work)))
    assert not workers.run([job(str(number), 0) for number in range(3)])
    assert (tmp_path / "at_work").read_text() == "+-" * 3 and set(looked) == {1}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_from_outside_the_processes_save(job, tmp_path, number):
    # Of a process in the background SIGINT is ignored, and of what it starts; in a terminal it is not.
    program = f"""import signal
from train.workers import Job, Path, Workers
signal.signal(signal.SIGINT, signal.default_int_handler)
Workers(1, print).run([{job("stays", "stay")!r}])""".replace("PosixPath", "Path")
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, cwd=ROOT) as parent:
        try:
            end = time.monotonic() + 120
            while not (tmp_path / "begun").exists():
                assert time.monotonic() < end and parent.poll() is None
                time.sleep(0.05)
            parent.send_signal(number)
            _, said = parent.communicate(timeout=60)
        finally:
            parent.kill()
    assert (tmp_path / "saved").exists() and parent.returncode and b"KeyboardInterrupt" in said
