"""The bodies of OpenAI's completions and chat completions: what a request may say, and what an answer looks like.

What would change an answer and is not supported is refused by name, never ignored.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from hola_jax.config import unknown_name
from hola_jax.inference.generator import Request
from hola_jax.inference.sampling import Sampling

ROLES = ("system", "developer", "user", "assistant")
IGNORED = ("user", "metadata", "store", "service_tier")  # none of them changes an answer
DEFAULTS: dict[str, tuple[Any, ...]] = {  # supported at these values alone
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "echo": (None, False),
    "suffix": (None,),
    "best_of": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none"),
}
COMMON = ("model", "n", "stream", "stream_options", "stop", "seed", "max_tokens")
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
MOST_STOPS = 16


class Refused(Exception):
    """An answer that is an error: 4xx is the client's."""

    def __init__(self, status: int, message: str, code: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    prompt_tokens: int = 131_072
    max_tokens: int = 4096
    choices: int = 16  # of one request: prompts times n
    body_bytes: int = 8 << 20
    body_seconds: float = 30.0


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """How messages become a prompt: each by `turn`, then `reply`; the answer ends before `stop`."""

    turn: str = "{role}: {content}\n"
    reply: str = "assistant:"
    stop: tuple[str, ...] = ("\nuser:",)

    def __post_init__(self) -> None:
        if "{content}" not in self.turn:
            raise ValueError(f"the format of a turn is {self.turn!r}; it must hold {{content}}, and may hold {{role}}")

    def prompt(self, messages: Sequence[tuple[str, str]]) -> str:
        turns = (self.turn.replace("{role}", role).replace("{content}", text) for role, text in messages)
        return "".join(turns) + self.reply


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request that is well formed."""

    prompts: list[Any]  # text or tokens
    request: Request  # that of the first choice; choice i has its seed + i
    n: int
    stream: bool
    usage: bool  # whether the stream ends with it


def body_of(data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits is a bare ValueError
        raise Refused(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refused(400, f"the body is a JSON {type(body).__name__}; it must be an object")
    return body


def asked(body: Mapping[str, Any], chat: bool, model: str, form: ChatFormat, limits: Limits) -> Asked:
    """What the body asks for."""
    own = ("messages", "max_completion_tokens") if chat else ("prompt",)
    for name, value in body.items():
        if name in DEFAULTS:
            if value not in DEFAULTS[name]:
                raise Refused(400, f"{name} is not supported here; leave it out", "unsupported")
        elif name not in (*COMMON, *SAMPLING, *own, *IGNORED):
            raise Refused(400, str(unknown_name("a field", name, (*own, *COMMON, *SAMPLING))), "unknown_field")
    if body.get("model") != model:
        raise Refused(404, f"the model {body.get('model')!r} is not served here; {model!r} is", "model_not_found")
    n, stream = _of(body, "n", int, 1), _of(body, "stream", bool, False)
    prompts = [_chat_prompt(body, form)] if chat else _prompts(body)
    if n < 1 or n * len(prompts) > limits.choices:
        raise Refused(400, f"{len(prompts)} prompts times n = {n} choices; there may be 1 to {limits.choices}")
    options = _of(body, "stream_options", dict, {})
    return Asked(prompts, _request(body, chat, form, limits), n, stream, bool(options.get("include_usage")))


def _of(body: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {int: "an integer", bool: "true or false", dict: "an object", list: "a list"}
        raise Refused(400, f"{name} is {json.dumps(value)[:80]}; it must be {words[kind]}")
    return value


def _request(body: Mapping[str, Any], chat: bool, form: ChatFormat, limits: Limits) -> Request:
    default = min(256 if chat else 16, limits.max_tokens)
    max_tokens = _of(body, "max_tokens", int, default)
    if chat:
        max_tokens = _of(body, "max_completion_tokens", int, max_tokens)
    if max_tokens > limits.max_tokens:
        raise Refused(400, f"max_tokens is {max_tokens}; this server writes at most {limits.max_tokens}")
    given = body.get("stop")
    stop = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list) else ()
    if given is not None and not isinstance(given, str | list):
        raise Refused(400, "stop must be a string or a list of strings")
    if len(stop) > MOST_STOPS or sum(len(each) for each in stop if isinstance(each, str)) > 4096:
        raise Refused(
            400, f"stop has {len(stop)} strings; at most {MOST_STOPS}, of 4096 characters in all, are allowed"
        )
    seed = _of(body, "seed", int, None)
    try:
        sampling = Sampling(**{name: body[name] for name in SAMPLING if body.get(name) is not None})
        stop = (*stop, *form.stop) if chat else stop
        drawn = secrets.randbits(32) if seed is None else seed
        return Request(max_tokens=max_tokens, sampling=sampling, seed=drawn, stop=stop)
    except ValueError as error:
        raise Refused(400, str(error)) from None


def _prompts(body: Mapping[str, Any]) -> list[Any]:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise Refused(400, "prompt must be a string, a list of tokens, or a list of those, and not empty")
    if all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
        return [_tokens(prompt)]
    found = [_tokens(each) if isinstance(each, list) else each for each in prompt]
    if not all(isinstance(each, str | list) for each in found):
        raise Refused(400, "prompt must be a string, a list of tokens, or a list of those")
    return found


def _tokens(tokens: list[Any]) -> list[int]:
    if not all(isinstance(token, int) and not isinstance(token, bool) and abs(token) < 2**31 for token in tokens):
        raise Refused(400, "a prompt of tokens must be a list of integers of the vocabulary")
    return tokens


def _chat_prompt(body: Mapping[str, Any], form: ChatFormat) -> str:
    messages = _of(body, "messages", list, [])
    if not messages:
        raise Refused(400, "messages must be a list of at least one message")
    found = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise Refused(400, f"each of messages must be an object whose role is one of {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise Refused(400, "the content of a message must be a string, or a list of parts of type text")
        found.append((message["role"], content))
    return form.prompt(found)


class Answer:
    """The bodies of one answer."""

    def __init__(self, chat: bool, model: str, created: int) -> None:
        self.chat = chat
        self.name = "chat.completion" if chat else "text_completion"
        self.head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": created,
            "model": model,
        }

    def whole(self, texts: Sequence[str], finishes: Sequence[str], usage: dict[str, int]) -> dict[str, Any]:
        def choice(text: str) -> dict[str, Any]:
            return {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}

        choices = [
            {"index": index, **choice(text), "logprobs": None, "finish_reason": finish}
            for index, (text, finish) in enumerate(zip(texts, finishes, strict=True))
        ]
        return {**self.head, "object": self.name, "choices": choices, "usage": usage}

    def part(self, index: int, text: str, finish: str | None, first: bool) -> dict[str, Any]:
        delta = {"role": "assistant", "content": text} if first else {"content": text}
        content = {"delta": delta} if self.chat else {"text": text}
        return self._chunk([{"index": index, **content, "logprobs": None, "finish_reason": finish}])

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": self.name + (".chunk" if self.chat else ""), "choices": choices}


def event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
