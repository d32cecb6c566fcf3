"""Chunks that are loaded again and again: how they come into host memory, and who waits for it."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from tests.support.paged import (
    NAMESPACE,
    PLENTY,
    Bench,
    assert_loaded,
    blocks_of,
    fill,
    into,
    stored,
    until,
)
from vllm_kvmarket.connector.chunk_io import Chunks
from vllm_kvmarket.connector.messages import ChunkPrefetch, ChunkSave
from vllm_kvmarket.store.host_memory import HostTier


@pytest.fixture
def bench(tmp_path):
    with Bench(tmp_path, host_bytes=PLENTY) as opened:
        yield opened


def test_a_chunk_that_is_loaded_again_stays_in_host_memory(bench):
    """After the second load; the third does without the disk, also for a part of it."""
    chunk = stored(bench)
    bench.load(into(chunk, 20))
    time.sleep(0.1)
    assert bench.host.usage().chunks == 0
    bench.load(into(chunk, 20))
    until(lambda: bench.host.usage().chunks == 1)
    bench.store.disk.delete(chunk.key)
    for first_page in (0, 2):
        load = into(chunk, 40, first_page)
        assert bench.load(load).failures == {}
        assert_loaded(bench, chunk, load)
    assert bench.count("chunks_loaded/host") == 2
    bench.host.check_integrity()


def test_no_load_waits_for_a_hot_chunk_on_its_way_into_host_memory(bench, monkeypatch):
    """The thread that brings it has the least priority: the load takes it from the disk."""
    chunk = stored(bench)
    begun, go_on = threading.Event(), threading.Event()
    claim = HostTier._claim

    def slow(tier, size, *, prefetching):
        begun.set()
        assert go_on.wait(10)
        return claim(tier, size, prefetching=prefetching)

    monkeypatch.setattr(HostTier, "_claim", slow)
    for _ in range(2):
        bench.load(into(chunk, 20))
    assert begun.wait(10)
    load = into(chunk, 40)
    assert bench.load(load).failures == {}
    assert_loaded(bench, chunk, load)
    assert bench.count("chunks_loaded/disk") == 3
    go_on.set()
    until(lambda: bench.host.usage().chunks == 1)
    bench.host.check_integrity()


def test_a_hot_chunk_that_is_damaged_meanwhile_does_not_get_into_host_memory(bench, monkeypatch):
    """It is set aside, and the next load says so."""
    chunk = stored(bench)
    path = bench.store.disk.path(chunk.key)
    keep = Chunks.keep

    def damaged(chunks, namespace, key):
        path.write_bytes(path.read_bytes()[:-9])
        keep(chunks, namespace, key)

    monkeypatch.setattr(Chunks, "keep", damaged)
    for _ in range(2):
        assert bench.load(into(chunk, 20)).failures == {}
    bench.wait_for_count("prefetches/failed")
    assert bench.host.usage().chunks == 0
    assert not path.exists()
    assert bench.load(into(chunk, 20)).reasons == {"missing": 1}
    bench.host.check_integrity()


@pytest.mark.parametrize("ahead", [False, True])
def test_pages_of_an_older_chunk_leave_host_memory(bench, ahead):
    """When the catalogue knows another fingerprint, a load or a prefetch of it reads anew."""
    chunk = stored(bench)
    old = described(bench, chunk)
    for _ in range(2):
        bench.load(replace(into(chunk, 20), known=old))
    until(lambda: bench.host.has(chunk.key))
    bench.store.disk.delete(chunk.key)
    fill(bench.cache, blocks_of(chunk), seed=2)
    assert bench.save(chunk).shares == [bench.store.describe(chunk.key)]
    new = described(bench, chunk)
    assert new != old
    same_as_before = into(chunk, 20)
    bench.load(replace(same_as_before, known=old))
    assert bench.count("chunks_loaded/host") == 1
    if ahead:
        bench.transfers.prefetch(ChunkPrefetch(NAMESPACE, (chunk.key,), (new,)))
        bench.wait_for_count("prefetches/done")
    load = replace(into(chunk, 40), known=new)
    assert bench.load(load).failures == {}
    assert_loaded(bench, chunk, load)
    # A plan that knows nothing changes nothing.
    assert bench.load(into(chunk, 40)).failures == {}
    bench.host.check_integrity()


def described(bench: Bench, chunk: ChunkSave) -> bytes:
    share = bench.store.describe(chunk.key)
    assert share is not None
    return share.fingerprint
