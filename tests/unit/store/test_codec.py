"""Codecs give back every bit that they were given, and nothing but ValueError for other bytes."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.kv_pages import NUMBERS, kv_bytes
from vllm_kvmarket.store.codec import CODEC_EXPONENT, CODECS, MAX_RATIO, decode_into, encode

DTYPES = ["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2", "uint8", "int64", "?"]
# Zero, a denormal, one, the largest number, infinities, quiet and signalling NaNs with payloads.
SPECIAL = {
    "bfloat16": (0, 0x8000, 1, 0x8001, 0x3F80, 0x7F7F, 0x7F80, 0xFF80, 0x7FC1, 0xFFAB, 0x7F81),
    "float16": (0, 0x8000, 1, 0x8001, 0x3C00, 0x7BFF, 0x7C00, 0xFC00, 0x7E01, 0xFDAB, 0x7C01),
    "float32": (0, 1 << 31, 1, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC1, 0xFFABCDEF),
}


def encoded(dtype: str, layer: np.ndarray, page_bytes: int) -> np.ndarray:
    """Encode a layer in one piece."""
    return encode(CODEC_EXPONENT, dtype, [layer], page_bytes=page_bytes)


def decoded(dtype: str, stored: np.ndarray, size: int, page_bytes: int) -> np.ndarray:
    """Decode a layer into one piece of fresh memory, which held other bytes."""
    room = np.full(size, 0xAA, np.uint8)
    decode_into(CODEC_EXPONENT, dtype, stored, [room], page_bytes=page_bytes)
    return room


def assert_exact(dtype: str, layer: np.ndarray, page_bytes: int) -> int:
    """Check that a layer comes back bit for bit; how many bytes were stored."""
    before = layer.copy()
    stored = encoded(dtype, layer, page_bytes)
    assert len(stored) <= len(layer)
    np.testing.assert_array_equal(decoded(dtype, stored, len(layer), page_bytes), before)
    np.testing.assert_array_equal(layer, before)
    return len(stored)


def cut(layer: np.ndarray, places: list[int]) -> list[np.ndarray]:
    """Cut an array into pieces at these places; some may be empty."""
    return np.split(layer, sorted(place % (len(layer) + 1) for place in places))


@st.composite
def layers(draw: st.DrawFn) -> tuple[str, np.ndarray, int]:
    """A type, the bytes of a layer, and the size of its pages, which may not fit."""
    dtype = draw(st.sampled_from(DTYPES))
    page_bytes = draw(st.one_of(st.integers(1, 300), st.sampled_from([256, 2048, 4096])))
    size = draw(st.one_of(st.integers(0, 9000), st.integers(0, 4).map(lambda n: n * page_bytes)))
    seed = draw(st.integers(0, 2**32))
    kind = draw(st.sampled_from(["random", "constant", "numbers", "special", "few"]))
    rng = np.random.default_rng(seed)
    if kind == "random":
        content = rng.integers(0, 256, size, dtype=np.uint8)
    elif kind == "constant":
        content = np.full(size, seed % 256, np.uint8)
    elif kind == "numbers":
        content = kv_bytes(dtype if dtype in NUMBERS else "uint8", size + 1, seed)[:size]
    elif kind == "special":
        values = SPECIAL.get(dtype, SPECIAL["bfloat16"])
        width = np.uint32 if dtype == "float32" else np.uint16
        content = rng.choice(np.array(values, width), size + 1).view(np.uint8)[:size]
    else:
        content = rng.choice(rng.integers(0, 256, 3, dtype=np.uint8), size)
    # Anywhere in memory, also on odd addresses.
    offset = draw(st.integers(0, 3))
    return dtype, np.concatenate([np.zeros(offset, np.uint8), content])[offset:], page_bytes


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(layers(), st.lists(st.integers(0, 10_000), max_size=4), st.lists(st.integers(0, 10_000)))
def test_whatever_the_bytes_they_come_back(
    drawn: tuple[str, np.ndarray, int], cuts: list[int], other_cuts: list[int]
) -> None:
    """Any type, bits, size, page and cut: exact, never larger, and nothing beside it changes."""
    dtype, layer, page_bytes = drawn
    for codec in CODECS:
        stored = encode(codec, dtype, cut(layer, cuts), page_bytes=page_bytes)
        assert len(stored) <= len(layer)
        assert len(layer) <= MAX_RATIO * len(stored)
        room = np.full(len(layer) + 2, 7, np.uint8)
        decode_into(codec, dtype, stored, cut(room[1:-1], other_cuts), page_bytes=page_bytes)
        np.testing.assert_array_equal(room[1:-1], layer)
        assert (room[0], room[-1]) == (7, 7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_number_there_is(dtype: str) -> None:
    """All 65,536 numbers of 16 bits, in order and out of order, with whatever NaNs there are."""
    numbers = np.arange(65536, dtype=np.uint16)
    # In order, upper bytes repeat, so that it is really encoded.
    assert assert_exact(dtype, numbers.view(np.uint8), 4096) < numbers.nbytes
    assert_exact(dtype, np.random.default_rng(0).permutation(numbers).view(np.uint8), 4096)
    for value in SPECIAL[dtype]:
        constant = np.full(5000, value, np.uint16).view(np.uint8)
        assert assert_exact(dtype, constant, 1000) < 5000 * 1.02


def test_every_exponent_of_float32() -> None:
    """Each sign and exponent with mantissas of all kinds, special numbers among them."""
    upper = np.arange(65536, dtype=np.uint32) << 16
    for mantissa in (0, 1, 0xFFFF, 0x5A5A):
        assert assert_exact("float32", (upper | mantissa).view(np.uint8), 8192) < upper.nbytes
    for value in SPECIAL["float32"]:
        constant = np.full(3000, value, np.uint32).view(np.uint8)
        assert assert_exact("float32", constant, 1200) < 3000 * 3.02


@pytest.mark.parametrize("dtype", [*NUMBERS, "uint8"])
@pytest.mark.parametrize(
    ("pages", "page_bytes"),
    [
        (1, 3_000_000),  # one page, longer than a tile
        (2, 2 * 262_147),  # no long run divides it
        (3, 786_432),
        (64, 24_576),
        (5, 98_304),
    ],
)
def test_layers_of_many_tiles(dtype: str, pages: int, page_bytes: int) -> None:
    """Layers that are worked on piece by piece come back whole, whatever the pages' size."""
    numbers = kv_bytes("float16" if dtype == "uint8" else dtype, pages * page_bytes)
    assert_exact(dtype, numbers[: pages * page_bytes].copy(), page_bytes)


@pytest.mark.parametrize(
    ("dtype", "least"),
    [("bfloat16", 1.4), ("float16", 1.1), ("float32", 1.17), ("float8_e5m2", 1.2)],
)
def test_numbers_like_a_models_become_smaller(dtype: str, least: float) -> None:
    """Numbers of few scales compress; tests/engine measures those of a real model."""
    layer = kv_bytes(dtype, 200_000)
    assert len(layer) / assert_exact(dtype, layer, len(layer)) > least


def test_heads_get_tables_of_their_own() -> None:
    """Numbers of different scales at different places of a page are separated by the page size."""
    pages, run = 16, 2048
    wide = kv_bytes("bfloat16", pages * run, channels=1).reshape(pages, -1)
    # The other half of each page is 2**40 times as large.
    narrow = kv_bytes("bfloat16", pages * run, seed=1, channels=1).view(np.uint16) + (40 << 7)
    layer = np.concatenate([wide, narrow.view(np.uint8).reshape(pages, -1)], axis=1).reshape(-1)
    known = assert_exact("bfloat16", layer, 4 * run)
    assert known < 0.98 * assert_exact("bfloat16", layer, len(layer))


def test_raw_is_the_callers_memory() -> None:
    """The raw codec copies nothing, and neither codec changes what it was given."""
    layer = np.arange(100, dtype=np.uint8)
    assert np.shares_memory(encode("raw", "float16", [layer], page_bytes=10), layer)


def by_the_book(dtype: str, layer: bytes) -> bytes:
    """Encode one page as the module's text says, number by number."""
    plain, exponents = bytearray(), bytearray()
    lower = bytearray()
    width = 4 if dtype == "float32" else 2
    for start in range(0, len(layer) // width * width, width):
        number = int.from_bytes(layer[start : start + width], "little")
        if dtype == "float16":
            plain.append(number & 0xFF)
            exponents.append(number >> 8)
            continue
        if dtype == "float32":
            lower += layer[start : start + 2]
            number >>= 16
        sign, exponent, mantissa = number >> 15, number >> 7 & 0xFF, number & 0x7F
        plain.append(sign << 7 | mantissa)
        exponents.append(exponent)
    rest = layer[len(layer) // width * width :]
    return bytes(lower + plain) + rest + zstandard.ZstdCompressor(9).compress(bytes(exponents))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_format_is_what_its_description_says(dtype: str) -> None:
    """Layers that someone else encoded, with another zstd level, decode; a format that stays."""
    layer = np.concatenate([kv_bytes(dtype, 1000), np.array([1], np.uint8)])
    stored = np.frombuffer(by_the_book(dtype, layer.tobytes()), np.uint8)
    assert len(stored) < len(layer)
    np.testing.assert_array_equal(decoded(dtype, stored, len(layer), len(layer)), layer)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["bfloat16", "float16", "float32", "uint8"]),
    st.integers(0, 2000),
    st.binary(min_size=1, max_size=20),
    st.integers(-3, 3),
)
def test_bytes_that_are_no_layer(dtype: str, position: int, junk: bytes, extra: int) -> None:
    """Changed bytes are a ValueError, or other numbers, but never worse."""
    layer = kv_bytes(dtype if dtype in NUMBERS else "float16", 600)
    stored = encoded(dtype, layer, 300).tobytes()
    position %= len(stored)
    broken = stored[:position] + junk + stored[position + len(junk) :]
    broken = broken[:extra] if extra < 0 else broken + bytes(extra)
    with contextlib.suppress(ValueError):
        decoded(dtype, np.frombuffer(broken, np.uint8), len(layer), 300)


def test_a_frame_that_claims_gigabytes() -> None:
    """A zstd frame of another size than the layer is refused before it is unpacked."""
    bomb = np.frombuffer(zstandard.ZstdCompressor().compress(bytes(50_000_000)), np.uint8)
    with pytest.raises(ValueError, match="does not hold 6000 bytes"):
        decoded("uint8", bomb, 6000, 6000)
    with pytest.raises(ValueError, match="no zstd frame"):
        decoded("uint8", np.ones(50, np.uint8), 6000, 6000)
    with pytest.raises(ValueError, match="too few"):
        decoded("bfloat16", np.ones(50, np.uint8), 6000, 6000)


def test_an_unknown_codec_is_refused() -> None:
    """The error names the codecs that there are."""
    layer = np.zeros(10, np.uint8)
    with pytest.raises(ValueError, match="unknown codec 'gzip'; choose one of raw, zstd-exponent"):
        encode("gzip", "float16", [layer], page_bytes=10)
    with pytest.raises(ValueError, match="unknown codec"):
        decode_into("gzip", "float16", layer, [layer], page_bytes=10)
    with pytest.raises(ValueError, match="9 bytes for a layer of 10"):
        decode_into("raw", "float16", layer[:9], [layer], page_bytes=10)


def test_threads_do_not_disturb_each_other() -> None:
    """Layers that several threads encode and decode at once come back exact."""
    kept = [kv_bytes("bfloat16", 50_000, seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        sizes = list(pool.map(lambda layer: assert_exact("bfloat16", layer, 10_000), kept * 6))
    assert sizes == [assert_exact("bfloat16", layer, 10_000) for layer in kept] * 6
