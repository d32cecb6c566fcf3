"""A wrong setting of the object store, or a list that is not whole, loses nothing."""

from __future__ import annotations

import contextlib
from pathlib import Path

import apsw
import msgspec
import numpy as np
import pytest

from tests.support.catalogue_documents import LAYOUT, listing_of, store_and_list, tokens
from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.catalogue.store_record import StoreRecord
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.errors import (
    CatalogueRefusedError,
    ConfigError,
    StoreError,
)
from vllm_kvmarket.market import check_and_repair, garbage_collection
from vllm_kvmarket.market.bucket_identity import MARKER, upload
from vllm_kvmarket.market.market import DATABASE_FILE, Market
from vllm_kvmarket.store import ObjectTier
from vllm_kvmarket.store.chunk_format import chunk_name

LENGTH = 600


def bucket_of(folder: Path, **more: object) -> dict[str, object]:
    folder.mkdir(exist_ok=True)
    return {"object_store_url": folder.as_uri(), **more}


def move(home: Path, config: dict[str, object]):
    """What `kvmarket store upload` does."""
    objects = ObjectTier(str(config["object_store_url"]))
    try:
        with Market.open(home) as market:
            return upload(market, objects)
    finally:
        objects.close()


# A disk that gets an object store


def test_a_disk_becomes_a_cache_only_after_its_chunks_were_uploaded(tmp_path):
    """Before, a cache's quota would delete the only copies; after, every chunk can come back."""
    home = tmp_path / "home"
    with Market.open(home) as market:
        listings = [store_and_list(market, tokens(LENGTH, seed)) for seed in range(3)]
        gone = store_and_list(market, tokens(LENGTH, 9))
        market.delist(gone.document_id)
        size = sum(path.stat().st_size for path in market.store.disk.root.glob("??/*.kv"))
    config = bucket_of(tmp_path / "bucket", disk_quota_bytes=size // 3)
    with pytest.raises(ConfigError, match=r"on its disk alone: run `kvmarket store upload`"):
        Market.open(home, config)
    report = move(home, config)
    assert (report.uploaded, report.present, report.damaged) == (9, 0, [])
    with Market.open(home, config) as market:
        # The cache evicts at once, and reads everything back.
        store_and_list(market, tokens(LENGTH, 4))
        for listing in listings:
            for key in listing.chunk_keys:
                market.store.verify(key)
        assert check_and_repair.check(market).ok


def test_an_upload_that_was_interrupted_is_continued(tmp_path, monkeypatch):
    """What arrived is not sent again, and the disk is no cache before the last chunk is there."""
    home, config = tmp_path / "home", bucket_of(tmp_path / "bucket")
    with Market.open(home) as market:
        for seed in range(2):
            store_and_list(market, tokens(LENGTH, seed))
    sent = []
    put = ObjectTier.upload

    def put_four(tier, name, path):
        if len(sent) == 4:
            raise StoreError("the object store did not answer")
        sent.append(name)
        return put(tier, name, path)

    monkeypatch.setattr(ObjectTier, "upload", put_four)
    with pytest.raises(StoreError, match="did not answer"):
        move(home, config)
    with pytest.raises(ConfigError, match="store upload"):
        Market.open(home, config)
    monkeypatch.setattr(ObjectTier, "upload", put)
    report = move(home, config)
    assert (report.uploaded, report.present) == (2, 4)
    Market.open(home, config).close()


def test_a_damaged_chunk_is_not_uploaded(tmp_path):
    """Its document is damaged, as after `store check`, and the others move."""
    home, config = tmp_path / "home", bucket_of(tmp_path / "bucket")
    with Market.open(home) as market:
        bad, good = (store_and_list(market, tokens(LENGTH, seed)) for seed in range(2))
        path = market.store.disk.path(bad.chunk_keys[1])
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    report = move(home, config)
    assert (report.uploaded, report.damaged) == (5, [bad.chunk_keys[1].hex()])
    with Market.open(home, config) as market:
        assert market.catalogue.get(bad.document_id).state == "damaged"
        assert market.catalogue.get(good.document_id).state == "live"


def test_an_engine_that_still_uses_the_disk_alone_publishes_nothing(tmp_path):
    """Its new chunks would be in a cache only; and what it misses is no damage."""
    home, config = tmp_path / "home", bucket_of(tmp_path / "bucket")
    with Market.open(home) as old:
        listing = store_and_list(old, tokens(LENGTH, 1))
        move(home, config)
        with pytest.raises(CatalogueRefusedError, match=r"are in file://.*restart this process"):
            store_and_list(old, tokens(LENGTH, 2))
        old.store.disk.path(listing.chunk_keys[0]).unlink()
        old.report_damage(listing.chunk_keys[0]).result()
        assert old.catalogue.get(listing.document_id).state == "live"


def test_nothing_is_moved_while_a_document_is_being_published(tmp_path):
    """Its chunks would arrive on the disk after the others were uploaded."""
    home, config = tmp_path / "home", bucket_of(tmp_path / "bucket")
    with Market.open(home) as market:
        store_and_list(market, tokens(LENGTH, 1))
        coming = DocumentChunks.of(bytes(range(32)), tokens(LENGTH, 2))
        market.catalogue.begin(listing_of(tokens(LENGTH, 2)), coming)
        with pytest.raises(CatalogueRefusedError, match="stop the market's engines"):
            move(home, config)
        assert market.catalogue.store_record.read() is None


def test_a_home_that_had_a_bucket_before_it_was_recorded_is_moved_whole(tmp_path):
    """Its chunks are in the bucket, and not all of them on its disk any more."""
    home, config = tmp_path / "home", bucket_of(tmp_path / "bucket")
    with Market.open(home, config) as market:
        listings = [store_and_list(market, tokens(LENGTH, seed)) for seed in range(2)]
        lost = listings[1].chunk_keys[2]
        for key in (listings[0].chunk_keys[1], lost):
            market.store.disk.delete(key)
        market.store.objects.delete(chunk_name(lost))
        market.store.disk.path(listings[0].chunk_keys[2]).write_bytes(b"damaged")
    with contextlib.closing(apsw.Connection(str(home / DATABASE_FILE))) as db:
        db.execute("UPDATE catalogue SET store_url = NULL")
    with pytest.raises(ConfigError, match="run `kvmarket store upload`"):
        Market.open(home, config)
    report = move(home, config)
    assert (report.uploaded, report.present, report.damaged) == (0, 5, [lost.hex()])
    with Market.open(home, config) as market:
        assert market.catalogue.get(listings[0].document_id).state == "live"
        for key in listings[0].chunk_keys:
            market.store.verify(key)


# Another object store


def test_another_bucket_or_none_is_refused(tmp_path):
    """One line says which setting is right; the market is as it was."""
    home, config = tmp_path / "home", bucket_of(tmp_path / "bucket")
    with Market.open(home, config) as market:
        listing = store_and_list(market, tokens(LENGTH, 1))
    with pytest.raises(ConfigError, match=r"chunks are in file://\S+/bucket: set it to that"):
        Market.open(home, bucket_of(tmp_path / "empty"))
    other = bucket_of(tmp_path / "theirs")
    Market.open(tmp_path / "stranger", other).close()
    with pytest.raises(ConfigError, match="set it to that"):
        Market.open(home, other)
    with pytest.raises(ConfigError, match="set object_store_url to it"):
        Market.open(home)
    with Market.open(home, config) as market:
        assert market.catalogue.get(listing.document_id).state == "live"
        assert check_and_repair.check(market).ok


def test_the_same_bucket_at_another_address_is_the_same(tmp_path):
    """A bucket that was copied, or moved, is known by the id in it."""
    home, config = tmp_path / "home", bucket_of(tmp_path / "bucket")
    with Market.open(home, config) as market:
        listing = store_and_list(market, tokens(LENGTH, 1))
    (tmp_path / "bucket").rename(tmp_path / "moved")
    moved = bucket_of(tmp_path / "moved")
    with Market.open(home, moved) as market:
        market.store.verify(listing.chunk_keys[0])
        assert market.catalogue.store_record.read() == moved["object_store_url"]


@pytest.mark.parametrize("more", [{}, {"chunk_tokens": 128}], ids=["alike", "other chunks"])
def test_a_second_market_is_refused(tmp_path, more):
    """Its garbage collection would not know what the first one's documents need."""
    config = bucket_of(tmp_path / "bucket")
    with Market.open(tmp_path / "first", config) as first:
        listing = store_and_list(first, tokens(LENGTH, 1))
        with pytest.raises(
            ConfigError,
            match=r"another market's.*a prefix of your own, or that market's database_url",
        ):
            Market.open(tmp_path / "second", config | more)
        alone = Market.open(tmp_path / "third")
        with alone, contextlib.closing(ObjectTier(str(config["object_store_url"]))) as objects:
            store_and_list(alone, tokens(LENGTH, 2))
            with pytest.raises(ConfigError, match="another market's"):
                upload(alone, objects)
        assert check_and_repair.check(first).ok
        assert first.catalogue.get(listing.document_id).state == "live"
    Market.open(tmp_path / "first", config).close()


def test_two_markets_that_claim_a_bucket_at_once_do_not_both_get_it(tmp_path, monkeypatch):
    """The first to write its id has it; the other has changed nothing and may use another."""
    config = bucket_of(tmp_path / "bucket")
    put_new = ObjectTier.put_new

    def late(tier, name, content):
        monkeypatch.setattr(ObjectTier, "put_new", put_new)
        Market.open(tmp_path / "first", config).close()
        return put_new(tier, name, content)

    monkeypatch.setattr(ObjectTier, "put_new", late)
    with pytest.raises(ConfigError, match="another market's"):
        Market.open(tmp_path / "second", config)
    Market.open(tmp_path / "second", bucket_of(tmp_path / "other")).close()
    Market.open(tmp_path / "first", config).close()


def test_a_claim_that_a_crash_interrupted_is_the_markets_own(tmp_path, monkeypatch):
    """Its id is in the bucket, and the database knows it."""
    config = bucket_of(tmp_path / "bucket")
    with monkeypatch.context() as crash:

        def die(*_):
            raise KeyboardInterrupt

        crash.setattr(StoreRecord, "write", die)
        with pytest.raises(KeyboardInterrupt):
            Market.open(tmp_path / "home", config)
    assert (tmp_path / "bucket" / MARKER).is_file()
    with Market.open(tmp_path / "home", config) as market:
        assert store_and_list(market, tokens(LENGTH, 1)).state == "live"


@pytest.mark.parametrize("replaced", ["another market's", "empty"])
@pytest.mark.parametrize("running", [True, False], ids=["running", "restarted"])
def test_a_bucket_that_was_replaced_behind_its_url_gets_nothing(tmp_path, replaced, running):
    """Its URL is the recorded one, and its id is not: nothing is published or deleted there."""
    home, config = tmp_path / "home", bucket_of(tmp_path / "bucket")
    market = Market.open(home, config)
    gone, kept = (store_and_list(market, tokens(LENGTH, seed)) for seed in range(2))
    market.delist(gone.document_id)
    (tmp_path / "bucket").rename(tmp_path / "gone")
    bucket_of(tmp_path / "bucket")
    if replaced == "another market's":
        with Market.open(tmp_path / "stranger", config) as stranger:
            store_and_list(stranger, tokens(LENGTH, 0))
    before = sorted(each for each in (tmp_path / "bucket").rglob("*") if each.is_file())
    if not running:
        market.close()
        market = Market.open(home, config)
    with market:
        coming = DocumentChunks.of(bytes(range(32)), tokens(LENGTH, 2))
        for act in (
            lambda: market.begin_listing(listing_of(tokens(LENGTH, 2)), coming).result(),
            lambda: garbage_collection.collect_garbage(market),
            lambda: garbage_collection.purge(market, [gone.document_id]),
            lambda: check_and_repair.repair(market, None, pytest.fail),
        ):
            with pytest.raises((StoreError, ConfigError), match="nothing was changed"):
                act()
        market.store.disk.delete(kept.chunk_keys[0])
        with pytest.raises((StoreError, ConfigError), match=f"is {replaced}"):
            market.report_damage(kept.chunk_keys[0]).result()
        assert market.catalogue.get(kept.document_id).state == "live"
    assert before == sorted(each for each in (tmp_path / "bucket").rglob("*") if each.is_file())


# Lists that lie


def test_an_empty_list_damages_nothing(tmp_path, monkeypatch):
    """What is judged is asked for by name: each rank's share, though no disk has it."""
    with Market.open(tmp_path / "home", bucket_of(tmp_path / "bucket")) as market:
        listing = store_and_list(market, tokens(LENGTH, 1))
        whole, halves, lost = listing.chunk_keys
        names = {chunk_name(halves, rank, 2) for rank in range(2)}
        for rank in range(2):
            put_half(market, listing, rank)
        market.store.objects.delete(chunk_name(halves))
        for key in (whole, halves, lost):
            market.store.disk.delete(key)
        assert names < set(market.store.objects.names())
        market.store.objects.delete(chunk_name(lost))
        monkeypatch.setattr(ObjectTier, "entries", lambda *_, **__: iter(()))
        for key in (whole, halves):
            market.report_damage(key).result()
        assert market.catalogue.get(listing.document_id).state == "live"
        market.report_damage(lost).result()
        assert market.catalogue.get(listing.document_id).state == "damaged"


def put_half(market: Market, listing: Listing, rank: int) -> None:
    """Store the second chunk's share of one of two ranks, as its engine would."""
    document = DocumentChunks.of(listing.namespace, tokens(LENGTH, 1))
    layout = msgspec.structs.replace(LAYOUT, rank=rank, world_size=2)
    market.store.put(
        key=document.keys[1],
        parent=document.parents[1],
        namespace=listing.namespace,
        tokens=document.tokens[1],
        layout=layout,
        layers=[[np.full(16 * 64, rank, dtype=np.uint8)]],
    )
    share = market.store.describe(document.keys[1], rank, 2)
    assert share is not None
    market.catalogue.shares.note([share])
