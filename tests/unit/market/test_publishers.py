"""A listing goes live only when its publisher can earn and stays within its limits."""

from __future__ import annotations

import pytest

from tests.support.catalogue_documents import chunks_of, listing_of, tokens
from vllm_kvmarket.core.errors import (
    CatalogueRefusedError,
    LedgerRefusedError,
    LedgerUnavailableError,
    NotFoundError,
)
from vllm_kvmarket.ledger import PROVIDER, WORLD
from vllm_kvmarket.market.market import Market


def begin(market, seed, needed_bytes=0, **terms):
    document = tokens(300, seed)
    listing = listing_of(document, **terms)
    return market.begin_listing(listing, chunks_of(document), needed_bytes).result()


def publish(market, seed, stored_bytes=1000, **terms):
    begun = begin(market, seed, **terms)
    market.commit_listing(begun.document_id, stored_bytes, begun.chunk_keys).result()
    return market.catalogue.get(begun.document_id)


def test_nothing_is_listed_while_its_publisher_gets_no_account(tmp_path, monkeypatch):
    """The ledger is away: publishing fails, and works when it is back."""

    def away(*_args, **_named):
        raise LedgerUnavailableError("the ledger's database is away")

    with Market.open(tmp_path) as market:
        with monkeypatch.context() as patched:
            patched.setattr(market.ledger, "account", away)
            with pytest.raises(LedgerUnavailableError):
                begin(market, 1, publisher="pat")
        assert market.catalogue.listings() == []
        assert publish(market, 1, publisher="pat").state == "live"
        assert market.ledger.account("pat").kind == "publisher"


def test_an_account_of_another_kind_earns_royalties_too(tmp_path):
    """A buyer may publish, and the provider; the world outside may not."""
    with Market.open(tmp_path) as market:
        market.create_account("alice", "buyer")
        assert publish(market, 1, publisher="alice").state == "live"
        assert market.ledger.account("alice").kind == "buyer"
        assert publish(market, 2, publisher=PROVIDER).state == "live"
        with pytest.raises(LedgerRefusedError, match="world outside"):
            begin(market, 3, publisher=WORLD)
        with pytest.raises(LedgerRefusedError, match="is not 1 to 128"):
            begin(market, 3, publisher="no account")
        with pytest.raises(NotFoundError):
            market.catalogue.get(listing_of(tokens(300, 3)).document_id)


def test_a_publisher_has_a_limited_number_of_documents(tmp_path):
    """Running publications count; withdrawn documents do not; others are not touched."""
    with Market.open(tmp_path, {"publisher_max_documents": 2}) as market:
        first = publish(market, 1)
        begin(market, 2)
        with pytest.raises(CatalogueRefusedError, match="has 2 documents and may have 2"):
            begin(market, 3)
        assert begin(market, 3, publisher="another").state == "publishing"
        for seed in (4, 5, 6):
            begin(market, seed, publisher=PROVIDER)
        # The same document again is no new one, and a repair is never refused.
        assert begin(market, 2).state == "publishing"
        market.report_damage(first.chunk_keys[0]).result()
        assert begin(market, 1).state == "publishing"
        market.fail_listing(first.document_id, "no repair").result()
        market.catalogue.delist(first.document_id)
        assert begin(market, 7).state == "publishing"


def test_a_publisher_has_a_limited_number_of_bytes(tmp_path):
    """Stored documents, those on their way and the new one must fit together."""
    with Market.open(tmp_path, {"publisher_max_bytes": 5000}) as market:
        publish(market, 1, stored_bytes=3000)
        assert begin(market, 2, needed_bytes=2000).state == "publishing"
        with pytest.raises(CatalogueRefusedError, match="stores 5000 bytes and may store 5000"):
            begin(market, 3, needed_bytes=1)
