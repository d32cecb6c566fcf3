"""What is known of a stored chunk's file: a value that store, catalogue and engine hand on."""

from __future__ import annotations

from typing import Annotated

import msgspec

from vllm_kvmarket.core.model_identity import KEY_BYTES

FINGERPRINT_BYTES = 8

Fingerprint = Annotated[
    bytes, msgspec.Meta(min_length=FINGERPRINT_BYTES, max_length=FINGERPRINT_BYTES)
]


class StoredShare(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rank's share of a chunk: its file's bytes, and what else tells it from another.

    `layout` is the digest of a layout that no other engine can convert, empty for all others, as in
    its file's name. `fingerprint` is the checksum of the file's header, which covers the checksums
    of all layers: other content has another.
    """

    key: Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
    rank: Annotated[int, msgspec.Meta(ge=0)]
    world_size: Annotated[int, msgspec.Meta(ge=1)]
    layout: str
    size_bytes: Annotated[int, msgspec.Meta(ge=0)]
    fingerprint: Fingerprint


def is_known(fingerprint: bytes, known: bytes) -> bool:
    """Whether a fingerprint is among `known`, one after another; all are when none is known."""
    width = FINGERPRINT_BYTES
    return not known or fingerprint in {
        known[start : start + width] for start in range(0, len(known), width)
    }
