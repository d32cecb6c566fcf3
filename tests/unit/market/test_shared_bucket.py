"""What one home publishes again reaches the copies of the others."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from tests.support.catalogue_documents import LAYOUT, LENGTH, NAMESPACE, store_and_list, tokens
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.market import shared_bucket
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.market.shared_bucket import Directory
from vllm_kvmarket.store import bucket_listings

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
    shared_bucket.offer(market.store, market.catalogue, document_id)


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
    directory = Directory(other.store, other.catalogue, other.ledger, other.identity)
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
    directory = Directory(other.store, other.catalogue, other.ledger, other.identity)
    assert directory.sync() == 1
    assert other.catalogue.shares.of(mine.chunk_keys) == before
    assert len(other.catalogue.shares.of(listing.chunk_keys)) == 3
