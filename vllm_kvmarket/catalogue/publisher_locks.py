"""Which publishing processes are alive: each holds a lock on a file for as long as it lives.

The system releases the lock when the process ends in any way, so that the publications of a crashed
process can be found and ended. Source: flock(2).
"""

from __future__ import annotations

import fcntl
import os
import uuid
from pathlib import Path

from vllm_kvmarket.core.database import Connection


class LockedFile:
    """See connections.Owner. Not synchronised."""

    # A lock is never lost while its process lives.
    is_certain = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: int | None = None
        self.name = uuid.uuid4().hex

    def announce(self, db: Connection) -> None:
        """See connections.Owner. Deletes the files of dead processes."""
        if self._file is not None:
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in self._folder.iterdir():
            self.is_alive(db, file.name)
        self._file = os.open(
            self._folder / self.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
        )
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def is_alive(self, db: Connection, name: str) -> bool:
        """See connections.Owner."""
        if name == self.name:
            return self._file is not None
        path = self._folder / name
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        else:
            path.unlink(missing_ok=True)
            return False
        finally:
            os.close(file)

    def close(self) -> None:
        """See connections.Owner."""
        if self._file is not None:
            (self._folder / self.name).unlink(missing_ok=True)
            os.close(self._file)
            self._file = None
