"""A model as the lm-eval package (EleutherAI's lm-evaluation-harness) wants one: every task it has, on our Scorer.

adapter = HarnessModel(ModelScorer(model), tokenizer, window=2048)
lm_eval.simple_evaluate(model=adapter, tasks=["wikitext"])

This is the one module here that needs that package: pip install 'hola-jax[lm-eval]'.
"""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise ImportError("this needs the lm-eval package: pip install 'hola-jax[lm-eval]'", name=error.name) from error

from hola_jax.evals.perplexity import log_likelihoods, windows
from hola_jax.evals.scorer import Scorer
from hola_jax.evals.tasks import until_end
from hola_jax.evals.text import Tokenizer

GENERATED = 256  # tokens, where a task names no number


class HarnessModel(TemplateLM):
    """The package's three requests: log-likelihoods, rolling ones, and greedy text until a stop.

    window  tokens that are predicted in a row where a text is longer
    prefix  the token before the first of a text; None is the end of a document
    """

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer, *, window: int, prefix: int | None = None) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window is {window}; it must be at least 1")
        if tokenizer.vocab_size > scorer.vocab_size:
            raise ValueError(
                f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, and the model's vocabulary "
                f"{scorer.vocab_size}; they do not fit"
            )
        self.scorer, self.text, self.window = scorer, tokenizer, window
        self.prefix = tokenizer.eos if prefix is None else prefix

    @property
    def eot_token_id(self) -> int:
        return self.text.eos

    @property
    def prefix_token_id(self) -> int:
        return self.prefix

    @property
    def tokenizer_name(self) -> str:
        return self.text.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        found: list[int] = self.text.encode([string])[0].tolist()
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is the likeliest) of each (text, context, continuation)."""
        rows = [np.array([*(context or [self.prefix]), *rest], np.int32) for _, context, rest in requests]
        empty = [number for number, (_, _, rest) in enumerate(requests) if not rest]
        if empty:
            raise ValueError(f"request {empty[0]} has no tokens to score: {requests[empty[0]][0][1]!r}")
        with _Bar("log-likelihoods", len(rows), disable_tqdm) as done:
            scored = self.scorer.loglikelihood(rows, done)
        found = []
        for (pair, _, rest), each in zip(requests, scored, strict=True):
            counted = slice(-len(rest), None)
            answer = (float(each.logprob[counted].sum(dtype=np.float64)), bool(each.greedy[counted].all()))
            found.append(answer)
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows."""
        encoded = self.text.encode([request.args[0] for request in requests])
        texts = [windows(tokens, self.prefix, self.window) for tokens in encoded]
        with _Bar("windows", sum(len(text.rows) for text in texts), disable_tqdm) as done:
            found = log_likelihoods(self.scorer, texts, done)
        for request, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each context up to its first stop, which is left out."""
        options = [_Options(request.args[1]) for request in requests]
        contexts = self.text.encode([request.args[0] for request in requests])
        prompts = [tokens if len(tokens) else np.array([self.prefix]) for tokens in contexts]
        found = [""] * len(requests)
        with _Bar("generated", len(requests), disable_tqdm) as done:
            for most in sorted({each.most for each in options}):
                numbers = [number for number, each in enumerate(options) if each.most == most]

                def ended(number: int, tokens: np.ndarray, numbers: list[int] = numbers) -> bool:
                    whole = bool((tokens == self.text.eos).any())
                    return whole or any(
                        stop in self.text.decode(tokens.tolist()) for stop in options[numbers[number]].stops
                    )

                generated = self.scorer.greedy([prompts[number] for number in numbers], most, ended, done)
                for number, tokens in zip(numbers, generated, strict=True):
                    found[number] = options[number].cut(until_end(tokens, self.text))
        for request, text in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found


class _Options:
    """What a task says of its generation; sampling is refused."""

    def __init__(self, given: dict[str, Any]) -> None:
        if given.get("do_sample") and given.get("temperature", 1.0) != 0:
            raise NotImplementedError(f"the task asks for samples ({given}), and this adapter generates greedily")
        stops = given.get("until") or []
        self.stops: list[str] = [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop]
        self.most = int(given.get("max_gen_toks") or given.get("max_new_tokens") or GENERATED)

    def cut(self, text: str) -> str:
        return text[: min((text.index(stop) for stop in self.stops if stop in text), default=len(text))]


class _Bar:
    """The package's own progress bar, told how many rows are done."""

    def __init__(self, label: str, total: int, silent: bool) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, desc=label, disable=silent)

    def __enter__(self) -> Any:
        return self.bar.update

    def __exit__(self, *_: object) -> None:
        self.bar.close()
