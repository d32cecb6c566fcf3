"""A check of the books: every balance and every signed root, from the transfers alone."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from vllm_kvmarket.auth.signing_keys import PublicKey, SigningKeys
from vllm_kvmarket.core.errors import ProofError
from vllm_kvmarket.ledger import Ledger, Transfer
from vllm_kvmarket.proofs import check_record, merkle
from vllm_kvmarket.proofs.check_record import CheckRecord
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

    The first `since` transfers were checked before, and were not read again. `root` is that of all
    transfers, in base64; `checkpoints` of the log's own and of those given were checked.
    """

    ok: bool
    problems: list[str]
    since: int
    accounts: int
    transfers: int
    receipts: int
    root: str
    checkpoints: int
    debits_nano: dict[str, int]
    credits_nano: dict[str, int]
    rebuilt: bool


def check_ledger(ledger: Ledger, home: Path, given: Iterable[str] = ()) -> LedgerCheck:
    """Recompute everything; `given` are checkpoints' notes that somebody kept.

    Safe while engines charge. Changes nothing but the log's file of hashes, which is made anew
    where it differs, and reported as a problem. Raises LedgerError and ConfigError.
    """
    return _check(TransparencyLog(ledger, home), CheckRecord(), given, None)[0]


def check_new(
    ledger: Ledger,
    home: Path,
    given: Iterable[str] = (),
    on_progress: Progress | None = None,
    *,
    keys: SigningKeys | None = None,
    from_the_start: bool = False,
) -> LedgerCheck:
    """Check what was booked since the last check, and record how far the books are good.

    The record is signed by this home. One that is not, or whose transfers are not the ledger's any
    more, is a problem, and everything is checked, as it is `from_the_start`. What was changed in
    bookings that were checked before is found from the start only. Else as `check_ledger`.
    """
    log = TransparencyLog(ledger, home, keys)
    start, doubts = CheckRecord(), list[str]()
    try:
        if not from_the_start:
            start = check_record.read(log) or start
    except ProofError as error:
        doubts = [f"log: {error}; everything was checked from the start"]
    report, end = _check(log, start, given, on_progress)
    if report.ok:
        check_record.write(log, end)
    elif not report.since:
        check_record.forget(log)  # what it says may be what is wrong
    return msgspec.structs.replace(
        report, ok=report.ok and not doubts, problems=doubts + report.problems
    )


def _check(
    log: TransparencyLog,
    start: CheckRecord,
    given: Iterable[str],
    on_progress: Progress | None,
) -> tuple[LedgerCheck, CheckRecord]:
    """Check what is behind a record; the report, and the record of what is checked now."""
    checkpoints, problems = _checkpoints(log, start.checked.size, given)
    # Brought up to date first: then the file has no less than what was signed.
    try:
        kept = log.update()
        tree = log.frontier(start.checked.size)
    except ProofError as error:
        problems.append(f"log: {error}")
        kept, tree, start = 0, merkle.Frontier(), CheckRecord()
    since = tree.size
    with _open(log.folder / HASHES_FILE) as stored:
        hashing = _Hashing(tree, {each.size for each in checkpoints}, stored, kept, on_progress)
        found, checked = log.ledger.check_behind(start.checked, hashing.add)
    problems = [f"ledger: {problem}" for problem in found] + problems
    for checkpoint in checkpoints:
        problems += _wrong_root(log, checkpoint, hashing, since)
    if not hashing.same:
        log.rebuild()
        problems.append(f"log: {log.folder / HASHES_FILE} differed from the transfers; made anew")
    totals = log.ledger.totals()
    report = LedgerCheck(
        ok=not problems,
        problems=problems,
        since=since,
        accounts=len(log.ledger.accounts()),
        transfers=tree.size,
        receipts=checked.receipts,
        root=encode_base64(tree.root()),
        checkpoints=len(checkpoints),
        debits_nano={currency: debits for currency, (debits, _) in totals.items()},
        credits_nano={currency: credits for currency, (_, credits) in totals.items()},
        rebuilt=not hashing.same,
    )
    return report, CheckRecord(report.root, checked)


def _checkpoints(
    log: TransparencyLog, since: int, given: Iterable[str]
) -> tuple[list[Checkpoint], list[str]]:
    """The checkpoints that this home signed: its own behind `since`, and those given; problems."""
    keys = log.keys.own_keys()
    found, problems = [], []
    try:
        notes = [signed.note for signed in log.checkpoints()]
        own = dict.fromkeys(
            note for note in notes if not since or read_checkpoint(note).size > since
        )
    except ProofError as error:
        own, problems = {}, [f"log: {error}"]
    for note in [*own, *given]:
        try:
            checkpoint = _own(note, keys) if note in own else verify_checkpoint(note, keys)
            if not log.is_own(checkpoint):
                raise ProofError(f"it is of another log, {checkpoint.origin}")
            found.append(checkpoint)
        except ProofError as error:
            problems.append(f"log: checkpoint {_name(note)}: {error}")
    return found, problems


def _own(note: str, keys: Iterable[PublicKey]) -> Checkpoint:
    # The home's own file has what a key signed before it was revoked.
    signer_of(note, [dataclasses.replace(key, revoked_at_s=0) for key in keys])
    return read_checkpoint(note)


def _name(note: str) -> str:
    try:
        return f"of {read_checkpoint(note).size}"
    except ProofError:
        return repr(note[:40])


class _Hashing:
    """Hashes transfers behind a tree's end; `same` while the file of hashes agrees.

    `roots` are those at the wanted sizes; the file is compared for the first `kept` transfers.
    """

    def __init__(
        self,
        tree: merkle.Frontier,
        wanted: set[int],
        stored: BinaryIO,
        kept: int,
        on_progress: Progress | None,
    ) -> None:
        self.tree, self._wanted, self._stored, self._kept = tree, wanted, stored, kept
        self._on_progress = on_progress
        self.roots = {tree.size: tree.root()}
        self.same = True
        stored.seek(merkle.stored_count(tree.size) * merkle.HASH_BYTES)

    def add(self, page: Sequence[Transfer]) -> None:
        """Hash the next transfers; mutates."""
        completed: list[bytes] = []
        for transfer in page:
            hashed = self.tree.append(merkle.leaf_hash(entry_of(transfer)))
            if self.tree.size <= self._kept:
                completed += hashed
            if self.tree.size in self._wanted:
                self.roots[self.tree.size] = self.tree.root()
        expected = b"".join(completed)
        self.same = self.same and self._stored.read(len(expected)) == expected
        if self._on_progress is not None:
            self._on_progress(self.tree.size)


def _wrong_root(
    log: TransparencyLog, checkpoint: Checkpoint, hashing: _Hashing, since: int
) -> list[str]:
    """What is wrong with a signed root, in words."""
    size, root = checkpoint.size, hashing.roots.get(checkpoint.size)
    if size < since:
        try:
            path = log.consistency_path(size, since)
            merkle.verify_consistency(size, since, checkpoint.root, hashing.roots[since], path)
        except ProofError as error:
            return [f"log: checkpoint of {size}: {error}"]
        return []
    if root is None:
        return [f"log: {size} transfers were signed for, the ledger has {hashing.tree.size}"]
    if root != checkpoint.root:
        return [
            f"log: the first {size} transfers are not those that were signed: their root is "
            f"{encode_base64(root)}, the checkpoint says {encode_base64(checkpoint.root)}"
        ]
    return []


def _open(hashes: Path) -> BinaryIO:
    return hashes.open("rb") if hashes.exists() else io.BytesIO()
