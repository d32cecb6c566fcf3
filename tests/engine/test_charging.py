"""Charges: the buyer, the amount, and the cases without a charge; on a real engine."""

from __future__ import annotations

import pytest

from tests.support.asking import spent
from tests.support.engines import NANO, metric, words
from vllm_kvmarket.market.timed_requests import ask, empty_prefix_cache

QUESTION = words(998, 13)


@pytest.fixture(scope="module")
def document(llm, market):
    tokens = words(50, 600)
    market.publish(llm, token_ids=tokens, title="priced", publisher="pat")
    empty_prefix_cache(llm)
    return tokens


def balances(market):
    return {account.id: account.balance_nano for account in market.ledger.accounts()}


def test_a_purchase_moves_the_charge_and_the_royalty(llm, market, document):
    """Buyer to provider, half of it on to the publisher, and a receipt that says so."""
    before = balances(market)
    answer = ask(llm, document + QUESTION, market.params("alice"), rest_s=0)
    receipt = market.receipt(answer.market["receipt_id"])
    after = balances(market)
    assert receipt.tokens_reused == 600
    assert receipt.tokens_computed == len(QUESTION)
    assert receipt.tokens_output == 24
    assert receipt.charge_nano == 600 * 500 == before["alice"] - after["alice"]
    assert receipt.royalty_nano == 150_000 == after["pat"] - before["pat"]
    assert receipt.recompute_nano == 600 * 5000
    assert after["provider"] - before["provider"] == 150_000
    assert all(market.ledger.transfer(transfer) for transfer in receipt.transfer_ids)
    assert market.ledger.check_integrity() == []
    assert market.ledger.account("alice").debits_pending == 0


def test_a_request_that_must_be_reserved_is_ended_if_it_cannot_be(llm, market, document):
    """Without a token and uncomputed, though vLLM's cache holds the document; the next one buys."""
    ask(llm, document + QUESTION, market.params("alice"), max_tokens=1, rest_s=0)
    spent(market)
    before = balances(market)
    for account, status in (("dave", 402), ("nobody", 402), (None, 402)):
        params = {"account": account, "must_reserve": True}
        answer = ask(llm, document + QUESTION, {"kv_transfer_params": {"kvmarket": params}})
        assert answer.token_ids == ()
        assert answer.market["error"]["status"] == status
        assert "receipt_id" not in answer.market
    assert balances(market) == before
    params = {"account": "alice", "must_reserve": True}
    answer = ask(llm, document + QUESTION, {"kv_transfer_params": {"kvmarket": params}})
    assert (answer.market["reused_tokens"], len(answer.token_ids)) == (600, 24)
    spent(market)


@pytest.mark.parametrize(
    ("account", "reason"),
    [(None, "names no account"), ("dave", "not enough funds"), ("nobody", "no account 'nobody'")],
)
def test_who_cannot_pay_gets_the_answer_but_no_reuse(llm, market, document, account, reason):
    """Not from the store and not from vLLM's own prefix cache, which holds the document now."""
    empty_prefix_cache(llm)  # also of what another who could not pay has computed
    ask(llm, document + QUESTION, market.params("alice"), max_tokens=1, rest_s=0)
    spent(market)
    before = balances(market)
    answer = ask(llm, document + QUESTION, market.params(account), rest_s=0)
    assert reason in answer.market["declined"]
    assert answer.market["reused_tokens"] == 0
    assert answer.market["computed_tokens"] == 600 + len(QUESTION)
    assert answer.market["receipt_id"] is None
    assert len(answer.token_ids) == 24
    assert balances(market) == before


def test_a_listing_may_set_its_own_price_and_royalty(llm, market):
    """They override the tariff's."""
    tokens = words(51, 256)
    market.publish(
        llm,
        token_ids=tokens,
        publisher="quinn",
        cache_read_nano_per_mtok=2 * NANO,
        royalty_ppm=900_000,
    )
    answer = ask(llm, tokens + QUESTION, market.params("alice"), max_tokens=2, rest_s=0)
    assert market.receipt(answer.market["receipt_id"]).charge_nano == 256 * 2000
    assert market.ledger.account("quinn").balance_nano == 256 * 2000 * 9 // 10


def test_several_samples_of_one_request_are_charged_once(llm, market, document):
    """With n=3 vLLM runs three requests; the buyer asked once."""
    before = balances(market)
    sampling = llm.get_default_sampling_params()
    sampling.n, sampling.max_tokens, sampling.temperature = 3, 4, 1.0
    sampling.extra_args = market.params("alice")
    (output,) = llm.generate([{"prompt_token_ids": document + QUESTION}], sampling, use_tqdm=False)
    assert len(output.outputs) == 3
    spent(market)
    assert before["alice"] - balances(market)["alice"] == 600 * 500


def test_a_batch_of_requests_for_one_document_is_charged_one_by_one(llm, market, document):
    """Twelve buyers at once on too few blocks: some are preempted and load twice, and pay once."""
    before = balances(market)
    # What they share fits many times over; what is their own does not.
    prompts = [document + words(60 + i, 300 + i) for i in range(12)]
    sampling = llm.get_default_sampling_params()
    sampling.max_tokens, sampling.temperature = 150, 0.0
    sampling.min_tokens = 150
    sampling.extra_args = market.params("dave")
    full = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    empty_prefix_cache(llm)
    preempted = metric(llm, "vllm:num_preemptions")
    sampling.extra_args = market.params("alice")
    bought = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    # Batches of different shapes round differently, so late tokens may part; the first must not.
    for one, other in zip(full, bought, strict=True):
        assert one.outputs[0].token_ids[:8] == other.outputs[0].token_ids[:8]
    assert [o.kv_transfer_params["kvmarket"]["reused_tokens"] for o in bought] == [600] * 12
    assert metric(llm, "vllm:num_preemptions") > preempted
    spent(market)
    assert before["alice"] - balances(market)["alice"] == 12 * 600 * 500
    assert market.ledger.check_integrity() == []


def test_an_abort_before_the_first_token_costs_nothing(llm, market, document):
    """The reservation is voided."""
    before = balances(market)
    engine = llm.llm_engine
    sampling = llm.get_default_sampling_params()
    sampling.extra_args = market.params("alice")
    engine.add_request("gone", {"prompt_token_ids": document + QUESTION}, sampling)
    engine.abort_request(["gone"])
    while engine.has_unfinished_requests():
        engine.step()
    ask(llm, words(70, 200), max_tokens=1, rest_s=0)  # one more step: the engine has seen the abort
    spent(market)
    assert balances(market) == before
