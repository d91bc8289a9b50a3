"""Documents out of JSON lines, plain or compressed, each line that is none reported with its number."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from train.data.record import EXTRA

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


class Line(NamedTuple):
    """What one line holds: a text, or the reason why it has none."""

    number: int
    text: str | None
    reason: str = ""


class Damaged(Exception):
    """A compressed stream that cannot be read on."""


def documents(chunks: Iterable[bytes], name: str, field: str) -> Iterator[Line]:
    """The lines of a file called `name`, from its bytes as they are stored; blank lines are passed over."""
    number = 0
    try:
        for number, line in enumerate(_lines(_plain(chunks, name)), start=1):
            if line.strip():
                yield _document(number, line, field)
    except Damaged as error:
        yield Line(number + 1, None, f"{error}; what the file holds from this line on is lost")


def _document(number: int, line: bytes, field: str) -> Line:
    try:
        found = json.loads(line.decode())
        text = found[field]
        text.encode()  # half a surrogate pair is legal JSON and no text
        return Line(number, text)
    except UnicodeDecodeError as error:
        return Line(number, None, f"not UTF-8: {error.reason} at byte {error.start}")
    except UnicodeEncodeError as error:
        return Line(number, None, f"{field!r} is no text: {error.reason} at character {error.start}")
    except (ValueError, RecursionError) as error:
        return Line(number, None, f"not JSON: {error}")
    except KeyError:
        return Line(number, None, f"no {field!r}")
    except (TypeError, AttributeError):
        return Line(number, None, f"{field!r} is no string" if isinstance(found, dict) else "not a JSON object")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    begun: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        begun.append(first)
        if others:
            yield b"".join(begun)
            yield from others[:-1]
            begun = [others[-1]]
    if any(begun):
        yield b"".join(begun)


def _plain(chunks: Iterable[bytes], name: str) -> Iterable[bytes]:
    if name.endswith(".zst"):
        try:
            import zstandard
        except ImportError as error:
            raise ImportError(EXTRA.format("zstandard"), name=error.name) from error
        return _inflated(chunks, zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj, zstandard.ZstdError)
    if name.endswith(".gz"):
        return _inflated(chunks, lambda: zlib.decompressobj(31), zlib.error)
    return chunks


def _inflated(chunks: Iterable[bytes], new: Callable[[], Any], failure: type[Exception]) -> Iterator[bytes]:
    """The bytes inside compressed frames that follow one another."""
    frame = None
    for chunk in chunks:
        while chunk:
            frame = new() if frame is None else frame
            try:
                yield frame.decompress(chunk)
            except failure as error:
                raise Damaged(f"the compressed stream is damaged: {error}") from error
            if not frame.eof:
                break
            chunk, frame = frame.unused_data, None
    if frame is not None:
        raise Damaged("the compressed stream ends early")
