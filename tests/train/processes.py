"""Tiny runs in processes of their own, to be killed, starved and counted."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(folder, *overrides, devices=1, before=(), **options):
    environment = dict(os.environ, TINY_DEVICES=str(devices), PYTHONUNBUFFERED="1")
    command = [*before, sys.executable, "-m", "tests.train.tiny_run", str(folder), *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT, "env": environment}
    return subprocess.Popen(command, **{**pipes, **options})


def finish(process, timeout=600):
    """(exit code, what it said)."""
    said, _ = process.communicate(timeout=timeout)
    return process.returncode, said


def run(folder, *overrides, **options):
    return finish(start(folder, *overrides, **options))


def losses(folder):
    """[(step, loss)] of `metrics.jsonl`, whole lines only."""
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    records = [json.loads(line) for line in lines]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]
