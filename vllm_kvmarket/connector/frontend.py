"""The engine as the API server's routes see it: text to tokens, and the operator's requests."""

from __future__ import annotations

import asyncio
import copy
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from vllm_kvmarket.connector.namespaces import base_facts
from vllm_kvmarket.connector.request_params import FIELD
from vllm_kvmarket.connector.weight_changes import NAMESPACE
from vllm_kvmarket.core.errors import NotPublishableError, PublishFailedError
from vllm_kvmarket.core.model_identity import namespace_digest
from vllm_kvmarket.market import document_tokens

# Behind every buyer's request, where vLLM was started with --scheduling-policy priority.
PRIORITY = 1 << 20
# So long holds what the engines said of their namespace.
KNOWN_S = 2.0
# So long a quote waits for engines that may be testing themselves.
PATIENCE_S = 0.5


class Frontend:
    """An AsyncLLM and the chat template that its server uses; reads the weights when they are new.

    `document` and `prompt` are for one thread at a time: tokenizers are not made for more.
    """

    def __init__(self, engine_client: Any, renderer: Any, home: Path) -> None:
        config = engine_client.vllm_config
        self._engine = engine_client
        self.context_tokens = int(config.model_config.max_model_len)
        # A model without attention has one block, as long as its context.
        no_attention = config.model_config.is_attention_free
        self.block_tokens = 1 if no_attention else int(config.cache_config.block_size or 1)
        self.vocabulary_tokens = int(config.model_config.get_vocab_size())
        self.namespace = namespace_digest(base_facts(config, home))
        self._reuses = False
        self._asking: asyncio.Task[None] | None = None
        self._ask_again_at_s = 0.0
        # vLLM uses its own at the same time.
        self._tokenizer = _Tokenizer(
            copy.deepcopy(engine_client.get_tokenizer()),
            getattr(renderer, "chat_template", None),
            getattr(renderer, "default_chat_template_kwargs", None) or {},
        )

    def document(
        self,
        text: str | None,
        messages: Sequence[dict[str, Any]] | None,
        as_: Literal["text", "chat"],
    ) -> list[int]:
        """The tokens under which a document is published: a text, or the beginning of a chat.

        Raises NotPublishableError.
        """
        with _Refusing():
            if messages is None:
                return document_tokens.render(self._tokenizer, text or "", as_)
            return document_tokens.render_messages(self._tokenizer.chat, messages)

    def prompt(self, text: str | None, messages: Sequence[dict[str, Any]] | None) -> list[int]:
        """The tokens of a completion's prompt, or of a chat. Raises NotPublishableError."""
        with _Refusing():
            if messages is None:
                return list(self._tokenizer(text or "")["input_ids"])
            return self._tokenizer.chat(messages)

    async def reuses(self) -> bool:
        """Whether all engines reuse now what is published for `namespace`, as of a moment ago.

        Not before their self-test has passed, nor while nobody knows which weights they have.
        """
        if self._asking is None and time.monotonic() >= self._ask_again_at_s:
            self._asking = asyncio.create_task(self._ask())
        if self._asking is not None and not self._reuses:
            await asyncio.wait([self._asking], timeout=PATIENCE_S)
        return self._reuses

    async def _ask(self) -> None:
        try:
            found = await self._engine.engine_core.call_utility_all_async(NAMESPACE)
            self._reuses = {self.namespace.hex()} == set(found)
        except Exception:  # noqa: BLE001  # an engine that has died says so elsewhere
            self._reuses = False
        finally:
            self._ask_again_at_s = time.monotonic() + KNOWN_S
            self._asking = None

    async def operate(self, tokens: Sequence[int], params: dict[str, Any]) -> dict[str, Any]:
        """Run an operator's request for one token; returns the scheduler half's answer.

        Raises PublishFailedError, and what vLLM raises of an engine that died.
        """
        sampling = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"kv_transfer_params": {FIELD: params}},
        )
        answer: dict[str, Any] = {}
        async for output in self._engine.generate(
            {"prompt_token_ids": list(tokens)},
            sampling,
            f"kvmarket-{uuid.uuid4().hex}",
            priority=PRIORITY,
        ):
            answer = output.kv_transfer_params or {}
        if FIELD not in answer:
            raise PublishFailedError("the engine's scheduler half did not answer; see its log")
        return dict(answer[FIELD])


class _Tokenizer:
    """A tokenizer with the server's chat template, in the place of a vllm.LLM for rendering."""

    def __init__(self, tokenizer: Any, template: str | None, settings: dict[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._settings = dict(settings)
        if template is not None:
            self._settings["chat_template"] = template
        self.chat_template = template or getattr(tokenizer, "chat_template", None)

    def get_tokenizer(self) -> _Tokenizer:
        """See vllm.LLM."""
        return self

    def __call__(self, text: str) -> Any:
        return self._tokenizer(text)

    def apply_chat_template(self, conversation: Any, **more: Any) -> Any:
        """See transformers."""
        return self._tokenizer.apply_chat_template(conversation, **{**self._settings, **more})

    def chat(self, messages: Any) -> list[int]:
        """The tokens of a chat up to where the model answers."""
        if not self.chat_template:
            raise NotPublishableError("this model has no chat template; send text instead")
        return list(
            self.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
        )


class _Refusing:
    """Turns any error of a tokenizer or a chat template into NotPublishableError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, NotPublishableError):
            reason = str(error).partition("\n")[0][:200]
            raise NotPublishableError(f"this cannot be rendered for the model: {reason}") from error
