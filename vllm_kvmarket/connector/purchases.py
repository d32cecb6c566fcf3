"""Which requests share one purchase, and when it is closed.

Only the samples of one request (n > 1) share one. A client that wants to repeat a request without
paying twice sends a key with it; the ledger then knows the purchase, on whichever engine it is.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from blake3 import blake3

from vllm_kvmarket.catalogue import Match, Use
from vllm_kvmarket.connector.scheduler_metrics import SchedulerMetrics
from vllm_kvmarket.core.model_identity import pack_tokens
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.market.purchase import Purchase, PurchaseState, ReuseItem, Usage
from vllm_kvmarket.market.quote import quote_of

if TYPE_CHECKING:
    from vllm.v1.request import Request

_CHILD = re.compile(r"\d+_(.+)")
# vLLM's id of one of a completion's prompts.
_NUMBERED = re.compile(r"cmpl-.*-(\d+)", re.DOTALL)
_RANDOM_SUFFIX = re.compile(r"-[0-9a-f]{8}$")


def purchase_group(request_id: str) -> str:
    """The common part ID of the samples `0_ID`, `1_ID`, ... of a request with n > 1.

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


def prompt_number(request_id: str) -> int | None:
    """Which of a completion's prompts a request of vLLM's is, counted from 0; None for others."""
    numbered = _NUMBERED.fullmatch(client_request_id(request_id, is_sample=True))
    return int(numbered.group(1)) if numbered else None


def shared_key(purchase_key: str, account: str, request_id: str, prompt: Sequence[int]) -> str:
    """The key of a purchase that a client may repeat: the same on every engine, also after a price
    has changed.

    One HTTP request may have several prompts, also equal ones, each with its number in its id.
    """
    parts = (purchase_key, account, prompt_number(request_id))
    digest = blake3(repr(parts).encode())
    digest.update(pack_tokens(prompt))
    return f"key:{digest.hexdigest(16)}"


@dataclass(frozen=True, slots=True)
class Charge:
    """The purchase as an answer shows it; the receipt is booked when the last sample ends."""

    receipt_id: str
    charge_nano: int


@dataclass(slots=True)
class Countable:
    """How many tokens of a match the samples of one request may pay for.

    What they find in the paged cache behind `end` is their own work: one of them was admitted with
    no more, or computed what it could not load. None before the first is admitted.
    """

    end: int | None = None

    def lower(self, end: int) -> None:
        """One of the samples computes what lies behind `end`; mutates."""
        self.end = end if self.end is None else min(self.end, end)


@dataclass(slots=True)
class _Group:
    """The samples of one request, which share a purchase."""

    # Of the first one's arrival: vLLM changes that of a session whose input goes on.
    samples: tuple[str, float]
    purchase: Purchase
    item: ReuseItem
    prompt: list[int]
    # A client may repeat a purchase with a key: if it leaves before an answer, the hold stays for
    # the repetition until it expires, which another request under way may be using.
    may_be_repeated: bool
    countable: Countable = field(default_factory=Countable)
    members: set[str] = field(default_factory=set)
    # Of all answers the one that reused most, with the output of all.
    usage: Usage | None = None

    def count(self, usage: Usage) -> None:
        """Add an answer; mutates."""
        if self.usage is None:
            self.usage = usage
            return
        most = max(self.usage, usage, key=lambda each: (each.reused, each.failed))
        self.usage = replace(most, output=self.usage.output + usage.output)

    def charge(self) -> Charge | None:
        """The charge so far."""
        purchase, usage = self.purchase, self.usage
        if usage is None or not usage.reused:
            return None
        if purchase.state() is PurchaseState.PAID:
            return Charge(purchase.receipt_id, 0)
        if purchase.state() is PurchaseState.SETTLED:
            return Charge(purchase.receipt_id, purchase.charge_nano)
        quote = quote_of(self.item.match, self.item.tariff, usage.reused)
        return Charge(purchase.receipt_id, quote.charge_nano)


class Purchases:
    """Every purchase under way on one engine; used by the scheduler's thread only."""

    def __init__(
        self, market: Market, engine_id: str, model: str, metrics: SchedulerMetrics | None = None
    ) -> None:
        self._market = market
        self._metrics = metrics or SchedulerMetrics(market)
        self._engine_id = engine_id
        self._model = model
        self._by_request: dict[str, _Group] = {}
        # Samples of one request have the same id behind their number and arrived in the same
        # instant; a client may choose the id, even `1_foo`, but not the instant.
        self._by_samples: dict[tuple[str, float], _Group] = {}

    def join(
        self,
        request: Request,
        account: str,
        match: Match,
        purchase_key: str | None = None,
        *,
        may_go_ahead: bool = False,
    ) -> tuple[Purchase, Match, Countable]:
        """The purchase that this request's reuse of `match` is part of, the match that the request
        may reuse, as the catalogue may have changed between two samples, and what all samples of
        the request may pay for.

        Starts to reserve a new purchase. Every join is followed by a leave. Mutates.
        """
        samples = (purchase_group(request.request_id), request.arrival_time)
        group = self._by_samples.get(samples)
        prompt = request.prompt_token_ids
        assert prompt is not None
        if group is not None and (group.purchase.account, group.prompt) == (account, prompt):
            group.item.request_id = client_request_id(request.request_id, is_sample=True)
        else:
            name = client_request_id(request.request_id)
            item = ReuseItem(match, self._market.config.tariff, self._model, name, len(prompt) - 1)
            key = ledger_key(self._engine_id, *samples)
            if purchase_key is not None:
                key = shared_key(purchase_key, account, request.request_id, prompt)
            repeated = purchase_key is not None
            purchase = self._market.reserve(
                item, key=key, account=account, shared=repeated, may_go_ahead=may_go_ahead
            )
            group = _Group(samples, purchase, item, prompt, repeated)
            self._by_samples[samples] = group
        group.members.add(request.request_id)
        self._by_request[request.request_id] = group
        return group.purchase, group.item.match, group.countable

    def leave(self, request: Request, usage: Usage | None) -> Charge | None:
        """Note that a request has ended, with what its answer used, or None where no answer came;
        the last one closes the purchase. Returns what is charged so far. Mutates.
        """
        group = self._by_request.pop(request.request_id)
        group.members.discard(request.request_id)
        if usage is not None:
            group.count(usage)
        if not group.members:
            if self._by_samples.get(group.samples) is group:
                del self._by_samples[group.samples]
            self._close(group)
        return group.charge()

    def held(self) -> list[str]:
        """The reservations of requests under way, which must not expire."""
        under_way = {id(group): group.purchase for group in self._by_request.values()}
        return [purchase.reservation_id for purchase in under_way.values() if purchase.has_hold]

    def close(self) -> None:
        """Settle what has been answered and release the rest: the engine ends."""
        for group in {id(group): group for group in self._by_request.values()}.values():
            self._close(group)
        self._by_request.clear()
        self._by_samples.clear()

    def _close(self, group: _Group) -> None:
        purchase, usage = group.purchase, group.usage
        is_reserved = purchase.state() is PurchaseState.RESERVED
        if is_reserved and usage is not None and usage.reused:
            purchase.settle(usage)
            self._metrics.bought(purchase)
            for line in purchase.receipt.lines if purchase.receipt else ():
                use = Use(line.document_id, line.end - line.start, line.charge_nano, time.time())
                self._market.note_use(use)
        elif usage is not None or not group.may_be_repeated:
            purchase.void()
