"""The catalogue's facts for the store: uses, chunks that may be deleted, audits."""

from __future__ import annotations

import math
import threading
import time

import pytest

from tests.support.catalogue_documents import (
    chunks_of,
    ended,
    listing_of,
    publish,
    revision,
    start_process,
    tokens,
)
from vllm_kvmarket.catalogue import Audit, Catalogue, Use, eviction_policy, queries
from vllm_kvmarket.catalogue.eviction_policy import HALF_LIFE_S
from vllm_kvmarket.core.errors import NotFoundError

DOCUMENT = tokens(700)
NOW_S = 1_000_000.0


# Uses


def test_uses_add_up_and_fade(catalogue):
    """Counts are exact; publishing and whole reuses count one each, half of it a day later."""
    name = publish(catalogue, DOCUMENT, created_at_s=NOW_S).document_id
    fresh = catalogue.usage_of(name)
    assert (fresh.uses, fresh.score, fresh.last_used_s) == (0, 1.0, NOW_S)
    later_s = NOW_S + HALF_LIFE_S
    catalogue.note_uses([Use(name, 700, 30, NOW_S), Use(name, 700, 12, later_s)])
    usage = catalogue.usage_of(name)
    assert (usage.uses, usage.tokens_reused, usage.earned_nano) == (2, 1400, 42)
    assert usage.last_used_s == later_s
    assert usage.score == pytest.approx(1 + (1 + 1) / 2)
    catalogue.note_uses([Use(name, 0, 0, NOW_S)])
    assert catalogue.usage_of(name).score == pytest.approx(2.0)


def test_a_part_counts_as_what_it_spares(catalogue):
    """Half of a long document is less than half of the work."""
    name = publish(catalogue, tokens(20_000), created_at_s=NOW_S).document_id
    catalogue.note_uses([Use(name, 10_000, 0, NOW_S)])
    assert 1.35 < catalogue.usage_of(name).score < 1.45


def test_the_order_of_uses_does_not_matter(catalogue):
    """Engines write theirs whenever they get to it."""
    uses = [(700, 5.0), (300, 90_000.0), (700, 50_000.0)]
    scores = []
    for seed, order in enumerate(([0, 1, 2], [2, 1, 0], [1, 0, 2])):
        name = publish(catalogue, tokens(700, seed), created_at_s=0.0).document_id
        for index in order:
            count, at_s = uses[index]
            catalogue.note_uses([Use(name, count, 1, at_s)])
        usage = catalogue.usage_of(name)
        assert usage.last_used_s == 90_000.0
        scores.append(usage.score)
    assert scores == pytest.approx([scores[0]] * 3)


def test_uses_change_no_listing(place):
    """Other processes need not look; those of unknown documents are ignored."""
    with Catalogue.open(place) as catalogue:
        listing = publish(catalogue, DOCUMENT)
        before = revision(catalogue)
        catalogue.note_uses([Use(listing.document_id, 1, 1, 1.0), Use("kvd_unknown", 1, 1, 1.0)])
        catalogue.note_uses([])
        assert revision(catalogue) == before
        assert catalogue.get(listing.document_id) == listing
        with pytest.raises(NotFoundError):
            catalogue.usage_of("kvd_unknown")


def test_publishing_again_counts_as_a_use(catalogue):
    """Or what was just stored again would be the first to go."""
    name = publish(catalogue, DOCUMENT, created_at_s=NOW_S).document_id
    catalogue.note_uses([Use(name, 700, 9, NOW_S)])
    catalogue.delist(name)
    again_s = NOW_S + HALF_LIFE_S
    publish(catalogue, DOCUMENT, created_at_s=again_s)
    usage = catalogue.usage_of(name)
    assert (usage.uses, usage.earned_nano, usage.last_used_s) == (1, 9, again_s)
    assert usage.score == pytest.approx(2 / 2 + 1)


def test_what_went_comes_back_with_its_history(catalogue):
    """Also one that was never used since it was published: it is asked for a second time."""
    name = publish(catalogue, DOCUMENT, created_at_s=NOW_S).document_id
    assert catalogue.evict(name, "room")
    again_s = NOW_S + HALF_LIFE_S
    publish(catalogue, DOCUMENT, created_at_s=again_s)
    (candidate,) = catalogue.candidates()
    assert (candidate.first_used_s, candidate.last_used_s) == (NOW_S, again_s)
    assert candidate.score == pytest.approx(1 / 2 + 1)


# Candidates


def test_a_candidate_is_what_can_go(catalogue):
    """Documents on offer, with their estimated bytes, shared ones counted separately."""
    stem = tokens(512)
    one = publish(catalogue, [*stem, *tokens(256, seed=1)], created_at_s=NOW_S)
    two = publish(catalogue, [*stem, *tokens(100, seed=2)], created_at_s=NOW_S, paid_for=True)
    gone = publish(catalogue, tokens(300, seed=3))
    catalogue.delist(gone.document_id)
    catalogue.set_pinned(one.document_id, pinned=True)
    catalogue.note_uses([Use(one.document_id, 768, 50, NOW_S)])
    found = {candidate.document_id: candidate for candidate in catalogue.candidates()}
    assert list(found) == sorted([one.document_id, two.document_id])
    first, second = found[one.document_id], found[two.document_id]
    # publish() notes 1,000 bytes for every document; any of those that wrote most gives the rate.
    guesses = [(round(256 * rate), round(100 * rate)) for rate in (1000 / 768, 1000 / 612, 10 / 3)]
    assert (first.bytes, second.bytes) in guesses
    assert [key for key, _ in first.shared] == list(one.chunk_keys[:2])
    assert first.shared == second.shared
    assert (first.pinned, first.paid_for, first.uses, first.earned_nano) == (True, False, 1, 50)
    assert (second.pinned, second.paid_for, second.uses, second.tokens) == (False, True, 0, 612)
    assert first.score == pytest.approx(2.0)


def test_what_is_being_published_frees_nothing(catalogue):
    """Chunks that a document on its way needs stay when the one that had them first goes."""
    document = tokens(600)
    longer = [*document[:512], *tokens(50, seed=1)]
    publish(catalogue, document)
    catalogue.begin(listing_of(longer), chunks_of(longer))
    (candidate,) = catalogue.candidates()
    assert candidate.shared == ()
    assert candidate.bytes == round(1000 * 88 / 600)


# Releasing


def test_only_chunks_that_nobody_needs_are_released(catalogue):
    """Those on offer, damaged or on their way stay."""
    live = publish(catalogue, tokens(300, seed=1))
    begun = catalogue.begin(listing_of(tokens(300, seed=2)), chunks_of(tokens(300, seed=2)))
    gone = publish(catalogue, tokens(300, seed=3))
    catalogue.delist(gone.document_id)
    catalogue.report_damage(live.chunk_keys[0])
    deleted: list[bytes] = []
    keys = [*live.chunk_keys, *begun.chunk_keys, *gone.chunk_keys, b"?" * 32]
    assert catalogue.leftovers.release(keys * 20, deleted.extend) == 3
    assert set(deleted) == {*gone.chunk_keys, b"?" * 32}


def test_many_chunks_are_asked_for_at_once(catalogue, monkeypatch):
    """With the same answer."""
    live = publish(catalogue, tokens(300, seed=1))
    begun = catalogue.begin(listing_of(tokens(300, seed=2)), chunks_of(tokens(300, seed=2)))
    gone = publish(catalogue, tokens(300, seed=3))
    catalogue.delist(gone.document_id)
    keys = [*live.chunk_keys, *begun.chunk_keys, *gone.chunk_keys, b"?" * 32]
    for at_once in (1, 2, 1000):
        monkeypatch.setattr(queries, "_ASKED_AT_ONCE", at_once)
        assert catalogue.needed_chunks(keys) == {*live.chunk_keys, *begun.chunk_keys}
        assert catalogue.needed_chunks(keys[:1]) == {keys[0]}


def test_damage_of_released_chunks_is_no_news(catalogue):
    """A missing chunk that no listing holds marks nothing."""
    gone = publish(catalogue, DOCUMENT)
    catalogue.evict(gone.document_id, "no room")
    catalogue.report_damage(gone.chunk_keys[0])
    assert publish(catalogue, DOCUMENT).state == "live"


def test_a_publisher_begins_before_a_release_or_after_it(catalogue, place):
    """Never within: what is being deleted cannot become needed meanwhile."""
    gone = publish(catalogue, DOCUMENT)
    catalogue.delist(gone.document_id)
    events: list[str] = []
    started = threading.Event()

    def delete(keys: list[bytes]) -> None:
        started.set()
        time.sleep(0.05)
        events.extend("deleted" for _ in keys)

    def begin() -> None:
        started.wait()
        with Catalogue.open(place) as other:
            other.begin(listing_of(DOCUMENT), chunks_of(DOCUMENT))
            events.append("begun")
            time.sleep(0.2)

    thread = threading.Thread(target=begin)
    thread.start()
    assert catalogue.leftovers.release(gone.chunk_keys, delete) == 3
    thread.join()
    assert events == ["deleted"] * 3 + ["begun"]


def test_an_error_while_deleting_is_raised_on(catalogue):
    """And the database is usable afterwards."""
    with pytest.raises(OSError, match="disk"):
        catalogue.leftovers.release(
            [b"?" * 32], lambda _: exec("raise OSError('the disk is gone')")
        )
    publish(catalogue, DOCUMENT)


def test_releasing_beside_publishers_loses_nothing(path):
    """Processes publish and delist while one collects: no document on offer misses a chunk."""
    script = """
import random
from vllm_kvmarket.core.errors import CatalogueError, NotFoundError
random.seed(int(sys.argv[2]))
folder = home.parent / "chunks"
with Catalogue.open(place) as catalogue:
    for _ in range(40):
        document = tokens(700, random.randrange(4))[: random.choice([300, 600, 700])]
        listing = listing_of(document)
        catalogue.begin(listing, chunks_of(document))
        for key in listing.chunk_keys:
            (folder / key.hex()).touch()
        try:
            catalogue.commit(listing.document_id, 1)
        except CatalogueError as error:
            assert "is delisted" in str(error) or "any more" in str(error)
            continue
        missing = [key for key in listing.chunk_keys if not (folder / key.hex()).exists()]
        if missing and catalogue.get(listing.document_id).state == "live":
            print("missing", flush=True)
            os._exit(1)
        try:
            catalogue.delist(listing.document_id)
        except NotFoundError as error:
            assert "delisted already" in str(error)
"""
    folder = path.parent / "chunks"
    folder.mkdir(parents=True)
    with Catalogue.open(path) as catalogue:
        processes = [start_process(script, path, number) for number in range(2)]
        released = 0
        while any(process.poll() is None for process in processes):
            keys = [bytes.fromhex(file.name) for file in folder.iterdir()]
            released += catalogue.leftovers.release(
                keys, lambda keys: [(folder / key.hex()).unlink(missing_ok=True) for key in keys]
            )
        assert [ended(process) for process in processes] == [0, 0]
        assert released > 0
        assert catalogue.check_integrity() == []


# Audits


def test_audits_are_kept_with_their_listing(catalogue):
    """Newest first; a difference that is no number counts as the largest there is."""
    name = publish(catalogue, DOCUMENT).document_id
    first = Audit(name, 1.0, "engine", 3, "exact")
    second = Audit(name, 2.0, "engine", 2, "different", math.nan, "chunk 1: layer 0")
    catalogue.record_audit(first)
    catalogue.record_audit(second)
    newest, oldest = catalogue.audits_of(name)
    assert oldest == first
    assert (newest.result, newest.worst_difference, newest.detail) == (
        "different",
        math.inf,
        "chunk 1: layer 0",
    )
    assert catalogue.audits_of("kvd_unknown") == []
    with pytest.raises(NotFoundError):
        catalogue.record_audit(Audit("kvd_unknown", 1.0, "engine", 3, "exact"))


def test_candidates_of_many_documents_are_found_quickly(catalogue):
    """Making room must not hold a publisher up."""
    for seed in range(60):
        publish(catalogue, tokens(256 * 20, seed % 30)[: 256 * 20 - seed // 30])
    started = time.perf_counter()
    candidates = catalogue.candidates()
    order = eviction_policy.order(candidates, "value", time.time())
    assert len(order) == 60
    assert time.perf_counter() - started < 2
