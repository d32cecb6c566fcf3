"""A published document in front of a prompt that its buyer does not have.

Where a route takes token ids, the document's come first. A chat is rendered by the server, so there
the document's text is put in front of the first message: taken back from its tokens, and only when
rendering it gives exactly these tokens again.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from vllm_kvmarket.api.gate.refusals import Refusal, bad
from vllm_kvmarket.api.gate.routes import Kind
from vllm_kvmarket.errors import NotFoundError
from vllm_kvmarket.market import Market

REMEMBERED = 64
# What stands between a document and a question; the first that leaves the document's tokens whole.
_SEPARATORS = ("\n\n", "\n", " ")
_MARK = "kvmarketmark"
_QUESTIONS = ("What is this?", "who wrote it", "7 x 6", "- a list")
# By these an answer would hand out the prompt, and the document with it.
_REVEALING = ("echo", "prompt_logprobs", "return_token_ids", "return_tokens_as_token_ids")


class Documents:
    """The documents of one market as they are put in front of prompts; thread-safe."""

    def __init__(self, market: Market, namespace: bytes, tokenizer: Any) -> None:
        self._market = market
        self._namespace = namespace
        # vLLM's own is used by its threads meanwhile, and they set its truncation.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()
        self._tokens: OrderedDict[str, list[int]] = OrderedDict()
        self._texts: OrderedDict[str, str] = OrderedDict()

    async def place(self, kind: Kind, body: dict[str, Any], document_id: str) -> None:
        """Put a document in front of the body's prompt; mutates the body.

        Raises Refusal: 404 for what is not on offer, 400 for what cannot be placed.
        """
        sampling = body.get("sampling_params")
        for field in _REVEALING:
            nested = sampling.get(field) if isinstance(sampling, dict) else None
            if body.get(field) or nested:
                raise bad(f"{field} cannot be had with a document: it would show its text", field)
        if kind is Kind.INVOCATIONS:
            kind = Kind.CHAT if "messages" in body else Kind.COMPLETIONS
        tokens = await asyncio.to_thread(self._tokens_of, document_id)
        if kind is Kind.TOKENS:
            if body.get("features") or body.get("content_parts"):
                raise bad("a document goes in front of plain token ids only", "features")
            body["token_ids"] = [*tokens, *_list(body, "token_ids")]
        elif kind is Kind.COMPLETIONS:
            await asyncio.to_thread(self._place_before_prompt, body, tokens)
        elif kind in (Kind.CHAT, Kind.MESSAGES, Kind.RESPONSES):
            text = await asyncio.to_thread(self._text_of, document_id, tokens)
            _place_in_conversation(kind, body, text)
        else:
            raise bad("a document cannot be put in front of this route's prompt", "kvmarket")

    def _tokens_of(self, document_id: str) -> list[int]:
        with self._lock:
            tokens = self._tokens.get(document_id)
        if tokens is None:
            try:
                tokens = self._market.catalogue.tokens_of(document_id)
            except NotFoundError as error:
                raise Refusal(404, "document_not_found", str(error), param="kvmarket") from None
            self._remember(self._tokens, document_id, tokens)
        # Whether it is on offer is asked each time; this reads memory only.
        found = self._market.match(self._namespace, tokens)
        if found is None or found.token_count < len(tokens):
            raise Refusal(
                404,
                "document_not_on_offer",
                f"{document_id} is not on offer here: not live, or published for another model",
                param="kvmarket",
            )
        return tokens

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

    def _text_of(self, document_id: str, tokens: list[int]) -> str:
        """What to write in front of the first message so that it begins with these tokens."""
        with self._lock:
            text = self._texts.get(document_id)
            if text is None:
                text = self._read_back(tokens)
        if text is None:
            raise bad(
                f"{document_id} was not published as a chat, or cannot be told from its tokens; "
                "use /v1/completions, or send its text",
                "kvmarket",
                "document_not_placeable",
            )
        self._remember(self._texts, document_id, text)
        return text

    def _read_back(self, tokens: list[int]) -> str | None:
        if not getattr(self._tokenizer, "chat_template", None):
            return None
        head = self._chat(_MARK, tokenize=False).partition(_MARK)[0]
        whole = self._tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if not whole.startswith(head):
            return None
        # A published prefix may end inside of a character.
        text = whole[len(head) :].rstrip("\ufffd")
        for separator in _SEPARATORS:
            asked = [self._chat(text + separator + question) for question in _QUESTIONS]
            if all(list(ids[: len(tokens)]) == tokens for ids in asked):
                return text + separator
        return None

    def _chat(self, content: str, *, tokenize: bool = True) -> Any:
        return self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=tokenize,
            return_dict=False,
        )

    def _remember(self, memory: OrderedDict[str, Any], document_id: str, value: Any) -> None:
        with self._lock:
            memory[document_id] = value
            memory.move_to_end(document_id)
            while len(memory) > REMEMBERED:
                memory.popitem(last=False)


def _list(body: dict[str, Any], field: str) -> list[Any]:
    value = body.get(field)
    if not isinstance(value, list):
        raise bad(f"{field}: expected a list", field)
    return value


def _place_in_conversation(kind: Kind, body: dict[str, Any], text: str) -> None:
    """Put `text` in front of the first message, which must be the user's; mutates the body."""
    for field in ("system", "instructions", "tools", "documents", "chat_template"):
        if body.get(field):
            raise bad(
                f"{field} would come before the document, which was published without it; "
                "leave one of them away",
                field,
            )
    field = "input" if kind is Kind.RESPONSES else "messages"
    if kind is Kind.RESPONSES and isinstance(body.get("input"), str):
        body["input"] = text + body["input"]
        return
    messages = _list(body, field)
    first = messages[0] if messages else None
    if not isinstance(first, dict) or first.get("role") != "user":
        raise bad(f"{field}: the first message must be the user's, behind the document", field)
    content = first.get("content")
    if isinstance(content, str):
        placed: Any = text + content
    elif isinstance(content, list) and content and isinstance(content[0], dict):
        part = content[0]
        if not isinstance(part.get("text"), str):
            raise bad(f"{field}: the first part behind a document must be text", field)
        placed = [{**part, "text": text + part["text"]}, *content[1:]]
    else:
        raise bad(f"{field}: the first message has no text", field)
    body[field] = [{**first, "content": placed}, *messages[1:]]
