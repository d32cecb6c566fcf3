"""The catalogue knows what is stored of a chunk, and its matches say so."""

from __future__ import annotations

import msgspec

from tests.support.catalogue_documents import NAMESPACE, publish, revision, tokens
from vllm_kvmarket.catalogue import Catalogue
from vllm_kvmarket.core.stored_share import StoredShare, is_known

DOCUMENT = tokens(600)


def share(key: bytes, fingerprint: bytes, rank: int = 0, world_size: int = 1) -> StoredShare:
    return StoredShare(key, rank, world_size, "layout", 1000, fingerprint)


def known(catalogue: Catalogue) -> list[bytes]:
    match = catalogue.match_anywhere(NAMESPACE, DOCUMENT)
    assert match is not None
    return [chunk.known for chunk in match.chunks]


def test_a_match_names_the_fingerprints_of_its_chunks(catalogue, place):
    """Of every rank; a share that replaces another is news to every process at once."""
    first, second, third = publish(catalogue, DOCUMENT).chunk_keys
    assert known(catalogue) == [b"", b"", b""]
    ranks = [share(second, bytes([rank]) * 8, rank, 2) for rank in range(2)]
    catalogue.shares.note([share(first, b"a" * 8), *ranks])
    assert known(catalogue) == [b"a" * 8, b"\0" * 8 + b"\1" * 8, b""]
    assert catalogue.shares.of([first, second, third]) == [share(first, b"a" * 8), *ranks]
    with Catalogue.open(place) as other:
        assert known(other) == known(catalogue)
        catalogue.shares.note([share(first, b"b" * 8)])
        other.refresh()
        assert known(other)[0] == known(catalogue)[0] == b"b" * 8
        before = revision(catalogue)
        catalogue.shares.note([share(first, b"b" * 8)])
        assert revision(catalogue) == before, "nothing is new"


def test_what_was_deleted_is_not_known(catalogue):
    """A chunk that is stored anew later has new shares."""
    listing = publish(catalogue, DOCUMENT)
    first = listing.chunk_keys[0]
    catalogue.shares.note([share(first, b"a" * 8)])
    catalogue.delist(listing.document_id)
    catalogue.leftovers.release([first], lambda _: None)
    publish(catalogue, DOCUMENT)
    assert known(catalogue) == [b"", b"", b""]


def test_what_is_taken_is_counted_and_not_added_up(catalogue, place):
    """A share that replaces another counts once, and what is deleted, by whomever, no more."""
    listing = publish(catalogue, DOCUMENT)
    first, second, _ = listing.chunk_keys
    shares = [share(first, b"a" * 8), share(second, b"b" * 8, 0, 2), share(second, b"c" * 8, 1, 2)]
    catalogue.shares.note(shares)
    larger = msgspec.structs.replace(shares[0], size_bytes=1500, fingerprint=b"d" * 8)
    catalogue.shares.note([larger, shares[1]])
    with Catalogue.open(place) as other:
        assert other.shares.taken_bytes() == 3500
        other.delist(listing.document_id)
        other.leftovers.release([first], lambda _: None)
        assert other.check_integrity() == []
    assert catalogue.shares.taken_bytes() == 2000
    with catalogue._db.transaction() as db:
        # As an older version does, which does not count, while the fleet is updated.
        db.execute("DELETE FROM chunk_share WHERE key = ? AND rank = 0", (second,))
    assert catalogue.shares.taken_bytes() == 2000, "no row is read for it"
    assert catalogue.check_integrity() == ["-1000 bytes of chunks are not counted"]
    catalogue.shares.recount()
    assert catalogue.shares.taken_bytes() == 1000


def test_fingerprints_are_compared_whole():
    """Eight bytes that lie across two of them are none."""
    assert is_known(b"a" * 8, b"") and is_known(b"b" * 8, b"a" * 8 + b"b" * 8)
    assert not is_known(b"aaaabbbb", b"a" * 8 + b"b" * 8)
