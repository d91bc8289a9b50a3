"""The command line: `hola VERB --help` explains."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Annotated, Protocol

import tyro

from train.config import RunError
from train.convert import Convert
from train.data.prepare import Prepare
from train.demo import Demo
from train.evaluate import Evaluate
from train.export import Export
from train.generate import Generate
from train.serve import Serve
from train.study.command import RunStudy


class Command(Protocol):
    """A frozen dataclass whose fields are the options."""

    def run(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Train:
    """Train what a Python file describes, or go on where its run folder stands: `hola train CONFIG [--name=value ...]`.

    CONFIG is a file with a `config` in it, such as configs/demo.py, or the folder of an earlier run. Settings are changed by
    name, such as --optimizer.peak=1e-3 --steps=200 --run=runs/mine; `hola train CONFIG --help` lists them. Exit codes: 0
    done; 75 stopped by SIGTERM and saved, start the same command again; 76 another process is gone; 1 anything else, said
    in one line.
    """

    arguments: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="CONFIG [--name=value ...]")] = ()
    """The file or folder, and settings to change."""

    def run(self) -> None:
        from train.config import as_dict, flat
        from train.loop import run
        from train.overrides import load, resolve

        config, *rest = self.arguments
        if {"-h", "--help"} & set(rest):
            print(f"{self.__doc__}\nSettings of {config}:")
            for name, value in flat(as_dict(load(config))).items():
                print(f"  --{name}={value}")
            return
        code = run(resolve(config, rest), command=["hola", "train", *self.arguments])
        if code:
            sys.exit(code)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compile a run's step for chips that are not there: `hola plan CONFIG --topology v5p:4x4x4 [--name=value ...]`.

    Says what a chip needs of memory, what the chips tell each other and how long a step may take, and searches meshes.
    `hola plan --help` has the options.
    """

    arguments: tyro.conf.Positional[tuple[str, ...]] = ()
    """CONFIG --topology CHIP:SIZES [--name=value ...]"""

    def run(self) -> None:
        from train.plan.command import plan

        code = plan(list(self.arguments))
        if code:
            sys.exit(code)


VERBS: dict[str, Callable[..., Command]] = {
    "train": Train,
    "plan": Plan,
    "prepare": Prepare,
    "generate": Generate,
    "serve": Serve,
    "eval": Evaluate,
    "convert": Convert,
    "export": Export,
    "study": RunStudy,
    "demo": Demo,
}


def said_in_a_line(action: Callable[[], object]) -> None:
    """Runs the action. What the user got wrong ends the process with one line, without a traceback."""
    try:
        action()
    except (ValueError, OSError, ImportError, NotImplementedError, FloatingPointError, RunError) as error:
        sys.exit(f"hola: {error}")
    except KeyboardInterrupt:
        sys.exit("\nhola: stopped")


def overview() -> str:
    """A line for each verb: what its help says first."""
    lines = [f"  {name:10}{(verb.__doc__ or '').partition(': `hola')[0]}" for name, verb in VERBS.items()]
    return "\n".join(["usage: hola VERB ...; `hola VERB --help` explains", "", *lines])


def main(arguments: list[str] | None = None) -> None:
    """`hola VERB [options]`."""
    given = sys.argv[1:] if arguments is None else arguments
    command: Command
    if given in ([], ["-h"], ["--help"]):
        print(overview(), file=sys.stdout if given else sys.stderr)
        sys.exit(0 if given else 2)
    if given[:1] == ["train"] and len(given) > 1 and given[1] not in ("-h", "--help"):
        command = Train(tuple(given[1:]))  # its settings are those of a configuration, which tyro does not know
    elif given[:1] == ["plan"]:
        command = Plan(tuple(given[1:]))  # likewise; its own parser knows --help
    else:
        given = ["train", "--help"] if given == ["train"] else given
        command = tyro.extras.subcommand_cli_from_dict(VERBS, prog="hola", description=__doc__, args=given)
    said_in_a_line(command.run)


if __name__ == "__main__":
    main()
