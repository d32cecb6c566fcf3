"""A stored chunk is bit-exact, or an error: damage is made for real, byte by byte."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from pathlib import Path

import msgspec
import pytest

from tests.support.kv_pages import kv_sample
from tests.support.store_chunks import (
    DENSE,
    NAMESPACE,
    OTHER_NAMESPACE,
    PADDED,
    assert_damaged,
    layout_of,
    sample,
    stored,
)
from vllm_kvmarket.core.errors import ChunkDamagedError, LayoutMismatchError, StoreError
from vllm_kvmarket.store import DiskStore, chunk_format

Sizes = pytest.mark.parametrize("page_bytes", [PADDED, DENSE])


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    return DiskStore(tmp_path / "chunks")


@pytest.mark.slow
@Sizes
def test_every_single_byte_is_checked_on_load(store: DiskStore, page_bytes: int) -> None:
    """One flipped bit in any byte of the file, padding included, makes the load fail."""
    chunk, path = stored(store, page_bytes)
    content = path.read_bytes()
    undetected = []
    with path.open("r+b", buffering=0) as file:
        for position, byte in enumerate(content):
            os.pwrite(file.fileno(), bytes([byte ^ 1 << position % 8]), position)
            try:
                chunk.load(store)
            except StoreError as error:
                if "\n" in str(error):
                    undetected.append(position)
            else:
                undetected.append(position)
            os.pwrite(file.fileno(), bytes([byte]), position)
    assert undetected == []
    chunk.load(store)


def test_every_single_byte_of_an_encoded_chunk_is_checked(tmp_path: Path) -> None:
    """One flipped bit anywhere in a chunk that is not raw makes the load fail, and leaves zeros."""
    store = DiskStore(tmp_path / "chunks", codec="zstd-exponent")
    chunk = kv_sample(page_bytes=1024)
    chunk.put(store)
    path = store.path(chunk.key)
    content = path.read_bytes()
    assert len(content) - 4096 < sum(layer.nbytes for layer in chunk.pages)
    # Every byte with a layer in it, and some of the header's, which is as a raw chunk's.
    for position in [*range(0, 4096, 61), *range(4096, len(content))]:
        with path.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), bytes([content[position] ^ 1 << position % 8]), position)
            room = chunk.room(0, 2)
            with (
                pytest.raises(ChunkDamagedError),
                store.open(chunk.key, chunk.layout, NAMESPACE) as opened,
            ):
                opened.copy_all_pages(0, 2, [[layer] for layer in room])
            assert position < 4096 or not any(layer.any() for layer in room)
            os.pwrite(file.fileno(), content[position : position + 1], position)
    chunk.load(store)
    os.truncate(path, len(content) - 1)
    assert_damaged(store, chunk)


@pytest.mark.parametrize("pages", [(0, 2), (0, 1), (1, 2)])
def test_verified_bytes_that_do_not_decode(tmp_path: Path, pages: tuple[int, int]) -> None:
    """A layer with a right checksum, but of no codec's making, is damage, and leaves zeros."""
    store = DiskStore(tmp_path / "chunks", codec="zstd-exponent")
    chunk = kv_sample()
    chunk.put(store)
    path = store.path(chunk.key)
    with store.open(chunk.key, chunk.layout, NAMESPACE) as opened:
        header, front = opened.header, path.read_bytes()[:4096]
    payload = bytearray(path.read_bytes()[len(front) :])
    start = header.layer_offsets[1]
    stop = start + header.layer_bytes[1]
    payload[stop - 100 : stop] = bytes(100)
    forged = (
        header.checksums[0],
        chunk_format.checksum([payload[start:stop]]),
        header.checksums[2],
    )
    header = msgspec.structs.replace(header, checksums=forged)
    path.write_bytes(chunk_format.encode(header) + payload)
    room = chunk.room(*pages)
    with store.open(chunk.key, chunk.layout, NAMESPACE) as opened:
        with pytest.raises(ChunkDamagedError, match="layer 1 cannot be decoded"):
            opened.copy_all_pages(*pages, [[layer] for layer in room])
        assert not any(layer.any() for layer in room)
        one = chunk.room(*pages)[1]
        with pytest.raises(ChunkDamagedError):
            opened.copy_pages(1, *pages, [one])
        assert not one.any()
    assert_damaged(store, chunk)


@Sizes
@pytest.mark.parametrize("value", [0x00, 0xFF])
def test_a_block_that_the_disk_lost(store: DiskStore, page_bytes: int, value: int) -> None:
    """4,096 bytes that became zeros or ones are detected, wherever they begin."""
    chunk, path = stored(store, page_bytes)
    content = path.read_bytes()
    for start in range(0, len(content), 1024):
        lost = bytes([value]) * len(content[start : start + 4096])
        if content[start : start + 4096] != lost:
            path.write_bytes(content[:start] + lost + content[start + 4096 :])
            with pytest.raises(ChunkDamagedError):
                chunk.load(store)
    assert_damaged(store, chunk)


@Sizes
def test_a_truncated_file(store: DiskStore, page_bytes: int) -> None:
    """A truncated end, by one byte or more, is detected when the chunk is opened."""
    chunk, path = stored(store, page_bytes)
    size = path.stat().st_size
    for length in sorted({*range(0, size, 61), 1, 8, 23, 24, 25, 4095, 4096, 4097, size - 1}):
        os.truncate(path, length)
        with pytest.raises(ChunkDamagedError):
            store.open(chunk.key, chunk.layout, NAMESPACE)
        assert chunk.put(store) == size
    chunk.load(store)


@pytest.mark.parametrize("extra", [b"\0", b"x", bytes(4096)])
def test_an_extended_file(store: DiskStore, extra: bytes) -> None:
    """A single byte too many, also a zero, is detected when the chunk is opened."""
    chunk, path = stored(store)
    with path.open("ab") as file:
        file.write(extra)
    with pytest.raises(ChunkDamagedError, match="instead of"):
        store.open(chunk.key, chunk.layout, NAMESPACE)
    assert_damaged(store, chunk)


@pytest.mark.parametrize("content", [b"", b"KVMCHUNK", b"garbage" * 3000, bytes(20_000)])
def test_a_file_of_something_else(store: DiskStore, content: bytes) -> None:
    """An empty file and a file of other bytes are no chunks."""
    chunk, path = stored(store)
    path.write_bytes(content)
    assert_damaged(store, chunk)


def test_a_file_of_another_key_renamed_into_place(store: DiskStore) -> None:
    """A whole chunk under the wrong name is not handed out."""
    chunk, path = stored(store)
    other, other_path = stored(store, seed=1)
    other_path.rename(path)
    with pytest.raises(ChunkDamagedError, match=f"holds another chunk, {other.key.hex()}"):
        chunk.load(store)
    assert_damaged(store, chunk)


def test_a_file_of_another_namespace_renamed_into_place(store: DiskStore) -> None:
    """The same tokens computed by another model are not handed out."""
    chunk, path = stored(store)
    other = sample(namespace=OTHER_NAMESPACE)
    other.put(store)
    store.path(other.key).rename(path)
    with pytest.raises(ChunkDamagedError, match="another chunk"):
        chunk.load(store)
    assert_damaged(store, chunk)


def test_another_ranks_file_renamed_into_place(store: DiskStore) -> None:
    """A rank never takes another rank's share for its own."""
    shares = [sample(layout_of(rank=rank, world_size=2)) for rank in (0, 1)]
    for share in shares:
        share.put(store)
    key = shares[0].key
    shutil.copy(store.path(key, 1, 2), store.path(key, 0, 2))
    with pytest.raises(LayoutMismatchError):
        shares[0].load(store)
    with pytest.raises(ChunkDamagedError, match="share of rank 1 of 2"):
        store.verify(key)
    shares[0].put(store)
    store.verify(key)


def test_a_file_in_another_layout_is_replaced_by_the_next_put(store: DiskStore) -> None:
    """Whoever publishes with another layout stores the chunk anew for that layout."""
    chunk, path = stored(store)
    other = sample(layout_of(tag="102/test-tokens"))
    with pytest.raises(LayoutMismatchError):
        other.load(store)
    store.verify(chunk.key)
    assert other.put(store) == path.stat().st_size
    other.load(store)


@pytest.mark.parametrize("filled", [False, True])
def test_a_directory_in_its_place(store: DiskStore, filled: bool) -> None:
    """A directory is damage, and makes way for the chunk into quarantine."""
    chunk, path = stored(store)
    path.unlink()
    path.mkdir()
    if filled:
        (path / "something").write_text("else")
    assert_damaged(store, chunk)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.is_file()
    assert len(store.quarantined()) == 1


@pytest.mark.timeout(20)
def test_a_pipe_in_its_place(store: DiskStore) -> None:
    """A named pipe that nobody writes to is damage; nobody waits for it."""
    chunk, path = stored(store)
    path.unlink()
    os.mkfifo(path)
    assert_damaged(store, chunk)


@pytest.mark.parametrize("target", ["/dev/zero", "/nowhere", "itself"])
def test_a_link_in_its_place(store: DiskStore, target: str) -> None:
    """A link to a device, to nothing or to itself never yields a chunk, and makes way for it."""
    chunk, path = stored(store)
    path.unlink()
    path.symlink_to(path if target == "itself" else target)
    with pytest.raises(StoreError):
        chunk.load(store)
    assert chunk.put(store) > 0
    assert path.is_file()
    assert not path.is_symlink()
    chunk.load(store)


def test_a_file_that_may_not_be_read(store: DiskStore) -> None:
    """A file without permission to read is reported as such, not as missing."""
    chunk, path = stored(store)
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        with pytest.raises(ChunkDamagedError, match=r"cannot be read.*permission"):
            chunk.load(store)
    finally:
        os.seteuid(user)
    path.chmod(0o644)
    chunk.load(store)


def test_a_device_that_fails(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """An I/O error while a layer is read is damage, and leaves zeros, never half a layer."""
    chunk, _ = stored(store)
    room = chunk.room(0, 2)
    real = os.preadv
    with store.open(chunk.key, chunk.layout, NAMESPACE) as opened:

        def fail(descriptor: int, buffers: list, position: int) -> int:
            if position > 8192:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(descriptor, buffers, position)

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(ChunkDamagedError, match="Input/output error"):
            opened.copy_all_pages(0, 2, [[layer] for layer in room])
    assert not any(layer.any() for layer in room)


def test_a_file_that_is_cut_under_its_reader(store: DiskStore) -> None:
    """A chunk that is truncated once it is open is an error, where a mapping would be a crash."""
    chunk, path = stored(store, DENSE)
    room = chunk.room(0, 2)
    with store.open(chunk.key, chunk.layout, NAMESPACE) as opened:
        os.truncate(path, 4096 + DENSE)
        with pytest.raises(ChunkDamagedError, match="became shorter"):
            opened.copy_all_pages(0, 2, [[layer] for layer in room])
    assert not any(layer.any() for layer in room)


@Sizes
@pytest.mark.parametrize("pages", [(0, 2), (0, 1), (1, 2)])
def test_no_unverified_byte_stays_behind(
    store: DiskStore, page_bytes: int, pages: tuple[int, int]
) -> None:
    """When a layer is damaged, also outside the wanted pages, the destination is all zeros."""
    chunk, path = stored(store, page_bytes)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    room = chunk.room(*pages)
    with store.open(chunk.key, chunk.layout, NAMESPACE) as opened:
        with pytest.raises(ChunkDamagedError, match="layer 2 is not what was stored"):
            opened.copy_all_pages(*pages, [[layer] for layer in room])
        assert not any(layer.any() for layer in room)
        one = chunk.room(*pages)[2]
        with pytest.raises(ChunkDamagedError):
            opened.copy_pages(2, *pages, [one])
        assert not one.any()
        good = chunk.room(*pages)[0]
        opened.copy_pages(0, *pages, [good])
        assert (good == chunk.pages[0][slice(*pages)]).all()


def test_a_process_out_of_files_does_not_call_a_chunk_damaged(store: DiskStore) -> None:
    """Too many open files is this process's trouble: a whole chunk stays a whole chunk."""
    chunk, _ = stored(store)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        with pytest.raises(StoreError, match="try again") as raised:
            store.open(chunk.key, chunk.layout, NAMESPACE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not isinstance(raised.value, ChunkDamagedError)
    chunk.load(store)
