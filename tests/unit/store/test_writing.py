"""Storing a chunk: all of it, durably and under its name, or nothing at all."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import resource
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.support.store_chunks import DENSE, NAMESPACE, files_in, layout_of, sample
from vllm_kvmarket.core.errors import (
    ChunkDamagedError,
    ChunkMissingError,
    StoreError,
    StoreFullError,
)
from vllm_kvmarket.store import DiskStore


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    return DiskStore(tmp_path / "chunks")


def path_of(descriptor: int) -> str:
    """The path that a file was opened by."""
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def test_a_chunk_that_is_there_is_not_written_again(store: DiskStore) -> None:
    """Storing the same chunk twice leaves the first file untouched and writes nothing."""
    chunk = sample()
    assert chunk.put(store) > 0
    before = store.path(chunk.key).stat()
    assert chunk.put(store) == 0
    after = store.path(chunk.key).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert files_in(store) == [store.path(chunk.key).name]


def test_a_damaged_chunk_is_replaced(store: DiskStore) -> None:
    """Storing over a damaged file repairs it, under the eyes of a reader of the old one."""
    chunk = sample()
    chunk.put(store)
    path = store.path(chunk.key)
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x80
    path.write_bytes(content)
    with store.open(chunk.key, chunk.layout, NAMESPACE) as old:
        assert chunk.put(store) > 0
        with pytest.raises(ChunkDamagedError):
            old.layer(2)
        np.testing.assert_array_equal(old.layer(0), chunk.pages[0].reshape(-1))
    chunk.load(store)


def test_pages_may_come_in_any_cut(store: DiskStore) -> None:
    """One buffer a layer, one a page, and two-dimensional arrays make the same file."""
    chunk = sample()
    facts = {
        "key": chunk.key,
        "parent": chunk.parent,
        "namespace": chunk.namespace,
        "tokens": chunk.tokens,
        "layout": chunk.layout,
    }
    chunk.put(store)
    path = store.path(chunk.key)
    expected = path.read_bytes()
    for layers in (
        [[layer] for layer in chunk.pages],
        [[layer.reshape(-1)] for layer in chunk.pages],
        [[layer.reshape(-1)[:9], layer.reshape(-1)[9:]] for layer in chunk.pages],
    ):
        store.delete(chunk.key)
        assert store.put(**facts, layers=layers) == len(expected)
        assert path.read_bytes() == expected


def test_the_callers_memory_goes_to_the_kernel_unjoined(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write hands over the caller's own buffers, in one call, without a copy."""
    chunk = sample(layout_of(DENSE))
    addresses = {page.ctypes.data for layer in chunk.pages for page in layer}
    calls: list[set[int]] = []
    real = os.writev

    def recording(descriptor: int, buffers: list) -> int:
        calls.append({np.frombuffer(buffer, np.uint8).ctypes.data for buffer in buffers})
        return real(descriptor, buffers)

    monkeypatch.setattr(os, "writev", recording)
    chunk.put(store)
    assert len(calls) == 1
    assert addresses <= calls[0]


def test_pages_that_do_not_fit_are_refused(store: DiskStore) -> None:
    """Wrong sizes, gaps in memory, another key's tokens: nothing is written."""
    chunk = sample()
    facts = {
        "key": chunk.key,
        "parent": chunk.parent,
        "namespace": chunk.namespace,
        "tokens": chunk.tokens,
        "layout": chunk.layout,
    }
    whole = [[layer] for layer in chunk.pages]
    strided = [[np.zeros((2, 200), np.uint8)[:, ::2]] for _ in chunk.pages]
    for layers in (whole[:2], [[layer[:1]] for layer in chunk.pages], [], strided):
        with pytest.raises(ValueError, match="do not fit the layout 012/test-tokens"):
            store.put(**facts, layers=layers)
    with pytest.raises(ValueError, match="is not the key of these tokens"):
        store.put(**{**facts, "parent": b"p" * 32}, layers=whole)
    for tokens in (b"", chunk.tokens[:-1]):
        with pytest.raises(ValueError, match="packed tokens"):
            store.put(**{**facts, "tokens": tokens}, layers=whole)
    assert files_in(store) == []


def test_everything_is_synced_before_it_gets_its_name(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New folders, then the file's content, then its name: each is durable before the next."""
    events: list[tuple[str, str]] = []
    real_sync, real_replace, real_write = os.fsync, Path.replace, os.writev

    def name_of(descriptor: int) -> str:
        return path_of(descriptor).removeprefix(str(store.root)).partition("-")[0]

    def sync(descriptor: int) -> None:
        events.append(("sync", name_of(descriptor)))
        real_sync(descriptor)

    def write(descriptor: int, buffers: list) -> int:
        events.append(("write", name_of(descriptor)))
        return real_write(descriptor, buffers)

    def replace(self: Path, target: Path) -> Path:
        events.append(("name", self.name.partition("-")[0]))
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "writev", write)
    monkeypatch.setattr(Path, "replace", replace)
    chunk = sample()
    folder = f"/{chunk.key.hex()[:2]}"
    draft = f"{folder}/.draft"
    chunk.put(store)
    kept = [("write", draft), ("sync", draft), ("name", ".draft"), ("sync", folder)]
    assert events == [("sync", ""), *kept]

    # Another store finds the folder made, and cannot know that it is durable.
    events.clear()
    store.path(chunk.key).unlink()
    again = DiskStore(store.root)
    chunk.put(again)
    assert events == [("sync", ""), *kept]

    events.clear()
    store.path(chunk.key).unlink()
    chunk.put(again)
    assert events == kept


def test_the_stores_own_folder_is_made_durably(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each folder that had to be made is synced into the one above it."""
    synced: list[str] = []
    real = os.fsync

    def sync(descriptor: int) -> None:
        synced.append(path_of(descriptor).removeprefix(str(tmp_path)))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    DiskStore(tmp_path / "a" / "b" / "c")
    assert synced == ["", "/a", "/a/b"]
    DiskStore(tmp_path / "a" / "b" / "c")
    assert len(synced) == 3


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["writev", "fsync", "open"])
def test_a_full_disk_leaves_nothing_behind(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    """Wherever the device or the quota runs out, the draft is removed and the store goes on."""
    kept = sample(seed=1)
    kept.put(store)
    chunk = sample()
    (store.root / chunk.key.hex()[:2]).mkdir(exist_ok=True)
    real = getattr(os, call)

    def full(*arguments: object) -> object:
        if call == "open" and not arguments[1] & os.O_CREAT:
            return real(*arguments)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StoreFullError, match=r"no space for it.*publish the document again"):
        chunk.put(store)
    monkeypatch.undo()
    assert files_in(store) == [store.path(kept.key).name]
    assert chunk.put(store) > 0
    chunk.load(store)
    kept.load(store)


def test_a_limit_that_is_met_half_way(store: DiskStore) -> None:
    """With a real limit (ulimit -f) the first write is cut short and the second fails: no file."""
    chunk = sample(layout_of(DENSE))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        with pytest.raises(StoreFullError, match="File too large"):
            chunk.put(store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_in(store) == []
    chunk.put(store)
    chunk.load(store)


def test_a_real_file_system_without_room(tmp_path: Path) -> None:
    """On a file system of 256 KiB chunks are stored until it is full; those stay whole."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mounted)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system needs root")
    try:
        store = DiskStore(mounted / "chunks")
        stored = []

        def fill() -> None:
            for seed in range(100):
                chunk = sample(layout_of(16384), seed=seed)
                chunk.put(store)
                stored.append(chunk)

        with pytest.raises(StoreFullError, match="No space left on device"):
            fill()
        assert stored
        assert len(files_in(store)) == len(stored)
        for chunk in stored:
            chunk.load(store)
        store.delete(stored[0].key)
        stored[0].put(store)
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_other_errors_are_reported_and_leave_nothing(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An I/O error while writing is a StoreError; an interrupt passes; neither leaves a draft."""
    chunk = sample()
    for error, expected in (
        (OSError(errno.EIO, "Input/output error"), StoreError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):

        def fail(descriptor: int, error: BaseException = error) -> None:
            if "draft" in path_of(descriptor):
                raise error

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(expected):
            chunk.put(store)
        assert files_in(store) == []


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    """A home that cannot hold chunks is one clear line."""
    (tmp_path / "chunks").write_text("not a folder")
    with pytest.raises(StoreError, match="cannot make the store's folder"):
        DiskStore(tmp_path / "chunks" / "below")
    store = DiskStore(tmp_path / "other")
    chunk = sample()
    (store.root / chunk.key.hex()[:2]).write_text("not a folder")
    with pytest.raises(StoreError, match="cannot be stored"):
        chunk.put(store)
    with pytest.raises(StoreError):
        chunk.load(store)


def test_a_store_whose_folder_was_removed_makes_it_again(store: DiskStore) -> None:
    """After someone removed the folder of all chunks, the next chunk is stored all the same."""
    chunk = sample()
    chunk.put(store)
    shutil.rmtree(store.root)
    assert store.usage().bytes_used == 0
    with pytest.raises(ChunkMissingError):
        chunk.load(store)
    chunk.put(store)
    chunk.load(store)


def test_the_sweep_spares_drafts_in_the_making(store: DiskStore) -> None:
    """Only drafts that nobody has locked go, and chunks never do."""
    chunk = sample()
    chunk.put(store)
    folder = store.path(chunk.key).parent
    for name in (".draft-left", ".draft-new"):
        (folder / name).write_bytes(b"half")
    with (folder / ".draft-new").open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        assert store.sweep_temporary() == 1
    assert files_in(store) == sorted([".draft-new", store.path(chunk.key).name])
    chunk.load(store)


def test_layouts_that_nobody_converts_have_files_of_their_own(store: DiskStore) -> None:
    """Neither takes the other's place, nor that of a chunk that others convert."""
    tags = ("012/test-tokens", "012/cuda-ONE", "012/cuda-OTHER")
    chunks = [
        dataclasses.replace(sample(layout_of(tag=tag)), pages=sample(seed=seed).pages)
        for seed, tag in enumerate(tags)
    ]
    for chunk in chunks:
        assert chunk.put(store) > 0
    for chunk in chunks:
        chunk.load(store)
        assert chunk.put(store) == 0
    key = chunks[0].key
    store.verify(key)
    first, *others = store.files(key)
    assert (first, len({share.layout for share in others} - {""})) == ((0, 1, ""), 2)
    assert list(store.keys()) == [key]
    other = store.files(key)[1]
    content = bytearray(store.path(key, *other).read_bytes())
    content[-1] ^= 1
    store.path(key, *other).write_bytes(content)
    with pytest.raises(ChunkDamagedError):
        store.verify(key)
    assert not store.quarantine(key, 0, 1, "damaged")
    assert store.quarantine(key, 0, 1, "damaged", other.layout)
    store.verify(key)
    store.path(key, *store.files(key)[1]).rename(store.path(key, 0, 1, "0123456789abcdef"))
    with pytest.raises(ChunkDamagedError, match="another layout than its name says"):
        store.verify(key)
    store.delete(key)
    assert files_in(store) == [f"{entry.path.name}" for entry in store.quarantined()]
