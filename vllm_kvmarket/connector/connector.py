"""The connector that vLLM's engine loads: it hands each call to one of its two halves."""

from __future__ import annotations

import sys
import uuid
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from vllm_kvmarket.connector import step_ends
from vllm_kvmarket.connector.cache_groups import grain_of, groups_of, replicas
from vllm_kvmarket.connector.flags import check_prepared
from vllm_kvmarket.connector.messages import Instructions
from vllm_kvmarket.connector.metrics import MarketPromMetrics, MarketStats
from vllm_kvmarket.connector.request_state import EngineFacts
from vllm_kvmarket.connector.scheduler import SchedulerHalf
from vllm_kvmarket.connector.supported_models import check_groups
from vllm_kvmarket.connector.worker import WorkerHalf
from vllm_kvmarket.core.config import load

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
        PromMetric,
        PromMetricT,
    )
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


# A load has a dozen such waits; at Python's own 5 ms they took as long as the load itself.
SWITCH_INTERVAL_S = 0.0002


class KVMarketConnector(KVConnectorBase_V1, SupportsHMA):
    """Built once in the scheduler's process and once in each worker's."""

    _cache_hit_source = CacheHitSource.DISK

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        # Both processes' main threads spin while they wait for each other. They release the
        # interpreter so briefly that a waking thread misses it; after this time Python forces them.
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
        config = load(self._kv_transfer_config.kv_connector_extra_config)
        check_prepared(self._kv_transfer_config, config)
        groups = groups_of(kv_cache_config, config.chunk_tokens)
        check_groups(vllm_config, groups)
        self._starts_early = not kv_cache_config.needs_kv_cache_zeroing
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        if role is KVConnectorRole.SCHEDULER:
            # Only this process has vLLM's engine core.
            from vllm_kvmarket.connector import self_test, weight_changes

            step_ends.install()
            weight_changes.install()
            self_test.install()
            # Request ids repeat from one run of an offline engine to the next; ledger ids must not.
            name = uuid.uuid4().hex[:12]
            parallel = vllm_config.parallel_config
            ranks = parallel.world_size // replicas(groups, parallel.tensor_parallel_size)
            grain = grain_of(groups, vllm_config.device_config.device_type)
            facts = EngineFacts(name, groups, config.chunk_tokens, ranks, grain)
            self._scheduler = SchedulerHalf(vllm_config, config, facts)
        else:
            self._worker = WorkerHalf(vllm_config, config, groups, kv_cache_config.num_blocks)

    @property
    def scheduler(self) -> SchedulerHalf:
        """The scheduler half; only in the scheduler's process."""
        assert self._scheduler is not None
        return self._scheduler

    @property
    def scheduler_half(self) -> SchedulerHalf | None:
        """The same, or None; for the calls that vLLM has not: step_ends.py, weight_changes.py."""
        return self._scheduler

    @property
    def worker(self) -> WorkerHalf:
        """The worker half; only in a worker's process."""
        assert self._worker is not None
        return self._worker

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a save that preemption drops is a document published later, not a lost answer."""
        return False

    # The scheduler's calls

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """Take the engine's block pool: vLLM's paged cache."""
        self.scheduler.bind(gpu_block_pool)

    def on_new_request(self, request: Request) -> None:
        """Match a new request and start what it asks for."""
        self.scheduler.arrived(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens to load behind the computed ones, and whether beside a step; None: ask again."""
        return self.scheduler.ready(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Plan the load into the blocks that the request was given."""
        self.scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """This step's plans for the worker half."""
        self.scheduler.scheduled(
            scheduler_output.total_num_scheduled_tokens, len(scheduler_output.num_scheduled_tokens)
        )
        self.scheduler.copy_pages(scheduler_output)
        return self.scheduler.take_instructions(scheduler_output.num_scheduled_tokens)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take in what the workers have done."""
        self.scheduler.worker_reported(connector_output)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """End a request of a model with one group; see `request_finished_all_groups`."""
        return self.scheduler.finished(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """End a request; returns whether its blocks are still needed, and its answer's object."""
        return self.scheduler.finished(request, block_ids)

    def has_pending_push_work(self) -> bool:
        """Whether an idle engine should make a step: it delivers the scheduler half's metrics."""
        return self._scheduler is not None and self._scheduler.metrics.has_news

    # The workers' calls

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take vLLM's KV memory."""
        self.worker.register(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Start this step's loads and saves before its forward pass, so that they run beside it.

        vLLM calls `start_load_kv` behind the pass. But it may zero new blocks in between.
        """
        assert isinstance(kv_connector_metadata, Instructions)
        if self._starts_early:
            self.worker.start(kv_connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Start this step's loads and saves where blocks are zeroed first.

        In front of the forward pass, where that has to wait for a load; waits for it.
        """
        instructions = self._get_connector_metadata()
        assert isinstance(instructions, Instructions)
        if not self._starts_early:
            self.worker.start(instructions)
        if any(load.in_step for load in instructions.loads):
            self.worker.wait_for_step_loads()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: loads end before the forward pass of their request."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        """Nothing: a document is stored when its request has finished."""

    def wait_for_save(self) -> None:
        """Copy pages whose blocks the scheduler may free; it keeps all others until the end."""
        instructions = self._get_connector_metadata()
        assert isinstance(instructions, Instructions)
        self.worker.step_ended(instructions)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Which requests' loads and saves have ended."""
        return self.worker.collect()

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that could not be loaded; vLLM computes them."""
        return self.worker.bad_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """How the loads and saves that have ended went, for the scheduler half."""
        return self.worker.report()

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """The counts of this half since the last call."""
        if self._scheduler is not None:
            return self._scheduler.metrics.take()
        return self.worker.stats()

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        """Statistics as they arrive from a worker."""
        return MarketStats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        """The metrics that the API server exports."""
        return MarketPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # Both

    def reset_cache(self) -> bool:
        """Let pinned documents' blocks go: `reset_prefix_cache(reset_connector=True)` asks this."""
        if self._scheduler is not None:
            self._scheduler.pins.unpin_unless(lambda _: False)
            self._scheduler.metrics.pinned(self._scheduler.pins.block_count)
        return True

    def shutdown(self) -> None:
        """Finish what is under way and release the market."""
        if self._scheduler is not None:
            self._scheduler.close()
        if self._worker is not None:
            self._worker.close()
