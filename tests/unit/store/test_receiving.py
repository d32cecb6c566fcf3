"""Taking chunk files from elsewhere: verified before they count."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.store_chunks import NAMESPACE, Sample, files_in, layout_of, sample
from vllm_kvmarket.core.errors import ChunkDamagedError, StoreFullError
from vllm_kvmarket.store import DiskStore


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    return DiskStore(tmp_path / "chunks")


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """The file of the default sample, as another store wrote it."""
    return content_of(tmp_path, sample())


def content_of(tmp_path: Path, chunk: Sample) -> bytes:
    """The file of a chunk."""
    other = DiskStore(tmp_path / "other")
    chunk.put(other)
    return other.path(chunk.key, chunk.layout.rank, chunk.layout.world_size).read_bytes()


def take(
    store: DiskStore, key: bytes, content: bytes, share: tuple[int, int] = (0, 1), extra: int = 0
) -> None:
    """Receive a file that is announced with `extra` more bytes than it has."""
    with store.receive(key, *share, len(content) + extra) as descriptor:
        os.pwrite(descriptor, content, 0)


def test_a_whole_file_takes_its_place(store: DiskStore, content: bytes) -> None:
    """A received chunk can be loaded, and has the bytes that were sent."""
    chunk = sample()
    take(store, chunk.key, content)
    chunk.load(store)
    assert store.path(chunk.key).read_bytes() == content
    assert store.usage().bytes_used == len(content)


def test_parts_may_come_from_many_threads(store: DiskStore, content: bytes) -> None:
    """The file has its size from the start, so that ranges can be written in any order."""
    chunk = sample()
    with store.receive(chunk.key, 0, 1, len(content)) as descriptor, ThreadPoolExecutor(4) as pool:
        assert os.fstat(descriptor).st_size == len(content)
        for at in range(len(content) - 100, -100, -100):
            begin = max(0, at)
            pool.submit(os.pwrite, descriptor, content[begin : at + 100], begin)
    chunk.load(store)


def fail_half_way(store: DiskStore, key: bytes, content: bytes, error: BaseException) -> None:
    """Begin to receive, and fail."""
    with store.receive(key, 0, 1, len(content)) as descriptor:
        os.pwrite(descriptor, content[:50], 0)
        assert store.usage().drafts == 1
        raise error


@pytest.mark.parametrize("at", [0, 20, 4096, -1])
def test_a_bad_file_leaves_nothing(store: DiskStore, content: bytes, at: int) -> None:
    """A wrong bit anywhere, a missing end, a byte too many: refused, and what was there stays."""
    chunk = sample()
    changed = bytearray(content)
    changed[at] ^= 1
    for bad in (bytes(changed), content[:at], content + b"x"):
        with pytest.raises(ChunkDamagedError) as raised:
            take(store, chunk.key, bad)
        assert "draft" not in str(raised.value)
        assert files_in(store) == []
    with pytest.raises(ChunkDamagedError):
        take(store, chunk.key, content, extra=1)
    assert store.usage().bytes_used == 0
    chunk.put(store)
    with pytest.raises(ChunkDamagedError):
        take(store, chunk.key, bytes(changed))
    chunk.load(store)


def test_a_body_that_writes_beyond_the_size(store: DiskStore, content: bytes) -> None:
    """A sender that sends more than it announced is refused."""
    chunk = sample()
    with (
        pytest.raises(ChunkDamagedError, match="bytes instead of"),
        store.receive(chunk.key, 0, 1, len(content)) as descriptor,
    ):
        os.pwrite(descriptor, content + b"more", 0)
    assert files_in(store) == []


def test_another_chunk_or_share_is_refused(
    store: DiskStore, tmp_path: Path, content: bytes
) -> None:
    """A whole file under a wrong key, or a wrong rank's name, is not what was asked for."""
    chunk = sample()
    with pytest.raises(ChunkDamagedError, match="holds another chunk"):
        take(store, sample(seed=1).key, content)
    with pytest.raises(ChunkDamagedError, match="holds the share of rank 0 of 1"):
        take(store, chunk.key, content, (1, 2))
    half = sample(layout_of(rank=1, world_size=2))
    take(store, half.key, content_of(tmp_path, half), (1, 2))
    assert store.files(half.key) == [(1, 2, "")]
    with store.open(half.key, half.layout, NAMESPACE):
        pass


@pytest.mark.parametrize("size", [-1, 0, 23])
def test_sizes_that_no_chunk_has(store: DiskStore, size: int) -> None:
    """An announced size that is too small for a chunk is refused before anything is made."""
    with pytest.raises(ChunkDamagedError, match="too few"):
        take(store, sample().key, b"", extra=size)
    assert files_in(store) == []


def test_a_body_that_fails_leaves_nothing(store: DiskStore, content: bytes) -> None:
    """An error of the sender passes through as it is; its draft is gone and not counted."""
    chunk = sample()
    for error in (ConnectionResetError("gone"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fail_half_way(store, chunk.key, content, error)
    assert files_in(store) == []
    assert store.usage().bytes_used == 0


def test_what_does_not_fit_is_refused_at_once(tmp_path: Path, content: bytes) -> None:
    """The quota is asked before the first byte is sent."""
    store = DiskStore(tmp_path / "small", quota_bytes=len(content) - 1)
    with pytest.raises(StoreFullError, match="quota"):
        take(store, sample().key, content)
    assert files_in(store) == []
