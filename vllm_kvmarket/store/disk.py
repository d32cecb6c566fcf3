"""The disk tier: a file a chunk, named by its key, durable before anyone is told of it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from vllm_kvmarket.errors import ChunkMissingError, StoreError, StoreFullError
from vllm_kvmarket.store import chunkfile
from vllm_kvmarket.store.chunkfile import Bytes
from vllm_kvmarket.store.layout import ChunkHeader, ChunkLayout
from vllm_kvmarket.store.reader import StoredChunk, open_chunk

CHUNKS_FOLDER = "chunks"  # of a market's home
SUFFIX = ".kv"
TEMPORARY_PREFIX = ".draft-"
# No room on the device, in the user's quota, or under the process's limit (ulimit -f).
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NAME = re.compile(r"[0-9a-f]{64}(?:\.\d+of\d+)?" + re.escape(SUFFIX))


class DiskStore:
    """Chunk files under one folder; thread-safe, and safe for several processes."""

    def __init__(self, root: Path) -> None:
        """Make the folder where there is none. Raises StoreError."""
        self.root = root
        self._durable: set[Path] = set()
        try:
            if not root.is_dir():
                self._make_folder(root)
        except OSError as error:
            raise StoreError(
                f"cannot make the store's folder {root} ({error.strerror}); "
                "make it yourself, or choose another home"
            ) from error

    def path(self, key: bytes, rank: int = 0, world_size: int = 1) -> Path:
        """Where a chunk's file is, or would be."""
        return Path(self._location(key, rank, world_size))

    def _location(self, key: bytes, rank: int, world_size: int) -> str:
        # A string, as making a Path takes as long as opening the file.
        name = key.hex()
        share = "" if world_size == 1 else f".{rank}of{world_size}"
        return f"{self.root}/{name[:2]}/{name}{share}{SUFFIX}"

    def put(
        self,
        *,
        key: bytes,
        parent: bytes,
        namespace: bytes,
        tokens: bytes,
        layout: ChunkLayout,
        layers: Sequence[Sequence[Bytes]],
    ) -> int:
        """Store a chunk durably; how many bytes were written, 0 when it was there, whole, already.

        `layers`: for each layer its pages, dense uint8 arrays, one after another, which must not
        change meanwhile; they are written from where they lie. What is there but damaged, or has
        another layout, is replaced. Any number of writers of one key may run at once.

        Raises StoreFullError; StoreError; ValueError when the pages do not fit the layout or the
        key. No temporary file is left, and what was there before is still there.
        """
        header = chunkfile.build_header(
            key=key, parent=parent, namespace=namespace, tokens=tokens, layout=layout, layers=layers
        )
        path = self.path(key, layout.rank, layout.world_size)
        if _is_whole(path, key, layout, namespace):
            return 0
        draft = _temporary(path)
        try:
            self._make_folder(path.parent)
            written = _write_draft(draft, header, layers)
            _put_in_place(draft, path)
            _sync_folder(path.parent)
        except OSError as error:
            raise self._cannot_store(path, error) from error
        finally:
            with contextlib.suppress(OSError):
                draft.unlink()
        return written

    def open(self, key: bytes, layout: ChunkLayout, namespace: bytes) -> StoredChunk:
        """Open a chunk for loading into this layout; close it again, or use it in a `with`.

        Raises ChunkMissingError, ChunkDamagedError, LayoutMismatchError, StoreError; see
        reader.open_chunk for what is verified when.
        """
        path = self._location(key, layout.rank, layout.world_size)
        return open_chunk(path, key, layout, namespace)

    def has(self, key: bytes, rank: int = 0, world_size: int = 1) -> bool:
        """Whether there is a file for this chunk; it may still be damaged."""
        return self.path(key, rank, world_size).is_file()

    def verify(self, key: bytes) -> None:
        """Check every byte of every rank's file of a chunk.

        Raises ChunkMissingError, ChunkDamagedError, LayoutMismatchError (a format that this
        kvmarket does not know), StoreError.
        """
        files = self._files_of(key)
        if not files:
            raise ChunkMissingError(
                f"{key.hex()}{SUFFIX}: no such chunk in the store; publish its document again"
            )
        for file in files:
            with open_chunk(file, key) as chunk:
                chunk.verify()
                layout = chunk.header.layout
            if file != self.path(key, layout.rank, layout.world_size):
                raise chunkfile.damaged(
                    file.name, f"holds the share of rank {layout.rank} of {layout.world_size}"
                )

    def delete(self, key: bytes) -> None:
        """Remove a chunk's files, if there are any; readers that have it open can go on."""
        for file in self._files_of(key):
            with contextlib.suppress(FileNotFoundError):
                try:
                    file.unlink()
                except IsADirectoryError:
                    file.rename(_temporary(file))

    def keys(self) -> Iterator[bytes]:
        """Every chunk that has a file, whole or damaged, in order of its key."""
        last = ""
        for file in self._chunk_files():
            name = file.name[:64]
            if name != last:
                yield bytes.fromhex(name)
            last = name

    def bytes_used(self) -> int:
        """Bytes of all chunk files."""
        used = 0
        for file in self._chunk_files():
            # Another process may delete it just now.
            with contextlib.suppress(FileNotFoundError):
                used += file.stat().st_size
        return used

    def sweep_temporary(self, older_than_s: float) -> int:
        """Remove what writers that died left behind; how many files."""
        swept = 0
        for draft in self.root.glob(f"??/{TEMPORARY_PREFIX}*"):
            # Its writer may finish it just now.
            with contextlib.suppress(FileNotFoundError):
                if time.time() - draft.stat().st_mtime < older_than_s:
                    continue
                if draft.is_dir():
                    shutil.rmtree(draft)
                else:
                    draft.unlink()
                swept += 1
        return swept

    def _chunk_files(self) -> list[Path]:
        files = sorted(self.root.glob(f"??/*{SUFFIX}"))
        # Files by other names, or in the folder of other keys, are none of ours.
        return [f for f in files if _NAME.fullmatch(f.name) and f.name[:2] == f.parent.name]

    def _files_of(self, key: bytes) -> list[Path]:
        name = key.hex()
        files = sorted((self.root / name[:2]).glob(f"{name}*{SUFFIX}"))
        return [file for file in files if _NAME.fullmatch(file.name)]

    def _make_folder(self, folder: Path) -> None:
        """Make a folder and those above it, durably."""
        try:
            folder.mkdir()
        except FileNotFoundError:
            self._make_folder(folder.parent)
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            if folder in self._durable:
                return
        # Also when it was there: another process may have made it and not have got this far yet.
        _sync_folder(folder.parent)
        self._durable.add(folder)

    def _cannot_store(self, path: Path, error: OSError) -> StoreError:
        if error.errno in _FULL:
            return StoreFullError(
                f"{path.name}: no room for it in {self.root} ({error.strerror}); "
                "make room, then publish the document again"
            )
        return StoreError(f"{path.name}: cannot be stored in {self.root} ({error.strerror})")


def _is_whole(path: Path, key: bytes, layout: ChunkLayout, namespace: bytes) -> bool:
    try:
        with open_chunk(path, key, layout, namespace) as chunk:
            chunk.verify()
    except StoreError:
        return False
    return True


def _temporary(path: Path) -> Path:
    """Make up a name beside `path`: random, as containers on one disk may share process ids."""
    return path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}-{path.name}")


def _write_draft(draft: Path, header: ChunkHeader, layers: Sequence[Sequence[Bytes]]) -> int:
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        written = chunkfile.write(descriptor, header, layers)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return written


def _put_in_place(draft: Path, path: Path) -> None:
    try:
        draft.replace(path)
    except IsADirectoryError:
        # A file cannot take a directory's place; sweep_temporary removes it under its new name.
        path.rename(_temporary(path))
        draft.replace(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
