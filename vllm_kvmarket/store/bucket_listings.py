"""A directory in the bucket: which documents the homes that share it have on offer.

One object a document under `listings/`, opaque here. A document's chunks are uploaded before its
entry is, and the entry goes before they do.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Set

from vllm_kvmarket.core.errors import StoreError
from vllm_kvmarket.store.chunk_format import share_of
from vllm_kvmarket.store.object_tier import ObjectFacts, ObjectTier

PREFIX = "listings"
# Names the store. Comes after all other names, so that a list that has it was not cut off.
MARKER = "store.json"
# Longer than tiers.FRESH_S and the longest publication together.
GRACE_S = 24 * 3600.0
_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


def publish_listing(tier: ObjectTier, entry: bytes, document_id: str) -> None:
    """Put a document's entry into the bucket, in place of what was there.

    Raises StoreError; ValueError for an id that cannot be an object's name.
    """
    tier.put_bytes(_name(document_id), entry)


def withdraw_listing(tier: ObjectTier, document_id: str) -> None:
    """Remove a document's entry if there is one. Raises as `publish_listing`."""
    tier.delete(_name(document_id))


def listed_documents(tier: ObjectTier) -> set[str]:
    """Ids of all documents that have an entry. Raises StoreError."""
    return set(listed_versions(tier))


def listed_versions(tier: ObjectTier) -> dict[str, str | None]:
    """Ids of all documents that have an entry, and the entry's version. Raises StoreError."""
    return _documents(tier.entries(PREFIX))


def _documents(objects: Iterable[ObjectFacts]) -> dict[str, str | None]:
    parts = ((*facts.name.rpartition("/"), facts.version) for facts in objects)
    return {
        last: version
        for folder, _, last, version in parts
        if folder == PREFIX and _ID.fullmatch(last)
    }


def read_listing(tier: ObjectTier, document_id: str) -> bytes | None:
    """A document's entry; None when there is none. Raises as `publish_listing`."""
    return tier.get_bytes(_name(document_id))


def still_listed(tier: ObjectTier, document_ids: Iterable[str]) -> list[str]:
    """Those documents that have an entry, asked one by one; a list can be empty by mistake."""
    return [each for each in document_ids if tier.facts(_name(each)) is not None]


def read_whole(tier: ObjectTier) -> tuple[list[ObjectFacts], Iterator[tuple[str, bytes]]]:
    """All objects, and every document's id and entry in order of the ids.

    Raises StoreError, also when the list is empty or was cut off.
    """
    objects = list(tier.entries())
    if not any(facts.name == MARKER for facts in objects):
        raise StoreError(
            f"{tier.url}: the list of its objects is not whole ({MARKER} is not in it), and "
            "nothing was deleted; try again"
        )
    documents = sorted(_documents(objects))
    entries = ((document_id, read_listing(tier, document_id)) for document_id in documents)
    # None: withdrawn meanwhile.
    return objects, ((name, entry) for name, entry in entries if entry is not None)


def collect(
    tier: ObjectTier,
    objects: Iterable[ObjectFacts],
    needed: Set[bytes],
    grace_s: float = GRACE_S,
    *,
    only: Set[bytes] | None = None,
    dry_run: bool = False,
) -> list[str]:
    """Delete chunks that no listing needs; the names of their objects, in order.

    `objects` are all that there are; `needed` are keys of every chunk of every entry, read before
    this is called. With `only`, just these chunks may go. What was written less than `grace_s` ago
    stays: its document may be about to be listed. A publisher that relies on an older object writes
    it again (tiers.FRESH_S, which `grace_s` must exceed by the time that publishing takes). Raises
    StoreError; what was deleted until then is gone.
    """
    written_before_s = time.time() - grace_s
    unneeded = sorted(
        facts.name
        for facts in objects
        if facts.modified_s < written_before_s and _is_unneeded(facts.name, needed, only)
    )
    if dry_run:
        return unneeded
    deleted = []
    for name in unneeded:
        # The list may be old by now.
        facts = tier.facts(name)
        if facts is not None and facts.modified_s < written_before_s:
            tier.delete(name)
            deleted.append(name)
    return deleted


def _is_unneeded(name: str, needed: Set[bytes], only: Set[bytes] | None) -> bool:
    folder, _, last = name.rpartition("/")
    # What is no chunk, or set aside, is none of ours to delete.
    if share_of(last) is None or folder != last[:2]:
        return False
    key = bytes.fromhex(last[:64])
    return key not in needed and (only is None or key in only)


def _name(document_id: str) -> str:
    if not _ID.fullmatch(document_id):
        raise ValueError(f"{document_id!r} cannot be an object's name; use letters, digits, . _ -")
    return f"{PREFIX}/{document_id}"
