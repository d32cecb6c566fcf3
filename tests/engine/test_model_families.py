"""Each family of models: published in one process, reused in another, to the token and to the bit.

Plain vLLM on this CPU is the judge: what it computes in full is expected of every reuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import NANO, running, words
from tools.make_tiny_model import make_tiny_model
from vllm_kvmarket import Market
from vllm_kvmarket.market.timed_requests import Answer, ask, empty_prefix_cache

# Prefill in pieces of 512: a window has left most of the document before its request ends.
ENGINE = {"max_num_batched_tokens": 512, "max_num_seqs": 4, "disable_log_stats": False}
DOCUMENT, QUESTIONS = words(80, 900), [words(901 + n, 10 + 7 * n) for n in range(2)]
HALF = 315


@dataclass(frozen=True)
class Family:
    """A family of tiny models and what is particular about it."""

    name: str
    # How many tokens of a prompt that leaves the document at HALF can be reused.
    half: int = HALF
    engine: dict[str, Any] = field(default_factory=dict)


FAMILIES = [
    pytest.param(Family("mistral"), id="windows only"),
    pytest.param(Family("gemma3"), id="windows and full attention"),
    pytest.param(Family("gpt-oss"), id="windows with sinks", marks=pytest.mark.long),
    pytest.param(Family("llama"), id="full attention", marks=pytest.mark.long),
    pytest.param(Family("qwen3-moe"), id="full attention, experts", marks=pytest.mark.long),
    pytest.param(Family("phi3-longrope"), id="long rope", marks=pytest.mark.long),
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.param
    return found


@pytest.fixture(scope="module")
def model(family: Family, smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(1, smollm, tmp_path_factory.mktemp("family") / "tiny", family.name)


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    with Market.open(tmp_path_factory.mktemp("families"), {"host_cache_bytes": 0}) as opened:
        opened.create_account("alice")
        opened.deposit("alice", 1000 * NANO, "first")
        yield opened


@pytest.fixture(scope="module")
def expected(family: Family, model: Path, market: Market) -> dict[tuple[int, int], Answer]:
    """What full prefill answers, by the document's tokens and the question.

    The engine that computed it publishes the document, and is gone afterwards.
    """
    with running(model, market, **ENGINE | family.engine) as llm:
        answers = {
            (cut, n): ask(llm, DOCUMENT[:cut] + question, rest_s=0)
            for cut in (HALF, len(DOCUMENT))
            for n, question in enumerate(QUESTIONS)
        }
        market.publish(llm, token_ids=DOCUMENT, title="family")
    return answers


@pytest.fixture(scope="module")
def llm(family: Family, model: Path, market: Market, expected: object) -> Iterator[Any]:
    """A new engine on the same market."""
    with running(model, market, **ENGINE | family.engine) as engine:
        yield engine


def reuse(llm: Any, market: Market, cut: int, question: int, rest_s: float = 0.0) -> Answer:
    """Buy the document's first `cut` tokens, none of which are in the paged cache."""
    empty_prefix_cache(llm)
    prompt = DOCUMENT[:cut] + QUESTIONS[question]
    return ask(llm, prompt, market.params("alice"), rest_s=rest_s)


def assert_same(answer: Answer, full: Answer) -> None:
    """The same tokens with the same log-probabilities, bit for bit."""
    assert answer.token_ids == full.token_ids
    assert answer.logprobs == full.logprobs


@pytest.mark.parametrize("question", range(len(QUESTIONS)))
def test_a_new_process_reuses_the_document_to_its_last_token(llm, market, expected, question):
    """And pays for just these tokens."""
    answer = reuse(llm, market, len(DOCUMENT), question)
    assert answer.market["reused_tokens"] == answer.market["loaded_tokens"] == len(DOCUMENT)
    assert_same(answer, expected[len(DOCUMENT), question])
    assert market.receipt(answer.market["receipt_id"]).charge_nano == len(DOCUMENT) * 500


def test_a_prompt_that_leaves_the_document_half_way_reuses_the_rest(llm, market, family, expected):
    """As far as every kind of cache can be restored."""
    answer = reuse(llm, market, HALF, 0)
    assert answer.market["reused_tokens"] == family.half
    assert_same(answer, expected[HALF, 0])


def test_a_second_request_takes_what_it_can_from_the_paged_cache(llm, market, expected):
    """vLLM's own hit comes first, and the rest is loaded behind it."""
    reuse(llm, market, len(DOCUMENT), 0)
    prompt = DOCUMENT + QUESTIONS[1]
    answer = ask(llm, prompt, market.params("alice"), rest_s=0)
    assert answer.market["reused_tokens"] == len(DOCUMENT)
    assert answer.market["loaded_tokens"] < len(DOCUMENT)
    assert_same(answer, expected[len(DOCUMENT), 1])


def test_an_audit_finds_the_stored_pages_exact(llm, market):
    """Also those that the window has left when the audit's request ends."""
    (listing,) = market.catalogue.listings(state="live")
    audit = market.audit(llm, listing.document_id, chunks=4, seed=1)
    assert (audit.result, audit.chunks) == ("exact", 4)


def test_a_damaged_chunk_is_computed_and_not_charged_and_repaired(llm, market, expected):
    """Whatever part of a load fails, the tokens stay right. Last in the module: it evicts."""
    (listing,) = market.catalogue.listings(state="live")
    path = market.store.disk.path(listing.chunk_keys[2])
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    answer = reuse(llm, market, len(DOCUMENT), 0)
    assert_same(answer, expected[len(DOCUMENT), 0])
    assert answer.market["reused_tokens"] in {0, 512}
    assert market.receipt(answer.market["receipt_id"]).charge_nano == (
        answer.market["reused_tokens"] * 500
    )
    assert market.catalogue.get(listing.document_id).state == "damaged"

    assert market.publish(llm, token_ids=DOCUMENT).state == "live"
    again = reuse(llm, market, len(DOCUMENT), 1)
    assert again.market["reused_tokens"] == len(DOCUMENT)
    assert_same(again, expected[len(DOCUMENT), 1])

    assert market.catalogue.evict(listing.document_id, "to make room")
    evicted = reuse(llm, market, len(DOCUMENT), 0, rest_s=1.0)
    assert not evicted.market.get("reused_tokens")
    assert_same(evicted, expected[len(DOCUMENT), 0])
    assert market.ledger.check_integrity() == []
