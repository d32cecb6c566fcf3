"""Who offered a prefix first: the rows of the index, how they change, and the match in them.

Listings have places in the order of their first offers. A prefix belongs to the listing with the
lowest place among those that contain it. So every listing *begins* at one depth: behind the longest
prefix that it shares with any listing in front of it. Behind that depth all its prefixes are its
own, until a listing in front of it comes, or goes.

A match asks who begins at depth 0 with the request's first token, compares that listing's chunk
keys with the request's, and asks again where the two part. So it costs one look-up a segment,
however many documents there are. A key says what is in a whole chunk and in all before it; the
tokens themselves are asked for only inside the one chunk where request and listing part.

    names      document id             place
    listings   place                   the chunks' keys and everything that a match says
    begins     place                   depth, the next token (none: the listing ends there), digest
    starts     digest, next token      place of the listing that begins there with this token
    waiting    digest, place           every listing that begins there; the lowest place comes first
    points     place, depth            digest and next token where others begin on a listing's own
    owners     digest                  place and depth: the same, from the digest
    ends       time, place             when a listing's time to live is over
    facts      name                    numbers: what the index as a whole is

A digest is that of all tokens before a depth: the key that a chunk ending there would have, or the
namespace at depth 0.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from itertools import chain, takewhile
from typing import Any, NamedTuple

import msgspec

from vllm_kvmarket.catalogue.index_file import TABLES, IndexRows
from vllm_kvmarket.catalogue.listing import Listing
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.core.model_identity import (
    KEY_BYTES,
    ROOT,
    TOKEN_BYTES,
    chunk_key,
    chunks_between_states,
    document_id,
    is_key_of,
    keeps_states,
    marked,
    pack_tokens,
)

NAMES, LISTINGS, BEGINS, STARTS, WAITING, POINTS, OWNERS, ENDS, FACTS = TABLES

_MAX_TOKEN_ID = 2**32 - 1
_PLACE = struct.Struct(">Q")
_DEPTH = struct.Struct(">I")
_TIME = struct.Struct(">d")
_HEAD = struct.Struct("<II")
_BEGINNING = struct.Struct("<II")
_ENDS_AT_ONCE = 100
DOCUMENTS, CHUNKS, REVISION = b"documents", b"chunks", b"revision"
_FACTS = tuple(name for name in Listing.__dataclass_fields__ if name not in ("terms", "chunk_keys"))

# Gives a chunk's packed tokens by its key, None where they cannot be had now.
TokensOf = Callable[[bytes], bytes | None]


def common_tokens(a: bytes, b: bytes) -> int:
    """Count the leading tokens that two packed sequences share."""
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


class Asked:
    """A token sequence that is looked up: packed and hashed chunk by chunk, only as far as asked.

    `unread` is the place of a listing that may share more: a chunk's tokens could not be had.
    """

    def __init__(
        self, namespace: bytes, width: int, token_ids: Sequence[int], chunks: Sequence[bytes] = ()
    ) -> None:
        self.namespace = namespace
        self.width = width
        self.unread: bytes | None = None
        self._token_ids = token_ids
        self._chunks = list(chunks)
        self._keys: list[bytes] = []

    def chunk(self, index: int) -> bytes:
        """The packed tokens of a chunk; what lies behind an impossible token is not there."""
        while len(self._chunks) <= index:
            if self._chunks and len(self._chunks[-1]) < self.width * TOKEN_BYTES:
                return b""
            start = len(self._chunks) * self.width
            self._chunks.append(pack_valid(self._token_ids[start : start + self.width]))
        return self._chunks[index]

    def key(self, index: int) -> bytes:
        """The key of a chunk that is there."""
        while len(self._keys) <= index:
            parent = self._keys[-1] if self._keys else ROOT
            key = chunk_key(self.namespace, parent, self.chunk(len(self._keys)))
            between = chunks_between_states(self.namespace)
            has_state = between and (len(self._keys) + 1) % between == 0
            self._keys.append(marked(key) if has_state else key)
        return self._keys[index]

    def has(self, index: int, key: bytes) -> bool:
        """Whether this is the key of a chunk that is there, perhaps with a state at its end."""
        own = self.key(index)
        return key in (own, marked(own)) if keeps_states(self.namespace) else key == own

    def parent(self, index: int) -> bytes:
        """The key of the chunk before."""
        return self.key(index - 1) if index else ROOT

    def digest(self, depth: int) -> bytes:
        """The digest of the first `depth` tokens; see the module."""
        index, inside = divmod(depth, self.width)
        if inside:
            tokens = self.chunk(index)[: inside * TOKEN_BYTES]
            return chunk_key(self.namespace, self.parent(index), tokens)
        return self.key(index - 1) if index else self.namespace

    def token(self, depth: int) -> bytes:
        """The packed token behind the first `depth`, empty at the end."""
        index, inside = divmod(depth, self.width)
        start = inside * TOKEN_BYTES
        return self.chunk(index)[start : start + TOKEN_BYTES]


class Record:
    """A listing in the index: its first `matched` tokens can be matched."""

    def __init__(self, encoded: bytes) -> None:
        self.matched, self.chunk_count = _HEAD.unpack_from(encoded)
        self._encoded = encoded

    @staticmethod
    def encode(listing: Listing, matched: int, known: Sequence[bytes]) -> bytes:
        """Put a listing into one row."""
        facts = [getattr(listing, name) for name in _FACTS]
        rest = msgspec.msgpack.encode((facts, msgspec.structs.astuple(listing.terms), known))
        keys = listing.chunk_keys
        return b"".join((_HEAD.pack(matched, len(keys)), *keys, rest))

    def key(self, index: int) -> bytes:
        """The key of a chunk."""
        start = _HEAD.size + index * KEY_BYTES
        return self._encoded[start : start + KEY_BYTES]

    def decode(self) -> tuple[Listing, list[bytes]]:
        """The listing, and its chunks' known fingerprints."""
        rest = self._encoded[_HEAD.size + self.chunk_count * KEY_BYTES :]
        facts, terms, known = msgspec.msgpack.decode(rest)
        keys = tuple(self.key(index) for index in range(self.chunk_count))
        fields: dict[str, Any] = dict(zip(_FACTS, facts, strict=True))
        return Listing(**fields, terms=ListingTerms(*terms), chunk_keys=keys), known


class Owned(NamedTuple):
    """Tokens `start` to `end` of what was asked, which the listing at `place` owns."""

    place: bytes
    start: int
    end: int
    record: Record


def walk(rows: IndexRows, asked: Asked, tokens_of: TokensOf) -> list[Owned]:
    """Find who owns which part of a token sequence, up to the end of the longest prefix."""
    found: list[Owned] = []
    depth = 0
    while token := asked.token(depth):
        place = rows.get(STARTS, asked.digest(depth) + token)
        if place is None or (encoded := rows.get(LISTINGS, place)) is None:
            break
        record = Record(encoded)
        end, is_certain = _shared(rows, asked, record, depth, tokens_of)
        if not is_certain:
            asked.unread = place
        if end > depth:
            found.append(Owned(place, depth, end, record))
        if end <= depth or not is_certain:
            break
        depth = end
    return found


def _shared(
    rows: IndexRows, asked: Asked, record: Record, depth: int, tokens_of: TokensOf
) -> tuple[int, bool]:
    """Count the leading tokens that a listing shares, of which the first `depth` are known to be;
    and say whether there are certainly no more.
    """
    at = depth // asked.width
    whole = asked.width * TOKEN_BYTES
    while (
        at < record.matched // asked.width
        and len(asked.chunk(at)) == whole
        and asked.has(at, record.key(at))
    ):
        at += 1
    end = at * asked.width
    mine = asked.chunk(at)
    if end >= record.matched or not mine:
        return end, True
    theirs = (record.matched - end) * TOKEN_BYTES
    key = record.key(at)
    # The key says whether the request has all of a short last chunk, and goes on behind it.
    if (
        theirs < whole
        and theirs <= len(mine)
        and is_key_of(key, asked.namespace, asked.parent(at), mine[:theirs])
    ):
        return record.matched, True
    # Another listing begins exactly here: so nothing in front of it goes on with this token.
    if end > depth and rows.get(STARTS, asked.digest(end) + asked.token(end)) is not None:
        return end, True
    tokens = tokens_of(key)
    if tokens is None or not is_key_of(key, asked.namespace, asked.parent(at), tokens):
        return end, False
    return end + common_tokens(tokens, mine), True


def whole_document(rows: IndexRows, digest: bytes, token_count: int) -> Record | None:
    """Find the document that consists of exactly the tokens of a digest, all of them on offer."""
    record = find(rows, document_id(digest))
    # A damaged document is matched up to before its end.
    is_whole = record and record.matched == token_count == record.decode()[0].token_count
    return record if is_whole else None


def last_state(rows: IndexRows, asked: Asked, owned: Sequence[Owned]) -> tuple[int, Record | None]:
    """Find the last recurrent state that is stored of a match, at the end of a whole document or
    after so many of its chunks; and a listing that has it.
    """
    step = chunks_between_states(asked.namespace) * asked.width
    for each in reversed(owned):
        inside = each.end // step * step if step else 0
        ends = [(each.end, asked.digest(each.end))] if inside < each.end else []
        above, up_to = (each.place + _DEPTH.pack(depth) for depth in (inside, each.end))
        points = (
            (*_DEPTH.unpack_from(key, _PLACE.size), value[:KEY_BYTES])
            for key, value in rows.backwards(POINTS, above, up_to)
        )
        for end, digest in chain(ends, points):
            if whole := whole_document(rows, digest, end):
                return end, whole
        if inside > each.start:
            return inside, each.record
    return 0, None


def find(rows: IndexRows, name: str) -> Record | None:
    """Return a document's record, if it can be matched."""
    place = rows.get(NAMES, name.encode())
    encoded = rows.get(LISTINGS, place) if place is not None else None
    return Record(encoded) if encoded is not None else None


class Beginning(NamedTuple):
    """Where a listing begins: its next token is empty where it ends there. `chunks` are its own."""

    depth: int
    chunks: int
    digest: bytes
    token: bytes


class FirstOffers:
    """Changes the rows, and keeps who owns what; `width` is the tokens of a chunk."""

    def __init__(self, rows: IndexRows, width: int, tokens_of: TokensOf) -> None:
        self._rows = rows
        self._width = width
        self._tokens_of = tokens_of

    def put(
        self, listing: Listing, place: int, chunks: Sequence[bytes], known: Sequence[bytes] = ()
    ) -> None:
        """Make a document match in `chunks` (packed tokens); mutates.

        `place` is its place in the order of first offers, no two documents' the same. What there
        was of the document is replaced. From the first chunk on whose key is not that of its tokens
        nothing is matched.
        """
        asked = Asked(listing.namespace, self._width, (), chunks)
        sound = 0
        while sound < len(chunks) and asked.has(sound, listing.chunk_keys[sound]):
            sound += 1
        matched = sum(len(chunk) for chunk in chunks[:sound]) // TOKEN_BYTES
        mine = _PLACE.pack(place)
        encoded = Record.encode(listing, matched, known[:sound])
        name = listing.document_id.encode()
        before = self._rows.get(NAMES, name)
        if before == mine and self._record(before).matched == matched:
            self._forget_end(before)
            self._write(listing, mine, encoded)
            return
        if before is not None:
            self._remove(before)
        if matched:
            asked = Asked(listing.namespace, self._width, (), chunks[:sound])
            self._insert(asked, mine, matched)
            self._rows.put(NAMES, name, mine)
            self._count(DOCUMENTS, 1)
            self._write(listing, mine, encoded)

    def remove(self, name: str) -> None:
        """Make a document match no more; mutates. No tokens are asked for."""
        place = self._rows.get(NAMES, name.encode())
        if place is not None:
            self._remove(place)

    def remove_ended(self, now_s: float) -> bool:
        """Remove what has ended by now; whether there was any. Mutates then."""
        removed = False
        while ended := ended_by(self._rows, now_s):
            for place in ended:
                self._remove(place)
            removed = True
        return removed

    def _record(self, place: bytes) -> Record:
        encoded = self._rows.get(LISTINGS, place)
        assert encoded is not None
        return Record(encoded)

    def _write(self, listing: Listing, place: bytes, encoded: bytes) -> None:
        self._rows.put(LISTINGS, place, encoded)
        if listing.terms.expires_at_s is not None:
            self._rows.put(ENDS, _TIME.pack(listing.terms.expires_at_s) + place, b"")

    def _forget_end(self, place: bytes) -> Listing:
        listing, _ = self._record(place).decode()
        if listing.terms.expires_at_s is not None:
            self._rows.delete(ENDS, _TIME.pack(listing.terms.expires_at_s) + place)
        return listing

    def _insert(self, asked: Asked, mine: bytes, matched: int) -> None:
        """Find where a new listing begins, and give it what listings behind it in line owned."""
        while True:
            owned = walk(self._rows, asked, self._tokens_of)
            # The last one in front of it, and all behind it.
            touched = owned[max(0, sum(each.place < mine for each in owned) - 1) :]
            parted = [(each, self._goes_on(asked, each)) for each in touched]
            if asked.unread is None:
                break
            # Its tokens were removed, so it is off the market: that change is on its way.
            self._remove(asked.unread)
            asked.unread = None
        depth = 0
        for each, token in parted:
            if each.place < mine:
                depth = each.end
                continue
            self._forget_beginning(each.place)
            digest = asked.digest(each.end)
            self._begin(each.place, each.record.matched, each.end, digest, token)
            for at, point, following in self._points(each.place):
                if at <= each.end:
                    self._rows.delete(POINTS, each.place + _DEPTH.pack(at))
                    self._set_point(mine, at, point, following)
            self._set_point(mine, each.end, digest, asked.token(each.end))
        self._begin(mine, matched, depth, asked.digest(depth), asked.token(depth))
        for each, token in parted:
            if each.end == depth:
                self._set_point(each.place, depth, asked.digest(depth), token)

    def _goes_on(self, asked: Asked, owned: Owned) -> bytes:
        """The token with which a listing goes on behind what it shares, empty where it ends."""
        if owned.end == owned.record.matched:
            return b""
        index, inside = divmod(owned.end, self._width)
        tokens = self._tokens_of(owned.record.key(index))
        if tokens is None:
            asked.unread = owned.place
            return b""
        return tokens[inside * TOKEN_BYTES : (inside + 1) * TOKEN_BYTES]

    def _remove(self, place: bytes) -> None:
        """Give what a listing owned to those behind it in line.

        Of all that share a token of it, the lowest place is among those that begin on it.
        """
        listing = self._forget_end(place)
        self._rows.delete(NAMES, listing.document_id.encode())
        self._rows.delete(LISTINGS, place)
        self._count(DOCUMENTS, -1)
        start = self._forget_beginning(place)
        depth, digest, token = start.depth, start.digest, start.token
        points = self._points(place)
        for at, _, _ in points:
            self._rows.delete(POINTS, place + _DEPTH.pack(at))
        heirs = [self._first_waiting(point) for _, point, _ in points]
        done = 0
        while done < len(points):
            at = heirs.index(min(heirs[done:]), done)
            heir = heirs[at]
            own = self._forget_beginning(heir)
            self._begin(heir, self._record(heir).matched, depth, digest, token)
            for point in points[done:at]:
                self._set_point(heir, *point)
            depth, digest, token = points[at]
            done = at + 1
            if done < len(points) or self._first_waiting(digest):
                self._set_point(heir, depth, digest, own.token)
            else:
                self._rows.delete(OWNERS, digest)
        if not points and not self._first_waiting(digest):
            owner = self._rows.get(OWNERS, digest)
            if owner is not None:
                self._rows.delete(OWNERS, digest)
                self._rows.delete(POINTS, owner)

    def _begin(self, place: bytes, matched: int, depth: int, digest: bytes, token: bytes) -> None:
        chunks = -(-matched // self._width) - depth // self._width if token else 0
        self._rows.put(BEGINS, place, _BEGINNING.pack(depth, chunks) + digest + token)
        self._rows.put(WAITING, digest + place, b"")
        if token:
            self._rows.put(STARTS, digest + token, place)
        self._count(CHUNKS, chunks)

    def _forget_beginning(self, place: bytes) -> Beginning:
        value = self._rows.get(BEGINS, place)
        assert value is not None
        found = beginning_of(value)
        self._rows.delete(BEGINS, place)
        self._rows.delete(WAITING, found.digest + place)
        if found.token:
            self._rows.delete(STARTS, found.digest + found.token)
        self._count(CHUNKS, -found.chunks)
        return found

    def _first_waiting(self, digest: bytes) -> bytes:
        found = self._rows.scan(WAITING, digest, 1)
        return found[0][0][KEY_BYTES:] if found else b""

    def _points(self, place: bytes) -> list[tuple[int, bytes, bytes]]:
        """Where others begin on a listing's own tokens: depth, digest, next token; in order."""
        return [
            (*_DEPTH.unpack(key[len(place) :]), value[:KEY_BYTES], value[KEY_BYTES:])
            for key, value in self._rows.scan(POINTS, place)
        ]

    def _set_point(self, owner: bytes, depth: int, digest: bytes, token: bytes) -> None:
        key = owner + _DEPTH.pack(depth)
        self._rows.put(POINTS, key, digest + token)
        self._rows.put(OWNERS, digest, key)

    def _count(self, name: bytes, more: int) -> None:
        set_fact(self._rows, name, fact(self._rows, name) + more)


def beginning_of(value: bytes) -> Beginning:
    """Read a row of `begins`."""
    size = _BEGINNING.size
    depth, chunks = _BEGINNING.unpack_from(value)
    return Beginning(depth, chunks, value[size : size + KEY_BYTES], value[size + KEY_BYTES :])


def ended_by(rows: IndexRows, now_s: float) -> list[bytes]:
    """Return the places of some listings whose time to live is over, if there are any."""
    due = rows.scan(ENDS, b"", _ENDS_AT_ONCE)
    return [key[_TIME.size :] for key, _ in due if _TIME.unpack_from(key)[0] <= now_s]


def fact(rows: IndexRows, name: bytes) -> int:
    """Return one of the index's numbers, 0 at first."""
    value = rows.get(FACTS, name)
    return int.from_bytes(value, "big") if value is not None else 0


def set_fact(rows: IndexRows, name: bytes, number: int) -> None:
    """Set one of the index's numbers; mutates."""
    rows.put(FACTS, name, number.to_bytes(8, "big"))
