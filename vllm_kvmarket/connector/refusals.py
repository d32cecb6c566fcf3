"""Ends requests that the market refuses, before vLLM computes any of their tokens.

vLLM's connector interface can only let a request wait or be computed. So vLLM's scheduler is asked
to end it as if its client had left, at the end of the step in which it was refused, and the answer
says why. `install` changes vLLM's class, once a process: each scheduler looks at its own connector.
"""

from __future__ import annotations

import functools
from typing import Any

import msgspec
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from vllm_kvmarket.connector.request_params import FIELD, Refusal

_INSTALLED = "_kvmarket_refusals"


def install() -> None:
    """Have vLLM's schedulers end the requests that their connector has refused."""
    if getattr(Scheduler, _INSTALLED, False):
        return
    update_from_output = Scheduler.update_from_output

    @functools.wraps(update_from_output)
    def update_and_refuse(self: Scheduler, *args: Any, **kwargs: Any) -> dict[int, Any]:
        outputs = update_from_output(self, *args, **kwargs)
        take_refusals = getattr(self.connector, "take_refusals", None)
        if take_refusals is not None and (refusals := take_refusals()):
            end_refused(self, refusals, outputs)
        return outputs

    Scheduler.update_from_output = update_and_refuse
    setattr(Scheduler, _INSTALLED, True)


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
