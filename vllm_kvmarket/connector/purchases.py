"""Which requests share one purchase, and when it is closed.

The samples of a request share one, and so does its retry: the same account asking the same prompt
under the same request id once more.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from blake3 import blake3

from vllm_kvmarket.catalogue import Match, Use
from vllm_kvmarket.connector.request_state import client_request_id, ledger_key, purchase_group
from vllm_kvmarket.connector.scheduler_metrics import SchedulerMetrics
from vllm_kvmarket.core.model_identity import pack_tokens
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.market.purchase import Purchase, PurchaseState, Usage

if TYPE_CHECKING:
    from vllm.v1.request import Request

MAX_REMEMBERED = 4096

# Samples of one request have the same id behind their number and arrived in the same instant; a
# client may choose the id, even `1_foo`, but not the instant.
_Samples = tuple[str, float]
# Account, the client's request id, digest of the prompt, and what of it is on offer.
_Retry = tuple[str, str, bytes, str, int]


@dataclass(frozen=True, slots=True)
class Charge:
    """What an answer says of its purchase; the receipt is booked when the last sample ends."""

    receipt_id: str
    charge_nano: int


@dataclass(slots=True)
class _Shared:
    """A purchase and the requests under way on it."""

    purchase: Purchase
    retry: _Retry
    opened_s: float
    first: _Samples
    samples: list[_Samples] = field(default_factory=list)
    members: set[str] = field(default_factory=set)
    # Of all answers the one that reused least, with the tokens of all: what one sample had to
    # compute, and the others then found in the paged cache, was not bought.
    usage: Usage | None = None

    def count(self, usage: Usage) -> None:
        """Add an answer; mutates."""
        if self.usage is None:
            self.usage = usage
            return
        least = min(self.usage, usage, key=lambda each: each.reused)
        self.usage = replace(least, output=self.usage.output + usage.output)

    def charge(self) -> Charge | None:
        """What is charged as of now."""
        purchase = self.purchase
        if purchase.receipt is not None:
            return Charge(purchase.receipt.id, purchase.receipt.charge_nano)
        if self.is_payable():
            assert self.usage is not None
            return Charge(purchase.receipt_id, purchase.terms.charge_nano(self.usage.reused))
        return None

    def is_payable(self) -> bool:
        """Whether something was reused for an answer, and is reserved."""
        return (
            self.usage is not None
            and self.usage.reused > 0
            and self.purchase.state() is PurchaseState.RESERVED
        )


class Purchases:
    """Every purchase of one engine; used by the scheduler's thread only.

    A retry is known for as long as a reservation lives. It is not paid for again, and no more of
    it is given away than with `n` samples, which cost one charge too.
    """

    def __init__(
        self,
        market: Market,
        engine_id: str,
        model: str,
        clock: Callable[[], float] = time.monotonic,
        metrics: SchedulerMetrics | None = None,
    ) -> None:
        self._market = market
        self._metrics = metrics or SchedulerMetrics(market)
        self._engine_id = engine_id
        self._model = model
        self._clock = clock
        self._by_request: dict[str, _Shared] = {}
        self._by_samples: dict[_Samples, _Shared] = {}
        self._recent: OrderedDict[_Retry, _Shared] = OrderedDict()

    def join(self, request: Request, account: str, match: Match) -> Purchase:
        """The purchase that this request's reuse of `match` is part of; starts to reserve it when
        it is new. What the request may reuse is the purchase's match: the catalogue may have
        changed between two samples. Every join is followed by a leave. Mutates.
        """
        samples = (purchase_group(request.request_id), request.arrival_time)
        shared = self._by_samples.get(samples)
        if shared is not None and shared.purchase.account == account and _stands(shared):
            if samples == shared.first:
                shared.purchase.request_id = client_request_id(request.request_id, is_sample=True)
        else:
            shared = self._retried_or_new(request, samples, account, match)
            shared.samples.append(samples)
            self._by_samples[samples] = shared
        shared.members.add(request.request_id)
        self._by_request[request.request_id] = shared
        return shared.purchase

    def _retried_or_new(
        self, request: Request, samples: _Samples, account: str, match: Match
    ) -> _Shared:
        self._forget_old()
        name = client_request_id(request.request_id)
        assert request.prompt_token_ids is not None
        prompt = blake3(pack_tokens(request.prompt_token_ids)).digest()
        retry = (account, name, prompt, match.listing.document_id, match.token_count)
        shared = self._recent.get(retry)
        if shared is not None and _stands(shared):
            if shared.purchase.state() is not PurchaseState.REFUSED:
                return shared
            self._forget(shared)  # there may be funds now
        purchase = self._market.reserve(
            key=ledger_key(self._engine_id, *samples),
            request_id=name,
            account=account,
            match=match,
            model=self._model,
        )
        shared = _Shared(purchase, retry, self._clock(), samples)
        self._recent[retry] = shared
        return shared

    def leave(self, request_id: str, usage: Usage | None) -> Charge | None:
        """Note that a request has ended, with what its answer used, or None where no answer came;
        the last one closes the purchase. Returns what is charged so far. Mutates.
        """
        shared = self._by_request.pop(request_id)
        shared.members.discard(request_id)
        if usage is not None:
            shared.count(usage)
        if not shared.members:
            self._close(shared)
        return shared.charge()

    def held(self) -> list[str]:
        """The reservations of requests under way, which must not expire."""
        under_way = {id(shared): shared.purchase for shared in self._by_request.values()}
        return [
            purchase.reservation_id
            for purchase in under_way.values()
            if purchase.state() is PurchaseState.RESERVED
        ]

    def close(self) -> None:
        """Settle what has been answered and release the rest: the engine ends."""
        for request_id in list(self._by_request):
            self.leave(request_id, None)

    def _close(self, shared: _Shared) -> None:
        purchase = shared.purchase
        if purchase.receipt is not None:
            return
        if shared.is_payable():
            assert shared.usage is not None
            receipt = purchase.settle(shared.usage)
            assert purchase.settled is not None
            self._metrics.sold(receipt, purchase.settled)
            self._market.note_use(
                Use(receipt.document_id, receipt.tokens_reused, receipt.charge_nano, time.time())
            )
            return
        purchase.void()
        self._forget(shared)

    def _forget_old(self) -> None:
        oldest_s = self._clock() - self._market.config.reservation_timeout_s
        while self._recent:
            shared = next(iter(self._recent.values()))
            if shared.opened_s >= oldest_s and len(self._recent) < MAX_REMEMBERED:
                break
            self._forget(shared)

    def _forget(self, shared: _Shared) -> None:
        if self._recent.get(shared.retry) is shared:
            del self._recent[shared.retry]
        for samples in shared.samples:
            if self._by_samples.get(samples) is shared:
                del self._by_samples[samples]


def _stands(shared: _Shared) -> bool:
    return shared.purchase.state() is not PurchaseState.VOIDED
