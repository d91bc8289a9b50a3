"""`hola demo`: three small models, alike but for their memory, on text; what each reached, and a page of what HOLA keeps."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import time
from pathlib import Path

import numpy as np

from hola_jax import MemoryConfig, ModelConfig
from hola_jax.diagnostics.page import Shown
from hola_jax.diagnostics.page import page as html
from train import loop
from train.compare import Texts, measure
from train.config import CheckpointConfig, TrainConfig, as_dict, differences
from train.data import files, tokenizers
from train.data.config import LibraryText
from train.data.folder import texts as library_texts
from train.findings import as_json, figures, sentences, table, what_is_asked
from train.optimizer import OptimizerConfig
from train.overrides import from_dict, override, pairs
from train.progress import clock
from train.trained import trained
from train.weights import look
from train.whole import write_whole

SHOWN = 1024  # tokens of the file on the page
LEAST = 8  # tokens of a file in which something may be repeated
ROWS = {"gdn": "Gated DeltaNet", "recency": "HOLA + recency", "hola": "HOLA"}  # run folders, and what they are called
# The most that minutes teach: as small as the studies' models (docs/results.md), many small steps, and a gate and a state
# that a new cache, whose reads are noise, neither drowns nor waits behind.
FULL = TrainConfig(
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
    steps=3000,
    global_batch=2,
    row=512,
    loss_chunk=512,
    log_every=50,
)
QUICK = dataclasses.replace(
    FULL,
    run="runs/three-quick",
    model=dataclasses.replace(FULL.model, vocab_size=512),
    steps=300,
    row=256,
)


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train three small models and show what HOLA keeps: `hola demo`, or `hola demo --quick` for less of it.

    Gated DeltaNet, HOLA whose cache holds the latest tokens, and HOLA read the standard library's source: the same data,
    sizes and steps. Printed are the perplexity of held-out files and how well each repeats what stood earlier in them, by
    distance, whichever is better; page.html in the folder shows what HOLA's cache kept of one file and where it looked.
    Interrupted, the same command goes on. The folder's gdn, recency and hola are runs for `hola generate`, `hola eval`.
    """

    quick: bool = False
    """Smaller and shorter, with the same page."""
    folder: str | None = None
    """Of the runs and the page; unless given, runs/three, or runs/three-quick."""
    settings: tuple[str, ...] = ()
    """Of all three runs, such as steps=1000 model.memory.state_scale=1 (`hola train configs/demo.py --help` lists them)."""
    longest: int | None = None
    """Tokens of each held-out file that are read; unless given, 4096, or 1024."""
    show: str | None = None
    """A text file for the page; unless given, the held-out file in whose beginning most is repeated from afar."""

    def run(self) -> None:
        start = time.monotonic()
        recipe = self.recipe()
        folder = Path(recipe.run)
        recipe = dataclasses.replace(
            recipe, data=LibraryText(tokenizer=tokenizer_file(folder, recipe.model.vocab_size))
        )
        for number, name in enumerate(ROWS):
            left = f", about {clock((time.monotonic() - start) / number * (3 - number))} left" if number else ""
            say(f"{number + 1} of 3: {ROWS[name]} ({clock(time.monotonic() - start)} gone{left})")
            train(run_of(recipe, name))
        texts = Texts.of_library(recipe, self.longest or (1024 if self.quick else 4096))
        models = {name: trained(folder / name)[0] for name in ROWS}
        measured = {name: measure(model, texts, ROWS[name]) for name, model in models.items()}
        said = sentences(measured, ROWS, recipe.model.memory, texts)
        say("\n" + "\n".join([table(measured, ROWS, texts), what_is_asked(texts), "", *said]))
        results = {"config": as_dict(recipe), "models": as_json(measured, texts), "found": said}
        write_whole(folder / "results.json", json.dumps(results, indent=2) + "\n")
        page = folder / "page.html"
        text = shown(texts, recipe.model.memory, self.show)
        write_whole(page, html(models["hola"], text, figures(measured, ROWS, recipe.model.memory, texts), said))
        say(f"\n{page} shows what HOLA's cache kept; open it in a browser. Done in {clock(time.monotonic() - start)}.")

    def recipe(self) -> TrainConfig:
        """What the three runs have in common; what is wrong with it is said here."""
        config = QUICK if self.quick else FULL
        for name, value in pairs([f"--{setting}" for setting in self.settings]):
            if name == "run" or name.startswith(("data", "model.mixer", "model.memory.score")):
                raise ValueError(f"{name} is not the demo's to set; --folder says where its three runs are")
            config = override(config, name, value)
        if self.longest is not None and self.longest < LEAST:
            raise ValueError(f"--longest is {self.longest}; it must be at least {LEAST}")
        if self.show is not None and len(Path(self.show).read_text()) < LEAST:
            raise ValueError(f"--show {self.show} has fewer than {LEAST} characters; name a longer text")
        return config if self.folder is None else dataclasses.replace(config, run=self.folder)


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


def run_of(recipe: TrainConfig, name: str) -> TrainConfig:
    """The recipe's run whose memory is that of `name`."""
    model = recipe.model
    if name == "gdn":
        model = dataclasses.replace(model, mixer="gated_deltanet")
    if name == "recency":
        model = dataclasses.replace(model, memory=dataclasses.replace(model.memory, score="recency"))
    return dataclasses.replace(recipe, run=str(Path(recipe.run) / name), model=model)


def train(config: TrainConfig) -> None:
    """Trains from where the run stands; a run of other settings is refused, for the three would differ in more."""
    try:
        saved = look(config.run)
    except FileNotFoundError:
        saved = None
    if saved is not None and saved.about is not None:
        found = differences(as_dict(from_dict(TrainConfig, saved.about["config"])), as_dict(config))
        changed = [line for line in found if not line.startswith("run:")]
        if changed:
            raise ValueError(f"{config.run} was begun with other settings: {'; '.join(changed)}. Give another --folder")
        if saved.step == config.steps:
            say(f"{config.run} has its {config.steps} steps already")
            return
    code = loop.run(config, command=["hola", "train", config.run])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the loop's own handler waits for a step, and there is none to come
    if code:
        sys.exit(code)


def shown(texts: Texts, memory: MemoryConfig, file: str | None) -> Shown:
    """The beginning of a file; of the held-out one in which most is repeated from afar, where none is given."""
    if file is None:
        far = [np.count_nonzero(row[:SHOWN] > memory.window + memory.block) for row in texts.distances]
        best = int(np.argmax(far))
        name, tokens, distances = texts.names[best], texts.rows[best], texts.distances[best]
    else:
        name, (tokens, distances) = Path(file).name, texts.repetitions(Path(file).read_text())
    pieces = [texts.tokenizer.decode([token]) for token in tokens[:SHOWN]]
    return Shown(name=name, tokens=tokens[:SHOWN], text=pieces, distances=distances[:SHOWN])
