"""Asking an offline engine one question and looking at the clock, for demo and benchmarks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# vLLM's processes spin for about a second after each step; a measurement must let them rest.
REST_S = 1.3

_ids = itertools.count()


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: greedy tokens with their log-probabilities, and when.

    `ttft_s` is the time to the first token, seen from the process that asks. `market` is the
    connector's object, empty where there is none. `cached_tokens` of the prompt were not computed,
    wherever they came from.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ttft_s: float
    total_s: float
    cached_tokens: int = 0
    market: dict[str, Any] = field(default_factory=dict)

    def equal_tokens(self, other: Answer) -> int:
        """How many leading tokens two answers share."""
        pairs = zip(self.token_ids, other.token_ids, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def logprob_difference(self, other: Answer) -> float:
        """The largest absolute difference of two answers' log-probabilities, over shared tokens."""
        shared = self.equal_tokens(other)
        pairs = zip(self.logprobs[:shared], other.logprobs[:shared], strict=True)
        return max((abs(a - b) for a, b in pairs), default=0.0)


def ask(
    llm: Any,
    token_ids: Sequence[int],
    params: dict[str, Any] | None = None,
    max_tokens: int = 24,
    rest_s: float = REST_S,
) -> Answer:
    """Run one greedy request alone on `llm` and time it. `params` are Market.params()."""
    time.sleep(rest_s)
    sampling = llm.get_default_sampling_params()
    sampling.temperature, sampling.max_tokens, sampling.min_tokens = 0.0, max_tokens, max_tokens
    sampling.logprobs = 0
    sampling.extra_args = params
    engine = llm.llm_engine
    started = time.perf_counter()
    first = 0.0
    engine.add_request(f"ask-{next(_ids)}", {"prompt_token_ids": list(token_ids)}, sampling)
    output: Any = None
    while engine.has_unfinished_requests():
        for output in engine.step():
            if not first and output.outputs[0].token_ids:
                first = time.perf_counter() - started
    total = time.perf_counter() - started
    (best,) = output.outputs
    return Answer(
        token_ids=tuple(best.token_ids),
        logprobs=tuple(
            step[token].logprob
            for token, step in zip(best.token_ids, best.logprobs or (), strict=True)
        ),
        ttft_s=first,
        total_s=total,
        cached_tokens=output.num_cached_tokens or 0,
        market=dict((output.kv_transfer_params or {}).get("kvmarket") or {}),
    )


def empty_prefix_cache(llm: Any, timeout_s: float = 30.0) -> None:
    """Empty vLLM's prefix cache; it refuses while saves hold blocks, so try again until it does.

    Raises TimeoutError.
    """
    deadline = time.monotonic() + timeout_s
    while not llm.reset_prefix_cache():
        if time.monotonic() > deadline:
            raise TimeoutError("vLLM's prefix cache could not be emptied")
        time.sleep(0.05)
