"""Which chunk files of a cache go first: those that were not used for the longest time.

The time of a file's last use is its modification time, which the store sets when it is opened.
"""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

from vllm_kvmarket.core.durable_files import Files
from vllm_kvmarket.store.names import is_chunk_file
from vllm_kvmarket.store.quota import Held

# Files that are used while they are looked at are passed over; more rounds find others.
_MAX_SCANS = 3


class LeastRecentlyUsed:
    """Removes chunk files by age; every method is called under the store's lock.

    The order is read from the folder once and then used up: what was not used since then is still
    older than everything that was.
    """

    def __init__(self, root: Path, files: Files) -> None:
        self._root = root
        self._files = files
        self._oldest_first: deque[tuple[int, str]] = deque()

    def give_up(self, held: Held, size: int) -> None:
        """Remove files until `size` bytes are free, or nothing is left. Raises OSError."""
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
                held.shrink(state.st_size)
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
