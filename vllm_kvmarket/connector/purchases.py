"""Which requests share one purchase, and when it is closed.

The samples of a request share one, and so does its retry: the same account asking the same prompt
under the same request id once more.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from blake3 import blake3

from vllm_kvmarket.catalogue import Match, Use
from vllm_kvmarket.connector.scheduler_metrics import SchedulerMetrics
from vllm_kvmarket.core.model_identity import pack_tokens
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.market.purchase import Purchase, PurchaseState, ReuseItem, Usage

if TYPE_CHECKING:
    from vllm.v1.request import Request

MAX_REMEMBERED = 4096

_CHILD = re.compile(r"\d+_(.+)")
_RANDOM_SUFFIX = re.compile(r"-[0-9a-f]{8}$")

# Samples of one request have the same id behind their number and arrived in the same instant; a
# client may choose the id, even `1_foo`, but not the instant.
_Samples = tuple[str, float]
# Account, the client's request id, digest of the prompt, and what of it is on offer.
_Retry = tuple[str, str, bytes, str, int]


def purchase_group(request_id: str) -> str:
    """What the samples `0_ID`, `1_ID`, ... of a request with n > 1 have in common: ID.

    A client may choose an id that looks the same; see Purchases.
    """
    child = _CHILD.fullmatch(request_id)
    return child.group(1) if child else request_id


def client_request_id(request_id: str, *, is_sample: bool = False) -> str:
    """The id that the client knows: vLLM appends eight random digits to it, and puts a number in
    front of each of several samples.
    """
    return _RANDOM_SUFFIX.sub("", purchase_group(request_id) if is_sample else request_id)


def ledger_key(engine_id: str, request_id: str, arrival_time: float) -> str:
    """A key of fixed length for one request's transfers.

    It contains no id that a client chose, and a second request of the same id has another key.
    """
    digest = blake3(f"{arrival_time!r} {request_id}".encode()).hexdigest(16)
    return f"{engine_id}:{digest}"


@dataclass(frozen=True, slots=True)
class Charge:
    """What an answer says of its purchase; the receipt is booked when the last sample ends."""

    receipt_id: str
    charge_nano: int


@dataclass(slots=True)
class _Group:
    """The requests that share a purchase."""

    purchase: Purchase
    item: ReuseItem
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
            return Charge(purchase.receipt_id, self.item.terms.charge_nano(self.usage.reused))
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
        self._by_request: dict[str, _Group] = {}
        self._by_samples: dict[_Samples, _Group] = {}
        self._recent: OrderedDict[_Retry, _Group] = OrderedDict()

    def join(self, request: Request, account: str, match: Match) -> tuple[Purchase, Match]:
        """The purchase that this request's reuse of `match` is part of, and the match that the
        request may reuse: the catalogue may have changed between two samples.

        Starts to reserve a new purchase. Every join is followed by a leave. Mutates.
        """
        samples = (purchase_group(request.request_id), request.arrival_time)
        group = self._by_samples.get(samples)
        if group is not None and group.purchase.account == account and _stands(group):
            if samples == group.first:
                group.item.request_id = client_request_id(request.request_id, is_sample=True)
        else:
            group = self._retried_or_new(request, samples, account, match)
            group.samples.append(samples)
            self._by_samples[samples] = group
        group.members.add(request.request_id)
        self._by_request[request.request_id] = group
        return group.purchase, group.item.match

    def _retried_or_new(
        self, request: Request, samples: _Samples, account: str, match: Match
    ) -> _Group:
        self._forget_old()
        name = client_request_id(request.request_id)
        assert request.prompt_token_ids is not None
        prompt = blake3(pack_tokens(request.prompt_token_ids)).digest()
        retry = (account, name, prompt, match.listing.document_id, match.token_count)
        group = self._recent.get(retry)
        if group is not None and _stands(group):
            if group.purchase.state() is not PurchaseState.REFUSED:
                return group
            self._forget(group)  # there may be funds now
        item = ReuseItem(match, self._market.terms_of(match), self._model, name)
        purchase = self._market.reserve(
            item, key=ledger_key(self._engine_id, *samples), account=account
        )
        group = _Group(purchase, item, retry, self._clock(), samples)
        self._recent[retry] = group
        return group

    def leave(self, request_id: str, usage: Usage | None) -> Charge | None:
        """Note that a request has ended, with what its answer used, or None where no answer came;
        the last one closes the purchase. Returns what is charged so far. Mutates.
        """
        group = self._by_request.pop(request_id)
        group.members.discard(request_id)
        if usage is not None:
            group.count(usage)
        if not group.members:
            self._close(group)
        return group.charge()

    def held(self) -> list[str]:
        """The reservations of requests under way, which must not expire."""
        under_way = {id(group): group.purchase for group in self._by_request.values()}
        return [
            purchase.reservation_id
            for purchase in under_way.values()
            if purchase.state() is PurchaseState.RESERVED
        ]

    def close(self) -> None:
        """Settle what has been answered and release the rest: the engine ends."""
        for request_id in list(self._by_request):
            self.leave(request_id, None)

    def _close(self, group: _Group) -> None:
        purchase = group.purchase
        if purchase.receipt is not None:
            return
        if group.is_payable():
            assert group.usage is not None
            purchase.settle(group.usage)
            self._metrics.bought(purchase)
            use = Use(group.item.document_id, group.usage.reused, purchase.charge_nano, time.time())
            self._market.note_use(use)
            return
        purchase.void()
        self._forget(group)

    def _forget_old(self) -> None:
        oldest_s = self._clock() - self._market.config.reservation_timeout_s
        while self._recent:
            group = next(iter(self._recent.values()))
            if group.opened_s >= oldest_s and len(self._recent) < MAX_REMEMBERED:
                break
            self._forget(group)

    def _forget(self, group: _Group) -> None:
        if self._recent.get(group.retry) is group:
            del self._recent[group.retry]
        for samples in group.samples:
            if self._by_samples.get(samples) is group:
                del self._by_samples[samples]


def _stands(group: _Group) -> bool:
    return group.purchase.state() is not PurchaseState.VOIDED
