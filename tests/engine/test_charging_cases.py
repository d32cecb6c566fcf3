"""Charging, case by case, on a real engine: each reused token is paid once, by who got an answer.

Preemption, batches and refusals are in test_charging.py; loads that fail in test_faults.py; other
engine settings in test_charging_engines.py; a server and its clients in test_charging_http.py.
"""

from __future__ import annotations

import msgspec
import pytest
from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams, RequestOutputKind

from tests.support.asking import sold, spent, wait_until
from tests.support.engines import NANO, words
from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.market.garbage_collection import collect_garbage
from vllm_kvmarket.market.timed_requests import ask, empty_prefix_cache

QUESTION = words(995, 13)


@pytest.fixture(scope="module")
def document(llm, market):
    tokens = words(4000, 600)
    market.publish(llm, token_ids=tokens, title="cases", publisher="casey")
    empty_prefix_cache(llm)
    return tokens


SOURCES = [
    # document's tokens, whether vLLM's prefix cache is emptied first; loaded, found there
    (600, True, 600, 0),
    (512, False, 0, 512),  # whole blocks
    (600, False, 88, 512),  # whole blocks there, the page behind them from the store
]


@pytest.mark.parametrize("source", SOURCES)
def test_it_costs_the_same_wherever_the_document_lies(llm, market, bill, source):
    """The store, vLLM's own prefix cache, or both: what is sold is not having to compute it."""
    length, emptied, loaded, cached = source
    tokens = words(4100 + length, length)
    market.publish(llm, token_ids=tokens)
    if emptied:
        empty_prefix_cache(llm)
    answer = ask(llm, tokens + QUESTION, market.params("alice"), max_tokens=2, rest_s=0)
    assert bill.tokens() == length
    (receipt,) = bill.receipts()
    assert answer.market["receipt_id"] == receipt.id
    assert (receipt.tokens_loaded, receipt.tokens_from_paged_cache) == (loaded, cached)
    assert receipt.tokens_computed == len(QUESTION)


def test_of_two_documents_with_one_beginning_each_publisher_is_paid_for_what_it_added(
    llm, market, bill
):
    """The first listing earns for its tokens whatever lies behind them, the later for the rest."""
    short = words(4200, 400)
    long = short + words(4201, 300)
    market.publish(llm, token_ids=short, publisher="shorty")
    market.publish(llm, token_ids=long, publisher="longy")
    for prompt, shares in ((long, (400, 300)), (short, (400, 0)), (long[:650], (400, 250))):
        publishers = ("shorty", "longy")
        before = [market.ledger.account(each).balance_nano for each in publishers]
        ask(llm, prompt + QUESTION, market.params("alice"), max_tokens=1, rest_s=0)
        receipt = bill.receipts()[-1]
        lines = [(line.publisher, line.end - line.start) for line in receipt.lines]
        assert lines == [each for each in zip(publishers, shares, strict=True) if each[1]]
        assert receipt.tokens_reused == sum(shares)
        after = [market.ledger.account(each).balance_nano for each in publishers]
        earned = [new - old for new, old in zip(after, before, strict=True)]
        assert earned == [tokens * 250 for tokens in shares]
    assert bill.tokens() == 700 + 400 + 650


def test_the_price_at_the_reservation_holds(llm, market, bill, requests):
    """The listing becomes ten times dearer while the answer is being written."""
    tokens = words(4300, 300)
    listing = market.publish(llm, token_ids=tokens)
    requests.start("before", tokens + QUESTION, market.params("alice"), max_tokens=300)
    requests.until_tokens("before")
    market.delist(listing.document_id)
    terms = msgspec.structs.replace(listing.terms, cache_read_nano_per_mtok=5 * NANO)
    chunks = DocumentChunks.of(listing.namespace, tokens, market.config.chunk_tokens)
    market.catalogue.adopt(Listing.of(chunks, terms), chunks, force=True)
    requests.finish()
    assert bill.tokens() == 300
    ask(llm, tokens + QUESTION, market.params("alice"), max_tokens=1, rest_s=1)
    assert bill.tokens() == 300 + 10 * 300
    assert [receipt.cache_read_nano_per_mtok for receipt in bill.receipts()] == [
        NANO // 2,
        5 * NANO,
    ]


@pytest.mark.parametrize("how", ["delisted", "evicted"])
def test_a_document_that_leaves_the_market_while_in_use_is_paid_once_more(
    llm, market, bill, requests, how
):
    """The answer under way is whole and paid at its price; the next request finds nothing."""
    tokens = words(4400 + len(how), 520 if how == "evicted" else 530)
    listing = market.publish(llm, token_ids=tokens, publisher="leaver")
    full = ask(llm, tokens + QUESTION, market.params("dave"), max_tokens=60, rest_s=0)
    requests.start("user", tokens + QUESTION, market.params("alice"), max_tokens=60)
    requests.until_tokens("user")
    if how == "delisted":
        market.delist(listing.document_id)
    else:
        assert market.catalogue.evict(listing.document_id, "to make room")
        collect_garbage(market)
        assert not any(market.store.has(key) for key in listing.chunk_keys)
    (answer,) = requests.finish()["user"]
    assert tuple(answer.outputs[0].token_ids[:8]) == full.token_ids[:8]
    assert bill.tokens() == len(tokens)
    later = ask(llm, tokens + QUESTION, market.params("alice"), max_tokens=1, rest_s=1)
    assert later.market.get("reused_tokens", 0) == 0
    assert bill.tokens() == len(tokens)


def test_a_document_that_goes_between_reservation_and_load_costs_what_was_still_had(
    llm, market, bill, requests
):
    """It waits for room, with its reservation, when the chunks are deleted: what it cannot load
    any more is computed, and not paid for.
    """
    tokens = words(4500, 700)
    listing = market.publish(llm, token_ids=tokens)
    full = ask(llm, tokens + QUESTION, market.params("dave"), max_tokens=4, rest_s=0)
    empty_prefix_cache(llm)
    for number in range(2):
        requests.start(f"big{number}", words(4501 + number, 2600), None, max_tokens=40)
    requests.until_tokens("big1")
    requests.start("waiter", tokens + QUESTION, market.params("alice"))
    wait_until(lambda: market.ledger.account("alice").debits_pending == 700 * 500)
    assert market.catalogue.evict(listing.document_id, "to make room")
    collect_garbage(market)
    (answer,) = requests.finish()["waiter"]
    assert tuple(answer.outputs[0].token_ids) == full.token_ids
    # What had been read ahead meanwhile was still there to be had.
    assert bill.tokens() == sold(answer)["reused_tokens"] <= 700


def test_an_abort_after_the_first_token_is_charged(market, document, bill, requests):
    """The document was reused for what came out: a stream's tokens cannot be taken back."""
    requests.start("left", document + QUESTION, market.params("alice"), max_tokens=3000)
    requests.until_tokens("left")
    requests.abort("left")
    requests.finish()
    wait_until(lambda: bill.tokens() > 0)
    assert bill.tokens() == 600
    (receipt,) = bill.receipts()
    assert receipt.request_id == "left"
    assert 1 <= receipt.tokens_output < 3000


def test_an_abort_of_an_answer_that_is_sent_whole_costs_nothing(market, document, bill, requests):
    """Without a stream nothing has reached the client, however much was computed."""
    requests.start(
        "unsent",
        document + QUESTION,
        market.params("alice"),
        max_tokens=3000,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    requests.start("clock", document + words(4600, 9), market.params("dave"), max_tokens=20)
    requests.until_tokens("clock", 10)
    assert market.ledger.account("alice").debits_pending == 600 * 500, "it is under way"
    requests.abort("unsent")
    requests.finish()
    assert bill.tokens() == 0
    assert bill.receipts() == []


@pytest.mark.parametrize("kind", [RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA])
def test_an_answer_that_comes_to_a_stop_string_is_paid(market, document, bill, requests, kind):
    """vLLM's front end finds the string and aborts the request in the engine: a whole answer."""
    name, prompt = f"stops-{kind.name}", document + QUESTION
    requests.start(name, prompt, market.params("dave"), max_tokens=8)
    (full,) = requests.finish()[name]
    stop = full.outputs[0].text[2:5]
    requests.start(
        f"{name}-early",
        prompt,
        market.params("alice"),
        stop=[stop],
        output_kind=kind,
        ignore_eos=True,
    )
    (answer,) = requests.finish()[f"{name}-early"]
    assert answer.outputs[0].finish_reason == "stop"
    wait_until(lambda: bill.tokens() > 0)
    assert bill.tokens() == 600
    assert [receipt.request_id for receipt in bill.receipts()] == [f"{name}-early"]


def test_samples_are_one_purchase_with_the_clients_id(market, document, bill, requests):
    """n=3: one charge, one receipt with the tokens of all three, which the answer names."""
    requests.start(
        "three", document + QUESTION, market.params("alice"), n=3, max_tokens=5, temperature=1.0
    )
    answer = requests.finish()["three"][-1]
    assert bill.tokens() == 600
    (receipt,) = bill.receipts()
    assert receipt.id == sold(answer)["receipt_id"]
    assert sold(answer)["charge_nano"] == receipt.charge_nano
    assert (receipt.request_id, receipt.tokens_output) == ("three", 15)


def test_samples_that_are_aborted_are_one_purchase_too(market, document, bill, requests):
    """Paid once when any of them gave a token."""
    requests.start(
        "gone", document + QUESTION, market.params("alice"), n=3, max_tokens=3000, temperature=1.0
    )
    requests.until_tokens("gone")
    requests.abort("gone")
    requests.finish()
    wait_until(lambda: bill.tokens() > 0)
    assert bill.tokens() == 600
    assert [receipt.request_id for receipt in bill.receipts()] == ["gone"]


@pytest.mark.parametrize("n", [1, 3])
def test_chunks_that_fail_to_load_are_not_paid(llm, market, bill, requests, n):
    """Also when one sample had to compute them and the others found them in the paged cache."""
    tokens = words(4650 + n, 700)
    listing = market.publish(llm, token_ids=tokens)
    empty_prefix_cache(llm)
    path = market.store.disk.path(listing.chunk_keys[1])
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    temperature = 1.0 if n > 1 else 0.0
    requests.start("f", tokens + QUESTION, market.params("alice"), n=n, temperature=temperature)
    requests.finish()
    assert bill.tokens() == 256
    (receipt,) = bill.receipts()
    assert (receipt.tokens_failed, receipt.tokens_computed) == (444, 444 + len(QUESTION))


def test_ids_that_look_like_samples_are_requests_of_their_own(market, document, bill, requests):
    """A client may call its requests 0_foo and 1_foo: two charges, under its own names."""
    for number in range(2):
        prompt = document + words(4700 + number, 9)
        requests.start(f"{number}_foo", prompt, market.params("alice"))
    requests.finish()
    assert bill.tokens() == 2 * 600
    assert {receipt.request_id for receipt in bill.receipts()} == {"0_foo", "1_foo"}


def test_best_of_is_not_vllms_any_more(llm, market, document, bill):
    """SamplingParams knows only n. A beam search asks for every beam and step without the buyer's
    parameters, so nothing of it is sold.
    """
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(n=1, best_of=3)
    (found,) = llm.beam_search(
        [{"prompt_token_ids": document + QUESTION}], BeamSearchParams(beam_width=2, max_tokens=2)
    )
    assert len(found.sequences) == 2
    assert bill.tokens() == 0


def test_a_request_repeated_with_its_key_is_not_paid_again(market, document, bill, requests):
    """Behind the first one or beside it: one charge, one receipt, which every answer names."""
    prompt = document + words(4800, 9)
    keyed = {"kv_transfer_params": {"kvmarket": {"account": "alice", "purchase_key": "again"}}}
    for _ in range(2):
        requests.start("again", prompt, keyed)
    requests.finish()
    requests.start("another id", prompt, keyed)
    done = requests.finish()
    answers = done["again"] + done["another id"]
    assert len(answers) == 3
    assert len({tuple(answer.outputs[0].token_ids) for answer in answers}) == 1
    assert bill.tokens() == 600
    (receipt,) = bill.receipts()
    assert {sold(answer)["receipt_id"] for answer in answers} == {receipt.id}
    assert sold(answers[-1])["charge_nano"] == 0, "paid before"


def test_an_id_that_is_sent_again_makes_nothing_free(market, document, bill, requests):
    """An id means nothing for money: both answers are paid."""
    prompt = document + words(4850, 9)
    for _ in range(2):
        requests.start("reused-id", prompt, market.params("alice"))
        requests.finish()
    assert bill.tokens() == 2 * 600
    assert len(bill.receipts()) == 2


def test_the_same_id_for_another_prompt_is_another_request(market, document, bill, requests):
    """An id makes nothing free."""
    for number in range(2):
        prompt = document + words(4900 + number, 9)
        requests.start("reused-id", prompt, market.params("alice"))
    requests.finish()
    assert bill.tokens() == 2 * 600
    assert [receipt.request_id for receipt in bill.receipts()] == ["reused-id"] * 2


def test_a_retry_after_an_abort_without_an_answer_is_paid_once(market, document, bill, requests):
    """The first attempt gave nothing and cost nothing."""
    prompt = document + words(4950, 9)
    requests.start("retried", prompt, market.params("alice"))
    requests.abort("retried")
    requests.start("retried", prompt, market.params("alice"))
    assert len(requests.finish()["retried"]) == 1
    assert bill.tokens() == 600


def test_a_question_computed_in_pieces_is_one_purchase(market, document, bill, requests):
    """Chunked prefill: the question is longer than what a step computes, 512 tokens."""
    requests.start("long", document + words(4960, 1500), market.params("alice"))
    (answer,) = requests.finish()["long"]
    assert sold(answer)["computed_tokens"] == 1500
    assert bill.tokens() == 600
    assert spent(market) > 0
