"""What documents leave behind: files that are deleted outside transactions, and tokens that go."""

from __future__ import annotations

import contextlib
import threading
import time

import apsw
import pytest

from tests.support.catalogue_documents import (
    chunks_of,
    ended,
    heard,
    listing_of,
    publish,
    start_process,
    tell,
    tokens,
)
from vllm_kvmarket.catalogue import Catalogue, Use
from vllm_kvmarket.catalogue import leftovers as module
from vllm_kvmarket.core.errors import (
    CatalogueRefusedError,
    CatalogueUnavailableError,
    NotFoundError,
)
from vllm_kvmarket.core.model_identity import pack_tokens
from vllm_kvmarket.core.stored_share import StoredShare

DOCUMENT = tokens(600)


def test_nobody_waits_for_files_that_are_deleted(catalogue, place):
    """Another process writes meanwhile; only a publisher of those very chunks waits."""
    gone = publish(catalogue, DOCUMENT)
    catalogue.delist(gone.document_id)
    begun, may_end = threading.Event(), threading.Event()

    def delete(_keys: list[bytes]) -> None:
        begun.set()
        assert may_end.wait(30)

    releasing = threading.Thread(target=catalogue.leftovers.release, args=(gone.chunk_keys, delete))
    releasing.start()
    assert begun.wait(30)
    waited = threading.Event()
    with Catalogue.open(place) as other:
        other.note_uses([Use(gone.document_id, 600, 1, time.time())])
        catalogue.note_uses([Use(gone.document_id, 600, 1, time.time())])
        assert publish(other, tokens(600, seed=1)).state == "live"

        def republish() -> None:
            publish(other, DOCUMENT)
            waited.set()

        publishing = threading.Thread(target=republish)
        publishing.start()
        assert not waited.wait(0.3), "its chunks are still being deleted"
        may_end.set()
        releasing.join()
        publishing.join()
    assert catalogue.get(gone.document_id).state == "live"


def test_a_publisher_does_not_wait_for_ever(catalogue, monkeypatch):
    """A store that hangs is an error that says so."""
    gone = publish(catalogue, DOCUMENT)
    catalogue.delist(gone.document_id)
    monkeypatch.setattr(module, "_PATIENCE_S", 0.05)
    refused: list[Exception] = []

    def delete(_keys: list[bytes]) -> None:
        with pytest.raises(CatalogueUnavailableError, match="being deleted; try again") as error:
            catalogue.begin(listing_of(DOCUMENT), chunks_of(DOCUMENT))
        refused.append(error.value)

    catalogue.leftovers.release(gone.chunk_keys[:1], delete)
    assert len(refused) == 1


DIE_WHILE_DELETING = """
catalogue = Catalogue.open(place)
listing = publish(catalogue, tokens(600))
catalogue.delist(listing.document_id)

def delete(keys):
    print("deleting", flush=True)
    sys.stdin.readline()
    os._exit(1)

catalogue.leftovers.release(listing.chunk_keys, delete)
"""


def test_the_marks_of_a_process_that_died_mean_nothing(catalogue, path):
    """Its document can be published at once."""
    process = start_process(DIE_WHILE_DELETING, path)
    assert heard(process) == "deleting"
    tell(process)
    ended(process)
    started_s = time.monotonic()
    assert publish(catalogue, DOCUMENT).state == "live"
    assert time.monotonic() - started_s < module._PATIENCE_S / 2
    left = apsw.Connection(str(path)).execute("SELECT count(*) FROM releasing").fetchall()
    assert left == [(0,)]


def test_two_that_delete_the_same_chunks_do_not_free_them_for_each_other(catalogue, place):
    """The second leaves them to the first: a publisher would write what it still deletes."""
    gone = publish(catalogue, DOCUMENT)
    catalogue.delist(gone.document_id)
    deleted: list[bytes] = []
    with Catalogue.open(place) as other:

        def delete(keys: list[bytes]) -> None:
            assert other.leftovers.release(gone.chunk_keys, pytest.fail) == 0
            deleted.extend(keys)

        assert catalogue.leftovers.release(gone.chunk_keys, delete) == len(gone.chunk_keys)
        assert deleted == list(gone.chunk_keys)
        assert publish(other, DOCUMENT).state == "live"


def test_who_deletes_after_a_process_that_died_is_waited_for(catalogue, path, monkeypatch):
    """The dead one's marks are replaced, so that nobody publishes what is being deleted."""
    monkeypatch.setattr(module, "_PATIENCE_S", 0.05)
    process = start_process(DIE_WHILE_DELETING, path)
    assert heard(process) == "deleting"
    tell(process)
    ended(process)
    keys = chunks_of(DOCUMENT).keys
    begun: list[bytes] = []
    with Catalogue.open(path) as other:

        def delete(keys: list[bytes]) -> None:
            with pytest.raises(CatalogueUnavailableError, match="still being deleted"):
                publish(other, DOCUMENT)
            begun.extend(keys)

        assert catalogue.leftovers.release(keys, delete) == len(begun) > 0
        assert publish(other, DOCUMENT).state == "live"


def test_a_deletion_that_was_interrupted_is_continued(catalogue, path):
    """By the next process that deletes: the marks say which chunks may be gone already."""
    process = start_process(DIE_WHILE_DELETING, path)
    assert heard(process) == "deleting"
    tell(process)
    ended(process)
    keys = list(chunks_of(DOCUMENT).keys)
    assert sorted(catalogue.leftovers.interrupted()) == sorted(keys)
    deleted: list[bytes] = []
    assert catalogue.leftovers.release(catalogue.leftovers.interrupted(), deleted.extend) == 3
    assert sorted(deleted) == sorted(keys)
    assert catalogue.leftovers.interrupted() == []


def test_what_was_published_while_it_was_deleted_is_damaged(catalogue, place, path):
    """The deleting process looked dead, and was not: its last request may have come too late."""
    gone, kept = publish(catalogue, DOCUMENT), publish(catalogue, tokens(300, seed=1))
    catalogue.delist(gone.document_id)
    with Catalogue.open(place) as other:

        def delete(_keys: list[bytes]) -> None:
            with contextlib.closing(apsw.Connection(str(path))) as db:
                db.execute("DELETE FROM releasing")
            assert publish(other, DOCUMENT).state == "live"

        catalogue.leftovers.release(gone.chunk_keys, delete)
        assert other.get(gone.document_id).state == "damaged"
        other.heal(*gone.chunk_keys)
    assert catalogue.get(gone.document_id).state == "live"
    assert catalogue.get(kept.document_id).state == "live"


def test_what_is_recorded_and_not_needed_is_found_without_looking_at_files(catalogue):
    """Chunks of which nothing is recorded, and those that another document needs, are none."""
    gone, kept = publish(catalogue, DOCUMENT), publish(catalogue, DOCUMENT[:300])
    unknown = publish(catalogue, tokens(300, seed=1))
    for listing in (gone, kept):
        catalogue.shares.note(
            [
                StoredShare(key, 0, 1, form, 1, bytes(8))
                for key in listing.chunk_keys
                for form in "ab"
            ]
        )
    for listing in (gone, unknown):
        catalogue.delist(listing.document_id)
    unneeded = catalogue.leftovers.unneeded()
    assert sorted(unneeded) == sorted(set(gone.chunk_keys) - set(kept.chunk_keys))
    assert catalogue.leftovers.release(unneeded, lambda _: None) == 2
    assert catalogue.leftovers.unneeded() == []


def test_documents_that_left_are_found_without_looking_at_files(catalogue):
    """Each once; one that was published again is none."""
    leaves = {
        "delisted": catalogue.delist,
        "evicted": lambda name: catalogue.evict(name, "no space"),
        "expired": lambda name: catalogue.set_expiry(name, 1.0),
    }
    names = {}
    for seed, (state, leave) in enumerate(leaves.items()):
        names[state] = publish(catalogue, tokens(600, seed)).document_id
        leave(names[state])
    catalogue.expire()
    failed = catalogue.begin(listing_of(tokens(600, 7)), chunks_of(tokens(600, 7)))
    catalogue.fail(failed.document_id, "the store is full")
    publish(catalogue, tokens(600, 8))
    assert publish(catalogue, tokens(600, 0)).document_id == names["delisted"]
    found = catalogue.leftovers.documents()
    assert sorted(found) == sorted([names["evicted"], names["expired"], failed.document_id])
    assert catalogue.leftovers.documents() == []
    catalogue.delist(names["delisted"])
    assert catalogue.leftovers.documents() == [names["delisted"]]
    assert len(catalogue.leftovers.keys_of(found)) == 9


# Tokens


def test_the_tokens_of_a_delisted_document_leave_the_database(catalogue, place):
    """What another document needs stays; the listing stays, and can be published again."""
    shared = DOCUMENT[:512]
    gone = publish(catalogue, DOCUMENT, title="kept")
    kept = publish(catalogue, [*shared, 1, 2, 3])
    with pytest.raises(CatalogueRefusedError, match="is live; delist it first"):
        catalogue.leftovers.purge([gone.document_id], lambda _: None)
    catalogue.delist(gone.document_id)
    deleted: list[bytes] = []
    assert catalogue.leftovers.purge([gone.document_id], deleted.extend) == 1
    assert deleted == [gone.chunk_keys[-1]]
    assert catalogue.leftovers.purge([gone.document_id], deleted.extend) == 0
    with pytest.raises(NotFoundError, match="were removed; publish its text again"):
        catalogue.tokens_of(gone.document_id)
    assert catalogue.get(gone.document_id).terms.title == "kept"
    assert catalogue.tokens_of(kept.document_id)[:512] == shared
    assert publish(catalogue, DOCUMENT).state == "live"
    assert catalogue.tokens_of(gone.document_id) == DOCUMENT


def test_tokens_that_were_removed_are_not_in_the_file(path):
    """They are overwritten, not only unlinked."""
    kept, gone = tokens(600), tokens(256 * 20, seed=1)
    with Catalogue.open(path) as catalogue:
        publish(catalogue, kept)
        listing = publish(catalogue, gone)
        catalogue.delist(listing.document_id)
        catalogue.leftovers.purge([listing.document_id], lambda _: None)
    content = path.read_bytes()
    assert not path.with_name("market.sqlite-wal").exists()
    assert pack_tokens(kept[:256]) in content
    left = [start for start in range(0, len(gone), 16) if _packed(gone, start) in content]
    assert left == []


def _packed(token_ids: list[int], start: int) -> bytes:
    return pack_tokens(token_ids[start : start + 16])


def test_only_what_left_long_ago_is_overdue(catalogue):
    """Evicted documents stay: they can be computed again from their tokens."""
    old, evicted, live = (publish(catalogue, tokens(600, seed)).document_id for seed in range(3))
    before_s = time.time()
    catalogue.delist(old)
    catalogue.evict(evicted, "no space")
    assert catalogue.leftovers.overdue(before_s) == []
    assert catalogue.leftovers.overdue(time.time() + 1) == [old]
    catalogue.leftovers.purge([old], lambda _: None)
    assert catalogue.leftovers.overdue(time.time() + 1) == []
    assert catalogue.get(live).state == "live"
    with pytest.raises(NotFoundError, match="there is no document"):
        catalogue.leftovers.purge(["kvd_none"], lambda _: None)
