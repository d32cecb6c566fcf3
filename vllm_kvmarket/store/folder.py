"""A store's folder: where the file of each chunk is, and which are there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from vllm_kvmarket.core.durable_files import Files
from vllm_kvmarket.store.names import chunk_name, is_chunk_file, share_of


class ChunkFolder:
    """Finds chunk files below `root`, and makes the folders that they need, durably."""

    def __init__(self, root: Path, files: Files) -> None:
        self.root = root
        self._files = files
        self._durable: set[Path] = set()

    def location(self, key: bytes, rank: int = 0, world_size: int = 1) -> Path:
        """Where a chunk's file is, or would be."""
        return self.root / chunk_name(key, rank, world_size)

    path = location

    def has(self, key: bytes, rank: int = 0, world_size: int = 1) -> bool:
        """Whether there is a file for this chunk; it may still be damaged."""
        return self.location(key, rank, world_size).is_file()

    def shares(self, key: bytes) -> list[tuple[int, int]]:
        """The (rank, world_size) of each file of a chunk that is there; some may be bad."""
        found = [(share_of(file.name), file) for file in self._files_of(key)]
        return sorted(share for share, file in found if share is not None and file.is_file())

    def keys(self) -> Iterator[bytes]:
        """Every chunk that has a file, whole or damaged, in order of its key."""
        last = ""
        for entry in self._chunk_files():
            name = entry.name[:64]
            if name != last:
                yield bytes.fromhex(name)
            last = name

    def bytes_used(self) -> int:
        """Bytes of all chunk files; see `usage` for what counts for the quota."""
        used = 0
        for entry in self._chunk_files():
            # Another process may delete it just now.
            with contextlib.suppress(FileNotFoundError):
                used += entry.stat().st_size
        return used

    def _chunk_files(self) -> Iterator[os.DirEntry[str]]:
        """Every chunk's files in order; by name alone, as there may be a million."""
        for folder in sorted(self.root.glob("??")):
            # Files by other names, or in the folder of other keys, are none of ours.
            found = [e for e in _scan(folder) if e.name[:2] == folder.name]
            yield from sorted(filter(_is_chunk_file, found), key=_name_of)

    def _files_of(self, key: bytes) -> list[Path]:
        name = key.hex()
        found = [e for e in _scan(self.root / name[:2]) if e.name.startswith(name)]
        return sorted(Path(entry.path) for entry in filter(_is_chunk_file, found))

    def _make_durable(self, folder: Path) -> None:
        """Make sure that a folder's names survive a crash. Raises OSError."""
        self._make_folder(folder)
        self._files.sync_folder(folder)

    def _make_folder(self, folder: Path) -> None:
        """Make a folder and those above it, durably. Raises OSError."""
        try:
            self._files.make_folder(folder)
        except FileNotFoundError:
            self._make_folder(folder.parent)
            with contextlib.suppress(FileExistsError):
                self._files.make_folder(folder)
        except FileExistsError:
            if folder in self._durable:
                return
        # Also when it was there: another process may have made it and not have got this far yet.
        self._files.sync_folder(folder.parent)
        self._durable.add(folder)


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder; nothing where there is none."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_chunk_file(entry: os.DirEntry[str]) -> bool:
    return is_chunk_file(entry.name)


def _name_of(entry: os.DirEntry[str]) -> str:
    return entry.name
