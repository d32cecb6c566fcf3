"""Batches that must be booked, in files of the home until they are: they outlive this process.

Each process appends to its own file, <home>/outbox/<random>.jsonl, and holds a lock on it. An
entry is written before its batch is submitted, without waiting for the disk, so that it survives
kill -9; while the ledger is away it is also synced, so that it survives a power cut. A file without
a lock belongs to a process that is gone: any process of the home submits its entries again. Their
ids make sure that nothing is booked twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import msgspec

from vllm_kvmarket.core.durable_files import append_line, sync_path
from vllm_kvmarket.ledger.model import Operation, Receipt, Result
from vllm_kvmarket.ledger.storage import Batch

logger = logging.getLogger(__name__)

SUFFIX = ".jsonl"
REFUSED_FILE = "refused.txt"
# A file with fewer bytes than this is emptied when the process ends, not before.
MOST_IDLE_BYTES = 1 << 16


class Entry(msgspec.Struct, frozen=True):
    """A line of an outbox."""

    operations: tuple[Operation, ...]
    linked: bool
    receipt: Receipt | None


_ENCODER = msgspec.json.Encoder()


class Outbox:
    """One process's entries; thread-safe. Nothing is made before the first entry."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder
        self._descriptor: int | None = None
        self._lock = threading.Lock()
        self._open = 0
        self._bytes = 0
        self._unsynced = False

    def add(self, batch: Batch) -> bool:
        """Write an entry, which survives this process; whether that was possible."""
        line = _ENCODER.encode(Entry(batch.operations, batch.linked, batch.receipt)) + b"\n"
        with self._lock:
            try:
                if self._descriptor is None:
                    self._descriptor = self._create()
                if os.write(self._descriptor, line) != len(line):
                    os.ftruncate(self._descriptor, self._bytes)
                    raise OSError("the disk is full")
            except OSError as error:
                logger.error("kvmarket: %s cannot be written: %s", self._path, error)
                return False
            self._open += 1
            self._bytes += len(line)
            self._unsynced = True
            return True

    def sync(self) -> None:
        """Make what was added durable. Raises OSError."""
        with self._lock:
            if self._descriptor is not None and self._unsynced:
                os.fsync(self._descriptor)
                self._unsynced = False

    def booked(self) -> None:
        """Forget an entry: the ledger has it. A leftover of a few booked entries does no harm."""
        with self._lock:
            self._open -= 1
            if self._open == 0 and self._bytes > MOST_IDLE_BYTES and self._descriptor is not None:
                os.ftruncate(self._descriptor, 0)
                self._bytes = 0

    def close(self) -> None:
        """End; the file stays when the ledger lacks some of it. Raises nothing."""
        with self._lock:
            if self._descriptor is None:
                return
            with contextlib.suppress(OSError):
                if self._open:
                    os.fsync(self._descriptor)
                else:
                    self._path.unlink()
            os.close(self._descriptor)
            self._descriptor = None

    def abandoned(self) -> Iterator[list[Entry]]:
        """The entries of each process that is gone. Its file is removed when the caller goes on."""
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if path == self._path:
                continue
            with contextlib.suppress(FileNotFoundError), path.open("rb") as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                # Another process may have booked it, and removed it, just before.
                if os.fstat(stream.fileno()).st_nlink:
                    yield list(_entries(path, stream.read()))
                    self.sync()
                    path.unlink()
                    sync_path(self.folder)

    def refused(self, batch: Batch, reason: str) -> None:
        """Record a sale that the ledger's rules refuse for ever. Raises nothing."""
        if batch.receipt is None:
            return
        logger.error("kvmarket: receipt %s is not booked: %s", batch.receipt.id, reason)
        line = _ENCODER.encode(Entry(batch.operations, batch.linked, batch.receipt))
        with contextlib.suppress(OSError):
            append_line(self.folder / REFUSED_FILE, reason.encode() + b"\t" + line)

    def _create(self) -> int:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._open = self._bytes = 0
        while True:
            self._path = self.folder / f"{secrets.token_hex(8)}{SUFFIX}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            descriptor = os.open(self._path, flags, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Another process may have taken the new file, without its lock, for an abandoned one.
            if os.fstat(descriptor).st_nlink:
                sync_path(self.folder)
                return descriptor
            os.close(descriptor)


def _entries(path: Path, content: bytes) -> Iterator[Entry]:
    *lines, half = content.split(b"\n")
    if half:
        logger.warning("kvmarket: %s ends in half an entry, which was never acknowledged", path)
    for line in lines:
        try:
            yield msgspec.json.decode(line, type=Entry)
        except msgspec.DecodeError as error:
            logger.error("kvmarket: %s has a damaged entry: %s", path, error)


def batch_of(entry: Entry) -> Batch:
    """The entry as it was submitted."""
    future: Future[list[Result]] = Future()
    return Batch(entry.operations, entry.linked, entry.receipt, future, None, float("inf"))
