"""vLLM's OffloadingConnector on a CPU: its CUDA copy worker replaced by a memcpy, nothing else.

vLLM names the extension point: `spec_name` and `spec_module_path` in the connector's configuration.
The manager, the shared region, the file-system tier and all scheduling are vLLM's own.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class MemcpyWorker(OffloadingWorker):
    """Copies whole pages between the paged cache and the shared region, at once, on all threads.

    One block a chunk and one group of layers, as SmolLM2 has. Raises AssertionError otherwise.
    """

    def __init__(self, kv_caches: Any, blocks_per_chunk: int, region: SharedOffloadRegion) -> None:
        assert blocks_per_chunk == 1 and len(kv_caches.group_data_refs) == 1
        self._region = region
        self._finished: list[TransferResult] = []
        self._paged, self._stored = [], []
        for cache in kv_caches.tensors:
            page = cache.page_size_bytes
            self._paged.append(cache.tensor.view(torch.int8).view(-1, page))
            self._stored.append(region.create_next_worker_view(page))

    def _copy(self, job_id: int, source: Any, target: Any, src: Any, dst: Any) -> bool:
        started = time.perf_counter()
        pairs = list(zip(src.block_ids.tolist(), dst.block_ids.tolist(), strict=True))
        for pages_from, pages_to in zip(source, target, strict=True):
            for a, b in pairs:
                pages_to[b].copy_(pages_from[a])
        size = len(pairs) * sum(pages.shape[1] for pages in source)
        seconds = time.perf_counter() - started
        self._finished.append(
            TransferResult(job_id=job_id, success=True, transfer_size=size, transfer_time=seconds)
        )
        return True

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Paged cache to region."""
        return self._copy(job_id, self._paged, self._stored, src_spec, dst_spec)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Region to paged cache."""
        return self._copy(job_id, self._stored, self._paged, src_spec, dst_spec)

    def get_finished(self) -> list[TransferResult]:
        """Copies that were done since the last call."""
        done, self._finished = self._finished, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Nothing to wait for: a copy is over when its submission returns."""

    def shutdown(self) -> None:
        """Let the region go."""
        self._paged.clear()
        self._stored.clear()
        self._region.cleanup()


class MemcpyTieringSpec(TieringOffloadingSpec):
    """vLLM's tiered offloading with MemcpyWorker for its copies."""

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        """The worker, built once."""
        if not self._worker:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = MemcpyWorker(kv_caches, self.blocks_per_chunk, region)
        return self._worker
