"""Requests run by hand, for tests that do something to them on the way; and what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from vllm_kvmarket import Market

PRICE_NANO = 500  # a reused token, on the default tariff


class Requests:
    """Greedy requests on an offline engine, under ids of the caller's choice.

    The engine's process runs by itself; a step here only takes in what it has done.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._tokens: dict[str, int] = {}
        self._answers: dict[str, list[Any]] = {}

    def start(
        self, name: str, prompt: Sequence[int], params: dict[str, Any] | None, **sampling: Any
    ) -> None:
        """Send a request; `sampling` are attributes of SamplingParams."""
        chosen = self._llm.get_default_sampling_params()
        chosen.temperature, chosen.max_tokens = 0.0, 4
        for field, value in sampling.items():
            assert hasattr(chosen, field), field
            setattr(chosen, field, value)
        if "max_tokens" in sampling:
            chosen.min_tokens = sampling["max_tokens"]
        chosen.extra_args = params
        self._llm.llm_engine.add_request(name, {"prompt_token_ids": list(prompt)}, chosen)

    def abort(self, name: str) -> None:
        """Abort every request of that id, as vLLM's server does when a client leaves."""
        self._llm.llm_engine.abort_request([name])

    def until_tokens(self, name: str, count: int = 1, timeout_s: float = 60.0) -> None:
        """Step until a request has given so many tokens."""
        deadline = time.monotonic() + timeout_s
        while self._tokens.get(name, 0) < count:
            assert time.monotonic() < deadline, f"{name} gave no {count} tokens"
            self._step()

    def finish(self) -> dict[str, list[Any]]:
        """Step until all have ended; each id's final outputs, in the order of their ends."""
        while self._llm.llm_engine.has_unfinished_requests():
            self._step()
        return self._answers

    def _step(self) -> None:
        for output in self._llm.llm_engine.step():
            count = sum(len(each.token_ids) for each in output.outputs)
            self._tokens[output.request_id] = max(self._tokens.get(output.request_id, 0), count)
            if output.finished:
                self._answers.setdefault(output.request_id, []).append(output)


def sold(output: Any) -> dict[str, Any]:
    """The market's part of an answer."""
    return dict((output.kv_transfer_params or {}).get("kvmarket") or {})


def wait_until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    """Wait, because an engine's threads write a moment later."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)


def spent(market: Market, account: str = "alice") -> int:
    """Nano-units booked to an account, once nothing is reserved; the books must be right."""
    wait_until(lambda: market.ledger.account(account).debits_pending == 0)
    assert market.ledger.check_integrity() == []
    return market.ledger.account(account).debits_posted


class Bill:
    """An account's payments and receipts since it was made."""

    def __init__(self, market: Market, account: str = "alice") -> None:
        self._market = market
        self._account = account
        self._spent = spent(market, account)
        self._receipts = len(market.receipts(account))

    def tokens(self) -> int:
        """Tokens paid for, at the default tariff's price."""
        nano = spent(self._market, self._account) - self._spent
        assert nano % PRICE_NANO == 0
        return nano // PRICE_NANO

    def receipts(self) -> list[Any]:
        """The receipts, the oldest first."""
        spent(self._market, self._account)
        found = self._market.receipts(self._account)
        return list(reversed(found[: len(found) - self._receipts]))
