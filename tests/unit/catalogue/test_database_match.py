"""The match in the database gives what the prefix tree gives, whatever is on offer."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.catalogue_documents import NAMESPACE, OTHER_NAMESPACE, publish, tokens
from vllm_kvmarket.catalogue import Catalogue, Listing, database_match, queries
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.core.model_identity import chunk_keys, document_id

CHUNK = 16
# Few different tokens and few lengths: documents share beginnings and end inside each other.
TOKEN = st.sampled_from([1, 256, 2**31])
LENGTH = st.sampled_from([0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK - 2, 3 * CHUNK])
STEM = st.builds(lambda token, count: [token] * count, st.sampled_from([1, 256]), LENGTH)
REQUEST = st.builds(lambda stem, rest: [*stem, *rest], STEM, st.lists(TOKEN, max_size=3))
DOCUMENT = st.tuples(st.sampled_from([NAMESPACE, OTHER_NAMESPACE]), REQUEST.filter(len))
WHICH = st.integers(0, 50)
ACTION = st.one_of(
    st.tuples(st.just("publish"), DOCUMENT),
    st.tuples(st.just("publish"), DOCUMENT),
    st.tuples(st.sampled_from(["delist", "evict", "begin", "end", "let end", "price"]), WHICH),
    st.tuples(st.sampled_from(["damage", "heal"]), WHICH),
)


class Shop:
    """Documents in one database, and the views of processes that keep all, some or none of it."""

    def __init__(self, path: Path, limits: tuple[int | None, ...] = (None, 0, 4)) -> None:
        self.views = [Catalogue.open(path, CHUNK, limit) for limit in limits]
        self.writing = self.views[0]
        self.published: list[tuple[bytes, list[int]]] = []

    def do(self, action: str, argument) -> None:
        if action == "publish":
            namespace, document = argument
            self.published.append(argument)
            chunks = DocumentChunks.of(namespace, document, CHUNK)
            self.writing.begin(Listing.of(chunks, ListingTerms(title="a document")), chunks)
            self.writing.commit(chunks.document_id, stored_bytes=1000)
        elif self.published:
            namespace, document = self.published[argument % len(self.published)]
            self._change(action, namespace, document, argument)

    def _change(self, action: str, namespace: bytes, document: list[int], number: int) -> None:
        keys = chunk_keys(namespace, document, CHUNK)
        name = document_id(keys[-1])
        if action == "damage":
            self.writing.report_damage(keys[number % len(keys)])
        elif action == "heal":
            self.writing.heal(keys[number % len(keys)])
        elif action == "evict":
            self.writing.evict(name, "no room")
        elif self.writing.get(name).state not in ("live", "damaged"):
            return
        elif action == "delist":
            self.writing.delist(name)
        elif action == "begin":
            chunks = DocumentChunks.of(namespace, document, CHUNK)
            self.writing.begin(Listing.of(chunks, ListingTerms(publisher="p")), chunks)
        elif action == "price":
            self.writing.set_price(name, number)
        elif action == "end":
            self.writing.set_expiry(name, 1.0)
            self.writing.expire()
        else:
            # The database does not say so yet.
            self.writing.set_expiry(name, time.time() - 1)

    def check(self, requests: list[list[int]]) -> None:
        for view in self.views:
            view.refresh()
            assert view.check_integrity() == []
        whole, *others = self.views
        for _, request in [*self.published, *((NAMESPACE, request) for request in requests)]:
            for asked in (request, [*request, 7], request[: len(request) // 2]):
                for namespace in (NAMESPACE, OTHER_NAMESPACE):
                    expected = whole.match(namespace, asked)
                    with whole._db.snapshot() as db:
                        found = database_match.match(db, namespace, asked, CHUNK, time.time())
                    assert found == expected
                    for view in others:
                        assert view.match_anywhere(namespace, asked) == expected

    def close(self) -> None:
        for view in self.views:
            view.close()


@pytest.mark.slow
@given(st.lists(ACTION, max_size=12), st.lists(ACTION, max_size=12), st.lists(REQUEST, max_size=3))
@settings(max_examples=60, deadline=None)
def test_the_database_answers_as_the_tree_does(before, after, requests):
    """Also with a part of it in memory, and for what was there before the tables were made."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "market.sqlite"
        old = Shop(path, (None,))
        for action in before:
            old.do(*action)
        old.close()
        shop = Shop(path)
        shop.published = old.published
        shop.check(requests)
        for action in after:
            shop.do(*action)
        shop.check(requests)
        assert shop.views[1].index.tree.chunk_count == 0
        assert shop.views[2].index.tree.chunk_count <= 4
        shop.close()


@pytest.mark.parametrize("most", [1, 2, 3])
def test_the_first_listed_is_paid_where_too_many_begin_alike(path, monkeypatch, most):
    """Behind any chunk, and at a document's beginning: it is among the first listed behind it."""
    monkeypatch.setattr(database_match, "_MOST_CONTINUATIONS", most)
    stem = tokens(CHUNK)
    with Catalogue.open(path, CHUNK, 0) as catalogue, Catalogue.open(path, CHUNK) as whole:
        for number in (9, 4, 7, 2, 8):
            publish(catalogue, [5, 5, number, 1], CHUNK)
            publish(catalogue, [*stem, 5, 5, number, 1], CHUNK)
        whole.refresh()
        for asked in ([*stem, 5, 5, 100], [5, 5, 100], [*stem, 5, 5, 7, 3]):
            expected = whole.match(NAMESPACE, asked)
            assert catalogue.match_anywhere(NAMESPACE, asked) == expected


def test_a_key_alone_is_not_believed(path):
    """Other tokens under a chunk's key do not match, and no more does what follows them."""
    document = tokens(3 * CHUNK)
    with Catalogue.open(path, CHUNK, 0) as catalogue:
        keys = publish(catalogue, document, CHUNK).chunk_keys
        raw = apsw.Connection(str(path))
        for table in ("chunk", "continuation"):
            raw.execute(f"UPDATE {table} SET tokens = zeroblob(64) WHERE key = ?", (keys[1],))
        raw.close()
        assert catalogue.match_anywhere(NAMESPACE, document).token_count == CHUNK


STATEMENTS = (
    database_match._NEIGHBOURS,
    database_match._BEGINNING_ALIKE,
    database_match._EARLIEST_ALIKE,
    database_match.whole_chunks(3),
    # What the trigger does for each change of a listing.
    "DELETE FROM offered WHERE place = :place AND key IN "
    "(SELECT key FROM listing_chunk WHERE document_id = :document_id UNION ALL SELECT :key)",
    "DELETE FROM continuation WHERE (parent, tokens) IN (SELECT parent, tokens FROM followed "
    "WHERE document_id = :document_id "
    "AND NOT EXISTS (SELECT 1 FROM offered WHERE offered.key = followed.key))",
)


@pytest.mark.parametrize("statement", STATEMENTS)
def test_no_statement_reads_a_whole_table(path, statement):
    """Every table is searched by an index, and nothing is sorted but what a limit has bounded."""
    with Catalogue.open(path, CHUNK, 0) as catalogue, catalogue._db.reading() as db:
        bindings = [1] * 4 if "?" in statement else ANYTHING
        plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {statement}", bindings)]
    bounded = ("SCAN line", "SCAN (", "SCAN CONSTANT")
    assert [one for one in plan if one.startswith("SCAN") and not one.startswith(bounded)] == []
    assert not any("ORDER BY" in one for one in plan)


_NAMES = "parent tokens now_s low high most position key document_id place"
ANYTHING = dict.fromkeys(_NAMES.split(), 1)


def test_what_does_not_fit_is_not_read(path, monkeypatch):
    """The most used go into memory, then the first in line; opening reads no other's tokens."""
    documents = [tokens(3 * CHUNK, seed) for seed in range(6)]
    with Catalogue.open(path, CHUNK) as catalogue:
        listed = [publish(catalogue, document, CHUNK) for document in documents]
        with catalogue._db.transaction() as db:
            for number, score in ((4, 2.0), (2, 3.0)):
                db.execute(
                    "INSERT INTO listing_use VALUES (?, 1, 1, 1, ?, 1.0, 1.0)",
                    (listed[number].document_id, score),
                )
    read: list[str] = []
    chunks_of = queries.chunks_of
    monkeypatch.setattr(
        queries, "chunks_of", lambda db, name: read.append(name) or chunks_of(db, name)
    )
    with Catalogue.open(path, CHUNK, 10) as catalogue:
        assert read == [listed[number].document_id for number in (2, 4, 0)]
        assert catalogue.index.is_beyond_memory
        assert (catalogue.index.tree.chunk_count, len(catalogue.index.tree.entries)) == (9, 3)
        assert catalogue.match(NAMESPACE, documents[1]) is None
        assert catalogue.match_anywhere(NAMESPACE, documents[1]).listing == listed[1]
        # What is removed makes room for later ones.
        later = tokens(3 * CHUNK, 9)
        publish(catalogue, later, CHUNK)
        assert catalogue.match(NAMESPACE, later) is None
        catalogue.delist(listed[2].document_id)
        publish(catalogue, last := tokens(3 * CHUNK, 10), CHUNK)
        assert catalogue.match(NAMESPACE, last).token_count == 3 * CHUNK
        assert catalogue.match_anywhere(NAMESPACE, later).token_count == 3 * CHUNK
        assert catalogue.index.tree.chunk_count == 9
