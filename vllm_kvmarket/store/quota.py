"""How many bytes a store's folder takes: one number, kept by all processes that write to it.

The number lies in a small file, whose lock is the store's lock. It grows before a file does and
shrinks after a file is gone, so that a process that dies leaves it too high and never too low. When
the machine itself went down, nobody knows what was written last: the folder is counted again. Every
file is given its whole size and every name is changed under the lock: a count is always right.

What is counted are the sizes of all files below the folder, whoever put them there, without this
one, folders, and blocks that the file system fills up.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from vllm_kvmarket.core.durable_files import Files

RECORD_NAME = ".usage"
_MAGIC = b"KVMUSAGE"
# Magic, bytes used, what folder of which boot they were counted in; a checksum follows.
_RECORD = struct.Struct("<8sQQ")
_CHECKSUM = struct.Struct("<Q")
_RECORD_BYTES = _RECORD.size + _CHECKSUM.size
# A store that is really full must not be counted for each chunk that finds no room.
RECOUNT_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """What a store's folder holds, in bytes and in files.

    `bytes_used` counts everything: chunks, drafts, quarantine. `free_bytes` is what can still be
    written, within the quota and on the device; quarantined files make room when it is needed, so
    that their bytes count as free as well.
    """

    bytes_used: int
    quota_bytes: int | None
    free_bytes: int
    chunk_files: int
    quarantined_files: int
    quarantined_bytes: int
    drafts: int


class Held:
    """The number while its lock is held."""

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
        """Count bytes that are about to be written. Raises OSError, and counts nothing then."""
        self._save(self.used + size)
        self.used += size

    def shrink(self, size: int) -> None:
        """Count bytes that are gone."""
        self.used = max(0, self.used - size)
        # A number that stays too high is put right by the next count.
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
    """The number of one folder and what it may grow to; None: as much as there is."""

    def __init__(self, folder: Path, quota_bytes: int | None, files: Files) -> None:
        self.quota_bytes = quota_bytes
        self._folder = folder
        self._files = files
        # A process does not outlive the boot that it began in.
        self._boot_id = files.boot_id()
        self._counted_at_s = -RECOUNT_INTERVAL_S

    @contextlib.contextmanager
    def hold(self) -> Iterator[Held]:
        """Take the lock, which excludes all threads and processes. Raises OSError.

        Not to be taken twice by one thread. The file is opened each time: a lock belongs to an open
        file, and threads, or a process and its fork, must not share one.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(f"{self._folder}/{RECORD_NAME}", flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                yield Held(self._folder, descriptor, self._files, self._boot_id)
            finally:
                # Closing alone would not unlock while a fork of this process has the file open.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)

    def missing(self, held: Held, size: int) -> int:
        """How many bytes must go before `size` more fit; not positive when they fit."""
        return 0 if self.quota_bytes is None else held.used + size - self.quota_bytes

    def free_bytes(self, used: int) -> int:
        """Bytes that still fit, on the device and within the quota. Raises OSError."""
        device = os.statvfs(self._folder)
        free = device.f_bavail * device.f_frsize
        return free if self.quota_bytes is None else max(0, min(free, self.quota_bytes - used))

    def recount_if_due(self, held: Held) -> None:
        """Count again what may be less than the number says, now and then. Raises OSError."""
        now_s = time.monotonic()
        if now_s - self._counted_at_s >= RECOUNT_INTERVAL_S:
            self._counted_at_s = now_s
            held.recount()


def tree_bytes(folder: Path | str) -> int:
    """Bytes of all files below a folder, without the record of a store. Raises OSError."""
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            # Somebody else's file may go just now.
            with contextlib.suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    total += tree_bytes(entry.path)
                elif entry.name != RECORD_NAME:
                    total += entry.stat(follow_symlinks=False).st_size
    return total
