"""Files that survive a crash whole, or not at all.

A durable write has four steps: write a draft beside the file, sync the draft, give it the file's
name, sync the folder. A crash at any moment leaves the old file or the new one, and perhaps a
draft. A draft's writer holds a lock on it, so a draft without a lock is left over and is removed by
the next writer.

`Files` is the seam between this package and the file system: everything that changes a file. Tests
replace it by one that forgets what was not synced.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

DRAFT_PREFIX = ".draft-"
_CANNOT_ALLOCATE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LAST_LINE_BYTES = 65_536


class Content(Protocol):
    """Something that can write itself into a file."""

    def write(self, descriptor: int, /) -> object:
        """Write everything. Raises OSError."""


class Files:
    """What the operating system does; every method raises OSError."""

    def boot_id(self) -> str:
        """A text that changes with each boot; a random one where the boot cannot be known."""
        try:
            return _BOOT_ID.read_text(encoding="ascii")
        except OSError:
            return secrets.token_hex(8)

    def create(self, path: Path, mode: int = 0o600) -> int:
        """Make a new, empty file; returns a descriptor to write it and to read it back."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)

    def allocate(self, descriptor: int, size: int) -> None:
        """Give a file its whole size at once, with its blocks where the file system can."""
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in _CANNOT_ALLOCATE:
                raise
            os.truncate(descriptor, size)

    def write(self, descriptor: int, content: Content) -> None:
        """Write something into its file."""
        content.write(descriptor)

    def record(self, descriptor: int, content: bytes) -> None:
        """Overwrite the beginning of a small file, by one call."""
        os.pwrite(descriptor, content, 0)

    def sync(self, descriptor: int) -> None:
        """Wait until a file's content is durable."""
        os.fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file another name; a file that had this name before is gone."""
        source.replace(target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name. Raises FileExistsError where the name is taken."""
        target.hardlink_to(source)

    def unlink(self, path: Path) -> None:
        """Remove a file; processes that have it open can go on."""
        path.unlink()

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and everything in it."""
        shutil.rmtree(path)

    def make_folder(self, path: Path) -> None:
        """Make a folder for this user alone; its parent must exist."""
        path.mkdir(mode=0o700)

    def sync_folder(self, path: Path) -> None:
        """Wait until the names in a folder are durable."""
        sync_path(path)


OS_FILES = Files()


@contextlib.contextmanager
def durable_file(
    path: Path, *, mode: int = 0o600, replace: bool = True, files: Files = OS_FILES
) -> Iterator[int]:
    """Give a block a descriptor, and make what it wrote the file `path`, durably.

    The file has its name, durably, when the block ends; when the block raises, nothing changed.
    With `replace=False` an existing file stays, and FileExistsError is raised. Raises OSError.
    """
    sweep_drafts(path.parent, path.name)
    draft, descriptor = _new_draft(path, mode, files)
    try:
        yield descriptor
        files.sync(descriptor)
        if replace:
            files.rename(draft, path)
        else:
            files.link(draft, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            files.unlink(draft)
        os.close(descriptor)
    files.sync_folder(path.parent)


def write_durably(
    path: Path,
    content: bytes,
    *,
    mode: int = 0o600,
    replace: bool = True,
    files: Files = OS_FILES,
) -> None:
    """Write a whole file durably; see `durable_file`. Raises OSError."""
    with (
        durable_file(path, mode=mode, replace=replace, files=files) as descriptor,
        os.fdopen(descriptor, "wb", closefd=False) as stream,
    ):
        stream.write(content)


def append_line(path: Path, line: bytes) -> None:
    """Append a line durably, and first remove a half line that a crash left. Raises OSError."""
    is_new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "r+b") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - _LAST_LINE_BYTES))
        behind = stream.tell()
        tail = stream.read()
        end = behind + tail.rfind(b"\n") + 1
        stream.truncate(end)
        stream.seek(end)
        stream.write(line + b"\n")
        stream.flush()
        os.fsync(descriptor)
    if is_new:
        sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one thread of one process at a time change a folder, which is made where needed."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def make_private(path: Path) -> None:
    """Take the rights of group and others off a file or folder of ours, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        status = path.stat()
        if status.st_mode & 0o077 and status.st_uid == os.geteuid():
            path.chmod(stat.S_IMODE(status.st_mode) & 0o700)


def draft_path(path: Path) -> Path:
    """A new draft's path beside `path`: random, as containers on one disk may share process ids."""
    return path.with_name(f"{DRAFT_PREFIX}{secrets.token_hex(8)}-{path.name}")


def _new_draft(path: Path, mode: int, files: Files) -> tuple[Path, int]:
    """Make a draft beside `path`, and lock it."""
    while True:
        draft = draft_path(path)
        descriptor = files.create(draft, mode)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return draft, descriptor
        # Another process has removed it before it was locked.
        os.close(descriptor)


def sweep_drafts(folder: Path, name: str | None = None) -> None:
    """Remove drafts that no process writes any more, of one file or of all. Raises nothing."""
    pattern = "*" if name is None else f"*-{glob.escape(name)}"
    for draft in folder.glob(DRAFT_PREFIX + pattern):
        with _left_over(draft) as is_left, contextlib.suppress(OSError):
            if is_left:
                draft.unlink()


def is_being_written(draft: Path) -> bool:
    """Whether a living process holds the draft's lock; True when that cannot be found out."""
    with _left_over(draft) as is_left:
        return not is_left


@contextlib.contextmanager
def _left_over(draft: Path) -> Iterator[bool]:
    """Whether nobody writes a draft; its lock is held meanwhile, so that nobody begins to."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(draft, flags)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_left = True
        except OSError as error:
            # A link is no draft of ours, and can go.
            is_left = error.errno in (errno.ELOOP, errno.ENOENT)
        yield is_left
