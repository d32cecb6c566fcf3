"""Damaged chunk files: where no reader finds them, for a while, so that an operator can look.

Everything about a file is in its name: when it was moved, its old name, and why. It is moved by one
rename, which a crash cannot leave half done and which needs no space.
"""

from __future__ import annotations

import contextlib
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from vllm_kvmarket.core.durable_files import Files
from vllm_kvmarket.store.quota import ByteCount, tree_bytes

QUARANTINE_FOLDER = "quarantine"
MAX_FILES = 1000
_MAX_NAME_BYTES = 255
_SEPARATOR = "~"
_READABLE = " ,.;:()'=+"


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A damaged file: its old name, what was wrong, its bytes, when it was moved (Unix time)."""

    name: str
    reason: str
    bytes: int
    at_s: float
    path: Path


class Quarantine:
    """The folder of damaged files below a store's folder; change it under the store's lock."""

    def __init__(self, root: Path, limit_bytes: int, files: Files) -> None:
        self._folder = root / QUARANTINE_FOLDER
        self._limit_bytes = limit_bytes
        self._files = files

    def add(self, count: ByteCount, path: Path, reason: str) -> None:
        """Move a file, or a folder in its place; delete the oldest when there are too many.

        Raises OSError when it cannot be moved.
        """
        with contextlib.suppress(FileExistsError):
            self._files.make_folder(self._folder)
        self._files.rename(path, self._folder / _name(path.name, reason))
        entries = self.entries()
        total = sum(entry.bytes for entry in entries)
        while entries and (len(entries) > MAX_FILES or total > self._limit_bytes):
            total -= entries[0].bytes
            self._remove(count, entries.pop(0))

    def entries(self) -> list[Quarantined]:
        """The files, oldest first. Raises OSError."""
        try:
            paths = sorted(self._folder.iterdir())
        except FileNotFoundError:
            return []
        found = (_entry(path) for path in paths)
        return [entry for entry in found if entry is not None]

    def evict(self, count: ByteCount, size: int) -> None:
        """Delete the oldest until `size` bytes are free, or no file is left. Raises OSError."""
        for entry in self.entries():
            if size <= 0:
                return
            self._remove(count, entry)
            size -= entry.bytes

    def discard(self, count: ByteCount, beginning: str) -> None:
        """Delete the files whose old names begin so. Raises OSError."""
        for entry in self.entries():
            if entry.name.startswith(beginning):
                self._remove(count, entry)

    def _remove(self, count: ByteCount, entry: Quarantined) -> None:
        if entry.path.is_dir() and not entry.path.is_symlink():
            # It is unknown whether its bytes were counted; the next count corrects that.
            self._files.remove_tree(entry.path)
            return
        self._files.unlink(entry.path)
        count.shrink(entry.bytes)


def _entry(path: Path) -> Quarantined | None:
    at_ns, _, rest = path.name.partition(_SEPARATOR)
    original, _, reason = rest.partition(_SEPARATOR)
    if not at_ns.isdecimal() or not original:
        return None
    try:
        state = path.lstat()
        size = tree_bytes(path) if stat.S_ISDIR(state.st_mode) else state.st_size
    except FileNotFoundError:
        return None
    return Quarantined(original, unquote(reason), size, int(at_ns) / 1e9, path)


def _name(original: str, reason: str) -> str:
    """Put everything into one file name, and cut a reason that is too long."""
    # Errors of the store begin with the file's name.
    reason = reason.removeprefix(f"{original}: ")[:_MAX_NAME_BYTES]
    front = f"{time.time_ns():020d}{_SEPARATOR}{original}{_SEPARATOR}"
    while len(front) + len(quote(reason, safe=_READABLE)) > _MAX_NAME_BYTES:
        reason = reason[:-1]
    return front + quote(reason, safe=_READABLE)
