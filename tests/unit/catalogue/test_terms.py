"""A listing's end and pins, leaving for room, being taken over from elsewhere, old databases."""

from __future__ import annotations

import dataclasses
import time

import apsw
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
    revision,
    start_process,
    tell,
    tokens,
)
from vllm_kvmarket.catalogue import Catalogue
from vllm_kvmarket.core.errors import CatalogueError, NotFoundError

DOCUMENT = tokens(700)


def wait_until(condition, at_most_s: float = 10.0) -> None:
    until_s = time.monotonic() + at_most_s
    while not condition():
        assert time.monotonic() < until_s, f"it did not happen within {at_most_s} s"
        time.sleep(0.005)


# Time to live


@pytest.mark.parametrize("damaged", [False, True])
def test_a_listing_whose_time_is_over_matches_no_more(catalogue, damaged):
    """It expires once, with a reason, whether it was live or damaged; others stay."""
    listing = publish(catalogue, DOCUMENT, expires_at_s=time.time() + 1000)
    other = publish(catalogue, tokens(300, seed=1))
    if damaged:
        catalogue.report_damage(listing.chunk_keys[2])
    assert catalogue.expire() == []
    assert matched(catalogue, DOCUMENT) == (512 if damaged else 700)
    assert catalogue.expire(now_s=listing.terms.expires_at_s) == [listing.document_id]
    assert catalogue.expire(now_s=listing.terms.expires_at_s) == []
    assert matched(catalogue, DOCUMENT) == 0
    gone = catalogue.get(listing.document_id)
    assert (gone.state, gone.reason) == ("expired", "its time to live is over")
    assert catalogue.get(other.document_id) == other


def test_a_watching_process_expires_listings_unasked(place):
    """It matches no more, the database learns of it, and other processes take it over."""
    with Catalogue.open(place) as watching, Catalogue.open(place) as reading:
        watching.watch(interval_s=0.01)
        listing = publish(watching, DOCUMENT, expires_at_s=time.time() + 0.1)
        reading.refresh()
        wait_until(lambda: matched(watching, DOCUMENT) == 0)
        wait_until(lambda: reading.get(listing.document_id).state == "expired")
        reading.refresh()
        assert matched(reading, DOCUMENT) == 0
        assert reading.check_integrity() == watching.check_integrity() == []


def test_what_has_ended_is_not_matched_even_if_the_database_cannot_be_written(path):
    """Someone else holds the lock: matching stops in time, the note follows when it is free."""
    with Catalogue.open(path) as catalogue:
        listing = publish(catalogue, DOCUMENT, expires_at_s=time.time() + 0.3)
        catalogue.watch(interval_s=0.01)
        other = apsw.Connection(str(path))
        other.execute("BEGIN IMMEDIATE")
        assert matched(catalogue, DOCUMENT) == 700
        wait_until(lambda: matched(catalogue, DOCUMENT) == 0, at_most_s=2)
        time.sleep(0.1)
        assert catalogue.get(listing.document_id).state == "live"
        assert catalogue.last_error is None
        assert catalogue.check_integrity() == []
        other.execute("ROLLBACK")
        other.close()
        wait_until(lambda: catalogue.get(listing.document_id).state == "expired")


def test_what_has_ended_is_dropped_even_if_the_database_is_gone(path):
    """The clock needs no database."""
    with Catalogue.open(path) as catalogue:
        publish(catalogue, DOCUMENT, expires_at_s=time.time() + 0.05)
        path.rename(path.with_name("away"))
        time.sleep(0.1)
        with pytest.raises(CatalogueError, match="is gone"):
            catalogue.refresh()
        assert matched(catalogue, DOCUMENT) == 0
        path.with_name("away").rename(path)


def test_what_ended_while_nobody_watched_is_never_matched(place):
    """A process that starts later does not sell it, and notes its end."""
    with Catalogue.open(place) as catalogue:
        listing = publish(catalogue, DOCUMENT, expires_at_s=time.time() + 0.05)
    time.sleep(0.1)
    with Catalogue.open(place) as catalogue:
        assert matched(catalogue, DOCUMENT) == 0
        assert catalogue.get(listing.document_id).state == "live"
        assert catalogue.check_integrity() == []
        catalogue.watch(interval_s=0.01)
        wait_until(lambda: catalogue.get(listing.document_id).state == "expired")


def test_nothing_is_written_while_nothing_ends(path):
    """A watcher with listings that end some day leaves the database alone."""
    with Catalogue.open(path) as catalogue, Catalogue.open(path) as other:
        publish(catalogue, DOCUMENT, expires_at_s=time.time() + 1000)
        other.refresh()
        with other._db.reading() as db:
            before = db.pragma("data_version")
        catalogue.watch(interval_s=0.001)
        time.sleep(0.2)
        assert catalogue.expire() == []
        with other._db.reading() as db:
            assert db.pragma("data_version") == before


def test_the_end_can_be_moved_both_ways(catalogue):
    """Later keeps a listing, never keeps it for good, a past time ends it; matches carry it."""
    soon_s = time.time() + 500
    listing = publish(catalogue, DOCUMENT, expires_at_s=soon_s)
    moved = catalogue.set_expiry(listing.document_id, soon_s + 10)
    assert catalogue.match(NAMESPACE, DOCUMENT).listing == moved
    assert catalogue.expire(now_s=soon_s + 5) == []
    assert catalogue.set_expiry(listing.document_id, None).terms.expires_at_s is None
    assert catalogue.expire(now_s=soon_s + 50) == []
    assert matched(catalogue, DOCUMENT) == 700
    catalogue.set_expiry(listing.document_id, time.time() - 1)
    assert matched(catalogue, DOCUMENT) == 0
    assert catalogue.expire() == [listing.document_id]
    with pytest.raises(CatalogueError, match="is expired; publish it again first"):
        catalogue.set_expiry(listing.document_id, None)
    with pytest.raises(NotFoundError):
        catalogue.set_expiry("kvd_unknown", None)


def test_an_expired_document_can_be_published_again(catalogue):
    """On new terms: the old end is forgotten, and its place in line is a new one."""
    listing = publish(catalogue, DOCUMENT, expires_at_s=time.time() + 500)
    catalogue.expire(now_s=listing.terms.expires_at_s)
    assert publish(catalogue, DOCUMENT).terms.expires_at_s is None
    assert matched(catalogue, DOCUMENT) == 700


def test_a_repair_keeps_the_end_and_the_pin(catalogue):
    """Whoever publishes a damaged document again need not know them."""
    listing = publish(catalogue, DOCUMENT, expires_at_s=time.time() + 500, paid_for=True)
    pinned = catalogue.set_pinned(listing.document_id, pinned=True)
    catalogue.report_damage(listing.chunk_keys[0])
    catalogue.begin(listing_of(DOCUMENT), chunks_of(DOCUMENT))
    catalogue.heal(*listing.chunk_keys)
    assert catalogue.commit(listing.document_id, 1) == pinned


# Pins


def test_a_pin_is_there_until_it_is_taken_off_or_the_listing_goes(catalogue):
    """Known from memory; who is not on offer has none."""
    name = publish(catalogue, DOCUMENT).document_id
    assert not catalogue.index.is_pinned(name)
    assert catalogue.set_pinned(name, pinned=True).pinned
    assert catalogue.index.is_pinned(name)
    assert catalogue.match(NAMESPACE, DOCUMENT).listing.pinned
    assert not catalogue.set_pinned(name, pinned=False).pinned
    assert not catalogue.index.is_pinned(name)
    catalogue.set_pinned(name, pinned=True)
    catalogue.delist(name)
    assert not catalogue.index.is_pinned(name)
    assert not catalogue.get(name).pinned
    assert not catalogue.set_pinned(name, pinned=False).pinned
    with pytest.raises(CatalogueError, match="is delisted; publish it again first"):
        catalogue.set_pinned(name, pinned=True)
    assert not publish(catalogue, DOCUMENT).pinned


def test_setting_what_is_set_changes_nothing(place):
    """Others need not look."""
    with Catalogue.open(place) as catalogue:
        name = publish(catalogue, DOCUMENT, expires_at_s=9e9).document_id
        before = revision(catalogue)
        catalogue.set_pinned(name, pinned=False)
        catalogue.set_expiry(name, 9e9)
        assert revision(catalogue) == before


# Leaving for room


def test_an_evicted_document_can_come_back(catalogue):
    """It matches no more and says why; pinned ones and those that are off stay as they are."""
    listing = publish(catalogue, DOCUMENT)
    name = listing.document_id
    catalogue.set_pinned(name, pinned=True)
    assert catalogue.evict(name, "no room") is False
    assert matched(catalogue, DOCUMENT) == 700
    catalogue.set_pinned(name, pinned=False)
    assert catalogue.evict(name, "no room") is True
    assert catalogue.evict(name, "no room") is False
    assert matched(catalogue, DOCUMENT) == 0
    gone = catalogue.get(name)
    assert (gone.state, gone.reason) == ("evicted", "no room")
    assert publish(catalogue, DOCUMENT) == listing
    with pytest.raises(NotFoundError):
        catalogue.evict("kvd_unknown", "no room")


# Taking over what is stored


def test_a_document_whose_chunks_are_stored_goes_on_offer_at_once(catalogue):
    """With its terms and its size; once more changes nothing."""
    listing = listing_of(DOCUMENT, title="T", stored_bytes=77, expires_at_s=9e9)
    adopted = catalogue.adopt(listing, chunks_of(DOCUMENT))
    assert adopted == dataclasses.replace(listing, state="live")
    assert matched(catalogue, DOCUMENT) == 700
    again = changed(listing, title="another")
    assert catalogue.adopt(again, chunks_of(DOCUMENT)) == adopted


def test_what_was_delisted_here_stays_so_unless_it_is_forced(catalogue):
    """Evicted, expired and failed documents come back by themselves."""
    listing = publish(catalogue, DOCUMENT)
    catalogue.delist(listing.document_id)
    assert catalogue.adopt(listing, chunks_of(DOCUMENT)).state == "delisted"
    assert matched(catalogue, DOCUMENT) == 0
    assert catalogue.adopt(listing, chunks_of(DOCUMENT), force=True).state == "live"
    catalogue.evict(listing.document_id, "no room")
    assert catalogue.adopt(listing, chunks_of(DOCUMENT)).state == "live"
    catalogue.set_expiry(listing.document_id, 1.0)
    catalogue.expire()
    assert catalogue.adopt(listing, chunks_of(DOCUMENT)).state == "live"
    assert matched(catalogue, DOCUMENT) == 700


def test_a_document_that_does_not_fit_or_is_over_is_not_taken(catalogue):
    """Nothing is noted of it."""
    with pytest.raises(CatalogueError, match="not the id"):
        catalogue.adopt(listing_of(tokens(700, seed=1)), chunks_of(DOCUMENT))
    with pytest.raises(CatalogueError, match="time to live is over"):
        catalogue.adopt(listing_of(DOCUMENT, expires_at_s=time.time() - 1), chunks_of(DOCUMENT))
    assert catalogue.listings() == []


def test_taking_over_finds_chunks_that_are_marked_as_damaged(catalogue):
    """Until they are healed, only what lies before them matches."""
    listing = publish(catalogue, DOCUMENT)
    catalogue.report_damage(listing.chunk_keys[1])
    longer = [*DOCUMENT[:512], *tokens(300, seed=1)]
    assert catalogue.adopt(listing_of(longer), chunks_of(longer)).state == "damaged"
    assert matched(catalogue, longer) == 256
    catalogue.heal(listing.chunk_keys[1])
    assert matched(catalogue, longer) == 812


# Publishers that died

BEGIN_AND_WAIT = """
catalogue = Catalogue.open(place)
document = tokens(700)
catalogue.begin(listing_of(document), chunks_of(document))
print("begun", flush=True)
sys.stdin.readline()
os._exit(1)
"""


@pytest.mark.parametrize("was", ["new", "damaged"])
def test_what_a_dead_process_was_publishing_is_given_up(catalogue, path, was):
    """Not while it lives; a document that was on offer before returns to that."""
    listing = listing_of(DOCUMENT)
    if was == "damaged":
        publish(catalogue, DOCUMENT)
        catalogue.report_damage(listing.chunk_keys[2])
    process = start_process(BEGIN_AND_WAIT, path)
    assert heard(process) == "begun"
    mine = tokens(300, seed=1)
    catalogue.begin(listing_of(mine), chunks_of(mine))
    assert catalogue.fail_abandoned() == []
    tell(process, "die")
    ended(process)
    assert catalogue.fail_abandoned() == [listing.document_id]
    found = catalogue.get(listing.document_id)
    expected = ("failed" if was == "new" else "damaged", "its publisher ended")
    assert (found.state, found.reason) == expected
    assert catalogue.get(listing_of(mine).document_id).state == "publishing"
    assert catalogue.fail_abandoned() == []


# The order of first offers


def owner_of(catalogue, request) -> str:
    """The listing that a request's first token belongs to."""
    return catalogue.match(NAMESPACE, request).segments[0].listing.document_id


@pytest.mark.parametrize("leave", ["delist", "evict", "expire", "damage"])
def test_a_publisher_keeps_its_place_when_its_document_comes_back(catalogue, leave):
    """However it left: the tokens that a later document repeats are the first one's again."""
    first = publish(catalogue, DOCUMENT)
    longer = [*DOCUMENT, *tokens(100, seed=5)]
    later = publish(catalogue, longer, publisher="someone else")
    assert owner_of(catalogue, longer) == first.document_id
    if leave == "delist":
        catalogue.delist(first.document_id)
    elif leave == "evict":
        assert catalogue.evict(first.document_id, "no space")
    elif leave == "expire":
        catalogue.set_expiry(first.document_id, 1.0)
        catalogue.expire()
    else:
        catalogue.report_damage(first.chunk_keys[0])
        assert catalogue.match(NAMESPACE, longer) is None
        catalogue.heal(first.chunk_keys[0])
    if leave != "damage":
        assert owner_of(catalogue, longer) == later.document_id
    publish(catalogue, DOCUMENT)
    assert owner_of(catalogue, longer) == first.document_id
    assert catalogue.check_integrity() == []


def test_another_publisher_does_not_inherit_a_place(catalogue):
    """Whoever lists a delisted document of someone else again stands behind what came since."""
    first = publish(catalogue, DOCUMENT)
    longer = [*DOCUMENT, *tokens(100, seed=5)]
    later = publish(catalogue, longer)
    catalogue.delist(first.document_id)
    publish(catalogue, DOCUMENT, publisher="someone else")
    assert owner_of(catalogue, longer) == later.document_id
    assert catalogue.check_integrity() == []


def test_a_place_is_not_lost_to_someone_who_lists_an_evicted_document(catalogue):
    """The first publisher's place waits for it, whatever others did with the document since."""
    first = publish(catalogue, DOCUMENT)
    longer = [*DOCUMENT, *tokens(100, seed=5)]
    publish(catalogue, longer, publisher="another")
    assert catalogue.evict(first.document_id, "no space")
    publish(catalogue, DOCUMENT, publisher="someone else")
    catalogue.delist(first.document_id)
    publish(catalogue, DOCUMENT)
    assert owner_of(catalogue, longer) == first.document_id
    assert catalogue.check_integrity() == []
