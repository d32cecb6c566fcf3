"""Finding, counting, checking and removing the store's chunks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.store_chunks import NAMESPACE, layout_of, sample
from vllm_kvmarket.core.errors import ChunkDamagedError, ChunkMissingError
from vllm_kvmarket.store import DiskStore


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    return DiskStore(tmp_path / "chunks")


def test_an_empty_store_has_nothing(store: DiskStore) -> None:
    """A new store holds no chunk, no bytes, and nothing to sweep or delete."""
    key = sample().key
    store.delete(key)
    assert list(store.keys()) == []
    assert store.bytes_used() == 0
    assert store.sweep_temporary() == 0
    assert not store.has(key)


def test_keys_and_bytes_of_all_chunks(store: DiskStore) -> None:
    """keys() lists every chunk once, in order, and bytes_used() adds up what put() wrote."""
    chunks = [sample(seed=seed) for seed in range(20)]
    written = sum(chunk.put(store) for chunk in chunks)
    assert list(store.keys()) == sorted(chunk.key for chunk in chunks)
    assert store.bytes_used() == written
    assert all(store.has(chunk.key) for chunk in chunks)


def test_a_deleted_chunk_is_gone_but_its_readers_go_on(store: DiskStore) -> None:
    """delete() takes every rank's file; who has the chunk open can still read it."""
    shares = [sample(layout_of(rank=rank, world_size=2)) for rank in (0, 1)]
    alone = sample()
    for chunk in (*shares, alone):
        chunk.put(store)
    with store.open(alone.key, alone.layout, NAMESPACE) as stored:
        store.delete(alone.key)
        assert (stored.layer(0) == alone.pages[0].reshape(-1)).all()
    assert list(store.keys()) == []
    assert store.bytes_used() == 0
    store.delete(alone.key)


def test_a_directory_can_be_deleted_like_a_chunk(store: DiskStore) -> None:
    """delete() also clears what is no file at all."""
    chunk = sample()
    chunk.put(store)
    path = store.path(chunk.key)
    path.unlink()
    path.mkdir()
    assert list(store.keys()) == [chunk.key]
    assert not store.has(chunk.key)
    store.delete(chunk.key)
    assert list(store.keys()) == []
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["00/readme.kv", "00/00.kv", f"00/{'1' * 64}.kv", f"00/{'0' * 64}.kv.bak", f"00/{'Z' * 64}.kv"],
)
def test_files_that_are_none_of_ours_are_left_alone(store: DiskStore, name: str) -> None:
    """Other files in the folder are neither counted nor listed nor swept."""
    (store.root / "00").mkdir()
    (store.root / name).write_text("something else")
    assert list(store.keys()) == []
    assert store.bytes_used() == 0
    store.delete(bytes(32))
    assert store.sweep_temporary() == 0
    assert (store.root / name).exists()


def test_verify_checks_every_ranks_file(store: DiskStore) -> None:
    """verify() finds damage in any share, also in those of other ranks."""
    shares = [sample(layout_of(rank=rank, world_size=2)) for rank in (0, 1)]
    for share in shares:
        share.put(store)
    key = shares[0].key
    store.verify(key)
    path = store.path(key, 1, 2)
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)
    with pytest.raises(ChunkDamagedError, match=r"1of2.kv: layer 2 is not what was stored"):
        store.verify(key)
    shares[0].load(store)


def test_the_name_of_a_file_is_its_key(store: DiskStore) -> None:
    """Files are found by their key alone: two hex digits of folder, the key, the rank's share."""
    key = bytes(range(32))
    name = key.hex()
    assert store.path(key) == store.root / "00" / f"{name}.kv"
    assert store.path(key, 1, 4) == store.root / "00" / f"{name}.1of4.kv"


def test_shares_are_the_files_of_a_chunk(store: DiskStore) -> None:
    """files() names each rank's file that is there, and no other thing beside it."""
    alone, half = sample(), sample(layout_of(rank=1, world_size=2))
    key = alone.key
    assert store.files(key) == []
    half.put(store)
    assert store.files(key) == [(1, 2, "")]
    alone.put(store)
    assert store.files(key) == [(0, 1, ""), (1, 2, "")]
    name = key.hex()
    for other in ("2of2", "0of1", "01of2", "0of0"):
        store.path(key).with_name(f"{name}.{other}.kv").write_bytes(b"")
    store.path(key, 0, 3).mkdir()
    assert store.files(key) == [(0, 1, ""), (1, 2, "")]
    with store.open_share(key, 1, 2, NAMESPACE) as share:
        assert share.header.layout == half.layout
    store.path(key).rename(store.path(key, 3, 4))
    with pytest.raises(ChunkDamagedError, match="holds the share of rank 0 of 1"):
        store.open_share(key, 3, 4)


def test_a_chunk_that_another_one_stored_can_be_made_durable(store: DiskStore) -> None:
    """make_durable() is for chunks that are there; a missing one is an error."""
    chunk = sample()
    with pytest.raises(ChunkMissingError):
        store.make_durable(chunk.key)
    chunk.put(store)
    store.make_durable(chunk.key)
