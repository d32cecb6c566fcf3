"""The chunk file's format: encoding, writing, and checking the header.

    magic (8) | version u32 | header length u32 | xxh3_64 of these and the header u64
    header (msgpack) | zeros to the next 4,096 | layer 0's pages | zeros to the next 4,096 | ...

The payload begins with layer 0, and the file ends with the last layer's last byte. Every byte is
covered: the header and what precedes it by the header's checksum, pages by their layer's checksum,
padding by being zero, and the length by the header.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from vllm_kvmarket.errors import ChunkDamagedError, LayoutMismatchError
from vllm_kvmarket.identity import TOKEN_BYTES, chunk_key
from vllm_kvmarket.store.layout import CODEC_RAW, ChunkHeader, ChunkLayout

Bytes = npt.NDArray[np.uint8]
# Where buffers are Any: numpy tells type checkers that its arrays are buffers from Python 3.12 on.

MAGIC = b"KVMCHUNK"
FORMAT_VERSION = 1
ALIGNMENT = 4096
MAX_BUFFERS = min(1024, os.sysconf("SC_IOV_MAX"))
# Magic, version and header length stay where they are in every version of the format.
_FACTS = struct.Struct("<8sII")
_CHECKSUM = struct.Struct("<Q")
PREFIX_BYTES = _FACTS.size + _CHECKSUM.size

# How much is read by one call: little enough to be in the core's caches when it is hashed, enough
# for Python's part not to count.
GROUP_BYTES = 1024 * 1024

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ChunkHeader)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Where raw layers lie in the payload: each one's offset, its size, the padding behind it.

    `groups` are half-open ranges of layers that are best read at once.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    gaps: tuple[int, ...]
    groups: tuple[tuple[int, int], ...]

    @property
    def is_dense(self) -> bool:
        """Whether the layers lie one after another, without padding."""
        return not any(self.gaps)


def aligned(offset: int) -> int:
    """Round up to the next multiple of ALIGNMENT."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def checksum(buffers: Sequence[Any]) -> int:
    """xxh3_64 over dense buffers that lie one after another in the file."""
    if len(buffers) == 1:
        return xxhash.xxh3_64_intdigest(buffers[0])
    digest = xxhash.xxh3_64()
    for buffer in buffers:
        digest.update(buffer)
    return digest.intdigest()


@lru_cache(maxsize=64)
def arrange(layout: ChunkLayout, page_count: int) -> Arrangement:
    """Place layers of so many pages in the payload; remembered, as every chunk asks the same."""
    sizes = tuple(page_count * layer.page_bytes for layer in layout.layers)
    offsets = list(accumulate((aligned(size) for size in sizes[:-1]), initial=0))
    gaps = [aligned(size) - size for size in sizes[:-1]]
    groups = []
    start = 0
    for index, size in enumerate(sizes):
        if index > start and offsets[index] + size - offsets[start] > GROUP_BYTES:
            groups.append((start, index))
            start = index
    groups.append((start, len(sizes)))
    return Arrangement(tuple(offsets), sizes, (*gaps, 0), tuple(groups))


def build_header(
    *,
    key: bytes,
    parent: bytes,
    namespace: bytes,
    tokens: bytes,
    layout: ChunkLayout,
    layers: Sequence[Sequence[Bytes]],
) -> ChunkHeader:
    """Describe these pages. Raises ValueError when they do not fit the layout or the key."""
    if not tokens or len(tokens) % TOKEN_BYTES:
        raise ValueError(f"{len(tokens)} bytes are not one or more packed tokens")
    if chunk_key(namespace, parent, tokens) != key:
        raise ValueError(f"{key.hex()} is not the key of these tokens")
    place = arrange(layout, layout.page_count(len(tokens) // TOKEN_BYTES))
    sizes = tuple(sum(page.nbytes for page in layer) for layer in layers)
    dense = all(page.flags.c_contiguous for layer in layers for page in layer)
    if not sizes or sizes != place.sizes or not dense:
        raise ValueError(f"the pages of {key.hex()} do not fit the layout {layout.tag}")
    return ChunkHeader(
        key=key,
        parent=parent,
        namespace=namespace,
        tokens=tokens,
        layout=layout,
        codec=CODEC_RAW,
        layer_offsets=place.offsets,
        layer_bytes=place.sizes,
        checksums=tuple(checksum(layer) for layer in layers),
    )


def encode(header: ChunkHeader) -> bytes:
    """Everything in front of the payload, its padding included."""
    encoded = _encoder.encode(header)
    facts = _FACTS.pack(MAGIC, FORMAT_VERSION, len(encoded))
    front = facts + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(facts + encoded)) + encoded
    return front.ljust(aligned(len(front)), b"\0")


def write(descriptor: int, header: ChunkHeader, layers: Sequence[Sequence[Bytes]]) -> int:
    """Write a whole chunk file; how many bytes it has. Pages go out as they lie, unjoined.

    All of it in as few calls as can be: ext4 then keeps the file in the page cache in folios of up
    to 2 MiB, which later reads copy at twice the speed of single pages.
    """
    front = encode(header)
    buffers: list[Any] = [front]
    position = 0
    for offset, layer in zip(header.layer_offsets, layers, strict=True):
        if offset > position:
            buffers.append(bytes(offset - position))
        buffers += layer
        position = offset + sum(page.nbytes for page in layer)
    while buffers:
        buffers = unfinished(buffers, os.writev(descriptor, buffers[:MAX_BUFFERS]))
    return len(front) + position


def unfinished(buffers: list[Any], done: int) -> list[Any]:
    """Drop the first `done` bytes of dense buffers, which were transferred."""
    for index, buffer in enumerate(buffers):
        view = memoryview(buffer)
        if done < view.nbytes:
            return [view.cast("B")[done:], *buffers[index + 1 :]]
        done -= view.nbytes
    return []


def front_bytes(prefix: bytes, name: str) -> int:
    """How many bytes precede the payload, from the file's first PREFIX_BYTES.

    Nothing is verified yet. Raises ChunkDamagedError when this is no chunk file.
    """
    if len(prefix) < PREFIX_BYTES:
        raise damaged(name, f"{len(prefix)} bytes are too few for a chunk")
    magic, _, length = _FACTS.unpack_from(prefix)
    if magic != MAGIC:
        raise damaged(name, "not a chunk file")
    return aligned(PREFIX_BYTES + length)


def decode(front: bytes, name: str) -> ChunkHeader:
    """Verify and read the header from everything in front of the payload, as `encode` made it.

    Raises ChunkDamagedError, and LayoutMismatchError for an intact file of another format version.
    """
    _, version, length = _FACTS.unpack_from(front)
    (expected,) = _CHECKSUM.unpack_from(front, _FACTS.size)
    encoded = front[PREFIX_BYTES : PREFIX_BYTES + length]
    if xxhash.xxh3_64_intdigest(front[: _FACTS.size] + encoded) != expected:
        raise damaged(name, "its header is not what was stored")
    if version != FORMAT_VERSION:
        raise LayoutMismatchError(
            f"{name}: written in format {version}, this kvmarket reads {FORMAT_VERSION}; "
            "publish the document again"
        )
    if front[PREFIX_BYTES + length :].strip(b"\0"):
        raise damaged(name, "the padding behind its header is not zero")
    try:
        header = _decoder.decode(encoded)
    except msgspec.MsgspecError as error:
        raise damaged(name, f"unreadable header ({error})") from None
    _check_shape(header, name)
    return header


def _check_shape(header: ChunkHeader, name: str) -> None:
    if header.codec != CODEC_RAW:
        raise LayoutMismatchError(
            f"{name}: stored with codec {header.codec!r}, which this kvmarket cannot read; "
            "publish the document again"
        )
    place = arrange(header.layout, header.page_count)
    if (
        not header.tokens
        or len(header.tokens) % TOKEN_BYTES
        or not header.layout.layers
        or len(header.checksums) != len(header.layout.layers)
        or header.layer_offsets != place.offsets
        or header.layer_bytes != place.sizes
    ):
        raise damaged(name, "its header contradicts itself")


def damaged(name: str, what: str) -> ChunkDamagedError:
    """One wording for everything that can be wrong with a chunk's file."""
    return ChunkDamagedError(f"{name}: {what}; publish the document again to repair it")
