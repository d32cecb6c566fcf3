"""The quota is a hard promise: across threads, processes, and writers that die."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.store_chunks import DENSE, NAMESPACE, Sample, files_in, layout_of, sample
from vllm_kvmarket.core.errors import ChunkMissingError, StoreFullError
from vllm_kvmarket.store import DiskStore
from vllm_kvmarket.store.quota import RECORD_NAME, tree_bytes

SIZE = 16384  # of the file of every chunk here: 4,096 of header, 3 layers of 4,096


def chunk_of(seed: int) -> Sample:
    """One of many chunks of equal size."""
    return sample(layout_of(DENSE), seed=seed)


def store_of(tmp_path: Path, chunks: float, **facts: bool | int) -> DiskStore:
    """Open the store that has room for so many chunks."""
    return DiskStore(tmp_path / "chunks", quota_bytes=int(chunks * SIZE), **facts)


def use(store: DiskStore, *seeds: int) -> None:
    """Open chunks one after another, so that the clock tells them apart."""
    for seed in seeds:
        time.sleep(0.005)
        store.open(chunk_of(seed).key, layout_of(DENSE), NAMESPACE).close()


def there(store: DiskStore, *seeds: int) -> list[int]:
    """Which of these chunks have a file."""
    return [seed for seed in seeds if store.has(chunk_of(seed).key)]


def test_a_full_store_refuses_and_keeps_what_it_has(tmp_path: Path) -> None:
    """A chunk that does not fit is refused with the quota's name; after a delete it fits."""
    store = store_of(tmp_path, 3)
    for seed in range(3):
        assert chunk_of(seed).put(store) == SIZE
    usage = store.usage()
    assert (usage.bytes_used, usage.quota_bytes, usage.free_bytes) == (3 * SIZE, 3 * SIZE, 0)
    assert (usage.chunk_files, usage.drafts, usage.quarantined_files) == (3, 0, 0)
    with pytest.raises(StoreFullError, match=r"quota of 49152 .*disk_quota_bytes.*gc"):
        chunk_of(3).put(store)
    assert chunk_of(0).put(store) == 0
    for seed in range(3):
        chunk_of(seed).load(store)
    assert len(files_in(store)) == 3
    store.delete(chunk_of(0).key)
    assert store.usage().free_bytes == SIZE
    chunk_of(3).put(store)


def test_a_quota_below_what_is_used(tmp_path: Path) -> None:
    """A smaller quota deletes nothing, damaged files included, and admits nothing more."""
    large = store_of(tmp_path, 10)
    for seed in range(4):
        chunk_of(seed).put(large)
    path = large.path(chunk_of(0).key)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    large.quarantine(chunk_of(0).key, 0, 1, "damaged by the test")
    small = store_of(tmp_path, 2)
    with pytest.raises(StoreFullError):
        chunk_of(5).put(small)
    assert there(small, 1, 2, 3) == [1, 2, 3]
    assert len(small.quarantined()) == 1
    assert small.usage().free_bytes == 0
    chunk_of(5).put(large)


def test_quarantined_files_make_room(tmp_path: Path) -> None:
    """Damaged files count, but never keep a chunk out."""
    store = store_of(tmp_path, 3)
    for seed in range(3):
        chunk_of(seed).put(store)
    for seed in (0, 1):
        path = store.path(chunk_of(seed).key)
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        assert store.quarantine(chunk_of(seed).key, 0, 1, f"number {seed}")
    assert store.usage().bytes_used == 3 * SIZE
    assert store.usage().free_bytes == 2 * SIZE
    chunk_of(3).put(store)
    assert [entry.reason for entry in store.quarantined()] == ["number 1"]
    # The damaged file that is being replaced may be the one that goes.
    assert chunk_of(1).put(store) == SIZE
    assert store.quarantined() == []
    assert store.usage().bytes_used == 3 * SIZE == store.recount()


def test_a_cache_deletes_what_was_not_used_for_the_longest_time(tmp_path: Path) -> None:
    """Opening a chunk keeps it; storing others lets the oldest go, and readers go on."""
    cache = store_of(tmp_path, 3, is_cache=True)
    for seed in range(3):
        chunk_of(seed).put(cache)
    use(cache, 1, 2, 0)
    with cache.open(chunk_of(1).key, layout_of(DENSE), NAMESPACE) as reader:
        use(cache, 2, 0)
        chunk_of(3).put(cache)
        assert there(cache, 0, 1, 2, 3) == [0, 2, 3]
        assert (reader.layer(0) == chunk_of(1).pages[0].reshape(-1)).all()
    # The order that was read before is still right for what was not used since.
    use(cache, 0)
    chunk_of(4).put(cache)
    assert there(cache, 0, 2, 3, 4) == [0, 3, 4]
    assert cache.usage().bytes_used == 3 * SIZE == cache.recount()
    for seed in range(5, 20):
        chunk_of(seed).put(cache)
    assert there(cache, *range(20)) == [17, 18, 19]


def test_a_chunk_larger_than_a_cache_empties_nothing(tmp_path: Path) -> None:
    """A chunk that can never fit is refused without deleting anything."""
    cache = store_of(tmp_path, 2, is_cache=True)
    chunk_of(0).put(cache)
    with pytest.raises(StoreFullError):
        sample(layout_of(DENSE * 8)).put(cache)
    assert there(cache, 0) == [0]


WRITER = """
import random, sys, time
from pathlib import Path
from tests.unit.store.test_quota import chunk_of, store_of
from vllm_kvmarket.core.errors import StoreFullError
rng = random.Random(int(sys.argv[2]))
store = store_of(Path(sys.argv[1]), 4.5, is_cache=sys.argv[3] == "cache")
print(flush=True)
end = time.monotonic() + float(sys.argv[4])
while time.monotonic() < end:
    chunk = chunk_of(rng.randrange(8))
    try:
        chunk.put(store)
    except StoreFullError:
        store.delete(chunk_of(rng.randrange(8)).key)
"""


def writer(tmp_path: Path, seed: int, mode: str, seconds: float) -> subprocess.Popen:
    """Start a process that stores and deletes chunks; it says when it begins."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [str(tmp_path), str(seed), mode, str(seconds)]
    command = [sys.executable, "-c", WRITER, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cache", "store"])
def test_threads_and_processes_together_stay_below(tmp_path: Path, mode: str) -> None:
    """Whenever one looks, all files together are within the quota, and as many as were counted."""
    store = store_of(tmp_path, 4.5, is_cache=mode == "cache")
    stop = threading.Event()

    def write(seed: int) -> None:
        while not stop.is_set():
            try:
                chunk_of(seed).put(store)
            except StoreFullError:
                store.delete(chunk_of(seed - 1).key)

    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(writer(tmp_path, seed, mode, 1.0)) for seed in range(2)]
        pool = stack.enter_context(ThreadPoolExecutor(3))
        stack.callback(stop.set)
        threads = [pool.submit(write, seed) for seed in (1, 3, 5)]
        while any(other.poll() is None for other in others):
            counted, found = store.usage().bytes_used, store.recount()
            assert counted <= 4.5 * SIZE
            assert found <= 4.5 * SIZE
        stop.set()
        for thread in threads:
            thread.result()
        assert [other.returncode for other in others] == [0, 0]
    assert store.usage().bytes_used == tree_bytes(store.root) == store.recount()
    for seed in range(8):
        with contextlib.suppress(ChunkMissingError):
            chunk_of(seed).load(store)


def test_writers_that_are_killed_leave_the_count_too_high_at_most(tmp_path: Path) -> None:
    """After kill -9 nothing is uncounted, drafts can be swept, and the store goes on."""
    store = store_of(tmp_path, 4.5)
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(writer(tmp_path, seed, "store", 60)) for seed in range(3)]
        for process in processes:
            process.stdout.readline()
        for process in processes:
            time.sleep(0.05)
            process.kill()
    assert tree_bytes(store.root) <= store.usage().bytes_used <= 4.5 * SIZE
    store.sweep_temporary()
    assert store.usage().drafts == 0
    assert store.usage().bytes_used == tree_bytes(store.root)
    for seed in range(8):
        with contextlib.suppress(ChunkMissingError):
            chunk_of(seed).load(store)


def test_a_count_that_is_lost_or_wrong_is_made_again(tmp_path: Path) -> None:
    """Without a readable record, or with one of another folder, everything is counted."""
    store = store_of(tmp_path, 3)
    chunk_of(0).put(store)
    record = store.root / RECORD_NAME
    whole = record.read_bytes()
    for content in (b"", whole[:-1], whole[:-1] + b"?", b"?" * len(whole)):
        record.write_bytes(content)
        assert store.usage().bytes_used == SIZE
    record.unlink()
    assert store.usage().bytes_used == SIZE
    other = DiskStore(tmp_path / "other", quota_bytes=SIZE)
    (other.root / RECORD_NAME).write_bytes(whole)
    assert other.usage().bytes_used == 0


def test_a_count_that_is_too_high_keeps_no_chunk_out(tmp_path: Path) -> None:
    """Before a chunk is refused, what is really there is counted; files of others count as well."""
    store = store_of(tmp_path, 3)
    stranger = store.root / "backup.bin"
    stranger.write_bytes(b"x" * 2 * SIZE)
    assert store.recount() == 2 * SIZE
    stranger.unlink()
    assert store.usage().bytes_used == 2 * SIZE
    for seed in range(3):
        chunk_of(seed).put(store)
    assert store.usage().bytes_used == 3 * SIZE


def test_a_draft_counts_whole_from_the_start_and_is_not_swept(tmp_path: Path) -> None:
    """Whoever writes slowly has its room reserved, and nobody takes its file for abandoned."""
    store, other = store_of(tmp_path, 2), store_of(tmp_path, 2)
    chunk_of(0).put(store)
    path = store.path(chunk_of(0).key)
    content = path.read_bytes()
    store.delete(chunk_of(0).key)
    with store.receive(chunk_of(0).key, 0, 1, SIZE) as descriptor:
        usage = other.usage()
        assert (usage.bytes_used, usage.drafts) == (SIZE, 1)
        chunk_of(1).put(other)
        with pytest.raises(StoreFullError):
            chunk_of(2).put(other)
        assert other.sweep_temporary() == 0
        os.pwrite(descriptor, content, 0)
    chunk_of(0).load(other)


def test_a_fork_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A process that was forked while the lock was held cannot block the store."""
    store = store_of(tmp_path, 2)
    with store._quota.locked():
        forked = os.fork()
        if forked == 0:
            time.sleep(30)
            os._exit(0)
    try:
        chunk_of(0).put(store)
    finally:
        os.kill(forked, signal.SIGKILL)
        os.waitpid(forked, 0)
    chunk_of(0).load(store)


@pytest.fixture
def small_device(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(mounted)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system needs root")
    try:
        yield mounted
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def free_bytes(folder: Path) -> int:
    """The free bytes of a folder's device."""
    device = os.statvfs(folder)
    return device.f_bavail * device.f_frsize


def test_a_cache_on_a_device_that_is_full(small_device: Path) -> None:
    """Without a quota, a cache makes room when the device itself has none."""
    cache = DiskStore(small_device / "chunks", is_cache=True)
    for seed in range(30):
        chunk_of(seed).put(cache)
        chunk_of(seed).load(cache)
    assert 0 < len(there(cache, *range(30))) < 8
    assert cache.usage().bytes_used == tree_bytes(cache.root)


def test_no_chunk_takes_the_reserve_of_the_ledger(small_device: Path) -> None:
    """Publishing ends before the device is full; what was stored stays, and the rest is free."""
    reserve = 3 * SIZE
    store = DiskStore(small_device / "chunks", reserve_bytes=reserve)

    def fill() -> None:
        for seed in range(30):
            chunk_of(seed).put(store)

    with pytest.raises(StoreFullError, match="are for the ledger"):
        fill()
    assert store.has(chunk_of(0).key)
    assert reserve <= free_bytes(small_device) < reserve + SIZE + 4096
    assert store.usage().free_bytes == free_bytes(small_device) - reserve
    chunk_of(0).load(store)
    with pytest.raises(StoreFullError, match="are for the ledger"):
        # Something else has filled the device further.
        DiskStore(store.root, reserve_bytes=2 * reserve).check_reserve("kvd_1")


def test_a_cache_gives_up_chunks_for_the_reserve(small_device: Path) -> None:
    """A cache goes on, with fewer chunks."""
    cache = DiskStore(small_device / "chunks", is_cache=True, reserve_bytes=3 * SIZE)
    for seed in range(30):
        chunk_of(seed).put(cache)
        chunk_of(seed).load(cache)
        assert free_bytes(small_device) >= 3 * SIZE


def test_the_files_of_a_store_are_its_owners(tmp_path: Path) -> None:
    """No other user can read a chunk, or list the folders."""
    store = DiskStore(tmp_path / "home" / "chunks", quota_bytes=1 << 20)
    chunk_of(0).put(store)
    for path in [tmp_path / "home", *(tmp_path / "home").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path
