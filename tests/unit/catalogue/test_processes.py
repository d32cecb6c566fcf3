"""Several processes and threads on one catalogue see the same listings, whole, and soon."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.catalogue_documents import (
    NAMESPACE,
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
from tests.support.catalogue_machine import CatalogueMachine
from vllm_kvmarket.catalogue import Catalogue, queries
from vllm_kvmarket.core.errors import CatalogueError

DOCUMENT = tokens(700)
SEEN_WITHIN_S = 1.0


def seconds_until(condition: Callable[[], bool], at_most_s: float = 10.0) -> float:
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > at_most_s:
            pytest.fail(f"it did not happen within {at_most_s} s")
        time.sleep(0.005)
    return time.monotonic() - started


# Other processes

CHANGE_ON_COMMAND = """
with Catalogue.open(place) as catalogue:
    document = tokens(700)
    listing = listing_of(document)
    print("ready", flush=True)
    for command in sys.stdin:
        match command.strip():
            case "publish": publish(catalogue, document)
            case "damage": catalogue.report_damage(listing.chunk_keys[1])
            case "heal": catalogue.heal(listing.chunk_keys[1])
            case "delist": catalogue.delist(listing.document_id)
        print("done", flush=True)
"""


def test_what_another_process_changes_is_seen_within_a_second(place):
    """Its listings, delistings, damage and healing reach a watching process unasked."""
    expected = {"publish": 700, "damage": 256, "heal": 700, "delist": 0}
    with Catalogue.open(place) as catalogue:
        catalogue.watch()
        process = start_process(CHANGE_ON_COMMAND, place)
        assert heard(process) == "ready"
        for command, count in expected.items():
            tell(process, command)
            assert heard(process) == "done"
            took_s = seconds_until(lambda count=count: matched(catalogue, DOCUMENT) == count)
            assert took_s < SEEN_WITHIN_S, command
        assert ended(process) == 0
        assert catalogue.check_integrity() == []


READ_UNTIL_TOLD = """
import threading
stopping = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), stopping.set()), daemon=True).start()
documents = [tokens(2000, seed) for seed in range(30)]
halves = seen = 0
with Catalogue.open(place) as catalogue:
    print("ready", flush=True)
    last = False
    while not last:
        last = stopping.is_set()
        catalogue.refresh()
        for document in documents:
            match = catalogue.match(NAMESPACE, document)
            seen = max(seen, len(catalogue.listings("live")))
            if match is not None and match.token_count != 2000:
                halves += 1
        for listing in catalogue.listings():
            count = len(catalogue.tokens_of(listing.document_id))
            halves += (len(listing.chunk_keys), count) != (8, 2000)
        halves += len(catalogue.check_integrity())
print(halves, seen, flush=True)
"""


def test_another_process_never_sees_half_a_listing(place):
    """A listing appears whole or not at all, to matching and to reading, while it is written."""
    with Catalogue.open(place) as catalogue:
        process = start_process(READ_UNTIL_TOLD, place)
        assert heard(process) == "ready"
        for seed in range(30):
            publish(catalogue, tokens(2000, seed))
        tell(process, "last round")
        assert heard(process) == "0 30"
        assert ended(process) == 0


def test_several_processes_may_publish_at_once(place):
    """Each one's listings are there in the end, and each has its own place in line."""
    script = """
with Catalogue.open(place) as catalogue:
    for index in range(15):
        publish(catalogue, [*tokens(300), int(sys.argv[2]), index])
"""
    processes = [start_process(script, place, number) for number in range(3)]
    assert [ended(process) for process in processes] == [0, 0, 0]
    with Catalogue.open(place) as catalogue:
        assert len(catalogue.listings("live")) == 45
        assert catalogue.check_integrity() == []
        for number in range(3):
            assert matched(catalogue, [*tokens(300), number, 14]) == 302


# Refreshing


def test_refreshing_takes_over_what_others_have_changed(place):
    """Some changes at once or one."""
    with Catalogue.open(place) as mine, Catalogue.open(place) as theirs:
        listing = publish(theirs, DOCUMENT)
        mine.refresh()
        assert matched(mine, DOCUMENT) == 700
        theirs.report_damage(listing.chunk_keys[2])
        theirs.report_damage(listing.chunk_keys[1])
        mine.refresh()
        assert matched(mine, DOCUMENT) == 256


def test_what_a_process_does_itself_matches_at_once(place):
    """No refresh is needed after one's own commit and delisting."""
    with Catalogue.open(place) as catalogue:
        listing = publish(catalogue, DOCUMENT)
        assert matched(catalogue, DOCUMENT) == 700
        catalogue.delist(listing.document_id)
        assert matched(catalogue, DOCUMENT) == 0


@pytest.mark.slow
def test_matching_goes_on_while_listings_come_and_go(place):
    """A thread that matches all the time gets whole answers, and those of others stay."""
    stem = tokens(600)
    wrong: list[object] = []
    stop = threading.Event()
    rounds = 0

    def match_all_the_time(catalogue: Catalogue) -> None:
        nonlocal rounds
        while not stop.is_set():
            match = catalogue.match(NAMESPACE, [*stem, 1, 2, 3])
            rounds += 1
            if (
                match.token_count not in (600, 602)
                or sum(chunk.matched for chunk in match.chunks) != match.token_count
            ):
                wrong.append(match)

    with Catalogue.open(place) as matching, Catalogue.open(place) as writing:
        publish(writing, stem)
        matching.watch(interval_s=0.001)
        seconds_until(lambda: matched(matching, stem) == 600)
        thread = threading.Thread(target=match_all_the_time, args=(matching,))
        thread.start()
        for _ in range(60):
            writing.delist(publish(writing, [*stem, 1, 2]).document_id)
        stop.set()
        thread.join()
    assert wrong == []
    assert rounds > 60


# A watcher that meets errors


def test_a_database_that_is_gone_is_reported_and_watched_for(path, caplog):
    """Listings already read still match, the error is visible, and all is well once it is back."""
    with Catalogue.open(path) as catalogue:
        listing = publish(catalogue, DOCUMENT)
        catalogue.watch(interval_s=0.01)
        away = path.with_name("away.sqlite")
        path.rename(away)
        seconds_until(lambda: catalogue.last_error is not None)
        assert isinstance(catalogue.last_error, CatalogueError)
        assert "is gone" in str(catalogue.last_error)
        assert matched(catalogue, DOCUMENT) == 700
        with pytest.raises(CatalogueError, match="is gone"):
            catalogue.delist(listing.document_id)
        with pytest.raises(CatalogueError, match="is gone"):
            catalogue.get(listing.document_id)
        time.sleep(0.1)
        away.rename(path)
        seconds_until(lambda: catalogue.last_error is None)
        catalogue.delist(listing.document_id)
        assert matched(catalogue, DOCUMENT) == 0
    assert caplog.text.count("the catalogue is not up to date") == 1


def test_a_database_that_was_replaced_is_not_written_to(path):
    """Another file under the name: neither read from the deleted one nor written into it."""
    with Catalogue.open(path) as catalogue:
        publish(catalogue, DOCUMENT)
        path.rename(path.with_name("old.sqlite"))
        path.touch()
        with pytest.raises(CatalogueError, match="was replaced; restart"):
            catalogue.refresh()
        with pytest.raises(CatalogueError, match="was replaced; restart"):
            catalogue.begin(listing_of(tokens(10)), chunks_of(tokens(10)))
        assert path.stat().st_size == 0


def test_the_watcher_survives_any_error(place, monkeypatch):
    """Even one that nobody thought of is kept, and the next round tries again."""
    with Catalogue.open(place) as catalogue, Catalogue.open(place) as other:
        catalogue.watch(interval_s=0.01)
        with monkeypatch.context() as patch:
            patch.setattr(queries, "revision", lambda _: 1 / 0)
            publish(other, DOCUMENT)
            assert isinstance(other.last_error, ZeroDivisionError)
            seconds_until(lambda: catalogue.last_error is not None)
        seconds_until(lambda: matched(catalogue, DOCUMENT) == 700)
        seconds_until(lambda: catalogue.last_error is None)


def test_closing_ends_the_watcher(place):
    """Watching twice is watching once, and no thread outlives its catalogue."""
    before = threading.active_count()
    catalogue = Catalogue.open(place)
    catalogue.watch(interval_s=60)
    catalogue.watch()
    assert threading.active_count() == before + 1
    catalogue.close()
    assert threading.active_count() == before


# Against a naive model


class OneStorage(CatalogueMachine):
    """Two machines on one SQLite file; beside PostgreSQL it runs in tests/servers."""

    def open_places(self) -> list[Path | str]:
        self.folder = tempfile.TemporaryDirectory()
        return [Path(self.folder.name) / "market.sqlite"]

    def teardown(self) -> None:
        super().teardown()
        self.folder.cleanup()


TestOneStorage = OneStorage.TestCase
TestOneStorage.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
