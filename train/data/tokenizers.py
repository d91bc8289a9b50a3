"""Text to numbers and back: bytes, any tokenizers JSON, Mistral's first, or a BPE trained here.

A tokenizer's `hash` is a sha256 of everything that decides its numbers; data, checkpoints and models are compared by it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

PIECE = 1024  # characters: a long text is encoded in pieces of about so many where that gives the same tokens, faster
EOS_NAMES = ("<|eos|>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[EOS]")


class Tokenizer(Protocol):
    """What every tokenizer here can do. `encode` adds no special tokens; who packs documents adds `eos` after each."""

    name: str
    hash: str
    vocab_size: int
    eos: int

    def encode(self, texts: list[str]) -> list[np.ndarray]: ...

    def decode(self, tokens: Iterable[int]) -> str: ...


class Bytes:
    """The bytes of UTF-8. The end of a document is 255, which UTF-8 never uses, so 256 numbers are enough."""

    name, vocab_size, eos = "bytes", 256, 255
    hash = hashlib.sha256(b"hola bytes, 255 ends a document").hexdigest()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(token for token in tokens if token != self.eos).decode(errors="replace")


class Json:
    """A tokenizer of the `tokenizers` library, from the bytes of its JSON file."""

    def __init__(self, data: bytes, name: str) -> None:
        from tokenizers import Tokenizer as Library

        try:
            self.library = Library.from_str(data.decode())
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{name} is no tokenizers JSON: {error}") from error
        self.library.no_truncation()  # a file may ask for both, and would cut documents short
        self.library.no_padding()
        self.name, self.data, self.hash = name, data, hashlib.sha256(data).hexdigest()
        self.vocab_size = 1 + max(self.library.get_vocab(with_added_tokens=True).values(), default=-1)
        self.eos = self._eos()
        self.cut = _at_words if _cuts_at_words(json.loads(data)) else _whole

    def _eos(self) -> int:
        found = [token for token in map(self.library.token_to_id, EOS_NAMES) if token is not None]
        if not found:
            raise ValueError(f"{self.name} has no token that ends a document; it needs one of {', '.join(EOS_NAMES)}")
        return found[0]

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        def batch(pieces: list[str]) -> list[list[int]]:
            return [found.ids for found in self.library.encode_batch_fast(pieces, add_special_tokens=False)]

        return _in_pieces(texts, self.cut, batch)

    def decode(self, tokens: Iterable[int]) -> str:
        return self.library.decode([token for token in tokens if token != self.eos], skip_special_tokens=False)


class MistralV1:
    """Mistral's first tokenizer, 32000 pieces, from the data that the package mistral-common brings."""

    name = "mistral-v1"

    def __init__(self) -> None:
        try:
            import mistral_common
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise ImportError(
                f"the tokenizer mistral-v1 needs {error.name}: pip install 'hola-jax[mistral]'", name=error.name
            ) from error
        path = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
        data = path.read_bytes()
        self.library = SentencePieceProcessor(model_proto=data)
        self.hash = hashlib.sha256(data).hexdigest()
        self.vocab_size, self.eos = self.library.vocab_size(), self.library.eos_id()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return _in_pieces(texts, _between_words, lambda pieces: self.library.encode(pieces, num_threads=1))

    def decode(self, tokens: Iterable[int]) -> str:
        return self.library.decode([int(token) for token in tokens if token != self.eos])


def load(name: str) -> Tokenizer:
    """The tokenizer of that name: `bytes`, `mistral-v1`, or the path of a tokenizers JSON."""
    if name == Bytes.name:
        return Bytes()
    if name == MistralV1.name:
        return MistralV1()
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no tokenizer {name!r}: it is neither `bytes` nor `mistral-v1` nor a tokenizers JSON file"
        )
    return Json(path.read_bytes(), path.name)


def named(name: str, data: bytes | None) -> Tokenizer:
    """The tokenizer of that name, or of its JSON where there is one."""
    return load(name) if data is None else Json(data, name)


def train_bpe(texts: Iterable[str], vocab_size: int) -> bytes:
    """The JSON of a byte-level BPE learnt from the texts; the same texts give the same bytes."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    least = 257  # every byte, and the end of a document
    if vocab_size < least:
        raise ValueError(f"--train-tokenizer is {vocab_size}; a byte-level vocabulary has at least {least} entries")
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_NAMES[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    library.train_from_iterator(texts, trainer)
    return library.to_str().encode()


def one_thread() -> None:
    """Keeps the `tokenizers` library to one thread in this process: where a process per core tokenises already."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _in_pieces(
    texts: list[str], cut: Callable[[str], Iterator[str]], encode: Callable[[list[str]], list[list[int]]]
) -> list[np.ndarray]:
    """Each text's tokens, all texts encoded in one call and in the pieces that `cut` makes of them."""
    pieces = [list(cut(text)) for text in texts]
    found = iter(encode([piece for text in pieces for piece in text]))
    return [
        np.concatenate([np.asarray(next(found), np.int32) for _ in text] or [np.zeros(0, np.int32)]) for text in pieces
    ]


def _cuts_at_words(config: dict[str, Any]) -> bool:
    """Whether a space after a letter always begins a word: GPT-2's pattern says so, another file's may not."""
    before = config.get("pre_tokenizer") or {}
    plain = before.get("type") == "ByteLevel" and before.get("use_regex", True) and not before.get("add_prefix_space")
    specials = [token["content"] for token in config.get("added_tokens") or []]
    return bool(plain) and not config.get("normalizer") and not any(" " in special for special in specials)


def _whole(text: str) -> Iterator[str]:
    if text:
        yield text


def _at_words(text: str) -> Iterator[str]:
    """Pieces that begin with a space after a character that is none: joined they are the text."""
    start = 0
    while len(text) - start > PIECE and (space := _space(text, start)):
        yield text[start:space]
        start = space
    yield from _whole(text[start:])


def _between_words(text: str) -> Iterator[str]:
    """The same without the space: sentencepiece puts one before each piece, and no Mistral piece has one inside."""
    for number, piece in enumerate(_at_words(text)):
        yield piece if number == 0 else piece[1:]


def _space(text: str, start: int) -> int | None:
    """The last space within reach that stands behind a character that is no space, or else the first beyond."""
    space = text.rfind(" ", start + 1, start + PIECE)
    while space > start and _blank(text[space - 1]):
        space = text.rfind(" ", start + 1, space)
    if space > start:
        return space
    space = text.find(" ", start + PIECE, len(text) - 1)
    while space > 0 and _blank(text[space - 1]):
        space = text.find(" ", space + 1, len(text) - 1)
    return space if space > 0 else None


def _blank(character: str) -> bool:
    return character.isspace() or character == "\u2581"  # which sentencepiece writes for a space
