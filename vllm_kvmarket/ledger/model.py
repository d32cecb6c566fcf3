"""The ledger's values: accounts, operations, transfers, their outcomes, and receipts."""

from __future__ import annotations

import enum
import hashlib
import re
from typing import Literal

import msgspec

from vllm_kvmarket.auth.operator_tokens import ACCOUNT_PATTERN

INT64_MAX = 2**63 - 1
TURN_NANO = 2**62
# Room for the keys that name a request, and below what PostgreSQL can keep in an index.
MAX_ID_LENGTH = 512
MAX_PENDING_ID_LENGTH = 448  # renewals and the expiry append to it
ACCOUNT_ID = re.compile(ACCOUNT_PATTERN)
CURRENCY = re.compile(r"[A-Z][A-Z0-9]{2,11}")
DEFAULT_CURRENCY = "USD"

PROVIDER = "provider"
WORLD = "world"
# Royalties wait here while their publisher has no account.
SUSPENSE = "suspense"
ROYALTY = "royalty"
# A charge whose hold was not there: it takes the account's funds, and makes a debt of the rest.
OWED = "owed"
# A hold is released so long after it is due: an engine that renews or settles late still can.
GRACE_S = 60.0

AccountKind = Literal["buyer", "publisher", "provider", "world", "suspense"]
# What moves an amount at once.
MOVES = ("plain", "post", "late")
TransferKind = Literal["plain", "pending", "renew", "post", "void", "expire", "late"]


class Outcome(enum.IntEnum):
    """The result of an operation; everything from INVALID_AMOUNT on had no effect.

    In the order of the rules' checks: of several reasons to refuse, the lowest is reported.
    """

    OK = 0
    EXISTS = 1
    INVALID_AMOUNT = 2
    EXISTS_WITH_DIFFERENT_FIELDS = 3
    INVALID_FIELD = 4
    SAME_ACCOUNT = 5
    UNKNOWN_ACCOUNT = 6
    DIFFERENT_CURRENCIES = 7
    PENDING_NOT_FOUND = 8
    ALREADY_POSTED = 9
    ALREADY_VOIDED = 10
    EXPIRED = 11
    NOT_DUE = 12
    EXCEEDS_PENDING_AMOUNT = 13
    EXCEEDS_CREDITS = 14
    OVERFLOW = 15
    LINKED_FAILED = 16

    @property
    def good(self) -> bool:
        """Whether the operation holds: now done, or done before."""
        return self <= Outcome.EXISTS


class Result(msgspec.Struct, frozen=True, gc=False):
    """An outcome, and for people the field, account or transfer that it is about."""

    outcome: Outcome
    detail: str = ""


class Account(msgspec.Struct, frozen=True, gc=False):
    """An account and its balances, in nano-units of its currency.

    `late_nano` is the part of `debits_posted` that was booked after its hold had expired: only
    these debits may exceed the account's funds. Both posted sums are counted less whole TURN_NANO
    that they have in common, so that 64 bits bound what an account has, and not its turnover.
    """

    id: str
    kind: AccountKind
    may_go_negative: bool = False
    currency: str = DEFAULT_CURRENCY
    debits_pending: int = 0
    credits_pending: int = 0
    debits_posted: int = 0
    credits_posted: int = 0
    late_nano: int = 0

    @property
    def balance_nano(self) -> int:
        """The account's funds, reservations not counted."""
        return self.credits_posted - self.debits_posted

    @property
    def available_nano(self) -> int:
        """The funds that the account can still spend."""
        return self.balance_nano - self.debits_pending

    @property
    def debt_nano(self) -> int:
        """What the account owes for late settlements; the next deposits pay it."""
        return 0 if self.may_go_negative else max(0, -self.balance_nano)


def turned(debits: int, credits: int) -> tuple[int, int]:
    """An account's posted sums, less the whole TURN_NANO that they have in common."""
    common = min(debits, credits) // TURN_NANO * TURN_NANO
    return debits - common, credits - common


class Operation(msgspec.Struct, frozen=True, gc=False):
    """A caller's request; build it with the function named as its kind.

    `receipt_digest` is set by the ledger, on a charge that has a receipt.
    """

    kind: TransferKind
    id: str
    debit: str = ""
    credit: str = ""
    amount_nano: int = 0
    pending_id: str = ""
    timeout_s: int = 0
    code: str = ""
    user_data: str = ""
    receipt_digest: str = ""


class Transfer(Operation, frozen=True, gc=False):
    """An operation that took effect, for good. A post that came after its hold's end is `late`."""

    created_at_s: float = 0.0


class ReceiptLine(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One listing's part of a sale: the tokens from `start` up to, and without, `end`."""

    document_id: str
    title: str
    publisher: str
    start: int
    end: int
    cache_read_nano_per_mtok: int
    royalty_ppm: int
    charge_nano: int
    royalty_nano: int


class Receipt(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one request reused, at which prices, and the transfers that paid for it.

    `tokens_reused` = `tokens_loaded` (from the store) + `tokens_from_paged_cache` is charged;
    `tokens_failed` could not be loaded and were computed. `tokens_computed` of the prompt are all
    but the `cached_tokens` of the answer's usage, which are the reused ones and what vLLM found of
    the account's own earlier work. `recompute_nano` is the price of prefilling the reused tokens.
    Prices are nano-units per million tokens.
    `transfer_ids` begins with the charge; the royalties follow, in the order of their lines.
    Document, title, publisher and prices are those of the last line. `created_at_s` is the time of
    booking. A receipt without `lines` has one line, which its other fields describe.
    """

    id: str
    request_id: str
    account: str
    document_id: str
    title: str
    publisher: str
    tokens_matched: int
    tokens_reused: int
    tokens_loaded: int
    tokens_from_paged_cache: int
    tokens_failed: int
    tokens_computed: int
    tokens_output: int
    input_nano_per_mtok: int
    cache_read_nano_per_mtok: int
    royalty_ppm: int
    charge_nano: int
    royalty_nano: int
    recompute_nano: int
    reservation_id: str
    transfer_ids: tuple[str, ...]
    created_at_s: float
    model: str
    namespace: str
    lines: tuple[ReceiptLine, ...] = ()

    def payees(self) -> dict[str, str]:
        """Each royalty's transfer, and the publisher whom it pays."""
        paid = [line.publisher for line in self.all_lines() if line.royalty_nano]
        return dict(zip(self.transfer_ids[1:], paid, strict=False))

    def all_lines(self) -> tuple[ReceiptLine, ...]:
        """The lines; the one that the receipt describes itself where it lists none."""
        if self.lines:
            return self.lines
        line = ReceiptLine(
            document_id=self.document_id,
            title=self.title,
            publisher=self.publisher,
            start=0,
            end=self.tokens_reused,
            cache_read_nano_per_mtok=self.cache_read_nano_per_mtok,
            royalty_ppm=self.royalty_ppm,
            charge_nano=self.charge_nano,
            royalty_nano=self.royalty_nano,
        )
        return (line,)


_ENCODER = msgspec.json.Encoder()


def encode_receipt(receipt: Receipt) -> bytes:
    """The one spelling of a receipt, which is stored and which its digest covers."""
    return _ENCODER.encode(receipt)


def digest_of(receipt: Receipt) -> str:
    """SHA-256 of a receipt, in hexadecimal: its charge in the log commits to it."""
    return hashlib.sha256(encode_receipt(receipt)).hexdigest()


def plain(
    *, id: str, debit: str, credit: str, amount_nano: int, code: str, user_data: str = ""
) -> Operation:
    """Move an amount at once."""
    return Operation("plain", id, debit, credit, amount_nano, "", 0, code, user_data)


def pending(
    *,
    id: str,
    debit: str,
    credit: str,
    amount_nano: int,
    timeout_s: int,
    code: str,
    user_data: str = "",
) -> Operation:
    """Reserve an amount until it is posted or voided, at most for `timeout_s` (1 or more).

    Every hold ends: an engine that dies does not lock its buyers' funds for good. It is released
    GRACE_S after it is due.
    """
    return Operation("pending", id, debit, credit, amount_nano, "", timeout_s, code, user_data)


def renew(*, id: str, pending_id: str, timeout_s: int) -> Operation:
    """Keep a reserved amount for at least `timeout_s` (1 or more) from now.

    An engine renews the holds of its running requests before they are due. No hold gets shorter.
    The renewal is a transfer that moves nothing, so that the books show why a hold lasted longer.
    """
    return Operation("renew", id, pending_id=pending_id, timeout_s=timeout_s)


def post(*, id: str, pending_id: str, amount_nano: int) -> Operation:
    """Move a reserved amount, whole or in part; the rest is released.

    Posting 0 is a settlement that costs nothing, not a void: a free reuse has a transfer for its
    receipt. A post whose hold has expired is booked as a `late` transfer, once: it takes the
    account's funds, and makes a debt of the rest.
    """
    return Operation("post", id, amount_nano=amount_nano, pending_id=pending_id)


def void(*, id: str, pending_id: str) -> Operation:
    """Release a reserved amount."""
    return Operation("void", id, pending_id=pending_id)


def expire(*, id: str, pending_id: str) -> Operation:
    """Release a reserved amount that is due, and whose grace is over."""
    return Operation("expire", id, pending_id=pending_id)
