"""The prefix tree over published chunks: token ids -> longest published prefix.

A node is a chunk. Children are sorted by their packed tokens, so that the one with the longest
common prefix is a neighbour of where the request's tokens would stand: a million children cost
twenty comparisons. Tokens are compared, digests never trusted: the tree does not look at keys.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from operator import attrgetter

import numpy as np

from vllm_kvmarket.catalogue.listing import Listing, Match, MatchedChunk, Segment
from vllm_kvmarket.core.model_identity import (
    ROOT,
    TOKEN_BYTES,
    chunks_between_states,
    keeps_states,
    pack_tokens,
)

_MAX_TOKEN_ID = 2**32 - 1
_tokens = attrgetter("tokens")


def common_tokens(a: bytes, b: bytes) -> int:
    """Count the leading tokens that two packed sequences share."""
    if a[:TOKEN_BYTES] != b[:TOKEN_BYTES]:
        return 0
    size = min(len(a), len(b))
    # Read as big-endian numbers, the first byte that differs is the highest one of their XOR.
    difference = int.from_bytes(a[:size], "big") ^ int.from_bytes(b[:size], "big")
    return (size - (difference.bit_length() + 7) // 8) // TOKEN_BYTES


def pack_valid(token_ids: Sequence[int]) -> bytes:
    """Pack tokens up to the first that no document can contain: a request must not fail for it."""
    try:
        return pack_tokens(token_ids)
    except ValueError:
        valid = takewhile(lambda token: 0 <= token <= _MAX_TOKEN_ID, token_ids)
        return pack_tokens(list(valid))


class Children:
    """A chunk's continuations, in the order of their tokens; never empty."""

    __slots__ = ("firsts", "nodes")

    def __init__(self, node: Node) -> None:
        self.nodes = [node]
        # Each node's `first`, in one array: the earliest of thousands is found in microseconds.
        self.firsts = array("q", [node.first])

    def index(self, tokens: bytes) -> int | None:
        """Find the child with exactly these tokens."""
        at = bisect_left(self.nodes, tokens, key=_tokens)
        return at if at < len(self.nodes) and self.nodes[at].tokens == tokens else None

    def insert(self, node: Node) -> None:
        """Add a child that is not there yet; mutates."""
        at = bisect_left(self.nodes, node.tokens, key=_tokens)
        self.nodes.insert(at, node)
        self.firsts.insert(at, node.first)

    def ended_prefixes(self, tokens: bytes) -> Iterator[Node]:
        """Find the children with listings that end there and that `tokens` begin with, longest
        first.
        """
        while tokens:
            at = bisect_right(self.nodes, tokens, key=_tokens)
            if not at:
                return
            node = self.nodes[at - 1]
            shared = common_tokens(node.tokens, tokens)
            if shared * TOKEN_BYTES == len(node.tokens):
                if node.ended:
                    yield node
                shared -= 1
            tokens = tokens[: shared * TOKEN_BYTES]

    def owners(self, tokens: bytes) -> list[tuple[int, Node]]:
        """Find who offered first what leads as far into `tokens` as any child does.

        Returns (shared tokens, child) with ever more shared tokens: of the children that share
        more than the entry before, the one with the lowest `first`.
        """
        nodes = self.nodes
        if len(nodes) == 1:  # most chunks have one continuation
            (only,) = nodes
            whole = only.tokens == tokens
            shared = len(tokens) // TOKEN_BYTES if whole else common_tokens(only.tokens, tokens)
            return [(shared, only)] if shared else []
        found: list[tuple[int, Node]] = []
        shared = low = 0
        high = len(nodes)
        while (shared + 1) * TOKEN_BYTES <= len(tokens):
            prefix = tokens[: (shared + 1) * TOKEN_BYTES]
            # The children that begin with the prefix stand side by side.
            low = bisect_left(nodes, prefix, low, high, key=_tokens)
            high = bisect_right(
                nodes, prefix, low, high, key=lambda node: node.tokens[: len(prefix)]
            )
            if low == high:
                break
            if high - low > 1:
                best = low + int(np.frombuffer(self.firsts, np.int64)[low:high].argmin())
            else:
                best = low
            shared = common_tokens(nodes[best].tokens, tokens)
            found.append((shared, nodes[best]))
        return found


class Node:
    """A chunk in the tree.

    `ended` are the places of the listings whose (undamaged) chunks end here, `first` is the lowest
    place among them and all listings below: the one that was offered first.
    """

    __slots__ = ("children", "ended", "first", "tokens")

    def __init__(self, tokens: bytes, first: int) -> None:
        self.tokens = tokens
        self.first = first
        self.ended: tuple[int, ...] = ()
        self.children: Children | None = None

    def child(self, tokens: bytes) -> Node | None:
        """Find the child with exactly these tokens."""
        if self.children is None or (at := self.children.index(tokens)) is None:
            return None
        return self.children.nodes[at]

    def add_child(self, node: Node) -> None:
        """Insert a child in order; mutates."""
        if self.children is None:
            self.children = Children(node)
        else:
            self.children.insert(node)

    def remove_child(self, node: Node) -> None:
        """Remove a child; mutates."""
        assert self.children is not None
        at = self.children.index(node.tokens)
        assert at is not None
        del self.children.nodes[at], self.children.firsts[at]
        if not self.children.nodes:
            self.children = None

    def set_first_of(self, node: Node, first: int) -> None:
        """Note that a child's `first` has changed; mutates both."""
        assert self.children is not None
        at = self.children.index(node.tokens)
        assert at is not None
        node.first = self.children.firsts[at] = first

    def earliest(self) -> int:
        """Compute what `first` must be. Raises ValueError for a node without listings."""
        places = list(self.ended)
        if self.children is not None:
            places.append(int(np.frombuffer(self.children.firsts, np.int64).min()))
        return min(places)


@dataclass(frozen=True, slots=True)
class Entry:
    """A listing in the tree: its place in the order of first offers, its nodes from the namespace's
    root down, and the known fingerprints of each chunk.
    """

    place: int
    path: tuple[Node, ...]
    known: tuple[bytes, ...] = ()


class PrefixTree:
    """Every chunk that can be matched, by namespace.

    Any number of threads may match while one at a time puts and removes.
    """

    def __init__(self, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens
        self.chunk_count = 0
        self.roots: dict[bytes, Node] = {}
        self.entries: dict[str, Entry] = {}
        self._listings: dict[int, Listing] = {}
        # Held for microseconds: what a change needs is prepared before it is taken.
        self._lock = threading.Lock()

    def put(
        self, listing: Listing, place: int, chunks: Sequence[bytes], known: tuple[bytes, ...] = ()
    ) -> None:
        """Make a document match in `chunks` (packed tokens, at least one chunk); mutates.

        `place` is its place in the order of first offers, no two documents' the same. What the tree
        had of the document is replaced in one step.
        """
        assert chunks
        entry = self.entries.get(listing.document_id)
        if entry is not None and entry.place == place and len(entry.path) == len(chunks) + 1:
            with self._lock:
                self._listings[place] = listing
                self.entries[listing.document_id] = Entry(place, entry.path, known)
        elif entry is not None:
            with self._lock:
                self._detach(listing)
                self._attach(listing, place, *self._prepare(listing, place, chunks), known)
        else:
            path, fresh = self._prepare(listing, place, chunks)
            with self._lock:
                self._attach(listing, place, path, fresh, known)

    def remove(self, document_id: str) -> None:
        """Make a document match no more; chunks that no other listing has go too; mutates."""
        entry = self.entries.get(document_id)
        if entry is not None:
            with self._lock:
                self._detach(self._listings[entry.place])

    def match(self, namespace: bytes, token_ids: Sequence[int]) -> Match | None:
        """Find the longest published prefix of `token_ids`, down to inside a chunk.

        Each of its tokens belongs to the listing that was the first to offer the prefix up to it.
        Where the model keeps a state, it ends with the last one that is stored.
        """
        with self._lock:
            last = None
            if keeps_states(namespace):
                end, last = self._last_state(namespace, token_ids)
                token_ids = token_ids[:end]
            found, whole = self._find(namespace, token_ids)
            if not found:
                return None
            segments = []
            start = 0
            for end, place in found:
                segments.append(Segment(self._listings[place], start, end))
                start = end
            last = last or segments[-1].listing
            entry = self.entries[last.document_id]
            path, known = entry.path[1:], entry.known
        keys = last.chunk_keys
        chunks = []
        for index, node in enumerate(path[: -(-start // self.chunk_tokens)]):
            count = len(node.tokens) // TOKEN_BYTES
            chunks.append(
                MatchedChunk(
                    key=keys[index],
                    parent=keys[index - 1] if index else ROOT,
                    tokens=node.tokens,
                    token_count=count,
                    matched=min(count, start - index * self.chunk_tokens),
                    known=known[index] if known else b"",
                )
            )
        return Match(tuple(segments), start, tuple(chunks), whole)

    def listing(self, document_id: str) -> Listing | None:
        """Return a document's listing, None when it cannot be matched."""
        with self._lock:
            entry = self.entries.get(document_id)
            return self._listings[entry.place] if entry is not None else None

    def _find(
        self, namespace: bytes, token_ids: Sequence[int]
    ) -> tuple[list[tuple[int, int]], Listing | None]:
        """Return (end, place) of each segment of the longest match, in order; and the document that
        is exactly the match.
        """
        found: list[tuple[int, int]] = []
        last: tuple[Node, bytes] | None = None
        node = self.roots.get(namespace)
        total = 0
        # Packed chunk by chunk: a request that matches nothing costs one chunk, however long.
        while node is not None and node.children is not None:
            tokens = pack_valid(token_ids[total : total + self.chunk_tokens])
            owners = node.children.owners(tokens)
            for shared, child in owners:
                # One listing may own the end of a chunk and the beginning of the next.
                if found and found[-1][1] == child.first:
                    found.pop()
                found.append((total + shared, child.first))
            if not owners:
                break
            shared, child = owners[-1]
            last = node, tokens[: shared * TOKEN_BYTES]
            if shared < self.chunk_tokens:
                break
            total += self.chunk_tokens
            node = child
        end = last[0].child(last[1]) if last is not None else None
        ended = [self._listings[place] for place in end.ended] if end is not None else []
        whole = [listing for listing in ended if listing.token_count == found[-1][0]]
        return found, whole[0] if whole else None

    def _last_state(self, namespace: bytes, token_ids: Sequence[int]) -> tuple[int, Listing | None]:
        """Find the last state that is stored of what the tokens begin with, at the end of a
        document or after so many of its chunks; and a document that has it.
        """
        node, total = self.roots.get(namespace), 0
        step = chunks_between_states(namespace) * self.chunk_tokens
        best: tuple[int, Listing | None] = 0, None
        while node is not None and node.children is not None:
            tokens = pack_valid(token_ids[total : total + self.chunk_tokens])
            for child in node.children.ended_prefixes(tokens):
                end = total + len(child.tokens) // TOKEN_BYTES
                ended = [self._listings[place] for place in sorted(child.ended)]
                # A damaged document ends in the tree before its end.
                whole = [listing for listing in ended if listing.token_count == end]
                if whole:
                    best = end, whole[0]
                    break
            node, total = node.child(tokens), total + self.chunk_tokens
            if step and total % step == 0 and node is not None and total <= len(token_ids):
                best = total, self._listings[node.first]
        return best

    def _prepare(
        self, listing: Listing, place: int, chunks: Sequence[bytes]
    ) -> tuple[list[Node], list[Node]]:
        """Find the nodes that are there already, and make those that are not; mutates nothing."""
        path = [self.roots.get(listing.namespace) or Node(b"", place)]
        for tokens in chunks:
            child = path[-1].child(tokens)
            if child is None:
                break
            path.append(child)
        fresh = [Node(tokens, place) for tokens in chunks[len(path) - 1 :]]
        for parent, child in pairwise(fresh):
            parent.add_child(child)
        return path, fresh

    def _attach(  # ruff counts the instance
        self,
        listing: Listing,
        place: int,
        path: list[Node],
        fresh: list[Node],
        known: tuple[bytes, ...],
    ) -> None:
        if fresh:
            path[-1].add_child(fresh[0])
        self.roots[listing.namespace] = path[0]
        path[0].first = min(path[0].first, place)
        for parent, node in pairwise(path):
            if place < node.first:
                parent.set_first_of(node, place)
        path += fresh
        path[-1].ended += (place,)
        self.chunk_count += len(fresh)
        self.entries[listing.document_id] = Entry(place, tuple(path), known)
        self._listings[place] = listing

    def _detach(self, listing: Listing) -> None:
        entry = self.entries.pop(listing.document_id)
        place, path = entry.place, entry.path
        path[-1].ended = tuple(other for other in path[-1].ended if other != place)
        for parent, node in zip(path[-2::-1], path[:0:-1], strict=True):
            if not node.ended and node.children is None:
                parent.remove_child(node)
                self.chunk_count -= 1
            elif node.first == place:
                parent.set_first_of(node, node.earliest())
        if path[0].children is None:
            del self.roots[listing.namespace]
        elif path[0].first == place:
            path[0].first = path[0].earliest()
        del self._listings[place]
