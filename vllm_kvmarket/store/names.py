"""How the files of a chunk are called, on the disk and in an object store."""

from __future__ import annotations

import re

SUFFIX = ".kv"
_NAME = re.compile(r"([0-9a-f]{64})(?:\.(\d+)of(\d+))?" + re.escape(SUFFIX))


def chunk_name(key: bytes, rank: int = 0, world_size: int = 1) -> str:
    """Where a chunk's file is in its store: `ab/abcd....kv`, or a rank's `ab/abcd....1of2.kv`."""
    name = key.hex()
    share = "" if world_size == 1 else f".{rank}of{world_size}"
    return f"{name[:2]}/{name}{share}{SUFFIX}"


def is_chunk_file(name: str) -> bool:
    """Whether a file that is called so, without its folder, belongs to a chunk."""
    return _NAME.fullmatch(name) is not None


def share_of(name: str) -> tuple[int, int] | None:
    """The (rank, world_size) of a file that is called so, without its folder.

    None where no share is called so: a rank that cannot be, a name with zeros in front.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    rank, world_size = int(found[2] or 0), int(found[3] or 1)
    canonical = chunk_name(bytes.fromhex(found[1]), rank, world_size)[3:]
    return (rank, world_size) if rank < world_size and name == canonical else None
