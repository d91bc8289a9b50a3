"""The command line: `hola VERB --help` explains."""

from __future__ import annotations

import sys
from collections.abc import Callable

import tyro

from train.demo import Demo

VERBS: dict[str, Callable[..., Demo]] = {"demo": Demo}


def main(arguments: list[str] | None = None) -> None:
    """`hola VERB [options]`. What the user got wrong is said in one line, without a traceback."""
    command = tyro.extras.subcommand_cli_from_dict(VERBS, prog="hola", description=__doc__, args=arguments)
    try:
        command.run()
    except (ValueError, OSError) as error:
        sys.exit(f"hola: {error}")
    except KeyboardInterrupt:
        sys.exit("\nhola: stopped")


if __name__ == "__main__":
    main()
