"""Text as it comes: whole characters, nothing of a stop string, and in sum what decoding at once gives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hola_jax.inference.text import TextStream
from train.data.tokenizers import Bytes, Json, train_bpe

TEXT = "naïve café, 日本語 🙂 end"


def streamed(data: bytes, stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(Bytes(), stop)
    parts = []
    for byte in data:
        parts.append(stream.take(byte))
        if stream.stopped:
            return parts
    return [*parts, stream.finish()]


def test_characters_are_shown_whole() -> None:
    parts = streamed(TEXT.encode())
    assert "".join(parts) == TEXT and not any("\ufffd" in part for part in parts)
    assert max(map(len, parts)) == 1  # and at once


@given(st.binary(max_size=60).filter(lambda data: 255 not in data))
@settings(max_examples=200, deadline=None)
def test_any_bytes_sum_up_to_what_decoding_at_once_gives(data: bytes) -> None:
    assert "".join(streamed(data)) == data.decode(errors="replace")


def test_many_broken_bytes_do_not_hold_the_text_for_ever() -> None:
    parts = streamed(b"\x80" * 100)
    assert "".join(parts) == "\ufffd" * 100 and "".join(parts[:60])


@pytest.mark.parametrize("stop", ["end", "日本", " 🙂", "é,", "n", "a"])
def test_a_stop_string_is_never_shown(stop: str) -> None:
    parts = streamed(TEXT.encode(), (stop, "\x01"))
    shown = TEXT[: TEXT.find(stop)]
    assert "".join(parts) == shown
    for at in range(len(parts)):
        assert shown.startswith("".join(parts[:at]))  # not for a moment


def test_what_only_begins_a_stop_string_is_shown_in_the_end() -> None:
    assert "".join(streamed(b"a STO", ("STOP",))) == "a STO"
    assert "".join(streamed(b"a STO STOP b", ("STOP",))) == "a STO "
    assert "".join(streamed(b"aabaac", ("aabaad",))) == "aabaac"
    assert "".join(streamed(b"xab", ("abc", "b"))) == "xa"  # the shorter is complete first


def test_a_bpe_of_bytes_streams_alike() -> None:
    tokenizer = Json(train_bpe([TEXT * 3, "the end of the end"], 300), "bpe")
    tokens = tokenizer.encode([TEXT])[0].tolist()
    stream = TextStream(tokenizer, (), tokenizer.encode(["before"])[0].tolist())
    assert "".join([*map(stream.take, tokens), stream.finish()]) == TEXT


def test_a_first_word_keeps_its_space() -> None:
    """As sentencepiece strips it from the first token that it decodes."""

    class Strips:
        vocab_size, eos = 3, 2

        def encode(self, texts: list[str]) -> list:
            raise NotImplementedError

        def decode(self, tokens) -> str:  # type: ignore[no-untyped-def]
            return "".join(["\u2581one", "\u2581two"][token] for token in tokens).replace("\u2581", " ").lstrip()

    stream = TextStream(Strips(), (), [0, 1])
    assert stream.take(1) + stream.take(0) + stream.finish() == " two one"
