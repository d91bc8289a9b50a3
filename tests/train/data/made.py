"""Text of SlimPajama's shape, and the command line in a process of its own."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[3]
RECORD = 64


def write_jsonl(path, texts):
    """A file of SlimPajama's shape."""
    import zstandard

    lines = (json.dumps({"text": text, "meta": {"redpajama_set_name": "RedPajamaC4"}}) + "\n" for text in texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.ZstdCompressor().compress("".join(lines).encode()))


def made_texts(seed, count, words):
    draw = np.random.default_rng(seed)
    vocabulary = [bytes(draw.integers(97, 123, size=draw.integers(1, 9))).decode() for _ in range(500)]
    return [" ".join(draw.choice(vocabulary, size=draw.integers(0, words))) for _ in range(count)]


def small_disk(blocks):
    """Put before a command: no file that it writes may grow beyond so many blocks of 512 bytes."""
    return ["sh", "-c", f'ulimit -f {blocks} && exec "$@"', "sh"]


def hola(*arguments, before=()):
    """The command line in a process of its own, begun."""
    command = [*before, sys.executable, "-m", "train.cli", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=-1, stderr=-1)


def ended(process, signal_=None):
    """(exit status, everything it said)."""
    if signal_ is not None:
        process.send_signal(signal_)
    out, err = process.communicate(timeout=120)
    return process.returncode, out + err


KILL = signal.SIGKILL


def contents(folder):
    """Every file's bytes, by its path below the folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
