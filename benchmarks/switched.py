"""What other choices of what to keep do to models that were trained without them.

    hola study configs/study/beyond.py --only hola
    python benchmarks/switched.py configs/study/beyond.py runs/study/beyond/hola.0 runs/study/beyond/hola.1

The study's measures of models of HOLA as they were trained but for the memory, means over the runs, and in brackets on how
many a row beats the first: a choice that a model does not learn with may still be one that it reads with. Nothing is
trained anew. `--only` names some of SWITCHES, the first to compare with.
"""

import argparse
import dataclasses
import math

import numpy as np

from train.study.config import PLOTTED, Measure, load
from train.study.measure import Measured, measured
from train.trained import model_of
from train.weights import look

SWITCHES: dict[str, dict[str, object]] = {
    "as-trained": {},
    "fade-256": {"fade": 256.0},
    "fade-64": {"fade": 64.0},
    "reads-stay": {"read_credit": 1.0},
    "reads-go": {"read_credit": -1.0},
    "same-key-0.98": {"same_key": 0.98},
    "same-key-0.95": {"same_key": 0.95},
    "same-key-0.9": {"same_key": 0.9},
    "same-key-0.7": {"same_key": 0.7},
    "budget": {"window": 16, "budget": 16},  # of two heads of 8
    "w16-c8": {"window": 16, "block": 8, "chunk": 8},
    "recency": {"score": "recency"},
    "no-cache": {"window": 0},
}


def scores(folder: str, changes: dict[str, object], measures: list[Measure]) -> list[float]:
    """By measure."""
    saved = look(folder)
    if saved.config.mixer != "hola" or saved.about is None:
        raise SystemExit(f"{folder} is not a run of HOLA")
    memory = dataclasses.replace(saved.config.memory, **changes)  # type: ignore[arg-type]
    model = model_of(dataclasses.replace(saved, config=dataclasses.replace(saved.config, memory=memory)))
    found = []
    for measure in measures:
        each = measured(model, measure, int(saved.about["config"]["row"]))
        assert isinstance(each, Measured)
        found.append(math.exp(each.nats) if measure.shows == "perplexity" else each.accuracy)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="the file whose measures are taken: of accuracy and perplexity")
    parser.add_argument("runs", nargs="+", help="folders of its runs of HOLA")
    parser.add_argument("--only", nargs="+", choices=SWITCHES, default=list(SWITCHES), metavar="SWITCH")
    options = parser.parse_args()
    measures = {name: each for name, each in load(options.study).measures.items() if each.shows in PLOTTED}
    if not measures:
        raise SystemExit(f"{options.study} measures neither accuracy nor perplexity")
    signs = np.array([-1 if measure.shows == "perplexity" else 1 for measure in measures.values()])
    print(f"| {' | '.join(['', *measures])} |\n{'|---' * (1 + len(measures))}|")
    first = None
    for name in options.only:
        found = np.array([scores(folder, SWITCHES[name], list(measures.values())) for folder in options.runs])
        first = found if first is None else first
        better = np.sum(signs * (found - first) > 0, axis=0)
        cells = [f"{mean:.3f} ({count}/{len(found)})" for mean, count in zip(found.mean(axis=0), better, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
