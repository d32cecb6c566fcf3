"""Which tokens a body becomes, by vLLM's own rendering: a quote is for what is computed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from vllm_kvmarket.api.gate.refusals import bad
from vllm_kvmarket.api.gate.routes import Kind

# In kv_transfer_params: what vLLM computes in the place of the messages beside it.
PROMPT_TOKENS = "prompt_token_ids"

# The server's method that renders, and the route whose body it takes.
_RENDERS = {
    Kind.COMPLETIONS: ("render_completion_request", "/v1/completions"),
    Kind.CHAT: ("render_chat_request", "/v1/chat/completions"),
    Kind.MESSAGES: ("render_messages_request", "/v1/messages"),
    Kind.RESPONSES: ("render_responses_request", "/v1/responses"),
}


async def prompts_of(app: Any, kind: Kind, body: dict[str, Any]) -> list[Sequence[int]]:
    """The token ids of every prompt in a body. Raises Refusal for what vLLM cannot render, or has
    no way to render without computing it.
    """
    placed = (body.get("kv_transfer_params") or {}).get(PROMPT_TOKENS)
    if placed is not None:
        return [placed]
    if kind is Kind.TOKENS:
        return [_token_ids(body.get("token_ids"), "token_ids")]
    if kind is Kind.COMPLETIONS:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
            return [_token_ids(prompt, "prompt")]
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], list):
            return [_token_ids(each, "prompt") for each in prompt]
    method, path = _RENDERS[kind]
    request = _request_type(app, path)
    try:
        # vLLM's validators change what they are given in some places.
        told = request.model_validate(copy.deepcopy(body))
    except ValueError as error:
        raise bad(str(error)) from None
    rendered = await getattr(app.state.serving_render, method)(told)
    each = rendered if isinstance(rendered, list) else [rendered]
    problem = getattr(each[0], "error", None)
    if problem is not None:
        raise bad(str(getattr(problem, "message", problem)))
    return [one.token_ids for one in each]


def _token_ids(value: Any, param: str) -> list[int]:
    if not isinstance(value, list) or not all(type(each) is int and each >= 0 for each in value):
        raise bad(f"{param}: expected token ids", param=param)
    return value


def _request_type(app: Any, path: str) -> Any:
    """The class that vLLM parses a route's body with."""
    for route in app.routes:
        if getattr(route, "path", "") == path and "POST" in (route.methods or ()):
            return route.dependant.body_params[0].field_info.annotation
    raise bad(f"{path} is not served here")
