"""The server with a real client on loopback: many at once, streams, who goes away, and what is refused."""

import asyncio
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
pytest.importorskip("openai", reason="the extra `dev` is not installed")
import httpx
import openai
import uvicorn

from hola_jax import Generator
from hola_jax.inference import GREEDY, Request, Sampling, programs
from hola_jax.inference.batcher import Batcher, Closed, Job
from hola_jax.inference.protocol import ChatFormat, Limits
from hola_jax.inference.server import Service, application
from tests.inference.models import model
from train.data.tokenizers import Bytes

KEY = "a key"
LIMITS = Limits(prompt_tokens=300, max_tokens=400_000, choices=64, body_bytes=20_000, body_seconds=3.0)
ENDLESS = Request(max_tokens=10**6, sampling=GREEDY, stop_tokens=())
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom"


@dataclasses.dataclass(frozen=True)
class Served:
    url: str
    batcher: Batcher

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key=KEY, **{"max_retries": 0, "timeout": 120, **options})

    def post(self, path: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.post(self.url + path, headers=headers, timeout=60, **options)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    generator = Generator(model(), Bytes(), pieces=(16,), steps=4)
    batcher = Batcher(generator, slots=8, queue=64)
    batcher.warm_up()
    service = Service(batcher, "tiny", LIMITS, ChatFormat(), KEY)
    server = uvicorn.Server(uvicorn.Config(application(service), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Served(f"http://127.0.0.1:{port}", batcher)
    server.should_exit = True
    thread.join()
    assert not batcher.alive


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def prompt(number: int) -> str:
    return TEXT[: 2 + 3 * number % len(TEXT)]


def asking(number: int) -> dict[str, Any]:
    how = {"temperature": (0, 1, 1.3)[number % 3], "extra_body": {"top_k": (0, 50)[number % 2]}}
    return {"model": "tiny", "prompt": prompt(number), "max_tokens": 3 + number % 9, "seed": number, **how}


def test_sixty_four_at_once_get_what_each_gets_alone(served: Served) -> None:
    async def all_at_once() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(client.completions.create(**asking(number)) for number in range(64)))

    found = asyncio.run(all_at_once())
    client = served.client()
    for number in range(0, 64, 5):
        alone = client.completions.create(**asking(number))
        assert alone.choices[0].text == found[number].choices[0].text
        assert alone.usage == found[number].usage and alone.usage.prompt_tokens == len(prompt(number))
    assert {answer.choices[0].finish_reason for answer in found} <= {"length", "stop"}
    assert served.batcher.counters.failed == 0


def test_the_server_says_what_generate_says(served: Served) -> None:
    generator = served.batcher.generator
    wanted = generator.generate([prompt(4)], max_tokens=8, seed=5, sampling=Sampling(top_p=0.9))[0]
    found = served.client().completions.create(
        model="tiny", prompt=list(prompt(4).encode()), max_tokens=8, seed=5, top_p=0.9
    )
    assert found.choices[0].text == wanted.text and found.choices[0].finish_reason == wanted.finish
    assert found.usage.completion_tokens == len(wanted.tokens)


def test_a_stream_is_the_answer_in_parts(served: Served) -> None:
    client = served.client()
    whole = client.completions.create(model="tiny", prompt=["ab", "cde"], n=2, max_tokens=9, seed=1)
    texts = [""] * 4
    for part in client.completions.create(model="tiny", prompt=["ab", "cde"], n=2, max_tokens=9, seed=1, stream=True):
        texts[part.choices[0].index] += part.choices[0].text
    assert texts == [choice.text for choice in whole.choices] and len(set(texts)) == 4


def test_several_answers_to_a_prompt_read_it_once(served: Served) -> None:
    client, counters = served.client(), served.batcher.counters
    alone = [
        client.completions.create(model="tiny", prompt=TEXT, max_tokens=5, seed=seed).choices[0].text
        for seed in (7, 8, 9)
    ]
    before = counters.prompt_tokens
    together = client.completions.create(model="tiny", prompt=TEXT, max_tokens=5, seed=7, n=3)
    assert [choice.text for choice in together.choices] == alone
    assert counters.prompt_tokens - before == len(TEXT) == together.usage.prompt_tokens


def test_chat(served: Served) -> None:
    client = served.client()
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    whole = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=6, seed=2)
    plain = client.completions.create(
        model="tiny", prompt="system: Be brief.\nuser: Hi\nassistant:", max_tokens=6, seed=2, stop="\nuser:"
    )
    assert whole.choices[0].message.content == plain.choices[0].text and whole.choices[0].message.role == "assistant"
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=6, seed=2, stream=True, stream_options={"include_usage": True}
    )
    parts = list(stream)
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == plain.choices[0].text
    assert parts[-1].usage == whole.usage and parts[0].choices[0].delta.role == "assistant"


def test_who_goes_away_frees_the_slot(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.batcher.generator, "stop_tokens", lambda request: ())
    before = served.batcher.counters.cancelled
    endless = {"model": "tiny", "prompt": "a", "max_tokens": 400_000, "stream": True, "seed": 1}
    with httpx.stream(
        "POST", served.url + "/v1/completions", json=endless, headers={"Authorization": f"Bearer {KEY}"}
    ) as r:
        lines = r.iter_lines()  # held: an iterator that is let go of closes the connection
        next(lines)
        until(lambda: served.batcher.active == 1)
    until(lambda: served.batcher.active == 0)
    with pytest.raises(httpx.ReadTimeout):
        headers = {"Authorization": f"Bearer {KEY}"}
        patience = httpx.Timeout(60, read=2)  # long enough to be at work by then on a busy machine
        httpx.post(served.url + "/v1/completions", json={**endless, "stream": False}, headers=headers, timeout=patience)
    until(lambda: served.batcher.active == 0 and served.batcher.counters.cancelled == before + 2)


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"prompt": ""}, 400, "the prompt is empty"),
    ({"prompt": []}, 400, "not empty"),
    ({}, 400, "prompt must be"),
    ({"prompt": [256]}, 400, "token 256; the vocabulary is 0 to 255"),
    ({"prompt": [2**70]}, 400, "list of integers"),
    ({"prompt": ["a", 3]}, 400, "prompt must be"),
    ({"prompt": "a" * 301}, 400, "301 tokens; at most 300"),
    ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens is 0"),
    ({"prompt": "a", "max_tokens": 400_001}, 400, "at most 400000"),
    ({"prompt": "a", "max_tokens": "9"}, 400, "must be an integer"),
    ({"prompt": "a", "temperature": -1}, 400, "temperature is -1"),
    ({"prompt": "a", "temperature": [1]}, 400, "temperature is"),
    ({"prompt": "a", "sampler": "beam"}, 400, "a field is 'sampler'"),
    ({"prompt": "a", "temprature": 1}, 400, "did you mean 'temperature'"),
    ({"prompt": "a", "logprobs": 3}, 400, "logprobs is not supported"),
    ({"prompt": "a", "n": 65}, 400, "there may be 1 to 64"),
    ({"prompt": "a", "n": 0}, 400, "there may be 1 to 64"),
    ({"prompt": "a", "stop": 3}, 400, "stop must be"),
    ({"prompt": "a", "stop": [""]}, 400, "stop is"),
    ({"prompt": "a", "model": "other"}, 404, "'tiny' is"),
    ({"prompt": "a\ud800"}, 400, "surrogate"),
]


def test_a_bad_request_is_told_why_and_the_others_are_served(served: Served) -> None:
    for body, status, words in BAD:
        answer = served.post("/v1/completions", content=json.dumps({"model": "tiny", **body}))
        assert answer.status_code == status and words in answer.json()["error"]["message"], (body, answer.text)
    for data, words in (
        (b"{", "not JSON"),
        (b"[]", "must be an object"),
        (b'{"a":"\xff"}', "not UTF-8"),
        (b"", "not JSON"),
    ):
        answer = served.post("/v1/chat/completions", content=data)
        assert answer.status_code == 400 and words in answer.json()["error"]["message"]
    for messages, words in (
        ([], "at least one"),
        (["a"], "each of messages"),
        ([{"role": "user"}], "content of a message"),
    ):
        answer = served.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
        assert answer.status_code == 400 and words in answer.json()["error"]["message"]
    assert served.post("/v1/nothing").status_code == 404
    assert served.post("/health").status_code == 405 and "error" in served.post("/health").json()
    assert served.client().completions.create(**asking(1)).choices


def test_a_gigabyte_and_a_client_that_hangs_hold_nobody_up(served: Served) -> None:
    port = int(served.url.rpartition(":")[2])
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"

    def answer(text: str) -> str:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(text.encode())
            return connection.recv(65536).decode()

    assert answer(head + f"Content-Length: {2**30}\r\n\r\n").startswith("HTTP/1.1 413")
    chunk = "4000\r\n" + "a" * 0x4000 + "\r\n"
    assert answer(head + "Transfer-Encoding: chunked\r\n\r\n" + chunk * 2).startswith("HTTP/1.1 413")
    with socket.create_connection(("127.0.0.1", port)) as silent:  # never says a word
        late = threading.Thread(target=lambda: slow.append(answer(head + "Content-Length: 9\r\n\r\n{")))
        slow: list[str] = []
        late.start()
        assert served.client().completions.create(**asking(2)).choices
        late.join()
        assert slow[0].startswith("HTTP/1.1 408") and "did not come within 3 seconds" in slow[0]
        silent.close()


def test_the_key(served: Served) -> None:
    with pytest.raises(openai.AuthenticationError, match="API key"):
        openai.OpenAI(base_url=served.url + "/v1", api_key="another", max_retries=0).models.list()
    for path, status in (("/v1/models", 401), ("/metrics", 401), ("/health", 200)):
        assert httpx.get(served.url + path).status_code == status
    assert httpx.post(served.url + "/v1/completions", json={}).status_code == 401


def test_models_health_and_metrics(served: Served) -> None:
    client = served.client()
    assert [each.id for each in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert httpx.get(served.url + "/health").json() == {"status": "ok"}
    text = httpx.get(served.url + "/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    values = dict(line.split() for line in text.splitlines() if not line.startswith("#"))
    assert values["hola_slots"] == "8" and int(values["hola_finished_total"]) > 0 and values["hola_slots_active"] == "0"


def test_a_full_queue_says_when_to_come_again(served: Served) -> None:
    held = [
        Job(np.array([1], np.int32), dataclasses.replace(ENDLESS, seed=number), lambda what: None)
        for number in range(72)
    ]
    served.batcher.submit(held[:8])
    until(lambda: served.batcher.active == 8)
    served.batcher.submit(held[8:])
    answer = served.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
    assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1 and "64 requests wait" in answer.text
    with pytest.raises(openai.RateLimitError):
        served.client().completions.create(**asking(0))
    served.batcher.cancel(held)
    until(lambda: served.batcher.active == 0 and not served.batcher.waiting)
    assert served.client(max_retries=2).completions.create(**asking(0)).choices


def test_a_failure_of_the_device_is_told_and_passes(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher, params = served.batcher, served.batcher.generator.params
    batcher.generator.params = {**params, "norm": jax.tree.map(lambda x: x * np.nan, params["norm"])}
    answer = served.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
    assert answer.status_code == 500 and "NaN or infinite" in answer.json()["error"]["message"]
    batcher.generator.params = params

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(programs, "write", broken)
        answer = served.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
        assert answer.status_code == 500 and "out of memory" in answer.json()["error"]["message"]
    assert served.client().completions.create(**asking(3)).choices


def test_a_closed_batcher_tells_everyone() -> None:
    batcher = Batcher(Generator(model(), pieces=(16,), steps=4), slots=8)
    told: list[Any] = []
    batcher.submit([Job(np.array([1], np.int32), ENDLESS, told.append) for _ in range(9)])
    until(lambda: batcher.active == 8)
    batcher.close()
    assert sum(isinstance(what, Closed) for what in told) == 9 and not batcher.alive
    with pytest.raises(Closed):
        batcher.submit([])
    with pytest.raises(ValueError, match="slots is 0"):
        Batcher(batcher.generator, slots=0)
