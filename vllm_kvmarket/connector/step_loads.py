"""Loads inside the step that computes their request, which then waits for no step of others.

Where other requests run, an asynchronous load costs its request one of their steps. A small load
from memory is quicker than that: the step waits for it before its forward pass. vLLM then takes
the blocks for loaded at once, so that other requests of the same step may find them in its cache.
If the load fails, the forward pass has computed with what was not there. vLLM computes these tokens
again, but leaves the blocks in its cache meanwhile, and ends requests before it asks a connector
how its loads went. `install` changes both, once a process.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.scheduler import Scheduler

from vllm_kvmarket.connector.idle_time import IdleTime
from vllm_kvmarket.connector.messages import LoadReport, WorkerReport
from vllm_kvmarket.connector.request_state import EngineFacts, Reuse
from vllm_kvmarket.store import DiskStore

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# A hundredth of a second at the speed of memory: less than a step of most models.
MOST_BYTES = 64 << 20
_INSTALLED = "_kvmarket_step_loads"


def install() -> None:
    """Have vLLM's schedulers ask their connector how a step's loads went before all else."""
    if getattr(Scheduler, _INSTALLED, False):
        return
    update_from_output = Scheduler.update_from_output

    @functools.wraps(update_from_output)
    def note_and_update(
        self: Scheduler, scheduler_output: Any, model_runner_output: Any
    ) -> dict[int, Any]:
        ended = getattr(self.connector, "step_loads_ended", None)
        output = model_runner_output.kv_connector_output
        if ended is not None and output is not None:
            ended(output)
            if output.invalid_block_ids:
                forget_blocks(self, output.invalid_block_ids)
        return update_from_output(self, scheduler_output, model_runner_output)

    Scheduler.update_from_output = note_and_update
    setattr(Scheduler, _INSTALLED, True)


def forget_blocks(scheduler: Scheduler, bad: set[int]) -> None:
    """Let nobody find what running requests have in these blocks, nor what they computed behind
    them; mutates the prefix cache of a model with one group.
    """
    for request in scheduler.running:
        (blocks,) = scheduler.kv_cache_manager.get_block_ids(request.request_id)
        first = next((index for index, block in enumerate(blocks) if block in bad), len(blocks))
        scheduler.kv_cache_manager.evict_blocks(set(blocks[first:]))


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
