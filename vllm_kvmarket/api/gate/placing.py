"""A published document in front of a prompt that its buyer does not have.

The document's tokens come first, exactly, and what the buyer sent is tokenised behind them. Of a
chat, vLLM renders the buyer's messages as if the document were in the first one; what comes behind
the document in that is kept, and vLLM is given the tokens instead of messages to render.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from vllm_kvmarket.api.gate.refusals import Refusal, bad
from vllm_kvmarket.api.gate.rendering import PROMPT_TOKENS, prompts_of
from vllm_kvmarket.api.gate.routes import Kind
from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.core.errors import NotFoundError
from vllm_kvmarket.market.market import Market

REMEMBERED = 64
# Where the document ends in a rendered chat; no tokenizer or template does anything to it.
_MARK = "kvmarketmark"
# Between a document and what its buyer writes behind it, in the same message.
_SEPARATOR = "\n\n"
# Enough of a chat template's words between two messages to know them by.
_OPENING_CHARACTERS = 8
# By these an answer would hand out the prompt, and the document with it.
_REVEALING = ("echo", "return_token_ids", "enable_response_messages", "prompt_logprob")
# They would be rendered before the first message.
_BEFORE = (
    "system",
    "instructions",
    "tools",
    "functions",
    "documents",
    "chat_template",
    "previous_input_messages",
)


class Documents:
    """The documents of one market as they are put in front of prompts; thread-safe."""

    def __init__(self, market: Market, namespace: bytes, tokenizer: Any) -> None:
        self._market = market
        self._namespace = namespace
        # vLLM's own is used by its threads meanwhile, and they set its truncation.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()
        self._tokens: OrderedDict[str, list[int]] = OrderedDict()

    async def place(self, app: Any, kind: Kind, body: dict[str, Any], document_id: str) -> None:
        """Put a document in front of the body's prompt; mutates the body.

        Raises Refusal: 404 for what is not on offer, 400 for what cannot be placed.
        """
        _refuse_revealing(body)
        _refuse_revealing(body.get("sampling_params"))
        listing, tokens = await asyncio.to_thread(self._find, document_id)
        if kind is Kind.TOKENS:
            if body.get("features") or body.get("content_parts"):
                raise bad("a document goes in front of plain token ids only", "features")
            body["token_ids"] = [*tokens, *_list(body, "token_ids")]
        elif kind is Kind.COMPLETIONS:
            await asyncio.to_thread(self._place_before_prompt, body, tokens)
        elif kind in (Kind.CHAT, Kind.MESSAGES, Kind.RESPONSES):
            if listing.rendered_as != "chat":
                raise bad(
                    f"{document_id} was published as text; use /v1/completions",
                    "kvmarket",
                    "document_not_placeable",
                )
            (rendered,) = await prompts_of(app, kind, _marked(kind, body))
            ids = await asyncio.to_thread(self._behind, tokens, rendered)
            body["kv_transfer_params"] = {PROMPT_TOKENS: ids}
        else:
            raise bad("a document cannot be put in front of this route's prompt", "kvmarket")

    def _find(self, document_id: str) -> tuple[Listing, list[int]]:
        """A document that is on offer, with its tokens. Raises Refusal."""
        with self._lock:
            tokens = self._tokens.get(document_id)
        if tokens is None:
            try:
                tokens = self._market.catalogue.tokens_of(document_id)
            except NotFoundError:
                raise Refusal(
                    404,
                    "document_not_found",
                    f"there is no document {document_id}",
                    param="kvmarket",
                ) from None
            with self._lock:
                self._tokens[document_id] = tokens
                while len(self._tokens) > REMEMBERED:
                    self._tokens.popitem(last=False)
        # Whether it is on offer is asked each time; this reads memory, mostly.
        found = self._market.match(self._namespace, tokens)
        if found is None or found.listing.document_id != document_id:
            raise Refusal(
                404,
                "document_not_on_offer",
                f"{document_id} is not on offer here: not live, or published for another model",
                param="kvmarket",
            )
        return found.listing, tokens

    def _place_before_prompt(self, body: dict[str, Any], tokens: list[int]) -> None:
        if body.get("prompt_embeds") or body.get("suffix"):
            raise bad("a document goes in front of a plain prompt only", "prompt")
        prompt = body.get("prompt")
        if isinstance(prompt, str):
            body["prompt"] = [*tokens, *self._ids(prompt)]
        elif isinstance(prompt, list) and prompt and all(type(one) is int for one in prompt):
            body["prompt"] = [*tokens, *prompt]
        elif isinstance(prompt, list) and prompt:
            body["prompt"] = [[*tokens, *self._ids(one)] for one in prompt]
        else:
            raise bad("prompt: expected a text or token ids behind the document", "prompt")

    def _ids(self, prompt: Any) -> Sequence[int]:
        if isinstance(prompt, list):
            return prompt
        if not isinstance(prompt, str):
            raise bad("prompt: expected texts or lists of token ids", "prompt")
        with self._lock:
            ids: list[int] = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids

    def _behind(self, tokens: list[int], rendered: Sequence[int]) -> list[int]:
        """A document's tokens and, behind them, what a rendered chat has behind the mark."""
        with self._lock:
            head, mark, rest = self._text(rendered).partition(_MARK)
            # A document may be a whole conversation, up to where the buyer's message begins.
            opened = self._text(tokens[-2 * _OPENING_CHARACTERS :])
        if not mark:
            raise bad("this model's chat template leaves the first message out", "kvmarket")
        whole = opened.endswith(head[-_OPENING_CHARACTERS:])
        return [*tokens, *self._ids(rest if whole else _SEPARATOR + rest)]

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


def _refuse_revealing(fields: Any) -> None:
    """Raises Refusal for a body, or sampling parameters, that would show the prompt."""
    for field, value in fields.items() if isinstance(fields, dict) else ():
        # Not by truth: prompt_logprobs may be 0, and shows the prompt.
        if field.startswith(_REVEALING) and value is not None and value is not False:
            raise bad(f"{field} cannot be had with a document: it would show its text", field)


def _list(body: dict[str, Any], field: str) -> list[Any]:
    value = body.get(field)
    if not isinstance(value, list):
        raise bad(f"{field}: expected a list", field)
    return value


def _marked(kind: Kind, body: dict[str, Any]) -> dict[str, Any]:
    """The body with the mark in front of its first message, which must be the user's. A copy."""
    for field in _BEFORE:
        if body.get(field):
            raise bad(
                f"{field} would come before the document, which was published without it; "
                "leave one of them away",
                field,
            )
    field = "input" if kind is Kind.RESPONSES else "messages"
    if kind is Kind.RESPONSES and isinstance(body.get("input"), str):
        return {**body, "input": _MARK + body["input"]}
    messages = _list(body, field)
    first = messages[0] if messages else None
    if not isinstance(first, dict) or first.get("role") != "user":
        raise bad(f"{field}: the first message must be the user's, behind the document", field)
    content = first.get("content")
    if isinstance(content, str):
        marked: Any = _MARK + content
    elif isinstance(content, list) and content and isinstance(content[0], dict):
        part = content[0]
        if not isinstance(part.get("text"), str) or not all(
            isinstance(each, dict) and isinstance(each.get("text"), str) for each in content
        ):
            raise bad(f"{field}: only text goes into the message behind a document", field)
        marked = [{**part, "text": _MARK + part["text"]}, *content[1:]]
    else:
        raise bad(f"{field}: the first message has no text", field)
    return {**body, field: [{**first, "content": marked}, *messages[1:]]}
