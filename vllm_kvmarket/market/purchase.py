"""One purchase, from its reservation to its settlement: a request's reuse, or storing a document.

The most that it can cost is reserved first. It ends exactly once: settled for what was really used,
or voided. The ledger's ids derive from the purchase's key, so that a repetition changes nothing:
a request under a key that was paid, on this engine or another, pays nothing more.
"""

from __future__ import annotations

import enum
import logging
import math
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial

from vllm_kvmarket.catalogue import Match
from vllm_kvmarket.core.errors import LedgerBusyError, LedgerPostponedError, LedgerUnavailableError
from vllm_kvmarket.core.pricing import Tariff
from vllm_kvmarket.ledger import (
    OWED,
    PROVIDER,
    Ledger,
    Operation,
    Outcome,
    Receipt,
    ReceiptLine,
    Result,
    pending,
    plain,
    post,
    void,
)
from vllm_kvmarket.market.quote import quote_of

logger = logging.getLogger(__name__)

_REASON_OF_ERROR: dict[type[BaseException], str] = {
    LedgerBusyError: "ledger_busy",
    LedgerUnavailableError: "ledger_unavailable",
}
_RESERVED_BEFORE = (Outcome.EXISTS, Outcome.EXISTS_WITH_DIFFERENT_FIELDS)
# What was earned is booked when the database is back, for as long as this process lives.
NEVER_GIVE_UP_S = math.inf


class PurchaseState(enum.Enum):
    """Where a purchase stands."""

    RESERVING = "reserving"
    RESERVED = "reserved"
    REFUSED = "refused"
    PAID = "paid"  # by an earlier request with the same key: this one is free
    SETTLED = "settled"
    VOIDED = "voided"


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens that a request really used.

    `reused` of the match's `matched` tokens were not computed: `loaded` came from the store and
    `from_paged_cache` lay in vLLM's paged cache. `failed` ones could not be loaded. `computed` are
    all of the prompt but what vLLM found or loaded, which may be more than was reused.
    """

    matched: int
    reused: int
    loaded: int
    from_paged_cache: int
    failed: int
    computed: int
    output: int


NO_USAGE = Usage(0, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Settlement:
    """A purchase's end: the charge, further transfers of the same batch, the receipt."""

    charge_nano: int
    transfers: tuple[Operation, ...] = ()
    receipt: Receipt | None = None


@dataclass(slots=True)
class ReuseItem:
    """The reuse of a match. `request_id` is the buyer's name for the request, for the receipt.

    At most `most_tokens` of the match can be reused: the last token of a prompt is computed.
    """

    match: Match
    tariff: Tariff
    model: str
    request_id: str
    most_tokens: int | None = None
    code = "reuse"
    cannot_pay = ""

    @property
    def document_id(self) -> str:
        """The document that contains the whole match."""
        return self.match.listing.document_id

    @property
    def most_nano(self) -> int:
        """The price of all that can be reused."""
        return quote_of(self.match, self.tariff, self.most_tokens).charge_nano

    def settlement(self, purchase: Purchase, usage: Usage) -> Settlement:
        """The charge for what was reused, a royalty for each publisher's part, and the receipt."""
        quote = quote_of(self.match, self.tariff, usage.reused)
        royalties = tuple(
            plain(
                id=f"{purchase.key}:royalty:{number}",
                debit=PROVIDER,
                credit=line.listing.terms.publisher,
                amount_nano=line.royalty_nano,
                code="royalty",
                user_data=line.listing.document_id,
            )
            for number, line in enumerate(quote.lines)
            if line.royalty_nano
        )
        lines = tuple(
            ReceiptLine(
                document_id=line.listing.document_id,
                title=line.listing.terms.title,
                publisher=line.listing.terms.publisher,
                start=line.start,
                end=line.end,
                cache_read_nano_per_mtok=line.terms.cache_read_nano_per_mtok,
                royalty_ppm=line.terms.royalty_ppm,
                charge_nano=line.charge_nano,
                royalty_nano=line.royalty_nano,
            )
            for line in quote.lines
        )
        listing = quote.lines[-1].listing if quote.lines else self.match.listing
        terms = self.tariff.terms(listing.terms)
        receipt = Receipt(
            id=purchase.receipt_id,
            request_id=self.request_id,
            account=purchase.account,
            document_id=listing.document_id,
            title=listing.terms.title,
            publisher=listing.terms.publisher,
            tokens_matched=usage.matched,
            tokens_reused=usage.reused,
            tokens_loaded=usage.loaded,
            tokens_from_paged_cache=usage.from_paged_cache,
            tokens_failed=usage.failed,
            tokens_computed=usage.computed,
            tokens_output=usage.output,
            input_nano_per_mtok=terms.input_nano_per_mtok,
            cache_read_nano_per_mtok=terms.cache_read_nano_per_mtok,
            royalty_ppm=terms.royalty_ppm,
            charge_nano=quote.charge_nano,
            royalty_nano=quote.royalty_nano,
            recompute_nano=quote.recompute_nano,
            reservation_id=purchase.reservation_id,
            transfer_ids=(f"{purchase.key}:settle", *(each.id for each in royalties)),
            created_at_s=time.time(),
            model=self.model,
            namespace=self.match.listing.namespace.hex(),
            lines=lines,
        )
        return Settlement(quote.charge_nano, royalties, receipt)


@dataclass(frozen=True, slots=True)
class StorageItem:
    """Storing a document, which its publisher pays for when it is listed."""

    publisher: str
    document_id: str
    most_nano: int
    code = "publish"

    @property
    def cannot_pay(self) -> str:
        """The message for a publisher without funds, or without an account."""
        return (
            f"publisher {self.publisher!r} cannot pay {self.most_nano} nano-units "
            "for storing it; make a deposit, then publish again"
        )

    def settlement(self, purchase: Purchase, usage: Usage) -> Settlement:
        """The whole amount; storing has no receipt."""
        return Settlement(self.most_nano)


Item = ReuseItem | StorageItem


class Purchase:
    """A reservation on the way to its settlement; used by one thread."""

    def __init__(
        self,
        ledger: Ledger,
        item: Item,
        *,
        key: str,
        account: str,
        timeout_s: int,
        shared: bool = False,
        may_go_ahead: bool = False,
    ) -> None:
        self._ledger = ledger
        # Whether it counts as reserved before the hold is durable, as funds cover it amply.
        self._is_ahead = False
        self._may_go_ahead = may_go_ahead and not shared
        # Other requests, also on other engines, may reserve under the same key at the same time.
        self._shared = shared
        self.item = item
        # The beginning of the ids of this purchase's transfers.
        self.key = key
        self._attempt = 0
        self._timeout_s = timeout_s
        self.account = account
        # What the settlement comes to.
        self.charge_nano = 0
        self.receipt: Receipt | None = None
        # What the ledger answers to the settlement; see is_booked.
        self.settled: Future[list[Result]] | None = None
        # Why it was refused: for people, and one of the reasons that are counted.
        self.refusal = ""
        self.refusal_reason = ""
        self._state = PurchaseState.RESERVING
        self._reserve()

    def _reserve(self) -> None:
        """Reserve under the key, or under another one where the earlier hold has been released."""
        # A repetition finds the hold of the first request; a renewal then reports its state.
        self._renewal: Future[list[Result]] | None = None
        # The catalogue or a price changed since: another amount was reserved.
        self._is_other_amount = False
        hold = pending(
            id=self.reservation_id,
            debit=self.account,
            credit=PROVIDER,
            amount_nano=self.item.most_nano,
            timeout_s=self._timeout_s,
            code=self.item.code,
            user_data=self.item.document_id,
        )
        ahead = self._ledger.submit_ahead(hold) if self._may_go_ahead else None
        self._is_ahead = self._is_ahead or ahead is not None
        self._reservation = ahead or self._ledger.submit([hold], shared=self._shared)

    @property
    def reservation_id(self) -> str:
        """The pending transfer's id; a hold that was released is followed by another one.

        All other ids stay the same, so that one of several settlements is booked.
        """
        attempt = f":{self._attempt}" if self._attempt else ""
        return f"{self.key}{attempt}:reserve"

    @property
    def receipt_id(self) -> str:
        """The id that a receipt has, or will have."""
        return f"kvr_{self.key}"

    def state(self) -> PurchaseState:
        """Where the purchase stands now; never waits.

        One that goes ahead counts as reserved: if the ledger refuses the hold in the end, what was
        sold is the account's debt.
        """
        if self._state is PurchaseState.RESERVING:
            asked = self._renewal or self._reservation
            if asked.done():
                self._take(asked)
        if self._is_ahead and self._state in (PurchaseState.RESERVING, PurchaseState.REFUSED):
            return PurchaseState.RESERVED
        return self._state

    @property
    def has_hold(self) -> bool:
        """Whether the ledger has reserved the amount, durably."""
        self.state()
        return self._state is PurchaseState.RESERVED

    def wait(self, timeout_s: float) -> None:
        """Wait for the ledger's answer, at most so long."""
        wait([self._renewal or self._reservation], timeout_s)

    def _take(self, asked: Future[list[Result]]) -> None:
        """Take in what the ledger answered to the reservation, or to its renewal."""
        error = asked.exception()
        if error is not None:
            reason = _REASON_OF_ERROR.get(type(error), "ledger_refused")
            self._refuse(reason, f"the ledger could not reserve: {error}")
            return
        result = asked.result()[0]
        cannot_pay = self.item.cannot_pay
        if result.outcome is Outcome.OK and self._is_other_amount:
            self._refuse(
                "ledger_refused", "a request with the same key is under way at other terms"
            )
        elif result.outcome is Outcome.OK:
            self._state = PurchaseState.RESERVED
        elif result.outcome in _RESERVED_BEFORE and self._renewal is None:
            self._is_other_amount = result.outcome is Outcome.EXISTS_WITH_DIFFERENT_FIELDS
            self._renewal = self._ledger.renew([self.reservation_id], self._timeout_s)
        elif result.outcome is Outcome.ALREADY_POSTED:
            self._state = PurchaseState.PAID
        elif result.outcome in (Outcome.ALREADY_VOIDED, Outcome.EXPIRED):
            self._attempt += 1
            self._reserve()
        elif result.outcome is Outcome.EXCEEDS_CREDITS:
            funds = f"account {self.account!r} has not enough funds"
            self._refuse("no_funds", cannot_pay or funds)
        elif result.outcome is Outcome.UNKNOWN_ACCOUNT:
            self._refuse("unknown_account", cannot_pay or f"there is no account {self.account!r}")
        else:
            self._refuse("ledger_refused", f"the ledger refused: {_in_words(result)}")

    def _refuse(self, reason: str, message: str) -> None:
        self._state = PurchaseState.REFUSED
        self.refusal_reason = reason
        self.refusal = message

    def settle(self, usage: Usage = NO_USAGE) -> Receipt | None:
        """Post the charge, pay royalties, store the receipt if there is one; once.

        Returns at once; the ledger makes everything durable in one transaction. A second call
        returns the first call's receipt and charges nothing.
        """
        if self.settled is None:
            assert self.state() is PurchaseState.RESERVED, self._state
            settlement = self.item.settlement(self, usage)
            has_hold = self.has_hold
            charge = self._charge(settlement, has_hold=has_hold)
            self.charge_nano, self.receipt = settlement.charge_nano, settlement.receipt
            self._state = PurchaseState.SETTLED
            self.settled = self._ledger.submit(
                [charge, *settlement.transfers],
                receipt=self.receipt,
                patience_s=NEVER_GIVE_UP_S,
            )
            if not has_hold:
                self._release()  # which may be on its way to the ledger
            stored = f"storing {self.item.document_id}"
            name = f"receipt {self.receipt.id}" if self.receipt else stored
            self.settled.add_done_callback(partial(self._settled, name))
        return self.receipt

    def _charge(self, settlement: Settlement, *, has_hold: bool) -> Operation:
        """Post from the hold; without one, of a purchase that went ahead, a charge that is owed."""
        id, charge_nano = f"{self.key}:settle", settlement.charge_nano
        if has_hold:
            return post(id=id, pending_id=self.reservation_id, amount_nano=charge_nano)
        return plain(
            id=id,
            debit=self.account,
            credit=PROVIDER,
            amount_nano=charge_nano,
            code=OWED,
            user_data=self.item.document_id,
        )

    def _settled(self, name: str, settled: Future[list[Result]]) -> None:
        """Log a settlement that was refused, and release its hold: the answer is out already."""
        error = settled.exception()
        if isinstance(error, LedgerPostponedError):
            logger.warning("kvmarket: %s: %s", name, error)
        booked = is_booked(settled)
        if booked is None and error is None:
            self._release()  # an earlier settlement under this key was booked, on another hold
        if booked is not False:
            return
        reason: object = error
        if error is None:
            # In a linked batch one operation has the reason, and the others fail because of it.
            refused = [each for each in settled.result() if not each.outcome.good]
            refused.sort(key=lambda result: result.outcome is Outcome.LINKED_FAILED)
            reason = _in_words(refused[0])
            self._release()
        logger.error(
            "kvmarket: %s was not booked, %s is not charged: %s", name, self.account, reason
        )

    def void(self) -> None:
        """Release the reservation: nothing was used, or no answer came; once, then nothing."""
        if self._state in (PurchaseState.RESERVING, PurchaseState.RESERVED):
            self._release()
            self._state = PurchaseState.VOIDED

    def _release(self) -> None:
        # The ledger applies batches in the order of submission: a void behind a reservation that
        # is still under way finds it, or finds nothing where it was refused.
        self._ledger.submit(
            [void(id=f"{self.reservation_id}:void", pending_id=self.reservation_id)],
            patience_s=NEVER_GIVE_UP_S,
        )


def is_booked(settled: Future[list[Result]]) -> bool | None:
    """Whether the ledger has booked a settlement; None: the purchase was paid before, or will be
    booked from the outbox.
    """
    if (error := settled.exception()) is not None:
        return None if isinstance(error, LedgerPostponedError) else False
    outcomes = [result.outcome for result in settled.result()]
    # Two requests of one key: the first to end has settled for what it used.
    if outcomes[0] in (Outcome.EXISTS_WITH_DIFFERENT_FIELDS, Outcome.ALREADY_POSTED):
        return None
    if not max(outcomes).good:
        return False
    return True if Outcome.OK in outcomes else None


def _in_words(result: Result) -> str:
    return f"{result.outcome.name.lower().replace('_', ' ')} {result.detail}".rstrip()
