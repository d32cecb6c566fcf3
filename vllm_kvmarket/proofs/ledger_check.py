"""A check of the books: every balance and every signed root, from the transfers alone."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import msgspec

from vllm_kvmarket.auth.signing_keys import SigningKeys
from vllm_kvmarket.core.errors import ProofError
from vllm_kvmarket.ledger import Ledger
from vllm_kvmarket.proofs import leaves, merkle
from vllm_kvmarket.proofs.leaves import entry_of
from vllm_kvmarket.proofs.log import HASHES_FILE, TransparencyLog
from vllm_kvmarket.proofs.notes import (
    Checkpoint,
    encode_base64,
    read_checkpoint,
    signer_of,
    verify_checkpoint,
)

# Called with how many transfers were hashed.
Progress = Callable[[int], object]


class LedgerCheck(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a check. `problems` has one sentence each; `ok` means that there are none.

    `root` is that of all transfers, in base64; `checkpoints` of the log's own and of those given
    were checked.
    """

    ok: bool
    problems: list[str]
    accounts: int
    transfers: int
    receipts: int
    root: str
    checkpoints: int
    debits_nano: dict[str, int]
    credits_nano: dict[str, int]
    rebuilt: bool


def check_ledger(
    ledger: Ledger,
    home: Path,
    given: Iterable[str] = (),
    on_progress: Progress | None = None,
    *,
    keys: SigningKeys | None = None,
) -> LedgerCheck:
    """Recompute everything; `given` are checkpoints' notes that somebody kept.

    Safe while engines charge. Changes nothing but the log's file of hashes, which is made anew
    where it differs, and reported as a problem. Raises LedgerError and ConfigError.
    """
    log = TransparencyLog(ledger, home, keys)
    problems = [f"ledger: {problem}" for problem in ledger.check_integrity()]
    checkpoints, unreadable = _checkpoints(log, given)
    problems += [f"log: {problem}" for problem in unreadable]
    # Brought up to date first: then the file has no less than what was signed.
    try:
        kept = log.update()
    except ProofError as error:
        problems.append(f"log: {error}")
        kept = 0
    roots, size, root, same = _recompute(
        ledger, {each.size for each in checkpoints}, log.folder / HASHES_FILE, kept, on_progress
    )
    for checkpoint in checkpoints:
        if checkpoint.size not in roots:
            problems.append(
                f"log: {checkpoint.size} transfers were signed for, the ledger has {size}"
            )
        elif roots[checkpoint.size] != checkpoint.root:
            problems.append(
                f"log: the first {checkpoint.size} transfers are not those that were signed: their "
                f"root is {encode_base64(roots[checkpoint.size])}, the checkpoint says "
                f"{encode_base64(checkpoint.root)}"
            )
    if not same:
        log.rebuild()
        problems.append(f"log: {log.folder / HASHES_FILE} differed from the transfers; made anew")
    totals = ledger.totals()
    return LedgerCheck(
        ok=not problems,
        problems=problems,
        accounts=len(ledger.accounts()),
        transfers=size,
        receipts=len(ledger.receipts()),
        root=encode_base64(root),
        checkpoints=len(checkpoints),
        debits_nano={currency: debits for currency, (debits, _) in totals.items()},
        credits_nano={currency: credits for currency, (_, credits) in totals.items()},
        rebuilt=not same,
    )


def _checkpoints(log: TransparencyLog, given: Iterable[str]) -> tuple[list[Checkpoint], list[str]]:
    """The checkpoints that this home signed, its own and those given; and problems, in words."""
    keys = log.own_keys()
    # The home's own file has what a key signed before it was revoked.
    all_keys = [dataclasses.replace(key, revoked_at_s=0) for key in keys]
    found, problems = [], []
    try:
        own = [signed.note for signed in log.checkpoints()]
    except ProofError as error:
        own, problems = [], [str(error)]
    for note in [*own, *given]:
        try:
            if note in own:
                signer_of(note, all_keys)
                checkpoint = read_checkpoint(note)
            else:
                checkpoint = verify_checkpoint(note, keys)
            if not log.is_own(checkpoint):
                raise ProofError(f"it is of another log, {checkpoint.origin}")
            found.append(checkpoint)
        except ProofError as error:
            problems.append(f"checkpoint {_name(note)}: {error}")
    return found, problems


def _name(note: str) -> str:
    try:
        return f"of {read_checkpoint(note).size}"
    except ProofError:
        return repr(note[:40])


def _recompute(
    ledger: Ledger, wanted: set[int], hashes: Path, kept: int, on_progress: Progress | None
) -> tuple[dict[int, bytes], int, bytes, bool]:
    """Hash all transfers: the roots at the wanted sizes, the size and root of all, and whether the
    file of hashes has the same for the first `kept`.
    """
    end = merkle.Frontier()
    roots = {0: end.root()}
    same = True
    with hashes.open("rb") if hashes.exists() else _nothing() as stored:
        for page in leaves.pages(ledger):
            completed: list[bytes] = []
            for transfer in page:
                hashed = end.append(merkle.leaf_hash(entry_of(transfer)))
                if end.size <= kept:
                    completed += hashed
                if end.size in wanted:
                    roots[end.size] = end.root()
            expected = b"".join(completed)
            same = same and stored.read(len(expected)) == expected
            if on_progress is not None:
                on_progress(end.size)
    return roots, end.size, end.root(), same


def _nothing() -> BinaryIO:
    return io.BytesIO()
