"""The disk tier: a file a chunk, named by its key, durable before anyone is told of it."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from vllm_kvmarket.core.durable_files import DRAFT_PREFIX, OS_FILES, Files, draft_path
from vllm_kvmarket.core.errors import (
    ChunkDamagedError,
    ChunkMissingError,
    StoreError,
    StoreFullError,
)
from vllm_kvmarket.store import chunk_format, drafts
from vllm_kvmarket.store.chunk_format import Bytes
from vllm_kvmarket.store.chunk_reader import StoredChunk, open_chunk
from vllm_kvmarket.store.codec import CODEC_RAW
from vllm_kvmarket.store.drafts import Draft
from vllm_kvmarket.store.folder import ChunkFolder
from vllm_kvmarket.store.layout import ChunkLayout
from vllm_kvmarket.store.names import SUFFIX, chunk_name, share_of
from vllm_kvmarket.store.quarantine import Quarantine, Quarantined
from vllm_kvmarket.store.quota import Held, Quota, StoreUsage
from vllm_kvmarket.store.recency import LeastRecentlyUsed
from vllm_kvmarket.store.room import Room

CHUNKS_FOLDER = "chunks"  # of a market's home
QUARANTINE_BYTES = 1 << 30
# No room on the device, in the user's quota, or under the process's limit (ulimit -f).
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class DiskStore(ChunkFolder):
    """Chunk files under one folder; thread-safe, and safe for several processes.

    `quota_bytes` is a hard limit on all files under `root`, damaged and unfinished ones included.
    A store that `is_cache` makes room by deleting what was not used for the longest time; another
    one never deletes a chunk by itself.
    """

    def __init__(
        self,
        root: Path,
        *,
        quota_bytes: int | None = None,
        quarantine_bytes: int = QUARANTINE_BYTES,
        codec: str = CODEC_RAW,
        is_cache: bool = False,
        files: Files = OS_FILES,
    ) -> None:
        """Make the folder where there is none. Raises StoreError."""
        super().__init__(root, files)
        self.codec = codec
        self.is_cache = is_cache
        self._quota = Quota(root, quota_bytes, files)
        self._quarantine = Quarantine(root, quarantine_bytes, files)
        oldest = LeastRecentlyUsed(root, files) if is_cache else None
        self._room = Room(self._quota, self._quarantine, oldest)
        try:
            if not root.is_dir():
                self._make_folder(root)
        except OSError as error:
            raise StoreError(
                f"cannot make the store's folder {root} ({error.strerror}); "
                "make it yourself, or choose another home"
            ) from error

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
        change meanwhile; raw ones are written from where they lie. What is there but damaged goes
        into quarantine; what has another layout is replaced. Any number of writers of one key may
        run at once.

        Raises StoreFullError; StoreError; ValueError when the pages do not fit the layout or the
        key. No temporary file is left, and what was there, whole, is still there.
        """
        path = self.location(key, layout.rank, layout.world_size)
        if self._has_whole(key, layout, namespace):
            with self._reporting(path):
                self._make_durable(path.parent)
            return 0
        chunk = chunk_format.prepare(
            key=key,
            parent=parent,
            namespace=namespace,
            tokens=tokens,
            layout=layout,
            layers=layers,
            codec=self.codec,
        )
        with self._reporting(path), self._draft(path, chunk.size) as draft:
            self._files.write(draft.descriptor, chunk)
            self._files.sync(draft.descriptor)
            self._place(draft, path)
            self._files.sync_folder(path.parent)
        return chunk.size

    @contextlib.contextmanager
    def receive(self, key: bytes, rank: int, world_size: int, size: int) -> Iterator[int]:
        """Take a chunk file that comes from elsewhere: `with store.receive(...) as descriptor:`.

        The descriptor is that of a file of `size` bytes, which the body fills, by any number of
        threads, at any positions, but not beyond. Afterwards every byte is verified, that it is the
        share of `rank` of `world_size` included, and only then it takes its place, durably: a cache
        leaves that to the file system, as its chunks can be had again. When the body raises, or the
        file is bad, nothing stays.

        Raises ChunkDamagedError, LayoutMismatchError (a format or codec that this kvmarket does not
        know), StoreFullError, StoreError, and what the body raises.
        """
        path = self.location(key, rank, world_size)
        if size < chunk_format.PREFIX_BYTES:
            raise chunk_format.damaged(path.name, f"{size} bytes are too few for a chunk")
        with self._draft(path, size) as draft:
            yield draft.descriptor
            try:
                _verify_share(draft.path, key, rank, world_size)
            except ChunkDamagedError as error:
                # Errors name the file by what it was to become.
                what = str(error).replace(draft.path.name, path.name)
                raise ChunkDamagedError(what) from None
            with self._reporting(path):
                if not self.is_cache:
                    self._files.sync(draft.descriptor)
                self._place(draft, path)
                if not self.is_cache:
                    self._files.sync_folder(path.parent)

    def open(self, key: bytes, layout: ChunkLayout, namespace: bytes) -> StoredChunk:
        """Open a chunk for loading into this layout; close it again, or use it in a `with`.

        Raises ChunkMissingError, ChunkDamagedError, LayoutMismatchError, StoreError; see
        reader.open_chunk for what is verified when.
        """
        # A string, as making a Path takes as long as opening the file.
        path = f"{self.root}/{chunk_name(key, layout.rank, layout.world_size)}"
        chunk = open_chunk(path, key, layout, namespace)
        self._note_use(path)
        return chunk

    def open_share(
        self, key: bytes, rank: int, world_size: int, namespace: bytes | None = None
    ) -> StoredChunk:
        """Open one share of a chunk, whatever its layout, to convert or to inspect it.

        Raises ChunkMissingError, ChunkDamagedError, LayoutMismatchError (a format that this
        kvmarket does not know), StoreError.
        """
        path = self.location(key, rank, world_size)
        chunk = open_chunk(path, key, None, namespace)
        try:
            _check_share(chunk, path.name, rank, world_size)
        except BaseException:
            chunk.close()
            raise
        self._note_use(path)
        return chunk

    def verify(self, key: bytes) -> None:
        """Check every byte of every rank's file of a chunk.

        Raises ChunkMissingError, ChunkDamagedError, LayoutMismatchError (a format that this
        kvmarket does not know), StoreError.
        """
        files = self._files_of(key)
        if not files:
            raise _missing(key)
        for file in files:
            rank, world_size = share_of(file.name) or (-1, 0)
            _verify_share(file, key, rank, world_size)

    def make_durable(self, key: bytes) -> None:
        """Make sure that a chunk that is there survives a crash; put() does so by itself.

        For whoever finds a chunk that another process is just storing, and promises it to others.
        Raises ChunkMissingError, StoreError.
        """
        if not self._files_of(key):
            raise _missing(key)
        path = self.location(key)
        with self._reporting(path):
            self._make_durable(path.parent)

    def delete(self, key: bytes) -> None:
        """Remove a chunk's files, if there are any; readers that have it open can go on.

        Raises StoreError.
        """
        if not self._files_of(key):
            return
        with self._changing() as held:
            for file in self._files_of(key):
                with contextlib.suppress(FileNotFoundError):
                    size = file.lstat().st_size
                    try:
                        self._files.unlink(file)
                    except IsADirectoryError:
                        # Its bytes stay counted, as nobody knows whether they were.
                        draft = draft_path(file)
                        self._files.rename(file, draft)
                        self._files.remove_tree(draft)
                    else:
                        held.shrink(size)

    def quarantine(self, key: bytes, rank: int, world_size: int, reason: str) -> bool:
        """Move a damaged file out of every reader's way; whether it was moved.

        It is verified again before: a file that is whole, because another one took its place or
        reading it failed for a moment only, stays. So does one that cannot be moved. Raises nothing
        of the kinds of StoreError and OSError.
        """
        path = self.location(key, rank, world_size)
        try:
            with self._quota.hold() as held:
                try:
                    _verify_share(path, key, rank, world_size)
                except ChunkDamagedError:
                    self._quarantine.add(held, path, reason)
                    return True
        except (StoreError, OSError):
            pass
        return False

    def quarantined(self) -> list[Quarantined]:
        """What is in quarantine, oldest first. Raises StoreError."""
        with self._reporting(self.root):
            return self._quarantine.entries()

    def usage(self) -> StoreUsage:
        """What the folder holds and what still fits. Raises StoreError."""
        quarantined = self.quarantined()
        with self._changing() as held:
            used = held.used
            free = self._quota.free_bytes(used - sum(entry.bytes for entry in quarantined))
        return StoreUsage(
            bytes_used=used,
            quota_bytes=self._quota.quota_bytes,
            free_bytes=free,
            chunk_files=sum(1 for _ in self._chunk_files()),
            quarantined_files=len(quarantined),
            quarantined_bytes=sum(entry.bytes for entry in quarantined),
            drafts=sum(1 for _ in self.root.glob(f"??/{DRAFT_PREFIX}*")),
        )

    def bytes_held(self) -> int:
        """What the quota counts; looks at no file of a chunk. Raises StoreError."""
        with self._changing() as held:
            return held.used

    def recount(self) -> int:
        """Count all bytes under the folder again, as `usage` tells them. Raises StoreError."""
        with self._changing() as held:
            held.recount()
            return held.used

    def sweep_temporary(self, older_than_s: float = 0) -> int:
        """Remove what writers that died left behind; how many files. Raises StoreError.

        A draft whose writer is alive is locked and stays, whatever its age.
        """
        with self._changing() as held:
            return drafts.sweep(self._files, held, self.root, older_than_s)

    def _has_whole(self, key: bytes, layout: ChunkLayout, namespace: bytes) -> bool:
        """Whether this very chunk is there; what is damaged is moved out of the way."""
        path = self.location(key, layout.rank, layout.world_size)
        try:
            with open_chunk(path, key, layout, namespace) as chunk:
                chunk.verify()
        except ChunkDamagedError as error:
            self.quarantine(key, layout.rank, layout.world_size, str(error))
            return False
        except StoreError:
            return False
        return True

    @contextlib.contextmanager
    def _draft(self, path: Path, size: int) -> Iterator[Draft]:
        """Make a file of `size` bytes, which goes unless it is placed. Raises StoreError."""
        with self._reporting(path):
            self._make_folder(path.parent)
            with self._quota.hold() as held:
                draft = self._begin(held, path, size)
        with contextlib.closing(draft):
            try:
                yield draft
            finally:
                if not draft.is_placed:
                    # Otherwise it is the sweeper's.
                    with contextlib.suppress(OSError), self._quota.hold() as held:
                        drafts.discard(self._files, held, draft.path, size)

    def _begin(self, held: Held, path: Path, size: int) -> Draft:
        self._room.make(held, path, size)
        try:
            return drafts.begin(self._files, held, path, size)
        except OSError as error:
            if error.errno not in _FULL:
                raise
        # The device is full, whatever the quota says.
        self._room.give_up(held, size)
        return drafts.begin(self._files, held, path, size)

    def _place(self, draft: Draft, path: Path) -> None:
        """Give a draft its name. Raises OSError."""
        with self._quota.hold() as held:
            replaced = 0
            with contextlib.suppress(FileNotFoundError):
                state = path.lstat()
                if stat.S_ISDIR(state.st_mode):
                    # A file cannot take a directory's place.
                    self._quarantine.add(held, path, "a directory in its place")
                else:
                    replaced = state.st_size
            self._files.rename(draft.path, path)
            draft.is_placed = True
            held.shrink(replaced)

    def _note_use(self, path: Path | str) -> None:
        if self.is_cache:
            # Gone, or not ours to change: reading it worked all the same.
            with contextlib.suppress(OSError):
                os.utime(path)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Held]:
        """Hold the store's lock. Raises StoreError for what the file system refuses meanwhile."""
        try:
            if not self.root.is_dir():
                self._make_folder(self.root)
            with self._quota.hold() as held:
                yield held
        except OSError as error:
            raise StoreError(
                f"the store in {self.root} cannot be changed ({error.strerror}); "
                "check the folder's permissions and its device"
            ) from error

    @contextlib.contextmanager
    def _reporting(self, path: Path) -> Iterator[None]:
        """Say of which chunk it is what the file system refuses."""
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                raise StoreFullError(
                    f"{path.name}: no room for it in {self.root} ({error.strerror}); "
                    "make room, then publish the document again"
                ) from error
            raise StoreError(
                f"{path.name}: cannot be stored in {self.root} ({error.strerror})"
            ) from error


def _missing(key: bytes) -> ChunkMissingError:
    return ChunkMissingError(
        f"{key.hex()}{SUFFIX}: no such chunk in the store; publish its document again"
    )


def _verify_share(path: Path, key: bytes, rank: int, world_size: int) -> None:
    """Check every byte of a file, and whose share it is."""
    with open_chunk(path, key) as chunk:
        chunk.verify()
        _check_share(chunk, path.name, rank, world_size)


def _check_share(chunk: StoredChunk, name: str, rank: int, world_size: int) -> None:
    layout = chunk.header.layout
    if (layout.rank, layout.world_size) != (rank, world_size):
        raise chunk_format.damaged(
            name, f"holds the share of rank {layout.rank} of {layout.world_size}"
        )
