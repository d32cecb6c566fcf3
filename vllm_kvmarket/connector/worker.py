"""The worker half: carries out the scheduler half's plans, one of it a rank.

It sees the store and the messages, never the ledger or the catalogue. Nothing here raises into the
engine: a chunk that cannot be had is reported, and its tokens are recomputed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from vllm_kvmarket.config import MarketConfig
from vllm_kvmarket.connector.layouts import PagedCache
from vllm_kvmarket.connector.messages import Instructions, WorkerReport
from vllm_kvmarket.connector.transfer import Finished, Transfers
from vllm_kvmarket.store import CHUNKS_FOLDER, DiskStore

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# With no forward pass to run, the step has nothing better to do than to wait for a transfer; the
# bound keeps new requests from waiting behind it.
IDLE_WAIT_S = 0.005


class WorkerHalf:
    """One rank's transfers; called on the model's thread only."""

    def __init__(self, vllm_config: VllmConfig, config: MarketConfig, block_tokens: int) -> None:
        self._vllm_config = vllm_config
        self._config = config
        self._block_tokens = block_tokens
        self._transfers: Transfers | None = None
        self._taken = Finished()

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take vLLM's KV memory: one tensor a layer. Raises LayoutMismatchError."""
        parallel = self._vllm_config.parallel_config
        cache = PagedCache(
            self._vllm_config, kv_caches, self._block_tokens, parallel.rank, parallel.world_size
        )
        store = DiskStore(Path(self._config.home).expanduser() / CHUNKS_FOLDER)
        self._transfers = Transfers(store, cache, self._config.io_threads)

    def start(self, instructions: Instructions) -> None:
        """Start this step's loads and saves."""
        if self._transfers is None:
            return
        for load in instructions.loads:
            self._transfers.load(load)
        for save in instructions.saves:
            self._transfers.save(save)

    def collect(self, idle: bool) -> KVConnectorTransferResults:
        """Which requests' transfers ended; `idle` when the step ran no forward pass."""
        if self._transfers is not None:
            self._taken = self._transfers.take(IDLE_WAIT_S if idle else 0.0)
        return KVConnectorTransferResults(
            finished_sending=self._taken.sent, finished_recving=self._taken.received
        )

    def bad_blocks(self) -> set[int]:
        """Blocks of the requests just collected that could not be loaded."""
        return self._taken.bad_blocks

    def report(self) -> WorkerReport | None:
        """What the scheduler half wants to know of the requests just collected."""
        report = self._taken.report
        return report if report.loads or report.saves else None

    def close(self) -> None:
        """Finish what is under way."""
        if self._transfers is not None:
            self._transfers.close()
