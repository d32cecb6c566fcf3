"""Adapters, and weights that change in a running engine: what was published of others is not sold.

The judge is what the engine computes in full.
"""

from __future__ import annotations

import itertools
import time

import pytest
from vllm.lora.request import LoRARequest

from tests.support.adapters import write_adapter
from tests.support.engines import NANO, SMALL, running, words
from vllm_kvmarket import Market
from vllm_kvmarket.market.engine_operations import wait_for_listing

DOCUMENT, QUESTION = words(60, 600), words(61, 10)
_names = itertools.count()


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    with Market.open(tmp_path_factory.mktemp("changing"), {"host_cache_bytes": 0}) as opened:
        opened.create_account("alice")
        opened.create_account("publisher", "publisher")
        opened.deposit("alice", 100 * NANO, "first")
        yield opened


@pytest.fixture(scope="module")
def llm(tiny, market):
    adapters = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    with running(tiny(1), market, **SMALL, **adapters) as engine:
        yield engine


def ask(llm, prompt, params=None, lora=None):
    """One greedy request; its tokens and the market's part of its answer."""
    sampling = llm.get_default_sampling_params()
    sampling.temperature, sampling.max_tokens, sampling.min_tokens = 0.0, 12, 12
    sampling.extra_args = params
    engine, outputs = llm.llm_engine, []
    name = f"changing-{next(_names)}"
    engine.add_request(name, {"prompt_token_ids": prompt}, sampling, lora_request=lora)
    while engine.has_unfinished_requests():
        outputs += engine.step()
    output = outputs[-1]
    market = (output.kv_transfer_params or {}).get("kvmarket") or {}
    return tuple(output.outputs[0].token_ids), market


def full(llm, lora=None):
    """What is computed for nobody; a salt keeps it from vLLM's own cache."""
    while not llm.reset_prefix_cache():
        time.sleep(0.01)
    return ask(llm, DOCUMENT + QUESTION, lora=lora)[0]


def publish(llm, market, lora=None):
    """Publish DOCUMENT on an adapter, once its files are digested."""
    wish = {"publish": {"terms": {"title": "d", "publisher": "publisher"}}}
    deadline = time.monotonic() + 30
    while True:
        _, answer = ask(llm, DOCUMENT, {"kv_transfer_params": {"kvmarket": wish}}, lora)
        if "declined" not in answer:
            return wait_for_listing(market, answer["document_id"])
        assert time.monotonic() < deadline, answer
        time.sleep(0.05)


def reuse(llm, market, lora=None):
    """Buy DOCUMENT from the store; the answer's tokens, and how many tokens were reused."""
    while not llm.reset_prefix_cache():
        time.sleep(0.01)
    tokens, answer = ask(llm, DOCUMENT + QUESTION, market.params("alice"), lora)
    return tokens, answer.get("reused_tokens", 0)


def test_an_adapters_document_is_its_own(llm, market, tmp_path):
    """Neither the model nor another adapter finds it."""
    first = LoRARequest("first", 1, str(write_adapter(tmp_path / "first", 1)))
    second = LoRARequest("second", 2, str(write_adapter(tmp_path / "second", 2)))
    expected = full(llm, first)
    assert len({expected, full(llm, second), full(llm)}) == 3
    publish(llm, market, first)
    assert reuse(llm, market, first) == (expected, len(DOCUMENT))
    assert reuse(llm, market, second)[1] == reuse(llm, market)[1] == 0
    llm.llm_engine.remove_lora(1)
    llm.llm_engine.remove_lora(2)


def test_an_adapter_whose_files_change_is_reused_when_it_is_loaded_anew(llm, market, tmp_path):
    """Until then the engine computes with the old one, which nobody can digest any more."""
    folder = write_adapter(tmp_path / "adapter", 3)
    lora = LoRARequest("changing", 3, str(folder))
    before = full(llm, lora)
    publish(llm, market, lora)
    assert reuse(llm, market, lora) == (before, len(DOCUMENT))

    write_adapter(folder, 4)
    assert reuse(llm, market, lora) == (before, 0)
    llm.llm_engine.add_lora(LoRARequest("changing", 3, str(folder), load_inplace=True))
    after = full(llm, lora)
    assert after != before
    assert reuse(llm, market, lora) == (after, 0)
    publish(llm, market, lora)
    assert reuse(llm, market, lora) == (after, len(DOCUMENT))


def test_weights_that_are_loaded_into_a_running_engine_have_documents_of_their_own(
    llm, market, tiny
):
    """Those of the same files go on to be sold; after a call that nobody knows nothing is."""
    before = full(llm)
    publish(llm, market)
    assert reuse(llm, market) == (before, len(DOCUMENT))

    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tiny(2))})
    after = full(llm)
    assert after != before
    assert reuse(llm, market) == (after, 0)
    publish(llm, market)
    assert reuse(llm, market) == (after, len(DOCUMENT))

    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tiny(1))})
    deadline = time.monotonic() + 30
    while (found := reuse(llm, market)) != (before, len(DOCUMENT)):
        assert found == (before, 0)
        assert time.monotonic() < deadline
    llm.collective_rpc("update_config", args=({},))
    assert reuse(llm, market) == (before, 0)
