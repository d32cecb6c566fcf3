"""Charging on engines with other settings: speculative decoding, prefix caching off."""

from __future__ import annotations

import pytest

from tests.support.asking import sold, wait_until
from tests.support.engines import NANO, running, words
from vllm_kvmarket import Market
from vllm_kvmarket.market.timed_requests import ask, empty_prefix_cache

pytestmark = pytest.mark.long

QUESTION = words(994, 5) * 4  # a model that was taught to read goes on with it, as drafted
DOCUMENT = words(5200, 600)
ENGINES = {
    "speculative": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 4,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        },
        "max_num_batched_tokens": 512,  # and prefill in pieces
        "disable_log_stats": False,
    },
    "no prefix caching": {"enable_prefix_caching": False},
}


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    """The market of both engines; the first one publishes the document."""
    with Market.open(tmp_path_factory.mktemp("engines")) as opened:
        opened.create_account("alice")
        opened.deposit("alice", 1000 * NANO, "d")
        yield opened


@pytest.fixture(scope="module", params=list(ENGINES))
def setting(request):
    return request.param


@pytest.fixture(scope="module")
def llm(tiny, smollm, market, setting):
    model = smollm if setting == "speculative" else tiny(1)
    with running(model, market, **ENGINES[setting]) as engine:
        market.publish(engine, token_ids=DOCUMENT, title="engines")
        if setting != "no prefix caching":
            empty_prefix_cache(engine)
        yield engine


def test_reuse_is_exact_and_paid_once(llm, market, bill, setting):
    """Twice the same question: two purchases of the document's tokens, and the same answer as
    computed in full.
    """
    full = ask(llm, DOCUMENT + QUESTION, max_tokens=40, rest_s=0)
    assert full.market["reused_tokens"] == 0
    for number in range(1, 3):
        answer = ask(llm, DOCUMENT + QUESTION, market.params("alice"), max_tokens=40, rest_s=0)
        assert answer.token_ids == full.token_ids
        assert bill.tokens() == number * 600
        receipt = bill.receipts()[-1]
        assert (receipt.tokens_computed, receipt.tokens_output) == (len(QUESTION), 40)
        whole = 600 // 128 * 128
        cached = 0 if setting == "no prefix caching" else whole
        assert receipt.tokens_from_paged_cache == cached
    if setting == "speculative":
        for what in ("draft", "accepted"):
            name = f"vllm:spec_decode_num_{what}_tokens"
            (counted,) = [metric for metric in llm.get_metrics() if metric.name == name]
            assert counted.value > 0


def test_samples_are_paid_once(market, bill, requests):
    """Each of the three loads for itself where vLLM has no prefix cache; one charge."""
    prompt = DOCUMENT + words(5201, 100)
    requests.start("n3", prompt, market.params("alice"), n=3, max_tokens=10, temperature=1.0)
    answer = requests.finish()["n3"][-1]
    assert bill.tokens() == 600
    (receipt,) = bill.receipts()
    assert receipt.id == sold(answer)["receipt_id"]
    assert receipt.tokens_output == 30


def test_an_abort_in_the_midst_of_the_answer_is_paid_once(market, bill, requests):
    """Drafted tokens that were not accepted are no output."""
    requests.start("left", DOCUMENT + QUESTION, market.params("alice"), max_tokens=3000)
    requests.until_tokens("left", 3)
    requests.abort("left")
    requests.finish()
    wait_until(lambda: bill.tokens() > 0)
    assert bill.tokens() == 600
    (receipt,) = bill.receipts()
    assert 3 <= receipt.tokens_output < 3000
