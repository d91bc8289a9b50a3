"""The house: who may import whom, what is never imported, and a README that tells what is there."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from train import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("hola_jax", ("train", "configs", "tests", "benchmarks", "torch", "tensorflow")),
        ("hola_jax/memory", ("flax", "hola_jax.layers", "hola_jax.model", "hola_jax.config", "hola_jax.presets")),
        ("hola_jax/layers", ("hola_jax.model", "hola_jax.presets")),
        ("hola_jax/weights", ("hola_jax.inference", "hola_jax.evals")),
        ("hola_jax/inference", ("hola_jax.evals",)),
        ("pallas_kernels", ("hola_jax", "flax", "train", "configs", "tests", "benchmarks")),
        ("train", ("tests", "benchmarks", "torch", "tensorflow")),
    ],
)
def test_arrows_point_one_way(folder, forbidden):
    for path in (ROOT / folder).rglob("*.py"):
        wrong = [name for name in imports(path) if any(name == f or name.startswith(f + ".") for f in forbidden)]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_importing_asks_no_device_and_brings_no_torch():
    code = """
import os, sys
import jax  # sets variables of its own
before = dict(os.environ)
import hola_jax, train.cli
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a device was asked for"
assert dict(os.environ) == before, "the environment was changed"
assert not {"torch", "tensorflow"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_readme_names_every_module_and_nothing_else():
    tree = README.split("## The tree")[1].split("##")[0]
    for path in [*(ROOT / "hola_jax").glob("*.py"), *(ROOT / "hola_jax" / "memory").glob("*.py")]:
        assert path.name == "__init__.py" or path.name in tree, path.name
    present = {path.name for path in ROOT.rglob("*.*") if not any(part.startswith(".") for part in path.parts[-3:])}
    assert not [name for name in re.findall(r"\b[\w-]+\.(?:py|md|sh|toml|txt)\b", tree) if name not in present]


def test_the_readme_names_every_verb_and_every_target():
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert len(targets) > 8 and set(targets) == set(re.findall(r"\bmake ([a-z-]+)", README))
    assert not [name for name in cli.VERBS if not re.search(rf"\bhola {name}\b", README)]


def test_the_five_lines_of_the_readme():
    code = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["logits"].shape == (1, 1, 256)
    assert len([line for line in code.splitlines() if line.strip()]) == 5


@pytest.mark.slow
def test_the_accelerators_benchmark_wants_little():
    code = """
import sys
sys.path.insert(0, "benchmarks")
import gpu
assert not {"grain", "orbax", "tyro", "tokenizers", "array_record"} & set(sys.modules)
gpu.main("--parts training --preset tiny --models gdn --rows 2 --tokens 64 --steps 1".split())
"""
    told = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    assert "gdn-tiny" in told and "tokens/s" in told and "loss 5." in told
