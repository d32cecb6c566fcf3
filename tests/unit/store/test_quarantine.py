"""Damaged files: out of the way, kept for a while, never in the way of what is whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.store_chunks import DENSE, Sample, layout_of, sample
from vllm_kvmarket.core.errors import ChunkMissingError
from vllm_kvmarket.store import DiskStore
from vllm_kvmarket.store.quarantine import MAX_FILES


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    return DiskStore(tmp_path / "chunks")


def damage(store: DiskStore, chunk: Sample) -> Path:
    """Store a chunk and flip its last bit."""
    chunk.put(store)
    path = store.path(chunk.key, chunk.layout.rank, chunk.layout.world_size)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path


def test_a_damaged_file_is_moved(store: DiskStore) -> None:
    """It is no longer found by any reader; its name, reason, size and time can be listed."""
    chunk = sample()
    path = damage(store, chunk)
    size = path.stat().st_size
    reason = f'{path.name}: layer 2 is not what was stored; it/was: "bad" ~ 100 % ü'
    assert store.quarantine(chunk.key, 0, 1, reason)
    with pytest.raises(ChunkMissingError):
        chunk.load(store)
    assert list(store.keys()) == []
    (entry,) = store.quarantined()
    assert (entry.name, entry.bytes) == (path.name, size)
    assert f"{path.name}: {entry.reason}" == reason
    assert entry.path.stat().st_size == size
    assert entry.at_s > 1e9
    usage = store.usage()
    assert (usage.bytes_used, usage.quarantined_files, usage.quarantined_bytes) == (size, 1, size)
    assert not store.quarantine(chunk.key, 0, 1, "again")
    chunk.put(store)
    chunk.load(store)


def test_a_whole_file_stays(store: DiskStore) -> None:
    """A reader that was wrong, or came after the repair, moves nothing."""
    chunk = sample()
    chunk.put(store)
    assert not store.quarantine(chunk.key, 0, 1, "seen by a bad memory")
    assert not store.quarantine(sample(seed=1).key, 0, 1, "never was there")
    chunk.load(store)
    assert store.quarantined() == []


def test_another_ranks_file_is_damage(store: DiskStore) -> None:
    """A share under another rank's name is moved; the true one stays."""
    share = sample(layout_of(rank=0, world_size=2))
    share.put(store)
    os.link(store.path(share.key, 0, 2), store.path(share.key, 1, 2))
    assert store.quarantine(share.key, 1, 2, "not its share")
    assert store.files(share.key) == [(0, 2, "")]
    share.load(store)


@pytest.mark.parametrize("is_filled", [False, True])
def test_a_directory_is_moved_like_a_file(store: DiskStore, is_filled: bool) -> None:
    """A folder in a chunk's place goes as well, with what is in it."""
    chunk = sample()
    path = store.path(chunk.key)
    path.mkdir(parents=True)
    if is_filled:
        (path / "note").write_bytes(b"something")
    assert store.quarantine(chunk.key, 0, 1, "a directory")
    (entry,) = store.quarantined()
    assert entry.bytes == (9 if is_filled else 0)
    assert entry.path.is_dir()
    chunk.put(store)
    chunk.load(store)


def test_the_next_put_moves_what_is_damaged(store: DiskStore) -> None:
    """Whoever stores a chunk over a damaged file keeps that file, with the reason."""
    chunk = sample()
    damage(store, chunk)
    assert chunk.put(store) > 0
    chunk.load(store)
    assert [entry.reason for entry in store.quarantined()] == [
        "layer 2 is not what was stored; publish the document again to repair it"
    ]


def test_the_oldest_go_when_there_are_too_many_bytes(tmp_path: Path) -> None:
    """The folder never takes more than its limit."""
    size = sample(layout_of(DENSE)).put(DiskStore(tmp_path / "other"))
    store = DiskStore(tmp_path / "chunks", quarantine_bytes=3 * size)
    for seed in range(5):
        damage(store, sample(layout_of(DENSE), seed=seed))
        assert store.quarantine(sample(layout_of(DENSE), seed=seed).key, 0, 1, f"number {seed}")
    assert [entry.reason for entry in store.quarantined()] == [f"number {n}" for n in (2, 3, 4)]
    assert store.usage().bytes_used == 3 * size == store.recount()
    none = DiskStore(tmp_path / "chunks", quarantine_bytes=0)
    damage(none, sample(layout_of(DENSE)))
    assert none.quarantine(sample(layout_of(DENSE)).key, 0, 1, "not to be kept")
    assert none.quarantined() == []
    assert none.usage().bytes_used == 0


def test_the_oldest_go_when_there_are_too_many_files(store: DiskStore) -> None:
    """Many small files are bounded as well; files of others in the folder are left alone."""
    chunk = sample()
    damage(store, chunk)
    assert store.quarantine(chunk.key, 0, 1, "the first")
    folder = store.quarantined()[0].path.parent
    (folder / "readme").write_text("not ours")
    for number in range(MAX_FILES):
        (folder / f"{number:020d}~old.kv~older").write_bytes(b"")
    damage(store, chunk)
    assert store.quarantine(chunk.key, 0, 1, "x" * 1000)
    entries = store.quarantined()
    assert len(entries) == MAX_FILES
    assert entries[-2].reason == "the first"
    assert set(entries[-1].reason) == {"x"}
    assert (folder / "readme").exists()


def test_a_file_that_cannot_be_moved_stays(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """quarantine() answers False, and raises nothing."""
    chunk = sample()
    damage(store, chunk)

    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "replace", refuse)
    assert not store.quarantine(chunk.key, 0, 1, "cannot be moved")
    assert store.has(chunk.key)
