"""One self-contained HTML file that shows what a model's exact cache kept of a text, and where its reads looked.

page.html beside this file is the whole of it but for the numbers, which stand in it as JSON, large arrays as base64.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from hola_jax.diagnostics.insight import Insight, insight
from hola_jax.memory import MemoryConfig
from hola_jax.model import LanguageModel

TEMPLATE = "page.html"


class Shown(NamedTuple):
    """A text on the page, and the model that reads it."""

    model: LanguageModel
    name: str
    about: str  # a sentence or two: what it is
    tokens: np.ndarray  # int [T]
    text: Sequence[str]  # of each token
    distances: np.ndarray  # how long ago each token's sequence stood last (`repetition.distances`), 0 for never
    marked: Sequence[int] = ()  # tokens in bold


def page(texts: Sequence[Shown], figures: str, sentences: Sequence[str]) -> str:
    """The HTML, which begins with the first text; `figures` is HTML too, `sentences` are plain text."""
    parts = {
        "FOUND": "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences),
        "FIGURES": figures,
        # Escaped, or "</script>" in a text would end it.
        "DATA": json.dumps([numbers(text) for text in texts], separators=(",", ":")).replace("<", "\\u003c"),
    }
    html = resources.files(__package__).joinpath(TEMPLATE).read_text()
    for name, value in parts.items():
        html = html.replace("{{" + name + "}}", value)
    return html


def numbers(shown: Shown) -> dict[str, Any]:
    """What the page knows of one text."""
    found, config = insight(shown.model, shown.tokens), shown.model.config
    surprise = np.asarray(found.surprise).transpose(0, 2, 1)
    most = float(surprise.max()) or 1.0
    weights = visible_weights(found, config.memory.block)
    kept = np.asarray(found.kept)
    return {
        "name": shown.name,
        "about": shown.about,
        "held": still_held(found, shown.distances, config.memory),
        "window": config.memory.window,
        "block": config.memory.block,
        "layers": config.layers,
        "heads": config.heads,
        "text": list(shown.text),
        "marked": [int(token) for token in shown.marked],
        "distance": shown.distances.tolist(),
        "chance": np.round(chances(np.asarray(found.logits), shown.tokens), 4).tolist(),
        "gate": np.asarray(found.gate).round(4).tolist(),
        "most": most,
        "surprise": squares(surprise, most),
        "kept": coded(kept.transpose(0, 2, 1, 3).astype("<i2")),
        "weights": squares(weights, 1.0),
        "example": example(weights[..., : config.memory.window], kept, shown.distances, config.memory.block),
    }


def visible_weights(found: Insight, block: int) -> np.ndarray:
    """float [N, H, T, W + C]: each read's weights over the cache's rows, best score first, then its block's tokens."""
    weights = np.asarray(found.weights).transpose(0, 2, 1, 3)  # [N H T T]
    kept = np.asarray(found.kept).transpose(0, 2, 1, 3)  # [N H m W]
    layers, heads, length, _ = weights.shape
    parts = np.zeros((layers, heads, length, kept.shape[3] + block), np.float32)
    for start in range(0, length, block):
        rows = weights[:, :, start : start + block]  # [N H C T]
        held = kept[:, :, start // block][:, :, None]  # [N H 1 W]
        into = parts[:, :, start : start + block]
        into[..., : kept.shape[3]] = np.where(held >= 0, np.take_along_axis(rows, np.maximum(held, 0), 3), 0)
        own = rows[..., start : start + block]
        into[..., kept.shape[3] : kept.shape[3] + own.shape[3]] = own
    return parts


def chances(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[T]: how likely the model took each token to be, given those before it; 0 for the first, which it did not guess."""
    top = logits.max(-1, keepdims=True)
    log = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return np.append(0.0, np.exp(log[np.arange(len(tokens) - 1), tokens[1:]]))


def example(weights: np.ndarray, kept: np.ndarray, distances: np.ndarray, block: int) -> dict[str, int]:
    """{token, layer, head} to point at: the read that gave most to the cache's row of the token that comes next again; where
    no cache holds such a token, the read that leans most on one row. `weights` are of the cache's rows."""
    lean = weights.max(-1, initial=0)
    answers = np.zeros_like(lean)
    for token in np.flatnonzero(distances[1:]):
        held = kept[:, token // block] == token + 1 - distances[token + 1]  # [N H W]
        answers[:, :, token] = np.sum(weights[:, :, token] * held, axis=-1)
    layer, head, token = np.unravel_index(int((answers if answers.any() else lean).argmax()), lean.shape)
    return {"token": int(token), "layer": int(layer), "head": int(head)}


def still_held(found: Insight, distances: np.ndarray, memory: MemoryConfig) -> str:
    """How many of the tokens that are repeated from afar a cache still held, beside a choice at random."""
    reach, kept = memory.window + memory.block, np.asarray(found.kept)
    far = np.flatnonzero(distances > reach)
    if not len(far):
        return f"No token of this text repeats what stood more than {reach} tokens back."
    blocks = (far - 1) // memory.block  # of the token that asks
    held = sum(bool((kept[:, block] == t - distances[t]).any()) for t, block in zip(far, blocks, strict=True))
    missed = (1 - memory.window / (blocks * memory.block)) ** (kept.shape[0] * kept.shape[2])
    return (
        f"In this text {len(far)} tokens end a sequence that stood more than {reach} tokens back, beyond what a cache of "
        f"the latest tokens can hold. Of {held} of them, the cache of some layer and head still held the earlier one; "
        f"caches filled at random would have held {np.sum(1 - missed):.0f}."
    )


def squares(values: np.ndarray, scale: float) -> str:
    """base64 of a byte for each value, scale * (byte / 255)^2: finest where values are small."""
    return coded(np.round(255 * np.sqrt(np.clip(values / scale, 0, 1))).astype(np.uint8))


def coded(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def plain(html: str) -> Any:
    """The numbers of a page, as they stand in it."""
    return json.loads(html.split('<script type="application/json" id="data">')[1].split("</script>")[0])
