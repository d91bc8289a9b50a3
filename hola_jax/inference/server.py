"""An OpenAI-compatible server over the batcher: an ASGI application. Needs the extra `serve` (starlette, uvicorn).

It says nothing of prompts in its logs unless asked to, and every wrong request gets a JSON body that tells why.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from hola_jax.inference.batcher import Batcher, Closed, Job, QueueFull
from hola_jax.inference.generator import Delta
from hola_jax.inference.protocol import Answer, Asked, ChatFormat, Limits, Refused, asked, body_of, event

log = logging.getLogger("hola.serve")
Usage = dict[str, int]


@dataclasses.dataclass(frozen=True)
class Service:
    """What the endpoints need. `api_key` None asks for none; `log_prompts` writes each prompt to the log."""

    batcher: Batcher
    model: str
    limits: Limits = dataclasses.field(default_factory=Limits)
    chat: ChatFormat = dataclasses.field(default_factory=ChatFormat)
    api_key: str | None = None
    log_prompts: bool = False
    started: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def authorise(self, http: HttpRequest) -> None:
        if self.api_key is None:
            return
        scheme, _, given = http.headers.get("authorization", "").partition(" ")
        digests = [hashlib.sha256(key.encode()).digest() for key in (given.strip(), self.api_key)]
        if not hmac.compare_digest(*digests) or scheme.lower() != "bearer":
            raise Refused(401, "the API key is missing or wrong; send Authorization: Bearer KEY", "invalid_api_key")

    async def body(self, http: HttpRequest) -> bytes:
        """The whole body, in time and within its limit."""
        most = self.limits.body_bytes
        told = http.headers.get("content-length", "")
        if told.isdigit() and int(told) > most:
            raise Refused(413, f"the body has {told} bytes; at most {most} are read", "too_large")
        data = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in http.stream():
                    data += part
                    if len(data) > most:
                        raise Refused(413, f"the body has more than {most} bytes", "too_large")
        except TimeoutError:
            raise Refused(
                408, f"the body did not come within {self.limits.body_seconds:g} seconds", "timeout"
            ) from None
        return bytes(data)

    async def complete(self, http: HttpRequest, chat: bool) -> Response:
        self.authorise(http)
        wanted = asked(body_of(await self.body(http)), chat, self.model, self.chat, self.limits)
        prompts = await run_in_threadpool(self._encoded, wanted)
        if self.log_prompts:
            log.info("prompts %r", wanted.prompts)
        answer = Answer(chat, self.model, int(time.time()))
        inbox: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        jobs = self._submitted(wanted, prompts, asyncio.get_running_loop(), inbox)
        usage = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": 0}
        if wanted.stream:
            events = self._events(http, jobs, inbox, answer, usage, wanted.usage)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        texts, finishes = [""] * len(jobs), [""] * len(jobs)
        async for delta in self._deltas(http, jobs, inbox, usage):
            texts[delta.row] += delta.text
            finishes[delta.row] = delta.finish or ""
        return JSONResponse(answer.whole(texts, finishes, usage))

    def _encoded(self, wanted: Asked) -> list[Any]:
        found = []
        for prompt in wanted.prompts:
            try:
                tokens = self.batcher.generator.encode(prompt)
            except ValueError as error:
                raise Refused(400, str(error)) from None
            if len(tokens) > self.limits.prompt_tokens:
                raise Refused(400, f"the prompt has {len(tokens)} tokens; at most {self.limits.prompt_tokens} are read")
            found.append(tokens)
        return found

    def _submitted(
        self,
        wanted: Asked,
        prompts: list[Any],
        loop: asyncio.AbstractEventLoop,
        inbox: asyncio.Queue[Delta | Exception],
    ) -> list[Job]:
        def deliver(what: Delta | Exception) -> None:
            loop.call_soon_threadsafe(inbox.put_nowait, what)

        jobs = []
        for number in range(len(prompts) * wanted.n):
            request = dataclasses.replace(wanted.request, seed=wanted.request.seed + number)
            jobs.append(Job(prompts[number // wanted.n], request, deliver, row=number))
        try:
            self.batcher.submit(jobs)
        except ValueError as error:
            raise Refused(400, str(error)) from None
        except QueueFull as error:
            raise Refused(429, str(error), "queue_full", retry_after=1) from None
        except Closed as error:
            raise Refused(503, str(error), "stopping", retry_after=5) from None
        return jobs

    async def _deltas(
        self, http: HttpRequest, jobs: list[Job], inbox: asyncio.Queue[Delta | Exception], usage: Usage
    ) -> AsyncIterator[Delta]:
        """What the jobs deliver, until all are done; they are cancelled when the client goes or something fails."""
        gone = asyncio.ensure_future(_gone(http))
        left = len(jobs)
        try:
            while left:
                item = asyncio.ensure_future(inbox.get())
                await asyncio.wait({item, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not item.done():
                    item.cancel()
                    raise ClientDisconnect
                delta = item.result()
                if isinstance(delta, Closed):
                    raise Refused(503, str(delta), "stopping", retry_after=5)
                if isinstance(delta, Exception):
                    log.error("a request failed: %s: %s", type(delta).__name__, delta)
                    raise Refused(500, f"the model failed: {delta}")
                usage["completion_tokens"] += len(delta.tokens)
                left -= delta.finish is not None
                yield delta
            usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        finally:
            gone.cancel()
            if left:
                self.batcher.cancel(jobs)

    async def _events(
        self,
        http: HttpRequest,
        jobs: list[Job],
        inbox: asyncio.Queue[Delta | Exception],
        answer: Answer,
        usage: Usage,
        tell_usage: bool,
    ) -> AsyncIterator[str]:
        begun: set[int] = set()
        deltas = self._deltas(http, jobs, inbox, usage)
        try:
            async for delta in deltas:
                if delta.text or delta.finish:
                    yield event(answer.part(delta.row, delta.text, delta.finish, delta.row not in begun))
                    begun.add(delta.row)
            if tell_usage:
                yield event(answer.usage(usage))
            yield "data: [DONE]\n\n"
        except Refused as error:  # too late for a status: the stream tells
            yield event(error.body())
        except ClientDisconnect:
            return
        finally:
            await deltas.aclose()  # type: ignore[attr-defined]

    def models(self) -> list[dict[str, Any]]:
        return [{"id": self.model, "object": "model", "created": self.started, "owned_by": "hola_jax"}]

    def metrics(self) -> str:
        """Prometheus's text format."""
        batcher, counters = self.batcher, self.batcher.counters
        lines = []
        for name, value in dataclasses.asdict(counters).items():
            lines += [f"# TYPE hola_{name}_total counter", f"hola_{name}_total {value}"]
        gauges = {
            "slots": batcher.slots,
            "slots_active": batcher.active,
            "queue_length": len(batcher.waiting),
            "queue_limit": batcher.queue,
        }
        for name, value in gauges.items():
            lines += [f"# TYPE hola_{name} gauge", f"hola_{name} {value}"]
        return "\n".join(lines) + "\n"


async def _gone(http: HttpRequest) -> None:
    """Returns when the client has."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def application(service: Service) -> Starlette:
    """The ASGI application; the batcher is closed with it."""

    async def completions(http: HttpRequest) -> Response:
        return await service.complete(http, chat=False)

    async def chat(http: HttpRequest) -> Response:
        return await service.complete(http, chat=True)

    async def models(http: HttpRequest) -> Response:
        service.authorise(http)
        return JSONResponse({"object": "list", "data": service.models()})

    async def model(http: HttpRequest) -> Response:
        service.authorise(http)
        name = http.path_params["name"]
        if name != service.model:
            raise Refused(404, f"the model {name!r} is not served here; {service.model!r} is", "model_not_found")
        return JSONResponse(service.models()[0])

    async def health(http: HttpRequest) -> Response:
        alive = service.batcher.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def metrics(http: HttpRequest) -> Response:
        service.authorise(http)
        return PlainTextResponse(service.metrics(), media_type="text/plain; version=0.0.4")

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.batcher.close)

    async def refused(_: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, Refused)
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        if error.status in (408, 413):
            headers["Connection"] = "close"  # what is left of the body is not read
        return JSONResponse(error.body(), error.status, headers)

    async def no_route(_: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse(Refused(error.status_code, error.detail).body(), error.status_code, error.headers)

    async def client_gone(_: HttpRequest, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    async def failed(_: HttpRequest, error: Exception) -> Response:
        return JSONResponse(Refused(500, "the server failed; its log tells why").body(), 500)

    handlers: dict[Any, Callable[..., Any]] = {
        Refused: refused,
        HTTPException: no_route,
        ClientDisconnect: client_gone,
        Exception: failed,
    }
    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
