"""The index's rows give the longest published prefix, token by token, and whose it is."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.catalogue_documents import (
    NAMESPACE,
    OTHER_NAMESPACE,
    changed,
    listing_of,
    tokens,
)
from vllm_kvmarket.catalogue.first_offers import (
    CHUNKS,
    Asked,
    FirstOffers,
    common_tokens,
    fact,
    find,
    last_state,
    walk,
    whole_document,
)
from vllm_kvmarket.catalogue.index_file import TABLES, IndexFile
from vllm_kvmarket.catalogue.integrity import index_problems
from vllm_kvmarket.catalogue.listing import Listing
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.core.model_identity import TOKEN_BYTES, marked, pack_tokens

CHUNK = 4


class UndoError(Exception):
    """Ends a transaction without a trace."""


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Iterator[IndexFile]:
    opened = IndexFile(tmp_path_factory.mktemp("index") / "one")
    yield opened
    opened.close()


@contextmanager
def published_in(
    file: IndexFile, chunk_tokens: int = CHUNK, namespace: bytes = NAMESPACE
) -> Iterator[Published]:
    """A new index in a transaction that is rolled back."""
    with contextlib.suppress(UndoError), file.writing() as rows:
        yield Published(rows, chunk_tokens, namespace)
        raise UndoError


@pytest.fixture
def published(file) -> Iterator[Published]:
    with published_in(file) as made:
        yield made


class Published:
    """An index, and beside it the naive model: every document whole, in the order of listing."""

    def __init__(self, rows, chunk_tokens: int = CHUNK, namespace: bytes = NAMESPACE) -> None:
        self.rows = rows
        self.namespace = namespace
        self.read: list[bytes] = []
        self.chunks: dict[bytes, bytes] = {}
        self.offers = FirstOffers(rows, chunk_tokens, self.tokens_of)
        self.documents: dict[tuple[int, ...], tuple[int, int]] = {}
        self.chunk_tokens = chunk_tokens
        self.places = 1000

    def tokens_of(self, key: bytes) -> bytes | None:
        self.read.append(key)
        return self.chunks.get(key)

    def put(self, document, place: int | None = None, length: int | None = None) -> Listing:
        """List a document of which the first `length` tokens can be matched."""
        self.places += 1
        place = self.places if place is None else place
        length = len(document) if length is None else length
        listing = Listing.of(
            DocumentChunks.of(self.namespace, document, self.chunk_tokens),
            ListingTerms(title="a document"),
        )
        packed = pack_tokens(document)
        width = self.chunk_tokens * TOKEN_BYTES
        chunks = [packed[start : start + width] for start in range(0, len(packed), width)]
        self.chunks.update(zip(listing.chunk_keys, chunks, strict=True))
        self.offers.put(listing, place, chunks[: -(-length // self.chunk_tokens)])
        self.documents[tuple(document)] = (place, length)
        return listing

    def remove(self, document) -> None:
        self.read.clear()
        self.offers.remove(listing_of(document, self.chunk_tokens).document_id)
        assert self.read == []
        del self.documents[tuple(document)]

    def expected(self, request) -> list[tuple[int, tuple[int, ...]]]:
        """Compare the request with every document, in the order of their first offers: up to where
        each owns it.
        """

        def shared(document, length: int) -> int:
            count = 0
            for a, b in zip(document[:length], request, strict=False):
                if a != b:
                    break
                count += 1
            return count

        found: list[tuple[int, tuple[int, ...]]] = []
        for document, (_, length) in sorted(self.documents.items(), key=lambda item: item[1]):
            end = shared(document, length)
            if end > (found[-1][0] if found else 0):
                found.append((end, document))
        return found

    def match(self, request, namespace: bytes = NAMESPACE) -> list[tuple[int, Listing]]:
        asked = Asked(namespace, self.chunk_tokens, request)
        owned = walk(self.rows, asked, self.tokens_of)
        ends = [0, *(each.end for each in owned)]
        assert [each.start for each in owned] == ends[:-1]
        return [(each.end, each.record.decode()[0]) for each in owned]

    def check(self, request) -> None:
        """Hold the index's answer against the model's, in all its parts."""
        owners = self.expected(request)
        expected = [(end, listing_of(document, self.chunk_tokens)) for end, document in owners]
        assert self.match(request) == expected
        if owners:
            asked = Asked(NAMESPACE, self.chunk_tokens, request)
            total = owners[-1][0]
            found = whole_document(self.rows, asked.digest(total), total)
            is_there = self.documents.get(tuple(request[:total]), (0, 0))[1] == total
            assert (found is not None) == is_there


# Few different tokens, so that documents share beginnings, and some that differ in one byte only.
TOKEN = st.sampled_from([0, 1, 256, 2**31])
LENGTH = st.sampled_from([0, 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK - 1, 3 * CHUNK])
STEM = st.builds(lambda token, count: (token,) * count, st.sampled_from([0, 256]), LENGTH)
REQUEST = st.builds(lambda stem, rest: (*stem, *rest), STEM, st.lists(TOKEN, max_size=3))
DOCUMENT = REQUEST.filter(len)
ACTION = st.one_of(
    st.tuples(st.just("put"), DOCUMENT),
    st.tuples(st.just("put first"), DOCUMENT),
    st.tuples(st.just("remove"), st.integers(0)),
    st.tuples(st.just("damage"), st.integers(0)),
    st.tuples(st.just("heal"), st.integers(0)),
)


@given(st.lists(ACTION, max_size=25), st.lists(REQUEST, max_size=8))
@settings(max_examples=300, deadline=None)
def test_the_index_answers_as_a_comparison_with_every_document(file, actions, requests):
    """Under any listing, delisting, damage and healing, the naive model gives the same match; and
    when all are gone, so are all rows.
    """
    with published_in(file) as published:
        for action, argument in actions:
            documents = list(published.documents)
            if action == "put":
                if argument not in published.documents:
                    published.put(argument)
            elif action == "put first":
                # A place in front of all others: the first listing changes at every depth.
                if argument not in published.documents:
                    published.put(argument, place=2000 - published.places)
            elif documents:
                document = documents[argument % len(documents)]
                place, _ = published.documents[document]
                whole_chunks = (len(document) - 1) // CHUNK
                if action == "remove" or (action == "damage" and whole_chunks == 0):
                    published.remove(document)
                elif action == "damage":
                    published.put(document, place, CHUNK * (1 + argument % whole_chunks))
                else:
                    published.put(document, place)
            assert list(index_problems(published.rows)) == []
        for request in [*requests, *published.documents]:
            published.check(request)
        for document in list(published.documents):
            published.remove(document)
        left = {table: published.rows.scan(table, b"") for table in TABLES}
        assert fact(published.rows, CHUNKS) == 0
        assert {table for table, rows in left.items() if rows} <= {"facts"}


@given(REQUEST, REQUEST)
def test_common_tokens_count_tokens_and_not_bytes(a, b):
    """Tokens that share some of their bytes are different tokens."""
    expected = 0
    while expected < min(len(a), len(b)) and a[expected] == b[expected]:
        expected += 1
    assert common_tokens(pack_tokens(a), pack_tokens(b)) == expected


def test_a_key_that_is_not_of_its_tokens_is_not_believed(published):
    """From such a chunk on a document matches nothing, whatever it says."""
    document = tuple(range(12))
    listing = listing_of(document, CHUNK)
    packed = pack_tokens(document)
    chunks = [packed[:16], bytes(16), packed[32:]]
    published.offers.put(listing, 1, chunks)
    assert [end for end, _ in published.match(document)] == [4]
    assert [end for end, _ in published.match((0, 1, 2, 3, 0, 0, 0, 0))] == [4]
    forged = dataclasses.replace(listing, chunk_keys=(b"k" * 32,) * 3)
    published.offers.put(forged, 1, chunks)
    assert published.match(document) == []


def test_tokens_that_are_not_of_their_key_are_not_believed(published):
    """What a database says inside a chunk is checked: the match ends before it, uncertain."""
    listing = published.put(tuple(range(12)))
    published.chunks[listing.chunk_keys[1]] = pack_tokens((4, 5, 6, 99))
    asked = Asked(NAMESPACE, CHUNK, (0, 1, 2, 3, 4, 5, 6, 99))
    (owned,) = walk(published.rows, asked, published.tokens_of)
    assert owned.end == 4
    assert asked.unread == owned.place


def test_a_short_last_chunk_matches_to_its_last_token(published):
    """A document of 10 tokens in chunks of 4 matches 10, and 9 of a request that differs there."""
    document = tuple(range(10))
    published.put(document)
    for request in (document, (*document, 99), document[:9], (*document[:9], 99), document[:4]):
        published.check(request)


def test_tokens_are_read_only_where_request_and_document_part_inside_a_chunk(published):
    """A request that contains the document, or ends with a chunk, costs keys alone."""
    document = tuple(range(10))
    keys = published.put(document).chunk_keys
    for request in (document, (*document, 99), document[:8], (*document[:8], 99, 99)):
        published.read.clear()
        published.check(request)
        assert published.read == (list(keys[2:]) if request[8:9] == (99,) else [])
    published.read.clear()
    published.check((*document[:6], 99))
    assert published.read == [keys[1]]


def test_what_a_longer_document_repeats_stays_with_the_first(file):
    """Offered first, the shorter owns its tokens, and the longer what it adds; offered last, the
    shorter owns nothing.
    """
    with published_in(file) as published:
        published.put(tuple(range(6)))
        published.put(tuple(range(11)))
        assert [end for end, _ in published.match(range(11))] == [6, 11]
        assert [end for end, _ in published.match(range(6))] == [6]
    with published_in(file) as published:
        published.put(tuple(range(11)))
        published.put(tuple(range(6)))
        for length in range(1, 12):
            ((_, listing),) = published.match(range(length))
            assert listing.token_count == 11
            published.check(tuple(range(length)))


def test_of_several_documents_that_go_on_the_first_offered_owns_it(published):
    """A request that ends inside what many documents share belongs to the first of them."""
    for last in (50, 40, 60, 45):
        published.put((1, 2, last, 7, 7), place=100 - last)
    ((end, listing),) = published.match((1, 2, 3))
    assert (end, listing) == (2, listing_of((1, 2, 60, 7, 7), CHUNK))
    published.remove((1, 2, 60, 7, 7))
    published.check((1, 2, 3))
    published.check((1, 2))


def test_a_copy_inside_one_chunk_takes_only_what_it_adds(file):
    """Documents may differ inside a chunk: beside the path, too, the first offer counts."""
    with published_in(file, chunk_tokens=8) as published:
        for document in ((1, 2, 3), (1, 2, 3, 4, 5), (1, 2), (1, 2, 3, 4, 5, 6, 7, 8, 9)):
            published.put(document)
        found = published.match((1, 2, 3, 4, 5, 6, 7, 8, 9, 10))
        assert [end for end, _ in found] == [3, 5, 9]
        published.check((1, 2, 3, 4, 5, 6, 99))


def test_namespaces_share_nothing(published):
    """The same tokens in another namespace are not there."""
    published.put((1, 2, 3))
    assert published.match((1, 2, 3), OTHER_NAMESPACE) == []


@pytest.mark.parametrize("stranger", [-1, 2**32, 2**70])
def test_a_token_that_no_document_can_hold_ends_the_match(published, stranger):
    """A request with an impossible token id matches up to it; it does not fail."""
    published.put(tuple(range(10)))
    assert published.match([0, 1, 2, 3, 4, stranger, 6])[-1][0] == 5
    assert published.match([0, 1, 2, 3, stranger, 5])[-1][0] == 4
    assert published.match([stranger, 1]) == []
    assert published.match([]) == []


def test_chunks_are_counted_once(published):
    """Shared chunks stay while one listing needs them."""
    published.put((1, 2, 3, 4, 5, 6))
    published.put((1, 2, 3, 4, 7))
    assert fact(published.rows, CHUNKS) == 3
    published.remove((1, 2, 3, 4, 5, 6))
    assert fact(published.rows, CHUNKS) == 2
    published.remove((1, 2, 3, 4, 7))
    assert fact(published.rows, CHUNKS) == 0
    published.offers.remove("kvd_unknown")


def test_a_listing_with_new_terms_replaces_the_old_one(published):
    """The match carries the terms that were put last, and the time when it ends."""
    listing = published.put((1, 2, 3), place=1)
    for ends_at_s in (5.0, 9.0, None):
        dearer = changed(listing, cache_read_nano_per_mtok=7, expires_at_s=ends_at_s)
        published.offers.put(dearer, 1, [pack_tokens((1, 2, 3))])
        assert published.match((1, 2, 3)) == [(3, dearer)]
        assert find(published.rows, listing.document_id).decode()[0] == dearer
        assert published.offers.remove_ended(8.0 if ends_at_s == 9.0 else 4.0) is False
    published.offers.put(changed(listing, expires_at_s=5.0), 1, [pack_tokens((1, 2, 3))])
    assert published.offers.remove_ended(5.0) is True
    assert published.match((1, 2, 3)) == []


@given(st.lists(st.tuples(st.integers(0, 3), st.none() | st.integers(0, 9)), max_size=20))
@settings(max_examples=50, deadline=None)
def test_what_ends_goes_in_time_and_once(file, notes):
    """As of any moment, those whose end, noted last, lies behind it; others stay."""
    expected: dict[int, int | None] = {}
    with published_in(file) as published:
        for number, end in notes:
            listing = changed(
                listing_of((number, 2, 3), CHUNK), expires_at_s=None if end is None else float(end)
            )
            published.offers.put(listing, 1 + number, [pack_tokens((number, 2, 3))])
            expected[number] = end
        for now in range(10):
            due = {number for number, end in expected.items() if end is not None and end <= now}
            assert published.offers.remove_ended(now) is any(expected[each] == now for each in due)
            for number in expected:
                assert bool(published.match((number, 2, 3))) == (number not in due)


def test_a_document_whose_tokens_were_removed_is_off_the_market(published):
    """A new listing that parts from it inside a chunk does not fail for it: the change that took
    it off is on its way.
    """
    gone = published.put((1, 2, 3, 4, 5, 6, 7, 8))
    for key in gone.chunk_keys:
        del published.chunks[key]
    published.put((1, 2, 3, 4, 5, 9))
    del published.documents[1, 2, 3, 4, 5, 6, 7, 8]
    assert list(index_problems(published.rows)) == []
    for request in ((1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 3, 4, 5, 9)):
        published.check(request)


def test_a_match_costs_one_look_up_a_segment(file):
    """However many documents branch off a longer one that was the first."""
    with published_in(file, chunk_tokens=256) as published:
        stem = tokens(4096)
        published.put(stem)
        for index in range(300):
            published.put([*stem[: 13 * index], *tokens(20, seed=index)])
        asked_for = []
        get = published.rows.get
        published.rows.get = lambda table, key: asked_for.append(table) or get(table, key)
        ((end, _),) = published.match([*stem, 7])
        assert end == len(stem)
        assert asked_for == ["starts", "listings", "starts"]


def test_leaving_costs_no_more_for_what_begins_on_its_tokens(file):
    """The first of many that share a beginning goes: its heir takes over in a few writes."""
    with published_in(file) as published:
        stem = (1, 2)
        for number in range(500):
            published.put((*stem, 10 + number, 5, 6))
        written = []
        put = published.rows.put
        published.rows.put = lambda *row: written.append(row) or put(*row)
        published.remove((*stem, 10, 5, 6))
        assert len(written) < 12
        published.check((*stem, 9))


def test_the_last_state_is_looked_for_from_the_end(file):
    """However many documents end before it."""
    namespace = marked(NAMESPACE, 0)
    with published_in(file, 256, namespace) as published:
        stem = tokens(4096)
        published.put(stem)
        for index in range(1, 300):
            published.put(stem[: 13 * index])
        read = []
        backwards = published.rows.backwards
        published.rows.backwards = lambda *of: (read.append(row) or row for row in backwards(*of))
        for request, expected in ((stem, 4096), (stem[:2000], 1989)):
            asked = Asked(namespace, 256, request)
            owned = walk(published.rows, asked, published.tokens_of)
            assert last_state(published.rows, asked, owned)[0] == expected
        assert len(read) == 1


@given(
    st.lists(
        st.lists(st.integers(1, 2), min_size=1, max_size=11),
        min_size=1,
        max_size=8,
        unique_by=tuple,
    ),
    st.lists(st.integers(1, 2), max_size=14),
    st.integers(0, 2),
    st.data(),
)
def test_where_the_model_keeps_a_state_a_match_ends_with_the_last_one(
    file, documents, request, between, data
):
    """At a document's end, or inside it behind every so many chunks: the match has the chunks of
    one that has the state. The end of a document that is damaged does not count.
    """
    namespace = marked(NAMESPACE, between)
    whole: list[list[int]] = []
    ends: set[tuple[int, ...]] = set()
    with published_in(file, namespace=namespace) as published:
        for document in documents:
            damaged = len(document) // CHUNK * CHUNK or len(document)
            length = data.draw(st.sampled_from([len(document), damaged]))
            published.put(document, length=length)
            if length == len(document):
                whole.append(document)
            states = range(between * CHUNK, length + 1, between * CHUNK) if between else ()
            ends.update({tuple(document[:end]) for end in states})
        fitting = [d for d in (*map(tuple, whole), *ends) if tuple(request[: len(d)]) == d]
        asked = Asked(namespace, CHUNK, request)
        owned = walk(published.rows, asked, published.tokens_of)
        expected = published.expected(request)
        assert [each.end for each in owned] == [end for end, _ in expected]
        found, having = last_state(published.rows, asked, owned)
        state = max(fitting, key=len, default=())
        assert found == len(state)
        assert (having is not None) == bool(state)
        if having is not None:
            keys = DocumentChunks.of(namespace, state, CHUNK).keys
            assert having.decode()[0].chunk_keys[: len(keys)] == keys
            there = whole_document(published.rows, asked.digest(found), found)
            assert (there is not None) == (list(state) in whole)
