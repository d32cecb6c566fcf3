"""A stored chunk comes back bit for bit, whole or in part, in any memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.kv_pages import NUMBERS, kv_bytes, kv_sample
from tests.support.store_chunks import DENSE, NAMESPACE, PADDED, Sample, layout_of, sample
from vllm_kvmarket.core.errors import (
    ChunkDamagedError,
    ChunkMissingError,
    LayoutMismatchError,
    StoreError,
)
from vllm_kvmarket.core.model_identity import KEY_BYTES
from vllm_kvmarket.store import (
    ChunkLayout,
    DiskStore,
    LayerLayout,
    aligned_empty,
    chunk_format,
    open_chunk,
)
from vllm_kvmarket.store import codec as codec_module
from vllm_kvmarket.store.chunk_format import ALIGNMENT, GROUP_BYTES, arrange
from vllm_kvmarket.store.codec import CODECS


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    return DiskStore(tmp_path / "chunks")


@pytest.mark.parametrize("page_bytes", [PADDED, DENSE, 4])
def test_a_chunk_comes_back_as_it_was_stored(store: DiskStore, page_bytes: int) -> None:
    """Layers with and without padding behind them are loaded bit for bit."""
    chunk = sample(layout_of(page_bytes))
    assert chunk.put(store) == store.path(chunk.key).stat().st_size
    chunk.load(store)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", NUMBERS)
def test_codecs_load_alike(tmp_path: Path, codec: str, dtype: str) -> None:
    """Whole, in part, a layer alone, into many buffers: what a codec stored comes back exactly."""
    store = DiskStore(tmp_path / "chunks", codec=codec)
    chunk = kv_sample(dtype, pages=3)
    size = chunk.put(store)
    path = store.path(chunk.key)
    assert path.stat().st_size == size
    assert (size < 4096 + sum(layer.nbytes for layer in chunk.pages)) == (codec != "raw")
    chunk.load(store)
    store.verify(chunk.key)
    with store.open(chunk.key, chunk.layout, NAMESPACE) as stored:
        assert stored.header.codec == codec
        np.testing.assert_array_equal(stored.layer(1), chunk.pages[1].reshape(-1))
        parts = [np.zeros(length, np.uint8) for length in (1, 2048, 2047)]
        stored.copy_pages(2, 1, 3, parts)
        np.testing.assert_array_equal(np.concatenate(parts), chunk.pages[2][1:].reshape(-1))
    # A store with another codec reads it as well, and finds nothing to do.
    assert chunk.put(DiskStore(store.root)) == 0


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("chunk", [sample(), kv_sample(), kv_sample("float32", layers=70)])
def test_the_size_is_known_before_anything_is_written(
    tmp_path: Path, chunk: Sample, codec: str
) -> None:
    """A prepared chunk says how large its file will be; writing it makes just that file."""
    prepared = chunk_format.prepare(
        key=chunk.key,
        parent=chunk.parent,
        namespace=chunk.namespace,
        tokens=chunk.tokens,
        layout=chunk.layout,
        layers=[list(layer) for layer in chunk.pages],
        codec=codec,
    )
    with (tmp_path / "file").open("wb") as file:
        assert prepared.write(file.fileno()) == prepared.size
    assert (tmp_path / "file").stat().st_size == prepared.size
    with open_chunk(tmp_path / "file", chunk.key, chunk.layout, NAMESPACE) as stored:
        assert stored.header == prepared.header
        stored.verify()


def test_a_codec_that_is_not_exact_stores_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that decodes to something else, as with bad memory, is never written."""
    chunk = kv_sample()
    facts = {
        "key": chunk.key,
        "parent": chunk.parent,
        "namespace": chunk.namespace,
        "tokens": chunk.tokens,
        "layout": chunk.layout,
        "layers": [[layer] for layer in chunk.pages],
    }
    with pytest.raises(ValueError, match="unknown codec 'gzip'"):
        chunk_format.prepare(**facts, codec="gzip")
    real = codec_module.encode

    def forgetful(*args: object, **named: object) -> np.ndarray:
        stored = real(*args, **named)
        stored[5] ^= 1
        return stored

    monkeypatch.setattr(codec_module, "encode", forgetful)
    with pytest.raises(StoreError, match="does not give back what it was given"):
        chunk_format.prepare(**facts, codec="zstd-exponent")


def test_the_header_tells_what_the_chunk_is(store: DiskStore) -> None:
    """An open chunk says its key, parent, namespace, tokens, layout and sizes."""
    chunk = sample(token_count=9)
    chunk.put(store)
    with store.open(chunk.key, chunk.layout, NAMESPACE) as stored:
        header = stored.header
        assert (header.key, header.parent) == (chunk.key, chunk.parent)
        assert (header.namespace, header.tokens) == (NAMESPACE, chunk.tokens)
        assert (header.token_count, header.page_count) == (9, 3)
        assert header.layout == chunk.layout
        assert header.layer_bytes == (300, 300, 300)
        assert all(offset % ALIGNMENT == 0 for offset in header.layer_offsets)


def test_one_layer_can_be_had_alone(store: DiskStore) -> None:
    """layer() returns a verified copy that outlives the chunk."""
    chunk = sample()
    chunk.put(store)
    with store.open(chunk.key, chunk.layout, NAMESPACE) as stored:
        layer = stored.layer(1)
    np.testing.assert_array_equal(layer, chunk.pages[1].reshape(-1))


def test_pages_can_be_scattered_over_many_buffers(store: DiskStore) -> None:
    """A destination may be cut anywhere, also where no page ends."""
    chunk = sample(layout_of(DENSE))
    chunk.put(store)
    with store.open(chunk.key, chunk.layout, NAMESPACE) as stored:
        parts = [np.zeros(size, np.uint8) for size in (1, DENSE - 2, 3, DENSE - 2)]
        stored.copy_pages(2, 0, 2, parts)
    np.testing.assert_array_equal(np.concatenate(parts), chunk.pages[2].reshape(-1))


def test_more_buffers_than_one_call_takes(store: DiskStore) -> None:
    """Thousands of buffers are written and read, though the kernel takes 1,024 at once."""
    layout = layout_of(2, layers=2, block_tokens=1)
    chunk = sample(layout, token_count=2500)
    chunk.put(store)
    room = chunk.room(0, 2500)
    with store.open(chunk.key, layout, NAMESPACE) as stored:
        stored.copy_all_pages(0, 2500, [list(layer) for layer in room])
    chunk.assert_holds(room, 0, 2500)


def test_a_chunk_of_several_groups_of_layers(store: DiskStore) -> None:
    """Layers that are read in more than one call end up in their own places."""
    layout = layout_of(GROUP_BYTES // 4, layers=9)
    chunk = sample(layout)
    chunk.put(store)
    chunk.load(store)


@pytest.mark.parametrize("page_bytes", [1, PADDED, DENSE, 96 * 1024, GROUP_BYTES])
def test_groups_are_as_large_as_they_may_be(page_bytes: int) -> None:
    """Groups follow one another over all layers; each is filled, none is over its limit."""
    place = arrange(layout_of(page_bytes, layers=70), 2)

    def extent(start: int, stop: int) -> int:
        return place.offsets[stop - 1] + place.sizes[stop - 1] - place.offsets[start]

    assert [start for start, _ in place.groups] == [0, *(stop for _, stop in place.groups[:-1])]
    assert place.groups[-1][1] == 70
    for start, stop in place.groups:
        assert stop == start + 1 or extent(start, stop) <= GROUP_BYTES
        assert stop == 70 or extent(start, stop + 1) > GROUP_BYTES


def test_a_header_longer_than_the_first_read(store: DiskStore) -> None:
    """A model with hundreds of layers has a header that takes a second read."""
    chunk = sample(layout_of(layers=400))
    chunk.put(store)
    chunk.load(store)


def test_the_largest_read_and_write_counts_are_honoured(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that transfer less than they were asked for are continued where they stopped."""
    real_read, real_write = os.preadv, os.writev

    def short_read(descriptor, buffers, position):
        return real_read(descriptor, [memoryview(buffers[0]).cast("B")[:77]], position)

    def short_write(descriptor, buffers):
        return real_write(descriptor, [memoryview(buffers[0]).cast("B")[:33]])

    monkeypatch.setattr(os, "preadv", short_read)
    monkeypatch.setattr(os, "writev", short_write)
    for page_bytes in (PADDED, DENSE):
        chunk = sample(layout_of(page_bytes))
        chunk.put(store)
        chunk.load(store)


@st.composite
def chunks(draw: st.DrawFn) -> tuple[Sample, int, int]:
    """A chunk of any shape, and a range of its pages."""
    sizes = draw(st.lists(st.integers(1, 9000), min_size=1, max_size=5))
    layout = ChunkLayout(
        tag=draw(st.text(max_size=5)),
        dtype=draw(st.sampled_from(["uint8", *NUMBERS])),
        block_tokens=draw(st.integers(1, 5)),
        layers=tuple(
            LayerLayout(name=draw(st.text(max_size=3)), page_shape=(size,), page_bytes=size)
            for size in sizes
        ),
    )
    chunk = sample(layout, token_count=draw(st.integers(1, 20)), seed=draw(st.integers(0, 2**32)))
    if layout.dtype in NUMBERS and draw(st.booleans()):
        for layer in chunk.pages:
            layer[:] = kv_bytes(layout.dtype, layer.size)[: layer.size].reshape(layer.shape)
    first = draw(st.integers(0, chunk.page_count - 1))
    return chunk, first, draw(st.integers(first + 1, chunk.page_count))


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(chunks(), st.sampled_from(CODECS))
def test_any_range_of_pages_of_any_layout(drawn: tuple[Sample, int, int], codec: str) -> None:
    """With any sizes and codec, each range of pages is as stored, and no byte beside it."""
    chunk, first, last = drawn
    with tempfile.TemporaryDirectory() as folder:
        store = DiskStore(Path(folder), codec=codec)
        chunk.put(store)
        assert chunk.put(store) == 0
        with store.open(chunk.key, chunk.layout, NAMESPACE) as stored:
            around = [
                np.full((layer.shape[0] + 2, layer.shape[1]), 7, np.uint8) for layer in chunk.pages
            ]
            stored.copy_all_pages(first, last, [[room[1 + first : 1 + last]] for room in around])
            for index, room in enumerate(around):
                expected = np.full_like(room, 7)
                expected[1 + first : 1 + last] = chunk.pages[index][first:last]
                np.testing.assert_array_equal(room, expected)
                one = np.zeros_like(chunk.pages[index][first:last])
                stored.copy_pages(index, first, last, list(one))
                np.testing.assert_array_equal(one, chunk.pages[index][first:last])


@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 1), (1, 0), (-1, 1), (0, 3), (2, 3)])
def test_pages_that_do_not_exist_are_refused(store: DiskStore, first: int, last: int) -> None:
    """A range outside the chunk is the caller's mistake, and touches nothing."""
    chunk = sample()
    chunk.put(store)
    room = chunk.room(0, 2)
    with store.open(chunk.key, chunk.layout, NAMESPACE) as stored:
        with pytest.raises(ValueError, match="has no pages"):
            stored.copy_all_pages(first, last, [[layer] for layer in room])
        with pytest.raises(ValueError, match="has no pages"):
            stored.copy_pages(0, first, last, [room[0]])
    assert all((layer == 0xAA).all() for layer in room)


def test_room_that_does_not_fit_is_refused(store: DiskStore) -> None:
    """Too much room, too little room or too few layers touch nothing."""
    chunk = sample()
    chunk.put(store)
    room = chunk.room(0, 2)
    with store.open(chunk.key, chunk.layout, NAMESPACE) as stored:
        with pytest.raises(ValueError, match="200 bytes for 1 pages of layer 0"):
            stored.copy_all_pages(0, 1, [[layer] for layer in room])
        with pytest.raises(ValueError, match="100 bytes for 2 pages of layer 2"):
            stored.copy_all_pages(0, 2, [[room[0]], [room[1]], [room[2][:1]]])
        with pytest.raises(ValueError, match="2 layers instead of all"):
            stored.copy_all_pages(0, 2, [[layer] for layer in room[:2]])
    assert all((layer == 0xAA).all() for layer in room)


def test_a_closed_chunk_cannot_be_read(store: DiskStore) -> None:
    """Reading after close is a mistake, not a damaged chunk; closing twice is none."""
    chunk = sample()
    chunk.put(store)
    stored = store.open(chunk.key, chunk.layout, NAMESPACE)
    stored.close()
    stored.close()
    with pytest.raises(AssertionError):
        stored.layer(0)


def test_a_chunk_that_is_not_there(store: DiskStore) -> None:
    """Opening or verifying what nobody stored says that it is missing."""
    chunk = sample()
    with pytest.raises(ChunkMissingError, match="no such chunk"):
        store.open(chunk.key, chunk.layout, NAMESPACE)
    with pytest.raises(ChunkMissingError, match="no such chunk"):
        store.verify(chunk.key)


@pytest.mark.parametrize(
    "other",
    [
        layout_of(tag="102/test-tokens"),
        layout_of(dtype="float16"),
        layout_of(2 * PADDED, block_tokens=8),
        layout_of(page_bytes=PADDED + 4),
        layout_of(layers=2),
    ],
)
def test_another_layout_is_a_mismatch(store: DiskStore, other: ChunkLayout) -> None:
    """A whole chunk in another layout is no damage: the error says which layouts differ."""
    chunk = sample()
    chunk.put(store)
    with pytest.raises(LayoutMismatchError, match=r"stored as 012/test-tokens in blocks of 4"):
        store.open(chunk.key, other, NAMESPACE)


def test_another_namespace_is_refused(store: DiskStore) -> None:
    """A chunk is never handed out for a namespace that it was not stored in."""
    chunk = sample()
    chunk.put(store)
    with pytest.raises(ChunkDamagedError, match="another namespace"):
        store.open(chunk.key, chunk.layout, bytes(KEY_BYTES))


def test_ranks_keep_their_shares_apart(store: DiskStore) -> None:
    """With several ranks each has its own file under the same key."""
    shares = [sample(layout_of(rank=rank, world_size=2), seed=0) for rank in (0, 1)]
    for share in shares:
        share.pages[0][0, 0] = share.layout.rank
        share.put(store)
    for share in shares:
        share.load(store)
    key = shares[0].key
    assert store.has(key, 0, 2)
    assert store.has(key, 1, 2)
    assert not store.has(key)
    store.verify(key)
    assert list(store.keys()) == [key]


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 4096, 1_000_003])
def test_aligned_memory_begins_on_a_cache_line(size: int) -> None:
    """aligned_empty has the size that was asked for, and an address that is a multiple of 64."""
    memory = aligned_empty(size)
    assert memory.nbytes == size
    assert size == 0 or memory.ctypes.data % 64 == 0
    memory.fill(1)
