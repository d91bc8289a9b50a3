"""Law 9: the reference is the paper's equations, written here once more in float64 numpy straight from their definition."""

import numpy as np
import pytest

from hola_jax.memory import CacheParams, MemoryConfig
from tests.laws.cases import (
    KEY_HEADS,
    PARAMS,
    SEGMENTS,
    VARIANTS,
    B,
    H,
    K,
    T,
    V,
    assert_close,
    compiled_gradient,
    inputs,
)


def by_definition(arrays, params: CacheParams, config: MemoryConfig, segments) -> np.ndarray:
    """Every token looks back over ALL earlier tokens: no merge, no state of constant size, no block buffer."""
    q, k, v, beta, g = (np.asarray(x, np.float64) for x in arrays)
    qs, ks, sink, gate, temperature, power = (np.asarray(x, np.float64) for x in params)

    def unit(x):
        return x / np.sqrt(np.sum(x * x) + 1e-6)

    def rms(x, scale):
        return x / np.sqrt(np.mean(x * x) + 1e-6) * scale

    out = np.zeros((B, T, H, V))
    for b in range(B):
        heads = [{"state": np.zeros((K, V)), "document": 0, "seen": []} for _ in range(H)]
        position = 0
        for t in range(T):
            if segments[b, t] == 0:
                continue
            for h, head in enumerate(heads):
                qt, kt, vt = q[b, t, h // (H // KEY_HEADS)], k[b, t, h // (H // KEY_HEADS)], v[b, t, h]
                if segments[b, t] != head["document"]:
                    head.update(state=np.zeros((K, V)), document=segments[b, t], seen=[])
                seen = head["seen"]  # of each: position, score, key, value, the state's key, beta
                alpha = np.exp(g[b, t, h])
                e, late = vt - alpha * unit(kt) @ head["state"], config.write == "eviction"
                head["state"] = state = alpha * head["state"] + (1 - late) * beta[b, t, h] * np.outer(unit(kt), e)
                o = config.scale(K) * unit(qt) @ state
                score = {
                    "surprise": beta[b, t, h] * np.linalg.norm(e),
                    "residual": np.linalg.norm(e),
                    "write": beta[b, t, h] * np.linalg.norm(vt),
                    "recency": position,
                    "learned": vt @ np.cos(np.arange(V)),
                }.get(config.score, 0.0)
                if config.fade:
                    score = np.log(score * np.exp(position / config.fade))
                if config.read == "rmsnorm":
                    key, query = rms(kt, ks), rms(qt, qs) / np.sqrt(K)
                else:
                    key, query = unit(kt), unit(qt) * temperature[h]
                seen.append([position, score, key, vt, unit(kt), beta[b, t, h]])
                first = position - position % config.block
                earlier = [s for s in seen if s[0] < first and (config.sparsity is None or s[1] > 0)]
                earlier = sorted(earlier, key=lambda s: (-s[1], s[0]))[: config.window]
                visible = seen if config.rescored else earlier + [s for s in seen if s[0] >= first]
                weights = np.exp([s[2] @ query for s in visible])
                if config.read_power:
                    weights = weights * np.array([s[1] for s in visible]) ** power[h]
                o_cache = weights @ np.array([s[3] for s in visible]) / (np.sum(weights) + np.exp(sink[h]))
                out[b, t, h] = o + o_cache / (1 + np.exp(-gate[h]))
                for s, weight in zip(visible, weights / (np.sum(weights) + np.exp(sink[h])), strict=True):
                    s[1] += (1.0 if config.score == "attention" else config.read_credit) * weight
            position += 1
            if config.rescored and position % config.block == 0:  # what is dropped is dropped for good
                dropped(heads, config)
    return out


def dropped(heads, config: MemoryConfig) -> None:
    """Of all heads, at a block's end."""
    for head in heads:
        seen = head["seen"]
        if config.score == "recall":
            for s in seen:
                s[1] = np.linalg.norm(s[4] @ head["state"] - s[3])
        if config.same_key:
            unit = [s[2] / np.linalg.norm(s[2]) for s in seen]
            alike = [[a @ b >= config.same_key for b in unit] for a in unit]
            scores = [s[1] for s in seen]
            for n, s in enumerate(seen):
                s[1] = max(scores[m] for m in range(n + 1) if alike[m][n])
                s[1] = -np.inf if any(alike[n][n + 1 :]) else s[1]
        ranked = sorted((s for s in seen if s[1] > -np.inf), key=lambda s: (-s[1], s[0]))
        head["seen"] = sorted(ranked[: config.window], key=lambda s: s[0])
        if config.write == "eviction":
            for s in sorted(ranked[config.window :], key=lambda s: s[0]):
                head["state"] = head["state"] + s[5] * np.outer(s[4], s[3] - s[4] @ head["state"])
    if config.budget:
        scores = sorted((s[1] for head in heads for s in head["seen"]), reverse=True)[: config.budget]
        for head in heads:
            head["seen"] = [s for s in head["seen"] if s[1] >= scores[-1]]


WAYS = [name for name in VARIANTS if name != "energy"]  # of the share alone: memory/test_read_energy.py


@pytest.mark.parametrize("way", [pytest.param(w, marks=pytest.mark.oldest if w == "surprise" else ()) for w in WAYS])
def test_reference_is_the_equations(way):
    """By the programs of law 8."""
    arrays = inputs()
    _, (out, _) = compiled_gradient(VARIANTS[way], "reference")(arrays, PARAMS, SEGMENTS)
    assert_close(out, by_definition(arrays, PARAMS, VARIANTS[way], SEGMENTS), atol=5e-6)
