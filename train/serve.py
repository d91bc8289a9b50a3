"""`hola serve`: a model behind OpenAI's completions and chat completions."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path

from train.generate import Options, opened

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclasses.dataclass(frozen=True)
class Serve(Options):
    """Serve a model to OpenAI's clients: `hola serve FOLDER`, then base_url=http://127.0.0.1:8000/v1.

    POST /v1/completions and /v1/chat/completions (stream or not), GET /v1/models, /health, /metrics. Needs the extra:
    pip install 'hola-jax[serve]'.
    """

    host: str = "127.0.0.1"
    """Loopback unless told otherwise."""
    port: int = 8000
    """Of that host."""
    name: str | None = None
    """What requests call the model; unless given, the name of the folder."""
    slots: int = 8
    """Requests written side by side, each in one memory of constant size."""
    queue: int = 64
    """Requests that may wait; more are told to come again (429)."""
    api_key_file: str | None = None
    """A file with the key that clients must send; unless given, none is asked for."""
    max_prompt_tokens: int = 131_072
    """Of a request."""
    max_tokens: int = 4096
    """Of an answer."""
    max_body: int = 8 << 20
    """Bytes of a request."""
    chat_turn: str = "{role}: {content}\\n"
    """How a message becomes text; \\n is a new line."""
    chat_reply: str = "assistant:"
    """What stands before the answer."""
    chat_stop: tuple[str, ...] = ("\\nuser:",)
    """Where the answer ends."""
    log_prompts: bool = False
    """Write prompts to the log."""

    def run(self) -> None:
        try:
            import uvicorn

            from hola_jax.inference.server import Service, application
        except ImportError as error:
            raise ImportError(
                f"hola serve needs {error.name}: pip install 'hola-jax[serve]'", name=error.name
            ) from error
        from hola_jax.inference.batcher import Batcher
        from hola_jax.inference.protocol import ChatFormat, Limits

        if not 0 < self.port < 2**16:
            raise ValueError(f"--port is {self.port}; it must be from 1 to {2**16 - 1}")
        key = None if self.api_key_file is None else Path(self.api_key_file).read_text().strip()
        if key == "":
            raise ValueError(f"{self.api_key_file} is empty; it must hold the API key")
        if self.host not in LOOPBACK and key is None:
            print(f"hola: serving on {self.host} without an API key; anyone who reaches it may use it", file=sys.stderr)
        turn, reply, *stop = (_lines(text) for text in (self.chat_turn, self.chat_reply, *self.chat_stop))
        chat = ChatFormat(turn, reply, tuple(stop))
        limits = Limits(self.max_prompt_tokens, self.max_tokens, body_bytes=self.max_body)
        generator = opened(self)
        batcher = Batcher(generator, self.slots, self.queue)
        batcher.warm_up()
        name = self.name or Path(self.folder).resolve().name
        service = Service(batcher, name, limits, chat, key, self.log_prompts)
        logging.basicConfig(level=logging.INFO if self.log_prompts else logging.WARNING)
        print(f"hola: serving {service.model} on http://{self.host}:{self.port}/v1", file=sys.stderr)
        uvicorn.run(
            application(service), host=self.host, port=self.port, log_level="warning", timeout_graceful_shutdown=10
        )


def _lines(text: str) -> str:
    return text.replace("\\n", "\n")
