"""What the ledger's rules are about: accounts, operations, transfers, and what became of them."""

from __future__ import annotations

import enum
import re
from typing import Literal

import msgspec

from vllm_kvmarket.auth.operator_tokens import ACCOUNT_PATTERN

INT64_MAX = 2**63 - 1
# Room for the keys that name a request, and below what PostgreSQL can keep in an index.
MAX_ID_LENGTH = 512
MAX_PENDING_ID_LENGTH = 448  # renewals and the expiry append to it
ACCOUNT_ID = re.compile(ACCOUNT_PATTERN)
CURRENCY = re.compile(r"[A-Z][A-Z0-9]{2,11}")
DEFAULT_CURRENCY = "USD"

AccountKind = Literal["buyer", "publisher", "provider", "world"]
TransferKind = Literal["plain", "pending", "renew", "post", "void", "expire"]


class Outcome(enum.IntEnum):
    """What became of an operation; everything from INVALID_AMOUNT on had no effect.

    In the order in which the rules look: of several reasons to refuse, the lowest is told.
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
    """An outcome, and for people: which field, account or transfer it is about."""

    outcome: Outcome
    detail: str = ""


class Account(msgspec.Struct, frozen=True, gc=False):
    """An account and its four balances, in nano-units of its currency."""

    id: str
    kind: AccountKind
    may_go_negative: bool = False
    currency: str = DEFAULT_CURRENCY
    debits_pending: int = 0
    credits_pending: int = 0
    debits_posted: int = 0
    credits_posted: int = 0

    @property
    def balance_nano(self) -> int:
        """What the account has, reservations not counted."""
        return self.credits_posted - self.debits_posted

    @property
    def available_nano(self) -> int:
        """What the account can still spend."""
        return self.balance_nano - self.debits_pending


class Operation(msgspec.Struct, frozen=True, gc=False):
    """What a caller asks for; build it with the function named as its kind."""

    kind: TransferKind
    id: str
    debit: str = ""
    credit: str = ""
    amount_nano: int = 0
    pending_id: str = ""
    timeout_s: int = 0
    code: str = ""
    user_data: str = ""


class Transfer(Operation, frozen=True, gc=False):
    """An operation that took effect, for good."""

    created_at_s: float = 0.0


class ReceiptLine(msgspec.Struct, frozen=True, kw_only=True):
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


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What one request reused, at which prices, and the transfers that paid for it.

    `tokens_reused` = `tokens_loaded` (from the store) + `tokens_from_paged_cache` is charged;
    `tokens_failed` could not be loaded and are among `tokens_computed`. `recompute_nano` is what
    prefilling the reused tokens would have cost. Prices are nano-units per million tokens.
    `transfer_ids` begins with the charge; the royalty, where there is one, comes next.
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

    Every hold ends: who dies while it holds a buyer's funds does not lock them for good.
    """
    return Operation("pending", id, debit, credit, amount_nano, "", timeout_s, code, user_data)


def renew(*, id: str, pending_id: str, timeout_s: int) -> Operation:
    """Keep a reserved amount for at least `timeout_s` (1 or more) from now.

    For whoever is alive and not done: it renews before the hold is due. A hold that is due cannot
    be renewed, and none gets shorter. The renewal is kept as a transfer that moves nothing, so that
    the books show why a post came later than the hold's first timeout.
    """
    return Operation("renew", id, pending_id=pending_id, timeout_s=timeout_s)


def post(*, id: str, pending_id: str, amount_nano: int) -> Operation:
    """Move a reserved amount, whole or in part; the rest is released.

    Posting 0 is a settlement that costs nothing, not a void: it is kept as a post, so that a free
    reuse has a transfer for its receipt, and a later post or void is told ALREADY_POSTED.
    """
    return Operation("post", id, amount_nano=amount_nano, pending_id=pending_id)


def void(*, id: str, pending_id: str) -> Operation:
    """Release a reserved amount."""
    return Operation("void", id, pending_id=pending_id)


def expire(*, id: str, pending_id: str) -> Operation:
    """Release a reserved amount whose time is over."""
    return Operation("expire", id, pending_id=pending_id)
