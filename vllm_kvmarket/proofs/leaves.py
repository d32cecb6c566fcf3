"""A transfer as a leaf of the log: the same bytes on every machine and database.

The entry of a transfer is its canonical JSON by RFC 8785: one object in UTF-8 without white space,
members in alphabetical order, every value a string. Its members are

    amount_nano    whole nano-units in decimal
    code           what the transfer is for: reuse, royalty, deposit, payout, publish, ...
    created_at_s   seconds of the epoch: the shortest decimal that gives the same IEEE double
    credit, debit  account ids
    id             the transfer's id
    kind           plain, pending, renew, post, void, expire or late
    pending_id     the reservation that it is about, "" for none
    receipt_digest SHA-256 of the charge's receipt in hexadecimal, "" for none
    timeout_s      how long a reservation stands, in decimal
    type           kvmarket/transfer/v1
    user_data      the document's id for a reuse and a royalty, the reference of a payout

The leaf's hash is SHA-256 of a zero byte and the entry. Leaf n is the n-th transfer that took
effect, counted from 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from vllm_kvmarket.core.errors import ProofError
from vllm_kvmarket.ledger import Ledger, Transfer

TYPE = "kvmarket/transfer/v1"
PAGE = 10_000  # transfers, some megabytes


class Leaf(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A transfer as the log has it; fields in the order of their names."""

    amount_nano: str
    code: str
    created_at_s: str
    credit: str
    debit: str
    id: str
    kind: str
    pending_id: str
    receipt_digest: str
    timeout_s: str
    type: str
    user_data: str


_ENCODER = msgspec.json.Encoder()


def entry_of(transfer: Transfer) -> bytes:
    """Encode a transfer as the log has it."""
    return _ENCODER.encode(
        Leaf(
            str(transfer.amount_nano),
            transfer.code,
            repr(float(transfer.created_at_s)),
            transfer.credit,
            transfer.debit,
            transfer.id,
            transfer.kind,
            transfer.pending_id,
            transfer.receipt_digest,
            str(transfer.timeout_s),
            TYPE,
            transfer.user_data,
        )
    )


def read_entry(entry: bytes) -> Leaf:
    """Decode an entry. Raises ProofError for anything but the one spelling of a transfer."""
    try:
        leaf = msgspec.json.decode(entry, type=Leaf)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProofError(f"the entry is no transfer ({error})") from None
    if leaf.type != TYPE or _ENCODER.encode(leaf) != entry:
        raise ProofError(f"the entry is not spelled as {TYPE} is")
    return leaf


def pages(ledger: Ledger, after: int = 0) -> Iterator[list[Transfer]]:
    """Every transfer behind the first `after`; those that take effect meanwhile as well."""
    while page := ledger.transfers_after(after, PAGE):
        yield page
        after += len(page)


def indexes_of(ledger: Ledger, transfer_ids: Iterable[str]) -> dict[str, int]:
    """Which leaves transfers are, from 0. Raises NotFoundError."""
    return {transfer_id: ledger.sequence_of(transfer_id) - 1 for transfer_id in transfer_ids}
