"""Garbage collection and sudden ends: what nobody needs goes, and nothing else."""

from __future__ import annotations

import threading
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
from vllm_kvmarket.market import check_and_repair, garbage_collection
from vllm_kvmarket.market.bucket_identity import MARKER
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.store import ObjectTier
from vllm_kvmarket.store.chunk_format import chunk_name

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
            assert "delisted" in str(error) or "any more" in str(error)
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
def bucket(tmp_path: Path):
    """A market whose bucket is a folder; what is in it must be what documents need."""
    (tmp_path / "bucket").mkdir()
    with Market.open(
        tmp_path / "a", {"object_store_url": (tmp_path / "bucket").as_uri()}
    ) as market:
        yield market
        assert market.catalogue.check_integrity() == []


def names(market: Market) -> set[str]:
    """Names of the objects of chunks."""
    assert market.store.objects is not None
    return set(market.store.objects.names()) - {MARKER}


def test_objects_that_no_document_needs_go(bucket):
    """Whatever their age; with what the database knows nothing of, and no other object."""
    kept, gone = store(bucket, 1), store(bucket, 2)
    failed = chunk_name(b"x" * 32, 1, 2)
    others = {"ab/notes.txt", f"quarantine/{chunk_name(gone.chunk_keys[0])}"}
    for name in (failed, *others):
        bucket.store.objects.put_bytes(name, b"content")
    assert garbage_collection.collect_garbage(bucket, dry_run=True).objects_deleted == 1
    assert garbage_collection.collect_garbage(bucket).objects_deleted == 1
    bucket.delist(gone.document_id)
    expected = garbage_collection.collect_garbage(bucket, dry_run=True)
    assert (expected.chunks_deleted, expected.objects_deleted) == (3, 3)
    report = garbage_collection.collect_garbage(bucket)
    assert (report.chunks_deleted, report.objects_deleted) == (3, 3)
    assert names(bucket) == {chunk_name(key) for key in kept.chunk_keys} | others
    assert garbage_collection.collect_garbage(bucket).objects_deleted == 0
    assert check_and_repair.check(bucket).ok


@pytest.mark.parametrize("listed", ["nothing", "half", "an error"])
def test_a_list_that_is_not_whole_deletes_nothing_that_is_needed(bucket, monkeypatch, listed):
    """And what is recorded goes without being in the list."""
    kept, gone = store(bucket, 1), store(bucket, 2)
    bucket.delist(gone.document_id)
    whole = ObjectTier.entries

    def entries(*args, **more):
        if listed == "an error":
            raise StoreError("the object store did not answer")
        return (each for each in whole(*args, **more) if listed == "half" and each.name < "8")

    with monkeypatch.context() as lying:
        lying.setattr(ObjectTier, "entries", entries)
        if listed == "an error":
            with pytest.raises(StoreError, match="did not answer"):
                garbage_collection.collect_garbage(bucket)
        else:
            assert garbage_collection.collect_garbage(bucket).objects_deleted == 3
        assert bucket.catalogue.get(kept.document_id).state == "live"
    garbage_collection.collect_garbage(bucket)
    assert names(bucket) == {chunk_name(key) for key in kept.chunk_keys}
    assert check_and_repair.check(bucket).ok


def test_an_object_that_is_stored_anew_is_not_deleted(bucket, monkeypatch):
    """A publication that begins while the old object is deleted waits until it is gone."""
    gone = store(bucket, 1)
    bucket.delist(gone.document_id)
    delete, published = ObjectTier.delete, threading.Event()

    def publish() -> None:
        store(bucket, 1)
        published.set()

    publishing = threading.Thread(target=publish)

    def slowly(tier: ObjectTier, *deleted: str) -> None:
        publishing.start()
        assert not published.wait(0.3)
        delete(tier, *deleted)

    monkeypatch.setattr(ObjectTier, "delete", slowly)
    assert garbage_collection.collect_garbage(bucket).objects_deleted == 3
    publishing.join()
    assert bucket.catalogue.get(gone.document_id).state == "live"
    assert names(bucket) == {chunk_name(key) for key in gone.chunk_keys}
    assert check_and_repair.check(bucket).ok


@pytest.mark.parametrize("at", ["before", "after"])
def test_a_deletion_that_a_crash_interrupts_is_finished_by_the_next(bucket, monkeypatch, at):
    """Before or after the objects are gone; the document can be published at once."""
    gone, other = store(bucket, 1), store(bucket, 2)
    for each in (gone, other):
        bucket.delist(each.document_id)
    delete = ObjectTier.delete

    def crash(tier: ObjectTier, *deleted: str) -> None:
        if at == "after":
            delete(tier, *deleted)
        raise StoreError("the machine is off")

    with monkeypatch.context() as dying:
        dying.setattr(ObjectTier, "delete", crash)
        with pytest.raises(StoreError, match="off"):
            garbage_collection.collect_garbage(bucket)
    assert store(bucket, 1).state == "live"
    garbage_collection.collect_garbage(bucket)
    assert names(bucket) == {chunk_name(key) for key in gone.chunk_keys}
    assert bucket.catalogue.leftovers.unneeded() == []
    assert check_and_repair.check(bucket).ok


def test_a_bucket_that_markets_shared_before_is_left_alone(bucket):
    """They told each other there what they published; their documents may need any chunk."""
    gone = store(bucket, 1)
    bucket.delist(gone.document_id)
    bucket.store.objects.put_bytes("listings/kvd_1", b"theirs")
    with pytest.raises(StoreError, match="export these as bundles"):
        garbage_collection.collect_garbage(bucket)
    assert len(names(bucket)) == 4


# What is purged


def test_nothing_of_a_purged_document_is_in_home_or_bucket(tmp_path):
    """Not in database, log, index, files or quarantine, nor in objects, known or not."""
    (tmp_path / "bucket").mkdir()
    config = {"object_store_url": (tmp_path / "bucket").as_uri()}
    document, other_end = tokens(LENGTH, 1), [*tokens(LENGTH, 1)[:256], *tokens(300, 2)]
    with Market.open(tmp_path / "home", config) as market:
        gone, kept = store_and_list(market, document), store_and_list(market, other_end)
        file = market.store.disk.path(gone.chunk_keys[1])
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        assert market.store.disk.quarantine(gone.chunk_keys[1], 0, 1, "damaged")
        market.delist(gone.document_id)
        hidden = chunk_name(gone.chunk_keys[2], 1, 2)
        market.store.objects.put_bytes(hidden, pack_tokens(document[512:]))
        report = garbage_collection.purge(market, [gone.document_id])
        assert (report.purged, report.objects_deleted) == (1, 3)
        contents = {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}
        for start in range(0, LENGTH - 16, 16):
            packed = pack_tokens(document[start : start + 16])
            there = [str(each) for each, content in contents.items() if packed in content]
            assert bool(there) == (start < 256), (start, there)
        assert check_and_repair.check(market).ok
        market.store.verify(kept.chunk_keys[0])
