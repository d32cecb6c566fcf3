"""The tiers below memory as one store: the disk, and an object store behind it where there is one.

With an object store, every chunk is stored there, and the disk is a bounded cache of it. A chunk
that is not on the disk, or damaged there, is fetched, verified and then read from the disk.
Machines of one market share the bucket; market/garbage_collection.py deletes what none of them
needs.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self, TypeVar, Unpack

from vllm_kvmarket.core.config import MarketConfig
from vllm_kvmarket.core.errors import (
    ChunkDamagedError,
    ChunkMissingError,
    LayoutMismatchError,
    StoreError,
)
from vllm_kvmarket.core.stored_share import StoredShare, is_known
from vllm_kvmarket.store.chunk_format import (
    SUFFIX,
    Bytes,
    ChunkHeader,
    ChunkLayout,
    NewChunk,
    Share,
    check_complete,
    chunk_name,
    missing,
)
from vllm_kvmarket.store.chunk_reader import StoredChunk, open_chunk, verify_share
from vllm_kvmarket.store.disk import CHUNKS_FOLDER, DiskStore
from vllm_kvmarket.store.object_tier import ObjectReplacedError, ObjectTier
from vllm_kvmarket.store.packings import own_share

_ATTEMPTS = 2
_MOST_ACCEPTED = 10_000


T = TypeVar("T")


class ShareId(NamedTuple):
    """Which chunk, and which rank's share of it; `layout` as in chunk_format.Share."""

    key: bytes
    rank: int
    world_size: int
    layout: str = ""

    @property
    def name(self) -> str:
        """The name of its object, and of its file below the store's folder."""
        return chunk_name(*self)


class MirroredChunk:
    """An open chunk whose file is a copy of an object; it is used like a StoredChunk.

    When the file turns out to be damaged, it is quarantined, fetched again, and read again.
    """

    def __init__(
        self, chunk: StoredChunk, replace: Callable[[ChunkDamagedError], StoredChunk]
    ) -> None:
        self._chunk = chunk
        self._replace = replace

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def header(self) -> ChunkHeader:
        """The chunk's verified header."""
        return self._chunk.header

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._chunk.close()

    def layer(self, index: int) -> Bytes:
        """As StoredChunk.layer; also raises what `Tiers.fetch` raises."""
        return self._read(lambda chunk: chunk.layer(index))

    def copy_pages(
        self, index: int, first_page: int, last_page: int, destination: Sequence[Bytes]
    ) -> None:
        """As StoredChunk.copy_pages; also raises what `Tiers.fetch` raises."""
        self._read(lambda chunk: chunk.copy_pages(index, first_page, last_page, destination))

    def copy_all_pages(
        self, first_page: int, last_page: int, destinations: Sequence[Sequence[Bytes]]
    ) -> None:
        """As StoredChunk.copy_all_pages; also raises what `Tiers.fetch` raises."""
        self._read(lambda chunk: chunk.copy_all_pages(first_page, last_page, destinations))

    def verify(self) -> None:
        """Check every byte. Raises ChunkDamagedError when the object is damaged too."""
        self._read(StoredChunk.verify)

    def _read(self, read: Callable[[StoredChunk], T]) -> T:
        try:
            return read(self._chunk)
        except ChunkDamagedError as error:
            self._chunk.close()
            self._chunk = self._replace(error)
        return read(self._chunk)


OpenChunk = StoredChunk | MirroredChunk


class Tiers:
    """Chunks on the disk and, where there is one, in the object store; thread-safe.

    Without an object store every method does what the disk's does.
    """

    def __init__(self, disk: DiskStore, objects: ObjectTier | None = None) -> None:
        self.disk = disk
        self.objects = objects
        # Copies that were fetched though the catalogue knows others: fingerprint, and what it knew.
        self._accepted: dict[str, tuple[bytes, bytes]] = {}
        self._lock = threading.Lock()
        self._fetching: dict[str, Future[None]] = {}

    def local(self) -> Tiers:
        """The same without the object store, for threads that must not wait for it."""
        if self.objects is None:
            return self
        local = Tiers(self.disk)
        local._accepted = self._accepted
        return local

    def close(self) -> None:
        """Cancel running calls to the object store; may be called twice."""
        if self.objects is not None:
            self.objects.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # Writing

    def put(self, **chunk: Unpack[NewChunk]) -> int:
        """Store a chunk durably, as DiskStore.put; returns the bytes written, 0 when it was there.

        With an object store, the chunk is in it when this returns. When the upload fails, this
        raises StoreError; the copy on the disk stays, and a later `put` uploads it.
        """
        written = self.disk.put(**chunk)
        if self.objects is None:
            return written
        share = ShareId(chunk["key"], *own_share(chunk["layout"]))
        return max(written, self._upload(self.objects, share, is_new=written > 0))

    @contextlib.contextmanager
    def receive(
        self, key: bytes, rank: int, world_size: int, size: int, layout: str = ""
    ) -> Iterator[int]:
        """Take a chunk file from elsewhere, as DiskStore.receive, then upload it."""
        with self.disk.receive(key, rank, world_size, size, layout) as descriptor:
            yield descriptor
        if self.objects is not None:
            self._upload(self.objects, ShareId(key, rank, world_size, layout), is_new=True)

    def make_durable(
        self, key: bytes, rank: int = 0, world_size: int = 1, layout: str = ""
    ) -> bool:
        """Make sure that a stored share will stay; False when it is not there: `put` it.

        A publisher calls this instead of `put` for a share that can be used already: its file may
        not be durable yet, or be on this disk only. Raises StoreError.
        """
        share = ShareId(key, rank, world_size, layout)
        try:
            if self.objects is None:
                self.disk.make_durable(*share)
                return True
            try:
                self._keep_object(self.objects, share)
            except FileNotFoundError:
                # Nothing whole is anywhere: say why.
                self.fetch(*share)
        except ChunkMissingError:
            return False
        return True

    def upload(self, key: bytes, rank: int = 0, world_size: int = 1, layout: str = "") -> int:
        """Copy a share from the disk into the object store unless it is there; returns the bytes.

        Raises StoreError.
        """
        assert self.objects is not None
        return self._upload(self.objects, ShareId(key, rank, world_size, layout), is_new=False)

    def _upload(self, objects: ObjectTier, share: ShareId, *, is_new: bool) -> int:
        """Upload a whole file, unless it is not new and the object will do; returns the bytes."""
        try:
            if not is_new:
                return self._keep_object(objects, share)
            return objects.upload(share.name, self.disk.path(*share))
        except FileNotFoundError:
            raise StoreError(
                f"{share.name}: left the disk before it was uploaded; make the disk quota larger, "
                "then publish the document again"
            ) from None

    def _keep_object(self, objects: ObjectTier, share: ShareId) -> int:
        """Make sure that an object is there and whole; returns the bytes that were sent.

        A whole object with other content is newer than the file here, which may be a cached copy
        of what was replaced: then the object replaces the file, and not the other way round. Raises
        FileNotFoundError when there is no file to send, StoreError.
        """
        fingerprint = _whole_object(objects, share)
        if fingerprint is None:
            return objects.upload(share.name, self.disk.path(*share))
        ours = self.describe(*share)
        if ours is not None and ours.fingerprint != fingerprint:
            self._fetch_once(share)
        return 0

    # Reading

    def open(
        self, key: bytes, layout: ChunkLayout, namespace: bytes, known: bytes = b""
    ) -> OpenChunk:
        """Open a chunk for loading into this layout, as DiskStore.open.

        With an object store, a chunk that is missing or damaged on the disk is fetched first, which
        takes no longer than the object store's deadline. So is a copy whose fingerprint is not
        among those that are `known`: it is old. Raises ChunkMissingError when it is
        nowhere, ChunkDamagedError when the object is damaged too, LayoutMismatchError, StoreError,
        StoreFullError when the disk has no space for it.
        """
        share = ShareId(key, *own_share(layout))
        return self._open(share, partial(self.disk.open, key, layout, namespace), known)

    def open_share(
        self,
        key: bytes,
        rank: int,
        world_size: int,
        namespace: bytes | None = None,
        *,
        layout: str = "",
        known: bytes = b"",
    ) -> OpenChunk:
        """Open one share of a chunk in whatever layout it is; fetches and raises as `open`."""
        share = ShareId(key, rank, world_size, layout)
        opened = partial(self.disk.open_share, key, rank, world_size, namespace, layout)
        return self._open(share, opened, known)

    def _open(
        self, share: ShareId, open_file: Callable[[], StoredChunk], known: bytes
    ) -> OpenChunk:
        if self.objects is None:
            chunk = open_file()
            if self._is_old(share, chunk, known):
                chunk.close()
                raise missing(*share)
            return chunk
        replace = partial(self._replace, share, open_file)
        try:
            chunk = open_file()
        except ChunkMissingError:
            chunk = self._fetch_and_open(share, open_file)
        except ChunkDamagedError as error:
            chunk = replace(error)
        if self._is_old(share, chunk, known):
            chunk.close()
            self._fetch_once(share)
            chunk = open_file()
            if len(self._accepted) >= _MOST_ACCEPTED:
                self._accepted.clear()
            self._accepted[share.name] = chunk.fingerprint, known
        return MirroredChunk(chunk, replace)

    def _is_old(self, share: ShareId, chunk: StoredChunk, known: bytes) -> bool:
        """Whether a cached copy is not the object that the catalogue knows.

        One that was just fetched is new, whatever the catalogue knows.
        """
        if not self.disk.is_cache or is_known(chunk.fingerprint, known):
            return False
        return self._accepted.get(share.name) != (chunk.fingerprint, known)

    def _fetch_and_open(self, share: ShareId, open_file: Callable[[], StoredChunk]) -> StoredChunk:
        self.fetch(*share)
        try:
            return open_file()
        except ChunkMissingError:
            # A small cache may have evicted it already, for another chunk.
            self.fetch(*share)
            return open_file()

    def _replace(
        self, share: ShareId, open_file: Callable[[], StoredChunk], error: ChunkDamagedError
    ) -> StoredChunk:
        self.disk.quarantine(*share[:3], str(error), share.layout)
        return self._fetch_and_open(share, open_file)

    def fetch(self, key: bytes, rank: int = 0, world_size: int = 1, layout: str = "") -> bool:
        """Bring a share onto the disk; returns whether it was downloaded, by any thread.

        Several threads that ask for one share download it once. Raises as `open`.
        """
        share = ShareId(key, rank, world_size, layout)
        if self.disk.has(*share):
            return False
        self._fetch_once(share)
        return True

    def _fetch_once(self, share: ShareId) -> None:
        if self.objects is None:
            raise missing(*share)
        mine: Future[None] = Future()
        with self._lock:
            running = self._fetching.setdefault(share.name, mine)
        if running is not mine:
            running.result()
            return
        try:
            self._download(self.objects, share)
        except BaseException as error:
            mine.set_exception(error)
            raise
        else:
            mine.set_result(None)
        finally:
            with self._lock:
                del self._fetching[share.name]

    def _download(self, objects: ObjectTier, share: ShareId) -> None:
        until_s = time.monotonic() + objects.timeout_s
        for attempt in range(1, _ATTEMPTS + 1):
            facts = objects.facts(share.name, until_s=until_s)
            if facts is None:
                raise ChunkMissingError(
                    f"{share.name}: neither on the disk nor in the object store; "
                    "publish its document again"
                )
            try:
                with self.disk.receive(*share[:3], facts.size, share.layout) as descriptor:
                    objects.download(
                        share.name, descriptor, facts.size, version=facts.version, until_s=until_s
                    )
            except ObjectReplacedError:
                # Another publisher of the same chunk did.
                if attempt == _ATTEMPTS:
                    raise
            except ChunkDamagedError:
                # Damaged twice: it is not the transfer. But it may be this machine's memory, so the
                # object stays for others to judge.
                if attempt == _ATTEMPTS:
                    raise
            else:
                return

    def describe(
        self, key: bytes, rank: int = 0, world_size: int = 1, layout: str = ""
    ) -> StoredShare | None:
        """What the catalogue records of a share that is on the disk; None when it is not there."""
        path = self.disk.path(key, rank, world_size, layout)
        try:
            with open_chunk(path, key) as chunk:
                size = path.stat().st_size
                return StoredShare(key, rank, world_size, layout, size, chunk.fingerprint)
        except (StoreError, FileNotFoundError):
            return None

    def has(self, key: bytes, rank: int = 0, world_size: int = 1, layout: str = "") -> bool:
        """Whether a share is where it stays: in the object store, if there is one.

        It may be damaged. Raises StoreError.
        """
        if self.objects is None:
            return self.disk.has(key, rank, world_size, layout)
        return self.objects.head(chunk_name(key, rank, world_size, layout)) is not None

    def shares(self, key: bytes) -> list[tuple[int, int]]:
        """(rank, world_size) of every file and object of a chunk that others can convert, in order.

        The object store is asked when the disk does not have the shares of all ranks. Raises
        StoreError.
        """
        on_disk = _convertible(self.disk.files(key))
        if self.objects is None or any(
            {(rank, size) for rank in range(size)} <= set(on_disk) for _, size in on_disk
        ):
            return on_disk
        return sorted({*on_disk, *_convertible(self.objects.files(key))})

    def verify(self, key: bytes, expected: Iterable[Share] = ()) -> None:
        """Check every byte of a chunk, and that each rank has its share; as DiskStore.verify.

        With an object store, its objects are read: a share that is on this disk alone is a
        ChunkMissingError. Those that are `expected` are asked for one by one, since a list of
        objects may leave some out. A damaged copy on the disk is moved away, to be fetched again.
        """
        if self.objects is None:
            self.disk.verify(key)
            return
        shares = set(self.objects.files(key))
        for share in {Share(), *expected, *self.disk.files(key)} - shares:
            if self.objects.head(chunk_name(key, *share)) is not None:
                shares.add(share)
        for share in sorted(shares):
            _verify_object(self.objects, ShareId(key, *share))
        check_complete(key, shares)
        reason = "damaged on the disk, whole in the object store"
        for share in self.disk.files(key):
            self.disk.quarantine(key, *share[:2], reason, share.layout)

    def quarantine(
        self, key: bytes, rank: int, world_size: int, reason: str, layout: str = ""
    ) -> bool:
        """Move a damaged file on the disk away; see DiskStore.quarantine."""
        return self.disk.quarantine(key, rank, world_size, reason, layout)

    def files(self, key: bytes) -> list[Share]:
        """What each file and object of a chunk is, in order. Raises StoreError."""
        on_disk = self.disk.files(key)
        return sorted({*on_disk, *self.objects.files(key)}) if self.objects else on_disk


def _convertible(files: Iterable[Share]) -> list[tuple[int, int]]:
    return [share[:2] for share in files if not share.layout]


def _whole_object(objects: ObjectTier, share: ShareId) -> bytes | None:
    """The fingerprint of a share's object; None when there is none, or a damaged one.

    Raises StoreError when the object store does not answer.
    """
    try:
        return _verify_object(objects, share)
    except (ChunkDamagedError, ChunkMissingError, LayoutMismatchError, ObjectReplacedError):
        return None


def _verify_object(objects: ObjectTier, share: ShareId) -> bytes:
    """Read an object and check every byte; its fingerprint.

    Raises as Tiers.verify, and ObjectReplacedError.
    """
    facts = objects.facts(share.name)
    if facts is None:
        raise missing(*share)
    with tempfile.NamedTemporaryFile(suffix=SUFFIX) as copy:
        objects.download(share.name, copy.fileno(), facts.size, version=facts.version)
        try:
            return verify_share(Path(copy.name), *share)
        except ChunkDamagedError as error:
            what = str(error).replace(Path(copy.name).name, share.name)
            raise ChunkDamagedError(f"{what} ({objects.url})") from None


def objects_of(config: MarketConfig) -> ObjectTier | None:
    """Make the object tier that is configured, if one is. Raises ConfigError."""
    if config.object_store_url is None:
        return None
    return ObjectTier(
        config.object_store_url,
        config.object_store_options,
        timeout_s=config.object_store_timeout_s,
    )


def store_of(config: MarketConfig) -> Tiers:
    """Open the disk tier in the market's home, and the object tier behind it where there is one.

    Raises StoreError, and ConfigError for an object store's URL or options that cannot be right.
    """
    objects = objects_of(config)
    disk = DiskStore(
        Path(config.home).expanduser() / CHUNKS_FOLDER,
        quota_bytes=config.disk_quota_bytes,
        reserve_bytes=config.disk_reserve_bytes,
        quarantine_bytes=config.quarantine_bytes,
        codec=config.codec,
        is_cache=objects is not None,
    )
    return Tiers(disk, objects)
