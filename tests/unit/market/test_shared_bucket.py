"""What homes of one bucket learn from each other, and what none takes from another."""

from __future__ import annotations

import os
import time

import msgspec
import numpy as np
import pytest

from tests.support.catalogue_documents import (
    LAYOUT,
    LENGTH,
    NAMESPACE,
    listing_of,
    store_and_list,
    tokens,
)
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.errors import NotFoundError, StoreError
from vllm_kvmarket.market import eviction, shared_bucket
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.market.shared_bucket import Directory
from vllm_kvmarket.store import ObjectTier, bucket_listings

TOKENS = tokens(LENGTH, 1)


@pytest.fixture
def homes(tmp_path):
    """Two markets on one bucket."""
    (tmp_path / "bucket").mkdir()
    config = {"object_store_url": (tmp_path / "bucket").as_uri()}
    with Market.open(tmp_path / "a", config) as one, Market.open(tmp_path / "b", config) as other:
        yield one, other


def put(market: Market, value: int) -> None:
    """Store the document's first chunk anew, with other bytes."""
    document = DocumentChunks.of(NAMESPACE, TOKENS)
    market.store.disk.delete(document.keys[0])
    market.store.put(
        key=document.keys[0],
        parent=document.parents[0],
        namespace=NAMESPACE,
        tokens=document.tokens[0],
        layout=LAYOUT,
        layers=[[np.full(16 * 64, value, dtype=np.uint8)]],
    )


def offer(market: Market, document_id: str, keys) -> None:
    """What a publication ends with."""
    market.catalogue.shares.note([market.store.describe(key) for key in keys])
    shared_bucket.offer(market, document_id)


def first_byte(market: Market) -> int:
    """Load the first chunk as an engine of this market would."""
    match = market.match(NAMESPACE, TOKENS)
    assert match is not None
    chunk = match.chunks[0]
    with market.store.open(chunk.key, LAYOUT, NAMESPACE, chunk.known) as stored:
        return int(stored.layer(0)[0])


def test_a_repair_reaches_the_copies_of_other_homes(homes):
    """The entry in the bucket says which bytes are stored now."""
    one, other = homes
    listing = store_and_list(one, TOKENS)
    offer(one, listing.document_id, listing.chunk_keys)
    directory = Directory(other)
    assert directory.sync() == 1
    assert first_byte(other) == 0
    put(one, 7)
    assert first_byte(other) == 0, "its copy is whole, and nobody has said anything"
    offer(one, listing.document_id, listing.chunk_keys[:1])
    assert directory.sync() == 0
    assert (first_byte(one), first_byte(other)) == (7, 7)


def test_an_entry_speaks_of_its_own_chunks_only(homes):
    """It cannot say what is stored of another document."""
    one, other = homes
    mine = store_and_list(other, tokens(LENGTH, 2))
    other.catalogue.shares.note([other.store.describe(mine.chunk_keys[0])])
    before = other.catalogue.shares.of(mine.chunk_keys)
    listing = store_and_list(one, TOKENS)
    offer(one, listing.document_id, listing.chunk_keys)
    entry = shared_bucket.read_entry(one.store.objects, listing.document_id)
    assert entry is not None and len(entry.shares) == 3
    foreign = msgspec.structs.replace(before[0], fingerprint=b"foreign!")
    changed = msgspec.structs.replace(entry, shares=(*entry.shares, foreign))
    encoded = msgspec.msgpack.encode(changed)
    bucket_listings.publish_listing(one.store.objects, encoded, listing.document_id)
    directory = Directory(other)
    assert directory.sync() == 1
    assert other.catalogue.shares.of(mine.chunk_keys) == before
    assert len(other.catalogue.shares.of(listing.chunk_keys)) == 3


def test_a_home_that_was_away_learns_what_was_stored_anew(homes):
    """After a restart an entry is new to the process, and its document is not."""
    one, other = homes
    listing = store_and_list(one, TOKENS)
    offer(one, listing.document_id, listing.chunk_keys)
    assert Directory(other).sync() == 1
    assert first_byte(other) == 0
    put(one, 7)
    offer(one, listing.document_id, listing.chunk_keys[:1])
    assert Directory(other).sync() == 0
    assert first_byte(other) == 7


@pytest.mark.parametrize("age", ["young", "old"])
def test_an_old_copy_does_not_replace_a_newer_object(homes, tmp_path, age):
    """Who publishes again takes the object over; also when it has to be written once more."""
    one, other = homes
    listing = store_and_list(one, TOKENS)
    offer(one, listing.document_id, listing.chunk_keys)
    Directory(other).sync()
    assert first_byte(other) == 0
    put(one, 7)
    key = listing.chunk_keys[0]
    newer = one.store.describe(key)
    document = DocumentChunks.of(NAMESPACE, TOKENS)
    if age == "old":
        (file,) = (tmp_path / "bucket").rglob(f"{key.hex()}*")
        os.utime(file, (1.0, 1.0))
    publish_again = {
        "key": key,
        "parent": document.parents[0],
        "namespace": NAMESPACE,
        "tokens": document.tokens[0],
        "layout": LAYOUT,
        "layers": [[np.full(16 * 64, 0, dtype=np.uint8)]],
    }
    other.store.put(**publish_again)
    assert other.store.describe(key) == newer
    one.store.disk.delete(key)
    one.store.fetch(key)
    assert one.store.describe(key) == newer


@pytest.mark.parametrize("age", ["young", "old"])
def test_an_old_copy_that_is_promised_does_not_replace_a_newer_object(homes, tmp_path, age):
    """Also where a publisher has loaded the chunk, and stores nothing."""
    one, other = homes
    listing = store_and_list(one, TOKENS)
    key = listing.chunk_keys[0]
    other.store.fetch(key)
    put(one, 7)
    newer = one.store.describe(key)
    assert other.store.describe(key) != newer
    if age == "old":
        (file,) = (tmp_path / "bucket").rglob(f"{key.hex()}*")
        os.utime(file, (1.0, 1.0))
    assert other.store.make_durable(key)
    assert other.store.describe(key) == newer
    one.store.disk.delete(key)
    one.store.fetch(key)
    assert one.store.describe(key) == newer


def test_one_homes_quota_takes_nothing_from_another(tmp_path):
    """What another home published neither counts nor goes, and stays on offer everywhere."""
    (tmp_path / "bucket").mkdir()
    config = {"object_store_url": (tmp_path / "bucket").as_uri()}
    with Market.open(tmp_path / "a", config) as one:
        theirs = [store_and_list(one, tokens(LENGTH, seed)) for seed in range(3)]
        for each in theirs:
            offer(one, each.document_id, each.chunk_keys)
        size = theirs[0].stored_bytes
        limited = config | {"object_store_quota_bytes": 2 * size + size // 2}
        with Market.open(tmp_path / "b", limited) as other:
            directory, theirs_too = Directory(other), Directory(one)
            assert directory.sync() == 3
            theirs_too.sync()
            own = []
            for seed in (7, 8, 9):
                document = tokens(LENGTH, seed)
                chunks = DocumentChunks.of(NAMESPACE, document)
                begun = other.begin_listing(listing_of(document), chunks, size).result()
                assert begun.state == "publishing"
                own.append(store_and_list(other, document))
                offer(other, own[-1].document_id, own[-1].chunk_keys)
            directory.sync()
            theirs_too.sync()
            names = [each.document_id for each in theirs]
            for market in (one, other):
                assert {market.catalogue.get(name).state for name in names} == {"live"}
            states = sorted(other.catalogue.get(each.document_id).state for each in own)
            assert states == ["evicted", "live", "live"]
            listed = bucket_listings.listed_documents(one.store.objects)
            assert listed.issuperset(names) and len(listed) == 5


def test_delisting_what_another_home_published_is_for_this_home(homes):
    """There it goes on, and it does not come back here."""
    one, other = homes
    listing = store_and_list(one, TOKENS)
    offer(one, listing.document_id, listing.chunk_keys)
    Directory(other).sync()
    other.delist(listing.document_id)
    for market in homes:
        Directory(market).sync()
    assert one.catalogue.get(listing.document_id).state == "live"
    assert other.catalogue.get(listing.document_id).state == "delisted"
    assert shared_bucket.read_entry(one.store.objects, listing.document_id) is not None


def test_what_its_home_publishes_again_comes_back(homes):
    """The withdrawal was its home's, and so is the return; with other terms now."""
    one, other = homes
    directory = Directory(other)
    listing = store_and_list(one, TOKENS)
    offer(one, listing.document_id, listing.chunk_keys)
    directory.sync()
    one.delist(listing.document_id)
    directory.sync()
    assert other.catalogue.get(listing.document_id).state == "delisted"
    store_and_list(one, TOKENS, cache_read_nano_per_mtok=5)
    offer(one, listing.document_id, listing.chunk_keys)
    assert directory.sync() == 1
    assert other.catalogue.get(listing.document_id).terms.cache_read_nano_per_mtok == 5


def test_new_terms_reach_the_other_homes(homes):
    """A price and an end, both ways; the bucket's entry stays its publisher's."""
    one, other = homes
    directory = Directory(other)
    listing = store_and_list(one, TOKENS)
    offer(one, listing.document_id, listing.chunk_keys)
    directory.sync()
    for price, ends_at_s in ((5, time.time() + 1000), (None, None)):
        one.catalogue.set_price(listing.document_id, price)
        eviction.set_time_to_live(one, listing.document_id, ends_at_s)
        directory.sync()
        terms = other.catalogue.get(listing.document_id).terms
        assert (terms.cache_read_nano_per_mtok, terms.expires_at_s) == (price, ends_at_s)
    other.catalogue.set_price(listing.document_id, 9)
    shared_bucket.offer_changes(other, listing.document_id)
    entry = shared_bucket.read_entry(one.store.objects, listing.document_id)
    assert entry is not None and entry.terms.cache_read_nano_per_mtok is None


def test_terms_of_what_is_not_on_offer_reach_nobody(homes):
    """Other homes would sell a document whose chunks are not stored yet."""
    one, other = homes
    begun = one.catalogue.begin(listing_of(TOKENS), DocumentChunks.of(NAMESPACE, TOKENS))
    eviction.set_time_to_live(one, begun.document_id, time.time() + 1000)
    assert Directory(other).sync() == 0


def test_two_homes_that_publish_one_document_both_go_on(homes):
    """The first one's withdrawal takes it from neither the second nor its chunks' protection."""
    one, other = homes
    names = set()
    for number, market in enumerate((other, one), 1):
        listing = store_and_list(market, TOKENS, created_at_s=float(number))
        names.add(listing.document_id)
    (name,) = names
    directory = Directory(other)
    for market in (other, one):
        offer(market, name, listing.chunk_keys)
    directory.sync()
    one.delist(name)
    directory.sync()
    assert other.catalogue.get(name).state == "live"
    entry = shared_bucket.read_entry(other.store.objects, name)
    assert entry is not None and entry.created_at_s == 1.0


def test_what_was_evicted_here_is_not_delisted_by_its_own_entrys_end(homes):
    """Evicted documents keep their tokens, so that they can be computed again."""
    one, _ = homes
    directory = Directory(one)
    listing = store_and_list(one, TOKENS)
    offer(one, listing.document_id, listing.chunk_keys)
    directory.sync()
    one.catalogue.evict(listing.document_id, "no space")
    shared_bucket.withdraw(one, listing.document_id)
    directory.sync()
    assert one.catalogue.get(listing.document_id).state == "evicted"


@pytest.mark.parametrize("how", ["again", "restarted"])
def test_a_delisting_that_the_bucket_missed_is_completed(homes, monkeypatch, how):
    """By the same command once more, or by the engine that starts next."""
    one, other = homes
    listing = store_and_list(one, TOKENS)
    offer(one, listing.document_id, listing.chunk_keys)
    Directory(other).sync()
    with monkeypatch.context() as away:

        def unanswered(_tier, name):
            raise StoreError("the object store did not answer")

        away.setattr(ObjectTier, "delete", unanswered)
        with pytest.raises(StoreError, match="did not answer"):
            one.delist(listing.document_id)
    assert bucket_listings.listed_documents(one.store.objects) == {listing.document_id}
    if how == "again":
        with pytest.raises(NotFoundError, match="delisted already"):
            one.delist(listing.document_id)
    else:
        Directory(one).sync()
    assert bucket_listings.listed_documents(one.store.objects) == set()


def test_a_round_ends_although_entries_wait(homes, monkeypatch):
    """Ten thousand entries must not keep the engine's other chores waiting."""
    one, other = homes
    for seed in range(3):
        listing = store_and_list(one, tokens(LENGTH, seed))
        offer(one, listing.document_id, listing.chunk_keys)
    monkeypatch.setattr(shared_bucket, "ROUND_S", 0.0)
    directory = Directory(other)
    assert [directory.sync() for _ in range(4)] == [1, 1, 1, 0]
