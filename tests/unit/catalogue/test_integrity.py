"""Damage and healing, listings and their filters, the database itself."""

from __future__ import annotations

import itertools
from pathlib import Path

import apsw
import pytest

from tests.support.catalogue_documents import (
    chunks_of,
    listing_of,
    matched,
    publish,
    tokens,
)
from vllm_kvmarket.catalogue import Catalogue, ListingFilter
from vllm_kvmarket.core import sqlite
from vllm_kvmarket.core.errors import CatalogueError, ConfigError, NotFoundError

DOCUMENT = tokens(700)


# Damage


def test_a_damaged_chunk_ends_the_match_until_it_is_healed(catalogue):
    """The chunks before it still match in every listing that holds it; healing brings it back."""
    stem = tokens(600)
    one = publish(catalogue, [*stem, *tokens(300, seed=1)])
    two = publish(catalogue, [*stem, *tokens(300, seed=2)])
    other = publish(catalogue, tokens(300, seed=3))
    shared = one.chunk_keys[1]
    catalogue.report_damage(shared, "its checksum is wrong")
    for listing in (one, two):
        assert matched(catalogue, catalogue.tokens_of(listing.document_id)) == 256
        found = catalogue.get(listing.document_id)
        assert (found.state, found.reason) == ("damaged", "its checksum is wrong")
    assert catalogue.get(other.document_id) == other
    catalogue.heal(shared)
    for listing in (one, two):
        assert matched(catalogue, catalogue.tokens_of(listing.document_id)) == 900
        assert catalogue.get(listing.document_id) == listing


def test_a_second_damaged_chunk_shortens_the_match_further(catalogue):
    """And the listing is live again only when both are healed, in any order."""
    keys = publish(catalogue, tokens(1000)).chunk_keys
    for damaged, healed in itertools.permutations([1, 2]):
        catalogue.report_damage(keys[2])
        assert matched(catalogue, tokens(1000)) == 512
        catalogue.report_damage(keys[1])
        assert matched(catalogue, tokens(1000)) == 256
        catalogue.heal(keys[damaged])
        assert catalogue.listings("live") == []
        assert matched(catalogue, tokens(1000)) == (512 if damaged == 1 else 256)
        catalogue.heal(keys[healed])
        assert len(catalogue.listings("live")) == 1
    catalogue.report_damage(keys[0])
    assert matched(catalogue, tokens(1000)) == 0
    catalogue.heal(keys[0])


def test_reports_about_unknown_or_whole_chunks_change_nothing(catalogue):
    """A chunk that nobody listed cannot be damaged, a whole one not healed."""
    live = publish(catalogue, DOCUMENT)
    catalogue.report_damage(b"?" * 32)
    catalogue.heal(live.chunk_keys[0])
    catalogue.heal(b"?" * 32)
    assert catalogue.get(live.document_id) == live


def test_a_repair_that_fails_leaves_the_listing_damaged(catalogue):
    """Republishing a damaged document that fails returns it to where it was, or better."""
    live = publish(catalogue, DOCUMENT)
    catalogue.report_damage(live.chunk_keys[1])
    catalogue.begin(live, chunks_of(DOCUMENT))
    catalogue.fail(live.document_id, "no room left")
    damaged = catalogue.get(live.document_id)
    assert (damaged.state, damaged.reason) == ("damaged", "no room left")
    assert matched(catalogue, DOCUMENT) == 256
    catalogue.begin(live, chunks_of(DOCUMENT))
    catalogue.heal(live.chunk_keys[1])
    catalogue.fail(live.document_id, "aborted")
    assert catalogue.get(live.document_id) == live


def test_committing_with_a_damaged_chunk_does_not_make_it_live(catalogue):
    """A chunk that was lost between begin and commit keeps the listing damaged."""
    listing = catalogue.begin(listing_of(DOCUMENT), chunks_of(DOCUMENT))
    catalogue.report_damage(listing.chunk_keys[2])
    assert catalogue.commit(listing.document_id, 1).state == "damaged"
    assert matched(catalogue, DOCUMENT) == 512


# Reading


def test_listings_are_found_by_state_and_by_text(catalogue):
    """Newest first; text is looked for in title, publisher and id, in either case."""
    old = publish(catalogue, tokens(10), title="Über Öl", publisher="acme", created_at_s=1.0)
    new = publish(catalogue, tokens(20), title="Law 100%", publisher="gov", created_at_s=2.0)
    assert catalogue.listings() == [new, old]
    assert catalogue.listings(state="failed") == []
    for search, found in (
        ("über öl", [old]), ("100%", [new]), ("GOV", [new]), (old.document_id[5:20], [old]),
        ("_", [new, old]), ("nothing like it", []),
    ):  # fmt: skip
        assert [each for each, _ in catalogue.page(ListingFilter(search=search))] == found


def test_the_store_learns_which_chunks_are_needed(catalogue):
    """Those on offer or on their way are; those of failed and delisted listings are not."""
    live = publish(catalogue, tokens(300, seed=1))
    begun = catalogue.begin(listing_of(tokens(300, seed=2)), chunks_of(tokens(300, seed=2)))
    gone = publish(catalogue, tokens(300, seed=3))
    catalogue.delist(gone.document_id)
    catalogue.report_damage(live.chunk_keys[0])
    keys = [*live.chunk_keys, *begun.chunk_keys, *gone.chunk_keys, b"?" * 32]
    assert catalogue.needed_chunks(keys) == {*live.chunk_keys, *begun.chunk_keys}
    listed = [key for key in keys if catalogue.chunk_is_listed(key)]
    assert listed == list(live.chunk_keys)


def test_unknown_documents_are_an_error(catalogue):
    """Reading what is not there says so, and how to find what is."""
    for read in (catalogue.get, catalogue.tokens_of):
        with pytest.raises(NotFoundError, match="kvmarket document list"):
            read("kvd_unknown")


# The database


def test_a_market_keeps_the_chunk_size_it_was_made_with(place):
    """Opening it with another one would cut documents elsewhere: an error that names both."""
    with Catalogue.open(place, chunk_tokens=64) as catalogue:
        publish(catalogue, tokens(100), chunk_tokens=64)
        assert matched(catalogue, tokens(100)) == 100
    with pytest.raises(ConfigError, match=r"chunk_tokens is 256, but .* made with 64"):
        Catalogue.open(place)
    Catalogue.open(place, chunk_tokens=64).close()


def test_a_locked_database_is_a_catalogue_error(path, monkeypatch):
    """A writer that waits too long gets an error; readers and matches are not held up."""
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_MS", 20)
    with Catalogue.open(path) as catalogue:
        live = publish(catalogue, DOCUMENT)
        other = apsw.Connection(str(path))
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(CatalogueError, match="database is locked"):
            catalogue.delist(live.document_id)
        assert catalogue.get(live.document_id) == live
        catalogue.refresh()
        assert matched(catalogue, DOCUMENT) == 700
        other.execute("ROLLBACK")
        catalogue.delist(live.document_id)
        other.close()


def test_what_is_no_database_is_a_catalogue_error(path):
    """A file of something else is not opened, and not overwritten."""
    path.parent.mkdir()
    path.write_text("This is a diary. " * 100)
    with pytest.raises(CatalogueError, match="cannot be used"):
        Catalogue.open(path)
    assert path.read_text().startswith("This is a diary.")


def test_tampered_rows_are_found(catalogue, path):
    """The integrity check names each document whose rows contradict each other."""
    live = publish(catalogue, DOCUMENT)
    other = publish(catalogue, tokens(300, seed=1))
    raw = apsw.Connection(str(path))
    raw.execute("UPDATE chunk SET tokens = zeroblob(8) WHERE key = ?", (live.chunk_keys[2],))
    raw.execute("UPDATE chunk SET damaged = 1 WHERE key = ?", (other.chunk_keys[0],))
    problems = catalogue.check_integrity()
    assert any("514 tokens stored, 700 listed" in problem for problem in problems)
    assert any("do not follow from its tokens" in problem for problem in problems)
    assert any(
        problem == f"{other.document_id}: live, with a damaged chunk" for problem in problems
    )
    assert sum("can be matched of it is something else" in problem for problem in problems) == 2
    raw.execute("UPDATE chunk SET damaged = 0")
    tail = DOCUMENT[512:]
    raw.execute(
        "UPDATE chunk SET tokens = ? WHERE key = ?",
        (b"".join(token.to_bytes(4, "little") for token in tail), live.chunk_keys[2]),
    )
    raw.close()


def test_opening_and_closing_leaves_no_descriptor_open(path):
    """A process may open the catalogue as often as it likes."""
    Catalogue.open(path).close()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with Catalogue.open(path) as catalogue:
            publish(catalogue, DOCUMENT)
            catalogue.delist(listing_of(DOCUMENT).document_id)
    catalogue.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
