"""`hola eval`: a folder's model on the tasks of hola_jax.evals."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jax
import tyro

from hola_jax.evals import Cell, ModelScorer, Setting, prepare, report
from train.data import tokenizers
from train.progress import Progress
from train.whole import write_whole

if TYPE_CHECKING:
    from train.weights import Saved

BEGINNINGS = ("<s>", "<|bos|>", "<|begin_of_text|>", "<bos>", "[BOS]")


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Measure a model: `hola eval FOLDER --tasks ruler/s_niah_1@2k,4k,8k passkey wikitext=FILE`.

    Tasks: ruler/TASK (s_niah_1 s_niah_2 s_niah_3 mk_niah_1 mk_niah_2 mk_niah_3 mv_niah mq_niah vt; ruler is all), passkey,
    far_needle, recall/1 to recall/16 (recall is all), overwrite, mqar, mqar/PAIRS, each at its usual lengths or at those
    given as @2k,4k; wikitext=FILE (a raw WikiText file, or any text) and lambada=FILE (a passage a line, or JSON lines).
    docs/evals.md says what each one measures.
    """

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """Of a run of `hola train`, or a Hugging Face folder."""
    tasks: tuple[str, ...]
    """What to measure."""
    step: int | None = None
    """Of the run's checkpoint; unless given, the newest."""
    samples: int = 100
    """Of each task at each length."""
    seed: int = 42
    """Of the samples."""
    tokenizer: str | None = None
    """`bytes`, `mistral-v1` or a tokenizers JSON, where the folder does not tell or the run's data are gone."""
    haystack: str | None = None
    """A long text: half of RULER's tasks hide their needles in it, and the probes do where it is given."""
    window: int | None = None
    """Tokens that are predicted in a row where a text is longer; unless given, the run's row or the model's max_length."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of activations; unless given, the model's. On a CPU float32 is the faster one."""
    batch_tokens: int | None = None
    """Tokens of all rows that go through the model at a time; unless given, 8192, and 1024 on a CPU, which reads no faster
    when it is given more."""
    output: str | None = None
    """JSON file of the results; unless given, FOLDER/evals/step_N.json, or results.json of a Hugging Face folder."""
    cache: str | None = None
    """Folder of made samples; unless given, ~/.cache/hola_jax/evals (below XDG_CACHE_HOME where that is set)."""

    def run(self) -> None:
        from train.trained import model_of, tokenizer_of
        from train.weights import look

        saved = look(self.folder, self.step)
        tokenizer = tokenizer_of(saved, self.tokenizer)
        cells = prepare(
            list(self.tasks), self._setting(saved, tokenizer), lambda name: print(f"made {name}", flush=True)
        )
        model = model_of(saved, self.dtype)
        scorer = ModelScorer(model, batch_tokens=self.batch_tokens)
        records = [_measured(cell, scorer) for cell in cells]
        about = {"run": self.folder, "step": saved.step, "tokenizer": tokenizer.name, "dtype": model.config.dtype}
        about |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        print("\n" + report.table(records))
        if lengths := report.by_length(records):
            print("\n" + lengths)
        name = "results.json" if saved.step is None else f"step_{saved.step}.json"
        path = Path(self.output or saved.folder / "evals" / name)
        write_whole(path, json.dumps({**about, "results": records}, indent=2) + "\n")
        print(f"\n{path}")

    def _setting(self, saved: Saved, tokenizer: tokenizers.Tokenizer) -> Setting:
        config = saved.config
        row = config.max_length if saved.about is None else saved.about["config"]["row"]
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hola_jax" / "evals"
        return Setting(
            tokenizer=tokenizer,
            prefix=prefix_of(tokenizer),
            window=row if self.window is None else self.window,
            vocab_size=config.vocab_size,
            longest=config.max_length if config.mixer == "transformer" else None,
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


def prefix_of(tokenizer: tokenizers.Tokenizer) -> int:
    """The token that begins a document; the one that ends them where the tokenizer has none."""
    if isinstance(tokenizer, tokenizers.MistralV1):
        return int(tokenizer.library.bos_id())
    if isinstance(tokenizer, tokenizers.Json):
        found = [token for token in map(tokenizer.library.token_to_id, BEGINNINGS) if token is not None]
        return int(found[0]) if found else tokenizer.eos
    return tokenizer.eos
