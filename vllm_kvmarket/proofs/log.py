"""The append-only log over all transfers of a ledger, and what it signs.

The tree follows from the transfers alone: every home on the same ledger gets the same root. Each
home signs under its own origin, kvmarket/<kid of its first key>. Under <home>/log are

    hashes             every whole subtree's hash, 64 bytes a transfer; made anew when it is lost
    head.json          up to where it is durable
    checkpoints.jsonl  every checkpoint that was ever signed: these cannot be made anew
    epochs.jsonl       when the operator began anew after a loss, and what was lost
    checked            up to where the books were checked; see check_record.py

Nothing is signed that contradicts what was signed before. When the ledger was rolled back, nothing
is signed at all until the operator opens a new epoch: a new log, with an origin that ends in its
number, kvmarket/<kid>/2. A log is brought up to date when it is
asked something, and hashes new transfers only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import msgspec

from vllm_kvmarket.auth.signing_keys import SigningKeys
from vllm_kvmarket.core.durable_files import append_line, locked, write_durably
from vllm_kvmarket.core.errors import ProofError
from vllm_kvmarket.ledger import Ledger
from vllm_kvmarket.proofs import leaves, merkle
from vllm_kvmarket.proofs.leaves import entry_of
from vllm_kvmarket.proofs.notes import (
    ORIGIN_PREFIX,
    Checkpoint,
    ConsistencyProof,
    InclusionProof,
    encode_base64,
    is_signed_by,
    read_checkpoint,
    sign_checkpoint,
)

if TYPE_CHECKING:
    from vllm_kvmarket.market.market import Market

CHECKPOINT_S = 60.0  # how often the log is signed while transfers are added
LOG_FOLDER = "log"
HASHES_FILE = "hashes"
HEAD_FILE = "head.json"
CHECKPOINTS_FILE = "checkpoints.jsonl"
EPOCHS_FILE = "epochs.jsonl"
# The hashes of a ledger that is no more, until the epoch that records the loss is opened.
LOST_HASHES_FILE = "hashes.lost"


class Head(msgspec.Struct, frozen=True):
    """Up to where the hashes are durable."""

    size: int = 0
    root: str = merkle.EMPTY_ROOT.hex()


class Signed(msgspec.Struct, frozen=True):
    """A line of checkpoints.jsonl."""

    at_s: float
    note: str


_Line = TypeVar("_Line", bound=msgspec.Struct)


class Epoch(msgspec.Struct, frozen=True, kw_only=True):
    """A line of epochs.jsonl: a log that ended, and the ledger with which the next one begins.

    `common_size` of the `signed_size` transfers that were signed for are still there, in their
    places; the others are lost. It is None where the hashes were lost, too.
    """

    number: int
    opened_at_s: float
    reason: str
    signed_origin: str
    signed_size: int
    signed_root: str
    ledger_size: int
    common_size: int | None


class LoggedTransfer(msgspec.Struct, frozen=True):
    """Where in the log a transfer is; the hash in hexadecimal."""

    id: str
    log_index: int
    leaf_hash: str


class StoredHashes:
    """The file of subtree hashes: 64 bytes a leaf, for a tree of `size` leaves.

    A copy of what follows from the transfers, so that nobody hashes a million of them again.
    Opened for one operation at a time.
    """

    def __init__(self, path: Path, size: int) -> None:
        """Open or make the file; hashes after those of `size` leaves are cut off."""
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.size = size
        end = merkle.stored_count(size) * merkle.HASH_BYTES
        if os.fstat(self._descriptor).st_size > end:
            os.ftruncate(self._descriptor, end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)

    def read(self, level: int, number: int) -> bytes:
        """See merkle.Read. Raises ProofError when the file does not have it."""
        position = merkle.stored_position(level, number) * merkle.HASH_BYTES
        found = os.pread(self._descriptor, merkle.HASH_BYTES, position)
        if len(found) != merkle.HASH_BYTES:
            raise ProofError(f"{self._path} is shorter than its log; see `kvmarket ledger check`")
        return found

    def append(self, leaves: Iterable[bytes]) -> None:
        """Grow by the hashes of new leaves; mutates the file, see `sync`."""
        end = merkle.frontier(self.read, self.size)
        completed = b"".join(node for leaf in leaves for node in end.append(leaf))
        position = merkle.stored_count(self.size) * merkle.HASH_BYTES
        while completed:
            written = os.pwrite(self._descriptor, completed, position)
            completed, position = completed[written:], position + written
        self.size = end.size

    def root(self, size: int | None = None) -> bytes:
        """The root of the first `size` leaves, by default of all."""
        return merkle.root(self.read, self.size if size is None else size)

    def sync(self) -> None:
        """Make what was appended durable."""
        os.fsync(self._descriptor)


class TransparencyLog:
    """One home's log; safe for several threads and processes. Methods raise LedgerError too."""

    def __init__(self, ledger: Ledger, home: Path, keys: SigningKeys | None = None) -> None:
        """`keys` are by default those in the home alone."""
        self.ledger = ledger
        self.keys = keys or SigningKeys(home)
        self.folder = home / LOG_FOLDER

    @classmethod
    def of(cls, market: Market) -> Self:
        """The log of a market's home."""
        return cls(market.ledger, market.home, market.signing_keys)

    @property
    def origin(self) -> str:
        """The log's name, for as long as the home has its first key, and within one epoch."""
        number = len(self.epochs()) + 1
        epoch = f"/{number}" if number > 1 else ""
        return ORIGIN_PREFIX + self.keys.market() + epoch

    def update(self) -> int:
        """Take in the transfers that took effect since; how many there are now."""
        with self._tree() as tree:
            return tree.size

    def checkpoint(self) -> Checkpoint:
        """Sign the log as it stands; the last checkpoint again when nothing was added.

        Raises ProofError when the ledger or the log was changed behind what was signed before.
        """
        with self._tree() as tree:
            return self._checkpoint(tree)

    def keep_signed(self, interval_s: float = CHECKPOINT_S) -> None:
        """Sign the log as it stands, unless that was done just before; for a schedule.

        Nothing is done in a home that has no log. Raises ProofError as `checkpoint` does.
        """
        last = _read_lines(self.folder / CHECKPOINTS_FILE, Signed, last=True)
        if last and abs(time.time() - last[0].at_s) >= interval_s:
            self.checkpoint()

    def checkpoints(self) -> list[Signed]:
        """Every checkpoint that was signed, oldest first, but those of epochs that ended."""
        ended = {epoch.signed_origin for epoch in self.epochs()}
        signed = _read_lines(self.folder / CHECKPOINTS_FILE, Signed)
        return [each for each in signed if each.note.partition("\n")[0] not in ended]

    def epochs(self) -> list[Epoch]:
        """Every epoch that was opened after a loss, oldest first. Raises ProofError."""
        return _read_lines(self.folder / EPOCHS_FILE, Epoch)

    def is_own(self, checkpoint: Checkpoint) -> bool:
        """Whether this home signed a checkpoint, in this epoch or before, under any of its keys."""
        own = {ORIGIN_PREFIX + key.kid for key in self.keys.own_keys()}
        return (
            checkpoint.origin == self.origin
            or checkpoint.origin.rpartition("/")[0] in own
            or (checkpoint.origin in own)
        )

    def open_epoch(self, reason: str) -> Epoch:
        """Begin a new log after a loss, and record it; durable on return.

        For an operator, when nothing can be signed because the ledger is an older one, and no
        newer backup is left. Raises ProofError when nothing contradicts what was signed.
        """
        with self._tree() as tree:
            before = self._last_checkpoint()
            if before is None or self._is_beginning(tree, before):
                raise ProofError("the ledger has everything that was signed; no epoch is needed")
            epoch = Epoch(
                number=len(self.epochs()) + 2,
                opened_at_s=time.time(),
                reason=reason,
                signed_origin=before.origin,
                signed_size=before.size,
                signed_root=encode_base64(before.root),
                ledger_size=tree.size,
                common_size=self._common_size(before),
            )
            append_line(self.folder / EPOCHS_FILE, msgspec.json.encode(epoch))
            (self.folder / LOST_HASHES_FILE).unlink(missing_ok=True)
        return epoch

    def cover(self, transfer_ids: Iterable[str]) -> list[LoggedTransfer]:
        """Find transfers' places, and sign a checkpoint over them where none has them yet.

        So that nothing that names a leaf is signed before the leaf itself: a ledger that is rolled
        back afterwards is found out. Raises NotFoundError and ProofError.
        """
        found = [self.locate(transfer_id) for transfer_id in transfer_ids]
        end = max((each.log_index + 1 for each in found), default=0)
        with self._tree() as tree:
            before = self._last_checkpoint()
            if before is None or before.size < end or not self._is_beginning(tree, before):
                self._checkpoint(tree)
        return found

    def indexes_of(self, transfer_ids: Iterable[str]) -> dict[str, int]:
        """Which leaves of the log transfers are, from 0. Raises NotFoundError."""
        return leaves.indexes_of(self.ledger, transfer_ids)

    def locate(self, transfer_id: str) -> LoggedTransfer:
        """Find a transfer's place in the log. Raises NotFoundError."""
        index = self.indexes_of([transfer_id])[transfer_id]
        leaf = merkle.leaf_hash(entry_of(self.ledger.transfer(transfer_id)))
        return LoggedTransfer(transfer_id, index, leaf.hex())

    def prove(self, transfer_id: str) -> InclusionProof:
        """Prove that a transfer is in the log as it stands. Raises NotFoundError and ProofError."""
        transfer = self.ledger.transfer(transfer_id)
        index = self.indexes_of([transfer_id])[transfer_id]
        with self._tree() as tree:
            checkpoint = self._checkpoint(tree)
            path = merkle.inclusion_path(tree.read, index, checkpoint.size)
        proof = InclusionProof(index, entry_of(transfer), tuple(path), checkpoint)
        # Whatever has happened to the files: no proof is handed out that would not hold.
        proof.verify(self.keys.public_keys())
        return proof

    def prove_consistency(self, old: int, new: int | None = None) -> ConsistencyProof:
        """Prove that the log of `new` leaves begins with that of `old`.

        `new` is by default the log as it stands. Raises ProofError.
        """
        with self._tree() as tree:
            current = self._checkpoint(tree)
            new = current.size if new is None else new
            if not 0 <= old <= new <= current.size:
                raise ProofError(
                    f"a log of {current.size} leaves cannot lead from {old} to {new}; "
                    "give sizes that it had"
                )
            path = merkle.consistency_path(tree.read, old, new)
            roots = tree.root(old), tree.root(new)
        merkle.verify_consistency(old, new, *roots, path)
        notes: dict[int, str] = {}
        for signed in map(read_checkpoint, (each.note for each in self.checkpoints())):
            if signed.origin == current.origin:
                notes[signed.size] = signed.note
        return ConsistencyProof(
            old_size=old,
            new_size=new,
            old_root=encode_base64(roots[0]),
            new_root=encode_base64(roots[1]),
            path=tuple(encode_base64(each) for each in path),
            old_checkpoint=notes.get(old, ""),
            new_checkpoint=notes.get(new, ""),
        )

    def frontier(self, size: int) -> merkle.Frontier:
        """Read the end of the tree over the first `size` leaves. Raises ProofError."""
        with self._tree() as tree:
            if size > tree.size:
                raise ProofError(f"the ledger has {tree.size} transfers, {size} are expected")
            return merkle.frontier(tree.read, size)

    def consistency_path(self, old: int, new: int) -> list[bytes]:
        """See merkle.consistency_path. Raises ProofError."""
        with self._tree() as tree:
            return merkle.consistency_path(tree.read, old, new)

    def rebuild(self) -> None:
        """Hash all transfers again, from the first."""
        with locked(self.folder):
            self._forget()
            with self._opened():
                pass

    def _checkpoint(self, tree: StoredHashes) -> Checkpoint:
        key = self.keys.current()
        root = tree.root()
        before = self._last_checkpoint()
        if before is not None:
            if not self._is_beginning(tree, before):
                raise ProofError(
                    f"the first {before.size} transfers do not give the root that was signed: the "
                    "ledger was changed or is an older one; see `kvmarket ledger check`, and "
                    "restore a backup, or record the loss with `kvmarket log epoch`"
                )
            if before.size == tree.size and is_signed_by(before.note, key.public):
                return before
        checkpoint = sign_checkpoint(self.origin, tree.size, root, key)
        line = msgspec.json.encode(Signed(time.time(), checkpoint.note))
        append_line(self.folder / CHECKPOINTS_FILE, line)
        return checkpoint

    def _last_checkpoint(self) -> Checkpoint | None:
        """The last signed checkpoint of this epoch."""
        last = _read_lines(self.folder / CHECKPOINTS_FILE, Signed, last=True)
        if not last or not last[0].note.startswith(f"{self.origin}\n"):
            return None
        return read_checkpoint(last[0].note)

    def _is_beginning(self, tree: StoredHashes, before: Checkpoint) -> bool:
        return before.size <= tree.size and tree.root(before.size) == before.root

    def _common_size(self, before: Checkpoint) -> int | None:
        """How many of the signed transfers the ledger still has, from the hashes of before."""
        path = self.folder / LOST_HASHES_FILE
        if not path.exists():
            return None
        try:
            with StoredHashes(path, before.size) as lost:
                if lost.root() != before.root:
                    return None
                common = 0
                for page in leaves.pages(self.ledger):
                    for transfer in page:
                        hashed = merkle.leaf_hash(entry_of(transfer))
                        if common == before.size or hashed != lost.read(0, common):
                            return common
                        common += 1
                return common
        except ProofError:
            return None

    @contextmanager
    def _tree(self) -> Iterator[StoredHashes]:
        with locked(self.folder), self._opened() as tree:
            yield tree

    @contextmanager
    def _opened(self) -> Iterator[StoredHashes]:
        """The tree over all transfers as of now."""
        head = self._head()
        with StoredHashes(self.folder / HASHES_FILE, head.size) as tree:
            for page in leaves.pages(self.ledger, head.size):
                tree.append(merkle.leaf_hash(entry_of(transfer)) for transfer in page)
            if tree.size > head.size:
                tree.sync()
                grown = Head(tree.size, tree.root().hex())
                write_durably(self.folder / HEAD_FILE, msgspec.json.encode(grown))
            yield tree

    def _head(self) -> Head:
        """Up to where the hashes can be relied on; they begin anew where they cannot."""
        try:
            head = msgspec.json.decode((self.folder / HEAD_FILE).read_bytes(), type=Head)
            with StoredHashes(self.folder / HASHES_FILE, head.size) as tree:
                sound = tree.root().hex() == head.root and self._has_last(head, tree)
        except (FileNotFoundError, msgspec.DecodeError, ProofError):
            sound = False
        if not sound:
            self._forget()
            return Head()
        return head

    def _has_last(self, head: Head, tree: StoredHashes) -> bool:
        """Whether the ledger still has the transfer that was hashed last, where it was."""
        if head.size == 0:
            return True
        last = self.ledger.transfers_after(head.size - 1, 1)
        return [merkle.leaf_hash(entry_of(each)) for each in last] == [tree.read(0, head.size - 1)]

    def _forget(self) -> None:
        (self.folder / HEAD_FILE).unlink(missing_ok=True)
        hashes = self.folder / HASHES_FILE
        if hashes.exists() and not (self.folder / LOST_HASHES_FILE).exists():
            hashes.rename(self.folder / LOST_HASHES_FILE)
        hashes.unlink(missing_ok=True)


def _read_lines(path: Path, kind: type[_Line], *, last: bool = False) -> list[_Line]:
    """The lines of one of the log's files, oldest first, or the last one only.

    Raises ProofError for a malformed line; half a line at the end was never acknowledged.
    """
    try:
        with path.open("rb") as stream:
            if last:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - 65_536))
            *lines, _ = stream.read().split(b"\n")
    except FileNotFoundError:
        return []
    try:
        return [msgspec.json.decode(line, type=kind) for line in (lines[-1:] if last else lines)]
    except msgspec.DecodeError as error:
        name = "checkpoint" if kind is Signed else "epoch"
        raise ProofError(
            f"{path} has a line that is no {name} ({error}); restore it from a backup"
        ) from None
