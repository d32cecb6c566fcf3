"""Machines that share a bucket, each with its own disk."""

from __future__ import annotations

from collections.abc import Callable

from tests.support.store_chunks import NAMESPACE, Sample
from vllm_kvmarket.store.object_tier import ObjectTier
from vllm_kvmarket.store.tiers import Tiers

Machine = Callable[..., Tiers]


def load(chunk: Sample, store: Tiers) -> None:
    """Load a chunk whole; what comes is what was stored."""
    room = chunk.room(0, chunk.page_count)
    with store.open(chunk.key, chunk.layout, NAMESPACE) as opened:
        assert opened.header.key == chunk.key
        opened.copy_all_pages(0, chunk.page_count, [[layer] for layer in room])
    chunk.assert_holds(room, 0, chunk.page_count)


def objects_of(store: Tiers) -> ObjectTier:
    """The machine's object tier."""
    assert store.objects is not None
    return store.objects
