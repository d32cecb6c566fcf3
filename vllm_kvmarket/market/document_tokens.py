"""From a document's text to the tokens that are published and matched.

Tokens decide what is sold. Published as chat, a document is rendered through the model's chat
template up to the last token that does not depend on what the buyer asks behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from vllm_kvmarket.core.errors import NotPublishableError

Message = dict[str, Any]
# What buyers may write behind a document, inside its message: each starts in a way that tokenizers
# merge differently with the document's end. The last one ends the message there.
CONTINUATIONS = ("\n\nWhat is this?", "\nwho", " Explain.", "0", "\n\n\n- a", "")
# What buyers may say in a message of their own behind the model's last answer.
NEXT_MESSAGES = ("What is this?", "who", " a", "0", "\n\n- a")


def render(llm: Any, text: str, as_: Literal["text", "chat"]) -> list[int]:
    """The tokens under which `text` is published on `llm`. Raises NotPublishableError."""
    if not isinstance(text, str):
        raise NotPublishableError(
            f"the document's text is of type {type(text).__name__}; pass text as a str, "
            "or tokens as token_ids=[...]"
        )
    if not text.strip():
        raise NotPublishableError("the document is empty; there is nothing to publish")
    tokenizer = llm.get_tokenizer()
    if as_ == "text":
        return list(tokenizer(text)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise NotPublishableError(
            "this model has no chat template; publish the document as text instead"
        )

    def render_chat(messages: Sequence[Message]) -> list[int]:
        return list(
            tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, return_dict=False
            )
        )

    return render_messages(render_chat, [{"role": "user", "content": text}])


def render_messages(
    render_chat: Callable[[Sequence[Message]], list[int]], messages: Sequence[Message]
) -> list[int]:
    """The tokens with which every chat begins that goes on from `messages`.

    `render_chat` gives the tokens of a whole chat, up to where the model answers. Raises
    NotPublishableError for messages without any text.
    """
    if not any(message["content"].strip() for message in messages):
        raise NotPublishableError("the messages are empty; there is nothing to publish")
    *before, last = messages
    if last["role"] == "user":
        conversations = [
            [*before, {**last, "content": last["content"] + more}] for more in CONTINUATIONS
        ]
    else:
        conversations = [
            [*messages, {"role": "user", "content": content}] for content in NEXT_MESSAGES
        ]
    return common_prefix([render_chat(conversation) for conversation in conversations])


def common_prefix(sequences: list[list[int]]) -> list[int]:
    """The longest prefix that all sequences share."""
    shared: list[int] = []
    for column in zip(*sequences, strict=False):
        if any(token != column[0] for token in column):
            break
        shared.append(column[0])
    return shared


def check_publishable(llm: Any, tokens: list[int]) -> None:
    """Raises NotPublishableError for a document that `llm` could not publish."""
    config = llm.llm_engine.vllm_config
    # A model without attention has one block, as long as its context.
    no_attention = config.model_config.is_attention_free
    block_tokens = 1 if no_attention else config.cache_config.block_size
    context = config.model_config.max_model_len
    if len(tokens) < block_tokens:
        raise NotPublishableError(
            f"the document has {len(tokens)} tokens, fewer than one block ({block_tokens}); "
            "reusing it would save nothing"
        )
    # One token of an answer must still fit.
    if len(tokens) >= context:
        raise NotPublishableError(
            f"the document has {len(tokens)} tokens and the model's context is {context}; "
            "publish it in parts, or raise --max-model-len"
        )
