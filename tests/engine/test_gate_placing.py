"""A document in front of a chat, rendered by vLLM's own server code; no engine is needed."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from vllm_kvmarket.api.auth import Caller
from vllm_kvmarket.api.errors import ApiError
from vllm_kvmarket.api.gate.placement import Documents, prompts_of
from vllm_kvmarket.api.gate.request_fields import GatedRequest
from vllm_kvmarket.api.gate.route_kinds import Kind
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.market import document_tokens

TEXT = "Ships leave the harbour at dawn. " * 20
QUESTION = "When do ships leave?"
PATHS = {"/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions"}


@pytest.fixture(scope="module")
def app(tiny):
    """vLLM's API server as `vllm launch render` makes it, with the routes of one that generates."""
    from vllm import AsyncEngineArgs
    from vllm.config import VllmConfig
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.launchers.render.app_state import init_render_app_state
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    given = ["--model", str(tiny(1)), "--max-model-len", "4096", "--dtype", "float32"]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(given)
    args.model = str(tiny(1))
    made = build_app(args, ("generate",))
    config = VllmConfig(model_config=AsyncEngineArgs.from_cli_args(args).create_model_config())
    asyncio.run(init_render_app_state(config, made.state, args))
    return made


@pytest.fixture(scope="module")
def tokenizer(app):
    return app.state.online_renderer.renderer.get_tokenizer()


def published(tokenizer, text, **listing):
    """A document's tokens as chat, and a market that sells nothing else."""
    llm = SimpleNamespace(get_tokenizer=lambda: tokenizer)
    tokens = document_tokens.render(llm, text, "chat")
    return tokens, on_offer(tokens, tokenizer, **listing)


def on_offer(tokens, tokenizer, rendered_as="chat"):
    terms = ListingTerms(rendered_as=rendered_as)
    whole = SimpleNamespace(document_id="kvd_1", terms=terms)
    catalogue = SimpleNamespace(
        tokens_of=lambda _: tokens, match_anywhere=lambda _, __: SimpleNamespace(whole=whole)
    )
    market = SimpleNamespace(catalogue=catalogue)
    return Documents(market, bytes(32), tokenizer)


def place(app, documents, kind, body):
    """The tokens that vLLM computes for a body, once the document is in front of it."""

    async def placed():
        request = GatedRequest(app, kind, Caller(), body, b"")
        await documents.place(request, "kvd_1")
        params = body["kv_transfer_params"]
        (planned,) = await prompts_of(request)
        # What vLLM makes of the changed body, and not of what we planned.
        render = {
            Kind.CHAT: app.state.serving_render.render_chat_request,
            Kind.MESSAGES: app.state.serving_render.render_messages_request,
            Kind.RESPONSES: app.state.serving_render.render_responses_request,
        }[kind]
        path = {Kind.CHAT: "/v1/chat/completions"}.get(kind, f"/v1/{kind.value}")
        (route,) = [each for each in app.routes if each.path == path and "POST" in each.methods]
        request = route.dependant.body_params[0].field_info.annotation.model_validate(body)
        computed = (await render(request)).token_ids
        assert list(planned) == list(computed)
        assert set(params) == {"prompt_token_ids"}
        return list(computed)

    return asyncio.run(placed())


def chat_of(tokenizer, *messages):
    conversation = [{"role": role, "content": content} for role, content in messages]
    return list(
        tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    )


BODIES = {
    Kind.CHAT: {"messages": [{"role": "user", "content": QUESTION}]},
    Kind.MESSAGES: {"max_tokens": 1, "messages": [{"role": "user", "content": QUESTION}]},
    Kind.RESPONSES: {"input": QUESTION},
}


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("text", [TEXT, "# Tides\n\n日本語 the tide turns; é\n- a list\n" * 9])
def test_it_is_as_if_the_buyer_had_sent_the_text(app, tokenizer, kind, text):
    """Token by token, on the three routes whose messages vLLM renders."""
    tokens, documents = published(tokenizer, text)
    body = {"model": str(app.state.args.model), **BODIES[kind]}
    computed = place(app, documents, kind, body)
    assert computed[: len(tokens)] == tokens
    sent = chat_of(tokenizer, ("user", f"{text}\n\n{QUESTION}"))
    behind = tokenizer.decode(computed[len(tokens) :])
    assert behind == f"\n\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    if text is TEXT:
        # The list ends with a line's end, which the template's text joins with what follows.
        assert tokenizer.decode(computed).split() == tokenizer.decode(sent).split()


def test_parts_of_text_and_more_messages_follow(app, tokenizer):
    """A conversation that goes on behind the document."""
    tokens, documents = published(tokenizer, TEXT)
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "When?"}]},
        {"role": "assistant", "content": "At dawn."},
        {"role": "user", "content": "Why?"},
    ]
    body = {"model": str(app.state.args.model), "messages": messages}
    computed = place(app, documents, Kind.CHAT, body)
    said = tokenizer.decode(computed[len(tokens) :])
    assert said.startswith("\n\nWhen?<|im_end|>\n<|im_start|>assistant\nAt dawn.<|im_end|>")
    assert said.endswith("Why?<|im_end|>\n<|im_start|>assistant\n")


def test_behind_a_whole_conversation_the_buyers_message_begins(app, tokenizer):
    """Published up to where the next message begins: nothing is put in between."""
    turns = (("system", "You are brief."), ("user", "Tides?"), ("assistant", "Twice a day."))
    whole = chat_of(tokenizer, *turns, ("user", QUESTION))
    tokens = document_tokens.common_prefix([whole, chat_of(tokenizer, *turns, ("user", "who"))])
    body = {"model": str(app.state.args.model), **BODIES[Kind.CHAT]}
    assert place(app, on_offer(tokens, tokenizer), Kind.CHAT, body) == whole


@pytest.mark.parametrize(
    "change",
    [
        {"tools": [{"type": "function", "function": {"name": "a"}}]},
        {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        {"messages": []},
        {"messages": "a"},
        {"chat_template": "{{ messages }}"},
        {"echo": True},
        {"return_token_ids": True},
        {"prompt_logprobs": 0},
        {"enable_response_messages": True},
    ],
)
def test_what_would_come_before_a_document_or_show_it_is_refused(app, tokenizer, change):
    """400, before anything is computed."""
    _, documents = published(tokenizer, TEXT)
    body = {"model": str(app.state.args.model), **BODIES[Kind.CHAT], **change}
    with pytest.raises(ApiError) as refused:
        asyncio.run(documents.place(GatedRequest(app, Kind.CHAT, Caller(), body, b""), "kvd_1"))
    assert refused.value.status == 400


def test_a_text_is_not_put_into_a_chat(app, tokenizer):
    """It has no chat template's words in front."""
    documents = on_offer(list(tokenizer(TEXT)["input_ids"]), tokenizer, rendered_as="text")
    body = {"model": str(app.state.args.model), **BODIES[Kind.CHAT]}
    with pytest.raises(ApiError, match="published as text"):
        asyncio.run(documents.place(GatedRequest(app, Kind.CHAT, Caller(), body, b""), "kvd_1"))
