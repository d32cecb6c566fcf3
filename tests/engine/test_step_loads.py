"""A small load from memory ends inside its request's step while others decode, on a real engine."""

from __future__ import annotations

import pytest

from tests.support.asking import Bill, Requests, sold
from tests.support.engines import SMALL, metric, running, words
from tests.support.store_chunks import falsify
from vllm_kvmarket.market.timed_requests import ask, empty_prefix_cache

LENGTH, CHUNK = 900, 256


@pytest.fixture(scope="module")
def llm(tiny, market):
    """An engine of this module: vLLM shows the metrics of the engine that started last."""
    with running(tiny(1), market, **SMALL) as engine:
        yield engine


def published(llm, market, seed):
    """A document that is in the store only, and the answer to a question on it."""
    prompt = words(seed, LENGTH) + words(seed + 1, 40)
    full = ask(llm, prompt, market.params("dave"), max_tokens=6, rest_s=0)
    listing = market.publish(llm, token_ids=prompt[:LENGTH])
    empty_prefix_cache(llm)
    return prompt, listing, list(full.token_ids)


def while_another_decodes(llm, number, *asked):
    """The answers of requests that arrive together while another one runs."""
    requests = Requests(llm)
    requests.start(f"other-{number}", words(99, 20), None, max_tokens=400)
    requests.until_tokens(f"other-{number}", 2)
    for index, (prompt, params) in enumerate(asked):
        requests.start(f"asked-{number}-{index}", prompt, params, max_tokens=6)
    for index in range(len(asked)):
        requests.until_tokens(f"asked-{number}-{index}", 6)
    requests.abort(f"other-{number}")
    answers = requests.finish()
    return [answers[f"asked-{number}-{index}"][0] for index in range(len(asked))]


def said(output):
    return list(output.outputs[0].token_ids)


def test_the_step_waits_and_the_request_pays(llm, market):
    """The same tokens, all loaded, charged, and found by the next one."""
    prompt, _, full = published(llm, market, 9700)
    bill, before = Bill(market), metric(llm, "vllm:kvmarket_step_loads")
    params = market.params("alice")
    (answer,) = while_another_decodes(llm, 1, (prompt, params))
    assert said(answer) == full
    assert sold(answer)["loaded_tokens"] == LENGTH
    assert bill.tokens() == LENGTH
    (again,) = while_another_decodes(llm, 2, (prompt, params))
    assert said(again) == full
    assert sold(again)["reused_tokens"] == LENGTH
    assert metric(llm, "vllm:kvmarket_step_loads") == before + 2  # its last block is its own


def test_a_chunk_that_fails_in_the_step_is_computed_and_not_paid(llm, market):
    """Nor by a request of the same step that took its blocks for loaded; nobody finds them."""
    prompt, listing, full = published(llm, market, 9710)
    path = market.store.disk.path(listing.chunk_keys[1])
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    bill, failures = Bill(market), metric(llm, "vllm:kvmarket_load_failures")
    asked = [(prompt, market.params("alice"))] * 2
    answers = while_another_decodes(llm, 3, *asked)
    assert metric(llm, "vllm:kvmarket_load_failures") > failures
    assert [said(answer) for answer in answers] == [full] * 2
    assert [sold(answer)["reused_tokens"] for answer in answers] == [CHUNK] * 2
    assert bill.tokens() == 2 * CHUNK
    (plain,) = while_another_decodes(llm, 4, (prompt, None))
    assert said(plain) == full


def test_the_step_loads_what_the_store_has(llm, market):
    """Wrong pages that verify come out: the tokens before really were of that load."""
    prompt, listing, full = published(llm, market, 9720)
    for key in listing.chunk_keys:
        falsify(market.store.disk, key)
    (answer,) = while_another_decodes(llm, 5, (prompt, market.params("alice")))
    assert sold(answer)["loaded_tokens"] == LENGTH
    assert said(answer) != full
