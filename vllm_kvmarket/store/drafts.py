"""Files in the making: of full size from the start, locked by their writer, swept when it died."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from dataclasses import dataclass
from pathlib import Path

from vllm_kvmarket.core.durable_files import DRAFT_PREFIX, Files, draft_path, is_being_written
from vllm_kvmarket.store.quota import Held


@dataclass(slots=True)
class Draft:
    """A file in the making; `is_placed` once it has its name."""

    path: Path
    descriptor: int
    size: int
    is_placed: bool = False

    def close(self) -> None:
        """Unlock and close the file."""
        # Closing alone would not unlock while a fork of this process has the file open.
        with contextlib.suppress(OSError):
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self.descriptor)


def begin(files: Files, held: Held, target: Path, size: int) -> Draft:
    """Make a draft of `size` bytes beside `target`. Raises OSError, and leaves nothing then."""
    path = draft_path(target)
    held.grow(size)
    descriptor = -1
    try:
        descriptor = files.create(path)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        files.allocate(descriptor, size)
    except BaseException:
        if descriptor < 0:
            held.shrink(size)
        else:
            os.close(descriptor)
            discard(files, held, path, size)
        raise
    return Draft(path, descriptor, size)


def discard(files: Files, held: Held, path: Path, size: int) -> None:
    """Remove a draft; one that cannot be removed is left to the sweeper, and stays counted."""
    # One that is not there may have got its name just before it was interrupted.
    with contextlib.suppress(OSError):
        files.unlink(path)
        held.shrink(size)


def sweep(files: Files, held: Held, root: Path, older_than_s: float) -> int:
    """Remove drafts that nobody writes any more, and count anew; how many. Raises OSError."""
    swept = 0
    for path in root.glob(f"??/{DRAFT_PREFIX}*"):
        # Under the store's lock only somebody else's hand removes them.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.lstat().st_mtime < older_than_s or is_being_written(path):
                continue
            if path.is_dir() and not path.is_symlink():
                files.remove_tree(path)
            else:
                files.unlink(path)
            swept += 1
    # What died between counting and writing left no file behind.
    held.recount()
    return swept
