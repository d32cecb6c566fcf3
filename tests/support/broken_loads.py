"""A worker of vLLM's whose loads go wrong without a word: `worker_extension_cls` names it."""

from __future__ import annotations

from typing import Any

from vllm_kvmarket.connector.chunk_io import Chunks, Loaded
from vllm_kvmarket.connector.messages import ChunkLoad

WRONG_PAGES = "tests.support.broken_loads.WrongPages"


class WrongPages:
    """Each load ends well, and leaves what nobody has stored in the pages of one layer."""


_load = Chunks.load


def _load_wrongly(self: Chunks, namespace: bytes, chunk: ChunkLoad, **how: Any) -> Loaded:
    loaded = _load(self, namespace, chunk, **how)
    layer = self._cache.layer_count - 1
    for pages in self._cache.host_pages(layer, chunk.groups[self._cache.group_of[layer]].block_ids):
        pages[:] = pages[::-1].copy()
    return loaded


Chunks.load = _load_wrongly  # type: ignore[method-assign]
