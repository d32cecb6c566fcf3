"""Puts a published document in front of a prompt, for a buyer who does not have its text.

The document's tokens come first, unchanged. Then come the tokens of what the buyer sent. In a chat,
vLLM renders the buyer's messages with a mark at the document's place. The tokens behind the mark
are kept, and vLLM computes the document and these instead of rendering the messages itself.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import msgspec
from pydantic import BaseModel

from vllm_kvmarket.api.bodies import beside_loop
from vllm_kvmarket.api.errors import ApiError, invalid
from vllm_kvmarket.api.gate.body_checks import body_type
from vllm_kvmarket.api.gate.request_fields import GatedRequest, check_beside_document
from vllm_kvmarket.api.gate.route_kinds import Kind
from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.core.errors import NotFoundError
from vllm_kvmarket.market.market import Market

REMEMBERED = 64
# In kv_transfer_params: the tokens that vLLM computes instead of the messages beside it.
PROMPT_TOKENS = "prompt_token_ids"
# The server's method that renders a kind of body, and the route whose body it takes.
_RENDERERS = {
    Kind.COMPLETIONS: ("render_completion_request", "/v1/completions"),
    Kind.CHAT: ("render_chat_request", "/v1/chat/completions"),
    Kind.MESSAGES: ("render_messages_request", "/v1/messages"),
    Kind.RESPONSES: ("render_responses_request", "/v1/responses"),
}
# The mark at the document's place in a rendered chat: no tokenizer or template changes it.
_MARK = "kvmarketmark"
# Between a document and the buyer's text, in the same message.
_SEPARATOR = "\n\n"
# Enough to recognise what a chat template writes between two messages.
_OPENING_CHARACTERS = 8


class Documents:
    """Puts the documents of one market in front of prompts; thread-safe."""

    def __init__(self, market: Market, namespace: bytes, tokenizer: Any) -> None:
        self._market = market
        self._namespace = namespace
        # vLLM's threads use the original, and change its truncation.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()
        self._tokens_of = lru_cache(REMEMBERED)(market.catalogue.tokens_of)

    async def place(self, request: GatedRequest, document_id: str) -> None:
        """Put a document in front of the body's prompt; mutates the body.

        Raises ApiError: 404 for what is not on offer, 400 for what cannot be placed.
        """
        kind, body = request.kind, request.body
        check_beside_document(kind, body)
        listing, tokens = await asyncio.to_thread(self._find, document_id)
        request.document_tokens = len(tokens)
        if kind is Kind.TOKENS:
            body["token_ids"] = [*tokens, *_list(body, "token_ids")]
        elif kind is Kind.COMPLETIONS:
            await asyncio.to_thread(self._place_before_prompt, body, tokens)
        else:
            if listing.terms.rendered_as != "chat":
                raise invalid(
                    f"{document_id} was published as text; use /v1/completions",
                    "kvmarket",
                    "document_not_placeable",
                )
            marked = replace(request, body=_marked(kind, body))
            (rendered,) = await prompts_of(marked)
            ids = await asyncio.to_thread(self._behind, tokens, rendered)
            body["kv_transfer_params"] = {PROMPT_TOKENS: ids}

    def _find(self, document_id: str) -> tuple[Listing, list[int]]:
        """A document that is on offer, with its tokens. Raises ApiError."""
        try:
            tokens = self._tokens_of(document_id)
        except NotFoundError:
            raise ApiError(
                404, "document_not_found", f"there is no document {document_id}", param="kvmarket"
            ) from None
        # It may have been withdrawn meanwhile.
        match = self._market.catalogue.match_anywhere(self._namespace, tokens)
        whole = None if match is None else match.whole
        if whole is None or whole.document_id != document_id:
            raise ApiError(
                404,
                "document_not_on_offer",
                f"{document_id} is not on offer here: not live, or published for another model",
                param="kvmarket",
            )
        return whole, tokens

    def _place_before_prompt(self, body: dict[str, Any], tokens: list[int]) -> None:
        prompt = body.get("prompt")
        if isinstance(prompt, str):
            body["prompt"] = [*tokens, *self._ids(prompt)]
        elif isinstance(prompt, list) and prompt and all(type(one) is int for one in prompt):
            body["prompt"] = [*tokens, *prompt]
        elif isinstance(prompt, list) and prompt:
            body["prompt"] = [[*tokens, *self._ids(one)] for one in prompt]
        else:
            raise invalid("prompt: expected a text or token ids behind the document", "prompt")

    def _ids(self, prompt: Any) -> Sequence[int]:
        if isinstance(prompt, list):
            return prompt
        if not isinstance(prompt, str):
            raise invalid("prompt: expected texts or lists of token ids", "prompt")
        with self._lock:
            ids: list[int] = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids

    def _behind(self, tokens: list[int], rendered: Sequence[int]) -> list[int]:
        """A document's tokens, then the tokens that a rendered chat has behind the mark."""
        with self._lock:
            head, mark, rest = self._text(rendered).partition(_MARK)
            # A document may be a whole conversation, up to the beginning of the buyer's message.
            opened = self._text(tokens[-2 * _OPENING_CHARACTERS :])
        if not mark:
            raise invalid("this model's chat template leaves the first message out", "kvmarket")
        whole = opened.endswith(head[-_OPENING_CHARACTERS:])
        return [*tokens, *self._ids(rest if whole else _SEPARATOR + rest)]

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


def _list(body: dict[str, Any], field: str) -> list[Any]:
    value = body.get(field)
    if not isinstance(value, list):
        raise invalid(f"{field}: expected a list", field)
    return value


def _marked(kind: Kind, body: dict[str, Any]) -> dict[str, Any]:
    """The body with the mark in front of its first message, which must be the user's; a copy."""
    field = "input" if kind is Kind.RESPONSES else "messages"
    if kind is Kind.RESPONSES and isinstance(body.get("input"), str):
        return {**body, "input": _MARK + body["input"]}
    messages = _list(body, field)
    first = messages[0] if messages else None
    if not isinstance(first, dict) or first.get("role") != "user":
        raise invalid(f"{field}: the first message must be the user's, behind the document", field)
    content = first.get("content")
    if isinstance(content, str):
        marked: Any = _MARK + content
    elif isinstance(content, list) and content and isinstance(content[0], dict):
        part = content[0]
        if not isinstance(part.get("text"), str) or not all(
            isinstance(each, dict) and isinstance(each.get("text"), str) for each in content
        ):
            raise invalid(f"{field}: only text goes into the message behind a document", field)
        marked = [{**part, "text": _MARK + part["text"]}, *content[1:]]
    else:
        raise invalid(f"{field}: the first message has no text", field)
    return {**body, field: [{**first, "content": marked}, *messages[1:]]}


async def prompts_of(request: GatedRequest) -> list[Sequence[int]]:
    """The token ids of every prompt of a request, as vLLM renders them.

    Raises ApiError for what vLLM cannot render.
    """
    kind, body = request.kind, request.body
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
    method, path = _RENDERERS[kind]
    model: type[BaseModel] | None = body_type(request.app, path, body)
    if model is None:
        raise invalid(f"{path} is not served here")
    try:
        # From text: vLLM's validators change what they are given, and copying costs more.
        parsed = await beside_loop(
            request.size,
            lambda each: model.model_validate_json(msgspec.json.encode(each)),
            body,
        )
    except ValueError as error:
        raise invalid(str(error)) from None
    rendered = await getattr(request.app.state.serving_render, method)(parsed)
    each = rendered if isinstance(rendered, list) else [rendered]
    problem = getattr(each[0], "error", None)
    if problem is not None:
        raise invalid(str(getattr(problem, "message", problem)))
    return [one.token_ids for one in each]


def _token_ids(value: Any, param: str) -> list[int]:
    if not isinstance(value, list) or not all(type(each) is int and each >= 0 for each in value):
        raise invalid(f"{param}: expected token ids", param)
    return value
