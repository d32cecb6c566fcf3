"""Layout tags: where in a page each token's keys and values lie.

    tag = order "/" device "-" packing [ "/x" replicas ]        "012/cpu-vec", "102/cuda-tokens/x2"

`order` lists a page's dimensions (heads, tokens, content) from outermost to innermost in memory;
`replicas` says how many neighbouring ranks have the same heads, 1 when it is left out. A packing
that is not described here can be copied into the same layout, and not converted.

Sources: vLLM's csrc/cpu/cpu_attn_{vec,vec16,amx}.hpp (`reshape_and_cache`) for the
CPU kernels' packings, vllm/v1/kv_cache_layout.py for the others. connector/paged_cache.py writes a
packing into a tag only after vLLM's own kernel has filled a page that reads back right.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_kvmarket.core.errors import LayoutMismatchError
from vllm_kvmarket.store.chunk_format import ChunkLayout, LayerLayout, Share, layout_digest

Elements = npt.NDArray[Any]

_TAG = re.compile(r"(?P<order>\d+)/(?P<device>[a-z]+)-(?P<packing>\w+)(?:/x(?P<replicas>\d+))?")
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_QUADWORD_BYTES = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer's page: `content` elements of `item_bytes` a head and token, keys before values."""

    heads: int
    tokens: int
    content: int
    item_bytes: int

    @property
    def head_dim(self) -> int:
        """Elements of a key, where keys and values are of one length."""
        return self.content // 2


@dataclass(frozen=True, slots=True)
class Plane:
    """A part of every token's content, for example its key, as a view of the pages' memory.

    `view` has the axes (pages, *tokens, heads, *dims): a page's tokens, and a head's elements, are
    split into as many axes as the packing nests. `start` is the part's first element in the
    content, `tokens_inside` says that neighbours in memory are tokens, not elements of one head.
    """

    view: Elements
    token_axes: tuple[int, ...]
    dim_axes: tuple[int, ...]
    start: int
    tokens_inside: bool = False

    @property
    def width(self) -> int:
        """Elements a head and token."""
        return prod(self.dim_axes)


@dataclass(frozen=True, slots=True)
class Tag:
    """A tag that is understood."""

    order: str
    packing: str
    replicas: int


def _vec(pages: Elements, shape: Shape) -> list[Plane]:
    """Keys by columns [dim, token], values by rows [token, dim], the same for vec16 and neon."""
    count, heads, tokens, dim = len(pages), shape.heads, shape.tokens, shape.head_dim
    keys = pages.reshape(count, heads, 2, dim, tokens)[:, :, 0].transpose(0, 3, 1, 2)
    values = pages.reshape(count, heads, 2, tokens, dim)[:, :, 1].transpose(0, 2, 1, 3)
    return [
        Plane(keys, (tokens,), (dim,), 0, tokens_inside=True),
        Plane(values, (tokens,), (dim,), dim),
    ]


def _amx(pages: Elements, shape: Shape) -> list[Plane]:
    """Tiles of 16 rows of four bytes: keys interleaved along the head, values along the tokens."""
    count, heads, tokens, dim = len(pages), shape.heads, shape.tokens, shape.head_dim
    pair = _QUADWORD_BYTES // shape.item_bytes
    keys = pages.reshape(count, heads, 2, tokens // 16, dim // pair, 16, pair)[:, :, 0]
    values = pages.reshape(count, heads, 2, dim // 16, tokens // pair, 16, pair)[:, :, 1]
    return [
        Plane(keys.transpose(0, 2, 4, 1, 3, 5), (tokens // 16, 16), (dim // pair, pair), 0),
        Plane(values.transpose(0, 3, 5, 1, 2, 4), (tokens // pair, pair), (dim // 16, 16), dim),
    ]


_CPU_PACKINGS: dict[str, Callable[[Elements, Shape], list[Plane]]] = {
    "vec": _vec,
    "amx": _amx,
}
# Tokens and elements a head must be multiples of these.
_GRAINS = {"vec": (1, 1), "amx": (16, 16)}
# An older name of the same packing.
_ALIASES = {"vec16": "vec"}
TOKENS = "tokens"
# Heads outside tokens (HND), and tokens outside heads (NHD).
ORDERS = ("012", "102")
CPU_PACKINGS = tuple(_CPU_PACKINGS)
_own: dict[int, tuple[ChunkLayout, Share]] = {}
_MOST_OWN = 256


def _tokens(pages: Elements, shape: Shape, order: str) -> list[Plane]:
    """Each token's keys and values side by side, as GPU backends have them (NHD or HND)."""
    sizes = (shape.heads, shape.tokens, shape.content)
    axes = [int(axis) for axis in order]
    view = pages.reshape(len(pages), *(sizes[axis] for axis in axes))
    to_head, to_token, to_content = (1 + axes.index(axis) for axis in range(3))
    view = view.transpose(0, to_token, to_head, to_content)
    half = shape.content // 2
    return [
        Plane(view[..., :half], (shape.tokens,), (half,), 0),
        Plane(view[..., half:], (shape.tokens,), (shape.content - half,), half),
    ]


@lru_cache(maxsize=256)
def read_tag(tag: str) -> Tag | None:
    """Take a tag apart; None when its packing is not described here."""
    match = _TAG.fullmatch(tag)
    if match is None:
        return None
    packing = _ALIASES.get(match["packing"], match["packing"])
    if packing != TOKENS and packing not in _CPU_PACKINGS:
        return None
    if match["order"] not in ORDERS or (packing != TOKENS and match["order"] != "012"):
        return None
    return Tag(match["order"], packing, int(match["replicas"] or 1))


def shape_of(layout: ChunkLayout, layer: LayerLayout) -> Shape | None:
    """The shape of a layer's page; None when the layout's tag does not tell."""
    return _shape_of(layout.tag, layout.block_tokens, layer.page_shape, layer.page_bytes)


# Not by the layout: hashing that takes in all of its layers, each time.
@lru_cache(maxsize=1024)
def _shape_of(
    name: str, block_tokens: int, page_shape: tuple[int, ...], page_bytes: int
) -> Shape | None:
    tag = read_tag(name)
    if tag is None or len(page_shape) != 3 or min(page_shape) < 1:
        return None
    heads, tokens, content = page_shape
    item_bytes, rest = divmod(page_bytes, prod(page_shape))
    if rest or item_bytes not in _UNSIGNED or tokens != block_tokens:
        return None
    shape = Shape(heads, tokens, content, item_bytes)
    return shape if _fits(tag, shape) else None


def own_share(layout: ChunkLayout) -> Share:
    """Which of a chunk's files an engine of this layout writes, and reads without converting."""
    # By identity: each load asks, always for the same layout, and hashing takes in all layers.
    known = _own.get(id(layout))
    if known is not None and known[0] is layout:
        return known[1]
    is_understood = not layout.has_states and all(
        shape_of(layout, layer) is not None for layer in layout.layers
    )
    form = "" if is_understood else layout_digest(layout)
    share = Share(layout.rank, layout.world_size, form)
    if len(_own) >= _MOST_OWN:
        _own.clear()
    _own[id(layout)] = layout, share
    return share


def _fits(tag: Tag, shape: Shape) -> bool:
    if tag.packing == TOKENS:
        return True
    tokens, dims = _GRAINS[tag.packing]
    if shape.content % 2 or shape.tokens % tokens or shape.head_dim % dims:
        return False
    # Tiles are made of pairs of two bytes.
    return tag.packing == "vec" or shape.item_bytes == 2


def planes(tag: Tag, shape: Shape, pages: npt.NDArray[np.uint8]) -> list[Plane]:
    """See pages as planes, which together hold every element once; writing to one writes the page.

    `pages` is dense uint8, one page after another. Elements are unsigned integers of the same
    width, so that copying changes no bit. Keys and values are of one length, except in the packing
    "tokens", which may hold anything: it is cut in half.
    """
    flat = pages.reshape(-1).view(_UNSIGNED[shape.item_bytes])
    elements: Elements = flat.reshape(-1, shape.heads * shape.tokens * shape.content)
    if tag.packing == TOKENS:
        return _tokens(elements, shape, tag.order)
    return _CPU_PACKINGS[tag.packing](elements, shape)


def canonical(layout: ChunkLayout, index: int, pages: npt.NDArray[np.uint8]) -> Elements:
    """Copy pages of one layer out as [token slot, head, content], keys before values.

    `pages` is dense uint8, one page after another. Elements are unsigned integers as wide as the
    layout's dtype (see `as_floats`). Slots behind a chunk's last token hold whatever they hold.

    Raises LayoutMismatchError when the layout's packing is not known.
    """
    layer = layout.layers[index]
    shape = shape_of(layout, layer)
    tag = read_tag(layout.tag)
    if tag is None or shape is None:
        raise LayoutMismatchError(
            f"pages of the layout {layout.tag} cannot be taken apart into tokens; "
            "compare or copy them whole"
        )
    parts = planes(tag, shape, pages)
    slots = parts[0].view.shape[0] * shape.tokens
    result = np.empty((slots, shape.heads, shape.content), parts[0].view.dtype)
    for part in parts:
        result[..., part.start : part.start + part.width] = part.view.reshape(
            slots, shape.heads, part.width
        )
    return result


def clear_slots(layout: ChunkLayout, index: int, page: npt.NDArray[np.uint8], filled: int) -> None:
    """Zero the slots of one page behind its first `filled` tokens; mutates.

    Leaves a page whose packing is not known as it is.
    """
    shape, tag = shape_of(layout, layout.layers[index]), read_tag(layout.tag)
    if shape is None or tag is None:
        return
    for part in planes(tag, shape, page):
        slots = np.arange(shape.tokens).reshape(part.token_axes)
        part.view[0][slots >= filled] = 0


def as_floats(elements: Elements, dtype: str) -> npt.NDArray[np.float32]:
    """Read elements of `canonical` as the numbers that they are, in float32, of the same shape.

    Raises LayoutMismatchError for a dtype other than float32, float16 and bfloat16.
    """
    if dtype == "bfloat16":
        return (elements.astype(np.uint32) << 16).view(np.float32)
    if dtype in {"float16", "float32"}:
        return elements.view(dtype).astype(np.float32, copy=False)
    raise LayoutMismatchError(f"elements of {dtype} cannot be read as numbers; compare their bits")
