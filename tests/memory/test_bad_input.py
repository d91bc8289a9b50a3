"""What the memory refuses: by shape and type at trace time, by value with `check=True`, eagerly and under jit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from hola_jax.memory import CacheParams, MemoryConfig, hola_memory, init_state
from tests.laws.cases import CONFIG, KEY_HEADS, OTHER, PARAMS, RESCORED, SEGMENTS, B, H, K, T, V, compiled, inputs


def call(config=CONFIG, params=PARAMS, segment_ids=None, state=None, implementation=None, learned=None, **changed):
    """Trace a call with some of its arrays changed; nothing is computed."""
    arrays = dict(zip(["q", "k", "v", "beta", "log_decay"], inputs(), strict=True)) | changed
    options = {"config": config, "segment_ids": segment_ids, "state": state, "implementation": implementation}
    options["learned"] = learned
    return jax.eval_shape(lambda: hola_memory(*arrays.values(), params, **options))


def state(batch=B, heads=H, key_dim=K, config=CONFIG, dtype=jnp.float32):
    return init_state(config, batch, heads, key_dim, V, dtype, key_heads=KEY_HEADS)


Q, KEYS, VALUES, BETA, DECAY = inputs()
REFUSED = {
    "rank": ({"v": VALUES[0]}, ValueError, r"v has shape .* must have 4 axes \[B T H V\]"),
    "batch": ({"k": KEYS[:1]}, ValueError, r"k has shape .* it must be \[B T h K\]"),
    "queries": ({"q": Q[..., :3]}, ValueError, r"q has shape \(2, 37, 1, 3\)"),
    "heads": ({"k": jnp.ones((B, T, 3, K)), "q": jnp.ones((B, T, 3, K))}, ValueError, "key heads must divide"),
    "beta": ({"beta": BETA[..., :1]}, ValueError, r"beta has shape .* \[B T H\]"),
    "decay": ({"log_decay": DECAY[:, :5]}, ValueError, r"log_decay has shape"),
    "channel decay": ({"log_decay": jnp.ones((B, T, H, 3))}, ValueError, r"log_decay has shape .* \[B T H K\]"),
    "integers": ({"v": VALUES.astype(jnp.int32)}, TypeError, "v has dtype int32; it must be floating point"),
    "list": ({"beta": [1.0]}, TypeError, "beta is a list; it must be an array"),
    "no tokens": ({n: x[:, :0] for n, x in zip("qkv", inputs(), strict=False)}, ValueError, "at least one"),
    "segment shape": ({"segment_ids": SEGMENTS[:, :3]}, ValueError, r"segment_ids has shape \(2, 3\)"),
    "segment type": ({"segment_ids": SEGMENTS * 1.0}, TypeError, "segment_ids is float"),
    "parameters": (
        {"params": PARAMS._replace(sink_logit=jnp.ones(5))},
        ValueError,
        "cache_params.sink_logit has shape",
    ),
    "no scale": ({"params": PARAMS._replace(key_scale=None)}, ValueError, "key_scale is None; read='rmsnorm' needs"),
    "no params": ({"params": tuple(PARAMS)}, TypeError, "cache_params is a tuple; it must be a CacheParams"),
    "config": ({"config": "surprise"}, TypeError, "config is a str; it must be a MemoryConfig"),
    "implementation": ({"implementation": "cuda"}, ValueError, "implementation is 'cuda'; it must be"),
    "pallas": ({"implementation": "pallas"}, NotImplementedError, "use implementation='xla'"),
    "new scores by pallas": (
        {"config": RESCORED["attention"], "implementation": "pallas"},
        NotImplementedError,
        "score='attention' is decided anew at each block's end, which no kernel does; use implementation='xla'",
    ),
    "new scores by kernel": (
        {"config": RESCORED["attention"], "implementation": "interpret"},
        NotImplementedError,
        "score='attention'",
    ),
    "learned by pallas": (
        {"config": OTHER["learned"], "learned": BETA, "implementation": "pallas"},
        NotImplementedError,
        "score='learned' has a gradient of its own, which no kernel gives",
    ),
    "a choice by pallas": (
        {"config": OTHER["choice"], "implementation": "pallas"},
        NotImplementedError,
        "fade=9.0 changes what a score does, which no kernel knows",
    ),
    "heads together by pallas": (
        {"config": MemoryConfig(budget=6, same_key=0.9), "implementation": "pallas"},
        NotImplementedError,
        "same_key=0.9, budget=6 is decided anew at each block's end, which no kernel does",
    ),
    "no power": (
        {"config": OTHER["power"], "params": PARAMS._replace(power=None)},
        ValueError,
        "cache_params.power is None; read='rmsnorm', read_power=True needs an array of 2 numbers",
    ),
    "nothing learned": ({"config": OTHER["learned"]}, ValueError, "learned is not given and the score is 'learned'"),
    "learned for another": ({"learned": BETA}, ValueError, "learned is given and the score is 'surprise'"),
    "learned shape": (
        {"config": OTHER["learned"], "learned": BETA[:, :3]},
        ValueError,
        r"learned has shape .* \[B T H\]",
    ),
    "decay by kernel": (
        {"log_decay": jnp.zeros((B, T, H, 8)), "implementation": "interpret"},
        NotImplementedError,
        "takes one decay per token and head, not one per key channel",
    ),
    "state batch": ({"state": state(batch=3)}, ValueError, r"state.fast_weights has shape \(3, .* needs \(2,"),
    "state config": (
        {"state": state(config=MemoryConfig(window=4, block=8, chunk=4, score="write"))},
        ValueError,
        "made with",
    ),
    "state type": ({"state": state(dtype=jnp.bfloat16)}, TypeError, "state holds bfloat16 values and v is float32"),
    "no state": ({"state": {}}, TypeError, "state is a dict; it must be a MemoryState"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_call_is_refused_by_name_when_it_is_traced(case):
    changed, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call(**changed)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk": 48}, "chunk=48 does not divide block=256"),
        ({"window": -1}, "window is -1; it must be an integer of at least 0"),
        ({"block": 0, "chunk": 1}, "block is 0"),
        ({"block": 64.0}, "block is 64.0"),
        ({"score": "suprise"}, "score is 'suprise'; it must be one of"),
        ({"read": "softmax"}, "read is 'softmax'"),
        ({"scan": "tree"}, "scan is 'tree'"),
        ({"score": "learned", "sparsity": 0.0}, r"sparsity is 0.0; it must be None or a share in \(0, 1\]"),
        ({"write": "never"}, "write is 'never'; it must be one of"),
        ({"write": "eviction"}, "write='eviction' is of score='recall', and score is 'surprise'"),
        ({"sparsity": 0.1}, "sparsity=0.1 is of score='learned', .* and score is 'surprise'"),
    ],
)
def test_a_bad_configuration_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MemoryConfig(**fields)


def test_chunk_and_scan_are_no_part_of_what_a_state_means():
    faster = dataclasses.replace(CONFIG, chunk=8, scan="associative")
    assert call(config=faster, state=state())[0].shape == (B, T, H, V)


@pytest.fixture(scope="module")
def checked():
    """hola_memory with check=True under jit: (arrays, segment_ids, state) -> its error, or None."""

    def run(arrays, segment_ids, state):
        return hola_memory(*arrays, PARAMS, config=CONFIG, segment_ids=segment_ids, state=state, check=True)

    functional = jax.jit(checkify.checkify(run))
    return lambda arrays, segment_ids, state: functional(arrays, segment_ids, state)[0].get()


VALUES_REFUSED = {
    "beta": ({3: BETA.at[1, 3, 0].set(2.5)}, SEGMENTS, r"beta has an entry outside \[0, 2\]"),
    "decay": ({4: DECAY.at[0, 0, 1].set(0.1)}, SEGMENTS, "log_decay has a positive entry"),
    "order": ({}, SEGMENTS[:, ::-1].copy(), "segment_ids decreases"),
    "negative": ({}, SEGMENTS - 1, "segment_ids has a negative id"),
}


@pytest.mark.parametrize("case", VALUES_REFUSED)
def test_values_are_checked_under_jit(case, checked):
    changed, segments, message = VALUES_REFUSED[case]
    arrays = [changed.get(i, x) for i, x in enumerate(inputs())]
    assert message.replace("\\", "") in checked(arrays, segments, state())


def test_good_values_pass_the_check_and_change_nothing(checked):
    assert checked(inputs(), SEGMENTS, state()) is None
    old = dataclasses.replace(state(), document=jnp.array([5, 1], jnp.int32))
    assert "before the one that the state stands in" in checked(inputs(), SEGMENTS, old)


def test_a_check_that_is_off_costs_nothing():
    text = str(jax.make_jaxpr(lambda a: hola_memory(*a, PARAMS, config=CONFIG))(inputs()))
    assert "check" not in text.replace("checkpoint", "")
    assert np.all(np.isfinite(compiled(CONFIG)(inputs())[0]))
    assert CacheParams._fields[:4] == ("query_scale", "key_scale", "sink_logit", "gate_logit")
