"""Two homes with one PostgreSQL database and one bucket: one market on two machines."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from tests.support.catalogue_documents import LAYOUT, LENGTH, NAMESPACE, store, tokens
from tests.support.seaweed import SeaweedFS
from vllm_kvmarket import Market
from vllm_kvmarket.cli import main
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.errors import ConfigError
from vllm_kvmarket.market import check_and_repair, garbage_collection
from vllm_kvmarket.store.chunk_format import chunk_name

pytest.importorskip("psycopg", reason="pip install vllm-kvmarket[postgres]")
from tests.support.postgres import running_postgres  # needs psycopg

_numbers = itertools.count()
TOKENS = tokens(LENGTH, 1)


@pytest.fixture(scope="module")
def server():
    yield from running_postgres()


@pytest.fixture
def config(server, seaweed: SeaweedFS, bucket: str):
    return {
        "database_url": server.create_database(f"sharing-{next(_numbers)}"),
        "object_store_url": bucket,
        "object_store_options": seaweed.options(),
    }


@pytest.fixture
def homes(config, tmp_path):
    """Two machines of one market."""
    with (
        Market.open(tmp_path / "first", config) as first,
        Market.open(tmp_path / "second", config) as second,
    ):
        yield first, second
        assert check_and_repair.check(first).ok
        assert check_and_repair.check(second).ok


def loaded(market: Market) -> list[int]:
    """Load the document's chunks as an engine of this machine would: a byte of each."""
    market.catalogue.refresh()
    match = market.match(NAMESPACE, TOKENS)
    assert match is not None
    found = []
    for chunk in match.chunks:
        with market.store.open(chunk.key, LAYOUT, NAMESPACE, chunk.known) as stored:
            found.append(int(stored.layer(0)[0]))
    return found


def test_what_one_machine_publishes_all_sell(homes):
    """From the bucket, on the terms in the database, until anyone takes it off the market."""
    first, second = homes
    listing = store(first, 1, cache_read_nano_per_mtok=5)
    assert loaded(second) == loaded(first) == [0, 1, 2]
    second.catalogue.set_price(listing.document_id, 7)
    assert first.catalogue.get(listing.document_id).terms.cache_read_nano_per_mtok == 7
    second.delist(listing.document_id)
    first.catalogue.refresh()
    assert first.match(NAMESPACE, TOKENS) is None


def test_a_repair_on_one_machine_reaches_the_disks_of_others(homes):
    """The database knows the fingerprint of what is stored now; an old copy is fetched again."""
    first, second = homes
    listing = store(first, 1)
    assert loaded(second) == [0, 1, 2]
    document, key = DocumentChunks.of(NAMESPACE, TOKENS), listing.chunk_keys[1]
    assert first.store.objects is not None
    first.store.disk.delete(key)
    first.store.objects.delete(chunk_name(key))
    first.store.put(
        key=key,
        parent=document.parents[1],
        namespace=NAMESPACE,
        tokens=document.tokens[1],
        layout=LAYOUT,
        layers=[[np.full(16 * 64, 9, dtype=np.uint8)]],
    )
    assert loaded(second) == [0, 1, 2], "its copy is whole, and nobody has said anything"
    first.catalogue.shares.note([first.store.describe(key)])
    assert loaded(second) == loaded(first) == [0, 9, 2]


def test_any_machine_deletes_what_none_needs(homes):
    """Also what another machine has stored; what is needed stays, no matter who needs it."""
    first, second = homes
    kept, gone = store(first, 1), store(first, 2)
    begun = second.catalogue.begin(gone, DocumentChunks.of(NAMESPACE, tokens(LENGTH, 2)))
    assert begun.state == "live"
    assert garbage_collection.collect_garbage(second).objects_deleted == 0
    first.delist(gone.document_id)
    assert garbage_collection.collect_garbage(second).objects_deleted == 3
    assert second.store.objects is not None
    left = {name for name in second.store.objects.names() if "/" in name}
    assert left == {chunk_name(key) for key in kept.chunk_keys}
    assert store(second, 2).state == "live"
    assert garbage_collection.collect_garbage(first).objects_deleted == 0


def test_a_home_with_another_database_is_refused(homes, config, tmp_path):
    """It would delete what it does not know."""
    first, _ = homes
    store(first, 1)
    with pytest.raises(ConfigError, match="another market's"):
        Market.open(tmp_path / "third", config | {"database_url": None})


def test_a_disk_moves_into_a_bucket(seaweed: SeaweedFS, bucket: str, tmp_path):
    """Everything is uploaded before the disk is a cache."""
    config = {"object_store_url": bucket, "object_store_options": seaweed.options()}
    with Market.open(tmp_path / "old") as market:
        listing = store(market, 1)
    with pytest.raises(ConfigError, match="store upload"):
        Market.open(tmp_path / "old", config)
    words = ["store", "upload", "--home", str(tmp_path / "old"), "--config", json.dumps(config)]
    assert main(words) == 0
    with Market.open(tmp_path / "old", config) as market:
        for key in listing.chunk_keys:
            market.store.disk.delete(key)
            market.store.verify(key)
        assert loaded(market) == [0, 1, 2]
    with pytest.raises(ConfigError, match="chunk_tokens"):
        Market.open(tmp_path / "old", {**config, "chunk_tokens": 128})
    assert main(words) == 2, "done already"
