"""One request's reuse of one listing, from reservation to receipt.

A purchase is reserved when its request arrives and closed exactly once: settled for what was really
reused, or voided. The ledger's ids derive from the purchase's key, so that a retry changes nothing.
"""

from __future__ import annotations

import enum
import logging
import math
import time
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from vllm_kvmarket.catalogue import Match
from vllm_kvmarket.core.errors import LedgerBusyError, LedgerUnavailableError
from vllm_kvmarket.core.pricing import Terms
from vllm_kvmarket.ledger import (
    PROVIDER,
    Ledger,
    Operation,
    Outcome,
    Receipt,
    Result,
    pending,
    plain,
    post,
    void,
)

logger = logging.getLogger(__name__)

_REASON_OF_ERROR: dict[type[BaseException], str] = {
    LedgerBusyError: "ledger_busy",
    LedgerUnavailableError: "ledger_unavailable",
}
# What has been earned is booked whenever the database is back, as long as this process lives.
NEVER_GIVE_UP_S = math.inf


class PurchaseState(enum.Enum):
    """Where a purchase stands."""

    RESERVING = "reserving"
    RESERVED = "reserved"
    REFUSED = "refused"
    SETTLED = "settled"
    VOIDED = "voided"


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request really used, in tokens.

    `reused` of the match's `matched` tokens were not computed: `loaded` came from the store and
    `from_paged_cache` lay in vLLM's paged cache. `failed` ones could not be loaded and were
    computed, and so are in `computed`.
    """

    matched: int
    reused: int
    loaded: int
    from_paged_cache: int
    failed: int
    computed: int
    output: int


class Purchase:
    """A reservation on the way to its receipt; used by one thread."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        key: str,
        request_id: str,
        account: str,
        match: Match,
        terms: Terms,
        model: str,
        timeout_s: int,
    ) -> None:
        self._ledger = ledger
        self.key = key
        self.request_id = request_id
        self.account = account
        self.match = match
        self.terms = terms
        self.receipt: Receipt | None = None
        # What the ledger answers to the settlement; see is_booked.
        self.settled: Future[list[Result]] | None = None
        # Why it was refused: for people, and one of the reasons that are counted.
        self.refusal = ""
        self.refusal_reason = ""
        self._model = model
        self._state = PurchaseState.RESERVING
        self._reservation: Future[list[Result]] = ledger.submit(
            [
                pending(
                    id=self.reservation_id,
                    debit=account,
                    credit=PROVIDER,
                    amount_nano=terms.charge_nano(match.token_count),
                    timeout_s=timeout_s,
                    code="reuse",
                    user_data=match.listing.document_id,
                )
            ]
        )

    @property
    def reservation_id(self) -> str:
        """The pending transfer's id."""
        return f"{self.key}:reserve"

    @property
    def receipt_id(self) -> str:
        """The id that the receipt has, or will have."""
        return f"kvr_{self.key}"

    def state(self) -> PurchaseState:
        """Where the purchase stands now; never waits."""
        if self._state is PurchaseState.RESERVING and self._reservation.done():
            self._take_reservation()
        return self._state

    def _take_reservation(self) -> None:
        error = self._reservation.exception()
        if error is not None:
            reason = _REASON_OF_ERROR.get(type(error), "ledger_refused")
            self._refuse(reason, f"the ledger could not reserve: {error}")
            return
        result = self._reservation.result()[0]
        if result.outcome.good:
            self._state = PurchaseState.RESERVED
        elif result.outcome is Outcome.EXCEEDS_CREDITS:
            self._refuse("no_funds", f"account {self.account!r} has not enough funds")
        elif result.outcome is Outcome.UNKNOWN_ACCOUNT:
            self._refuse("unknown_account", f"there is no account {self.account!r}")
        else:
            self._refuse("ledger_refused", f"the ledger refused: {_said(result)}")

    def _refuse(self, reason: str, told: str) -> None:
        self._state = PurchaseState.REFUSED
        self.refusal_reason = reason
        self.refusal = told

    def settle(self, usage: Usage) -> Receipt:
        """Post the charge for what was reused, pay the royalty, store the receipt; once.

        Returns at once with the receipt; the ledger makes it durable in one transaction with the
        transfers. A second call returns the first call's receipt and charges nothing.
        """
        if self.receipt is None:
            assert self.state() is PurchaseState.RESERVED, self._state
            self.receipt, operations = self._settlement(usage)
            self._state = PurchaseState.SETTLED
            self.settled = self._ledger.submit(
                operations, receipt=self.receipt, patience_s=NEVER_GIVE_UP_S
            )
            self.settled.add_done_callback(
                partial(_log_refusal, f"receipt {self.receipt.id}", self.account)
            )
        return self.receipt

    def _settlement(self, usage: Usage) -> tuple[Receipt, list[Operation]]:
        listing = self.match.listing
        charge = self.terms.charge_nano(usage.reused)
        # The provider's own documents earn it the whole charge.
        royalty = 0 if listing.terms.publisher == PROVIDER else self.terms.royalty_nano(charge)
        operations: list[Operation] = [
            post(id=f"{self.key}:settle", pending_id=self.reservation_id, amount_nano=charge)
        ]
        if royalty:
            operations.append(
                plain(
                    id=f"{self.key}:royalty",
                    debit=PROVIDER,
                    credit=listing.terms.publisher,
                    amount_nano=royalty,
                    code="royalty",
                    user_data=listing.document_id,
                )
            )
        receipt = Receipt(
            id=self.receipt_id,
            request_id=self.request_id,
            account=self.account,
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
            input_nano_per_mtok=self.terms.input_nano_per_mtok,
            cache_read_nano_per_mtok=self.terms.cache_read_nano_per_mtok,
            royalty_ppm=self.terms.royalty_ppm,
            charge_nano=charge,
            royalty_nano=royalty,
            recompute_nano=self.terms.recompute_nano(usage.reused),
            reservation_id=self.reservation_id,
            transfer_ids=tuple(operation.id for operation in operations),
            created_at_s=time.time(),
            model=self._model,
            namespace=listing.namespace.hex(),
        )
        return receipt, operations

    def void(self) -> None:
        """Release the reservation: nothing was reused, or no answer came; once, then nothing."""
        if self._state in (PurchaseState.RESERVING, PurchaseState.RESERVED):
            # The ledger applies batches in the order of submission, so that a void behind a
            # reservation still under way finds it (or finds nothing, where it was refused).
            self._ledger.submit(
                [void(id=f"{self.key}:void", pending_id=self.reservation_id)],
                patience_s=NEVER_GIVE_UP_S,
            )
            self._state = PurchaseState.VOIDED


def is_booked(settled: Future[list[Result]]) -> bool | None:
    """What became of a settlement that the ledger has answered: booked, not booked, or, None, had
    been booked before.
    """
    if settled.exception() is not None:
        return False
    outcomes = [result.outcome for result in settled.result()]
    if not max(outcomes).good:
        return False
    return True if Outcome.OK in outcomes else None


def _said(result: Result) -> str:
    return f"{result.outcome.name.lower().replace('_', ' ')} {result.detail}".rstrip()


def _log_refusal(what: str, account: str, settled: Future[list[Result]]) -> None:
    """An answer that is out cannot be taken back: what the ledger refuses is not charged."""
    error = settled.exception()
    # In a linked batch one operation has the reason, and the others fail because of it.
    refused = [] if error else [each for each in settled.result() if not each.outcome.good]
    refused.sort(key=lambda result: result.outcome is Outcome.LINKED_FAILED)
    if error or refused:
        reason = error or _said(refused[0])
        logger.error("kvmarket: %s was not booked, %s is not charged: %s", what, account, reason)


class WriteCharge:
    """What a publisher pays for storing a document: reserved on arrival, posted with the
    listing.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        key: str,
        publisher: str,
        document_id: str,
        amount_nano: int,
        timeout_s: int,
    ) -> None:
        self.amount_nano = amount_nano
        self._ledger = ledger
        self._key = key
        self._publisher = publisher
        self._document_id = document_id
        self._reservation = ledger.submit(
            [
                pending(
                    id=self.reservation_id,
                    debit=publisher,
                    credit=PROVIDER,
                    amount_nano=amount_nano,
                    timeout_s=timeout_s,
                    code="publish",
                    user_data=document_id,
                )
            ]
        )

    @property
    def reservation_id(self) -> str:
        """The pending transfer's id."""
        return f"{self._key}:reserve"

    def refusal(self) -> str:
        """Why the publisher cannot pay; empty when it can. Waits for the ledger when it must."""
        error = self._reservation.exception()
        if error is not None:
            return f"the ledger could not reserve: {error}"
        result = self._reservation.result()[0]
        if result.outcome.good:
            return ""
        if result.outcome not in (Outcome.EXCEEDS_CREDITS, Outcome.UNKNOWN_ACCOUNT):
            return f"the ledger refused: {_said(result)}"
        return (
            f"publisher {self._publisher!r} cannot pay {self.amount_nano} nano-units "
            "for storing it; make a deposit, then publish again"
        )

    def done(self) -> bool:
        """Whether the ledger has answered; never waits."""
        return self._reservation.done()

    def settle(self) -> Future[list[Result]]:
        """Post the charge: the document is listed. What the ledger answers; see is_booked."""
        settled = self._ledger.submit(
            [
                post(
                    id=f"{self._key}:settle",
                    pending_id=self.reservation_id,
                    amount_nano=self.amount_nano,
                )
            ],
            patience_s=NEVER_GIVE_UP_S,
        )
        settled.add_done_callback(
            partial(_log_refusal, f"storing {self._document_id}", self._publisher)
        )
        return settled

    def void(self) -> None:
        """Release the reservation: nothing was listed."""
        self._ledger.submit(
            [void(id=f"{self._key}:void", pending_id=self.reservation_id)],
            patience_s=NEVER_GIVE_UP_S,
        )
