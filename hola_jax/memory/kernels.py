"""Which implementation a memory runs by, and why: a platform's kernels where they take the shape, plain XLA elsewhere.

What counts is the platform that a program is compiled for. The trainer knows it from its mesh, whose devices need not be
there, and hands "pallas_tpu" or "pallas_gpu" down; a bare call takes that of this process's default device. A platform is
a line of `PLATFORMS`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from hola_jax.array_types import Array
from pallas_kernels.step.arrays import Sizes

Implementation = Literal["reference", "xla", "pallas", "pallas_tpu", "pallas_gpu", "interpret"]


class OverDepth(NamedTuple):
    """The kernels by which readers over depth look at sources; contracts as in pallas_kernels.depth."""

    look: Callable[..., Any]
    look_back: Callable[..., Any]
    join_back: Callable[..., Any]
    refuses: Callable[..., str]
    interpret: Any = False


class Kernels(NamedTuple):
    """Those of a platform; contracts as in pallas_kernels.delta_rule, .cache, .hola, .step and .depth."""

    delta_rule: Callable[..., Any]
    cached_read: Callable[..., Any]
    hola: Callable[..., Any] | None = None  # both in one, where a platform has it and it takes the work
    fits: Callable[..., str | None] | None = None  # why that one does not take a work, or None
    step: Callable[..., Any] | None = None  # one token, where a platform has it
    step_refuses: Callable[[Sizes], str] | None = None  # why `step` does not take a shape; empty where it does
    over_depth: OverDepth | None = None  # where a platform has them
    contained: bool = False  # whether `delta_rule` keeps NaN to its document, as `hola` does; else it must not see any
    interpret: Any = False


def _tpu() -> Kernels:
    from pallas_kernels import cache, delta_rule, depth, hola, step

    return Kernels(
        delta_rule.delta_rule,
        cache.cached_read,
        hola=hola.hola,
        fits=hola.fits,
        step=step.step,
        step_refuses=step.tpu_refuses,
        over_depth=OverDepth(depth.look, depth.look_back, depth.join_back, depth.tpu_refuses),
        contained=True,
    )


def _gpu() -> Kernels:
    from pallas_kernels import step
    from pallas_kernels.cache import gpu as cache
    from pallas_kernels.delta_rule import gpu as delta_rule
    from pallas_kernels.step import gpu as gpu_step

    return Kernels(delta_rule.delta_rule, cache.cached_read, step=gpu_step.step, step_refuses=step.gpu_refuses)


PLATFORMS: dict[str, Callable[[], Kernels]] = {"tpu": _tpu, "gpu": _gpu}
ELSEWHERE = (
    "use implementation='xla' (or None), which runs everywhere, or 'interpret', which runs a TPU's kernels slowly"
)


class Choice(NamedTuple):
    """What runs, and why it does and not another."""

    name: Implementation
    why: str
    fused: bool = False  # whether state, cache and read are one kernel


class Work(NamedTuple):
    """What is asked of a memory, as far as kernels care."""

    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    dtypes: tuple[str, str, str]  # of q, k and v
    delta: bool = True  # whether it writes by the delta rule
    channels: bool = False  # whether each key channel has a decay of its own
    window: int | None = None  # None: there is no exact cache
    block: int | None = None
    continued: bool = False  # whether it begins with an earlier piece's state
    only_xla: str = ""  # why no kernel runs it, where its configuration says so
    rescored: str = ""  # why blocks are ranked one after the other, where they are
    energy: float | None = None  # the share of its weights that a read keeps, where it does not keep all
    trained: bool = False  # whether the program is known to want a gradient


def work_of(q: Array, k: Array, v: Array, **fields: Any) -> Work:
    """The work of a call with these arrays."""
    sizes = (v.shape[2], k.shape[2], k.shape[3], v.shape[3])
    return Work(*sizes, (q.dtype.name, k.dtype.name, v.dtype.name), **fields)


def kernels(choice: Choice) -> Kernels | None:
    """The kernels of a choice, the fused one only where it is chosen; None where it is plain XLA."""
    found = _of(choice.name)
    return found if found is None or choice.fused else found._replace(hola=None)


def _of(name: Implementation) -> Kernels | None:
    if name == "interpret":
        from pallas_kernels import depth, step

        return _tpu()._replace(
            interpret=True,
            step_refuses=functools.partial(step.tpu_refuses, interpret=True),
            over_depth=OverDepth(depth.look, depth.look_back, depth.join_back, depth.tpu_refuses, interpret=True),
        )
    return PLATFORMS[name.removeprefix("pallas_")]() if name.startswith("pallas_") else None


def token_kernels(name: Implementation, work: Work) -> Kernels | None:
    """Those by which one token of HOLA's memory runs; None where it runs by plain XLA, which `choose` has told of."""
    found = _of(name)
    return found if found is not None and not _step_refused(name, work) else None


def depth_kernels(
    name: Implementation, readers: int, tokens: int, dim: int, dtype: str, parts: int | None = None
) -> tuple[OverDepth | None, str]:
    """Those by which readers over depth look at sources of so many tokens a row, where a memory runs by `name`; None where
    plain XLA does it; and why. `parts` as in `choose`."""
    run = _of(name)
    found = run and run.over_depth
    if found is None:
        return None, "there are no kernels for them where the memory runs by " + name
    if (head_parts() if parts is None else parts) > 1:
        return None, "a mesh axis is left to the compiler, which cannot divide a kernel"
    refused = found.refuses(readers, tokens, dim, dtype, interpret=bool(found.interpret))
    return (None, refused) if refused else (found, "kernels take this shape")


@functools.cache
def _step_refused(name: Implementation, work: Work) -> str:
    """Why one token of HOLA's memory does not run by the chosen kernels; empty where it does, or where there is no cache."""
    found = _of(name)
    if found is None or work.window is None or work.block is None:
        return ""
    if found.step is None or found.step_refuses is None:
        return "there is no kernel for it"
    return found.step_refuses(
        Sizes(work.heads, work.key_heads, work.key_dim, work.value_dim, work.window, work.block, work.dtypes[2])
    )


def _with_token(choice: Choice, work: Work) -> Choice:
    """The choice, and what a single token runs by where that is something else."""
    refused = _step_refused(choice.name, work)
    return choice._replace(why=f"{choice.why}; a single token runs by xla: {refused}") if refused else choice


def why_apart(name: Implementation, work: Work, sequence_axis: str | None) -> str:
    """Why a memory with a cache takes two kernels, the state's and the cache's; empty where one does all."""
    run = _of(name)
    if run is None or run.fits is None or work.window is None:
        return "the platform has no other"
    if sequence_axis is not None:
        return "what a device finds in the cache depends on the scores of the devices before it"
    sizes = work.heads, work.key_heads, work.key_dim, work.value_dim, work.dtypes
    cache = {"window": work.window, "block": work.block, "continued": work.continued}
    return run.fits(*sizes, **cache, interpret=run.interpret) or ""


def choose(
    asked: Implementation | None,
    work: Work,
    sequence_axis: str | None = None,
    *,
    platform: str | None = None,
    parts: int | None = None,
) -> Choice:
    """What runs where `asked` is wanted; None takes what suits the platform. What cannot run is refused, with why.

    `platform` is that of the devices compiled for, `parts` the number of devices that the heads are divided over; without
    them, they are those of this process and of the mesh around the call.
    """
    if asked is not None and asked not in get_args(Implementation):
        names = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"implementation is {asked!r}; it must be None or one of {names}")
    if asked == "reference" and sequence_axis is not None:
        raise NotImplementedError(
            f"implementation='reference' runs on whole sequences; with sequence_axis={sequence_axis!r} use 'xla' (or None)"
        )
    if work.rescored and sequence_axis is not None:
        raise NotImplementedError(
            f"{work.rescored}: what a block finds depends on all the blocks before it, so they cannot be divided over mesh "
            f"axis {sequence_axis!r}; divide the batch or the heads, or take a memory whose scores stay as they were written"
        )
    if asked in ("reference", "xla"):
        return Choice(asked, "asked for")
    here = platform is None
    platform = platform_here() if platform is None else platform
    parts = head_parts() if parts is None else parts
    if asked is None:
        if why_not := _why_not(work, platform, parts, here):
            found = Choice("xla", why_not)
        else:
            found = _by_kernels(_named(platform), f"{platform} kernels take this shape", work, sequence_axis)
        if here:
            _say_once(found, platform in PLATFORMS)
        return found
    name = _named(platform) if asked == "pallas" else asked
    wanted = name.removeprefix("pallas_")
    why_not = ""
    if work.only_xla:
        why_not = work.only_xla
    elif name != "interpret" and (wanted not in PLATFORMS or not (here or wanted == platform)):
        why_not = f"there are kernels for {', '.join(PLATFORMS)}, and this is {platform}"
    elif name != "interpret" and not here:  # a bare call hears the kernels themselves when it is traced
        why_not = _refused(platform, work)
    if why_not := why_not or _unfit(work, parts):
        raise NotImplementedError(f"implementation={asked!r}: {why_not}; {ELSEWHERE}")
    found = _by_kernels(name, "asked for", work, sequence_axis)
    if here:
        _say_once(found, False)
    return found


def _by_kernels(name: Implementation, why: str, work: Work, sequence_axis: str | None) -> Choice:
    if work.window is None:
        return Choice(name, why)
    apart = why_apart(name, work, sequence_axis)
    how = f"state and cache in two kernels: {apart}" if apart else "the whole memory in one kernel"
    return _with_token(Choice(name, f"{why}; {how}", not apart), work)


def _named(platform: str) -> Any:
    return f"pallas_{platform}"


def _why_not(work: Work, platform: str, parts: int, here: bool) -> str:
    """Why the platform's kernels do not run, where nobody asked for them by name; empty where they do."""
    if platform not in PLATFORMS:
        return f"there are no kernels for {platform}"
    if here and jax.device_count() > 1 and not _manual():
        return (
            f"there are {jax.device_count()} devices and no shard_map: the compiler cannot divide a kernel over them; "
            "implementation='pallas' takes kernels where all arrays lie on one device"
        )
    return _unfit(work, parts) or _refused(platform, work)


def _unfit(work: Work, parts: int) -> str:
    """What no kernel does."""
    if work.only_xla:
        return work.only_xla
    if work.energy is not None and work.trained:
        return f"read_energy={work.energy} drops entries of each read, whose gradient no kernel gives"
    if not work.delta:
        return "this memory has no kernels: it does not write by the delta rule"
    if work.channels:
        return "the delta rule's kernel takes one decay per token and head, not one per key channel"
    if work.heads % parts or work.key_heads % parts:
        return (
            f"{work.heads} value heads and {work.key_heads} key heads do not divide over {parts} devices, and a kernel "
            "works on whole heads"
        )
    return ""


@functools.cache
def _refused(platform: str, work: Work) -> str:
    """The kernels' own word on a shape, heard by tracing them for a block of tokens; empty where they take it."""
    run, tokens = PLATFORMS[platform](), work.block or 128

    def shape(*sizes: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *sizes), jnp.dtype(dtype))

    of_q, of_k, of_v = work.dtypes
    q, k = (shape(tokens, work.key_heads, work.key_dim, dtype=dtype) for dtype in (of_q, of_k))
    v, gate = shape(tokens, work.heads, work.value_dim, dtype=of_v), shape(tokens, work.heads)
    try:
        jax.eval_shape(functools.partial(run.delta_rule, scale=1.0), q, k, v, gate, gate)
        if work.window is not None:
            read = functools.partial(run.cached_read, window=work.window, block=work.block, energy=work.energy)
            queries, sink = shape(tokens, work.heads, work.key_dim), jax.ShapeDtypeStruct((work.heads,), jnp.float32)
            jax.eval_shape(read, queries, k, v, shape(work.heads, tokens), sink)
    except (NotImplementedError, TypeError) as error:
        return str(error)
    return ""


@functools.cache
def _say_once(choice: Choice, surprising: bool) -> None:
    log = logging.getLogger("hola_jax")
    level = logging.WARNING if surprising and choice.name == "xla" else logging.INFO
    log.log(level, "the memory runs by %s: %s", choice.name, choice.why)


def platform_of(device: Any) -> str:
    """The platform of a device, as `PLATFORMS` names it. A GPU's kernels are Hopper's: another is named by what it is."""
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform == "gpu" and capability.partition(".")[0] != "9":
        return f"a GPU of compute capability {capability or 'unknown'} (kernels are for Hopper, 9.0)"
    return str(device.platform)


def platform_here() -> str:
    """The platform that a bare call is compiled for: that of jax.default_device where it is set, or the process's."""
    device: Any = jax.config.jax_default_device
    return platform_of(jax.devices(device)[0] if device is None or isinstance(device, str) else device)


def _manual() -> bool:
    """Whether the call stands inside shard_map."""
    return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types


def axes_left() -> tuple[str, ...]:
    """The axes of the mesh around a shard_map that it leaves to the compiler, such as the trainer's "tensor"."""
    mesh = jax.sharding.get_abstract_mesh()
    if not _manual():
        return ()
    kinds = zip(mesh.axis_names, mesh.axis_types, mesh.axis_sizes, strict=True)
    return tuple(name for name, kind, size in kinds if kind == AxisType.Auto and size > 1)


def head_parts() -> int:
    """The number of devices that `divided` divides heads over."""
    mesh, parts = jax.sharding.get_abstract_mesh(), 1
    for axis in axes_left():
        parts *= mesh.shape[axis]
    return parts


def divided(call: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`call` on each device's heads. The compiler cannot divide a kernel: along the axes that are left to it, shard_map
    does. The specs name those axes "heads"."""
    axes = axes_left()
    if not axes:
        return call

    def spec(given: P) -> P:
        return P(*(axes if part == "heads" else part for part in given))

    in_specs, out_specs = jax.tree.map(spec, (in_specs, out_specs), is_leaf=lambda x: isinstance(x, P))
    return jax.shard_map(call, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes), check_vma=False)
