"""Checkpoints: Orbax, written beside the training; which are kept, and which one a run goes on from.

A checkpoint is the state, a plain nested dict with stable names, and `about`, JSON: the step, the data's position, the seed,
the resolved configuration, the data's identity, and a sum of the bits of each array, which tells at restoring whether the
numbers are those that were saved.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from hola_jax.array_types import Array
from train.config import CheckpointConfig, differences
from train.layout import Layout, State
from train.shardings import path_name

Say = Callable[[str], None]
About = dict[str, Any]
FORMAT = 1
PLACE_ONLY = ("run:", "cluster.")  # settings of where a run is, not of what it is


class Checkpoints:
    """The checkpoints of a run folder."""

    def __init__(self, folder: Path, config: CheckpointConfig, say: Say) -> None:
        self.folder, self.say = folder.absolute() / "checkpoints", say
        self.failed: str | None = None  # what the last save met with, if it failed
        policies: list[Any] = [managers.LatestN(config.keep)]
        if config.keep_every:
            policies.append(managers.EveryNSteps(config.keep_every))
        if config.keep_best:
            best = managers.BestN(
                get_metric_fn=lambda metrics: metrics["loss"],
                reverse=True,
                n=config.keep_best,
                keep_checkpoints_without_metrics=False,
            )
            policies.append(best)
        self.options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            save_decision_policy=managers.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            # A save that lasts longer than the time to the next is waited for, not skipped.
            enable_should_save_is_saving_in_progress_check=False,
        )
        self.manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(self.folder, options=self.options, item_names=("state", "about"))

    def steps(self) -> list[int]:
        """Of the checkpoints that are complete."""
        self.manager.reload()
        return sorted(self.manager.all_steps())

    def save(self, step: int, state: State, about: About, loss: float | None = None) -> None:
        """Begins to save; training goes on meanwhile. A save that fails is said, and changes no earlier checkpoint."""
        self.finish()
        about = {"format": FORMAT, "step": step, "sums": bit_sums(state), **about}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
        self.failed = None
        try:
            self.manager.save(step, args=items, metrics=None if loss is None else {"loss": loss}, force=True)
        except Exception as error:
            self._save_failed(step, error)

    def finish(self) -> bool:
        """Waits for the save under way; whether the last one is there."""
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            self._save_failed(None, error)
        return self.failed is None

    def _save_failed(self, step: int | None, error: Exception) -> None:
        which = "" if step is None else f" of step {step}"
        self.failed = _brief(error)
        kept = self.steps()
        older = f"those of steps {', '.join(map(str, kept))} are intact" if kept else "there is none yet"
        self.say(f"the checkpoint{which} could not be written ({self.failed}); {older}; is the disk full?")

    def restore(self, layout: Layout, check: Callable[[About], None]) -> tuple[State, About] | None:
        """(state, about) of the newest checkpoint that can be read, on this mesh; None where there is none.

        One that cannot be read is said, and put aside so that its step can be saved again. `check` raises where the
        checkpoint is not this run's.
        """
        newest_first = self.steps()[::-1]
        for step in newest_first:
            try:
                about = self.about(step)
            except Exception as error:
                about, broken = None, error
            if about is not None:
                check(about)
            try:
                if about is not None:
                    return self._state(step, layout, about["sums"]), about
            except Exception as error:
                broken = error
            self.say(f"the checkpoint of step {step} cannot be read ({_brief(broken)}); trying the one before")
            self._put_aside(step)
        if newest_first:
            raise ValueError(
                f"none of the checkpoints in {self.folder} can be read; they lie in {self.folder.parent / 'damaged'} now, "
                "and the same command starts the run anew"
            ) from broken
        return None

    def about(self, step: int) -> About:
        """What is known of a checkpoint besides its state."""
        found = self.manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))
        about: About = found["about"]
        return about

    def _state(self, step: int, layout: Layout, sums: dict[str, int]) -> State:
        items = ocp.args.Composite(state=ocp.args.StandardRestore(layout.abstract_state()))
        state: State = self.manager.restore(step, args=items)["state"]
        wrong = sorted(name for name, found in bit_sums(state).items() if found != sums.get(name))
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(f"the numbers of {', '.join(wrong[:3])}{more} are not those that were saved")
        return state

    def _put_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            aside = self.folder.parent / "damaged"
            aside.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(aside / f"{step}-{int(time.time())}")
        self.manager.close()
        self.manager = self._open()

    def close(self) -> None:
        self.finish()
        self.manager.close()


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def bit_sums(state: State) -> dict[str, int]:
    """{"params.embedding": sum of its bits modulo 2**32, ...}: the same on any mesh."""
    return {path_name(path): int(x) for path, x in jax.tree.leaves_with_path(jax.device_get(_bit_sums(state)))}


@jax.jit
def _bit_sums(state: State) -> Any:
    def total(x: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
        return jnp.sum(bits, dtype=jnp.uint32)

    return jax.tree.map(total, state)


def shapes(layout: Layout) -> dict[str, list[int]]:
    """{"blocks.mixer.query.kernel": [24, 1024, 1024], ...}"""
    return {path_name(path): list(x.shape) for path, x in jax.tree.leaves_with_path(layout.params)}


def check_resumable(about: About, now: About, usual: dict[str, Any], say: Say) -> None:
    """Raises where a checkpoint is of another model or of other data; says what else differs from when it was made.

    usual: the `defaults` of the configuration"""
    found = differences(about["config"], now["config"], usual)
    changed = [line for line in found if not line.startswith(PLACE_ONLY)]
    which = f"the run's checkpoint of step {about['step']}"
    if about["shapes"] != now["shapes"]:
        model = "; ".join(line for line in changed if line.startswith("model."))
        raise ValueError(f"{which} is of another model: {model}. Give another --run, or the model it was made with")
    data = "; ".join(differences(about["data"], now["data"]))
    if data:
        raise ValueError(f"{which} was made with other data: {data}. Give another --run, or the data it was made with")
    for line in changed:
        say(f"changed since the checkpoint: {line}")
