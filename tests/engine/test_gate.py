"""The gate in front of a real server: who pays, what is shared, and what clients may say."""

from __future__ import annotations

import time

import httpx
import pytest
from anthropic import Anthropic
from openai import AuthenticationError, OpenAI

from tests.support.engines import words
from tests.support.serving import DOCUMENT, MODEL, PRICE_NANO, TEXT, cached, sold

pytest_plugins = ("tests.support.gate_server",)


# Keys


def test_a_key_buys_on_its_account(server, document, alice):
    """Reused to the token, charged to it, and the usage says what was charged."""
    prompt = DOCUMENT + words(7001, 12)
    full = server.complete(prompt)
    before = server.spent("alice")
    answer = server.complete(prompt, alice)
    assert answer["choices"][0]["text"] == full["choices"][0]["text"]
    assert sold(answer)["reused_tokens"] == 600
    assert cached(answer) == 600
    assert server.spent("alice") - before == sold(answer)["charge_nano"] == 600 * PRICE_NANO
    again = server.post(
        "/v1/completions",
        {"model": MODEL, "prompt": prompt, "max_tokens": 1},
        headers={"x-api-key": alice},
    )
    assert sold(again.json())["reused_tokens"] == 600


def test_without_a_key_everything_is_computed(server, document):
    """No reuse and no charge, whatever was in the cache; also with somebody else's kind of key."""
    prompt = DOCUMENT + words(7002, 12)
    for key in (None, "sk-something-else"):
        answer = server.complete(prompt, key)
        assert cached(answer) == 0
        assert sold(answer)["reused_tokens"] == sold(answer)["charge_nano"] == 0


def test_wrong_and_revoked_keys_are_refused(server, alice):
    """With 401, on every route that generates, and within a second of the revocation."""
    secret, key_id = server.keys.create("alice", ["buyer"])
    server.complete([5, 6, 7], secret)
    server.keys.revoke(key_id)
    time.sleep(1)
    for wrong in (secret, "kvm_wrong", "kvm_" + "a" * 43):
        with (
            # Other tests may have used up what this address may get wrong: then it is sent again.
            OpenAI(base_url=f"{server.base}/v1", api_key=wrong, max_retries=9) as client,
            pytest.raises(AuthenticationError, match="unknown, revoked"),
        ):
            client.completions.create(model=MODEL, prompt="a", max_tokens=1)
    while (reply := server.post("/v1/messages", {}, wrong)).status_code == 429:
        time.sleep(int(reply.headers["retry-after"]))
    assert (reply.status_code, reply.json()["type"]) == (401, "error")


def test_a_key_that_only_reads_generates_nothing(server):
    """403, in OpenAI's shape."""
    key = server.key("reader", "read-only", funds_nano=0)
    reply = server.post("/v1/completions", {"model": MODEL, "prompt": "a"}, key)
    assert reply.status_code == 403
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_two_keys_in_one_request_are_refused(server, alice, bob):
    """Whichever header a proxy believed, the gate does not guess."""
    body = {"model": MODEL, "prompt": "a", "max_tokens": 1}
    reply = server.post("/v1/completions", body, alice, {"x-api-key": bob})
    assert reply.status_code == 400
    headers = [("authorization", f"Bearer {alice}"), ("authorization", f"Bearer {bob}")]
    reply = httpx.post(f"{server.base}/v1/completions", json=body, headers=headers)
    assert reply.status_code == 400


def test_operators_routes_need_an_admins_key(server, alice):
    """Scaling, aborting others' requests, reading others' responses."""
    for path in ("/scale_elastic_ep", "/is_scaling_elastic_ep", "/inference/v1/abort_requests"):
        assert server.post(path, {}).status_code == 401
        assert server.post(path, {}, alice).status_code == 403
    assert httpx.get(f"{server.base}/v1/responses/resp_1").status_code == 401
    admin = server.key("operator", "admin")
    assert server.post("/is_scaling_elastic_ep", {}, admin).status_code == 200


# What only the server says


def test_a_client_cannot_say_what_the_server_says(server, document, bob):
    """Another's account, publishing, a salt, in every place where one could write it."""
    prompt = DOCUMENT + words(7003, 12)
    listed = len(server.market.catalogue.listings())
    alice_before, bob_before = server.spent("alice"), server.spent("bob")
    for field in (
        {"kv_transfer_params": {"kvmarket": {"account": "alice"}}},
        {
            "kv_transfer_params": {
                "kvmarket": {"publish": {"terms": {"title": "spam"}}, "token": "0" * 64}
            }
        },
        {"kv_transfer_params": {"prompt_token_ids": [1, 2, 3], "do_remote_decode": True}},
        {"kv_transfer_params": "nonsense", "cache_salt": ["nonsense"]},
        {"vllm_xargs": {"kv_transfer_params": "nonsense"}},
    ):
        answer = server.complete(prompt, bob, **field)
        assert sold(answer)["reused_tokens"] == 600
        assert answer["usage"]["prompt_tokens"] == 612
        anonymous = server.complete(prompt, None, **field)
        assert sold(anonymous)["charge_nano"] == 0
    assert len(server.market.catalogue.listings()) == listed
    assert server.spent("alice") == alice_before
    assert server.spent("bob") > bob_before


def test_an_unpublished_prompt_is_shared_with_nobody(server, alice, bob):
    """An account finds its own again; others, whatever salt they name, find nothing, nor sooner."""
    prompt = words(7004, 1500)
    found = {}
    for who, key in (("alice", alice), ("again", alice), ("bob", bob), ("nobody", None)):
        answer = server.complete(prompt, key, max_tokens=1, cache_salt="known")
        found[who] = cached(answer)
    assert found["alice"] == found["bob"] == found["nobody"] == 0
    assert found["again"] > 1000


def test_times_show_nothing_of_anothers_prompt(server, alice, bob):
    """A prompt that alice has asked is no quicker for bob than a new one."""

    def seconds(prompt, key):
        began = time.perf_counter()
        server.complete(prompt, key, max_tokens=1)
        return time.perf_counter() - began

    known, unknown, own = [], [], []
    for index in range(20):
        prompt = words(7100 + index, 4000)
        server.complete(prompt, alice, max_tokens=1)
        own.append(seconds(prompt, alice))
        known.append(seconds(prompt, bob))
        unknown.append(seconds(words(7200 + index, 4000), bob))
        # A busy machine adds to each; the quickest of each show what the prefill costs.
        if index >= 4 and min(own) < 0.5 * min(unknown):
            break
    # Its own is quicker by far: the measure shows what there is to be seen.
    assert min(own) < 0.7 * min(unknown)
    assert min(known) > (min(own) + min(unknown)) / 2


def test_two_prompts_without_a_key_are_not_shared_either(server):
    """They may be two people's."""
    prompt = words(7005, 600)
    for _ in range(2):
        answer = server.complete(prompt, max_tokens=1)
        assert cached(answer) == 0


# The field `kvmarket`


def test_a_document_goes_in_front_of_a_prompt(server, document, alice):
    """As text, as tokens, several: as if the buyer had sent it."""
    question = words(7006, 12)
    sent = server.complete(DOCUMENT + question, alice)
    placed = server.complete(question, alice, kvmarket={"document": document})
    assert placed["choices"][0]["text"] == sent["choices"][0]["text"]
    assert placed["usage"]["prompt_tokens"] == 612
    assert sold(placed)["reused_tokens"] == 600
    several = server.complete(["When?", "Where?"], alice, kvmarket={"document": document})
    assert len(several["choices"]) == 2
    assert several["usage"]["prompt_tokens"] > 1200
    tokens = server.post(
        "/inference/v1/generate",
        {
            "model": MODEL,
            "token_ids": question,
            "sampling_params": {"max_tokens": 6, "temperature": 0},
            "kvmarket": {"document": document},
        },
        alice,
    )
    assert tokens.json()["kv_transfer_params"]["kvmarket"]["reused_tokens"] == 600


def test_a_document_goes_in_front_of_a_chat(server, chat, client, alice):
    """Chat, messages, responses and invocations: the same tokens as a client that has the text."""
    document, tokens = chat
    ask = {"model": MODEL, "max_tokens": 6, "temperature": 0}
    question = "When do ships leave?"
    whole = [{"role": "user", "content": f"{TEXT}\n\n{question}"}]
    sent = client.chat.completions.create(messages=whole, **ask)
    messages = [{"role": "user", "content": question}]
    body = {"kvmarket": {"document": document}}
    placed = client.chat.completions.create(messages=messages, extra_body=body, **ask)
    assert placed.choices[0].message.content == sent.choices[0].message.content
    assert placed.kv_transfer_params["kvmarket"]["reused_tokens"] == len(tokens)
    assert placed.usage.prompt_tokens_details.cached_tokens == len(tokens)
    parts = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    again = client.chat.completions.create(messages=parts, extra_body=body, **ask)
    assert again.choices[0].message.content == placed.choices[0].message.content
    invoked = server.post("/invocations", {"messages": messages, **ask, **body}, alice).json()
    assert invoked["choices"][0]["message"]["content"] == sent.choices[0].message.content
    with Anthropic(base_url=server.base, api_key=alice, max_retries=0) as anthropic:
        reply = anthropic.messages.create(
            model=MODEL,
            max_tokens=6,
            messages=messages,
            extra_body={**body, "temperature": 0},
        )
    assert reply.content[0].text == sent.choices[0].message.content
    assert reply.usage.cache_read_input_tokens == len(tokens)
    response = client.responses.create(
        model=MODEL, input=question, max_output_tokens=6, temperature=0, extra_body=body
    )
    assert response.output_text == sent.choices[0].message.content
    assert response.usage.input_tokens_details.cached_tokens == len(tokens)


def test_a_conversation_goes_on_behind_a_document(server, chat, client):
    """More messages, the document still in front."""
    document, tokens = chat
    answer = client.chat.completions.create(
        model=MODEL,
        max_tokens=3,
        messages=[
            {"role": "user", "content": "When?"},
            {"role": "assistant", "content": "At dawn."},
            {"role": "user", "content": "Why?"},
        ],
        extra_body={"kvmarket": {"document": document, "reuse": "require"}},
    )
    assert answer.kv_transfer_params["kvmarket"]["reused_tokens"] == len(tokens)


@pytest.mark.parametrize(
    ("field", "status", "code"),
    [
        ({"kvmarket": {"document": "kvd_none"}}, 404, "document_not_found"),
        ({"kvmarket": {"dokument": "kvd_none"}}, 400, "invalid_value"),
        ({"kvmarket": {"reuse": "maybe"}}, 400, "invalid_value"),
        ({"kvmarket": {"max_price_nano": -1}}, 400, "invalid_value"),
        ({"kvmarket": "kvd_none"}, 400, "invalid_value"),
        ({"kvmarket": {"reuse": "require"}}, 404, "no_match"),
        ({"kvmarket": {"document": "kvd_none"}, "echo": True}, 400, "invalid_value"),
    ],
)
def test_a_wish_that_cannot_be_is_refused(server, alice, field, status, code):
    """With what is wrong."""
    body = {"model": MODEL, "prompt": "When?", "max_tokens": 1, **field}
    reply = server.post("/v1/completions", body, alice)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)


def test_a_document_is_for_accounts_and_not_for_show(server, document, alice):
    """401 without a key; nothing that would print it; a text is no chat."""
    body = {"model": MODEL, "prompt": "When?", "kvmarket": {"document": document}}
    assert server.post("/v1/completions", body).status_code == 401
    for field in ("echo", "return_token_ids"):
        assert server.post("/v1/completions", body | {field: True}, alice).status_code == 400
    assert server.post("/v1/completions", body | {"prompt_logprobs": 1}, alice).status_code == 400
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "When?"}]}
    reply = server.post("/v1/chat/completions", asked | {"kvmarket": {"document": document}}, alice)
    assert reply.json()["error"]["code"] == "document_not_placeable"


def test_reuse_that_is_required_is_paid_or_refused(server, document, alice, poor):
    """402 with the quote in the body, above the limit or without funds; else it is had."""
    prompt = DOCUMENT + words(7007, 12)
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 1}
    require = {"reuse": "require", "max_price_nano": 600 * PRICE_NANO}
    paid = server.post("/v1/completions", body | {"kvmarket": require}, alice)
    assert sold(paid.json())["reused_tokens"] == 600
    require["max_price_nano"] -= 1
    reply = server.post("/v1/completions", body | {"kvmarket": require}, alice)
    assert (reply.status_code, reply.json()["error"]["code"]) == (402, "price_above_limit")
    quote = reply.json()["quote"]
    assert (quote["document_id"], quote["matched_tokens"]) == (document, 600)
    assert (quote["charge_nano"], quote["without_reuse_nano"]) == (300_000, 3_000_000)
    reply = server.post("/v1/completions", body | {"kvmarket": {"reuse": "require"}}, poor)
    assert (reply.status_code, reply.json()["error"]["code"]) == (402, "insufficient_funds")
    assert reply.json()["quote"]["available_nano"] == 0


def test_reuse_that_is_preferred_or_not_wanted_is_computed_instead(server, document, alice, poor):
    """Too dear, unfunded, or `never`: an answer, no charge, nothing of the document reused.

    An account finds the whole blocks that it has computed itself before.
    """
    prompt = DOCUMENT + words(7008, 12)
    before = server.spent("alice")
    for key, wish, own in (
        (alice, {"max_price_nano": 1}, 0),
        (alice, {"reuse": "never"}, len(prompt) // 128 * 128),
        (poor, {"reuse": "prefer"}, 0),
    ):
        answer = server.complete(prompt, key, kvmarket=wish)
        assert sold(answer)["reused_tokens"] == 0
        assert cached(answer) == own
    assert server.spent("alice") == before
    assert server.spent("poor") == 0
