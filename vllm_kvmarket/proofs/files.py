"""Files that are there whole and durable, or not at all."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_kvmarket.auth.signing_keys import sync_folder


def write_whole(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Put a file into a path's place; durable on return. Raises OSError."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(descriptor)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


def append_line(path: Path, line: bytes) -> None:
    """Append a line durably, behind the last whole one: half a line was never told to anybody."""
    is_new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "r+b") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 65_536))
        behind = stream.tell()
        tail = stream.read()
        end = behind + tail.rfind(b"\n") + 1
        stream.truncate(end)
        stream.seek(end)
        stream.write(line + b"\n")
        stream.flush()
        os.fsync(descriptor)
    if is_new:
        sync_folder(path.parent)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one thread of one process at a time work in a folder, which is made where needed."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
