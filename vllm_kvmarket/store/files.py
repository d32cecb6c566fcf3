"""The seam between the disk tier and its file system: everything that changes a file.

One method a step that can fail, or be the last before a crash: tests put an implementation in its
place that forgets what was not synced. Opening, reading, locking and closing are not here, as they
change nothing.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from pathlib import Path

from vllm_kvmarket.store.chunk_format import PreparedChunk

_CANNOT_ALLOCATE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Files:
    """What the operating system does; every method raises OSError."""

    def boot_id(self) -> str:
        """What changes when the machine was down; always another where that cannot be known."""
        try:
            return _BOOT_ID.read_text(encoding="ascii")
        except OSError:
            return secrets.token_hex(8)

    def create(self, path: Path) -> int:
        """Make a new, empty file; a descriptor to write it and read it back."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return os.open(path, flags, 0o644)

    def allocate(self, descriptor: int, size: int) -> None:
        """Give a file its whole size at once; where the file system can, its blocks as well."""
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in _CANNOT_ALLOCATE:
                raise
            os.truncate(descriptor, size)

    def write(self, descriptor: int, chunk: PreparedChunk) -> None:
        """Write a chunk into its file."""
        chunk.write(descriptor)

    def record(self, descriptor: int, content: bytes) -> None:
        """Overwrite the beginning of a small file, by one call."""
        os.pwrite(descriptor, content, 0)

    def sync(self, descriptor: int) -> None:
        """Wait until a file's content is durable."""
        os.fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file another name; a file that had the name is gone."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Remove a file; who has it open can go on."""
        path.unlink()

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and what is in it."""
        shutil.rmtree(path)

    def make_folder(self, path: Path) -> None:
        """Make a folder whose parent is there."""
        path.mkdir()

    def sync_folder(self, path: Path) -> None:
        """Wait until the names in a folder are durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


OS_FILES = Files()
