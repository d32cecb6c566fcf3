"""An engine shows that it reuses exactly before it serves; one that does not sells nothing."""

from __future__ import annotations

import json

import httpx
import pytest

from benchmarks.model_family import NATIVE_ROTATION
from tests.support.broken_loads import WRONG_PAGES
from tests.support.engines import NANO, SMALL, running, words
from tests.support.forked import VERDICTS
from tests.support.serving import MODEL, serving
from tools.make_tiny_model import make_tiny_model
from vllm_kvmarket import Market, NotPublishableError
from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.cli import main
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.core.verdicts import VERDICTS_FOLDER, verdicts
from vllm_kvmarket.market.timed_requests import ask, empty_prefix_cache

DOCUMENT, QUESTION = words(70, 600), words(71, 10)


IN_PIECES = {"max_num_batched_tokens": 512, "max_num_seqs": 4}
RECURRENT = IN_PIECES | {"enable_prefix_caching": False}
# How far log-probabilities may be apart: a state is computed on from in other pieces.
APART = {"float32": 1e-4, "bfloat16": 0.1}


@pytest.fixture(autouse=True)
def own_verdicts(shared_verdicts, monkeypatch):
    """Each home keeps its own, as it does for users."""
    monkeypatch.delenv(VERDICTS)


@pytest.fixture
def own_market(tmp_path):
    with Market.open(tmp_path / "home", {"host_cache_bytes": 0}) as opened:
        opened.create_account("alice")
        opened.deposit("alice", NANO, "first")
        yield opened


def gauge(llm):
    found = [m for m in llm.get_metrics() if m.name == "vllm:kvmarket_self_test_passed"]
    return found[0].value


def buy(llm, market):
    empty_prefix_cache(llm)
    return ask(llm, DOCUMENT + QUESTION, market.params("alice"), rest_s=0)


def test_the_first_start_tests_and_leaves_nothing_but_its_verdict(tiny, own_market):
    """Nothing is stored, listed or charged, the next start does not test, and both reuse."""
    market = own_market
    for start in range(2):
        with running(tiny(1), market, **SMALL) as llm:
            if not start:
                (verdict,) = verdicts(market.home)
                assert verdict.passed
                assert market.catalogue.listings() == []
                assert list(market.store.disk.keys()) == []
                assert len(market.ledger.transfers("alice")) == 1
                full = ask(llm, DOCUMENT + QUESTION, rest_s=0)
                assert full.market == {}
                assert gauge(llm) == 1
                market.publish(llm, token_ids=DOCUMENT)
            answer = buy(llm, market)
        assert answer.market["reused_tokens"] == len(DOCUMENT)
        assert (answer.token_ids, answer.logprobs) == (full.token_ids, full.logprobs)
        assert verdicts(market.home) == [verdict]
    assert [each.name for each in (market.home / VERDICTS_FOLDER).iterdir() if each.is_dir()] == []


def test_an_engine_whose_loads_are_wrong_sells_nothing_and_says_so(tiny, own_market, capfd):
    """Loads that report success: the self-test sees other answers. Another engine is not judged
    with it, once it is asked to test again.
    """
    market = own_market
    with running(tiny(1), market, **SMALL, worker_extension_cls=WRONG_PAGES) as llm:
        full = ask(llm, DOCUMENT + QUESTION, rest_s=0)
        with pytest.raises(NotPublishableError, match="self-test failed"):
            market.publish(llm, token_ids=DOCUMENT)
        answer = buy(llm, market)
        assert answer.token_ids == full.token_ids
        assert answer.market.get("reused_tokens", 0) == 0
        assert gauge(llm) == 0
    (verdict,) = verdicts(market.home)
    assert "gives other answers" in verdict.reason
    shown = capfd.readouterr()
    assert (shown.out + shown.err).count("THE SELF-TEST FAILED") == 1
    assert main(["env", "--home", str(market.home), "--json"]) == 1
    (problem,) = [p for p in json.loads(capfd.readouterr().out)["problems"] if "exact" in p]
    assert verdict.reason in problem

    main(["env", "--home", str(market.home), "--test-again"])
    with running(tiny(1), market, **SMALL) as llm:
        market.publish(llm, token_ids=DOCUMENT)
        assert buy(llm, market).market["reused_tokens"] == len(DOCUMENT)


def test_a_server_whose_engine_reuses_nothing_promises_nothing(tiny, tmp_path):
    """Neither a quote nor the gate, although the document is on offer."""
    config = {"self_test": "always", "refresh_interval_s": 0.1, "anonymous": "allow"}
    wrong = ("--worker-extension-cls", WRONG_PAGES)
    with serving(tiny(1), tmp_path / "home", *wrong, config=config) as server:
        key = server.key("alice")
        namespace = bytes.fromhex(httpx.get(f"{server.base}/v1/kvmarket").json()["namespace"])
        document = DocumentChunks.of(namespace, DOCUMENT)
        listing = Listing.of(document, ListingTerms(title="d"))
        server.market.begin_listing(listing, document).result()
        server.market.commit_listing(listing.document_id, 1000, document.keys).result()
        server.market.catalogue.refresh()
        assert server.market.quote(namespace, DOCUMENT).tokens == len(DOCUMENT)
        prompt = DOCUMENT + QUESTION
        for wish in ({"document": listing.document_id}, {"token_ids": prompt}):
            quote = server.post("/v1/kvmarket/quotes", wish, key).json()
            assert (quote["matched_tokens"], quote["charge_nano"]) == (0, 0)
            assert "self-test" in quote["declined"]
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 1}
        wish = {"kvmarket": {"reuse": "require"}}
        refused = server.post("/v1/completions", body | wish, key)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "no_match")
        assert server.complete(prompt, key)["usage"]["completion_tokens"]
        assert server.spent("alice") == 0


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
@pytest.mark.long
def test_wrong_loads_are_seen_in_models_with_windows(family, smollm, own_market, tmp_path):
    """Prefill in pieces, a prompt that leaves its windows behind."""
    model = make_tiny_model(1, smollm, tmp_path / "tiny", family)
    with running(model, own_market, **IN_PIECES, worker_extension_cls=WRONG_PAGES):
        (verdict,) = verdicts(own_market.home)
        assert "gives other answers" in verdict.reason


@pytest.mark.long
def test_a_model_that_answers_otherwise_in_two_pieces_is_not_reused(smollm, own_market, tmp_path):
    """vLLM's operator for positions does of LFM2 on a CPU: the self-test's verdict."""
    model = make_tiny_model(1, smollm, tmp_path / "tiny", "lfm2")
    with running(model, own_market, **RECURRENT, dtype="float32") as llm:
        (verdict,) = verdicts(own_market.home)
        assert "gives other answers" in verdict.reason
        with pytest.raises(NotPublishableError, match="self-test failed"):
            own_market.publish(llm, token_ids=DOCUMENT)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        # The only numbers that vLLM's kernel takes on a CPU.
        pytest.param("qwen3-next", {"dtype": "bfloat16"}, id="gated delta net"),
        pytest.param(
            "lfm2",
            {"dtype": "float32", **NATIVE_ROTATION},
            id="short convolutions, where vLLM computes positions rightly",
        ),
    ],
)
@pytest.mark.long
def test_a_recurrent_state_of_each_kind_is_reused_to_its_last_token(
    family, options, smollm, own_market, tmp_path
):
    """Beside attention."""
    model = make_tiny_model(1, smollm, tmp_path / "tiny", family)
    with running(model, own_market, **RECURRENT, **options) as llm:
        (verdict,) = verdicts(own_market.home)
        assert verdict.passed, verdict.reason
        own_market.publish(llm, token_ids=DOCUMENT)
        full = ask(llm, DOCUMENT + QUESTION, max_tokens=1, rest_s=0)
        wish = own_market.params("alice")
        answer = ask(llm, DOCUMENT + QUESTION, wish, max_tokens=1, rest_s=0)
        assert answer.market["reused_tokens"] == len(DOCUMENT)
        assert answer.token_ids == full.token_ids
        assert answer.logprobs == pytest.approx(full.logprobs, abs=APART[options["dtype"]])


@pytest.mark.long
def test_all_ranks_must_agree(tiny, own_market):
    """Tensor parallel: each rank stores and loads its own share."""
    tensor = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with running(tiny(1), own_market, **SMALL, **tensor) as llm:
        (verdict,) = verdicts(own_market.home)
        assert verdict.passed
        assert verdict.engine["ranks"] == "2x1"
        own_market.publish(llm, token_ids=DOCUMENT)
        assert buy(llm, own_market).market["reused_tokens"] == len(DOCUMENT)
