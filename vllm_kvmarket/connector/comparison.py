"""How a chunk that was computed again compares with the stored one: what an audit finds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_kvmarket.connector.messages import ChunkAudit
from vllm_kvmarket.core.errors import LayoutMismatchError
from vllm_kvmarket.store.chunk_format import Bytes, ChunkLayout
from vllm_kvmarket.store.conversion import as_floats, canonical

# The largest difference that is still close, as a share of the layer's largest computed value:
# what other kernels, or a prompt cut into other pieces, change by rounding, with room to spare.
TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


def compare(
    layout: ChunkLayout,
    token_count: int,
    computed: Sequence[Sequence[Bytes]],
    stored: Sequence[Bytes],
) -> ChunkAudit:
    """Compare one chunk's pages, given for each layer: computed ones in runs, stored ones in one.

    Only the slots of its `token_count` tokens count: what lies behind them in the last page is
    whatever was there. Bit for bit first; what differs is compared as numbers. In a layout that
    kvmarket cannot take apart, and in a dtype without a tolerance, only equal pages are `exact`, a
    last page that is partly filled is left out, and what differs is `different`.
    """
    worst, where, is_close = 0.0, "", True
    for index, (ours, theirs) in enumerate(zip(computed, stored, strict=True)):
        pages = ours[0] if len(ours) == 1 else np.concatenate(ours)
        if pages.nbytes != theirs.nbytes:
            return ChunkAudit("unread", detail=f"{theirs.nbytes} bytes instead of {pages.nbytes}")
        if np.array_equal(pages, theirs):
            continue
        difference, allowed = _difference(layout, index, token_count, pages, theirs)
        if difference > worst:
            name = layout.layers[index].name
            worst, where = difference, f"{name} differs by {difference:.3g} (allowed {allowed:.3g})"
        is_close = is_close and difference <= allowed
    if not where:
        return ChunkAudit("exact")
    return ChunkAudit("close" if is_close else "different", worst, where)


def _difference(
    layout: ChunkLayout, index: int, token_count: int, ours: Bytes, theirs: Bytes
) -> tuple[float, float]:
    """The largest absolute difference between two layers' tokens, and the largest that is close.

    Infinite where it is not a number, or cannot be told.
    """
    try:
        computed = canonical(layout, index, ours)[:token_count]
        stored = canonical(layout, index, theirs)[:token_count]
        if np.array_equal(computed, stored):
            return 0.0, 0.0
        numbers = as_floats(computed, layout.dtype).astype(np.float64)
        difference = np.abs(numbers - as_floats(stored, layout.dtype))
    except LayoutMismatchError:
        whole = token_count // layout.block_tokens * layout.layers[index].page_bytes
        same = np.array_equal(ours[:whole], theirs[:whole])
        return (0.0 if same else np.inf), 0.0
    largest = float(difference.max())
    allowed = TOLERANCES[layout.dtype] * float(np.abs(numbers).max())
    if not np.isfinite(largest) or not np.isfinite(allowed):
        return np.inf, 0.0
    return largest, allowed
