"""Space for new documents: counted, not looked for; on the disk and in a bucket."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tests.support.catalogue_documents import (
    LAYOUT,
    chunks_of,
    listing_of,
    store_and_list,
    tokens,
)
from vllm_kvmarket.catalogue import Use
from vllm_kvmarket.core.errors import NotFoundError, StoreFullError
from vllm_kvmarket.core.model_identity import ROOT
from vllm_kvmarket.market import eviction, garbage_collection
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.store.chunk_format import chunk_name
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
    with Market.open(tmp_path / "home", config) as market:
        size = store_and_list(market, tokens(LENGTH, 0)).stored_bytes
        market.delist(listing_of(tokens(LENGTH, 0)).document_id)
        garbage_collection.collect_garbage(market)
    config["object_store_quota_bytes"] = 3 * size + size // 2
    with Market.open(tmp_path / "home", config) as market:
        yield market, size


def publish(market: Market, seed: int) -> str:
    return store_and_list(market, tokens(LENGTH, seed)).document_id


def object_bytes(market: Market) -> int:
    """What the bucket really has of chunks."""
    assert market.store.objects is not None
    return sum(each.size for each in market.store.objects.entries() if "/" in each.name)


def test_a_bucket_has_a_quota(bucket):
    """The least valuable documents leave the market, and their objects the bucket at once."""
    market, size = bucket
    first, second, third = (publish(market, seed) for seed in (1, 2, 3))
    market.catalogue.note_uses([Use(name, LENGTH, 1, time.time()) for name in (first, third)])
    assert object_bytes(market) == 3 * size
    assert begin(market, 4, size).state == "publishing"
    states = {each.document_id: each.state for each in market.catalogue.listings()}
    assert [states[name] for name in (first, second, third)] == ["live", "evicted", "live"]
    assert object_bytes(market) == 2 * size
    gone = market.catalogue.get(second).chunk_keys
    assert not any(market.store.objects.head(chunk_name(key)) for key in gone)


def test_what_was_delisted_counts_until_its_objects_are_gone(bucket):
    """As on a disk: the space is taken, and is freed before a document is evicted for it."""
    market, size = bucket
    names = [publish(market, seed) for seed in (1, 2, 3)]
    market.delist(names[0])
    assert market.catalogue.shares.taken_bytes() == object_bytes(market) == 3 * size
    assert begin(market, 4, size).state == "publishing"
    assert object_bytes(market) == 2 * size
    assert {market.catalogue.get(name).state for name in names[1:]} == {"live"}


def test_what_a_publication_stored_that_failed_is_deleted_too(bucket):
    """Its chunks are recorded, so they count, and go when their space is needed."""
    market, size = bucket
    document = tokens(LENGTH, 7)
    listing = begin(market, 7, size)
    market.store.put(
        key=listing.chunk_keys[0],
        parent=ROOT,
        namespace=listing.namespace,
        tokens=chunks_of(document).tokens[0],
        layout=LAYOUT,
        layers=[[np.zeros(16 * 64, dtype=np.uint8)]],
    )
    share = market.store.describe(listing.chunk_keys[0])
    market.fail_listing(listing.document_id, "the engine ended", [share]).result()
    assert market.catalogue.shares.taken_bytes() == object_bytes(market) > 0
    for seed in (1, 2, 3):
        publish(market, seed)
    assert begin(market, 4, size // 2).state == "publishing"
    assert object_bytes(market) == 3 * size
    assert len(market.catalogue.listings("live")) == 3


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


def test_a_chunk_counts_as_long_as_a_document_needs_it(bucket):
    """Also when the document that wrote it has left, once, and with what is on its way."""
    market, size = bucket
    first = store_and_list(market, tokens(LENGTH, 1))
    longer = [*tokens(LENGTH, 1)[:512], *tokens(400, 2)]
    second = store_and_list(market, longer)
    both = first.stored_bytes + second.stored_bytes
    assert second.stored_bytes < size and market.catalogue.shares.taken_bytes() == both
    market.delist(first.document_id)
    own_end = market.store.describe(first.chunk_keys[-1])
    garbage_collection.release_leftovers(market)
    assert market.catalogue.shares.taken_bytes() == both - own_end.size_bytes
    begin(market, 3, 1000)
    assert market.catalogue.shares.taken_bytes() == both - own_end.size_bytes + 1000
    market.catalogue.fail(listing_of(tokens(LENGTH, 3)).document_id, "gone")
    assert market.catalogue.shares.taken_bytes() == both - own_end.size_bytes


def test_two_publications_do_not_count_on_the_same_space(bucket):
    """What the first is about to store is taken, before it has stored a byte."""
    market, size = bucket
    for name in (publish(market, seed) for seed in (1, 2)):
        market.catalogue.set_pinned(name, pinned=True)
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
