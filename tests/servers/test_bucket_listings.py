"""The directory in the bucket, and who may delete what from it."""

from __future__ import annotations

import time

import pytest

from tests.support.machines import Machine, objects_of
from tests.support.store_chunks import layout_of, sample
from vllm_kvmarket.core.errors import StoreError
from vllm_kvmarket.store import bucket_listings
from vllm_kvmarket.store.chunk_format import chunk_name


def test_the_directory_of_listings(machine: Machine) -> None:
    """Other homes read what one publishes, until it is withdrawn."""
    first, second = objects_of(machine()), objects_of(machine())
    assert bucket_listings.listed_documents(first) == set()
    for document_id, entry in (("kvd_2", b"two"), ("kvd_1", b"one"), ("kvd_1", b"one, again")):
        bucket_listings.publish_listing(first, entry, document_id)
    assert bucket_listings.listed_documents(second) == {"kvd_1", "kvd_2"}
    with pytest.raises(StoreError, match="is not whole"):
        bucket_listings.read_whole(second)
    assert [first.put_new(bucket_listings.MARKER, content) for content in (b"1", b"2")] == [
        True,
        False,
    ]
    assert first.get_bytes(bucket_listings.MARKER) == b"1"
    objects, found = bucket_listings.read_whole(second)
    assert list(found) == [("kvd_1", b"one, again"), ("kvd_2", b"two")]
    assert len(objects) == 3
    for _ in range(2):
        bucket_listings.withdraw_listing(second, "kvd_1")
    assert bucket_listings.read_listing(first, "kvd_1") is None
    assert bucket_listings.listed_documents(first) == {"kvd_2"}


@pytest.mark.parametrize("document_id", ["", "../x", "a/b", ".", "x" * 300, "a b"])
def test_an_id_that_is_no_name_is_refused(machine: Machine, document_id: str) -> None:
    """No id leads out of the directory."""
    with pytest.raises(ValueError, match="cannot be an object's name"):
        bucket_listings.publish_listing(objects_of(machine()), b"", document_id)


def test_collecting_the_bucket(machine: Machine) -> None:
    """Old chunks that no listing needs go, in all their shares; everything else stays."""
    store = machine()
    objects = objects_of(store)
    needed, unneeded = sample(), sample(seed=1)
    for chunk in (needed, unneeded, sample(layout_of(rank=1, world_size=2), seed=1)):
        chunk.put(store)
    others = ["listings/kvd_1", f"quarantine/{chunk_name(unneeded.key)}", "ab/notes.txt"]
    for name in others:
        objects.put_bytes(name, b"content")
    assert bucket_listings.collect(objects, objects.entries(), {needed.key}) == []
    time.sleep(1.1)  # S3 tells the time in seconds
    garbage = [chunk_name(unneeded.key), chunk_name(unneeded.key, 1, 2)]
    everything = list(objects.entries())
    dry = bucket_listings.collect(objects, everything, {needed.key}, 0.0, dry_run=True)
    assert sorted(dry) == sorted(garbage) and objects.head(garbage[0]) is not None
    gone = bucket_listings.collect(objects, everything, {needed.key}, 0.0)
    assert sorted(gone) == sorted(garbage)
    assert sorted(objects.names()) == sorted([*others, chunk_name(needed.key)])
