"""The real SmolLM2 in float32: what is bought is what prefilling would have given."""

from __future__ import annotations

from importlib import resources

import pytest

from tests.support.engines import running
from vllm_kvmarket import Market
from vllm_kvmarket.market.timed_requests import ask, empty_prefix_cache

# Documents' lengths; the others take minutes.
LENGTHS = [(1000,), pytest.param((300, 3774), marks=pytest.mark.long)]
BLOCK = 128
QUESTION = "\n\nQuestion: May I sell copies of this program?\nAnswer:"
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("exact")


@pytest.fixture(scope="module", params=LENGTHS, ids=str)
def documents(request, smollm):
    """Documents that share nothing, from one licence text; and a question."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    text = resources.files("vllm_kvmarket.cli").joinpath("gpl-3.0.txt").read_text()
    tokens = tokenizer(text)["input_ids"]
    starts = {300: 100, 1000: 400, 3774: 1400}
    question = tokenizer(QUESTION)["input_ids"]
    cut = {length: tokens[starts[length] : starts[length] + length] for length in request.param}
    return cut, question


@pytest.fixture(scope="module")
def answers(smollm, home, documents):
    """Every prompt by reuse in a fresh process, and by plain vLLM, from scratch and from its cache.

    Prompts are (length, whole): a whole document with a question, or one cut at its last block
    boundary, where vLLM's own prefix-cache hit ends at the same token as ours.
    """
    cut, question = documents
    prompts = {
        (length, whole): tokens[: length if whole else length // BLOCK * BLOCK] + question
        for length, tokens in cut.items()
        for whole in (True, False)
    }
    with Market.open(home) as market:
        with running(smollm, market) as llm:
            for length, tokens in cut.items():
                market.publish(llm, token_ids=tokens, title=str(length))
        market.create_account("alice")
        market.deposit("alice", 10**12, "d")
        with running(smollm, market) as llm:
            reuse = {
                key: ask(llm, prompt, market.params("alice"), rest_s=0)
                for key, prompt in prompts.items()
                if not empty_prefix_cache(llm)
            }
        with running(smollm, market, kv_transfer_config=None) as llm:
            for tokens in cut.values():
                ask(llm, tokens, max_tokens=1, rest_s=0)
            hit = {key: ask(llm, prompt, rest_s=0) for key, prompt in prompts.items() if not key[1]}
            full = {
                key: ask(llm, prompt, rest_s=0)
                for key, prompt in prompts.items()
                if not empty_prefix_cache(llm)
            }
    return reuse, hit, full


@pytest.mark.parametrize("whole", [True, False])
def test_reuse_in_a_fresh_process_gives_the_tokens_of_full_prefill(
    answers, documents, whole, record_property
):
    """24 of 24 greedy tokens, and log-probabilities within float32's noise."""
    cut, question = documents
    for length in cut:
        reuse, full = answers[0][length, whole], answers[2][length, whole]
        assert reuse.market["reused_tokens"] == (length if whole else length // BLOCK * BLOCK)
        assert reuse.market["computed_tokens"] == len(question)
        assert reuse.equal_tokens(full) == len(full.token_ids) == 24
        difference = reuse.logprob_difference(full)
        record_property(f"max_abs_logprob_diff_{length}", difference)
        print(f"{length} tokens: largest log-probability difference {difference:.2e}")
        assert difference < TOLERANCE


def test_reuse_equals_vllms_own_prefix_cache_hit_bit_for_bit(answers, documents):
    """Where both begin to compute at the same token, not one bit of a log-probability differs."""
    for length in documents[0]:
        reuse, hit = answers[0][length, False], answers[1][length, False]
        assert reuse.token_ids == hit.token_ids
        assert reuse.logprobs == hit.logprobs
