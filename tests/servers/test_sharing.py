"""Two homes on one bucket: what one publishes, the other finds, verifies and could sell."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.support.seaweed import SeaweedFS
from vllm_kvmarket import Market
from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.cli import main
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.errors import ConfigError, StoreError
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.core.model_identity import ROOT, pack_tokens
from vllm_kvmarket.market.shared_bucket import Directory
from vllm_kvmarket.store import ChunkLayout, LayerLayout

NAMESPACE = bytes(range(32))
TOKENS = [7 * number % 50_000 for number in range(600)]
LAYOUT = ChunkLayout(
    tag="012/cpu-vec",
    dtype="float32",
    block_tokens=128,
    layers=(LayerLayout("layer", (2, 128, 8), 8192),),
)


def publish(market: Market) -> Listing:
    """Do an engine's work for a document, without one."""
    document = DocumentChunks.of(NAMESPACE, TOKENS)
    keys = document.keys
    listing = Listing.of(document, ListingTerms(title="shared", publisher="acme"))
    market.begin_listing(listing, document).result()
    stored = 0
    for index, key in enumerate(keys):
        tokens = TOKENS[index * 256 : index * 256 + 256]
        pages = np.full(-(-len(tokens) // 128) * 8192, index + 1, dtype=np.uint8)
        stored += market.store.put(
            key=key,
            parent=keys[index - 1] if index else ROOT,
            namespace=NAMESPACE,
            tokens=pack_tokens(tokens),
            layout=LAYOUT,
            layers=[[pages]],
        )
    market.commit_listing(listing.document_id, stored, keys).result()
    return market.catalogue.get(listing.document_id)


@pytest.fixture
def homes(seaweed: SeaweedFS, bucket: str, tmp_path):
    """Two markets that have nothing in common but the bucket."""
    config = {"object_store_url": bucket, "object_store_options": seaweed.options()}
    with (
        Market.open(tmp_path / "first", config) as first,
        Market.open(tmp_path / "second", config) as second,
    ):
        yield first, second


def test_a_second_home_finds_what_the_first_published(homes):
    """The listing by its bucket entry, the bytes by read-through, the publisher by an account."""
    first, second = homes
    listing = publish(first)
    directory = Directory(second)
    assert directory.sync() == 1
    found = second.match(NAMESPACE, [*TOKENS, 1, 2, 3])
    assert found is not None
    assert (found.token_count, found.listing.document_id) == (600, listing.document_id)
    assert second.ledger.account("acme").kind == "publisher"
    for index, chunk in enumerate(found.chunks):
        with second.store.open(chunk.key, LAYOUT, NAMESPACE) as stored:
            assert (stored.layer(0) == index + 1).all()
    assert directory.sync() == 0, "nothing new"

    first.delist(listing.document_id)
    directory.sync()
    assert second.catalogue.get(listing.document_id).state == "delisted"
    assert second.match(NAMESPACE, TOKENS) is None


def test_an_entry_that_is_rubbish_stops_nothing(homes):
    """Skipped with a warning; the others are taken over."""
    first, second = homes
    publish(first)
    assert first.store.objects is not None
    first.store.objects.put_bytes("listings/kvd_00000000000000000000000000000000", b"rubbish")
    directory = Directory(second)
    assert directory.sync() == 1


def test_a_listing_that_nobody_could_be_told_of_is_no_success(homes, monkeypatch):
    """Publishing into a bucket that is gone fails, and says so."""
    first, _ = homes

    assert first.store.objects is not None
    put = first.store.objects.put_bytes

    def gone_after_the_chunks(name: str, content: bytes) -> None:
        if name.startswith("listings/"):
            raise StoreError("the object store did not answer")
        put(name, content)

    monkeypatch.setattr(first.store.objects, "put_bytes", gone_after_the_chunks)
    with pytest.raises(StoreError, match="did not answer"):
        publish(first)
    (listing,) = first.catalogue.listings()
    assert (listing.state, listing.reason) == ("failed", "the object store did not answer")


def test_a_disk_moves_into_a_bucket(seaweed: SeaweedFS, bucket: str, tmp_path):
    """Everything is uploaded before the disk is a cache; another home sells it then."""
    config = {"object_store_url": bucket, "object_store_options": seaweed.options()}
    with Market.open(tmp_path / "old") as market:
        listing = publish(market)
    with pytest.raises(ConfigError, match="store upload"):
        Market.open(tmp_path / "old", config)
    words = ["store", "upload", "--home", str(tmp_path / "old"), "--config", json.dumps(config)]
    assert main(words) == 0
    with (
        Market.open(tmp_path / "old", config) as market,
        Market.open(tmp_path / "new", config) as new,
    ):
        for key in listing.chunk_keys:
            market.store.disk.delete(key)
            market.store.verify(key)
        directory = Directory(new)
        assert directory.sync() == 1
    with pytest.raises(ConfigError, match="chunk_tokens"):
        Market.open(tmp_path / "third", {**config, "chunk_tokens": 128})
    assert main(words) == 2, "done already"
