"""What the market has vLLM's scheduler do when a step has ended; `install` changes its class, once.

Before all else, hear how the loads went that the step waited for. vLLM computes again what was not
loaded, but leaves these blocks in its prefix cache meanwhile, and ends requests before it asks a
connector how its loads went.

Last, end the requests that the market refuses, before vLLM computes any of their tokens. vLLM's
connector interface can only let a request wait or be computed. So they end as if their clients had
left, in the step in which they were refused, and their answers say why.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import msgspec
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from vllm_kvmarket.connector.request_params import FIELD, Refusal

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput

    from vllm_kvmarket.connector.scheduler import SchedulerHalf

_INSTALLED = "_kvmarket_step_ends"


def install() -> None:
    """Have vLLM's schedulers ask the scheduler half of their connector, if it is the market's."""
    if getattr(Scheduler, _INSTALLED, False):
        return
    update_from_output = Scheduler.update_from_output

    @functools.wraps(update_from_output)
    def update(
        self: Scheduler,
        scheduler_output: SchedulerOutput,
        model_runner_output: ModelRunnerOutput,
    ) -> dict[int, EngineCoreOutputs]:
        half: SchedulerHalf | None = getattr(self.connector, "scheduler_half", None)
        if half is None:
            return update_from_output(self, scheduler_output, model_runner_output)
        if (reported := model_runner_output.kv_connector_output) is not None:
            half.step_loads_ended(reported)
            if reported.invalid_block_ids:
                forget_blocks(self, reported.invalid_block_ids)
        outputs = update_from_output(self, scheduler_output, model_runner_output)
        if refusals := half.take_refusals():
            end_refused(self, refusals, outputs)
        return outputs

    Scheduler.update_from_output = update
    setattr(Scheduler, _INSTALLED, True)


def forget_blocks(scheduler: Scheduler, bad: set[int]) -> None:
    """Let nobody find what running requests have in these blocks, nor what they computed behind
    them; mutates the prefix cache of a model with one group.
    """
    for request in scheduler.running:
        (blocks,) = scheduler.kv_cache_manager.get_block_ids(request.request_id)
        first = next((index for index, block in enumerate(blocks) if block in bad), len(blocks))
        scheduler.kv_cache_manager.evict_blocks(set(blocks[first:]))


def end_refused(
    scheduler: Scheduler, refusals: dict[str, Refusal], outputs: dict[int, EngineCoreOutputs]
) -> None:
    """End these requests, which are waiting, and add their answers to a step's; mutates both."""
    for request in scheduler.finish_requests(list(refusals), RequestStatus.FINISHED_ABORTED):
        refusal = refusals[request.request_id]
        if scheduler.log_stats:
            # Without it vLLM's metrics would count its start as the time of its queuing.
            request.record_event(EngineCoreEventType.SCHEDULED)
        output = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[],
            finish_reason=request.get_finished_reason(),
            events=request.take_events(),
            kv_transfer_params={FIELD: {"error": msgspec.to_builtins(refusal)}},
            trace_headers=request.trace_headers,
        )
        outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)
