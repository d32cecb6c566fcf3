"""A listing's life in the database: begun, committed, failed, delisted, restarted."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from tests.support.catalogue_documents import (
    NAMESPACE,
    changed,
    chunks_of,
    ended,
    heard,
    listing_of,
    matched,
    publish,
    start_process,
    tell,
    tokens,
)
from vllm_kvmarket.catalogue import Catalogue
from vllm_kvmarket.core.errors import CatalogueError, NotFoundError

DOCUMENT = tokens(700)


# Begin and commit


def test_a_document_is_matched_from_its_commit_on(catalogue):
    """While it is being published nothing matches; afterwards all of it does, to the last token."""
    listing = listing_of(DOCUMENT, title="T", publisher="P", cache_read_nano_per_mtok=5)
    begun = catalogue.begin(listing, chunks_of(DOCUMENT))
    assert begun == listing
    assert matched(catalogue, DOCUMENT) == 0
    live = catalogue.commit(listing.document_id, stored_bytes=123)
    assert live == dataclasses.replace(listing, state="live", stored_bytes=123)
    match = catalogue.match(NAMESPACE, [*DOCUMENT, 1, 2])
    assert (match.token_count, match.listing) == (700, live)
    assert [chunk.key for chunk in match.chunks] == list(listing.chunk_keys)
    assert catalogue.get(listing.document_id) == live
    assert catalogue.tokens_of(listing.document_id) == DOCUMENT
    assert (catalogue.index.documents, catalogue.index.chunks) == (1, 3)


def test_a_live_document_is_not_published_again(catalogue):
    """Beginning it returns the live listing; its terms and publisher stay as they were."""
    live = publish(catalogue, DOCUMENT, title="first")
    again = listing_of(DOCUMENT, title="second", publisher="someone else")
    assert catalogue.begin(again, chunks_of(DOCUMENT)) == live
    assert catalogue.commit(live.document_id, stored_bytes=0) == live
    assert matched(catalogue, DOCUMENT) == 700


def test_commit_needs_a_begin(catalogue):
    """A listing that was never begun, has failed, or was delisted is not put on offer."""
    listing = listing_of(DOCUMENT)
    with pytest.raises(CatalogueError, match="unknown, not being published"):
        catalogue.commit(listing.document_id, 0)
    catalogue.begin(listing, chunks_of(DOCUMENT))
    catalogue.fail(listing.document_id, "no room left")
    with pytest.raises(CatalogueError, match="failed, not being published"):
        catalogue.commit(listing.document_id, 0)
    publish(catalogue, DOCUMENT)
    catalogue.delist(listing.document_id)
    with pytest.raises(CatalogueError, match="delisted, not being published"):
        catalogue.commit(listing.document_id, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"token_count": 699},
        {"document_id": "kvd_" + "0" * 32},
        {"chunk_keys": (b"k" * 32,)},
        {"royalty_ppm": 1_000_001},
        {"cache_read_nano_per_mtok": -1},
        {"rendered_as": "html"},
    ],
)
def test_a_listing_that_does_not_fit_is_refused_whole(catalogue, wrong):
    """Wrong counts, ids, keys or terms: an error, and nothing is noted."""
    with pytest.raises(CatalogueError):
        catalogue.begin(listing_of(DOCUMENT, **wrong), chunks_of(DOCUMENT))
    assert catalogue.listings() == []


def test_an_empty_document_is_refused(catalogue):
    """A document has at least one token."""
    listing = dataclasses.replace(listing_of([1]), token_count=0)
    with pytest.raises(CatalogueError, match="given 0"):
        catalogue.begin(listing, chunks_of([]))


def test_chunk_keys_may_be_left_to_the_catalogue(catalogue):
    """A listing without keys gets those of its tokens."""
    listing = listing_of(DOCUMENT)
    begun = catalogue.begin(dataclasses.replace(listing, chunk_keys=()), chunks_of(DOCUMENT))
    assert begun.chunk_keys == listing.chunk_keys


def test_a_digest_that_collides_sells_nobody_elses_tokens(catalogue, monkeypatch):
    """Where two documents' chunks had the same keys, the second is refused; the first stays."""
    publish(catalogue, DOCUMENT)
    other = tokens(700, seed=9)
    collides = msgspec.structs.replace(chunks_of(other), keys=chunks_of(DOCUMENT).keys)
    forged = changed(listing_of(DOCUMENT), title="forged")
    with pytest.raises(CatalogueError, match="other tokens are stored"):
        catalogue.begin(forged, collides)
    keys = (*collides.keys[:-1], bytes(32))
    longer = dataclasses.replace(
        forged,
        document_id=msgspec.structs.replace(collides, keys=keys).document_id,
        chunk_keys=keys,
    )
    with pytest.raises(CatalogueError, match="other tokens are stored"):
        catalogue.begin(longer, msgspec.structs.replace(collides, keys=keys))
    assert matched(catalogue, other) == 0
    assert [listing.terms.title for listing in catalogue.listings()] == ["a document"]


# States across restarts and deaths


def test_every_state_survives_a_restart(place):
    """Publishing, live, failed and delisted listings are what they were."""
    documents = {
        state: tokens(300, seed)
        for seed, state in enumerate(["publishing", "live", "failed", "delisted"])
    }
    with Catalogue.open(place) as catalogue:
        for state, document in documents.items():
            listing = catalogue.begin(listing_of(document), chunks_of(document))
            if state in ("live", "delisted"):
                catalogue.commit(listing.document_id, 1)
            if state == "delisted":
                catalogue.delist(listing.document_id)
            if state == "failed":
                catalogue.fail(listing.document_id, "the disk is full")
    with Catalogue.open(place) as catalogue:
        for state, document in documents.items():
            listing = catalogue.get(listing_of(document).document_id)
            assert listing.state == state
            assert listing.reason == ("the disk is full" if state == "failed" else "")
            assert matched(catalogue, document) == (300 if state == "live" else 0)
            assert [found.state for found in catalogue.listings(state)] == [state]
        begun = listing_of(documents["publishing"]).document_id
        with pytest.raises(CatalogueError, match="not being published by this process"):
            catalogue.commit(begun, 1)
        assert publish(catalogue, documents["publishing"]).state == "live"
        assert catalogue.check_integrity() == []


@pytest.mark.parametrize("state", ["failed", "delisted", "damaged"])
def test_a_document_that_is_off_the_market_starts_anew(catalogue, state):
    """On the terms that are given now; the failure's reason is forgotten."""
    listing = catalogue.begin(listing_of(DOCUMENT), chunks_of(DOCUMENT))
    if state == "failed":
        catalogue.fail(listing.document_id, "why")
    else:
        catalogue.commit(listing.document_id, 10)
    if state == "delisted":
        catalogue.delist(listing.document_id)
    if state == "damaged":
        catalogue.report_damage(listing.chunk_keys[1])
    assert catalogue.get(listing.document_id).state == state
    begun = catalogue.begin(changed(listing, title="anew"), chunks_of(DOCUMENT))
    assert (begun.state, begun.reason, begun.terms.title) == ("publishing", "", "anew")
    catalogue.heal(listing.chunk_keys[1])
    live = catalogue.commit(listing.document_id, 5)
    # Repairing writes a part of a document's chunks, publishing anew all of them.
    assert (live.terms.title, live.stored_bytes) == ("anew", 10 if state == "damaged" else 5)
    assert matched(catalogue, DOCUMENT) == 700


BEGIN_AND_WAIT = """
with Catalogue.open(place) as catalogue:
    document = tokens(700)
    begun = catalogue.begin(listing_of(document, title="theirs"), chunks_of(document))
    print(begun.terms.title, flush=True)
    if sys.stdin.readline() == "die\\n":
        os._exit(1)
    print(catalogue.commit(begun.document_id, 1).terms.title, flush=True)
"""


def test_what_a_crashed_publisher_left_behind_can_be_restarted(catalogue, path):
    """A living process's publishing is left alone; once it died, the next one takes over."""
    listing = listing_of(DOCUMENT, title="ours")
    process = start_process(BEGIN_AND_WAIT, path)
    assert heard(process) == "theirs"
    assert catalogue.begin(listing, chunks_of(DOCUMENT)).terms.title == "theirs"
    tell(process, "die")
    assert ended(process) == 1
    assert catalogue.get(listing.document_id).state == "publishing"
    catalogue.fail(listing.document_id, "our first attempt is over")
    assert catalogue.get(listing.document_id).state == "failed"

    process = start_process(BEGIN_AND_WAIT, path)
    assert heard(process) == "theirs"
    tell(process, "die")
    ended(process)
    assert catalogue.begin(listing, chunks_of(DOCUMENT)).terms.title == "ours"
    assert catalogue.commit(listing.document_id, 1).terms.title == "ours"


def test_two_processes_that_publish_the_same_document_both_succeed(catalogue, place):
    """One commits first and lists it; the other's commit finds it live. A failure harms nobody."""
    listing = listing_of(DOCUMENT, title="ours")
    process = start_process(BEGIN_AND_WAIT, place)
    assert heard(process) == "theirs"
    catalogue.begin(listing, chunks_of(DOCUMENT))
    catalogue.fail(listing.document_id, "ours did not work")
    assert catalogue.get(listing.document_id).state == "publishing"
    catalogue.begin(listing, chunks_of(DOCUMENT))
    assert catalogue.commit(listing.document_id, 1).terms.title == "theirs"
    tell(process, "commit")
    assert heard(process) == "theirs"
    assert ended(process) == 0


def test_two_requests_of_one_process_fail_only_together(catalogue):
    """The listing fails when the last one that publishes it does."""
    listing = listing_of(DOCUMENT)
    catalogue.begin(listing, chunks_of(DOCUMENT))
    catalogue.begin(listing, chunks_of(DOCUMENT))
    catalogue.fail(listing.document_id, "first")
    assert catalogue.get(listing.document_id).state == "publishing"
    catalogue.fail(listing.document_id, "second")
    assert catalogue.get(listing.document_id).reason == "second"


def test_closing_gives_up_what_was_being_published(path):
    """A catalogue that was closed is no living publisher, and leaves no file behind."""
    with Catalogue.open(path) as first:
        first.begin(listing_of(DOCUMENT, title="first"), chunks_of(DOCUMENT))
        assert len(list((path.parent / "publishing").iterdir())) == 1
    assert list((path.parent / "publishing").iterdir()) == []
    with Catalogue.open(path) as second:
        begun = second.begin(listing_of(DOCUMENT, title="second"), chunks_of(DOCUMENT))
        assert begun.terms.title == "second"


def test_failing_touches_only_what_is_being_published(catalogue):
    """A live listing stays live, and an unknown one is an error."""
    live = publish(catalogue, DOCUMENT)
    catalogue.fail(live.document_id, "too late")
    assert catalogue.get(live.document_id) == live
    with pytest.raises(NotFoundError, match="kvmarket document list"):
        catalogue.fail("kvd_unknown", "why")


# Delisting


def test_a_delisted_document_matches_no_more_but_what_others_share_does(catalogue):
    """Its own chunks go, those that another listing holds stay; twice is an error."""
    long, short = tokens(700), tokens(700)[:300]
    listing = publish(catalogue, long)
    publish(catalogue, short)
    catalogue.delist(listing.document_id)
    assert matched(catalogue, long) == 300
    assert catalogue.get(listing.document_id).state == "delisted"
    assert catalogue.tokens_of(listing.document_id) == long
    with pytest.raises(NotFoundError, match="delisted already"):
        catalogue.delist(listing.document_id)
    with pytest.raises(NotFoundError, match="there is no document"):
        catalogue.delist("kvd_unknown")


def test_delisting_while_publishing_stops_the_commit(catalogue):
    """A document that is delisted on its way does not appear."""
    listing = catalogue.begin(listing_of(DOCUMENT), chunks_of(DOCUMENT))
    catalogue.delist(listing.document_id)
    with pytest.raises(CatalogueError, match="delisted"):
        catalogue.commit(listing.document_id, 1)


# Whose it is


def test_what_is_shared_is_paid_to_who_was_listed_first(catalogue):
    """First on offer, whatever the clocks said; who delists and comes back has its place again."""
    stem = tokens(400)
    first = publish(catalogue, [*stem, 1, 2], created_at_s=9.0)
    second = publish(catalogue, [*stem, 3], created_at_s=1.0)
    assert catalogue.match(NAMESPACE, stem).listing == first
    catalogue.report_damage(first.chunk_keys[1])
    catalogue.heal(first.chunk_keys[1])
    assert catalogue.match(NAMESPACE, stem).listing == first
    catalogue.delist(first.document_id)
    assert catalogue.match(NAMESPACE, stem).listing == second
    again = publish(catalogue, [*stem, 1, 2], created_at_s=0.0)
    assert catalogue.match(NAMESPACE, stem).listing == again
    exact = publish(catalogue, stem)
    match = catalogue.match(NAMESPACE, stem)
    assert (match.listing, match.whole) == (again, exact)
