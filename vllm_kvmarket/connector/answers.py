"""What a request's answer says of the market, and whether there was one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.sampling_params import RequestOutputKind
from vllm.v1.request import RequestStatus

from vllm_kvmarket.connector.purchases import Charge
from vllm_kvmarket.connector.request_state import RequestState

if TYPE_CHECKING:
    from vllm.v1.request import Request

ANSWERED = (
    RequestStatus.FINISHED_STOPPED,
    RequestStatus.FINISHED_LENGTH_CAPPED,
    RequestStatus.FINISHED_REPETITION,
)


def is_answered(request: Request) -> bool:
    """Whether an answer, or the beginning of one, has reached who asked."""
    if request.status in ANSWERED:
        return True
    if request.status is not RequestStatus.FINISHED_ABORTED or not request.num_output_tokens:
        return False
    params = request.sampling_params
    # Of an answer that is not streamed nothing has gone out when its client leaves. Yet vLLM also
    # aborts a request whose answer is whole: one that came to a stop string, which only the
    # front end sees.
    return params is not None and (
        params.output_kind is not RequestOutputKind.FINAL_ONLY or bool(params.stop)
    )


def answer_of(
    state: RequestState, request: Request, charge: Charge | None = None
) -> dict[str, Any]:
    """The object that the answer carries under the market's field."""
    usage = state.usage(request.num_output_tokens)
    answer: dict[str, Any] = {
        "document_id": state.match.listing.document_id if state.match else None,
        "matched_tokens": usage.matched,
        "reused_tokens": usage.reused,
        "loaded_tokens": usage.loaded,
        "computed_tokens": usage.computed,
        "charge_nano": charge.charge_nano if charge else 0,
        "receipt_id": charge.receipt_id if charge else None,
    }
    if state.declined:
        answer["declined"] = state.declined
    return answer
