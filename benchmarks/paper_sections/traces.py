"""Answers with the most probable tokens of every step, and how two of them differ."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

TOP = 20  # vLLM's own limit of log-probabilities a step
NEW_TOKENS = 24

_ids = itertools.count()


@dataclass(frozen=True, slots=True)
class Trace:
    """A greedy answer: its tokens, and at each step the log-probabilities of the likeliest ones.

    `cached_tokens` is what vLLM says that it did not compute; `market` is the connector's object.
    """

    token_ids: tuple[int, ...]
    steps: tuple[dict[int, float], ...]
    cached_tokens: int = 0
    market: dict[str, Any] = field(default_factory=dict)

    @property
    def mean_logprob(self) -> float:
        """The mean log-probability of the tokens."""
        found = [step[token] for token, step in zip(self.token_ids, self.steps, strict=True)]
        return sum(found) / len(found)


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where two greedy answers part: the step, both tokens, and how near they were.

    `gap` is how much likelier the first answer found its own token than the other's; None when the
    other's was not among the likeliest.
    """

    step: int
    tokens: tuple[int, int]
    gap: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a second answer differs from a first.

    `equal` leading tokens; `difference` is the largest of any log-probability that both list, up to
    and with the step where they part (until then both have seen the same tokens). `is_identical`:
    not one bit differs in any of them.
    """

    equal: int
    difference: float
    is_identical: bool
    divergence: Divergence | None = None


def trace(llm: Any, tokens: Sequence[int], params: dict[str, Any] | None = None) -> Trace:
    """Run one greedy request alone on `llm`; `params` are Market.params()."""
    sampling = llm.get_default_sampling_params()
    sampling.temperature, sampling.logprobs, sampling.extra_args = 0.0, TOP, params
    sampling.max_tokens = sampling.min_tokens = NEW_TOKENS
    sampling.detokenize = False  # which takes longer than a tiny model's step
    engine = llm.llm_engine
    engine.add_request(f"trace-{next(_ids)}", {"prompt_token_ids": list(tokens)}, sampling)
    outputs: list[Any] = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    output = outputs[-1]
    (best,) = output.outputs
    return Trace(
        token_ids=tuple(best.token_ids),
        steps=tuple(
            {token: found.logprob for token, found in step.items()} for step in best.logprobs
        ),
        cached_tokens=output.num_cached_tokens or 0,
        market=dict((output.kv_transfer_params or {}).get("kvmarket") or {}),
    )


def compare(first: Trace, second: Trace) -> Comparison:
    """Compare two answers to the same prompt."""
    pairs = list(zip(first.token_ids, second.token_ids, strict=True))
    equal = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    difference = max(
        abs(a[token] - b[token])
        for a, b in itertools.islice(zip(first.steps, second.steps, strict=True), equal + 1)
        for token in a.keys() & b.keys()
    )
    divergence = None
    if equal < len(pairs):
        own, other = pairs[equal]
        step = first.steps[equal]
        gap = step[own] - step[other] if other in step else None
        divergence = Divergence(equal, (own, other), gap)
    identical = divergence is None and first.steps == second.steps
    return Comparison(equal, difference, identical, divergence)


def is_explained(divergence: Divergence, noise: float) -> bool:
    """Whether float noise can have turned the choice over.

    Each of the two log-probabilities can move by the noise, towards each other: a gap of up to
    twice the noise may close. `noise` must come from elsewhere than the two answers compared.
    """
    return divergence.gap is not None and divergence.gap <= 2 * noise
