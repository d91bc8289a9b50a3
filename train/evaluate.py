"""`hola eval`: a run folder's model on the tasks of hola_jax.evals."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import time
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from flax import nnx

from hola_jax import LanguageModel, ModelConfig
from hola_jax.evals import Cell, ModelScorer, Setting, prepare, report
from hola_jax.model import Params
from train.config import TrainConfig
from train.data import shards, tokenizers
from train.data.config import LibraryText, Mixture, RecallTask, Records, Source, TextFolder
from train.overrides import load
from train.progress import Progress

BEGINNINGS = ("<s>", "<|bos|>", "<|begin_of_text|>", "<bos>", "[BOS]")


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Measure a trained model: `hola eval RUN --tasks ruler/s_niah_1@2k,4k,8k passkey wikitext=FILE`.

    Tasks: ruler/TASK (s_niah_1 s_niah_2 s_niah_3 mk_niah_1 mk_niah_2 mk_niah_3 mv_niah mq_niah vt; ruler is all), passkey,
    far_needle, recall/1 to recall/16 (recall is all), overwrite, mqar, mqar/PAIRS, each at its usual lengths or at those
    given as @2k,4k; wikitext=FILE (a raw WikiText file, or any text) and lambada=FILE (a passage a line, or JSON lines).
    docs/evals.md says what each one measures.
    """

    run_folder: tyro.conf.Positional[str]
    """Folder of a run of `hola train`."""
    tasks: tuple[str, ...]
    """What to measure."""
    step: int | None = None
    """Of the checkpoint; the last one there is where none is given."""
    samples: int = 100
    """Of each task at each length."""
    seed: int = 42
    """Of the samples."""
    tokenizer: str | None = None
    """`bytes`, `mistral-v1` or a tokenizers JSON, where the run's data does not tell or is gone."""
    haystack: str | None = None
    """A long text: half of RULER's tasks hide their needles in it, and the probes do where it is given."""
    window: int | None = None
    """Tokens that are predicted in a row where a text is longer; the run's row where none is given."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of activations; the run's where none is given. On a CPU float32 is the faster one."""
    batch_tokens: int = 8192
    """Tokens of all rows that go through the model at a time."""
    output: str | None = None
    """JSON file of the results; RUN/evals/step_N.json where none is given."""
    cache: str | None = None
    """Folder of made samples; ~/.cache/hola_jax/evals (below XDG_CACHE_HOME where that is set) where none is given."""

    def run(self) -> None:
        if not Path(self.run_folder).is_dir():
            raise FileNotFoundError(f"there is no run folder {self.run_folder}{_nearest_folder(self.run_folder)}")
        config = load(self.run_folder)
        model = dataclasses.replace(config.model, dtype=self.dtype or config.model.dtype)
        step = last_step(Path(self.run_folder), self.step)
        tokenizer = tokenizers.load(self.tokenizer) if self.tokenizer else tokenizer_of(config.data)
        cells = prepare(
            list(self.tasks), self._setting(config, tokenizer), lambda name: print(f"made {name}", flush=True)
        )
        scorer = ModelScorer(load_model(Path(self.run_folder), step, model), batch_tokens=self.batch_tokens)
        records = [_measured(cell, scorer) for cell in cells]
        about = {"run": self.run_folder, "step": step, "tokenizer": tokenizer.name, "dtype": model.dtype}
        about |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        print("\n" + report.table(records))
        if lengths := report.by_length(records):
            print("\n" + lengths)
        path = Path(self.output or Path(self.run_folder) / "evals" / f"step_{step}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**about, "results": records}, indent=2) + "\n")
        print(f"\n{path}")

    def _setting(self, config: TrainConfig, tokenizer: tokenizers.Tokenizer) -> Setting:
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hola_jax" / "evals"
        return Setting(
            tokenizer=tokenizer,
            prefix=prefix_of(tokenizer),
            window=config.row if self.window is None else self.window,
            vocab_size=config.model.vocab_size,
            longest=config.model.max_length if config.model.mixer == "transformer" else None,
            samples=self.samples,
            seed=self.seed,
            haystack=self.haystack,
            cache=default if self.cache is None else Path(self.cache),
        )


def _measured(cell: Cell, scorer: ModelScorer) -> dict[str, Any]:
    progress, count, start = Progress(cell.name, cell.rows), 0, time.monotonic()

    def done(rows: int) -> None:
        nonlocal count
        count += rows
        progress.show(count, last=count == cell.rows)

    progress.show(0)
    measured = cell.measure(scorer, done)
    return report.record(cell, measured, time.monotonic() - start)


def _nearest_folder(given: str) -> str:
    parent = Path(given).parent
    names = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(Path(given).name, names, n=1)
    return f"; did you mean {parent / near[0]}?" if near else ""


def tokenizer_of(source: Source) -> tokenizers.Tokenizer:
    """The tokenizer of a run's data: the one whose numbers its model knows."""
    if isinstance(source, Mixture):
        texts = [part for _, part in source.parts if not isinstance(part, RecallTask)]
        source = texts[0] if texts else source.parts[0][1]
    if isinstance(source, LibraryText):
        return tokenizers.load("bytes")
    if isinstance(source, TextFolder):
        return tokenizers.load(source.tokenizer)
    if isinstance(source, Records):
        made = shards.tokenizer_of(source, shards.read_manifest(source.path))
        return tokenizers.named(made.name, None if made.file is None else (Path(source.path) / made.file).read_bytes())
    raise ValueError("the run was trained on numbers without a text; say which tokenizer with --tokenizer")


def prefix_of(tokenizer: tokenizers.Tokenizer) -> int:
    """The token that begins a document; the one that ends them where the tokenizer has none."""
    if isinstance(tokenizer, tokenizers.MistralV1):
        return int(tokenizer.library.bos_id())
    if isinstance(tokenizer, tokenizers.Json):
        found = [token for token in map(tokenizer.library.token_to_id, BEGINNINGS) if token is not None]
        return int(found[0]) if found else tokenizer.eos
    return tokenizer.eos


def last_step(folder: Path, step: int | None) -> int:
    """The last step of the run's checkpoints, or `step` where there is one of it."""
    checkpoints = folder / "checkpoints"
    steps = (
        sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal())
        if checkpoints.is_dir()
        else []
    )
    if not steps:
        raise FileNotFoundError(f"{folder} has no checkpoint yet; let `hola train` save one")
    if step is not None and step not in steps:
        raise ValueError(f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def load_model(folder: Path, step: int, config: ModelConfig) -> LanguageModel:
    """The model of a checkpoint, on one device; the optimizer's part is not read, and nothing is written."""
    import orbax.checkpoint as ocp

    from train.checkpoint import bit_sums

    abstract = nnx.eval_shape(lambda: LanguageModel(config))
    structure, state = nnx.split(abstract)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), nnx.to_pure_dict(state))
    saved = folder.absolute() / "checkpoints" / str(step)
    arguments = ocp.args.PyTreeRestore(
        item={"params": shapes},
        restore_args={"params": ocp.checkpoint_utils.construct_restore_args(shapes)},
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        params: Params = reader.restore(saved / "state", args=arguments)["params"]
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        sums = reader.restore(saved / "about", args=ocp.args.JsonRestore())["sums"]
    wrong = sorted(name for name, found in bit_sums({"params": params}).items() if found != sums.get(name))
    if wrong:
        raise ValueError(f"the checkpoint of step {step} is damaged: {', '.join(wrong[:3])} are not what was saved")
    return nnx.merge(structure, params)
