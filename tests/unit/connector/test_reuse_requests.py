"""What the samples of one request pay for, called as vLLM's scheduler calls the half."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from vllm.v1.outputs import KVConnectorOutput

from tests.support.catalogue_documents import NAMESPACE
from tests.support.scheduler_half import CACHED, DOCUMENT, request_of
from vllm_kvmarket.connector.messages import LoadReport, WorkerReport
from vllm_kvmarket.core.document_chunks import DocumentChunks

CHUNK = 256
KEYS = DocumentChunks.of(NAMESPACE, DOCUMENT, CHUNK).keys
PROMPT = [*DOCUMENT, 7, 8]


@pytest.fixture
def sample(market, half):
    """Makes a sample of alice's request and lets it arrive."""

    def make(number):
        name = f"{number}_x-0123abcd"
        request = request_of(PROMPT, market.params("alice"), name, arrival_time=1.0)
        half.arrived(request)
        return request

    return make


def admitted(half, request, local):
    """Ask for a request and admit it, as vLLM's scheduler does; the tokens to load."""
    deadline = time.monotonic() + 10
    while (external := half.ready(request, local)[0]) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    if request.num_preemptions == 0:
        request.prefill_stats.set(request.num_prompt_tokens, local, external)
    blocks = SimpleNamespace(get_block_ids=lambda: (list(range(1, 6)),))
    half.allocated(request, blocks, external)
    return external


def loaded(half, request, *failed):
    """The workers report a request's load, of which these chunks failed."""
    name, failures = request.request_id, {KEYS[index]: "bad" for index in failed}
    report = WorkerReport(loads={name: LoadReport(failures=failures)})
    half.worker_reported(
        KVConnectorOutput(kv_connector_worker_meta=report, finished_recving={name})
    )


def receipt_of(half, market, *requests):
    """All of them end; the receipt of their one purchase."""
    for request in requests:
        half.finished(request, [[1, 2, 3, 4, 5]])
    half._market.ledger.submit([]).result()
    (receipt,) = market.receipts()
    assert market.ledger.account("alice").debits_posted == receipt.charge_nano
    return receipt


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_sample_that_arrives_after_anothers_failed_load_pays_for_no_more(
    market, half, sample, order
):
    """The other one has computed what the late one finds in the paged cache."""
    samples = [sample(0)]
    assert admitted(half, samples[0], 0) == 600
    loaded(half, samples[0], 1)
    samples.append(sample(1))
    assert admitted(half, samples[1], CACHED) == 600 - CACHED
    loaded(half, samples[1])
    receipt = receipt_of(half, market, *(samples[number] for number in order))
    assert (receipt.tokens_reused, receipt.tokens_failed) == (CHUNK, 600 - CHUNK)
    assert receipt.charge_nano == CHUNK * 500


def test_a_sample_that_was_admitted_before_anothers_failure_pays_for_no_more(market, half, sample):
    """Its own load fails in front, and it comes back when the other one has computed the rest."""
    half._engine.loads._deadline_s = 0  # neither waits for the other
    first, second = sample(0), sample(1)
    for request in (first, second):
        assert admitted(half, request, 0) == 600
    loaded(half, first, 1)
    loaded(half, second)
    second.num_preemptions = 1
    admitted(half, second, CACHED)
    loaded(half, second)
    assert receipt_of(half, market, second, first).tokens_reused == CHUNK


def test_a_sample_that_waits_is_computed_when_weights_change(half, sample):
    """Also where another sample of its request has begun."""
    half.namespaces.weights_changed = lambda **_: None
    first, second = sample(0), sample(1)
    admitted(half, first, 0)
    half.weights_changed("update_weights")
    assert admitted(half, second, 0) == 0
    answer = half.finished(second, [[1, 2, 3, 4, 5]])[1]["kvmarket"]
    assert "weights were changed" in answer["declined"]


def test_the_accounts_own_prompt_behind_the_document_is_not_computed_either(market, half):
    """vLLM's usage, the answer and the receipt agree; what lies behind the document is free."""
    request = request_of([*PROMPT, *range(300)], market.params("alice"))
    half.arrived(request)
    local = 7 * 128  # 600 of these are the document's
    assert admitted(half, request, local) == 0
    answer = half.finished(request, [[1, 2, 3, 4, 5]])[1]["kvmarket"]
    assert (answer["reused_tokens"], answer["computed_tokens"]) == (600, 902 - local)
    receipt = market.receipt(answer["receipt_id"])
    assert (receipt.charge_nano, receipt.tokens_computed) == (600 * 500, 902 - local)


def test_a_request_that_does_not_buy_says_what_it_computed(half):
    """Its account's earlier prompts are in vLLM's cache."""
    request = request_of(PROMPT, {})
    half.arrived(request)
    assert admitted(half, request, 256) == 0
    answer = half.finished(request, [[1, 2, 3, 4, 5]])[1]["kvmarket"]
    assert (answer["reused_tokens"], answer["computed_tokens"]) == (0, 602 - 256)
