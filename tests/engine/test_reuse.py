"""Publishing and reusing on a real engine, with a small random model: every shape of a match."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
from vllm.sampling_params import RequestOutputKind

from tests.support.engines import words
from vllm_kvmarket import Market, NotPublishableError
from vllm_kvmarket.market.timed_requests import ask, empty_prefix_cache

QUESTION = words(999, 11)


def compare(llm, market: Market, prompt: list[int], expected_reuse: int):
    """Reuse gives what full prefill gives, reusing exactly so many tokens; returns the answer."""
    empty_prefix_cache(llm)
    full = ask(llm, prompt, market.params("dave"), rest_s=0)
    assert full.market.get("reused_tokens", 0) == 0
    empty_prefix_cache(llm)
    reuse = ask(llm, prompt, market.params("alice"), rest_s=0)
    assert reuse.token_ids == full.token_ids
    assert reuse.logprob_difference(full) < 1e-3
    assert reuse.market["reused_tokens"] == expected_reuse
    assert reuse.market["computed_tokens"] == len(prompt) - expected_reuse
    assert reuse.market["charge_nano"] == expected_reuse * 500
    return reuse


@pytest.mark.parametrize("length", [128, 200, 256, 300, 512, 700, 1000, 1280])
def test_every_token_of_a_document_is_reused_whatever_its_length(llm, market, length):
    """Exactly the question is computed: on block and chunk boundaries, and between them."""
    document = words(length, length)
    listing = market.publish(llm, token_ids=document, title=f"{length} tokens")
    assert listing.token_count == length
    compare(llm, market, document + QUESTION, length)


def test_a_second_reuse_takes_full_blocks_from_the_paged_cache(llm, market):
    """After the first reuse only the last, partly filled page comes from the store; the charge
    is the same."""
    document = words(1, 700)
    market.publish(llm, token_ids=document)
    first = compare(llm, market, document + QUESTION, 700)
    assert first.market["loaded_tokens"] == 700
    again = ask(llm, document + words(2, 9), market.params("alice"), rest_s=0)
    assert again.market["reused_tokens"] == 700
    assert again.market["loaded_tokens"] == 700 - 5 * 128
    assert again.market["charge_nano"] == first.market["charge_nano"]


def test_a_match_may_end_anywhere_inside_a_document(llm, market):
    """A request that shares only part of a document reuses exactly that part."""
    document = words(3, 900)
    market.publish(llm, token_ids=document)
    for shared in (130, 256, 500, 777):
        compare(llm, market, document[:shared] + QUESTION, shared)


def test_a_request_that_is_exactly_the_document_computes_one_token(llm, market):
    """There must be something to sample from."""
    document = words(4, 640)
    market.publish(llm, token_ids=document)
    compare(llm, market, document, 639)


def test_a_document_that_extends_another_stores_only_what_is_new(llm, market):
    """The published prefix is loaded while publishing, and its whole chunks are stored once."""
    short = words(5, 600)
    long = short + words(6, 500)
    market.publish(llm, token_ids=short, publisher="first")
    before = set(market.store.disk.keys())
    listing = market.publish(llm, token_ids=long, publisher="second")
    # Two whole chunks are shared; the short one's last chunk is shorter than the long one's third.
    assert len(set(market.store.disk.keys()) - before) == len(listing.chunk_keys) - 2
    compare(llm, market, long + QUESTION, 1100)
    answer = compare(llm, market, short + QUESTION, 600)
    # Wholly matched, the short one is paid, though the long one holds the same tokens.
    assert market.catalogue.get(answer.market["document_id"]).terms.publisher == "first"


def test_publishing_again_changes_nothing(llm, market):
    """A live document comes back as it is, and nothing is written."""
    document = words(7, 400)
    first = market.publish(llm, token_ids=document, title="once")
    written = market.store.disk.bytes_used()
    second = market.publish(llm, token_ids=document, title="twice")
    assert second == first
    assert market.store.disk.bytes_used() == written


def test_a_prompt_that_matches_nothing_is_plain_vllm(llm, market):
    """No object, no receipt, and vLLM's own prefix cache goes on working."""
    receipts = len(market.receipts())
    prompt = words(8, 300)
    assert ask(llm, prompt, max_tokens=2, rest_s=0).market == {}
    assert (
        ask(llm, prompt, market.params("alice"), max_tokens=2, rest_s=0).market["charge_nano"] == 0
    )
    assert len(market.receipts()) == receipts


def test_preloading_brings_the_document_into_the_paged_cache_for_nothing(llm, market):
    """The first buyer then loads only the last page."""
    document = words(9, 700)
    listing = market.publish(llm, token_ids=document)
    empty_prefix_cache(llm)
    receipts = len(market.receipts())
    assert market.preload(llm, listing.document_id) == 699
    assert len(market.receipts()) == receipts
    bought = ask(llm, document + QUESTION, market.params("alice"), rest_s=0)
    assert bought.market["loaded_tokens"] == 700 - 5 * 128


@pytest.mark.parametrize(
    ("tokens", "complaint"),
    [([], "empty"), (words(10, 127), "fewer than one block"), (words(11, 4096), "context is 4096")],
)
def test_what_cannot_be_published_is_refused_with_the_reason(llm, market, tokens, complaint):
    """Nothing is computed and nothing listed."""
    listed = len(market.catalogue.listings())
    document = {"token_ids": tokens} if tokens else {"text": "  "}
    with pytest.raises(NotPublishableError, match=complaint):
        market.publish(llm, **document)
    assert len(market.catalogue.listings()) == listed


def test_a_delisted_document_is_not_sold_any_more(llm, market):
    """Other processes see it within a second."""
    document = words(12, 300)
    listing = market.publish(llm, token_ids=document)
    compare(llm, market, document + QUESTION, 300)
    market.delist(listing.document_id)
    after = ask(llm, document + QUESTION, market.params("alice"), rest_s=1)
    assert after.market.get("reused_tokens", 0) == 0


def test_a_document_published_as_chat_is_hit_by_chat_requests(llm, market):
    """The template in front of the document belongs to it; the question does not."""
    text = "The market opens at nine. " * 60
    listing = market.publish(llm, text, as_="chat", title="hours")
    messages = [{"role": "user", "content": text + "\n\nWhen does the market open?"}]
    prompt = llm.get_tokenizer().apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    compare(llm, market, prompt, listing.token_count)


def test_threads_that_copy_may_use_every_core(llm, market):
    """OpenMP pins the worker's main thread to one core; those made from it must not inherit it."""
    market.publish(llm, token_ids=words(40, 700))
    compare(llm, market, words(40, 700) + QUESTION, 700)
    masks = {}
    for process in psutil.Process().children(recursive=True):
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            name = (task / "comm").read_text().strip()
            if name.startswith(("kvmarket-load", "kvmarket-prefet")):
                masks[name, task.name] = os.sched_getaffinity(int(task.name))
    assert len({name for name, _ in masks}) > 1, masks
    assert set(map(frozenset, masks.values())) == {frozenset(os.sched_getaffinity(0))}, masks


def test_a_load_runs_beside_the_forward_pass_of_others(llm, market):
    """While another request decodes, a reuse waits for few of its steps: the load starts before a
    step's forward pass, and has ended behind it."""
    document = words(41, 300)
    market.publish(llm, token_ids=document)
    expected = compare(llm, market, document + QUESTION, 300)
    waited = []
    for number in range(8):
        empty_prefix_cache(llm)
        engine = llm.llm_engine
        sampling = llm.get_default_sampling_params()
        sampling.temperature, sampling.max_tokens, sampling.min_tokens = 0.0, 200, 200
        sampling.output_kind = RequestOutputKind.DELTA
        engine.add_request(f"other-{number}", {"prompt_token_ids": words(42, 20)}, sampling)
        for _ in range(20):
            engine.step()
        buyer = sampling.clone()
        buyer.max_tokens = buyer.min_tokens = len(expected.token_ids)
        buyer.extra_args = market.params("alice")
        prompt = {"prompt_token_ids": document + QUESTION}
        engine.add_request(f"buyer-{number}", prompt, buyer)
        others, answer = 0, []
        while len(answer) < len(expected.token_ids):
            of_buyer = [o for o in engine.step() if o.request_id == f"buyer-{number}"]
            answer += [token for output in of_buyer for token in output.outputs[0].token_ids]
            others += not answer
        assert tuple(answer) == expected.token_ids
        waited.append(others)
        engine.abort_request([f"other-{number}"])
        while engine.has_unfinished_requests():
            engine.step()
    # Its arrival, its reservation, its load.
    assert min(waited) <= 3, waited
