"""Lossless codecs for a layer's pages: pure functions on bytes, exact for any bits.

`zstd-exponent` splits floating-point numbers. Their exponents repeat, and are compressed by zstd's
Huffman coder alone. The other bits are noise, and are stored as they are:

    bfloat16        sign and mantissa of each number | odd bytes | zstd frame of exponents
    float16         lower byte of each number | odd bytes | zstd frame of upper bytes
    float32         lower half of each number | as bfloat16, for the upper halves
    anything else   zstd frame of all bytes

The compressed bytes are first sorted by their place in a page. Then bytes of one head, and of K or
V alone, are together, and each zstd block of 16 KiB has a Huffman table for them, which saves 1.5 %
of all bytes. A layer that would not become smaller is stored unchanged; its size shows that. Words
are little endian; frames are plain zstd.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

Bytes = npt.NDArray[np.uint8]
_Words = npt.NDArray[np.uint16]
_WORD = np.dtype("<u2")

CODEC_RAW = "raw"
CODEC_EXPONENT = "zstd-exponent"
CODECS = (CODEC_RAW, CODEC_EXPONENT)
# A file that claims more is refused: a small file must not ask for all memory.
MAX_RATIO = 256

# Numbers are processed in tiles: small enough for a core's caches, large enough to hide Python.
_TILE = 128 * 1024
# Bytes of a number, for the types that are split.
_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Numbers that stay together when they are sorted by their place; runs of fewer are slow to copy.
_RUN = 1024
_SHORTEST_RUN = 128


def _parameters(hash_log: int) -> zstandard.ZstdCompressionParameters:
    # A target length above 0 would turn Huffman coding off; the window's size limits a block's.
    return zstandard.ZstdCompressionParameters.from_level(
        1,
        strategy=zstandard.STRATEGY_FAST,
        min_match=7,
        hash_log=hash_log,
        target_length=0,
        window_log=14,
        write_content_size=True,
        write_checksum=False,
    )


# Searching for matches costs bfloat16 time and ratio. In float16 it pays: in the first layer equal
# tokens have equal values.
_NO_MATCHES, _MATCHES = _parameters(6), _parameters(12)


class _Own(threading.local):
    """Each thread's own zstd contexts, which are not thread-safe, and costly to make."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_NO_MATCHES)
        self.matching_compressor = zstandard.ZstdCompressor(compression_params=_MATCHES)
        self.decompressor = zstandard.ZstdDecompressor()
        # Reused: the page faults of new memory cost more than the work that is done in it.
        self.words = np.empty(_TILE, _WORD)


_own = _Own()


def encode(codec: str, dtype: str, pages: Sequence[Bytes], *, page_bytes: int) -> Bytes:
    """Encode a layer: dense uint8 arrays, one after another; never makes it larger.

    `dtype` is torch's name of the numbers' type, `page_bytes` the size of a page (the arrays may be
    cut anywhere). Wrong ones only cost ratio. The result is uint8 (stored bytes,), and may be the
    caller's own memory. Raises ValueError for an unknown codec.
    """
    _check_codec(codec)
    layer = _joined(pages)
    if codec == CODEC_RAW or not layer.nbytes:
        return layer
    stored = _take_apart(layer, dtype, page_bytes)
    return stored if stored.nbytes < layer.nbytes <= stored.nbytes * MAX_RATIO else layer


def decode_into(
    codec: str, dtype: str, stored: Bytes, destinations: Sequence[Bytes], *, page_bytes: int
) -> None:
    """Decode a layer that `encode` made into dense uint8 arrays, one after another.

    Fastest into one array, with `stored` at an even address. Releases the GIL in its long steps.
    Mutates `destinations` also when it raises ValueError: for an unknown codec, and for bytes that
    are no layer of this size.
    """
    _check_codec(codec)
    size = sum(destination.nbytes for destination in destinations)
    if stored.nbytes == size:
        _scatter(stored, destinations)
        return
    if codec == CODEC_RAW:
        raise ValueError(f"{stored.nbytes} bytes for a layer of {size}")
    if len(destinations) == 1:
        _put_together(stored, destinations[0].reshape(-1), dtype, page_bytes)
        return
    layer = np.empty(size, dtype=np.uint8)
    _put_together(stored, layer, dtype, page_bytes)
    _scatter(layer, destinations)


def _check_codec(codec: str) -> None:
    if codec not in CODECS:
        raise ValueError(f"unknown codec {codec!r}; choose one of {', '.join(CODECS)}")


def _joined(pages: Sequence[Bytes]) -> Bytes:
    flat = [page.reshape(-1) for page in pages]
    if len(flat) == 1:
        return flat[0]
    return np.concatenate(flat) if flat else np.empty(0, dtype=np.uint8)


def _scatter(layer: Bytes, destinations: Sequence[Bytes]) -> None:
    start = 0
    for destination in destinations:
        stop = start + destination.nbytes
        destination.reshape(-1)[:] = layer[start:stop]
        start = stop


def _take_apart(layer: Bytes, dtype: str, page_bytes: int) -> Bytes:
    """Encode a layer; the result may be as large as the layer."""
    item_bytes = _ITEM_BYTES.get(dtype, 1)
    items = layer.nbytes // item_bytes
    body = items * item_bytes
    plain = layer.nbytes - items  # bytes that are stored as they are
    pages, places, run = _shape(items, layer.nbytes, page_bytes)
    by_place = np.empty((places, pages, run), np.uint8)
    frequent = by_place.transpose(1, 0, 2)
    stored = np.empty(layer.nbytes, np.uint8)
    stored[body - items : plain] = layer[body:]
    if item_bytes == 1:
        frequent[:] = layer.reshape(frequent.shape)
    else:
        words = layer[:body].view(_WORD)
        if item_bytes == 4:
            stored[: 2 * items].view(_WORD)[:] = words[0::2]
            words = words[1::2].copy()
        rest = stored[body - 2 * items : body - items].reshape(frequent.shape)
        _split(words.reshape(frequent.shape), frequent, rest, dtype)
    frame = _compress(by_place.reshape(-1), dtype)
    if plain + len(frame) > len(stored):
        return layer
    stored[plain : plain + len(frame)] = frame
    return stored[: plain + len(frame)]


def _split(words: _Words, frequent: Bytes, rest: Bytes, dtype: str) -> None:
    """Make two bytes of each word; all (pages, places, run). See `_join`."""
    shift = 8 if dtype == "float16" else 7
    for tile, scratch in _tiles(words.shape):
        word = words[tile]
        shifted = np.right_shift(word, shift, out=scratch.reshape(word.shape))
        frequent[tile] = shifted
        if dtype == "float16":
            rest[tile] = word
        else:
            # The sign takes the place of the exponent's last bit.
            np.right_shift(word, 8, out=shifted)
            np.bitwise_xor(shifted, word, out=shifted)
            np.bitwise_and(shifted, 0x80, out=shifted)
            rest[tile] = np.bitwise_xor(shifted, word, out=shifted)


def _put_together(stored: Bytes, layer: Bytes, dtype: str, page_bytes: int) -> None:
    """Undo `_take_apart` into a whole layer."""
    item_bytes = _ITEM_BYTES.get(dtype, 1)
    items = layer.nbytes // item_bytes
    body = items * item_bytes
    plain = layer.nbytes - items  # bytes that are stored as they are
    if stored.nbytes <= plain:
        raise ValueError(f"{stored.nbytes} bytes are too few for a layer of {layer.nbytes}")
    pages, places, run = _shape(items, layer.nbytes, page_bytes)
    frequent = _decompress(stored[plain:], items).reshape(places, pages, run).transpose(1, 0, 2)
    layer[body:] = stored[body - items : plain]
    if item_bytes == 1:
        layer.reshape(frequent.shape)[:] = frequent
        return
    rest = stored[body - 2 * items : body - items].reshape(frequent.shape)
    words = layer[:body].view(_WORD)
    if item_bytes == 2:
        _join(words.reshape(frequent.shape), frequent, rest, dtype)
        return
    upper = np.empty(frequent.shape, _WORD)
    _join(upper, frequent, rest, dtype)
    words[0::2] = stored[: 2 * items].view(_WORD)
    words[1::2] = upper.reshape(-1)


def _join(words: _Words, frequent: Bytes, rest: Bytes, dtype: str) -> None:
    """Make each word of its two bytes; all (pages, places, run).

    Every step has words of one width, which numpy does at the speed of memory: widening, then
    multiplying, as its shifts are slower.
    """
    for tile, scratch in _tiles(words.shape):
        word = words[tile]
        high = scratch.reshape(word.shape)
        high[:] = frequent[tile]
        if dtype == "float16":
            high *= 0x100
            word[:] = rest[tile]
        else:
            high *= 0x80
            # As a signed byte it brings its sign to bit 15 when it is widened.
            word.view(np.int16)[:] = rest[tile].view(np.int8)
            word &= 0x807F
        word |= high


def _tiles(shape: tuple[int, ...]) -> Iterator[tuple[tuple[slice, slice], _Words]]:
    """Cut (pages, places, run) into boxes of up to _TILE numbers, or of one run.

    With each comes this thread's memory for as many words, which is the next box's as well.
    """
    pages, places, run = shape
    words = _own.words if run <= _TILE else np.empty(run, _WORD)
    step = max(1, min(places, _TILE // run))
    page_step = max(1, _TILE // (step * run)) if step == places else 1
    for page in range(0, pages, page_step):
        for place in range(0, places, step):
            count = min(page_step, pages - page) * min(step, places - place) * run
            yield (slice(page, page + page_step), slice(place, place + step)), words[:count]


def _shape(items: int, layer_bytes: int, page_bytes: int) -> tuple[int, int, int]:
    """See a layer's numbers as (pages, places, run); as one page where pages do not divide it."""
    pages = 1
    if (
        page_bytes > 0
        and layer_bytes % page_bytes == 0
        and items % (layer_bytes // page_bytes) == 0
    ):
        pages = layer_bytes // page_bytes
    page_items = items // pages
    run = math.gcd(page_items, _RUN)
    if run < _SHORTEST_RUN:
        run = page_items
    return pages, page_items // max(run, 1), run


def _compress(content: Bytes, dtype: str) -> Bytes:
    compressor = _own.matching_compressor if dtype == "float16" else _own.compressor
    return np.frombuffer(compressor.compress(_buffer(content)), dtype=np.uint8)


def _decompress(frame: Bytes, size: int) -> Bytes:
    """Decompress a frame that must hold just so many bytes. Raises ValueError."""
    view = _buffer(frame)
    try:
        if zstandard.frame_content_size(view) != size:
            raise ValueError(f"a zstd frame does not hold {size} bytes")
        content = _own.decompressor.decompress(view, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"no zstd frame ({error})") from None
    return np.frombuffer(content, dtype=np.uint8)


def _buffer(content: Bytes) -> Any:
    # Type checkers know that arrays are buffers only from Python 3.12 on.
    return content
