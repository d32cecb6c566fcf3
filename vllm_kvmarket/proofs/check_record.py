"""Up to where this home has checked the books: a signed file, so that the next check can go on.

It is <home>/log/checked: a line with the signature in base64, then a JSON object. The home's key
signs it, so that nobody who can only write files is believed. Who has the key can sign one that is
wrong: check from the start from time to time.
"""

from __future__ import annotations

import msgspec

from vllm_kvmarket.core.durable_files import locked, write_durably
from vllm_kvmarket.core.errors import ProofError
from vllm_kvmarket.ledger.integrity import CheckedBooks
from vllm_kvmarket.proofs import merkle
from vllm_kvmarket.proofs.log import TransparencyLog
from vllm_kvmarket.proofs.notes import decode_base64, encode_base64

CHECKED_FILE = "checked"
# No other text that the home's keys sign begins like this.
_SIGNED = b"kvmarket-checked/1\n"


class CheckRecord(msgspec.Struct, frozen=True):
    """The first `checked.size` transfers were good; their root in base64."""

    root: str = encode_base64(merkle.EMPTY_ROOT)
    checked: CheckedBooks = msgspec.field(default_factory=CheckedBooks)


def write(log: TransparencyLog, record: CheckRecord) -> None:
    """Record a check that found nothing; durable on return."""
    body = msgspec.json.encode(record)
    signature = log.keys.current().sign(_SIGNED + body)
    with locked(log.folder):
        write_durably(log.folder / CHECKED_FILE, encode_base64(signature).encode() + b"\n" + body)


def read(log: TransparencyLog) -> CheckRecord | None:
    """Return the last record; None where there is none that a key in use has signed.

    Raises ProofError for one that this home never signed, and when the transfers that it is about
    are not the ledger's.
    """
    path = log.folder / CHECKED_FILE
    try:
        line, _, body = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    try:
        signature = decode_base64(line.decode(errors="replace"))
    except ProofError:
        signature = b""
    keys = log.keys.own_keys()
    signer = next((key for key in keys if key.verifies(signature, _SIGNED + body)), None)
    if signer is None:
        raise ProofError(f"{path} is not signed by this home")
    if signer.revoked_at_s:
        return None
    record = msgspec.json.decode(body, type=CheckRecord)
    log.update()
    if encode_base64(log.frontier(record.checked.size).root()) != record.root:
        raise ProofError(
            f"the first {record.checked.size} transfers are not those that were checked before"
        )
    return record


def forget(log: TransparencyLog) -> None:
    """Remove the record: the next check is from the start."""
    with locked(log.folder):
        (log.folder / CHECKED_FILE).unlink(missing_ok=True)
