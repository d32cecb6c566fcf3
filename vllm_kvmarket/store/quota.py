"""How many bytes a store's folder takes: one number, shared by all processes that write to it.

The number is in a small file, whose lock is the store's lock. It grows before a file is written and
shrinks after a file is gone. So a process that dies leaves the number too high, never too low.
After the machine itself went down, it is unknown what was written last, and the folder is counted
again. Every file gets its whole size at once, and every name changes under the lock, so a count is
always right.

The number is the size of all files below the folder, also those of other programs. It does not
include this file, folders, and the rest of a file system's last block.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from vllm_kvmarket.core.durable_files import Files
from vllm_kvmarket.store.chunk_format import is_chunk_file

RECORD_NAME = ".usage"
_MAGIC = b"KVMUSAGE"
# Magic, bytes used, what folder of which boot they were counted in; a checksum follows.
_RECORD = struct.Struct("<8sQQ")
_CHECKSUM = struct.Struct("<Q")
_RECORD_BYTES = _RECORD.size + _CHECKSUM.size
# A full store must not be counted again for each chunk that does not fit.
RECOUNT_INTERVAL_S = 10.0
# No space on the device, in the user's quota, or under the process's limit (ulimit -f).
DEVICE_IS_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Files that are used while they are looked at are skipped; another scan finds others.
_MAX_SCANS = 3


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """What a store's folder contains, in bytes and in files.

    `bytes_used` counts everything: chunks, drafts, quarantine. `free_bytes` is what can still be
    written, within the quota and on the device. Quarantined files count as free, because they are
    deleted when space is needed.
    """

    bytes_used: int
    quota_bytes: int | None
    free_bytes: int
    chunk_files: int
    quarantined_files: int
    quarantined_bytes: int
    drafts: int


class ByteCount:
    """The number, while its lock is taken."""

    def __init__(self, folder: Path, descriptor: int, files: Files, boot_id: str) -> None:
        self.used = 0
        self._folder = folder
        self._descriptor = descriptor
        self._files = files
        state = folder.stat()
        place = f"{boot_id}:{state.st_dev}:{state.st_ino}"
        self._place = xxhash.xxh3_64_intdigest(place.encode())
        self._load()

    def grow(self, size: int) -> None:
        """Count bytes before they are written. Raises OSError, and counts nothing then."""
        self._save(self.used + size)
        self.used += size

    def shrink(self, size: int) -> None:
        """Count bytes that are gone."""
        self.used = max(0, self.used - size)
        # A number that stays too high is corrected by the next count.
        with contextlib.suppress(OSError):
            self._save(self.used)

    def recount(self) -> None:
        """Count everything that is in the folder. Raises OSError."""
        self.used = tree_bytes(self._folder)
        with contextlib.suppress(OSError):
            self._save(self.used)

    def _load(self) -> None:
        record = os.pread(self._descriptor, _RECORD_BYTES, 0)
        if len(record) == _RECORD_BYTES:
            magic, used, place = _RECORD.unpack_from(record)
            (checksum,) = _CHECKSUM.unpack_from(record, _RECORD.size)
            intact = xxhash.xxh3_64_intdigest(record[: _RECORD.size]) == checksum
            if intact and magic == _MAGIC and place == self._place:
                self.used = used
                return
        self.recount()

    def _save(self, used: int) -> None:
        facts = _RECORD.pack(_MAGIC, used, self._place)
        checksum = _CHECKSUM.pack(xxhash.xxh3_64_intdigest(facts))
        self._files.record(self._descriptor, facts + checksum)


class Quota:
    """One folder's number and its limits.

    `quota_bytes` limits the folder; None is no limit. `reserve_bytes` of the device stay free for
    the ledger, whose database is on the same device.
    """

    def __init__(
        self, folder: Path, quota_bytes: int | None, files: Files, reserve_bytes: int = 0
    ) -> None:
        self.quota_bytes = quota_bytes
        self.reserve_bytes = reserve_bytes
        self._folder = folder
        self._files = files
        # A process does not outlive the boot that it began in.
        self._boot_id = files.boot_id()
        self._counted_at_s = -RECOUNT_INTERVAL_S

    @contextlib.contextmanager
    def locked(self) -> Iterator[ByteCount]:
        """Take the lock, which excludes all other threads and processes. Raises OSError.

        A thread must not take it twice. The file is opened each time, because a lock belongs to an
        open file, and threads, or a process and its fork, must not share one.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(f"{self._folder}/{RECORD_NAME}", flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                yield ByteCount(self._folder, descriptor, self._files, self._boot_id)
            finally:
                # Closing alone would not unlock while a fork of this process has the file open.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)

    def excess(self, count: ByteCount, size: int) -> int:
        """How many bytes must be deleted before `size` more fit; not positive when they fit.

        Raises OSError.
        """
        excess = 0 if self.quota_bytes is None else count.used + size - self.quota_bytes
        return max(excess, self.reserve_excess(size)) if self.reserve_bytes else excess

    def reserve_excess(self, size: int = 0) -> int:
        """How many of `size` more bytes would be taken from the reserve. Raises OSError."""
        return size + self.reserve_bytes - self._device_bytes()

    def free_bytes(self, used: int) -> int:
        """Bytes that still fit, within the quota and outside the reserve. Raises OSError."""
        free = self._device_bytes() - self.reserve_bytes
        if self.quota_bytes is not None:
            free = min(free, self.quota_bytes - used)
        return max(0, free)

    def _device_bytes(self) -> int:
        device = os.statvfs(self._folder)
        return device.f_bavail * device.f_frsize

    def recount_if_due(self, count: ByteCount) -> None:
        """Count the folder again, but not more often than RECOUNT_INTERVAL_S. Raises OSError."""
        now_s = time.monotonic()
        if now_s - self._counted_at_s >= RECOUNT_INTERVAL_S:
            self._counted_at_s = now_s
            count.recount()


class LeastRecentlyUsed:
    """Deletes a cache's chunk files, least recently used first; call it under the store's lock.

    The time of a file's last use is its modification time, which the store sets on each open. The
    order is read from the folder once and then used up: a file that was not used since then is
    still older than every file that was.
    """

    def __init__(self, root: Path, files: Files) -> None:
        self._root = root
        self._files = files
        self._oldest_first: deque[tuple[int, str]] = deque()

    def evict(self, count: ByteCount, size: int) -> None:
        """Delete files until `size` bytes are free, or no file is left. Raises OSError."""
        scans = 0
        while size > 0:
            if not self._oldest_first:
                if scans == _MAX_SCANS or not self._scan():
                    return
                scans += 1
            used_ns, path = self._oldest_first.popleft()
            try:
                state = os.lstat(path)
            except FileNotFoundError:
                continue
            if state.st_mtime_ns == used_ns:
                self._files.unlink(Path(path))
                count.shrink(state.st_size)
                size -= state.st_size

    def _scan(self) -> bool:
        found = []
        for folder in self._root.glob("??"):
            with os.scandir(folder) as entries:
                found += [
                    (entry.stat(follow_symlinks=False).st_mtime_ns, entry.path)
                    for entry in entries
                    if is_chunk_file(entry.name) and entry.is_file(follow_symlinks=False)
                ]
        self._oldest_first = deque(sorted(found))
        return bool(found)


def tree_bytes(folder: Path | str) -> int:
    """Bytes of all files below a folder, without the record of a store. Raises OSError."""
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            # Another process may delete a file at this moment.
            with contextlib.suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    total += tree_bytes(entry.path)
                elif entry.name != RECORD_NAME:
                    total += entry.stat(follow_symlinks=False).st_size
    return total
