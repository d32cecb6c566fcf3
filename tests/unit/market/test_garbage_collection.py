"""Garbage collection and sudden ends: what nobody needs goes, and nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.support.catalogue_documents import (
    LENGTH,
    ended,
    file_bytes,
    heard,
    start_process,
    store,
    store_and_list,
    tell,
    tokens,
)
from vllm_kvmarket.core.errors import StoreError
from vllm_kvmarket.core.model_identity import pack_tokens
from vllm_kvmarket.market import check_and_repair, garbage_collection, shared_bucket
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.market.shared_bucket import Directory
from vllm_kvmarket.store import ObjectTier, bucket_listings

# Garbage


def test_what_no_listing_needs_goes(market):
    """Chunks of delisted documents; what others share stays, and is whole."""
    kept = store(market, 1)
    shorter = store_and_list(market, [*tokens(LENGTH, 1)[:512], 1, 2, 3])
    gone = store(market, 2)
    market.delist(gone.document_id)
    market.delist(shorter.document_id)
    size = file_bytes(market, [*gone.chunk_keys, shorter.chunk_keys[-1]])
    expected = garbage_collection.collect_garbage(market, dry_run=True)
    assert (expected.chunks_deleted, expected.bytes_freed) == (4, size)
    assert market.store.has(gone.chunk_keys[0])
    report = garbage_collection.collect_garbage(market)
    assert (report.chunks_deleted, report.bytes_freed) == (4, size)
    assert (report.expired, report.abandoned, report.objects_deleted) == ([], [], 0)
    assert set(market.store.disk.keys()) == set(kept.chunk_keys)
    assert check_and_repair.check(market).ok
    assert garbage_collection.collect_garbage(market).chunks_deleted == 0


def test_collecting_expires_what_is_over(market):
    """Its chunks go in the same go; a dry run says so and changes nothing."""
    listing = store(market, 1, expires_at_s=time.time() + 0.05)
    store(market, 2, expires_at_s=time.time() + 1000)
    time.sleep(0.1)
    expected = garbage_collection.collect_garbage(market, dry_run=True)
    assert (expected.expired, expected.chunks_deleted) == ([listing.document_id], 3)
    assert market.catalogue.get(listing.document_id).state == "live"
    report = garbage_collection.collect_garbage(market)
    assert (report.expired, report.chunks_deleted) == ([listing.document_id], 3)
    assert len(market.catalogue.listings("live")) == 1


PUBLISH_HALF = """
from vllm_kvmarket.market.market import Market
market = Market.open(home)
document = tokens(600, 7)
listing = listing_of(document)
store_and_list(market, document)
market.catalogue.delist(listing.document_id)
market.catalogue.begin(listing, chunks_of(document))
print("begun", flush=True)
sys.stdin.readline()
os._exit(1)
"""


def test_a_publisher_keeps_its_chunks_until_it_dies(market, home):
    """Chunks of a running publication are needed; those of an abandoned one are not."""
    process = start_process(PUBLISH_HALF, home)
    assert heard(process) == "begun"
    assert garbage_collection.collect_garbage(market).chunks_deleted == 0
    tell(process, "die")
    ended(process)
    report = garbage_collection.collect_garbage(market)
    assert (len(report.abandoned), report.chunks_deleted) == (1, 3)
    assert market.catalogue.get(report.abandoned[0]).state == "failed"


PUBLISH_AND_DELIST = """
import random
from vllm_kvmarket.core.errors import CatalogueError, NotFoundError
from vllm_kvmarket.market.market import Market
random.seed(int(sys.argv[2]))
with Market.open(home) as market:
    for _ in range(25):
        document = tokens(600, random.randrange(3))[: random.choice([300, 512, 600])]
        try:
            listing = store_and_list(market, document)
            if listing.state == "live":
                for key in listing.chunk_keys:
                    try:
                        market.store.verify(key)
                    except Exception as error:
                        if market.catalogue.get(listing.document_id).state == "live":
                            print(repr(error), file=sys.stderr)
                            os._exit(2)
            market.catalogue.delist(listing.document_id)
        except (CatalogueError, NotFoundError) as error:
            assert "delisted" in str(error)
"""


def test_collecting_beside_publishers_loses_nothing(market, home):
    """Two processes publish, read and delist all the time: no document on offer misses a chunk."""
    processes = [start_process(PUBLISH_AND_DELIST, home, number) for number in range(2)]
    deleted = 0
    while any(process.poll() is None for process in processes):
        deleted += garbage_collection.collect_garbage(market).chunks_deleted
    assert [ended(process) for process in processes] == [0, 0]
    assert deleted > 0
    assert check_and_repair.check(market).ok


# Sudden ends

KILLED_AT_RANDOM = """
import random, signal
from vllm_kvmarket.market import check_and_repair, eviction, garbage_collection
from vllm_kvmarket.catalogue import Use
from vllm_kvmarket.market.market import Market

rounds, size = int(sys.argv[2]), int(sys.argv[3])
config = {"disk_quota_bytes": 3 * size}


def work(chosen):
    with Market.open(home, config) as market:
        while True:
            document = tokens(600, chosen.randrange(5))
            name = listing_of(document).document_id
            eviction.make_room(market, size, {name})
            store_and_list(market, document, expires_at_s=time.time() + chosen.random())
            market.catalogue.note_uses([Use(name, 600, 1, time.time())])
            if chosen.random() < 0.3:
                market.catalogue.report_damage(listing_of(document).chunk_keys[1])
                check_and_repair.repair(market, None, market.catalogue.get)
            if chosen.random() < 0.3:
                garbage_collection.collect_garbage(market)


for seed in range(rounds):
    chosen = random.Random(seed)
    child = os.fork()
    if child == 0:
        try:
            work(chosen)
        finally:
            os._exit(3)
    time.sleep(chosen.uniform(0.03, 0.2))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    with Market.open(home, config) as market:
        problems = check_and_repair.check(market).problems
        garbage_collection.collect_garbage(market)
        usage = market.store.disk.usage()
        problems += check_and_repair.check(market).problems
        states = {each.state for each in market.catalogue.listings()}
        recounted = market.store.disk.recount()
        if "publishing" in states or usage.drafts or usage.bytes_used != recounted:
            problems.append(f"left behind: {states} {usage}")
        eviction.make_room(market, size)
        if store_and_list(market, tokens(600, 9), title=str(seed)).state != "live":
            problems.append("cannot publish")
        market.delist(listing_of(tokens(600, 9)).document_id)
    if problems or status != signal.SIGKILL:
        print(f"seed {seed}, status {status}: {problems}", flush=True)
        os._exit(1)
print("good", flush=True)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_a_market_that_is_whole(market, home):
    """Killed while it publishes, evicts, repairs or collects: nothing is missing, all is swept."""
    size = file_bytes(market, store(market, 0).chunk_keys)
    process = start_process(KILLED_AT_RANDOM, home, 20, size + size // 10)
    assert heard(process) == "good"
    assert ended(process) == 0


# A bucket


@pytest.fixture
def shared(tmp_path: Path):
    """Two homes on one bucket, which is a folder here."""
    config = {"object_store_url": (tmp_path / "bucket").as_uri()}
    (tmp_path / "bucket").mkdir()
    with Market.open(tmp_path / "a", config) as one, Market.open(tmp_path / "b", config) as other:
        yield one, other, tmp_path / "bucket"


def age(bucket: Path) -> None:
    """Make everything in the bucket older than the grace period."""
    for file in bucket.rglob("*"):
        os.utime(file, (1.0, 1.0))


def test_objects_that_another_home_needs_stay(shared):
    """A home's garbage collection asks the bucket who needs what, and spares what is fresh."""
    one, other, bucket = shared
    listing = store(one, 1)
    shared_bucket.offer(one, listing.document_id)
    fresh = store(one, 2)
    one.catalogue.delist(fresh.document_id)
    assert garbage_collection.collect_garbage(other).objects_deleted == 0
    age(bucket)
    assert garbage_collection.collect_garbage(other, dry_run=True).objects_deleted == 3
    assert garbage_collection.collect_garbage(other).objects_deleted == 3
    one.delist(listing.document_id)
    assert garbage_collection.collect_garbage(one).objects_deleted == 3
    assert list(one.store.objects.names("")) == [bucket_listings.MARKER]


def test_entries_that_are_over_are_withdrawn(shared):
    """And what only they needed goes with them."""
    one, other, bucket = shared
    listing = store(one, 1, expires_at_s=time.time() + 0.1)
    shared_bucket.offer(one, listing.document_id)
    time.sleep(0.2)
    age(bucket)
    assert garbage_collection.collect_garbage(other).objects_deleted == 3
    assert bucket_listings.listed_documents(other.store.objects) == set()


def test_an_entry_that_nobody_can_read_stops_the_collection(shared):
    """Its document's objects may be any."""
    one, other, bucket = shared
    store(one, 1)
    bucket_listings.publish_listing(one.store.objects, b"from the future", "kvd_1")
    age(bucket)
    with pytest.raises(StoreError, match="entry kvd_1 cannot be read"):
        garbage_collection.collect_garbage(other)
    assert check_and_repair.check(one).ok


# What is purged


@pytest.mark.parametrize("beyond", [None, 1], ids=["in memory", "beyond memory"])
def test_nothing_of_a_purged_document_is_in_home_or_bucket(tmp_path, monkeypatch, beyond):
    """Not in the database and its log, in files, in quarantine, in objects, or in its entry."""
    (tmp_path / "bucket").mkdir()
    config = {
        "object_store_url": (tmp_path / "bucket").as_uri(),
        "catalogue_chunks_in_memory": beyond,
    }
    document, other_end = tokens(LENGTH, 1), [*tokens(LENGTH, 1)[:256], *tokens(300, 2)]
    with Market.open(tmp_path / "home", config) as market:
        gone, kept = store_and_list(market, document), store_and_list(market, other_end)
        for each in (gone, kept):
            shared_bucket.offer(market, each.document_id)
        file = market.store.disk.path(gone.chunk_keys[1])
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        assert market.store.disk.quarantine(gone.chunk_keys[1], 0, 1, "damaged")
        with monkeypatch.context() as away:

            def unanswered(_tier, name):
                raise StoreError("the object store did not answer")

            away.setattr(ObjectTier, "delete", unanswered)
            with pytest.raises(StoreError, match="did not answer"):
                market.delist(gone.document_id)
        age(tmp_path / "bucket")
        report = garbage_collection.purge(market, [gone.document_id])
        assert (report.purged, report.objects_deleted) == (1, 2)
        contents = {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}
        for start in range(0, LENGTH - 16, 16):
            packed = pack_tokens(document[start : start + 16])
            there = [str(each) for each, content in contents.items() if packed in content]
            assert bool(there) == (start < 256), (start, there)
        assert check_and_repair.check(market).ok
        market.store.verify(kept.chunk_keys[0])


def test_objects_that_may_be_in_use_survive_a_purge(shared):
    """Those of the last day, and those of another home's documents; and so does its entry."""
    one, other, bucket = shared
    listing = store(one, 1)
    shared_bucket.offer(one, listing.document_id)
    assert Directory(other).sync() == 1
    other.delist(listing.document_id)
    age(bucket)
    assert garbage_collection.purge(other, [listing.document_id]).objects_deleted == 0
    assert bucket_listings.listed_documents(one.store.objects) == {listing.document_id}
    young = store(one, 2)
    one.delist(young.document_id)
    assert garbage_collection.purge(one, [young.document_id]).objects_deleted == 0
    age(bucket)
    assert garbage_collection.collect_garbage(one).objects_deleted == 3
    assert check_and_repair.check(one).ok
