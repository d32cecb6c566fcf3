"""The worker half: carries out the scheduler half's plans, one of it a rank.

It sees the store and the messages, never the ledger or the catalogue. Nothing here raises into the
engine: a chunk that cannot be loaded is reported, and its tokens are recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from vllm_kvmarket.connector.cache_groups import CacheGroup
from vllm_kvmarket.connector.copy_threads import unpinned_cores
from vllm_kvmarket.connector.device_copies import pinned_empty
from vllm_kvmarket.connector.messages import Instructions, WorkerReport
from vllm_kvmarket.connector.metrics import MarketStats
from vllm_kvmarket.connector.paged_cache import PagedCache
from vllm_kvmarket.connector.transfers import Finished, Transfers
from vllm_kvmarket.core.config import MarketConfig
from vllm_kvmarket.store import DiskStore, aligned_empty
from vllm_kvmarket.store.host_memory import HostTier
from vllm_kvmarket.store.tiers import Tiers, store_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# With no forward pass to run, the step has nothing better to do than to wait for a transfer; the
# bound keeps new requests from waiting behind it.
IDLE_WAIT_S = 0.005


class WorkerHalf:
    """One rank's transfers; called on the model's thread only."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        config: MarketConfig,
        groups: Sequence[CacheGroup],
        num_blocks: int,
    ) -> None:
        self._vllm_config = vllm_config
        self._config = config
        self._groups = groups
        self._num_blocks = num_blocks
        self._store: Tiers | None = None
        self._cache: PagedCache | None = None
        self._transfers: Transfers | None = None
        # A self-test's, in whose place no others are under way.
        self._scratch: Transfers | None = None
        self._idle = False
        self._on_host = True
        self._taken = Finished()

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take vLLM's KV memory: one tensor a layer. Raises LayoutMismatchError."""
        cache = PagedCache(self._vllm_config, kv_caches, self._groups, self._num_blocks)
        self._cache = cache
        self._on_host = cache.on_host
        allocate = aligned_empty if cache.on_host else pinned_empty
        self._store = store_of(self._config)
        self._transfers = Transfers(
            self._store,
            cache,
            self._config.io_threads,
            host=HostTier(self._config.host_cache_bytes, allocate),
            timeout_s=self._config.object_store_timeout_s,
            # On a GPU's host, a worker that is bound to some cores is so for a reason.
            cores=unpinned_cores() if cache.on_host else frozenset(),
        )

    def start(self, instructions: Instructions) -> None:
        """Start this step's loads, saves, audits and prefetches."""
        self._use(instructions.scratch)
        if (transfers := self._scratch or self._transfers) is None:
            return
        self._idle = instructions.idle
        for load in instructions.loads:
            transfers.load(load)
        for save in instructions.saves:
            transfers.save(save)
        for audit in instructions.audits:
            transfers.audit(audit)
        for prefetch in instructions.prefetches:
            transfers.prefetch(prefetch)

    def wait_for_step_loads(self) -> None:
        """Wait for the loads that this step's forward pass needs."""
        if self._transfers is not None:
            self._transfers.wait_for_step_loads()

    def _use(self, scratch: str) -> None:
        """Store and load in this folder from now on; "": in the market's store."""
        if not scratch and self._scratch is not None:
            self._scratch.close()
            self._scratch = None
        elif scratch and self._scratch is None and self._cache is not None:
            disk = DiskStore(Path(scratch), codec=self._config.codec)
            self._scratch = Transfers(Tiers(disk, None), self._cache, self._config.io_threads)

    def step_ended(self, instructions: Instructions) -> None:
        """Copy the pages that this step's forward pass has filled and that vLLM may free."""
        if (transfers := self._scratch or self._transfers) is None:
            return
        for request_id in instructions.ended:
            transfers.forget(request_id)
        if instructions.copies and not self._on_host:
            torch.accelerator.synchronize()
        for copy in instructions.copies:
            transfers.copy(copy)

    def collect(self) -> KVConnectorTransferResults:
        """Which requests' transfers ended; waits a moment for one in a step without a forward."""
        if (transfers := self._scratch or self._transfers) is not None:
            self._taken = transfers.take(IDLE_WAIT_S if self._idle else 0.0)
        return KVConnectorTransferResults(
            finished_sending=self._taken.sent,
            finished_recving=self._taken.received,
            failed_recving=self._taken.failed,
        )

    def bad_blocks(self) -> set[int]:
        """Blocks of the requests just collected that could not be loaded."""
        return self._taken.bad_blocks

    def report(self) -> WorkerReport | None:
        """The report to the scheduler half of the requests just collected."""
        report = self._taken.report
        return None if report.is_empty else report

    def stats(self) -> MarketStats | None:
        """The counts since the last step; None when there are none."""
        return self._transfers.take_stats() if self._transfers is not None else None

    def close(self) -> None:
        """Finish what is under way."""
        self._use("")
        if self._transfers is not None:
            self._transfers.close()
        if self._store is not None:
            self._store.close()
