"""The disk tier: one file a chunk, named by the chunk's key, durable before anyone relies on it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from vllm_kvmarket.core.durable_files import (
    DRAFT_PREFIX,
    OS_FILES,
    Files,
    draft_path,
    is_being_written,
)
from vllm_kvmarket.core.errors import ChunkDamagedError, StoreError, StoreFullError
from vllm_kvmarket.store import chunk_format
from vllm_kvmarket.store.chunk_format import (
    ChunkLayout,
    NewChunk,
    Share,
    check_complete,
    chunk_name,
    is_chunk_file,
    share_of,
)
from vllm_kvmarket.store.chunk_reader import StoredChunk, check_share, open_chunk, verify_share
from vllm_kvmarket.store.codec import CODEC_RAW
from vllm_kvmarket.store.packings import own_share
from vllm_kvmarket.store.quarantine import Quarantine, Quarantined
from vllm_kvmarket.store.quota import (
    DEVICE_IS_FULL,
    ByteCount,
    LeastRecentlyUsed,
    Quota,
    StoreUsage,
)

CHUNKS_FOLDER = "chunks"  # below a market's home
QUARANTINE_BYTES = 1 << 30


@dataclass(slots=True)
class Draft:
    """A file that is being written; `is_placed` once it has its name."""

    path: Path
    descriptor: int
    is_placed: bool = False

    def close(self) -> None:
        """Unlock and close the file."""
        # Closing alone would not unlock while a fork of this process has the file open.
        with contextlib.suppress(OSError):
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self.descriptor)


class DiskStore:
    """Chunk files under one folder; safe for several threads and several processes.

    `quota_bytes` limits all files below `root`, damaged and unfinished ones included. A store with
    `is_cache` deletes the chunks that were not used for the longest time when it needs space.
    Other stores never delete a chunk by themselves. No chunk takes the device's last
    `reserve_bytes`: they are left for the ledger.
    """

    def __init__(
        self,
        root: Path,
        *,
        quota_bytes: int | None = None,
        quarantine_bytes: int = QUARANTINE_BYTES,
        codec: str = CODEC_RAW,
        is_cache: bool = False,
        reserve_bytes: int = 0,
        files: Files = OS_FILES,
    ) -> None:
        """Make the folder where there is none. Raises StoreError."""
        self.root = root
        self.codec = codec
        self.is_cache = is_cache
        self._files = files
        self._durable: set[Path] = set()
        self._quota = Quota(root, quota_bytes, files, reserve_bytes)
        self._quarantine = Quarantine(root, quarantine_bytes, files)
        self._oldest = LeastRecentlyUsed(root, files) if is_cache else None
        try:
            if not root.is_dir():
                self._make_folder(root)
        except OSError as error:
            raise StoreError(
                f"cannot make the store's folder {root} ({error.strerror}); "
                "make it yourself, or choose another home"
            ) from error

    # Writing

    def put(self, **chunk: Unpack[NewChunk]) -> int:
        """Store a chunk durably; returns the bytes written, 0 when the whole chunk was there.

        Its pages must not change meanwhile, because raw ones are written from where they lie. A
        damaged file goes into quarantine. A file with another layout is replaced if it is one that
        engines convert; others have files of their own. Any number of writers of one key may run at
        once.

        Raises StoreFullError; StoreError; ValueError when the pages do not fit the layout or the
        key. After an error no draft is left, and a whole chunk that was there is still there.
        """
        layout = chunk["layout"]
        path = self.path(chunk["key"], *own_share(layout))
        if self._has_whole(chunk["key"], layout, chunk["namespace"]):
            with self._reporting(path):
                self._sync_names(path.parent)
            return 0
        prepared = chunk_format.prepare(**chunk, codec=self.codec)
        with self._reporting(path), self._draft(path, prepared.size) as draft:
            self._files.write(draft.descriptor, prepared)
            self._files.sync(draft.descriptor)
            self._place(draft, path)
            self._files.sync_folder(path.parent)
        return prepared.size

    @contextlib.contextmanager
    def receive(
        self, key: bytes, rank: int, world_size: int, size: int, layout: str = ""
    ) -> Iterator[int]:
        """Take a chunk file from elsewhere: `with store.receive(...) as descriptor:`.

        The block fills a file of `size` bytes, with any number of threads, at any positions, but
        not beyond its end. Then every byte is verified, and that it is the share of `rank` of
        `world_size`. Only then the file gets its name, durably. A cache leaves durability to the
        file system, because it can fetch its chunks again. After an error no file is left.

        Raises ChunkDamagedError, LayoutMismatchError (a format or codec that this kvmarket does not
        know), StoreFullError, StoreError, and what the block raises.
        """
        path = self.path(key, rank, world_size, layout)
        if size < chunk_format.PREFIX_BYTES:
            raise chunk_format.damaged(path.name, f"{size} bytes are too few for a chunk")
        with self._draft(path, size) as draft:
            yield draft.descriptor
            try:
                verify_share(draft.path, key, rank, world_size, layout)
            except ChunkDamagedError as error:
                # The message must name the chunk, not the draft.
                what = str(error).replace(draft.path.name, path.name)
                raise ChunkDamagedError(what) from None
            with self._reporting(path):
                if not self.is_cache:
                    self._files.sync(draft.descriptor)
                self._place(draft, path)
                if not self.is_cache:
                    self._files.sync_folder(path.parent)

    def make_durable(
        self, key: bytes, rank: int = 0, world_size: int = 1, layout: str = ""
    ) -> None:
        """Make sure that a share that is there survives a crash; `put` does so by itself.

        For a publisher that finds a chunk which another process is storing at this moment. Raises
        ChunkMissingError, StoreError.
        """
        path = self.path(key, rank, world_size, layout)
        if not path.is_file():
            raise chunk_format.missing(key, rank, world_size, layout)
        with self._reporting(path):
            self._sync_names(path.parent)

    def delete(self, key: bytes) -> int:
        """Remove a chunk's files, if there are any, and return their bytes; readers that have it
        open can go on.

        Raises StoreError.
        """
        if not self._files_of(key):
            return 0
        with self._locked() as count:
            before = count.used
            for file in self._files_of(key):
                with contextlib.suppress(FileNotFoundError):
                    size = file.lstat().st_size
                    try:
                        self._files.unlink(file)
                    except IsADirectoryError:
                        # Its bytes stay counted: it is unknown whether they ever were.
                        draft = draft_path(file)
                        self._files.rename(file, draft)
                        self._files.remove_tree(draft)
                    else:
                        count.shrink(size)
            return before - count.used

    def forget(self, key: bytes) -> int:
        """Remove a chunk's files as `delete` does, and those in quarantine. Raises StoreError."""
        freed = self.delete(key)
        with self._locked() as count:
            self._quarantine.discard(count, key.hex())
        return freed

    # Reading

    def path(self, key: bytes, rank: int = 0, world_size: int = 1, layout: str = "") -> Path:
        """Where a chunk's file is, or would be."""
        return self.root / chunk_name(key, rank, world_size, layout)

    def has(self, key: bytes, rank: int = 0, world_size: int = 1, layout: str = "") -> bool:
        """Whether there is a file for this chunk; it may still be damaged."""
        return self.path(key, rank, world_size, layout).is_file()

    def files(self, key: bytes) -> list[Share]:
        """What each file of a chunk is; files may be damaged."""
        found = [(share_of(file.name), file) for file in self._files_of(key)]
        return sorted(share for share, file in found if share is not None and file.is_file())

    def keys(self) -> Iterator[bytes]:
        """Every chunk that has a file, whole or damaged, in the order of keys."""
        last = ""
        for entry in self._chunk_files():
            name = entry.name[:64]
            if name != last:
                yield bytes.fromhex(name)
            last = name

    def open(self, key: bytes, layout: ChunkLayout, namespace: bytes) -> StoredChunk:
        """Open a chunk for loading into this layout; close it, or use it in a `with`.

        `chunk_reader.open_chunk` says what is verified when. Raises ChunkMissingError,
        ChunkDamagedError, LayoutMismatchError, StoreError.
        """
        # A string, because making a Path takes as long as opening the file.
        path = f"{self.root}/{chunk_name(key, *own_share(layout))}"
        chunk = open_chunk(path, key, layout, namespace)
        self._touch(path)
        return chunk

    def open_share(
        self,
        key: bytes,
        rank: int,
        world_size: int,
        namespace: bytes | None = None,
        layout: str = "",
    ) -> StoredChunk:
        """Open one share of a chunk in whatever layout it is, to convert or to inspect it.

        Raises ChunkMissingError, ChunkDamagedError, LayoutMismatchError (a format that this
        kvmarket does not know), StoreError.
        """
        path = self.path(key, rank, world_size, layout)
        chunk = open_chunk(path, key, None, namespace)
        try:
            check_share(chunk, path.name, Share(rank, world_size, layout))
        except BaseException:
            chunk.close()
            raise
        self._touch(path)
        return chunk

    def verify(self, key: bytes) -> None:
        """Check every byte of every share of a chunk, and that each rank has one.

        Raises ChunkMissingError, ChunkDamagedError, LayoutMismatchError (a format that this
        kvmarket does not know), StoreError.
        """
        for file in self._files_of(key):
            verify_share(file, key, *(share_of(file.name) or (-1, 0)))
        check_complete(key, self.files(key))

    # The folder

    def quarantine(
        self, key: bytes, rank: int, world_size: int, reason: str, layout: str = ""
    ) -> bool:
        """Move a damaged file away, so that no reader finds it; returns whether it was moved.

        The file is verified again first. It stays when it is whole: it was replaced meanwhile, or
        reading failed only for a moment. It also stays when it cannot be moved. Raises neither
        StoreError nor OSError.
        """
        path = self.path(key, rank, world_size, layout)
        try:
            with self._quota.locked() as count:
                try:
                    verify_share(path, key, rank, world_size, layout)
                except ChunkDamagedError:
                    self._quarantine.add(count, path, reason)
                    return True
        except (StoreError, OSError):
            pass
        return False

    def quarantined(self) -> list[Quarantined]:
        """The damaged files, oldest first. Raises StoreError."""
        with self._reporting(self.root):
            return self._quarantine.entries()

    @property
    def quota_bytes(self) -> int | None:
        """The limit of the folder; None is no limit."""
        return self._quota.quota_bytes

    def usage(self) -> StoreUsage:
        """What the folder contains and what still fits. Raises StoreError."""
        quarantined = self.quarantined()
        return StoreUsage(
            bytes_used=self.bytes_counted(),
            quota_bytes=self._quota.quota_bytes,
            free_bytes=self.free_bytes(),
            chunk_files=sum(1 for _ in self._chunk_files()),
            quarantined_files=len(quarantined),
            quarantined_bytes=sum(entry.bytes for entry in quarantined),
            drafts=sum(1 for _ in self.root.glob(f"??/{DRAFT_PREFIX}*")),
        )

    def free_bytes(self) -> int:
        """Bytes that still fit, as in `usage`; looks at no chunk file. Raises StoreError."""
        with self._locked() as count:
            # What is in quarantine is deleted when space is needed.
            spare = sum(entry.bytes for entry in self._quarantine.entries())
            return self._quota.free_bytes(count.used - spare)

    def bytes_used(self) -> int:
        """Bytes of all chunk files; `usage` tells what the quota counts."""
        used = 0
        for entry in self._chunk_files():
            # Another process may delete the file at this moment.
            with contextlib.suppress(FileNotFoundError):
                used += entry.stat().st_size
        return used

    def bytes_counted(self) -> int:
        """What the quota counts; looks at no chunk file. Raises StoreError."""
        with self._locked() as count:
            return count.used

    def recount(self) -> int:
        """Count all bytes below the folder again, as `usage` reports them. Raises StoreError."""
        with self._locked() as count:
            count.recount()
            return count.used

    def sweep_temporary(self) -> int:
        """Remove what dead writers left; returns the number of files. Raises StoreError.

        The draft of a living writer is locked and stays, whatever its age.
        """
        swept = 0
        with self._locked() as count:
            for path in self.root.glob(f"??/{DRAFT_PREFIX}*"):
                with contextlib.suppress(FileNotFoundError):
                    if is_being_written(path):
                        continue
                    if path.is_dir() and not path.is_symlink():
                        self._files.remove_tree(path)
                    else:
                        self._files.unlink(path)
                    swept += 1
            # A writer that died between counting and writing left no file.
            count.recount()
        return swept

    def _chunk_files(self) -> Iterator[os.DirEntry[str]]:
        """Every chunk's files in order; looks at names only, as there may be a million."""
        for folder in sorted(self.root.glob("??")):
            # Other names, and names in the folder of other keys, are not ours.
            found = [e for e in _scan(folder) if e.name[:2] == folder.name]
            yield from sorted((e for e in found if is_chunk_file(e.name)), key=lambda e: e.name)

    def _files_of(self, key: bytes) -> list[Path]:
        name = key.hex()
        found = [e for e in _scan(self.root / name[:2]) if e.name.startswith(name)]
        return sorted(Path(entry.path) for entry in found if is_chunk_file(entry.name))

    def _has_whole(self, key: bytes, layout: ChunkLayout, namespace: bytes) -> bool:
        """Whether exactly this chunk is there; a damaged file goes into quarantine."""
        rank, world_size, form = own_share(layout)
        try:
            with open_chunk(
                self.path(key, rank, world_size, form), key, layout, namespace
            ) as chunk:
                chunk.verify()
        except ChunkDamagedError as error:
            self.quarantine(key, rank, world_size, str(error), form)
            return False
        except StoreError:
            return False
        return True

    def _touch(self, path: Path | str) -> None:
        if self.is_cache:
            # It may be gone, or belong to another user: reading it worked all the same.
            with contextlib.suppress(OSError):
                os.utime(path)

    # Drafts

    @contextlib.contextmanager
    def _draft(self, path: Path, size: int) -> Iterator[Draft]:
        """Make a file of `size` bytes beside `path`; removed unless it is placed.

        Raises StoreError.
        """
        with self._reporting(path):
            self._make_folder(path.parent)
            with self._quota.locked() as count:
                draft = self._create(count, path, size)
        with contextlib.closing(draft):
            try:
                yield draft
            finally:
                if not draft.is_placed:
                    # What cannot be removed now is left to the sweep.
                    with contextlib.suppress(OSError), self._quota.locked() as count:
                        self._discard(count, draft.path, size)

    def _create(self, count: ByteCount, path: Path, size: int) -> Draft:
        self._make_space(count, path, size)
        try:
            return self._begin(count, path, size)
        except OSError as error:
            if error.errno not in DEVICE_IS_FULL:
                raise
        # The device is full, whatever the quota says.
        self._evict(count, size)
        return self._begin(count, path, size)

    def _begin(self, count: ByteCount, target: Path, size: int) -> Draft:
        """Make a draft of `size` bytes beside `target`. Raises OSError, and leaves nothing then."""
        path = draft_path(target)
        count.grow(size)
        descriptor = -1
        try:
            descriptor = self._files.create(path)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._files.allocate(descriptor, size)
        except BaseException:
            if descriptor < 0:
                count.shrink(size)
            else:
                os.close(descriptor)
                self._discard(count, path, size)
            raise
        return Draft(path, descriptor)

    def _discard(self, count: ByteCount, path: Path, size: int) -> None:
        # One that is not there may have got its name just before an interrupt.
        with contextlib.suppress(OSError):
            self._files.unlink(path)
            count.shrink(size)

    def _place(self, draft: Draft, path: Path) -> None:
        """Give a draft its name. Raises OSError."""
        with self._quota.locked() as count:
            replaced = 0
            with contextlib.suppress(FileNotFoundError):
                state = path.lstat()
                if stat.S_ISDIR(state.st_mode):
                    # A file cannot replace a directory.
                    self._quarantine.add(count, path, "a directory in its place")
                else:
                    replaced = state.st_size
            self._files.rename(draft.path, path)
            draft.is_placed = True
            count.shrink(replaced)

    # Space

    def _make_space(self, count: ByteCount, path: Path, size: int) -> None:
        """Free what a new file needs within quota and reserve. Raises StoreFullError, OSError."""
        quota, limit = self._quota, self._quota.quota_bytes
        if limit is None or size <= limit:
            self._evict(count, quota.excess(count, size))
            if quota.excess(count, size) > 0:
                # A process that died may have left the number too high.
                quota.recount_if_due(count)
                self._evict(count, quota.excess(count, size))
        self._check_reserve(path.name, size)
        if limit is not None and count.used + size > limit:
            raise StoreFullError(
                f"{path.name}: no space for its {size} bytes, because {count.used} bytes of the "
                f"quota of {limit} are used in {self.root}; raise disk_quota_bytes, or delist "
                "documents and run `kvmarket store gc`"
            )

    def check_reserve(self, name: str) -> None:
        """Refuse new work when only the ledger's reserve is left. Raises StoreFullError."""
        with self._reporting(self.root / name):
            self._check_reserve(name, 0)

    def _check_reserve(self, name: str, size: int) -> None:
        reserve = self._quota.reserve_bytes
        if reserve and self._quota.reserve_excess(size) > 0:
            raise StoreFullError(
                f"{name}: no space for it, because the last {reserve} bytes of the device of "
                f"{self.root} are for the ledger (disk_reserve_bytes); free some space, then "
                "publish the document again"
            )

    def _evict(self, count: ByteCount, size: int) -> None:
        """Free `size` bytes if that is possible: quarantined files first, then a cache's oldest.

        Deletes nothing when that cannot free enough. Raises OSError.
        """
        if size <= 0:
            return
        before = count.used
        quarantined = sum(entry.bytes for entry in self._quarantine.entries())
        if quarantined >= size or self._oldest is not None:
            self._quarantine.evict(count, size)
        if self._oldest is not None:
            self._oldest.evict(count, size - (before - count.used))

    # The file system

    def _sync_names(self, folder: Path) -> None:
        """Make sure that a folder and its names survive a crash. Raises OSError."""
        self._make_folder(folder)
        self._files.sync_folder(folder)

    def _make_folder(self, folder: Path) -> None:
        """Make a folder and its parents, durably. Raises OSError."""
        try:
            self._files.make_folder(folder)
        except FileNotFoundError:
            self._make_folder(folder.parent)
            with contextlib.suppress(FileExistsError):
                self._files.make_folder(folder)
        except FileExistsError:
            if folder in self._durable:
                return
        # Also when it was there: another process may have made it and not synced it yet.
        self._files.sync_folder(folder.parent)
        self._durable.add(folder)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[ByteCount]:
        """Take the store's lock. Raises StoreError for what the file system refuses meanwhile."""
        try:
            if not self.root.is_dir():
                self._make_folder(self.root)
            with self._quota.locked() as count:
                yield count
        except OSError as error:
            raise StoreError(
                f"the store in {self.root} cannot be changed ({error.strerror}); "
                "check the folder's permissions and its device"
            ) from error

    @contextlib.contextmanager
    def _reporting(self, path: Path) -> Iterator[None]:
        """Name the chunk when the file system refuses something."""
        try:
            yield
        except OSError as error:
            if error.errno in DEVICE_IS_FULL:
                raise StoreFullError(
                    f"{path.name}: no space for it in {self.root} ({error.strerror}); "
                    "free some space, then publish the document again"
                ) from error
            raise StoreError(
                f"{path.name}: cannot be stored in {self.root} ({error.strerror})"
            ) from error


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder; none where there is no folder."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
