"""The host-memory tier: decoded, verified pages of hot chunks, as one engine lays them out.

One buffer a chunk, layer after layer, each layer's pages one after another. The memory of an
evicted chunk is reused for the next chunk of its size: on a GPU's host it is page-locked, and
allocating that takes longer than filling it.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Self

from vllm_kvmarket.store.chunk_format import Bytes, ChunkLayout, raw_sizes
from vllm_kvmarket.store.chunk_reader import aligned_empty

# A chunk is hot when it is loaded again within so many other chunks.
REMEMBERED_KEYS = 4096
# A chunk that was prefetched for a waiting request is not evicted for another prefetch, for so
# long: the request may have been aborted.
PREFETCH_PROTECTED_S = 60.0


def layers_of(
    buffer: Bytes, layout: ChunkLayout, page_count: int, with_state: bool = False
) -> list[Bytes]:
    """Cut a chunk's buffer into its layers: views, uint8 (page_count * page_bytes,) each."""
    layers = []
    start = 0
    for size in raw_sizes(layout, page_count, with_state):
        stop = start + size
        layers.append(buffer[start:stop])
        start = stop
    return layers


@dataclass(frozen=True, slots=True)
class HostUsage:
    """How full the tier is: bytes allocated, of at most `capacity_bytes`, for so many chunks."""

    bytes_used: int
    capacity_bytes: int
    chunks: int


@dataclass(slots=True, eq=False)
class _Entry:
    buffer: Bytes
    users: int
    protected_until_s: float = 0.0
    dropped: bool = False


class Filling:
    """One chunk that is being brought in; use it in a `with`, in the thread that began it.

    Take `memory`, fill it, `commit`. Then others can pin the chunk, and its bytes must not change.
    A `with` that ends without `commit` gives the memory back.
    """

    def __init__(self, tier: HostTier, key: bytes, *, prefetched: bool) -> None:
        self._tier = tier
        self._key = key
        self._prefetched = prefetched
        self._entry: _Entry | None = None
        self._committed = False

    def memory(self, size: int) -> Bytes | None:
        """Memory for the chunk, uint8 (size,) with any content; None when there is none.

        Evicts unpinned chunks, least recently used first, but only when that is enough. Raises what
        `allocate` raises, except MemoryError.
        """
        assert self._entry is None, "one chunk has one buffer"
        buffer = self._tier._claim(size, prefetching=self._prefetched)
        if buffer is None:
            return None
        self._entry = _Entry(buffer, users=1)
        return buffer

    def commit(self) -> None:
        """The memory contains the verified chunk: let others pin it."""
        assert self._entry is not None, "there is nothing to commit"
        if self._prefetched:
            self._entry.protected_until_s = time.monotonic() + PREFETCH_PROTECTED_S
        self._committed = True
        self._tier._commit(self._key, self._entry)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._committed:
            self._tier._abandon(self._key, self._entry)
        elif self._entry is not None:
            self._tier._release(self._entry)


class HostTier:
    """At most `capacity_bytes` of memory from `allocate`; thread-safe. 0 turns the tier off.

    `allocate` takes a number of bytes and returns uint8 (bytes,); it may raise MemoryError.
    """

    def __init__(
        self, capacity_bytes: int, allocate: Callable[[int], Bytes] = aligned_empty
    ) -> None:
        self._capacity = capacity_bytes
        self._allocate = allocate
        self._changed = threading.Condition()
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # least recently used first
        self._filling: dict[bytes, bool] = {}  # whether others may wait for it
        self._spare: list[Bytes] = []
        self._remembered: OrderedDict[bytes, None] = OrderedDict()
        self._allocated = 0  # counted before it is allocated, until it is freed
        self._idle = 0  # of it, bytes that could be freed now: unpinned and spare

    @property
    def is_on(self) -> bool:
        """Whether the tier is in use."""
        return self._capacity > 0

    def usage(self) -> HostUsage:
        """How full it is."""
        with self._changed:
            return HostUsage(self._allocated, self._capacity, len(self._entries))

    def is_hot(self, key: bytes) -> bool:
        """Whether the chunk was loaded not long ago; remembers this load. Mutates."""
        if not self.is_on:
            return False
        with self._changed:
            hot = key in self._remembered
            self._remembered[key] = None
            self._remembered.move_to_end(key)
            if len(self._remembered) > REMEMBERED_KEYS:
                self._remembered.popitem(last=False)
            return hot

    def has(self, key: bytes) -> bool:
        """Whether the chunk is here, or will be soon."""
        with self._changed:
            return key in self._entries or self._filling.get(key, False)

    def pin(self, key: bytes, wait_s: float = 0.0) -> AbstractContextManager[Bytes] | None:
        """The chunk's pages, uint8 (bytes,), to be read only; None when they are not here.

        They are not evicted until the `with` ends, in which they must be used. Waits at most
        `wait_s` for a chunk that another thread brings in, unless `idly`.
        """
        if not self.is_on:
            return None
        with self._changed:
            if wait_s > 0 and self._filling.get(key, False):
                self._changed.wait_for(lambda: not self._filling.get(key, False), wait_s)
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            entry.protected_until_s = 0.0
            if entry.users == 0:
                self._idle -= entry.buffer.nbytes
            entry.users += 1
            return self._pinned(entry)

    @contextmanager
    def _pinned(self, entry: _Entry) -> Iterator[Bytes]:
        try:
            yield entry.buffer
        finally:
            self._release(entry)

    def begin(self, key: bytes, *, prefetched: bool = False, idly: bool = False) -> Filling | None:
        """Begin to bring in a chunk; None when it is here, or another thread brings it.

        A prefetched chunk is not evicted for other prefetches until it was pinned once, or
        PREFETCH_PROTECTED_S have passed. `idly` is for a thread that gives way to all others:
        nobody waits for its chunk.
        """
        if not self.is_on:
            return None
        with self._changed:
            if key in self._entries or key in self._filling:
                return None
            self._filling[key] = not idly
            return Filling(self, key, prefetched=prefetched)

    def drop(self, key: bytes) -> None:
        """Evict a chunk, if it is here. Its memory stays while it is pinned."""
        with self._changed:
            entry = self._entries.pop(key, None)
            self._remembered.pop(key, None)
            if entry is None:
                return
            entry.dropped = True
            if entry.users == 0:
                self._spare.append(entry.buffer)

    def _claim(self, size: int, *, prefetching: bool) -> Bytes | None:
        with self._changed:
            for index, buffer in enumerate(self._spare):
                if buffer.nbytes == size:
                    self._idle -= size
                    return self._spare.pop(index)
            victims = self._victims(size, prefetching=prefetching)
            if victims is None:
                return None
            reusable: Bytes | None = None
            for key in victims:
                buffer = self._entries.pop(key).buffer
                self._idle -= buffer.nbytes
                if buffer.nbytes == size and reusable is None:
                    reusable = buffer
                else:
                    self._allocated -= buffer.nbytes
            if reusable is not None:
                return reusable
            self._allocated += size
        try:
            return self._allocate(size)
        except BaseException as error:
            with self._changed:
                self._allocated -= size
            if isinstance(error, MemoryError):
                return None
            raise

    def _victims(self, size: int, *, prefetching: bool) -> list[bytes] | None:
        """Which chunks to evict so that `size` fits, after spare memory; None when it cannot fit.

        Frees spare memory only when `size` fits then. The caller has the lock.
        """
        excess = self._allocated + size - self._capacity
        if excess > self._idle:
            return None
        now = time.monotonic()
        excess -= sum(buffer.nbytes for buffer in self._spare)
        victims = []
        for key, entry in self._entries.items():
            if excess <= 0:
                break
            if entry.users == 0 and not (prefetching and entry.protected_until_s > now):
                victims.append(key)
                excess -= entry.buffer.nbytes
        if excess > 0:
            return None
        while self._spare and self._allocated + size > self._capacity:
            freed = self._spare.pop().nbytes
            self._allocated -= freed
            self._idle -= freed
        return victims

    def _commit(self, key: bytes, entry: _Entry) -> None:
        with self._changed:
            self._filling.pop(key, None)
            self._entries[key] = entry
            self._changed.notify_all()

    def _abandon(self, key: bytes, entry: _Entry | None) -> None:
        with self._changed:
            self._filling.pop(key, None)
            if entry is not None:
                self._spare.append(entry.buffer)
                self._idle += entry.buffer.nbytes
            self._changed.notify_all()

    def _release(self, entry: _Entry) -> None:
        with self._changed:
            entry.users -= 1
            if entry.users == 0:
                self._idle += entry.buffer.nbytes
                if entry.dropped:
                    self._spare.append(entry.buffer)

    def check_integrity(self) -> None:
        """Raise AssertionError when the counts do not add up; for tests, when nothing is filled."""
        with self._changed:
            entries = list(self._entries.values())
            spare = sum(buffer.nbytes for buffer in self._spare)
            idle = spare + sum(entry.buffer.nbytes for entry in entries if entry.users == 0)
            pinned = sum(entry.buffer.nbytes for entry in entries if entry.users)
            assert 0 <= self._allocated <= self._capacity, "more memory than allowed"
            assert idle == self._idle, "idle memory is counted wrong"
            assert idle + pinned <= self._allocated, "memory that was not counted"
