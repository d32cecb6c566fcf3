"""Pinned documents: their blocks stay in vLLM's paged cache until they are unpinned.

A reference on a block keeps vLLM from giving it away. It also keeps `reset_prefix_cache` from
succeeding (vLLM logs how many blocks are in use and returns False): pinned documents survive it.
`reset_prefix_cache(reset_connector=True)` lets them go, so that the next reset succeeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool

# A document is pinned by a request that runs; that one, and one more, can always be served.
_SPARE_BLOCKS = 2


class PinnedBlocks:
    """Which blocks each pinned document holds; called on the scheduler's thread only.

    Only whole blocks are held: the last, partly filled page of a document comes from the store.
    """

    def __init__(self, budget: float, max_model_len: int, block_tokens: int) -> None:
        self._share = budget
        # The longest request must always fit, or it would wait for ever.
        self._reserved = -(-max_model_len // block_tokens) + _SPARE_BLOCKS
        self._block_tokens = block_tokens
        self._pool: BlockPool | None = None
        self._held: dict[str, list[int]] = {}
        self._references: Counter[int] = Counter()

    def bind(self, pool: BlockPool) -> None:
        """Take the engine's block pool."""
        self._pool = pool

    @property
    def budget(self) -> int:
        """The most blocks that pinned documents may use together; 0 without prefix caching."""
        if self._pool is None or not self._pool.enable_caching:
            return 0
        usable = self._pool.num_gpu_blocks - 1
        return max(0, min(int(usable * self._share), usable - self._reserved))

    @property
    def block_count(self) -> int:
        """Blocks that are held now; one that two documents share counts once."""
        return len(self._references)

    def holds(self, document_id: str) -> bool:
        """Whether the document's blocks are held."""
        return document_id in self._held

    def documents(self) -> list[str]:
        """The documents that are held, first pinned first."""
        return list(self._held)

    def pin(self, document_id: str, token_count: int, block_ids: Sequence[int]) -> str:
        """Hold a document's whole blocks, the first of a request's; mutates.

        Returns why not, "" when it was done. The request must still own its blocks.
        """
        if document_id in self._held:
            return ""
        pool = self._pool
        if pool is None or not pool.enable_caching:
            return "vLLM's prefix caching is off in this engine, which pins nothing"
        chosen = list(block_ids[: token_count // self._block_tokens])
        if any(pool.blocks[block].block_hash is None for block in chosen):
            return "vLLM does not keep all of its blocks; preload it again"
        more = len(set(chosen) - self._references.keys())
        if self.block_count + more > self.budget:
            return (
                f"pinning it takes {more} blocks more, {self.block_count} of the "
                f"{self.budget} that may be pinned are; unpin another document, or raise "
                "pin_budget or the paged cache"
            )
        pool.touch([pool.blocks[block] for block in chosen])
        self._references.update(chosen)
        self._held[document_id] = chosen
        return ""

    def unpin(self, document_id: str) -> None:
        """Let a document's blocks go, if they are held: vLLM may reuse them; mutates."""
        blocks = self._held.pop(document_id, None)
        if blocks is None:
            return
        assert self._pool is not None
        # The document's end goes first: what is left of it is a prefix.
        self._pool.free_blocks([self._pool.blocks[block] for block in reversed(blocks)])
        for block in blocks:
            self._references[block] -= 1
            if self._references[block] == 0:
                del self._references[block]

    def unpin_unless(self, keep: Callable[[str], bool]) -> None:
        """Let every document go that `keep` does not want any more; mutates."""
        for document_id in self.documents():
            if not keep(document_id):
                self.unpin(document_id)
