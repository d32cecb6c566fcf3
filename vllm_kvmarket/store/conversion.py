"""Converts chunks of other block sizes, packings and ranks while they are loaded.

A chunk is stored as its publisher's pages. An engine with another layout reads the shares that are
there, verifies them layer by layer, takes them apart into [token, head, content], and puts them
together as its own pages. Elements are moved and never computed with, so no bit changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from math import prod

import numpy as np

from vllm_kvmarket.core.errors import (
    ChunkDamagedError,
    ChunkMissingError,
    LayoutMismatchError,
    StoreError,
)
from vllm_kvmarket.store.chunk_format import ChunkLayout, LayerLayout, Share, damaged
from vllm_kvmarket.store.chunk_reader import aligned_empty, zero_unless_late
from vllm_kvmarket.store.codec import Bytes
from vllm_kvmarket.store.packings import (
    Elements,
    Plane,
    Shape,
    Tag,
    as_floats,
    canonical,
    own_share,
    planes,
    read_tag,
    shape_of,
)
from vllm_kvmarket.store.tiers import OpenChunk, Tiers

__all__ = ["as_floats", "canonical", "copy_converted", "is_usable", "token_count", "why_not"]


@lru_cache(maxsize=256)
def why_not(source: ChunkLayout, target: ChunkLayout) -> str:
    """Why pages of `source` cannot become pages of `target`; empty when they can.

    Ranks may differ: what a share does not hold must come from another.
    """
    if source.dtype != target.dtype:
        return f"stored as {source.dtype}, this engine uses {target.dtype}"
    if source.has_states or target.has_states:
        return "it has recurrent states, which cannot be converted"
    for layout, whose in ((source, "it is stored in"), (target, "this engine uses")):
        if read_tag(layout.tag) is None:
            return f"the layout {whose}, {layout.tag}, is not one that kvmarket can convert"
    theirs = {layer.name: layer for layer in source.layers}
    if len(theirs) != len(source.layers):
        return "it has two layers of one name"
    for layer in target.layers:
        if layer.name not in theirs:
            return f"layer {layer.name} is not in it (pipeline-parallel, or other shared layers)"
        if problem := _why_not_layer(source, theirs[layer.name], target, layer):
            return problem
    return ""


def _why_not_layer(
    source: ChunkLayout, theirs: LayerLayout, target: ChunkLayout, ours: LayerLayout
) -> str:
    old, new = shape_of(source, theirs), shape_of(target, ours)
    if old is None or new is None:
        layout, layer = (source, theirs) if old is None else (target, ours)
        return f"pages of shape {layer.page_shape} do not fit the layout {layout.tag}"
    if (old.content, old.item_bytes) != (new.content, new.item_bytes):
        return (
            f"layer {ours.name} has {old.content} elements of {old.item_bytes} bytes a head and "
            f"token, here {new.content} of {new.item_bytes}"
        )
    if _total_heads(source, old) != _total_heads(target, new):
        return (
            f"layer {ours.name} has {_total_heads(source, old)} heads over all ranks, "
            f"here {_total_heads(target, new)}"
        )
    return ""


def _tag(layout: ChunkLayout) -> Tag:
    tag = read_tag(layout.tag)
    assert tag is not None
    return tag


def _shape(layout: ChunkLayout, layer: LayerLayout) -> Shape:
    shape = shape_of(layout, layer)
    assert shape is not None
    return shape


def _total_heads(layout: ChunkLayout, shape: Shape) -> int:
    return shape.heads * max(1, layout.world_size // _tag(layout).replicas)


def _heads_of(layout: ChunkLayout, layer: LayerLayout) -> range:
    """Which heads a rank has of a layer, counted over all ranks.

    A layout that cannot be converted has something that no other has.
    """
    shape = shape_of(layout, layer)
    if shape is None:
        return range(-1, 0)
    first = shape.heads * (layout.rank // _tag(layout).replicas)
    return range(first, first + shape.heads)


def is_usable(store: Tiers, key: bytes, layout: ChunkLayout, namespace: bytes) -> bool:
    """Whether an engine of this layout can load the whole chunk: verified, its own or converted.

    Reads every byte of the shares that it would use; a damaged one is quarantined.
    """
    try:
        _visit(store, key, layout, namespace, lambda share: share.verify())
    except StoreError:
        return False
    return True


def token_count(
    store: Tiers, key: bytes, layout: ChunkLayout, namespace: bytes, known: bytes = b""
) -> int:
    """Tokens in a chunk that `copy_converted` can load; all that it will read is then on this disk.

    Opens the shares, and reads none. Raises as copy_converted.
    """
    counts: list[int] = []

    def count(share: OpenChunk) -> None:
        counts.append(share.header.token_count)

    _visit(store, key, layout, namespace, count, known)
    return counts[0]


def copy_converted(  # noqa: PLR0917  # the last three are those of StoredChunk.copy_all_pages
    store: Tiers,
    key: bytes,
    layout: ChunkLayout,
    namespace: bytes,
    first_page: int,
    last_page: int,
    destinations: Sequence[Sequence[Bytes]],
    *,
    known: bytes = b"",
) -> None:
    """Read pages first_page .. last_page - 1, counted in this layout's blocks, into place.

    `destinations` as in StoredChunk.copy_all_pages: for each layer of `layout` dense uint8 arrays
    of one or more pages each. Slots behind the chunk's last token become zeros, except in a
    straight copy of this very layout. A damaged share is quarantined, and another that holds the
    same heads is used if there is one. `known` as in Tiers.open.

    Raises LayoutMismatchError with the reason when nothing that is stored can be converted;
    ChunkMissingError when nothing is stored, or not for all heads; ChunkDamagedError; StoreError;
    ValueError when `destinations` do not fit. After all of them but the last `destinations` hold
    zeros, never an unverified byte.
    """
    _check_sizes(layout, first_page, last_page, destinations)

    def convert(share: OpenChunk) -> None:
        _convert_share(share, layout, first_page, last_page, destinations)

    try:
        _visit(store, key, layout, namespace, convert, known)
    except BaseException as error:
        zero_unless_late(error, destinations)
        raise


def _visit(  # noqa: PLR0917  # the first four are those of its callers
    store: Tiers,
    key: bytes,
    layout: ChunkLayout,
    namespace: bytes,
    use: Callable[[OpenChunk], None],
    known: bytes = b"",
) -> None:
    """Hand over shares until each of this layout's heads has been had; raises when they are not.

    A share on which `use` raises a StoreError does not count.
    """
    missing = _Missing(layout)
    problems: list[StoreError] = []
    for each in _in_order(store, key, layout):
        try:
            with _open(store, key, each, namespace, known) as share:
                theirs = share.header.layout
                _check_convertible(theirs, key, layout)
                if missing.has_use_for(theirs):
                    use(share)
                    missing.fill(theirs)
        except ChunkDamagedError as error:
            problems.append(error)
            store.quarantine(key, each.rank, each.world_size, str(error), each.layout)
        except StoreError as error:
            problems.append(error)
        if not missing:
            return
    nothing = all(isinstance(problem, ChunkMissingError) for problem in problems)
    if nothing and not store.shares(key) and store.files(key):
        raise LayoutMismatchError(
            f"{key.hex()}: stored in a layout that cannot be converted into this engine's, "
            f"{layout.tag}; publish the document again with this engine"
        )
    raise _worst(problems, key)


class _Missing:
    """Which heads of which layers no share has given yet."""

    def __init__(self, layout: ChunkLayout) -> None:
        self._layout = layout
        self._heads = {layer.name: set(_heads_of(layout, layer)) for layer in layout.layers}

    def __bool__(self) -> bool:
        return any(self._heads.values())

    def has_use_for(self, share: ChunkLayout) -> bool:
        """Whether a usable share holds heads that are still missing."""
        return any(
            self._heads[layer.name] & self._given(share, layer.name)
            for layer in self._layout.layers
        )

    def fill(self, share: ChunkLayout) -> None:
        """Note that a share's heads have been taken; mutates."""
        for layer in self._layout.layers:
            self._heads[layer.name] -= self._given(share, layer.name)

    def _given(self, share: ChunkLayout, name: str) -> set[int]:
        (layer,) = [layer for layer in share.layers if layer.name == name]
        return set(_heads_of(share, layer))


def _in_order(store: Tiers, key: bytes, layout: ChunkLayout) -> list[Share]:
    """Shares to try: our own first, then those of our world size, then the fewest to read."""
    own = own_share(layout)

    def cost(share: Share) -> tuple[bool, bool, int, int]:
        others = share.world_size != own.world_size
        return share[:2] != own[:2], others, share.world_size, share.rank

    found = sorted((Share(*share) for share in store.shares(key)), key=cost)
    return [own, *found] if own.layout else found


@contextlib.contextmanager
def _open(
    store: Tiers, key: bytes, share_id: Share, namespace: bytes, known: bytes
) -> Iterator[OpenChunk]:
    rank, world_size, form = share_id
    opened = store.open_share(key, rank, world_size, namespace, layout=form, known=known)
    with contextlib.closing(opened) as share:
        found = share.header.layout
        if (found.rank, found.world_size) != (rank, world_size):
            raise damaged(key.hex(), f"holds the share of rank {found.rank} of {found.world_size}")
        yield share


def _check_convertible(theirs: ChunkLayout, key: bytes, layout: ChunkLayout) -> None:
    if theirs != layout and (problem := why_not(theirs, layout)):
        raise LayoutMismatchError(
            f"{key.hex()}, rank {theirs.rank} of {theirs.world_size}: {problem}; "
            "publish the document again with this engine"
        )


def _check_sizes(
    layout: ChunkLayout, first_page: int, last_page: int, destinations: Sequence[Sequence[Bytes]]
) -> None:
    if not 0 <= first_page < last_page or len(destinations) != len(layout.layers):
        raise ValueError(
            f"pages {first_page} to {last_page} of {len(destinations)} layers: not a part of "
            f"{len(layout.layers)} layers"
        )
    for layer, destination in zip(layout.layers, destinations, strict=True):
        given = sum(page.nbytes for page in destination)
        whole = all(page.nbytes % layer.page_bytes == 0 for page in destination)
        if given != (last_page - first_page) * layer.page_bytes or not whole:
            raise ValueError(f"{given} bytes for pages {first_page} to {last_page} of {layer.name}")


def _convert_share(
    share: OpenChunk,
    layout: ChunkLayout,
    first_page: int,
    last_page: int,
    destinations: Sequence[Sequence[Bytes]],
) -> None:
    """Read what this share holds of our heads, layer after layer; the caller zeroes on errors."""
    theirs, tokens = share.header.layout, share.header.token_count
    begin, end = first_page * layout.block_tokens, last_page * layout.block_tokens
    if last_page > layout.page_count(tokens):
        raise ValueError(f"a chunk of {tokens} tokens has no page {last_page - 1} in this layout")
    if theirs == layout:
        for index, destination in enumerate(destinations):
            share.copy_pages(index, first_page, last_page, destination)
        return
    # Only the source's pages that hold some of these tokens are kept.
    first = begin // theirs.block_tokens
    last = theirs.page_count(min(end, tokens))
    indices = {layer.name: index for index, layer in enumerate(theirs.layers)}
    largest = (last - first) * max(layer.page_bytes for layer in theirs.layers)
    scratch = aligned_empty(largest)
    gathered = aligned_empty(largest + (end - begin) * largest // theirs.block_tokens)
    for layer, destination in zip(layout.layers, destinations, strict=True):
        index = indices[layer.name]
        here, there = _heads_of(layout, layer), _heads_of(theirs, theirs.layers[index])
        both = range(max(here.start, there.start), min(here.stop, there.stop))
        if not both:
            continue
        pages = scratch[: (last - first) * theirs.layers[index].page_bytes]
        share.copy_pages(index, first, last, [pages])
        source = planes(_tag(theirs), _shape(theirs, theirs.layers[index]), pages)
        new = _shape(layout, layer)
        target = [planes(_tag(layout), new, run) for run in destination]
        skipped = begin - first * theirs.block_tokens
        for number, part in enumerate(source):
            moved = _gather(part, _local(both, there), skipped, end - begin, gathered)
            moved[tokens - begin :] = 0
            place = 0
            for run in target:
                into = _of_heads(run[number], _local(both, here))
                slots = len(into) * layout.block_tokens
                into[...] = moved[place : place + slots].reshape(into.shape)
                place += slots


def _local(heads: range, within: range) -> slice:
    return slice(heads.start - within.start, heads.stop - within.start)


def _gather(part: Plane, heads: slice, skip: int, count: int, gathered: Bytes) -> Elements:
    """Copy a plane out as [slot, head, element], into `gathered`: `count` slots after `skip`."""
    view = _of_heads(part, heads)
    found = view.shape[1 + len(part.token_axes)]
    filled = len(view) * prod(part.token_axes)
    slots = max(filled, skip + count)
    flat = gathered[: slots * found * part.width * view.itemsize].view(view.dtype)
    if part.tokens_inside:
        # In the source's own order, which is most often the target's too: long runs are copied.
        result = flat.reshape(found, part.width, slots).transpose(2, 0, 1)
    else:
        result = flat.reshape(found, slots, part.width).transpose(1, 0, 2)
    nested = result[:filled].reshape(view.shape)
    assert np.may_share_memory(nested, gathered)
    nested[...] = view
    return result[skip : skip + count]


def _of_heads(part: Plane, heads: slice) -> Elements:
    return part.view[(slice(None),) * (1 + len(part.token_axes)) + (heads,)]


def _worst(problems: list[StoreError], key: bytes) -> StoreError:
    """The most telling error: damage, then a failure of this moment, then the layout."""

    def order(problem: StoreError) -> int:
        kinds = (ChunkMissingError, LayoutMismatchError, StoreError, ChunkDamagedError)
        # Others, a full disk say, are failures of this moment as well.
        return kinds.index(type(problem)) if type(problem) in kinds else 2

    missing = ChunkMissingError(
        f"{key.hex()}: not in the store for all heads of this rank; publish its document again"
    )
    return max(problems, key=order, default=missing)
