"""Chunks of other block sizes, packings and ranks: not one element is lost, moved or made up."""

from __future__ import annotations

import dataclasses
import re
from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.support.layout_pages import (
    AMX,
    DTYPES,
    HND,
    NAMESPACE,
    NHD,
    VEC,
    Chunk,
    Model,
    assert_loads,
    chunk_of,
    load,
    pages_of,
    put,
)
from vllm_kvmarket.core.errors import ChunkDamagedError, ChunkMissingError, LayoutMismatchError
from vllm_kvmarket.core.model_identity import ROOT
from vllm_kvmarket.store import ChunkLayout, DiskStore, LayerLayout, Tiers
from vllm_kvmarket.store.conversion import (
    as_floats,
    canonical,
    copy_converted,
    is_usable,
    token_count,
    why_not,
)
from vllm_kvmarket.store.packings import clear_slots


@pytest.fixture
def store(tmp_path):
    return Tiers(DiskStore(tmp_path / "chunks"), None)


@pytest.mark.parametrize("tokens", [256, 255, 100, 16, 1])
@pytest.mark.parametrize(("old", "new"), [(128, 16), (128, 32), (16, 128), (64, 256), (32, 64)])
def test_another_block_size_holds_the_same_tokens(store, old, new, tokens):
    """Blocks of 16 to 256 tokens, chunks that end anywhere in a block."""
    chunk = chunk_of(Model(), tokens)
    put(store, chunk, chunk.model.layout(old))
    assert_loads(store, chunk, chunk.model.layout(new))
    assert token_count(store, chunk.key, chunk.model.layout(new), NAMESPACE) == tokens


@pytest.mark.parametrize("new", [VEC, AMX, HND, NHD])
@pytest.mark.parametrize("old", [VEC, AMX, HND, NHD])
def test_every_packing_becomes_every_other(store, old, new):
    """CPU kernels' tiles and GPUs' NHD and HND; of these only "vec" has run here in an engine."""
    chunk = chunk_of(Model(heads=3), 201)
    put(store, chunk, chunk.model.layout(64, old))
    assert_loads(store, chunk, chunk.model.layout(32, new))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_elements_of_any_width_are_moved_unchanged(store, dtype):
    """Bits are moved, numbers never looked at."""
    chunk = chunk_of(Model(dtype=dtype), 201)
    for tag in (VEC, NHD):
        put(store, chunk, chunk.model.layout(128, tag))
        assert_loads(store, chunk, chunk.model.layout(16, tag))


RANKS = [(1, 2), (2, 1), (2, 4), (4, 2), (1, 4), (4, 1)]


@pytest.mark.parametrize(("old", "new"), RANKS)
def test_other_ranks_get_their_heads(store, old, new):
    """One to four ranks, with another block size as well."""
    chunk = chunk_of(Model(), 201)
    for rank in range(old):
        put(store, chunk, chunk.model.layout(128, rank=rank, world_size=old))
    for rank in range(new):
        for block in (32, 128):
            layout = chunk.model.layout(block, rank=rank, world_size=new)
            assert_loads(store, chunk, layout)
            assert is_usable(store, chunk.key, layout, NAMESPACE)


@pytest.mark.parametrize(("old", "new"), [(1, 4), (4, 1), (2, 4), (4, 2)])
def test_more_ranks_than_heads_share_a_head(store, old, new):
    """Two heads on four ranks: two neighbours hold the same one, which the tag says."""
    chunk = chunk_of(Model(heads=2), 201)

    def ranks(count):
        made = partial(chunk.model.layout, 64, world_size=count, replicas=max(1, count // 2))
        return [made(rank=rank) for rank in range(count)]

    for layout in ranks(old):
        put(store, chunk, layout)
    for layout in ranks(new):
        assert_loads(store, chunk, layout)


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_any_layout_becomes_any_other(tmp_path_factory, data):
    """Against pages written element by element: random packings, blocks, ranks, lengths, parts."""
    model = Model(heads=4, dim=16, layers=1)
    tags = st.sampled_from([VEC, AMX, HND, NHD])
    blocks = st.sampled_from([16, 32, 48, 64, 128])
    worlds = st.sampled_from([1, 2, 4])
    tokens = data.draw(st.integers(1, 200))
    store = Tiers(DiskStore(tmp_path_factory.mktemp("any")), None)
    chunk = chunk_of(model, tokens)
    tag, block, world = data.draw(tags), data.draw(blocks), data.draw(worlds)
    shares = [model.layout(block, tag, rank, world) for rank in range(world)]
    for share in shares:
        put(store, chunk, share)
    world = data.draw(worlds)
    rank = data.draw(st.integers(0, world - 1))
    target = model.layout(data.draw(blocks), data.draw(tags), rank, world)
    # Its own layout is copied as it lies, unused slots and all.
    assume(target not in shares)
    assert_loads(store, chunk, target)


def test_a_share_that_is_not_there_is_made_up_from_others(store):
    """Rank 1 of 2 is gone: its heads come from the four-rank shares that hold them."""
    chunk = chunk_of(Model())
    put(store, chunk, chunk.model.layout(128, rank=0, world_size=2))
    layout = chunk.model.layout(128)
    with pytest.raises(ChunkMissingError, match="not in the store for all heads"):
        load(store, chunk, layout)
    assert not is_usable(store, chunk.key, layout, NAMESPACE)
    for rank in (2, 3):
        put(store, chunk, chunk.model.layout(64, rank=rank, world_size=4))
    assert_loads(store, chunk, layout)
    assert is_usable(store, chunk.key, layout, NAMESPACE)


def damage(store: Tiers, chunk: Chunk, layout: ChunkLayout) -> None:
    path = store.disk.path(chunk.key, layout.rank, layout.world_size)
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def test_a_damaged_share_leaves_zeros_and_is_quarantined(store):
    """The last layer of the second of two shares is bad: nothing unverified, nothing half."""
    chunk = chunk_of(Model())
    shares = [chunk.model.layout(128, rank=rank, world_size=2) for rank in (0, 1)]
    for share in shares:
        put(store, chunk, share)
    damage(store, chunk, shares[1])
    layout = chunk.model.layout(64)
    room = [np.full(4 * layer.page_bytes, 0xAA, np.uint8) for layer in layout.layers]
    with pytest.raises(ChunkDamagedError):
        copy_converted(store, chunk.key, layout, NAMESPACE, 0, 4, [[each] for each in room])
    assert not any(each.any() for each in room)
    assert store.shares(chunk.key) == [(0, 2)]
    assert len(store.disk.quarantined()) == 1


def test_a_damaged_share_is_replaced_by_another_that_holds_its_heads(store):
    """The one-rank share is bad; the two-rank shares serve, and the damage is put away."""
    chunk = chunk_of(Model())
    whole = chunk.model.layout(128)
    for layout in (whole, *(chunk.model.layout(128, rank=r, world_size=2) for r in (0, 1))):
        put(store, chunk, layout)
    damage(store, chunk, whole)
    assert_loads(store, chunk, chunk.model.layout(32))
    assert store.shares(chunk.key) == [(0, 2), (1, 2)]


def test_its_own_layout_is_copied_whatever_the_packing(store):
    """A packing that cannot be converted still loads where it fits as it lies."""
    chunk = chunk_of(Model())
    layout = chunk.model.layout(128)
    put(store, chunk, layout)
    assert is_usable(store, chunk.key, layout, NAMESPACE)
    odd = dataclasses.replace(chunk_of(Model(), seed=1))
    unknown = Model().layout(128, "012/cpu-rvv-unproven")
    store.put(
        key=odd.key,
        parent=ROOT,
        namespace=NAMESPACE,
        tokens=odd.tokens,
        layout=unknown,
        layers=[list(pages) for pages in pages_of(odd, layout)],
    )
    assert is_usable(store, odd.key, unknown, NAMESPACE)
    assert not is_usable(store, odd.key, layout, NAMESPACE)
    with pytest.raises(LayoutMismatchError, match="cannot be converted into this engine's"):
        load(store, odd, layout)
    put(store, odd, layout)
    assert is_usable(store, odd.key, unknown, NAMESPACE), "its own is still there"
    assert is_usable(store, odd.key, layout, NAMESPACE)


def test_nothing_stored_is_missing(store):
    """No share at all is no mismatch."""
    chunk = chunk_of(Model())
    with pytest.raises(ChunkMissingError):
        load(store, chunk, chunk.model.layout(64))
    with pytest.raises(ChunkMissingError):
        token_count(store, chunk.key, chunk.model.layout(64), NAMESPACE)


def test_another_namespace_is_never_converted(store):
    """The same tokens of another model."""
    chunk = chunk_of(Model())
    put(store, chunk, chunk.model.layout(128))
    assert not is_usable(store, chunk.key, chunk.model.layout(64), bytes(32))


def wider(layout: ChunkLayout) -> ChunkLayout:
    """Its first layer has longer heads than the others."""
    first, *others = layout.layers
    heads, tokens, content = first.page_shape
    shape = (heads, tokens, 2 * content)
    layers = (LayerLayout(first.name, shape, 2 * first.page_bytes), *others)
    return ChunkLayout(layout.tag, layout.dtype, layout.block_tokens, layers)


MODEL = Model()
REFUSED = [
    ("dtype", MODEL.layout(64), Model(dtype="float16").layout(64), "stored as bfloat16"),
    ("unknown", MODEL.layout(64, "012/cpu-rvv"), MODEL.layout(64), "stored in, 012/cpu-rvv"),
    ("ours", MODEL.layout(64), MODEL.layout(64, "012/cpu-vec-unproven"), "engine uses, 012"),
    ("context", MODEL.layout(64), MODEL.layout(64, f"{NHD}/context-parallel"), "engine uses"),
    ("order", MODEL.layout(64, "021/cuda-tokens"), MODEL.layout(64), "021/cuda-tokens"),
    ("mixed", MODEL.layout(64, "012+102/cuda-tokens"), MODEL.layout(64), "cannot convert|can"),
    ("heads", Model(heads=2).layout(64), MODEL.layout(64), "2 heads over all ranks, here 4"),
    ("pipeline", MODEL.layout(64), Model(heads=4, layers=3).layout(64), "layer.2 is not in it"),
    ("length", MODEL.layout(64), wider(MODEL.layout(64)), "64 elements of 2 bytes a head"),
    ("tiles", Model(dim=24).layout(64), Model(dim=24).layout(64, AMX), "do not fit"),
    ("bytes", Model(dtype="float32").layout(64), Model(dtype="float32").layout(64, AMX), "not fit"),
]


@pytest.mark.parametrize(
    ("source", "target", "reason"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_what_cannot_be_converted_is_refused_with_its_reason(source, target, reason):
    """One row a reason."""
    assert re.search(reason, why_not(source, target))


def test_pipeline_ranks_are_not_taken_for_tensor_ranks():
    """Two ranks that hold all heads of different layers: their heads do not add up to ours."""
    stage = dataclasses.replace(MODEL, layers=2)
    layout = ChunkLayout(VEC, "bfloat16", 64, stage.layout(64).layers, rank=1, world_size=2)
    assert "8 heads over all ranks, here 4" in why_not(layout, MODEL.layout(64))


def test_destinations_that_do_not_fit_are_left_alone(store):
    """Too few layers, too few bytes, half a page: refused before anything is read."""
    chunk = chunk_of(MODEL)
    put(store, chunk, MODEL.layout(128))
    layout = MODEL.layout(64)
    size = layout.layers[0].page_bytes
    room = np.full(4 * size, 0xAA, np.uint8)
    for pages in (
        [[room]],
        [[room[:-1]], [room]],
        [[room[: size // 2], room[size // 2 :]], [room]],
    ):
        with pytest.raises(ValueError, match="pages 0 to 4"):
            copy_converted(store, chunk.key, layout, NAMESPACE, 0, 4, pages)
    assert (room == 0xAA).all()
    with pytest.raises(ValueError, match="no page 4"):
        load(store, chunk, layout, 4, 5)


@pytest.mark.parametrize("tag", [VEC, AMX, HND, NHD])
def test_the_canonical_form_is_token_head_content(tag):
    """An audit compares the slots of real tokens, in any packing."""
    chunk = chunk_of(MODEL, 100)
    layout = MODEL.layout(64, tag)
    for index, pages in enumerate(pages_of(chunk, layout)):
        elements = canonical(layout, index, pages)
        np.testing.assert_array_equal(elements[:100], chunk.values[index])
    with pytest.raises(LayoutMismatchError):
        canonical(MODEL.layout(64, "012/cpu-other"), 0, pages)


def test_elements_are_read_as_numbers():
    """bfloat16 is the upper half of float32."""
    numbers = np.array([1.5, -2.0, 0.0], np.float32)
    upper = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(as_floats(upper, "bfloat16"), numbers)
    halves = numbers.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(as_floats(halves, "float16"), numbers)
    np.testing.assert_array_equal(as_floats(numbers.view(np.uint32), "float32"), numbers)
    with pytest.raises(LayoutMismatchError):
        as_floats(halves.view(np.uint8), "float8_e4m3fn")


@pytest.mark.parametrize("tag", [VEC, AMX, HND, NHD])
@pytest.mark.parametrize("filled", [1, 13, 31])
def test_slots_behind_the_last_token_are_cleared_in_every_packing(tag, filled):
    """The tokens in front stay as they are; an unknown packing is left alone."""
    layout = MODEL.layout(32, tag)
    chunk = chunk_of(MODEL, filled)
    page = pages_of(chunk, layout, filler=0x5A)[0][0]
    clear_slots(layout, 0, page, filled)
    np.testing.assert_array_equal(page, pages_of(chunk, layout, filler=0)[0][0])
    unknown = MODEL.layout(32, "012/cpu-rvv-unproven")
    before = pages_of(chunk, layout)[0][0]
    page = before.copy()
    clear_slots(unknown, 0, page, filled)
    np.testing.assert_array_equal(page, before)
