"""The worker's transfers over the tiers: what comes from where, and how each failure ends."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest

from tests.support.paged import (
    CHUNK_TOKENS,
    DEADLINE_S,
    NAMESPACE,
    PLENTY,
    Bench,
    GatedObjects,
    assert_loaded,
    blocks_of,
    chunk_save,
    content,
    fill,
    into,
    paged_cache,
    same,
    stored,
    until,
)
from vllm_kvmarket.connector import transfers
from vllm_kvmarket.connector.messages import (
    ChunkLoad,
    ChunkPrefetch,
    GroupPages,
    LoadPlan,
    SavePlan,
)
from vllm_kvmarket.store import chunk_reader


@pytest.fixture
def bench(tmp_path):
    with Bench(tmp_path, host_bytes=PLENTY) as opened:
        yield opened


@pytest.mark.parametrize("tokens", [CHUNK_TOKENS, 37, 16, 3])
def test_what_was_saved_is_loaded_bit_for_bit(bench, tokens):
    """Into other blocks, whatever its length, from the disk."""
    chunk = stored(bench, tokens=tokens)
    load = into(chunk, 20)
    report = bench.load(load)
    assert report.failures == {}
    assert_loaded(bench, chunk, load)
    page_bytes = sum(layer.page_bytes for layer in bench.cache.layout.layers)
    assert report.loaded_bytes == page_bytes * len(blocks_of(load))
    assert bench.count("chunks_loaded/disk") == 1
    assert bench.count("chunks_saved") == 1


def test_a_host_tier_without_room_for_a_chunk_changes_nothing(tmp_path):
    """The chunk goes straight into the paged cache, each time."""
    with Bench(tmp_path, host_bytes=100) as bench:
        chunk = stored(bench)
        for _ in range(3):
            load = into(chunk, 20)
            assert bench.load(load).failures == {}
            assert_loaded(bench, chunk, load)
        assert bench.count("chunks_loaded/disk") == 3


@pytest.mark.parametrize("place", ["header", "payload", "length", "empty", "directory"])
def test_a_damaged_chunk_is_quarantined_and_its_blocks_reported(bench, place):
    """Nobody meets the file again, and no unverified byte stays in the blocks."""
    chunk = stored(bench)
    path = bench.store.disk.path(chunk.key)
    whole = bytearray(path.read_bytes())
    if place in {"header", "payload"}:
        whole[40 if place == "header" else -3] ^= 1
    path.write_bytes({"length": whole[:-1], "empty": b""}.get(place, whole))
    if place == "directory":
        path.unlink()
        path.mkdir()
    load = into(chunk, 20)
    fill(bench.cache, blocks_of(load), seed=9)
    untouched = content(bench.cache, blocks_of(load), CHUNK_TOKENS)
    report = bench.load(load)
    assert report.reasons == {"damaged": 1}
    assert report.damaged == {chunk.key} == set(report.failures)
    assert bench.bad_blocks == set(blocks_of(load))
    assert bench.count("chunks_quarantined") == 1
    assert not path.exists()
    now = content(bench.cache, blocks_of(load), CHUNK_TOKENS)
    assert same(now, untouched) or not any(layer.any() for layer in now)
    assert bench.load(load).reasons == {"missing": 1}
    assert bench.save(chunk).stored_bytes > 0
    assert bench.load(load).failures == {}
    assert_loaded(bench, chunk, load)


def test_one_bad_chunk_does_not_spoil_the_others(bench):
    """Failures are counted by kind, each with its blocks."""
    good, missing, damaged = stored(bench, 1), stored(bench, 2, first_block=4), stored(bench, 3)
    bench.store.disk.delete(missing.key)
    bench.store.disk.path(damaged.key).write_bytes(b"nonsense")
    fill(bench.cache, blocks_of(good), 1)
    loads = [into(good, 20), into(missing, 30), into(damaged, 40)]
    report = bench.load(*loads)
    assert report.reasons == {"missing": 1, "damaged": 1}
    assert report.damaged == {missing.key, damaged.key}
    assert bench.bad_blocks == {*blocks_of(loads[1]), *blocks_of(loads[2])}
    assert_loaded(bench, good, loads[0])


def test_a_damaged_chunk_leaves_host_memory_too(bench):
    """A chunk that is not sold any more is released."""
    chunk = stored(bench)
    bench.load(into(chunk, 20))
    bench.load(into(chunk, 20))
    until(lambda: bench.host.has(chunk.key))
    bench.store.disk.path(chunk.key).write_bytes(b"nonsense")
    assert bench.audit(chunk).count("unread") == 1
    assert not bench.host.has(chunk.key)


@pytest.mark.parametrize(("theirs", "ours"), [(16, 32), (32, 16), (64, 16), (16, 64)])
@pytest.mark.parametrize("tokens", [CHUNK_TOKENS, 37])
def test_a_chunk_of_another_block_size_is_converted(tmp_path, theirs, ours, tokens):
    """From the disk, and from host memory once it is there; saving it again writes nothing."""
    with Bench(tmp_path, paged_cache(theirs)) as publisher:
        chunk = stored(publisher, tokens=tokens)
        expected = content(publisher.cache, blocks_of(chunk), tokens)
    with Bench(tmp_path, paged_cache(ours), host_bytes=PLENTY) as buyer:
        blocks = tuple(range(5, 5 + buyer.cache.layout.page_count(tokens)))
        for _ in range(3):
            fill(buyer.cache, blocks, seed=9)
            assert buyer.load(ChunkLoad(chunk.key, (GroupPages(0, blocks),))).failures == {}
            assert same(content(buyer.cache, blocks, tokens), expected)
        assert buyer.count("chunks_converted") == 2
        assert buyer.count("chunks_loaded/host") == 1
        again = buyer.save(chunk_save(1, tokens, blocks))
        assert (again.failure, again.stored_bytes) == ("", 0)


def test_a_layout_that_cannot_be_converted_is_a_miss_with_its_reason(tmp_path):
    """Not damage: others can use the chunk, so it stays where it is, until it is published anew."""
    with Bench(tmp_path, paged_cache(layers=2)) as publisher:
        chunk = stored(publisher)
    with Bench(tmp_path, paged_cache(layers=3)) as buyer:
        load = into(chunk, 20)
        report = buyer.load(load)
        assert report.reasons == {"layout": 1}
        assert report.damaged == set()
        assert buyer.bad_blocks == set(blocks_of(load))
        assert buyer.store.has(chunk.key)
        assert buyer.count("load_failures/layout") == 1
        assert buyer.save(chunk).stored_bytes > 0
        assert buyer.load(load).failures == {}


# Reading ahead


def test_what_was_read_ahead_is_loaded_from_host_memory(bench):
    """The disk is not asked again."""
    chunks = [stored(bench, seed, first_block=4 * seed) for seed in (1, 2)]
    bench.transfers.prefetch(ChunkPrefetch(NAMESPACE, tuple(chunk.key for chunk in chunks)))
    bench.wait_for_count("prefetches/done", 2)
    for chunk in chunks:
        bench.store.disk.delete(chunk.key)
    loads = [into(chunks[0], 20), into(chunks[1], 30)]
    assert bench.load(*loads).failures == {}
    for chunk, load in zip(chunks, loads, strict=True):
        assert_loaded(bench, chunk, load)
    bench.transfers.prefetch(ChunkPrefetch(NAMESPACE, (chunks[0].key,)))
    bench.wait_for_count("prefetches/present")


def test_reading_ahead_what_is_not_there_ends_quietly(bench):
    """The load that follows reports it; a damaged file is quarantined already."""
    chunk = stored(bench)
    bench.store.disk.path(chunk.key).write_bytes(b"nonsense")
    bench.transfers.prefetch(ChunkPrefetch(NAMESPACE, (bytes(32), chunk.key)))
    bench.wait_for_count("prefetches/failed", 2)
    assert bench.count("chunks_quarantined") == 1
    assert bench.load(into(chunk, 20)).reasons == {"missing": 1}


def test_a_long_queue_is_cut(bench):
    """More than can be read before the requests are scheduled is not even queued."""
    keys = tuple(number.to_bytes(32, "little") for number in range(5000))
    bench.transfers.prefetch(ChunkPrefetch(NAMESPACE, keys))
    assert bench.count("prefetches/dropped") > 4000


def test_closing_forgets_what_was_to_be_read_ahead(tmp_path):
    """An engine that ends does not first read hundreds of chunks."""
    bench = Bench(tmp_path, host_bytes=PLENTY)
    keys = tuple(number.to_bytes(32, "little") for number in range(500))
    with bench:
        bench.transfers.prefetch(ChunkPrefetch(NAMESPACE, keys))
    assert bench.count("prefetches/failed") < 500


# With an object store


@pytest.fixture
def objects():
    tier = GatedObjects()
    yield tier
    tier.gate.set()


def on_this_disk_no_more(bench, *chunks):
    for chunk in chunks:
        bench.store.disk.delete(chunk.key)


def test_a_chunk_that_is_only_in_the_object_store_is_fetched(tmp_path, objects):
    """Once: afterwards it is on the disk."""
    with Bench(tmp_path, objects=objects) as bench:
        chunk = stored(bench)
        on_this_disk_no_more(bench, chunk)
        for _ in range(2):
            load = into(chunk, 20)
            assert bench.load(load).failures == {}
            assert_loaded(bench, chunk, load)
        assert bench.count("chunks_loaded/objects") == 1
        assert bench.count("chunks_loaded/disk") == 1
        assert len(objects.downloads) == 1


def test_a_damaged_file_is_fetched_again(tmp_path, objects):
    """The request does not notice; the file is in quarantine."""
    with Bench(tmp_path, objects=objects) as bench:
        chunk = stored(bench)
        path = bench.store.disk.path(chunk.key)
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        load = into(chunk, 20)
        assert bench.load(load).failures == {}
        assert_loaded(bench, chunk, load)
        assert bench.count("chunks_quarantined") == 1


def test_a_chunk_that_is_nowhere_is_missing(tmp_path, objects):
    """Not an error of the object store."""
    with Bench(tmp_path, objects=objects) as bench:
        report = bench.load(ChunkLoad(bytes(32), (GroupPages(0, (1, 2)),)))
        assert report.reasons == {"missing": 1}
        assert report.damaged == {bytes(32)}


def test_an_object_store_that_does_not_answer_costs_one_deadline(tmp_path, objects):
    """Chunks on this machine are loaded meanwhile and count; blocks that were given back are not
    written to when the object arrives after all."""
    with Bench(tmp_path, objects=objects, threads=2, timeout_s=0.4) as bench:
        far = [stored(bench, seed, first_block=4 * seed) for seed in range(6)]
        near = stored(bench, 9, first_block=60 - 4)
        on_this_disk_no_more(bench, *far)
        objects.gate.clear()
        slow = bench.start_load(
            into(near, 50), *[into(chunk, 25 + 4 * n) for n, chunk in enumerate(far)]
        )
        until(lambda: len(objects.downloads) > 0)
        # Both threads for far chunks are waiting: this one must not wait behind them.
        quick = into(near, 50)
        assert bench.load(quick).failures == {}
        assert slow not in bench.reports
        report = bench.end_load(slow)
        assert report.reasons == {"io": 6}
        assert report.damaged == set()
        assert report.seconds < 5
        late = tuple(range(25, 25 + 24))
        assert bench.bad_blocks == set(late)
        fill(bench.cache, late, seed=77)
        before = content(bench.cache, late, 24 * 16)
        objects.gate.set()
        until(lambda: bench.store.disk.has(far[0].key))
        time.sleep(0.05)
        assert same(content(bench.cache, late, 24 * 16), before)
        assert bench.load(into(far[0], 25)).failures == {}


def test_closing_does_not_wait_for_the_object_store(tmp_path, objects):
    """Loads that wait for it end as failed."""
    bench = Bench(tmp_path, objects=objects, timeout_s=60)
    with bench:
        chunks = [stored(bench, seed, first_block=4 * seed) for seed in range(6)]
        on_this_disk_no_more(bench, *chunks)
        objects.gate.clear()
        bench.start_load(*[into(chunk, 30) for chunk in chunks])
        until(lambda: len(objects.downloads) > 0)
        # The store answers when closing is under way, or all six might be through before it.
        answering = threading.Timer(1.0, objects.gate.set)
        answering.start()
    answering.join()
    assert len(objects.downloads) < 6


def test_reading_ahead_without_host_memory_brings_chunks_onto_the_disk(tmp_path, objects):
    """From the object store; what is on the disk is left alone."""
    with Bench(tmp_path, objects=objects) as bench:
        chunk = stored(bench)
        bench.transfers.prefetch(ChunkPrefetch(NAMESPACE, (chunk.key,)))
        bench.wait_for_count("prefetches/present")
        on_this_disk_no_more(bench, chunk)
        bench.transfers.prefetch(ChunkPrefetch(NAMESPACE, (chunk.key,)))
        bench.wait_for_count("prefetches/done")
        assert bench.store.disk.has(chunk.key)


def test_a_load_waits_for_the_chunk_that_is_being_read_ahead(tmp_path, objects):
    """It is downloaded once, and comes from host memory."""
    with Bench(tmp_path, objects=objects, host_bytes=PLENTY) as bench:
        chunk = stored(bench)
        on_this_disk_no_more(bench, chunk)
        objects.gate.clear()
        bench.transfers.prefetch(ChunkPrefetch(NAMESPACE, (chunk.key,)))
        until(lambda: len(objects.downloads) == 1)
        load = into(chunk, 20)
        request = bench.start_load(load)
        time.sleep(0.05)
        objects.gate.set()
        assert bench.end_load(request).failures == {}
        assert_loaded(bench, chunk, load)
        assert len(objects.downloads) == 1
        assert bench.count("chunks_loaded/host") == 1


def test_a_load_takes_its_chunks_off_the_queue_of_reading_ahead(tmp_path, objects):
    """A loaded chunk is not read a second time; nothing is begun while a load is under way."""
    with Bench(tmp_path, objects=objects, host_bytes=PLENTY, threads=1) as bench:
        first, second = stored(bench, 1), stored(bench, 2, first_block=4)
        on_this_disk_no_more(bench, first, second)
        objects.gate.clear()
        request = bench.start_load(into(first, 20))
        until(lambda: len(objects.downloads) == 1)
        bench.transfers.prefetch(ChunkPrefetch(NAMESPACE, (first.key, second.key)))
        both = bench.start_load(into(second, 30))
        time.sleep(0.05)
        assert len(objects.downloads) == 1
        objects.gate.set()
        assert bench.end_load(request).failures == {}
        assert bench.end_load(both).failures == {}
        assert len(objects.downloads) == 2
        # The first was queued behind its own load; the second was taken off.
        bench.wait_for_count("prefetches/done")
        time.sleep(0.05)
        assert bench.count("prefetches/done") == 1


# A disk that stalls


class StallingDisk:
    """The kernel's reading calls over files that are not in its cache; `stalls` stops them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers = threading.Event()
        self.answers.set()
        self.waiting = 0
        self.seconds = 0.0
        self._preadv = os.preadv
        monkeypatch.setattr(os, "preadv", self.preadv)

    def preadv(self, descriptor, buffers, offset, flags=0):
        """Nothing is in the page cache, so RWF_NOWAIT gets nothing."""
        if flags & os.RWF_NOWAIT:
            raise BlockingIOError(errno.EAGAIN, "would wait")
        self.waiting += 1
        self.answers.wait(DEADLINE_S)
        time.sleep(self.seconds)
        self.waiting -= 1
        return self._preadv(descriptor, buffers, offset)


@pytest.fixture
def disk(monkeypatch):
    stalling = StallingDisk(monkeypatch)
    yield stalling
    stalling.answers.set()


def test_what_a_disk_delivers_late_is_read_whole(bench, disk):
    """Not in the page cache, but the disk answers."""
    chunk = stored(bench)
    load = into(chunk, 20)
    assert bench.load(load).failures == {}
    assert_loaded(bench, chunk, load)


@pytest.mark.parametrize("payload", [False, True], ids=["opening", "reading"])
def test_a_disk_that_stalls_costs_one_deadline(tmp_path, disk, monkeypatch, payload):
    """The blocks are given back, and what the disk delivers later is not written to them. What
    comes while all threads wait fails soon; when the disk answers again, all is as before."""
    with Bench(tmp_path, threads=2, timeout_s=0.4) as bench:
        chunks = [stored(bench, seed, first_block=4 * seed) for seed in range(4)]
        if payload:
            # Only the layers' bytes are late, when their blocks are being written to already.
            monkeypatch.setattr(chunk_reader, "_read", reading(disk))
        disk.answers.clear()
        loads = [into(chunk, 20 + 4 * n) for n, chunk in enumerate(chunks)]
        report = bench.load(*loads)
        assert report.reasons == {"io": 4}
        assert report.damaged == set()
        assert report.seconds < DEADLINE_S / 4
        assert "the disk did not deliver it within 0.4 s" in report.failures[chunks[0].key]
        blocks = tuple(range(20, 36))
        assert bench.bad_blocks == set(blocks)
        assert disk.waiting == 2
        assert bench.load(loads[3]).reasons == {"io": 1}
        fill(bench.cache, blocks, seed=77)
        before = content(bench.cache, blocks, 16 * 16)
        disk.answers.set()
        until(lambda: disk.waiting == 0)
        assert bench.load(into(chunks[0], 40)).failures == {}
        assert same(content(bench.cache, blocks, 16 * 16), before)


def reading(disk):
    """Headers are read at once, whatever the disk does."""

    def read(descriptor, size, position, name):
        return os.pread(descriptor, size, position)

    return read


def test_a_disk_that_is_slow_but_goes_on_is_waited_for(tmp_path, disk):
    """A long queue takes longer than the deadline; each chunk in it is loaded all the same."""
    with Bench(tmp_path, threads=1, timeout_s=0.3) as bench:
        chunks = [stored(bench, seed, first_block=4 * seed) for seed in range(4)]
        disk.seconds = 0.06
        report = bench.load(*[into(chunk, 20 + 4 * n) for n, chunk in enumerate(chunks)])
        assert report.failures == {}
        assert report.seconds > 0.3


def test_a_stalled_save_does_not_delay_a_load(tmp_path, monkeypatch):
    """Saves have threads of their own."""
    with Bench(tmp_path, threads=2) as bench:
        chunk = stored(bench)
        stalls = threading.Event()
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: stalls.wait(DEADLINE_S) and fsync(fd))
        for seed in (5, 6, 7):
            bench.transfers.save(
                SavePlan(f"save-{seed}", NAMESPACE, (chunk_save(seed, CHUNK_TOKENS, range(4)),))
            )
        assert bench.load(into(chunk, 20)).failures == {}
        assert bench.reports == {}
        stalls.set()


def test_a_step_waits_for_its_own_loads_and_for_no_others(bench):
    """What it waited for is reported, and not announced as a load that has just ended."""
    chunk, other = stored(bench), stored(bench, 2, first_block=4)
    load = into(chunk, 20)
    bench.transfers.load(LoadPlan("mine", NAMESPACE, (load,), in_step=True))
    bench.transfers.wait_for_step_loads()
    assert_loaded(bench, chunk, load)
    finished = bench.transfers.take()
    assert finished.received == set()
    assert set(finished.report.loads) == {"mine"}
    assert bench.count("step_loads") == 1
    assert bench.load(into(other, 30)).failures == {}
    assert bench.count("step_loads") == 1


def test_a_step_gives_up_a_load_that_does_not_come(bench, monkeypatch):
    """Its blocks are reported bad, and nobody writes to them afterwards."""
    chunk = stored(bench)
    load = into(chunk, 20)
    fill(bench.cache, blocks_of(load), seed=9)
    untouched = content(bench.cache, blocks_of(load), CHUNK_TOKENS)
    opened, ends = threading.Event(), threading.Event()
    read = chunk_reader.open_chunk

    def slow(*args):
        opened.wait(DEADLINE_S)
        try:
            return read(*args)
        finally:
            ends.set()

    monkeypatch.setattr("vllm_kvmarket.store.disk.open_chunk", slow)
    monkeypatch.setattr(transfers, "STEP_LOAD_S", 0.05)
    bench.transfers.load(LoadPlan("mine", NAMESPACE, (load,), in_step=True))
    bench.transfers.wait_for_step_loads()
    finished = bench.transfers.take()
    assert finished.bad_blocks == set(blocks_of(load))
    assert finished.report.loads["mine"].reasons == {"io": 1}
    opened.set()
    assert ends.wait(DEADLINE_S)
    assert bench.load(into(chunk, 30)).failures == {}
    assert same(content(bench.cache, blocks_of(load), CHUNK_TOKENS), untouched)
