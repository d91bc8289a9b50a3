"""`hola demo`: three memories in small models that are alike otherwise; what each reached, and a page of what HOLA keeps."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hola_jax import LanguageModel, MemoryConfig, ModelConfig
from hola_jax.diagnostics.insight import not_shown
from hola_jax.diagnostics.page import Shown
from hola_jax.diagnostics.page import page as html
from train import config as configuration
from train.compare import Files, Texts, held_out_files, measure
from train.config import CheckpointConfig, RunError, TrainConfig, as_dict, differences
from train.data import files, tokenizers
from train.data.config import Facts, LibraryText
from train.data.folder import texts as library_texts
from train.findings import (
    ONE_SEED,
    answered,
    as_json,
    facts_figure,
    facts_table,
    sentences,
    table,
    text_figures,
    what_is_asked,
)
from train.optimizer import OptimizerConfig
from train.overrides import from_dict, override, pairs
from train.planted import planted, spoken
from train.progress import Progress, clock
from train.trained import trained
from train.weights import is_run, look
from train.whole import write_whole
from train.workers import Job, Workers

SHOWN = 1024  # tokens of a text on the page
LEAST = 8  # tokens of a file in which something may be repeated
PLANTED = 64  # rows in which facts are asked for, to measure
LEARNED = {"text": "to guess the next token of others", "facts": "to answer for facts, of which there are none here"}
ROWS = {"gdn": "Gated DeltaNet", "recency": "HOLA + recency", "hola": "HOLA"}  # run folders, and what they are called


class Recipes(NamedTuple):
    """What the three runs of each kind have in common."""

    text: TrainConfig  # to guess the next token of a file
    facts: TrainConfig  # to answer for facts told among such text, and nothing else


# The most that minutes teach: as small as the studies' models (docs/results.md), many small steps, and a gate and a state
# that a new cache, whose reads are noise, neither drowns nor waits behind.
TEXT = TrainConfig(
    run="runs/three",
    model=ModelConfig(
        vocab_size=1024,
        dim=64,
        layers=2,
        heads=2,
        key_dim=16,
        value_dim=16,
        gate_init=-2.0,
        dtype="float32",
        memory=MemoryConfig(window=32, block=32, chunk=32, state_scale=1.0),
    ),
    data=LibraryText(),
    optimizer=OptimizerConfig(peak=3e-3, warmup=100),
    checkpoint=CheckpointConfig(every=500, keep=1, keep_best=0),
    steps=1000,
    global_batch=2,
    row=512,
    loss_chunk=512,
    log_every=50,
)
FACTS = dataclasses.replace(
    TEXT,
    model=dataclasses.replace(
        TEXT.model,
        mlp_dim=64,
        norm="sandwich",
        gate_init=0.0,
        read_init=2.0,
        memory=MemoryConfig(window=8, block=16, chunk=16),
    ),
    data=Facts(most=4, kinds=32, noise=LibraryText()),
    optimizer=OptimizerConfig(peak=6e-3, warmup=150),
    steps=3000,
    global_batch=8,
    row=64,
    loss_chunk=64,
)
FULL = Recipes(TEXT, FACTS)
QUICK = Recipes(  # of whose text nothing is trained
    dataclasses.replace(TEXT, run="runs/three-quick", model=dataclasses.replace(TEXT.model, vocab_size=512)),
    dataclasses.replace(FACTS, run="runs/three-quick", steps=600),
)


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train small models with three memories and show what HOLA keeps: `hola demo`, or `hola demo --quick` for less of it.

    Gated DeltaNet, HOLA whose cache holds the latest tokens, and HOLA: each learns to read the standard library's source,
    and each learns to answer for facts told among such text. Printed are the perplexity of held-out files, and how much
    each model recalls by distance, whichever is better; page.html in the folder shows what HOLA's caches kept and where
    they looked. Interrupted, the same command goes on. The folders text/hola, facts/gdn ... are runs for `hola generate`
    and `hola eval`. Such models are small enough for the processor; JAX_PLATFORMS names what else they shall train on.
    """

    quick: bool = False
    """Shorter, of facts alone and without HOLA + recency, with the same page."""
    folder: str | None = None
    """Of the runs and the page; unless given, runs/three, or runs/three-quick."""
    settings: tuple[str, ...] = ()
    """Of the three runs on text, such as steps=9000 model.dim=128 (`hola train configs/demo.py --help` lists them);
    with --quick there are none, and model.vocab_size alone is set."""
    facts: tuple[str, ...] = ()
    """Of the three runs on facts, likewise."""
    longest: int | None = None
    """Tokens of each held-out file that are read; unless given, 4096, or 512."""
    jobs: int | None = None
    """Runs that train at a time; unless given, one to a core, and one on an accelerator."""
    show: str | None = None
    """A text file for the page; unless given, the held-out file in whose beginning most is repeated from afar."""

    def run(self) -> None:
        start = time.monotonic()
        recipes = self.recipes()
        rows = {name: said for name, said in ROWS.items() if not (self.quick and name == "recency")}
        kinds = ("facts",) if self.quick else Recipes._fields
        folder = Path(recipes.text.run)
        recipes = with_tokenizer(recipes, tokenizer_file(folder, recipes.text.model.vocab_size))
        platform = os.environ.get("JAX_PLATFORMS") or "cpu"
        jax.config.update("jax_platforms", "cpu")  # of this process, which measures; an accelerator is the runs' alone
        configs = [run_of(getattr(recipes, kind), kind, name) for kind in kinds for name in rows]
        train_all(configs, platform, self.jobs)
        longest = self.longest or (512 if self.quick else 4096)
        models = {kind: {name: trained(folder / kind / name)[0] for name in rows} for kind in kinds}
        library = held_out_files(recipes.text, longest)
        facts = planted(recipes.facts, max(min(longest, SHOWN), recipes.facts.row), PLANTED)
        recalled = {name: measure(model, facts, rows[name]) for name, model in models["facts"].items()}
        memory = recipes.facts.model.memory
        results: dict[str, Any] = {"facts": as_json(recalled, facts)}
        tables, said = [facts_table(recalled, rows, facts)], answered(recalled, rows, memory)
        figures = facts_figure(recalled, rows, memory, facts)
        if "text" in kinds:
            read = {name: measure(model, library, rows[name]) for name, model in models["text"].items()}
            memory = recipes.text.model.memory
            results["text"] = as_json(read, library)
            tables += ["", table(read, rows, library), what_is_asked(library)]
            said += sentences(read, rows, memory, library)
            figures += text_figures(read, rows, memory, library)
        said.append(ONE_SEED)
        say("\n" + "\n".join([*tables, "", *said]))
        results |= {"config": {kind: as_dict(getattr(recipes, kind)) for kind in kinds}, "found": said}
        write_whole(folder / "results.json", json.dumps(results, indent=2) + "\n")
        shown = [
            told(models["facts"]["hola"], facts, library),
            some_file(models[kinds[0]]["hola"], kinds[0], library, self.show),
        ]
        page = folder / "page.html"
        write_whole(page, html(shown, figures, said))
        say(f"\n{page} shows what HOLA's cache kept; open it in a browser. Done in {clock(time.monotonic() - start)}.")

    def recipes(self) -> Recipes:
        """What the runs have in common; what is wrong with it is said here."""
        configs = QUICK if self.quick else FULL
        text = _set(configs.text, self.settings)
        facts = _set(configs.facts, self.facts, "model.vocab_size")  # it follows from the text's
        if self.quick and any(not setting.startswith("model.vocab_size=") for setting in self.settings):
            raise ValueError("--quick trains nothing on text: --settings sets model.vocab_size alone, --facts the rest")
        if self.longest is not None and self.longest < LEAST:
            raise ValueError(f"--longest is {self.longest}; it must be at least {LEAST}")
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"--jobs is {self.jobs}; it must be at least 1")
        if self.show is not None and len(Path(self.show).read_text()) < LEAST:
            raise ValueError(f"--show {self.show} has fewer than {LEAST} characters; name a longer text")
        folder = self.folder or text.run
        return Recipes(dataclasses.replace(text, run=folder), dataclasses.replace(facts, run=folder))


def _set(config: TrainConfig, settings: tuple[str, ...], *fixed: str) -> TrainConfig:
    for name, value in pairs([f"--{setting}" for setting in settings]):
        if name == "run" or name.startswith(("data", "model.mixer", "model.memory.score", *fixed)):
            raise ValueError(f"{name} is not the demo's to set; --folder says where its runs are")
        config = override(config, name, value)
    if why := not_shown(config.model.memory):
        raise ValueError(f"the demo's page shows what is kept, and that cannot be told: {why}; leave it out")
    return config


def with_tokenizer(recipes: Recipes, path: str) -> Recipes:
    """The recipes on text of that tokenizer; the tokens of facts stand behind its own."""
    text, facts = recipes
    library = LibraryText(tokenizer=path)
    data = dataclasses.replace(facts.data, noise=library)
    model = dataclasses.replace(facts.model, vocab_size=text.model.vocab_size + 2 * data.kinds)
    return Recipes(dataclasses.replace(text, data=library), dataclasses.replace(facts, data=data, model=model))


def train_all(configs: Sequence[TrainConfig], platform: str, at_a_time: int | None) -> None:
    """Trains what is not trained yet, each run as `hola train` of its folder, in a process of its own."""
    todo = [config for config in configs if not is_trained(config)]
    if not todo:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    at_a_time = min(at_a_time or (cores if platform == "cpu" else 1), len(todo))
    threads = max(1, cores // at_a_time)
    environment = {"JAX_PLATFORMS": platform, "NPROC": str(threads)}  # XLA has so many threads on a CPU
    jobs = []
    for config in todo:
        command = ["hola", "train", config.run]
        configuration.write(config, Path(config.run), command, {})
        jobs.append(Job(short(config), ("train.cli", *command[1:]), Path(config.run) / "train.log"))
    bar = Bar(todo)
    failed = Workers(at_a_time, bar.say, bar.show, environment).run(jobs)
    if failed:
        raise RunError(f"{'; '.join(failed)}. The same command goes on")


def is_trained(config: TrainConfig) -> bool:
    """Whether the run has its steps; one of other settings is refused, for the three would differ in more."""
    if not is_run(Path(config.run)):
        return False
    try:
        saved = look(config.run)
    except FileNotFoundError:  # it was stopped before its first checkpoint
        return False
    assert saved.about is not None
    found = differences(as_dict(from_dict(TrainConfig, saved.about["config"])), as_dict(config))
    changed = [line for line in found if not line.startswith("run:")]
    if changed:
        raise ValueError(f"{config.run} was begun with other settings: {'; '.join(changed)}. Give another --folder")
    if saved.step == config.steps:
        say(f"{config.run} has its {config.steps} steps already")
    return saved.step == config.steps


def short(config: TrainConfig) -> str:
    """`facts hola`."""
    return " ".join(Path(config.run).parts[-2:])


class Bar:
    """How far all of the runs are, in thousands of tokens, and where those stand that are under way."""

    def __init__(self, configs: Sequence[TrainConfig]) -> None:
        self.configs = configs
        self.progress = Progress("thousand tokens", self._tokens([config.steps for config in configs]))
        self.progress.first = self._tokens([step for step, _ in map(stand, configs)])

    def _tokens(self, steps: Sequence[int]) -> int:
        pairs = zip(self.configs, steps, strict=True)
        return sum(config.global_batch * config.row * step for config, step in pairs) // 1000

    def show(self) -> None:
        found = [stand(config) for config in self.configs]
        self.progress.note = ", ".join(
            f"{short(config)} {step}/{config.steps} loss {loss:.2f}"
            for config, (step, loss) in zip(self.configs, found, strict=True)
            if 0 < step < config.steps
        )
        self.progress.show(self._tokens([step for step, _ in found]))

    def say(self, line: str) -> None:
        """A line of its own, in the bar's place; the bar comes again below."""
        print(("\r\x1b[K" if self.progress.live else "") + line, file=sys.stderr, flush=True)


def stand(config: TrainConfig) -> tuple[int, float]:
    """(step, loss) that the run has written last."""
    try:
        *_, last = (Path(config.run) / "metrics.jsonl").read_text().splitlines()
        record = json.loads(last)
    except (FileNotFoundError, ValueError):  # none yet, or half a line
        return 0, math.nan
    loss = record.get("loss")
    return record["step"], math.nan if loss is None else loss


def say(text: str) -> None:
    print(text, flush=True)


def tokenizer_file(folder: Path, vocab_size: int) -> str:
    """The file of a BPE of the library's training text, learnt where the folder has none yet."""
    path = (folder / "tokenizer.json").absolute()
    if not path.is_file():
        say(f"learning a vocabulary of {vocab_size} from the standard library's source")
        files.write(str(path), tokenizers.train_bpe(library_texts(LibraryText(), "train").values(), vocab_size))
    size = tokenizers.load(str(path)).vocab_size
    if size != vocab_size:
        raise ValueError(f"{path} has {size} tokens, and the model is to have {vocab_size}; give another --folder")
    return str(path)


def run_of(recipe: TrainConfig, kind: str, name: str) -> TrainConfig:
    """The recipe's run whose memory is that of `name`."""
    model = recipe.model
    if name == "gdn":
        model = dataclasses.replace(model, mixer="gated_deltanet")
    if name == "recency":
        model = dataclasses.replace(model, memory=dataclasses.replace(model.memory, score="recency"))
    return dataclasses.replace(recipe, run=str(Path(recipe.run) / kind / name), model=model)


def told(model: LanguageModel, facts: Texts, library: Files) -> Shown:
    """The first of the rows with facts."""
    tokens = facts.rows[0]
    text, marked = spoken(tokens, library.tokenizer)
    asked = int(np.count_nonzero(facts.distances[0]))
    about = (
        f"Held-out source with facts in it, in bold: who lives where. In its last quarter {asked} of them are asked for. "
        "The model has learned to answer, from other text and other facts, and nothing else; what to keep it was never told."
    )
    return Shown(model, "facts among text", about, tokens, text, facts.distances[0], marked)


def some_file(model: LanguageModel, kind: str, library: Files, file: str | None) -> Shown:
    """The beginning of a file; of the held-out one in which most is repeated from afar, where none is given."""
    if file is None:
        memory = model.config.memory
        far = [np.count_nonzero(row[:SHOWN] > memory.window + memory.block) for row in library.distances]
        best = int(np.argmax(far))
        name, tokens, distances = library.names[best], library.rows[best], library.distances[best]
    else:
        name, (tokens, distances) = Path(file).name, library.repetitions(Path(file).read_text())
    pieces = [library.tokenizer.decode([token]) for token in tokens[:SHOWN]]
    about = f"The beginning of a file. The model has learned {LEARNED[kind]}."
    return Shown(model, name, about, tokens[:SHOWN], pieces, distances[:SHOWN])
