"""Space for new documents: counted, not looked for; on the disk and in a bucket."""

from __future__ import annotations

import time

import pytest

from tests.support.catalogue_documents import chunks_of, listing_of, store_and_list, tokens
from vllm_kvmarket.catalogue import Listing, Use
from vllm_kvmarket.core.errors import NotFoundError, StoreFullError
from vllm_kvmarket.market import eviction, garbage_collection, shared_bucket
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.store import bucket_listings
from vllm_kvmarket.store.disk import DiskStore

LENGTH = 600


def begin(market: Market, seed: int, needed_bytes: int):
    document = tokens(LENGTH, seed)
    return market.begin_listing(listing_of(document), chunks_of(document), needed_bytes).result()


@pytest.mark.parametrize("quota", [None, 1 << 20])
def test_publishing_scans_no_folder(tmp_path, monkeypatch, quota):
    """Bytes are counted; a million files would take seconds for each document."""
    with Market.open(tmp_path, {"disk_quota_bytes": quota}) as market:
        store_and_list(market, tokens(LENGTH, 1))

        def scan(_store):
            raise AssertionError("the folder is scanned")

        monkeypatch.setattr(DiskStore, "_chunk_files", scan)
        assert begin(market, 2, 1000).state == "publishing"
        market.catalogue.fail(listing_of(tokens(LENGTH, 2)).document_id, "")
        # Not even when what was delisted has to go first.
        market.delist(listing_of(tokens(LENGTH, 1)).document_id)
        if quota:
            assert eviction.make_room(market, quota) == quota
            assert list(market.store.disk.root.glob("??/*.kv")) == []


def test_free_bytes_are_those_of_the_usage(tmp_path):
    """Two ways to the same number."""
    with Market.open(tmp_path, {"disk_quota_bytes": 1 << 20}) as market:
        store_and_list(market, tokens(LENGTH, 1))
        usage = market.store.disk.usage()
        assert market.store.disk.free_bytes() == usage.free_bytes
        assert usage.free_bytes == (1 << 20) - usage.bytes_used


# A bucket


@pytest.fixture
def bucket(tmp_path):
    """A market whose bucket has space for three documents; and what one of them takes."""
    (tmp_path / "bucket").mkdir()
    config = {"object_store_url": (tmp_path / "bucket").as_uri()}
    with Market.open(tmp_path / "first", config) as market:
        size = store_and_list(market, tokens(LENGTH, 0)).stored_bytes
        market.delist(listing_of(tokens(LENGTH, 0)).document_id)
    config["object_store_quota_bytes"] = 3 * size + size // 2
    with Market.open(tmp_path / "second", config) as market:
        yield market, size


def publish(market: Market, seed: int) -> str:
    listing = store_and_list(market, tokens(LENGTH, seed))
    shared_bucket.offer(market, listing.document_id)
    return listing.document_id


def test_a_bucket_has_a_quota(bucket):
    """The least valuable documents leave this market and the bucket's entries."""
    market, size = bucket
    first, second, third = (publish(market, seed) for seed in (1, 2, 3))
    market.catalogue.note_uses([Use(name, LENGTH, 1, time.time()) for name in (first, third)])
    assert begin(market, 4, size).state == "publishing"
    states = {each.document_id: each.state for each in market.catalogue.listings()}
    assert [states[name] for name in (first, second, third)] == ["live", "evicted", "live"]
    assert bucket_listings.listed_documents(market.store.objects) == {first, third}


def test_what_does_not_fit_into_the_bucket_is_refused(bucket):
    """Before it is computed, with nothing evicted; pinned documents stay."""
    market, size = bucket
    names = [publish(market, seed) for seed in (1, 2, 3)]
    for name in names[:2]:
        market.catalogue.set_pinned(name, pinned=True)
    with pytest.raises(StoreFullError, match="raise object_store_quota_bytes"):
        begin(market, 4, 2 * size)
    assert {market.catalogue.get(name).state for name in names} == {"live"}
    assert market.catalogue.get(listing_of(tokens(LENGTH, 4)).document_id).state == "failed"
    assert begin(market, 5, size).state == "publishing"


def noted(market: Market, listing: Listing) -> Listing:
    """Record what is stored of a document, as a publication does."""
    market.catalogue.shares.note([market.store.describe(key) for key in listing.chunk_keys])
    return listing


def test_a_chunk_counts_as_long_as_a_document_needs_it(bucket):
    """Also when the document that wrote it has left, once, and with what is on its way."""
    market, size = bucket
    first = noted(market, store_and_list(market, tokens(LENGTH, 1)))
    longer = [*tokens(LENGTH, 1)[:512], *tokens(400, 2)]
    second = noted(market, store_and_list(market, longer))
    both = first.stored_bytes + second.stored_bytes
    assert second.stored_bytes < size and market.catalogue.shares.needed_bytes() == both
    market.delist(first.document_id)
    own_end = market.store.describe(first.chunk_keys[-1])
    assert market.catalogue.shares.needed_bytes() == both - own_end.size_bytes
    begin(market, 3, 1000)
    assert market.catalogue.shares.needed_bytes() == both - own_end.size_bytes + 1000
    market.catalogue.fail(listing_of(tokens(LENGTH, 3)).document_id, "gone")
    assert market.catalogue.shares.needed_bytes() == both - own_end.size_bytes


def test_two_publications_do_not_count_on_the_same_space(bucket):
    """What the first is about to store is taken, before it has stored a byte."""
    market, size = bucket
    names = [noted(market, store_and_list(market, tokens(LENGTH, seed))) for seed in (1, 2)]
    for each in names:
        market.catalogue.set_pinned(each.document_id, pinned=True)
    assert begin(market, 3, size).state == "publishing"
    with pytest.raises(StoreFullError, match="raise object_store_quota_bytes"):
        begin(market, 4, size)


# Retention


def test_old_tokens_are_removed_after_the_retention(tmp_path):
    """Files that only that document needs go too; without the setting, nothing does."""
    name = listing_of(tokens(LENGTH, 1)).document_id
    with Market.open(tmp_path) as market:
        keys = store_and_list(market, tokens(LENGTH, 1)).chunk_keys
        kept = store_and_list(market, tokens(LENGTH, 2)).document_id
        market.delist(name)
        assert garbage_collection.purge(market).purged == 0
        assert len(market.catalogue.tokens_of(name)) == LENGTH
    with Market.open(tmp_path, {"retention_s": 3600}) as market:
        assert garbage_collection.purge(market).purged == 0
    with Market.open(tmp_path, {"retention_s": 0}) as market:
        assert garbage_collection.purge(market).purged == 1
        assert not any(market.store.has(key) for key in keys)
        with pytest.raises(NotFoundError, match="were removed"):
            market.catalogue.tokens_of(name)
        assert len(market.catalogue.tokens_of(kept)) == LENGTH
        assert market.catalogue.check_integrity() == []
