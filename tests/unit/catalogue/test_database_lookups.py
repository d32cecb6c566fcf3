"""Matching in the database beside everything else: its tables, its failures, its end, its pins."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import apsw
import pytest

from tests.support.catalogue_documents import NAMESPACE, publish, tokens
from vllm_kvmarket.catalogue import Catalogue, database_match, queries
from vllm_kvmarket.core.errors import CatalogueError
from vllm_kvmarket.market.market import Market

DOCUMENT = tokens(700)
TABLES = "SELECT name FROM sqlite_schema WHERE name IN ('offered', 'continuation', 'followed')"


def count_of(path: Path, statement: str) -> int:
    raw = apsw.Connection(str(path))
    found = len(raw.execute(statement).fetchall())
    raw.close()
    return found


def lookup_threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("kvmarket-match")]


def test_without_the_key_there_are_no_tables_and_no_threads(path):
    """Everything is in memory, and the answer is there at once."""
    with Catalogue.open(path) as catalogue:
        publish(catalogue, DOCUMENT)
        assert not catalogue.index.is_beyond_memory
        future = catalogue.match_later(NAMESPACE, DOCUMENT)
        assert future.done()
        assert future.result() == catalogue.match(NAMESPACE, DOCUMENT)
        assert catalogue.match_anywhere(NAMESPACE, DOCUMENT).token_count == 700
        assert lookup_threads() == []
    assert count_of(path, TABLES) == 0


def test_the_tables_are_made_for_what_is_there_and_every_writer_updates_them(path):
    """Once; also by a process that keeps everything in memory, and has no use for them."""
    with Catalogue.open(path) as plain:
        first = publish(plain, DOCUMENT)
        damaged = publish(plain, other := tokens(700, 1))
        plain.report_damage(damaged.chunk_keys[1])
        for _ in range(2):
            with Catalogue.open(path, chunks_in_memory=0) as catalogue:
                assert catalogue.check_integrity() == []
                assert catalogue.match_anywhere(NAMESPACE, DOCUMENT).listing == first
                assert catalogue.match_anywhere(NAMESPACE, other).token_count == 256
        publish(plain, third := tokens(700, 2))
        plain.delist(first.document_id)
        plain.heal(damaged.chunk_keys[1])
        with Catalogue.open(path, chunks_in_memory=0) as catalogue:
            assert catalogue.check_integrity() == []
            assert catalogue.match_anywhere(NAMESPACE, DOCUMENT) is None
            assert catalogue.match_anywhere(NAMESPACE, other).token_count == 700
            assert catalogue.match_anywhere(NAMESPACE, third).token_count == 700
    assert count_of(path, TABLES) == 3


def test_rows_that_are_missing_are_found(path):
    """The integrity check compares what the database matches with what is on offer."""
    with Catalogue.open(path, chunks_in_memory=0) as catalogue:
        name = publish(catalogue, DOCUMENT).document_id
        for table in ("continuation", "offered"):
            raw = apsw.Connection(str(path))
            raw.execute(f"DELETE FROM {table}")
            raw.close()
            assert catalogue.check_integrity() == [
                f"{name}: what the database matches of it is something else"
            ]


def test_a_database_that_cannot_be_read_is_said_once(path, caplog):
    """Waiting for it gives memory's answer; the future holds the error."""
    with Catalogue.open(path, chunks_in_memory=3) as catalogue:
        publish(catalogue, DOCUMENT)
        publish(catalogue, other := tokens(700, 1))
        aside = path.with_name("aside")
        path.rename(aside)
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                with pytest.raises(CatalogueError, match="is gone"):
                    catalogue.match_later(NAMESPACE, other).result()
            assert catalogue.match_anywhere(NAMESPACE, other) is None
            assert catalogue.match_anywhere(NAMESPACE, [*DOCUMENT, 1]).token_count == 700
        assert [one.getMessage().count("not matched") for one in caplog.records] == [1]
        aside.rename(path)
        assert catalogue.match_anywhere(NAMESPACE, other).token_count == 700


def test_writers_do_not_hold_up_who_matches(path):
    """Readers see what was committed last."""
    with Catalogue.open(path, chunks_in_memory=0) as catalogue:
        publish(catalogue, DOCUMENT)
        other = apsw.Connection(str(path))
        other.execute("BEGIN EXCLUSIVE")
        assert catalogue.match_anywhere(NAMESPACE, DOCUMENT).token_count == 700
        other.close()


def test_closing_ends_what_waits_and_leaves_nothing_open(path, monkeypatch):
    """A running match is finished; threads and descriptors go."""
    Catalogue.open(path).close()
    before = len(list(Path("/proc/self/fd").iterdir()))
    catalogue = Catalogue.open(path, chunks_in_memory=0)
    publish(catalogue, DOCUMENT)
    go = threading.Event()
    match = database_match.match
    monkeypatch.setattr(database_match, "match", lambda *asked: go.wait(10) and match(*asked))
    futures = [catalogue.match_later(NAMESPACE, DOCUMENT) for _ in range(5)]
    assert not futures[0].done()
    while not futures[1].running():
        time.sleep(0.001)
    threading.Timer(0.05, go.set).start()
    catalogue.close()
    assert [future.cancelled() for future in futures] == [False, False, True, True, True]
    assert futures[0].result().token_count == 700
    assert lookup_threads() == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_what_ends_beyond_memory_is_written_down(path):
    """Nobody is sold it from that moment; the watcher tells the database."""
    with Catalogue.open(path, chunks_in_memory=0) as catalogue:
        name = publish(catalogue, DOCUMENT, expires_at_s=time.time() + 0.2).document_id
        assert catalogue.match_anywhere(NAMESPACE, DOCUMENT).token_count == 700
        catalogue.watch(0.01)
        deadline = time.monotonic() + 10
        while catalogue.get(name).state != "expired":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert catalogue.match_anywhere(NAMESPACE, DOCUMENT) is None
        assert catalogue.check_integrity() == []


def test_a_document_beyond_memory_can_be_pinned(path):
    """Whether it is, is asked in every step: memory knows."""
    with Catalogue.open(path, chunks_in_memory=0) as catalogue:
        name = publish(catalogue, DOCUMENT).document_id
        assert not catalogue.index.is_pinned(name)
        catalogue.set_pinned(name, pinned=True)
        assert catalogue.index.is_pinned(name)
        catalogue.delist(name)
        assert not catalogue.index.is_pinned(name)


def test_a_healed_document_that_has_grown_out_of_memory_is_beyond(path):
    """The limit holds whatever happens; what was in memory in part is matched whole."""
    with Catalogue.open(path, chunks_in_memory=4) as catalogue:
        publish(catalogue, DOCUMENT)
        whole = catalogue.match(NAMESPACE, DOCUMENT).listing
        catalogue.report_damage(whole.chunk_keys[1])
        publish(catalogue, short := tokens(500, 1))
        assert catalogue.index.tree.chunk_count == 3
        catalogue.heal(whole.chunk_keys[1])
        assert catalogue.index.tree.chunk_count <= 4
        for document in (DOCUMENT, short):
            assert catalogue.match_anywhere(NAMESPACE, document).token_count == len(document)


def test_the_market_quotes_what_is_beyond_memory(tmp_path):
    """By the configuration's key; a match that is too short is not sold from there either."""
    settings = {"home": str(tmp_path), "catalogue_chunks_in_memory": 0}
    with Market.open(config=settings) as market:
        publish(market.catalogue, DOCUMENT)
        assert market.catalogue.match(NAMESPACE, DOCUMENT) is None
        assert market.match(NAMESPACE, DOCUMENT).token_count == 700
        assert market.match(NAMESPACE, DOCUMENT[:63]) is None
        assert market.catalogue.index.tree.chunk_count == 0
        with market.catalogue._db.reading() as db:
            assert queries.rows(db, "SELECT count(*) FROM offered") == [(4,)]
