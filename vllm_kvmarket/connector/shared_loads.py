"""One load for a crowd: who needs published blocks that are on their way already waits for them.

A request that waits holds no blocks, and what it waits for is a load, which ends by itself. When it
has ended, vLLM finds the blocks by their shared hashes; what it did not bring is loaded by the next
request, for which the others wait in turn. No request waits longer than a deadline in all, nor
twice for a block that a load has brought: of a model with windows vLLM finds it only beside others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm_kvmarket.connector.shared_hashes import SharedHashes

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.request import Request


class SharedLoads:
    """The published blocks on their way into the paged cache; called on the scheduler's thread."""

    def __init__(
        self,
        hashes: SharedHashes,
        deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hashes = hashes
        self._deadline_s = deadline_s
        self._clock = clock
        # The request that loads a block; of two that do, the later one.
        self._loader: dict[BlockHash, str] = {}
        self._blocks: dict[str, list[BlockHash]] = {}
        self._waits_since: dict[str, float] = {}
        # By the request that waits: the block, the request that loads it, whether it did.
        self._waits_for: dict[str, tuple[BlockHash, str, bool]] = {}

    def waits(self, request_id: str) -> bool:
        """Whether a request waits for another's load."""
        return request_id in self._waits_since

    def must_wait(self, request: Request, local: int) -> bool:
        """Whether the first block behind a request's `local` tokens is on its way. Mutates."""
        name, index = request.request_id, self._hashes.count(local)
        shared = self._hashes.of(request)
        loader = self._loader.get(shared[index], name) if index < len(shared) else name
        if loader != name:
            now_s = self._clock()
            block, _, brought = self._waits_for.get(name, (None, "", False))
            if brought and block == shared[index]:
                return False
            self._waits_for[name] = shared[index], loader, False
            if now_s < self._waits_since.setdefault(name, now_s) + self._deadline_s:
                return True
        return False

    def began(self, request: Request, local: int, end: int) -> None:
        """A request loads its tokens `local` to `end`; paired with `ended`. Mutates."""
        name = request.request_id
        self._forget(name)
        first, last = self._hashes.count(local), self._hashes.count(end)
        self._blocks[name] = blocks = list(self._hashes.of(request)[first:last])
        self._loader.update(dict.fromkeys(blocks, name))

    def ended(self, request_id: str, *, brought: bool = False) -> None:
        """A request's load has ended, or the request has, if there were any; `brought`: nothing of
        it has failed. Mutates.
        """
        self._forget(request_id)
        if brought:
            for name, (block, loader, _) in self._waits_for.items():
                if loader == request_id:
                    self._waits_for[name] = block, loader, True
        for block in self._blocks.pop(request_id, ()):
            if self._loader.get(block) == request_id:
                del self._loader[block]

    def _forget(self, request_id: str) -> None:
        self._waits_since.pop(request_id, None)
        self._waits_for.pop(request_id, None)
