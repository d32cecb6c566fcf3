"""Loads inside the step that computes their request, which then waits for no step of others.

Where other requests run, an asynchronous load costs its request one of their steps. A small load
from memory is quicker than that: the step waits for it before its forward pass. vLLM then takes
the blocks for loaded at once, so that other requests of the same step may find them in its cache.
If the load fails, the forward pass has computed with what was not there: see step_ends.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_kvmarket.connector.idle_time import IdleTime
from vllm_kvmarket.connector.messages import LoadReport, WorkerReport
from vllm_kvmarket.connector.request_state import EngineFacts, Reuse
from vllm_kvmarket.store import DiskStore

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# A hundredth of a second at the speed of memory: less than a step of most models.
MOST_BYTES = 64 << 20


class StepLoads:
    """Which loads end inside a step, and how they went; called on the scheduler's thread only."""

    def __init__(
        self, vllm_config: VllmConfig, facts: EngineFacts, disk: DiskStore, idle_time: IdleTime
    ) -> None:
        parallel = vllm_config.parallel_config
        self._facts = facts
        self._disk = disk
        self._idle_time = idle_time
        # A failed load is known one step later to an asynchronous scheduler, and several steps
        # later to the first of several stages. The disk is this machine's.
        self._allowed = (
            facts.is_plain
            and not vllm_config.scheduler_config.async_scheduling
            and parallel.pipeline_parallel_size == 1
            and parallel.nnodes == 1
        )
        self._admitted: list[Reuse] = []

    def suits(self, reuse: Reuse, external: int) -> bool:
        """Whether a step should wait for this load: others run, it is small, and in memory."""
        if not external or not self._allowed or self._idle_time.is_idle:
            return False
        if self._facts.stored_bytes(external) > MOST_BYTES:
            return False
        size, ranks = self._facts.chunk_tokens, self._facts.world_size
        chunks = reuse.match.chunks if reuse.match else ()
        wanted = chunks[reuse.local // size : -(-(reuse.local + external) // size)]
        return all(
            _in_memory(self._disk.path(chunk.key, rank, ranks))
            for chunk in wanted
            for rank in range(ranks)
        )

    def admitted(self, reuse: Reuse) -> None:
        """A request is computed, or begins to load, in this step. Mutates."""
        if self._allowed:
            self._admitted.append(reuse)

    def ended(self, report: WorkerReport | None) -> dict[str, LoadReport]:
        """Take this step's own loads out of the report of all ranks, by request. Mutates both."""
        admitted, self._admitted = self._admitted, []
        if report is None:
            return {}
        names = [reuse.request.request_id for reuse in admitted if reuse.in_step]
        ended = {name: report.loads.pop(name) for name in names if name in report.loads}
        failed = {key for load in ended.values() for key in load.failures}
        for reuse in admitted if failed else ():
            reuse.lost(failed, self._facts.chunk_tokens)
        return ended


def _in_memory(file: Path) -> bool:
    """Whether the page cache has a chunk's file, as far as a look at each MiB shows."""
    try:
        with file.open("rb", buffering=0) as opened:
            for offset in range(0, os.fstat(opened.fileno()).st_size, 1 << 20):
                os.preadv(opened.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT)
    except OSError:
        return False
    return True
