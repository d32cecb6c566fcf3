"""Steps of the model that end where a recurrent state is stored, inside a document too.

A state is the one that a step leaves, and vLLM chooses how many tokens a step computes. Its
scheduler has a place where it makes steps shorter for its own cache of states, which is off where
kvmarket runs; that place is used for requests that are published or audited.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm_kvmarket.core.model_identity import chunks_between_states

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    from vllm_kvmarket.connector.scheduler import SchedulerHalf


def end_steps_at_states(scheduler: Scheduler, half: SchedulerHalf) -> None:
    """Have an engine's steps end there, if its documents have states inside; mutates its scheduler.

    Raises RuntimeError where vLLM makes them end elsewhere already.
    """
    step = chunks_between_states(half.namespaces.base) * half.engine.facts.chunk_tokens
    if not step:
        return
    if scheduler.need_mamba_block_aligned_split:
        raise RuntimeError("vLLM's scheduler keeps recurrent states at the ends of blocks")

    def shorten(request: Request, count: int, local: int = 0, external: int = 0) -> int:
        if not half.copies_pages_of(request):
            return count
        return min(count, step - (request.num_computed_tokens + local + external) % step)

    scheduler._mamba_block_aligned_split = shorten
    scheduler.need_mamba_block_aligned_split = True


@contextmanager
def steps_end_at(scheduler: Scheduler, token: int) -> Iterator[None]:
    """For a while, have a prefill's step end before this token; mutates an engine's scheduler."""
    before = scheduler.need_mamba_block_aligned_split, scheduler._mamba_block_aligned_split

    def shorten(request: Request, count: int, local: int = 0, external: int = 0) -> int:
        computed = request.num_computed_tokens + local + external
        return min(count, token - computed) if computed < token else count

    scheduler.need_mamba_block_aligned_split = True
    scheduler._mamba_block_aligned_split = shorten
    try:
        yield
    finally:
        scheduler.need_mamba_block_aligned_split, scheduler._mamba_block_aligned_split = before
