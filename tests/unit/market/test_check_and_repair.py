"""Keeping a market's store in order: room for new documents, checks and repair."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path

import apsw
import pytest

from tests.support.catalogue_documents import (
    LAYOUT,
    LENGTH,
    file_bytes,
    matched,
    store,
    store_and_list,
    tokens,
)
from tests.support.store_chunks import falsify
from vllm_kvmarket.catalogue import Audit, Listing, Use
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.errors import (
    NotFoundError,
    NotPublishableError,
    StoreError,
    StoreFullError,
)
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.market import check_and_repair, eviction, garbage_collection
from vllm_kvmarket.market.market import DATABASE_FILE, Market
from vllm_kvmarket.store.chunk_format import chunk_name


def damage(market: Market, key: bytes) -> None:
    path = market.store.disk.path(key)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


# Space


def test_the_ledgers_reserve_refuses_documents_and_not_money(home: Path):
    """On a device that is nearly full nothing new is published, and the ledger still books."""
    with Market.open(home, {"disk_reserve_bytes": 1 << 62}) as market:
        document = DocumentChunks.of(bytes(32), tokens(LENGTH), market.config.chunk_tokens)
        listing = Listing.of(document, ListingTerms(publisher="acme"))
        with pytest.raises(StoreFullError, match="are for the ledger"):
            market.begin_listing(listing, document).result()
        with pytest.raises(StoreFullError, match="are for the ledger"):
            store(market, 0)
        assert [each.state for each in market.catalogue.listings()] in ([], ["publishing"])
        market.create_account("alice")
        market.deposit("alice", 5, "d1")
        assert market.ledger.account("alice").balance_nano == 5


@pytest.fixture
def limited(home: Path):
    """A market whose quota has room for four documents and a bit."""
    with Market.open(home) as market:
        size = file_bytes(market, store(market, 0).chunk_keys)
    with Market.open(home, {"disk_quota_bytes": 4 * size + size // 2}) as market:
        for seed in (1, 2, 3):
            store(market, seed)
        yield market, size
        assert market.store.disk.usage().bytes_used <= market.config.disk_quota_bytes
        assert market.catalogue.check_integrity() == []
        assert check_and_repair.check(market).problems == []


def live(market: Market) -> set[int]:
    names = {
        listing.document_id: seed
        for seed in range(10)
        for listing in market.catalogue.listings("live")
        if listing.token_count == LENGTH
        and market.catalogue.tokens_of(listing.document_id) == tokens(LENGTH, seed)
    }
    return set(names.values())


def name_of(market: Market, seed: int) -> str:
    match = market.catalogue.match(bytes(range(32)), tokens(LENGTH, seed))
    return match.listing.document_id


def test_room_is_made_for_one_document_by_one(limited):
    """The one that was reused least goes, as a whole; then the new one fits."""
    market, size = limited
    now_s = time.time()
    market.catalogue.note_uses(
        [Use(name_of(market, seed), LENGTH, 0, now_s) for seed in (0, 1, 1, 3, 3)]
    )
    with pytest.raises(StoreFullError):
        store(market, 4)
    assert eviction.make_room(market, size) >= size
    assert live(market) == {0, 1, 3}
    (evicted,) = market.catalogue.listings("evicted")
    assert evicted.reason == f"the store needed {size} bytes"
    assert not any(market.store.has(key) for key in evicted.chunk_keys)
    assert store(market, 4).state == "live"
    assert matched(market.catalogue, tokens(LENGTH, 4)) == LENGTH


def test_nothing_is_evicted_while_there_is_room(limited):
    """Unlisted chunks go first, and suffice."""
    market, size = limited
    assert eviction.make_room(market, size // 4) >= size // 4
    assert live(market) == {0, 1, 2, 3}
    market.delist(name_of(market, 2))
    assert eviction.make_room(market, size) >= size
    assert live(market) == {0, 1, 3}


def test_pinned_and_protected_documents_stay(limited):
    """However little they are worth; what cannot fit beside them evicts nothing."""
    market, size = limited
    market.catalogue.set_pinned(name_of(market, 0), pinned=True)
    protect = {name_of(market, 1)}
    assert eviction.make_room(market, 3 * size, protect) < size
    assert live(market) == {0, 1, 2, 3}
    assert eviction.make_room(market, 2 * size, protect) >= 2 * size
    assert live(market) == {0, 1}
    assert eviction.make_room(market, 99 * size, protect) < 3 * size
    assert live(market) == {0, 1}


def test_room_is_made_by_the_configured_policy(limited, home):
    """Under lru the oldest use decides, whatever a document is worth."""
    market, size = limited
    now_s = time.time()
    uses = [Use(name_of(market, 0), LENGTH, 10**9, now_s + 1)] * 50
    uses += [Use(name_of(market, seed), LENGTH, 0, now_s + 1 + seed) for seed in (1, 2, 3)]
    market.catalogue.note_uses(uses)
    config = {"disk_quota_bytes": market.config.disk_quota_bytes, "eviction": "lru"}
    with Market.open(home, config) as by_use:
        eviction.make_room(by_use, size)
        assert live(by_use) == {1, 2, 3}


def test_the_same_market_gives_the_same_victims(tmp_path):
    """Ties are broken by the documents' ids, not by chance."""
    gone = set()
    for number in range(3):
        with Market.open(tmp_path / str(number)) as market:
            for seed in (0, 1, 2, 3) if number % 2 else (3, 1, 0, 2):
                size = file_bytes(market, store(market, seed).chunk_keys)
        config = {"disk_quota_bytes": 4 * size}
        with Market.open(tmp_path / str(number), config) as market:
            eviction.make_room(market, 2 * size)
            gone.add(frozenset(each.document_id for each in market.catalogue.listings("evicted")))
    assert len(gone) == 1
    assert len(next(iter(gone))) == 2


def test_without_a_quota_nothing_is_evicted(market):
    """The device is shared with others, who would take what is freed."""
    store(market, 1)
    assert eviction.make_room(market, 1 << 60) < 1 << 60
    assert live(market) == {1}


def test_a_cache_makes_room_by_itself(tmp_path):
    """A document in the bucket stays on the market when the disk is full."""
    (tmp_path / "bucket").mkdir()
    config = {"object_store_url": (tmp_path / "bucket").as_uri(), "disk_quota_bytes": 100_000}
    with Market.open(tmp_path / "a", config) as market:
        store(market, 1)
        assert eviction.make_room(market, 99_999) < 100_000
        assert live(market) == {1}


# Time to live


def test_the_end_of_a_document_can_be_set(market):
    """For a time, or for good."""
    name = store(market, 1).document_id
    assert market.catalogue.set_expiry(name, 9e9).terms.expires_at_s == 9e9
    assert market.catalogue.set_expiry(name, None).terms.expires_at_s is None
    with pytest.raises(NotFoundError):
        market.catalogue.set_expiry("kvd_unknown", None)


# Checks


def test_a_check_tells_what_is_wrong_and_changes_nothing(market, home):
    """Damage, a missing file, wrong books; progress is reported; quarantine is shown."""
    good, bad = store(market, 1), store(market, 2)
    steps: list[tuple[int, int]] = []
    report = check_and_repair.check(market, on_progress=lambda *step: steps.append(step))
    assert report.ok
    assert steps == [(number, 6) for number in range(1, 7)]
    assert (report.chunks_verified, report.quarantined, report.quota_bytes) == (6, [], None)
    assert report.used_bytes >= report.stored_bytes > 0
    damage(market, bad.chunk_keys[0])
    market.store.disk.path(bad.chunk_keys[1]).unlink()
    report = check_and_repair.check(market)
    assert (report.ok, report.chunks_damaged, len(report.problems)) == (False, 2, 2)
    assert all(bad.document_id in problem for problem in report.problems)
    assert market.catalogue.get(bad.document_id).state == "live"
    assert check_and_repair.check(market, verify=False).ok
    damage(market, good.chunk_keys[0])
    assert market.store.disk.quarantine(good.chunk_keys[0], 0, 1, "its checksum is wrong")
    report = check_and_repair.check(market)
    assert [file["reason"] for file in report.quarantined] == ["its checksum is wrong"]
    database = apsw.Connection(str(home / DATABASE_FILE))
    database.execute(
        "UPDATE listing SET token_count = 599 WHERE document_id = ?", (good.document_id,)
    )
    assert any("catalogue" in problem for problem in check_and_repair.check(market).problems)
    database.execute(
        "UPDATE listing SET token_count = 600 WHERE document_id = ?", (good.document_id,)
    )
    database.close()


def test_what_is_delisted_during_a_check_is_not_missed(market):
    """Its chunks may go under the check's eyes."""
    first, second = store(market, 1), store(market, 2)

    def lose(done: int, _: int) -> None:
        if done == 1:
            for listing in (first, second):
                market.delist(listing.document_id)
            garbage_collection.collect_garbage(market)

    assert check_and_repair.check(market, on_progress=lose).ok


# Repair


def republish(market: Market):
    """Stand in for an engine: stores a document's chunks again."""
    calls: list[str] = []

    def publish(document_id: str):
        calls.append(document_id)
        return store_and_list(market, market.catalogue.tokens_of(document_id))

    return publish, calls


def test_damaged_documents_are_published_again(market):
    """Those that miss something, and only those; what was damaged is set aside."""
    good, bad, lost = store(market, 1), store(market, 2), store(market, 3)
    damage(market, bad.chunk_keys[1])
    market.store.disk.path(lost.chunk_keys[0]).unlink()
    publish, calls = republish(market)
    report = check_and_repair.repair(market, None, publish)
    assert (report.chunks_verified, report.chunks_damaged) == (9, 2)
    assert sorted(report.repaired) == sorted(calls) == sorted([bad.document_id, lost.document_id])
    assert (report.healed, report.failed) == ([], {})
    assert len(market.store.disk.quarantined()) == 1
    assert market.catalogue.get(good.document_id) == good
    assert check_and_repair.check(market).ok
    assert len(market.catalogue.listings("live")) == 3


def test_a_chunk_that_is_whole_heals_without_an_engine(market):
    """It could not be read for a moment, or came back from a backup."""
    listing = store(market, 1)
    market.catalogue.report_damage(listing.chunk_keys[1], "it could not be read")
    publish, calls = republish(market)
    report = check_and_repair.repair(market, None, publish)
    assert (report.healed, report.repaired, calls) == ([listing.document_id], [], [])
    assert market.catalogue.get(listing.document_id) == listing


def test_documents_that_share_what_is_lost_are_repaired_once(market):
    """The first one's publishing makes the second whole."""
    one = store(market, 1)
    two = store_and_list(market, tokens(LENGTH, 1)[:512])
    damage(market, one.chunk_keys[0])
    publish, calls = republish(market)
    report = check_and_repair.repair(market, None, publish)
    assert (len(calls), len(report.repaired), len(report.healed)) == (1, 1, 1)
    assert {*report.repaired, *report.healed} == {one.document_id, two.document_id}
    assert check_and_repair.check(market).ok


def test_what_fails_is_told_and_stops_nothing(market):
    """Each with its reason; documents that are off the market are not brought back."""
    first, second, off = store(market, 1), store(market, 2), store(market, 3)
    market.delist(off.document_id)
    evicted = store(market, 4)
    market.catalogue.evict(evicted.document_id, "no room")
    for listing in (first, second):
        damage(market, listing.chunk_keys[0])
    publish, _ = republish(market)

    def choosy(document_id: str):
        if document_id == first.document_id:
            raise NotPublishableError("another model's")
        return publish(document_id)

    chosen = [each.document_id for each in (first, second, off, evicted)]
    report = check_and_repair.repair(market, chosen, choosy)
    assert report.failed == {
        first.document_id: "another model's",
        off.document_id: "it is delisted; publish it again",
    }
    assert report.repaired == [second.document_id, evicted.document_id]
    with pytest.raises(NotFoundError):
        check_and_repair.repair(market, ["kvd_unknown"], publish)


def test_publishing_that_lists_nothing_is_no_repair(market):
    """The state afterwards decides, not that nothing was raised."""
    listing = store(market, 1)
    damage(market, listing.chunk_keys[0])
    report = check_and_repair.repair(market, [listing.document_id], market.catalogue.get)
    assert "it is damaged still" in report.failed[listing.document_id]


def test_every_step_of_a_repair_is_told(market):
    """As many as there are different chunks."""
    store(market, 1)
    store_and_list(market, tokens(LENGTH, 1)[:512])
    steps: list[tuple[int, int]] = []
    check_and_repair.repair(market, None, market.catalogue.get, lambda *step: steps.append(step))
    assert steps == list(itertools.zip_longest(range(1, 4), [], fillvalue=3))


# Reports of damage


@pytest.fixture
def on_bucket(tmp_path: Path):
    """A market on a bucket, and its one document."""
    (tmp_path / "bucket").mkdir()
    config = {"object_store_url": (tmp_path / "bucket").as_uri()}
    with Market.open(tmp_path / "home", config) as market:
        yield market, store(market, 1), tmp_path / "bucket"


@pytest.fixture(params=["disk", "bucket"])
def reported(request: pytest.FixtureRequest):
    """A market with a document, and where its chunks really are."""
    if request.param == "bucket":
        market, listing, bucket = request.getfixturevalue("on_bucket")
        return market, listing, bucket
    market = request.getfixturevalue("market")
    return market, store(market, 1), market.store.disk.root


def test_a_report_of_damage_is_judged_by_a_second_reader(reported):
    """What one reader cannot read may be whole; what is damaged, or lacks a rank, is not sold."""
    market, listing, root = reported
    key = listing.chunk_keys[1]
    (file,) = root.rglob(f"{key.hex()}*.kv")
    whole = file.read_bytes()
    market.report_damage(key).result()
    assert market.catalogue.get(listing.document_id).state == "live"
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    market.report_damage(key).result()
    assert market.catalogue.get(listing.document_id).state == "damaged"
    file.write_bytes(whole)
    assert check_and_repair.repair(market, None, market.catalogue.get).healed
    file.rename(file.with_name(f"{key.hex()}.0of2.kv"))
    market.report_damage(key).result()
    assert market.catalogue.get(listing.document_id).state == "damaged"


def test_checks_read_the_objects_and_not_their_copies(on_bucket):
    """A bucket whose every bit is flipped is not good, though the disk's copies are."""
    market, listing, bucket = on_bucket
    for file in bucket.rglob("*.kv"):
        file.write_bytes(bytes(byte ^ 255 for byte in file.read_bytes()))
    report = check_and_repair.check(market)
    assert (report.ok, report.chunks_damaged) == (False, 3)
    assert market.catalogue.get(listing.document_id).state == "live"

    def publish(_name: str) -> Listing:
        return store(market, 1)

    repaired = check_and_repair.repair(market, None, publish)
    assert (repaired.chunks_damaged, repaired.repaired) == (3, [listing.document_id])
    assert check_and_repair.check(market).ok


def test_a_bucket_that_is_not_there_is_no_damage(on_bucket):
    """Nothing is taken off the market because a whole bucket is empty."""
    market, listing, bucket = on_bucket
    for file in bucket.rglob("*.*"):
        file.unlink()
    with pytest.raises(StoreError, match="nothing was changed"):
        market.report_damage(listing.chunk_keys[0]).result()
    with pytest.raises(StoreError, match="nothing was changed"):
        check_and_repair.repair(market, None, market.catalogue.get)
    assert market.catalogue.get(listing.document_id).state == "live"


# Audits


@pytest.fixture(params=["a disk", "a bucket"])
def stored(request, home: Path, tmp_path: Path):
    """A market whose chunks are on its disk, and one whose chunks are in a bucket."""
    (tmp_path / "bucket").mkdir()
    url = (tmp_path / "bucket").as_uri() if request.param == "a bucket" else None
    with Market.open(home, {"object_store_url": url}) as market:
        yield market
        assert market.catalogue.check_integrity() == []


def test_what_an_audit_refutes_is_replaced_by_the_next_publication(stored: Market):
    """Its checksums are right, so nothing else can tell: it is sold no more, and not kept."""
    listing = store(stored, 1)
    name, key = listing.document_id, listing.chunk_keys[1]
    falsify(stored.store.disk, key)
    if stored.store.objects is not None:
        stored.store.objects.upload(chunk_name(key), stored.store.disk.path(key))
    stored.catalogue.shares.note([stored.store.describe(key)])
    audit = Audit(name, time.time(), "engine", 3, "different", 1.0)
    stored.record_audit(audit, [key]).result()
    assert stored.catalogue.get(name).state == "damaged"
    assert matched(stored.catalogue, tokens(LENGTH, 1)) == 256
    stored.verify(key)
    calls = []

    def publish(document_id: str) -> Listing:
        calls.append(document_id)
        document = DocumentChunks.of(listing.namespace, tokens(LENGTH, 1))
        assert stored.begin_listing(listing, document).result().state == "publishing"
        return store(stored, 1)

    report = check_and_repair.repair(stored, None, publish)
    assert (report.healed, report.repaired, calls) == ([], [name], [name])
    assert stored.catalogue.get(name).state == "live"
    assert [each.result for each in stored.catalogue.audits_of(name)] == ["different"]
    known = stored.catalogue.shares.of([key])
    if stored.store.objects is not None:
        stored.store.disk.delete(key)
    with stored.store.open(key, LAYOUT, listing.namespace, known[0].fingerprint) as chunk:
        assert set(chunk.layer(0).tolist()) == {1}
    assert check_and_repair.check(stored).ok


def test_an_audit_that_refutes_nothing_takes_nothing_off_the_market(market: Market):
    """Where numbers may not differ at all, a difference is on record and no more."""
    listing = store(market, 1)
    audit = Audit(listing.document_id, time.time(), "engine", 3, "different", math.inf)
    market.record_audit(audit).result()
    assert market.catalogue.get(listing.document_id).state == "live"
