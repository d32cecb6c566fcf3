"""How a chunk's bytes are arranged: the layout of the pages, and the header in front of them."""

from __future__ import annotations

from typing import Annotated

import msgspec

from vllm_kvmarket.core.model_identity import KEY_BYTES, TOKEN_BYTES

# Bounds that msgspec checks when it decodes a header.
Positive = Annotated[int, msgspec.Meta(gt=0)]
Digest = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]


class LayerLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer's pages: the shape of a block without its block dimension, and its bytes."""

    name: str
    page_shape: tuple[int, ...]
    page_bytes: Positive


class ChunkLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one rank of one backend arranges pages. Equal layouts are a straight copy of each other.

    `tag` says what shape and dtype do not: the order inside a page, and how kernels pack it.
    """

    tag: str
    dtype: str
    block_tokens: Positive
    layers: tuple[LayerLayout, ...]
    rank: int = 0
    world_size: int = 1

    def page_count(self, token_count: int) -> int:
        """Count the pages that hold `token_count` tokens; the last may be partly filled."""
        return -(-token_count // self.block_tokens)


class ChunkHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a chunk file says of itself.

    `tokens` are little-endian uint32. `codec` is one of codec.CODECS. `layer_offsets` count from
    the start of the payload, `layer_bytes` are what a layer takes in the file, as its codec left
    it, `checksums` are xxh3_64 of just these bytes.
    """

    key: Digest
    parent: Digest
    namespace: Digest
    tokens: bytes
    layout: ChunkLayout
    codec: str
    layer_offsets: tuple[int, ...]
    layer_bytes: tuple[int, ...]
    checksums: tuple[int, ...]

    @property
    def token_count(self) -> int:
        """Tokens in the chunk."""
        return len(self.tokens) // TOKEN_BYTES

    @property
    def page_count(self) -> int:
        """Pages a layer."""
        return self.layout.page_count(self.token_count)
