"""A log's subtree hashes in an append-only file: 64 bytes a leaf, any of them found at once.

The file is a copy of what follows from the ledger's transfers, kept so that nobody has to hash a
million of them again. It may be removed at any time, and is made anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from vllm_kvmarket.proofs import merkle
from vllm_kvmarket.proofs.errors import ProofError
from vllm_kvmarket.proofs.merkle import HASH_BYTES


class StoredHashes:
    """The whole subtrees of a tree of `size` leaves; opened for one operation at a time."""

    def __init__(self, path: Path, size: int) -> None:
        """Open the file, making it where there is none; what lies behind `size` leaves goes."""
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.size = size
        end = merkle.stored_count(size) * HASH_BYTES
        if os.fstat(self._descriptor).st_size > end:
            os.ftruncate(self._descriptor, end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)

    def read(self, level: int, number: int) -> bytes:
        """See merkle.Read. Raises ProofError when the file does not have it."""
        position = merkle.stored_position(level, number) * HASH_BYTES
        found = os.pread(self._descriptor, HASH_BYTES, position)
        if len(found) != HASH_BYTES:
            raise ProofError(f"{self._path} is shorter than its log; see `kvmarket audit-ledger`")
        return found

    def append(self, leaves: Iterable[bytes]) -> None:
        """Grow by the hashes of new leaves; mutates the file, see `sync`."""
        end = merkle.frontier(self.read, self.size)
        completed = b"".join(node for leaf in leaves for node in end.append(leaf))
        position = merkle.stored_count(self.size) * HASH_BYTES
        while completed:
            written = os.pwrite(self._descriptor, completed, position)
            completed, position = completed[written:], position + written
        self.size = end.size

    def root(self, size: int | None = None) -> bytes:
        """The root of the first `size` leaves, of all unless told."""
        return merkle.root(self.read, self.size if size is None else size)

    def sync(self) -> None:
        """Make what was appended durable."""
        os.fsync(self._descriptor)
