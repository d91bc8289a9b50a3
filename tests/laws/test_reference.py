"""Law 9: the reference is the paper's equations, written here once more in float64 numpy straight from their definition."""

import numpy as np
import pytest

from hola_jax.memory import CacheParams, MemoryConfig
from tests.laws.cases import KEY_HEADS, PARAMS, RANKED, SEGMENTS, B, H, K, T, V, assert_close, compiled, inputs


def by_definition(arrays, params: CacheParams, config: MemoryConfig, segments) -> np.ndarray:
    """Every token looks back over ALL earlier tokens: no merge, no state of constant size, no block buffer."""
    q, k, v, beta, g = (np.asarray(x, np.float64) for x in arrays)
    qs, ks, sink, gate, temperature = (np.asarray(x, np.float64) for x in params)

    def unit(x):
        return x / np.sqrt(np.sum(x * x) + 1e-6)

    def rms(x, scale):
        return x / np.sqrt(np.mean(x * x) + 1e-6) * scale

    out = np.zeros((B, T, H, V))
    for b in range(B):
        for h in range(H):
            state, document, seen = np.zeros((K, V)), 0, []  # seen: [position, score, key, value, state's key, beta]
            position = 0
            for t in range(T):
                if segments[b, t] == 0:
                    continue
                if segments[b, t] != document:
                    state, document, seen = np.zeros((K, V)), segments[b, t], []
                qt, kt, vt = q[b, t, h // (H // KEY_HEADS)], k[b, t, h // (H // KEY_HEADS)], v[b, t, h]
                alpha = np.exp(g[b, t, h])
                e = vt - alpha * unit(kt) @ state
                late = config.write == "eviction"
                state = alpha * state + (0 if late else beta[b, t, h]) * np.outer(unit(kt), e)
                o = K**-0.5 * unit(qt) @ state
                score = {
                    "surprise": beta[b, t, h] * np.linalg.norm(e),
                    "residual": np.linalg.norm(e),
                    "write": beta[b, t, h] * np.linalg.norm(vt),
                    "recency": position,
                    "learned": vt @ np.cos(np.arange(V)),
                }.get(config.score, 0.0)
                if config.read == "rmsnorm":
                    key, query = rms(kt, ks), rms(qt, qs) / np.sqrt(K)
                else:
                    key, query = unit(kt), unit(qt) * temperature[h]
                seen.append([position, score, key, vt, unit(kt), beta[b, t, h]])
                first = position - position % config.block
                earlier = [s for s in seen if s[0] < first and (config.sparsity is None or s[1] > 0)]
                earlier = sorted(earlier, key=lambda s: (-s[1], s[0]))[: config.window]
                visible = earlier + [s for s in seen if s[0] >= first]
                if config.rescored:
                    visible = seen
                weights = np.exp([s[2] @ query for s in visible])
                o_cache = weights @ np.array([s[3] for s in visible]) / (np.sum(weights) + np.exp(sink[h]))
                out[b, t, h] = o + o_cache / (1 + np.exp(-gate[h]))
                position += 1
                if config.rescored:  # what is dropped is dropped for good
                    if config.score == "attention":
                        for s, weight in zip(seen, weights / (np.sum(weights) + np.exp(sink[h])), strict=True):
                            s[1] += weight
                    if position % config.block == 0:
                        if config.score == "recall":
                            for s in seen:
                                s[1] = np.linalg.norm(s[4] @ state - s[3])
                        ranked = sorted(seen, key=lambda s: (-s[1], s[0]))
                        seen, dropped = ranked[: config.window], ranked[config.window :]
                        for s in sorted(dropped if late else [], key=lambda s: s[0]):
                            state = state + s[5] * np.outer(s[4], s[3] - s[4] @ state)
    return out


@pytest.mark.parametrize(
    ("score", "read"),
    [
        pytest.param("surprise", "rmsnorm", marks=pytest.mark.oldest),
        ("residual", "unit_l2"),
        ("write", "rmsnorm"),
        ("recency", "unit_l2"),
    ]
    + [(name, "rmsnorm") for name in RANKED],
)
def test_reference_is_the_equations(score, read):
    config = RANKED.get(score) or MemoryConfig(window=4, block=8, chunk=4, score=score, read=read)
    arrays = inputs()
    out, _ = compiled(config, "reference")(arrays, SEGMENTS)
    assert_close(out, by_definition(arrays, PARAMS, config, SEGMENTS), atol=5e-6)
