"""Pinned documents: their blocks are the last that vLLM gives away.

A pin holds no block. vLLM takes free blocks from the front of a queue; pinned ones that come near
the front are moved to its end, again and again. So other requests push them out only where nothing
else is left, and the engine can sleep or empty its cache: a pin ends with that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId


class PinnedBlocks:
    """Which blocks each pinned document has; called on the scheduler's thread only.

    Only whole blocks are pinned: the last, partly filled page of a document comes from the store.
    """

    def __init__(self, budget: float, max_model_len: int, block_tokens: int) -> None:
        self._share = budget
        # The longest request takes so many blocks at once.
        self._longest = -(-max_model_len // block_tokens) + 1
        self._block_tokens = block_tokens
        self._pool: BlockPool | None = None
        self._pinned: dict[str, dict[int, BlockHashWithGroupId]] = {}
        self._ids: set[int] = set()
        # Free blocks in front of the first pinned one when it was looked, less those taken since.
        self._in_front = 0

    def bind(self, pool: BlockPool) -> None:
        """Take the engine's block pool."""
        self._pool = pool

    @property
    def budget(self) -> int:
        """The most blocks that pinned documents may use together; 0 without prefix caching."""
        if self._pool is None or not self._pool.enable_caching:
            return 0
        usable = self._pool.num_gpu_blocks - 1
        return max(0, min(int(usable * self._share), usable - self._longest))

    @property
    def block_count(self) -> int:
        """Blocks that are pinned now; one that two documents share counts once."""
        return len(self._ids)

    def pin(self, document_id: str, token_count: int, block_ids: Sequence[int]) -> str:
        """Pin a document's whole blocks, the first of a request's; mutates.

        Returns why not, "" when it was done. The request must still own its blocks.
        """
        self.forget_lost()
        if document_id in self._pinned:
            return ""
        pool = self._pool
        if pool is None or not pool.enable_caching:
            return "vLLM's prefix caching is off in this engine, which pins nothing"
        chosen: dict[int, BlockHashWithGroupId] = {}
        for block_id in block_ids[: token_count // self._block_tokens]:
            if (known := pool.blocks[block_id].block_hash) is None:
                return "vLLM does not keep all of its blocks; preload it again"
            chosen[block_id] = known
        more = len(chosen.keys() - self._ids)
        if self.block_count + more > self.budget:
            return (
                f"pinning it takes {more} blocks more, {self.block_count} of the "
                f"{self.budget} that may be pinned are; unpin another document, or raise "
                "pin_budget or the paged cache"
            )
        self._pinned[document_id] = chosen
        self._ids |= chosen.keys()
        self._in_front = 0
        return ""

    def unpin(self, document_id: str) -> None:
        """Let vLLM give a document's blocks away as any others; mutates."""
        if self._pinned.pop(document_id, None) is not None:
            self._ids = {each for blocks in self._pinned.values() for each in blocks}

    def unpin_unless(self, keep: Callable[[str], bool]) -> None:
        """Unpin every document that `keep` does not want any more; mutates."""
        for document_id in list(self._pinned):
            if not keep(document_id):
                self.unpin(document_id)

    def forget_lost(self) -> None:
        """Unpin documents of which vLLM has given a block away, or forgotten it; mutates."""
        pool = self._pool
        if pool is not None:
            self.unpin_unless(
                lambda document_id: all(
                    pool.blocks[block_id].block_hash == known
                    for block_id, known in self._pinned[document_id].items()
                )
            )

    def taken(self, count: int) -> None:
        """Note that vLLM has taken at most so many blocks out of its queue of free ones. Mutates
        that queue, so that pinned blocks stand behind what the longest request takes.
        """
        if self._ids and count:
            self._in_front -= count
            if self._in_front < self._longest:
                self._in_front = self._move_back()

    def _move_back(self) -> int:
        """Move all pinned blocks to the end of the queue if one is near its front; how many others
        are in front of them now, or at least the longest request's twice.
        """
        pool = self._pool
        assert pool is not None
        block, others = pool.free_block_queue.fake_free_list_head.next_free_block, 0
        while others < 2 * self._longest and block is not None and block.block_id not in self._ids:
            block, others = block.next_free_block, others + 1
        if others == 2 * self._longest:
            return others
        # Each document's end first: what is left of it when blocks are given away is a prefix.
        free = {
            block_id: pool.blocks[block_id]
            for blocks in self._pinned.values()
            for block_id in reversed(blocks)
            if pool.blocks[block_id].ref_cnt == 0
        }
        most = pool.get_num_free_blocks() - len(free)
        if others < most:
            pool.touch(list(free.values()))
            pool.free_blocks(free.values())
        return most
