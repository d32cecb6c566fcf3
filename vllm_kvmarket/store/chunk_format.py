"""The chunk file's format: encoding, writing, and checking the header.

    magic (8) | version u32 | header length u32 | xxh3_64 of these and the header u64
    header (msgpack) | zeros to the next 4,096 | layer 0's pages | zeros to the next 4,096 | ...

The payload begins with layer 0, and the file ends with the last layer's last byte. Encoded layers
follow one another without padding. Chunks of models with recurrent layers have version 2: such a
layer is the state after the chunk's last token where the chunk's key is marked, else nothing. Every
byte is covered: the header and what precedes it by the header's checksum, each layer by its own,
padding by being zero, and the length by the header.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Annotated, Any, NamedTuple, TypedDict

import msgspec
import numpy as np
import xxhash

from vllm_kvmarket.core.errors import (
    ChunkDamagedError,
    ChunkMissingError,
    LayoutMismatchError,
    StoreError,
)
from vllm_kvmarket.core.model_identity import KEY_BYTES, TOKEN_BYTES, has_state, is_key_of
from vllm_kvmarket.store import codec as codecs
from vllm_kvmarket.store.codec import CODEC_RAW, CODECS, MAX_RATIO

Bytes = codecs.Bytes
# Buffers are Any below: type checkers know that arrays are buffers only from Python 3.12 on.

SUFFIX = ".kv"
_NAME = re.compile(r"([0-9a-f]{64})(?:\.([0-9a-f]{16}))?(?:\.(\d+)of(\d+))?" + re.escape(SUFFIX))
MAGIC = b"KVMCHUNK"
# Version 1 has no layers with a state. Who reads version 2 reads both.
FORMAT_VERSION, STATE_VERSION = 1, 2
ALIGNMENT = 4096
MAX_BUFFERS = min(1024, os.sysconf("SC_IOV_MAX"))
# Magic, version and header length stay where they are in every version of the format.
_FACTS = struct.Struct("<8sII")
_CHECKSUM = struct.Struct("<Q")
PREFIX_BYTES = _FACTS.size + _CHECKSUM.size

# Bytes read by one call: few enough to be in the core's caches when they are hashed, and so many
# that the calls do not count. Between 0.4 and 4 MiB it makes 3 % (median of CPU time).
GROUP_BYTES = 1024 * 1024

# Bounds that msgspec checks when it decodes a header.
Positive = Annotated[int, msgspec.Meta(gt=0)]
Digest = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]


class LayerLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One layer's pages: the shape of a block without its block dimension, and its bytes.

    `state`: its only page is the layer's recurrent state after the chunk's last token, of these
    parts, for example "mamba2:3x96=bfloat16,8x32x16=float32".
    """

    name: str
    page_shape: tuple[int, ...]
    page_bytes: Positive
    state: str = ""


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

    @property
    def has_states(self) -> bool:
        """Whether there are layers with a recurrent state."""
        return any(layer.state for layer in self.layers)

    def page_counts(self, token_count: int, with_state: bool) -> tuple[int, ...]:
        """Count each layer's pages in a chunk of so many tokens, with its state or without."""
        pages = self.page_count(token_count)
        return tuple(int(with_state) if layer.state else pages for layer in self.layers)


def state_parts(state: str) -> Iterator[tuple[tuple[int, ...], str]]:
    """The shape and the dtype of each part of a layer's state, in the order of its bytes."""
    for part in state.partition(":")[2].split(","):
        shape, _, dtype = part.partition("=")
        yield tuple(map(int, shape.split("x"))), dtype


@lru_cache(maxsize=256)
def layout_digest(layout: ChunkLayout) -> str:
    """A short name of how pages are arranged: equal for all ranks that have the same layers."""
    alike = msgspec.structs.replace(layout, rank=0)
    return xxhash.xxh3_64_hexdigest(_encoder.encode(alike))


class ChunkHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The header of a chunk file.

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
    def has_state(self) -> bool:
        """Whether the recurrent state after the last token is a part of it."""
        return has_state(self.key)

    @property
    def token_count(self) -> int:
        """Tokens in the chunk."""
        return len(self.tokens) // TOKEN_BYTES

    @property
    def page_count(self) -> int:
        """Pages a layer that is no state."""
        return self.layout.page_count(self.token_count)

    @property
    def page_counts(self) -> tuple[int, ...]:
        """Pages of each layer."""
        return self.layout.page_counts(self.token_count, self.has_state)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ChunkHeader)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Where layers lie in the payload: each one's offset, its size, the padding behind it.

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


@dataclass(frozen=True, slots=True)
class PreparedChunk:
    """A chunk file before it is written: `size` bytes, the dense `buffers` one after another.

    Buffers of raw layers are the caller's pages, which must not change until they are written.
    """

    header: ChunkHeader
    size: int
    buffers: tuple[Any, ...]

    def write(self, descriptor: int) -> int:
        """Write everything at the file's position; returns the bytes. Raises OSError.

        In as few calls as possible: ext4 then puts the file into the page cache in folios of up to
        2 MiB, and later reads copy them at twice the speed of single pages.
        """
        buffers = list(self.buffers)
        while buffers:
            buffers = unfinished(buffers, os.writev(descriptor, buffers[:MAX_BUFFERS]))
        return self.size


@lru_cache(maxsize=64)
def arrange(layout: ChunkLayout, page_count: int, with_state: bool = False) -> Arrangement:
    """Where raw layers of so many pages lie; cached, because all chunks ask the same."""
    return _place(raw_sizes(layout, page_count, with_state), ALIGNMENT)


def arrangement(header: ChunkHeader) -> Arrangement:
    """Where the layers of a chunk lie, whatever its codec."""
    if header.codec == CODEC_RAW:
        return arrange(header.layout, header.page_count, header.has_state)
    return _place(header.layer_bytes, 1)


@lru_cache(maxsize=64)
def raw_sizes(layout: ChunkLayout, page_count: int, with_state: bool = False) -> tuple[int, ...]:
    """Bytes of each layer's pages, as an engine has them."""
    counts = layout.page_counts(page_count * layout.block_tokens, with_state)
    return tuple(
        count * layer.page_bytes for count, layer in zip(counts, layout.layers, strict=True)
    )


def _place(sizes: tuple[int, ...], alignment: int) -> Arrangement:
    padded = [-(-size // alignment) * alignment for size in sizes[:-1]]
    offsets = list(accumulate(padded, initial=0))
    gaps = [whole - size for whole, size in zip(padded, sizes, strict=False)]
    groups = []
    start = 0
    for index, size in enumerate(sizes):
        if index > start and offsets[index] + size - offsets[start] > GROUP_BYTES:
            groups.append((start, index))
            start = index
    groups.append((start, len(sizes)))
    return Arrangement(tuple(offsets), sizes, (*gaps, 0), tuple(groups))


class NewChunk(TypedDict):
    """What is stored of a chunk, by the names of `prepare`."""

    key: bytes
    parent: bytes
    namespace: bytes
    tokens: bytes
    layout: ChunkLayout
    layers: Sequence[Sequence[Bytes]]


def prepare(
    *,
    key: bytes,
    parent: bytes,
    namespace: bytes,
    tokens: bytes,
    layout: ChunkLayout,
    layers: Sequence[Sequence[Bytes]],
    codec: str = CODEC_RAW,
) -> PreparedChunk:
    """Encode and describe a chunk, so that its size is known before anything is written.

    `layers`: for each layer its pages, dense uint8 arrays, one after another. Raw pages are written
    from where they lie. Others are encoded into new memory, and decoded once as a proof.

    Raises ValueError when the pages do not fit the layout or the key, or the codec is unknown;
    StoreError when encoded pages do not decode to the same bytes.
    """
    if codec not in CODECS:
        raise ValueError(f"unknown codec {codec!r}; choose one of {', '.join(CODECS)}")
    if not tokens or len(tokens) % TOKEN_BYTES:
        raise ValueError(f"{len(tokens)} bytes are not one or more packed tokens")
    if not is_key_of(key, namespace, parent, tokens):
        raise ValueError(f"{key.hex()} is not the key of these tokens")
    pages = layout.page_count(len(tokens) // TOKEN_BYTES)
    place = arrange(layout, pages, has_state(key))
    sizes = tuple(sum(page.nbytes for page in layer) for layer in layers)
    dense = all(page.flags.c_contiguous for layer in layers for page in layer)
    if not sizes or sizes != place.sizes or not dense:
        raise ValueError(f"the pages of {key.hex()} do not fit the layout {layout.tag}")
    if codec != CODEC_RAW:
        layers = [[stored] for stored in _encode_layers(codec, layout, layers)]
        place = _place(tuple(layer[0].nbytes for layer in layers), 1)
    header = ChunkHeader(
        key=key,
        parent=parent,
        namespace=namespace,
        tokens=tokens,
        layout=layout,
        codec=codec,
        layer_offsets=place.offsets,
        layer_bytes=place.sizes,
        checksums=tuple(checksum(layer) for layer in layers),
    )
    front = encode(header)
    buffers: list[Any] = [front]
    for layer, gap in zip(layers, place.gaps, strict=True):
        buffers += layer
        if gap:
            buffers.append(bytes(gap))
    return PreparedChunk(header, len(front) + place.offsets[-1] + place.sizes[-1], tuple(buffers))


def _encode_layers(
    codec: str, layout: ChunkLayout, layers: Sequence[Sequence[Bytes]]
) -> Iterator[Bytes]:
    """Encode each layer, and decode it: a checksum of stored bytes cannot find a codec's error."""
    sizes = [sum(page.nbytes for page in layer) for layer in layers]
    scratch = np.empty(max(sizes), np.uint8)
    for layer, size, described in zip(layers, sizes, layout.layers, strict=True):
        page_bytes = described.page_bytes
        stored = codecs.encode(codec, layout.dtype, layer, page_bytes=page_bytes)
        codecs.decode_into(codec, layout.dtype, stored, [scratch[:size]], page_bytes=page_bytes)
        if checksum([scratch[:size]]) != checksum(layer):
            raise StoreError(
                f"codec {codec} does not give back what it was given; check this machine's memory, "
                'or store with codec "raw"'
            )
        yield stored


def encode(header: ChunkHeader) -> bytes:
    """Everything in front of the payload, its padding included."""
    encoded = _encoder.encode(header)
    version = STATE_VERSION if header.layout.has_states else FORMAT_VERSION
    facts = _FACTS.pack(MAGIC, version, len(encoded))
    front = facts + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(facts + encoded)) + encoded
    return front.ljust(aligned(len(front)), b"\0")


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


def fingerprint(front: bytes) -> bytes:
    """The checksum in front of the header, which covers the checksums of all layers."""
    return front[_FACTS.size : PREFIX_BYTES]


def decode(front: bytes, name: str) -> ChunkHeader:
    """Verify and read the header from everything in front of the payload, as `encode` made it.

    Raises ChunkDamagedError, and LayoutMismatchError for an intact file of another format version.
    """
    _, version, length = _FACTS.unpack_from(front)
    (expected,) = _CHECKSUM.unpack_from(front, _FACTS.size)
    encoded = front[PREFIX_BYTES : PREFIX_BYTES + length]
    if xxhash.xxh3_64_intdigest(front[: _FACTS.size] + encoded) != expected:
        raise damaged(name, "its header is not what was stored")
    if version not in {FORMAT_VERSION, STATE_VERSION}:
        raise LayoutMismatchError(
            f"{name}: written in format {version}, this kvmarket reads {FORMAT_VERSION} and "
            f"{STATE_VERSION}; publish the document again"
        )
    if front[PREFIX_BYTES + length :].strip(b"\0"):
        raise damaged(name, "the padding behind its header is not zero")
    try:
        header = _decoder.decode(encoded)
    except msgspec.MsgspecError as error:
        raise damaged(name, f"unreadable header ({error})") from None
    if header.layout.has_states != (version == STATE_VERSION):
        raise damaged(name, "its format's version contradicts its header")
    _check_shape(header, name)
    return header


def _check_shape(header: ChunkHeader, name: str) -> None:
    if header.codec not in CODECS:
        raise LayoutMismatchError(
            f"{name}: stored with codec {header.codec!r}, which this kvmarket cannot read; "
            "publish the document again"
        )
    if (
        not header.tokens
        or len(header.tokens) % TOKEN_BYTES
        or not header.layout.layers
        or len(header.checksums) != len(header.layout.layers)
        or not _sizes_are_possible(header)
        or header.layer_offsets != arrangement(header).offsets
    ):
        raise damaged(name, "its header contradicts itself")


def _sizes_are_possible(header: ChunkHeader) -> bool:
    pages = raw_sizes(header.layout, header.page_count, header.has_state)
    if header.codec == CODEC_RAW:
        return header.layer_bytes == pages
    return len(header.layer_bytes) == len(pages) and all(
        stored == raw == 0 or 0 < stored <= raw <= stored * MAX_RATIO
        for stored, raw in zip(header.layer_bytes, pages, strict=True)
    )


class Share(NamedTuple):
    """Whose part of a chunk a file is, and in which layout.

    `layout` is the digest of one that no other engine can convert, empty for all others: the first
    of these that is stored serves everybody.
    """

    rank: int = 0
    world_size: int = 1
    layout: str = ""


def chunk_name(key: bytes, rank: int = 0, world_size: int = 1, layout: str = "") -> str:
    """Where a chunk's file is in its store: `ab/abcd....kv`, or a rank's `ab/abcd....1of2.kv`.

    With the digest of a `layout` that cannot be converted, `ab/abcd....LAYOUT.1of2.kv`.
    """
    name = key.hex()
    form = f".{layout}" if layout else ""
    share = "" if world_size == 1 else f".{rank}of{world_size}"
    return f"{name[:2]}/{name}{form}{share}{SUFFIX}"


def is_chunk_file(name: str) -> bool:
    """Whether a file that is called so, without its folder, belongs to a chunk."""
    return _NAME.fullmatch(name) is not None


def share_of(name: str) -> Share | None:
    """The share that is in a file that is called so, without its folder.

    None where no share is called so: a rank that cannot be, a name with zeros in front.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    share = Share(int(found[3] or 0), int(found[4] or 1), found[2] or "")
    canonical = chunk_name(bytes.fromhex(found[1]), *share)[3:]
    return share if share.rank < share.world_size and name == canonical else None


def check_complete(key: bytes, shares: Collection[Share]) -> None:
    """Raise ChunkMissingError unless every rank's share is there, of one world size and layout.

    What is left of others does not count.
    """
    kinds = {share[1:] for share in shares} or {(1, "")}
    lacking = [
        [own for rank in range(size) if (own := Share(rank, size, layout)) not in shares]
        for size, layout in kinds
    ]
    if first := min(lacking, key=len):
        raise missing(key, *first[0])


def missing(key: bytes, rank: int = 0, world_size: int = 1, layout: str = "") -> ChunkMissingError:
    """The error for a share of a chunk that is not there."""
    name = chunk_name(key, rank, world_size, layout)[3:]
    return ChunkMissingError(f"{name}: no such chunk in the store; publish its document again")


def damaged(name: str, what: str) -> ChunkDamagedError:
    """The error for a chunk file that is not what was stored."""
    return ChunkDamagedError(f"{name}: {what}; publish the document again to repair it")
