"""The prefix tree finds the longest published prefix, token by token, and whose it is."""

from __future__ import annotations

import dataclasses
import statistics
import time

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
from vllm_kvmarket.catalogue.integrity import tree_problems
from vllm_kvmarket.catalogue.listing import Listing
from vllm_kvmarket.catalogue.prefix_tree import PrefixTree, common_tokens
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.core.model_identity import ROOT, TOKEN_BYTES, chunk_keys, marked, pack_tokens

CHUNK = 4


class Published:
    """A tree, and beside it the naive model: every document whole, in the order of listing."""

    def __init__(self, chunk_tokens: int = CHUNK, namespace: bytes = NAMESPACE) -> None:
        self.namespace = namespace
        self.tree = PrefixTree(chunk_tokens)
        self.documents: dict[tuple[int, ...], tuple[int, int]] = {}
        self.chunk_tokens = chunk_tokens
        self.places = 0

    def put(self, document, place: int | None = None, length: int | None = None) -> Listing:
        """List a document of which the first `length` tokens can be matched."""
        self.places += 1
        place = self.places if place is None else place
        length = len(document) if length is None else length
        chunks = DocumentChunks.of(self.namespace, document, self.chunk_tokens)
        listing = Listing.of(chunks, ListingTerms(title="a document"))
        packed = pack_tokens(document[:length])
        width = self.chunk_tokens * TOKEN_BYTES
        parts = [packed[start : start + width] for start in range(0, len(packed), width)]
        self.tree.put(listing, place, parts)
        self.documents[tuple(document)] = (place, length)
        return listing

    def remove(self, document) -> None:
        self.tree.remove(listing_of(document, self.chunk_tokens).document_id)
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

    def check(self, request) -> None:
        """Hold the tree's answer against the model's, in all its parts."""
        owners = self.expected(request)
        match = self.tree.match(NAMESPACE, request)
        if not owners:
            assert match is None
            return
        assert [(each.end, each.listing.document_id) for each in match.segments] == [
            (end, listing_of(document, self.chunk_tokens).document_id) for end, document in owners
        ]
        ends = [0, *(each.end for each in match.segments)]
        assert [each.start for each in match.segments] == ends[:-1]
        total, last = owners[-1]
        assert match.token_count == total
        assert match.listing == match.segments[-1].listing
        keys = chunk_keys(NAMESPACE, last, self.chunk_tokens)
        left = total
        for index, chunk in enumerate(match.chunks):
            part = last[index * self.chunk_tokens : (index + 1) * self.chunk_tokens]
            assert chunk.key == keys[index]
            assert chunk.parent == (keys[index - 1] if index else ROOT)
            assert chunk.tokens == pack_tokens(part)
            assert chunk.token_count == len(part)
            assert chunk.matched == min(left, len(part))
            left -= chunk.matched
        assert left == 0


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
def test_the_tree_answers_as_a_comparison_with_every_document(actions, requests):
    """Under any listing, delisting, damage and healing, the naive model gives the same match."""
    published = Published()
    for action, argument in actions:
        documents = list(published.documents)
        if action == "put":
            if argument not in published.documents:
                published.put(argument)
        elif action == "put first":
            # A place in front of all others: the first listing changes at every depth.
            if argument not in published.documents:
                published.put(argument, place=-published.places)
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
        assert list(tree_problems(published.tree)) == []
    for request in [*requests, *published.documents]:
        published.check(request)
    for document in list(published.documents):
        published.remove(document)
    assert published.tree.chunk_count == 0
    assert published.tree.roots == {}


@given(REQUEST, REQUEST)
def test_common_tokens_count_tokens_and_not_bytes(a, b):
    """Tokens that share some of their bytes are different tokens."""
    expected = 0
    while expected < min(len(a), len(b)) and a[expected] == b[expected]:
        expected += 1
    assert common_tokens(pack_tokens(a), pack_tokens(b)) == expected


def test_equal_keys_do_not_make_equal_chunks():
    """Two forged chunks with one key and other tokens: each request gets its own or nothing."""
    tree = PrefixTree(CHUNK)
    forged = b"k" * 32
    documents = {"kvd_a": (1, 2, 3, 4), "kvd_b": (1, 2, 9, 9)}
    for place, (name, document) in enumerate(documents.items()):
        listing = dataclasses.replace(
            listing_of(document, CHUNK), document_id=name, chunk_keys=(forged,)
        )
        tree.put(listing, place, [pack_tokens(document)])
    for name, document in documents.items():
        match = tree.match(NAMESPACE, [*document, 7])
        assert (match.listing.document_id, match.token_count) == (name, 4)
        assert match.chunks[0].tokens == pack_tokens(document)
    assert tree.match(NAMESPACE, (1, 2, 3, 9)).token_count == 3
    assert tree.match(NAMESPACE, (9, 9, 9, 9)) is None
    tree.remove("kvd_a")
    assert tree.match(NAMESPACE, (1, 2, 3, 4)).token_count == 2


def test_a_short_last_chunk_matches_to_its_last_token():
    """A document of 10 tokens in chunks of 4 matches 10, and 9 of a request that differs there."""
    published = Published()
    document = tuple(range(10))
    published.put(document)
    for request in (document, (*document, 99), document[:9], (*document[:9], 99), document[:4]):
        published.check(request)
    match = published.tree.match(NAMESPACE, (*document[:9], 99))
    assert [chunk.matched for chunk in match.chunks] == [4, 4, 1]
    assert match.chunks[-1].token_count == 2


def test_what_a_longer_document_repeats_stays_with_the_first():
    """Offered first, the shorter owns its tokens, and the longer what it adds; offered last, the
    shorter owns nothing.
    """
    published = Published()
    published.put(tuple(range(6)))
    published.put(tuple(range(11)))
    assert [each.end for each in published.tree.match(NAMESPACE, range(11)).segments] == [6, 11]
    assert [each.end for each in published.tree.match(NAMESPACE, range(6)).segments] == [6]
    published = Published()
    published.put(tuple(range(11)))
    published.put(tuple(range(6)))
    for length in range(1, 12):
        (segment,) = published.tree.match(NAMESPACE, range(length)).segments
        assert segment.listing.token_count == 11
        published.check(tuple(range(length)))


def test_of_several_documents_that_go_on_the_first_offered_owns_it():
    """A request that ends inside what many documents share belongs to the first of them."""
    published = Published()
    for last in (50, 40, 60, 45):
        published.put((1, 2, last, 7, 7), place=100 - last)
    match = published.tree.match(NAMESPACE, (1, 2, 3))
    assert match.token_count == 2
    assert match.chunks[0].tokens == pack_tokens((1, 2, 60, 7))
    published.remove((1, 2, 60, 7, 7))
    published.check((1, 2, 3))
    published.check((1, 2))


def test_a_copy_inside_one_chunk_takes_only_what_it_adds():
    """Documents may differ inside a chunk: beside the path, too, the first offer counts."""
    published = Published(chunk_tokens=8)
    for document in ((1, 2, 3), (1, 2, 3, 4, 5), (1, 2), (1, 2, 3, 4, 5, 6, 7, 8, 9)):
        published.put(document)
    match = published.tree.match(NAMESPACE, (1, 2, 3, 4, 5, 6, 7, 8, 9, 10))
    assert [each.end for each in match.segments] == [3, 5, 9]
    published.check((1, 2, 3, 4, 5, 6, 99))


@given(st.lists(DOCUMENT, min_size=1, max_size=8, unique=True), REQUEST, st.integers(1, 12))
def test_the_beginning_of_a_match_is_the_match_of_the_beginning(documents, request_, end):
    """`until` cuts segments and chunks as the tree would for a shorter request."""
    published = Published()
    for document in documents:
        published.put(document)
    match = published.tree.match(NAMESPACE, request_)
    if match is not None:
        cut = match.until(end)
        asked = published.tree.match(NAMESPACE, request_[:end])
        assert cut.segments == asked.segments and cut.token_count == asked.token_count
        assert [chunk.matched for chunk in cut.chunks] == [chunk.matched for chunk in asked.chunks]


def test_namespaces_share_nothing():
    """The same tokens in another namespace are not there."""
    published = Published()
    published.put((1, 2, 3))
    assert published.tree.match(OTHER_NAMESPACE, (1, 2, 3)) is None


@pytest.mark.parametrize("stranger", [-1, 2**32, 2**70])
def test_a_token_that_no_document_can_hold_ends_the_match(stranger):
    """A request with an impossible token id matches up to it; it does not fail."""
    published = Published()
    published.put(tuple(range(10)))
    assert published.tree.match(NAMESPACE, [0, 1, 2, 3, 4, stranger, 6]).token_count == 5
    assert published.tree.match(NAMESPACE, [stranger, 1]) is None
    assert published.tree.match(NAMESPACE, []) is None


def test_the_last_listing_of_a_chunk_takes_it_along():
    """Shared chunks stay while one listing needs them."""
    published = Published()
    published.put((1, 2, 3, 4, 5, 6))
    published.put((1, 2, 3, 4, 7))
    assert published.tree.chunk_count == 3
    published.remove((1, 2, 3, 4, 5, 6))
    assert published.tree.chunk_count == 2
    published.remove((1, 2, 3, 4, 7))
    assert published.tree.chunk_count == 0
    published.tree.remove("kvd_unknown")


def test_a_listing_with_new_terms_replaces_the_old_one():
    """The match carries the terms that were put last."""
    published = Published()
    listing = published.put((1, 2, 3))
    dearer = changed(listing, cache_read_nano_per_mtok=7)
    published.tree.put(dearer, 1, [pack_tokens((1, 2, 3))])
    assert published.tree.match(NAMESPACE, (1, 2, 3)).listing == dearer
    assert published.tree.chunk_count == 1


def test_a_match_stays_fast_among_thousands_of_listings():
    """32k tokens among 3,000 documents take milliseconds at the very most (measured: 0.6)."""
    published = Published(chunk_tokens=256)
    stem = tokens(32_768)
    published.put(stem)
    for index in range(3_000):
        published.put([*stem[: index % 2_000], *tokens(20, seed=index)])
    times_s = []
    for _ in range(21):
        started = time.perf_counter()
        match = published.tree.match(NAMESPACE, stem)
        times_s.append(time.perf_counter() - started)
        assert match.token_count == len(stem)
    assert statistics.median(times_s) < 0.02


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
    documents, request, between, data
):
    """At a document's end, or inside it behind every so many chunks: the match has the chunks of
    one that has the state. The end of a document that is damaged does not count.
    """
    namespace = marked(NAMESPACE, between)
    published = Published(namespace=namespace)
    whole: list[list[int]] = []
    ends: set[tuple[int, ...]] = set()
    for document in documents:
        length = data.draw(st.sampled_from([len(document), max(1, len(document) // CHUNK * CHUNK)]))
        published.put(document, length=length)
        if length == len(document):
            whole.append(document)
        states = range(between * CHUNK, length + 1, between * CHUNK) if between else ()
        ends.update({tuple(document[:end]) for end in states})
    fitting = [d for d in (*map(tuple, whole), *ends) if tuple(request[: len(d)]) == d]
    match = published.tree.match(namespace, request)
    if not fitting:
        assert match is None
        return
    state = max(fitting, key=len)
    assert match is not None
    assert match.token_count == len(state)
    assert (match.whole is not None) == (list(state) in whole)
    keys = DocumentChunks.of(namespace, state, CHUNK).keys
    assert tuple(chunk.key for chunk in match.chunks) == keys
    assert sum(chunk.matched for chunk in match.chunks) == len(state)
    assert [segment.end for segment in match.segments][-1] == len(state)
    covered = {(segment.start, segment.end) for segment in match.segments}
    assert sorted(start for start, _ in covered) == [0, *sorted(end for _, end in covered)[:-1]]
