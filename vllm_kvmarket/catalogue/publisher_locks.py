"""Which publishing processes are alive: each holds a lock on a file for as long as it lives.

The system releases the lock when the process ends in any way, so that the publications of a crashed
process can be found and ended. Source: flock(2).
"""

from __future__ import annotations

import fcntl
import os
import uuid
from pathlib import Path


class Owner:
    """One process (or one catalogue in it) as a publisher. Not synchronised.

    Callers hold the database's write lock, so that no one looks at a file between its creation and
    its locking.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: int | None = None
        self.name = uuid.uuid4().hex

    def announce(self) -> None:
        """Show others that this process lives, until closed; deletes the files of dead ones."""
        if self._file is not None:
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in self._folder.iterdir():
            self.is_alive(file.name)
        self._file = os.open(
            self._folder / self.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
        )
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def is_alive(self, name: str) -> bool:
        """Say whether the owner of that name has announced itself and not ended since."""
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
        """Show others that this process has ended."""
        if self._file is not None:
            (self._folder / self.name).unlink(missing_ok=True)
            os.close(self._file)
            self._file = None
