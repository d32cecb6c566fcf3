"""Each family of models: published in one process, reused in another, to the token and to the bit.

Plain vLLM on this CPU is the judge: what it computes in full is expected of every reuse.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks import model_family
from tests.support.engines import NANO, metric, running, words
from vllm_kvmarket import Market
from vllm_kvmarket.market.timed_requests import Answer, ask, empty_prefix_cache

# Prefill in pieces of 512: a window has left most of the document before its request ends.
ENGINE = {"max_num_batched_tokens": 512, "max_num_seqs": 4, "disable_log_stats": False}
DOCUMENT, QUESTIONS = words(80, 900), [words(901 + n, 10 + 7 * n) for n in range(2)]
HALF = 315
# Where a second document ends, with a whole chunk.
BEGINNING = 512
# How far log-probabilities may be apart where the last step has one token.
LAST_STEP = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}


@dataclass(frozen=True)
class Family:
    """A family of benchmarks/model_family.py and what is expected of it."""

    name: str
    market: dict[str, Any] = field(default_factory=dict)
    # A model with a recurrent state can go on only where one is stored, and vLLM caches nothing.
    is_recurrent: bool = False
    # How far log-probabilities may be from full prefill's. A recurrent layer sums a prompt piece by
    # piece, and the pieces of a prompt that goes on from a state are others.
    tolerance: float = 0.0
    # Whether vLLM's own hit is no nearer to full prefill, and may choose another token of two that
    # are as near to each other.
    forks: bool = False
    # A reuse ends with a multiple of so many tokens, as vLLM's own hit does.
    grain: int = 1
    # Bytes of a token in all attention layers, and of the state in all recurrent ones.
    token_bytes: int = 0
    state_bytes: int = 0
    # A package that vLLM's class of this model imports.
    needs: str = ""

    @property
    def models(self) -> model_family.Family:
        """How its model is made and started."""
        return next(each for each in model_family.FAMILIES if each.name == self.name)

    @property
    def states(self) -> list[int]:
        """The places inside the document where its state is stored."""
        step = self.market.get("state_every_tokens")
        return list(range(step, len(DOCUMENT), step)) if step else []

    @property
    def whole(self) -> int:
        """The tokens of the document that a question behind it reuses."""
        return len(DOCUMENT) - len(DOCUMENT) % self.grain

    def reusable(self, cut: int, *more: int) -> int:
        """Of a prompt that leaves the document there, and of one that is just the document; `more`
        documents on offer end there.
        """
        if not self.is_recurrent:
            return cut - cut % self.grain
        return max((end for end in (*self.states, *more) if end < cut), default=0)


FAMILIES = [
    pytest.param(Family("mistral"), id="windows only"),
    pytest.param(Family("gemma3"), id="windows and full attention"),
    pytest.param(
        Family("mamba2", is_recurrent=True, tolerance=1e-4, state_bytes=3 * 19_840),
        id="recurrent state",
    ),
    pytest.param(
        Family(
            "granite4",
            {"state_every_tokens": 256},
            is_recurrent=True,
            tolerance=1e-4,
            token_bytes=2 * 512,
            state_bytes=2 * 19_840,
        ),
        id="recurrent state and attention",
    ),
    *(
        pytest.param(family, id=kind, marks=pytest.mark.long)
        for kind, family in {
            "windows with sinks": Family("gpt-oss-bf16"),
            "windows, real weights": Family("gemma3-270m", tolerance=1e-4),
            "chunked attention": Family("llama4"),
            "full attention": Family("llama"),
            "full attention, half precision": Family("qwen3-fp16"),
            "full attention, an adapter": Family("qwen3-lora"),
            "full attention, experts": Family("qwen3-moe"),
            "absolute positions": Family("gpt2"),
            "long rope": Family("phi3-longrope"),
            "latent attention": Family("deepseek-v2-bf16", tolerance=0.1, forks=True, grain=128),
            "latent attention without YaRN": Family(
                "deepseek-v2-plain", tolerance=0.1, forks=True, grain=128
            ),
            "text of a model that sees": Family("qwen-vl", needs="torchvision"),
            "gated delta nets and attention, a model that sees": Family(
                "qwen3.5",
                is_recurrent=True,
                tolerance=0.1,
                token_bytes=2048,
                state_bytes=3 * (6144 + 262_144),
                needs="torchvision",
            ),
            "recurrent state and attention in one layer": Family(
                "falcon-h1",
                is_recurrent=True,
                tolerance=1e-4,
                token_bytes=3 * 512,
                state_bytes=3 * 19_840,
            ),
        }.items()
    ),
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.param
    return found


@pytest.fixture(scope="module")
def model(family: Family, smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if family.needs:
        pytest.importorskip(family.needs)
    found = family.models.make(tmp_path_factory.mktemp("family") / "tiny")
    if not found.exists():
        pytest.skip(f"python tools/convert_model.py {found} {found.name} makes this model")
    return found


@contextmanager
def engine(family: Family, model: Path, market: Market) -> Iterator[Any]:
    settings = ENGINE | {"dtype": family.models.dtype} | family.models.engine
    with running(model, market, **settings) as llm:
        if family.models.adapter:
            model_family.use_adapter(llm, model)
        yield llm


@pytest.fixture(scope="module")
def market(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    facts = {"host_cache_bytes": 0} | family.market
    with Market.open(tmp_path_factory.mktemp("families"), facts) as opened:
        opened.create_account("alice")
        opened.deposit("alice", 1000 * NANO, "first")
        yield opened


@pytest.fixture(scope="module")
def expected(family: Family, model: Path, market: Market) -> dict[tuple[int, int], Answer]:
    """What full prefill answers, by the document's tokens and the question.

    The engine that computed it publishes the document, and is gone afterwards.
    """
    with engine(family, model, market) as llm:
        answers = {
            (cut, n): ask(llm, DOCUMENT[:cut] + question, rest_s=0)
            for cut in (HALF, BEGINNING, 700, len(DOCUMENT))
            for n, question in enumerate(QUESTIONS)
        }
        answers[len(DOCUMENT), -1] = ask(llm, DOCUMENT, rest_s=0)
        if family.forks:
            # vLLM's own hit, on what it computed of the whole document.
            empty_prefix_cache(llm)
            ask(llm, DOCUMENT, max_tokens=1, rest_s=0)
            answers[BEGINNING, -1] = ask(llm, DOCUMENT[:BEGINNING] + QUESTIONS[0], rest_s=0)
        market.publish(llm, token_ids=DOCUMENT, title="family")
    return answers


@pytest.fixture(scope="module")
def llm(family: Family, model: Path, market: Market, expected: object) -> Iterator[Any]:
    """A new engine on the same market."""
    with engine(family, model, market) as started:
        yield started


def reuse(llm: Any, market: Market, cut: int, question: int, rest_s: float = 0.0) -> Answer:
    """Buy the document's first `cut` tokens, none of which are in the paged cache."""
    empty_prefix_cache(llm)
    prompt = DOCUMENT[:cut] + (QUESTIONS[question] if question >= 0 else [])
    return ask(llm, prompt, market.params("alice"), rest_s=rest_s)


def assert_same(family: Family, answer: Answer, full: Answer, tolerance: float = 0.0) -> None:
    """The same tokens with the same log-probabilities, bit for bit unless the family cannot."""
    if family.forks and (same := answer.equal_tokens(full)) < len(full.token_ids):
        # Of two tokens that are as likely; what follows is another text.
        assert answer.logprobs[: same + 1] == pytest.approx(
            full.logprobs[: same + 1], abs=family.tolerance
        )
        return
    assert answer.token_ids == full.token_ids
    if tolerance := max(tolerance, family.tolerance):
        assert answer.logprobs == pytest.approx(full.logprobs, abs=tolerance)
    else:
        assert answer.logprobs == full.logprobs


@pytest.mark.parametrize("question", range(len(QUESTIONS)))
def test_a_new_process_reuses_the_document_to_its_last_token(
    llm, market, family, expected, question
):
    """And pays for just these tokens."""
    answer = reuse(llm, market, len(DOCUMENT), question)
    assert answer.market["reused_tokens"] == answer.market["loaded_tokens"] == family.whole
    assert_same(family, answer, expected[len(DOCUMENT), question])
    assert market.receipt(answer.market["receipt_id"]).charge_nano == family.whole * 500


def test_a_prompt_that_leaves_the_document_half_way_reuses_the_rest(llm, market, family, expected):
    """As far as every kind of cache can be restored."""
    answer = reuse(llm, market, HALF, 0)
    assert answer.market.get("reused_tokens", 0) == family.reusable(HALF)
    assert_same(family, answer, expected[HALF, 0])


def test_where_hit_and_reuse_end_with_a_block_they_are_equal_to_the_bit(
    llm, market, family, expected
):
    """Also of a family whose hits are not."""
    if not family.forks:
        pytest.skip("compared with full prefill")
    answer, hit = reuse(llm, market, BEGINNING, 0), expected[BEGINNING, -1]
    assert answer.market["reused_tokens"] == answer.market["loaded_tokens"] == BEGINNING
    assert hit.cached_tokens == BEGINNING
    assert (answer.token_ids, answer.logprobs) == (hit.token_ids, hit.logprobs)


@pytest.mark.parametrize(
    "asked", [(BEGINNING, 0), (700, 1), (len(DOCUMENT), -1), (len(DOCUMENT), 0)]
)
def test_where_two_documents_begin_alike_each_prompt_reuses_what_it_can(
    llm, market, family, expected, asked
):
    """Its quote says so. A prompt that is just a document needs a state before its last token."""
    cut, question = asked
    (listing,) = market.catalogue.listings(state="live")
    beginning = market.publish(llm, token_ids=DOCUMENT[:BEGINNING], title="its beginning")
    try:
        prompt = DOCUMENT[:cut] + (QUESTIONS[question] if question >= 0 else [])
        most = len(prompt) - 1
        market.catalogue.refresh()
        reused = cut if question >= 0 and cut in {BEGINNING, len(DOCUMENT)} else None
        reused = min(family.reusable(cut, BEGINNING), most) if reused is None else reused
        reused -= reused % family.grain
        # A quote does not know the engine's blocks: it says what is charged at most.
        quoted = market.quote(listing.namespace, prompt, most=most).tokens
        assert reused <= quoted < reused + family.grain
        answer = reuse(llm, market, cut, question)
        assert answer.market["reused_tokens"] == reused
        # A step of one token adds up in another order, with vLLM's kernel for decoding.
        tolerance = LAST_STEP[family.models.dtype] if reused == most else 0.0
        assert_same(family, answer, expected[cut, question], tolerance)
        assert market.receipt(answer.market["receipt_id"]).charge_nano == reused * 500
    finally:
        assert market.catalogue.evict(beginning.document_id, "a test")


def test_a_second_request_takes_what_it_can_from_the_paged_cache(llm, market, family, expected):
    """vLLM's own hit comes first, and the rest is loaded behind it."""
    reuse(llm, market, len(DOCUMENT), 0)
    prompt = DOCUMENT + QUESTIONS[1]
    answer = ask(llm, prompt, market.params("alice"), rest_s=0)
    assert answer.market["reused_tokens"] == family.whole
    assert (answer.market["loaded_tokens"] == len(DOCUMENT)) == family.is_recurrent
    assert_same(family, answer, expected[len(DOCUMENT), 1])


def test_what_is_stored_is_what_the_model_needs(market, family):
    """Pages of attention in whole blocks, and a state where one is stored: nothing is padded."""
    if not family.is_recurrent:
        pytest.skip("windows are stored whole")
    (listing,) = market.catalogue.listings(state="live")
    pages = -(-len(DOCUMENT) // 128) * 128 * family.token_bytes
    needed = pages + (len(family.states) + 1) * family.state_bytes
    headers = 4 * 5 * 4096
    assert needed <= listing.stored_bytes <= needed + headers


def test_a_publication_that_is_preempted_is_computed_again_and_exact(
    llm, market, family, monkeypatch
):
    """Before and after blocks or states of it have left."""
    document, question = words(82, 1100), QUESTIONS[0]
    full = ask(llm, document + question, rest_s=0)
    preempted, step = metric(llm, "vllm:num_preemptions"), llm.llm_engine.step
    left: list[float] = []

    def preempt_and_step() -> Any:
        # Between two of these the engine computes a step, if they come neither too fast nor late.
        while left:
            llm.reset_prefix_cache(reset_running_requests=True)
            time.sleep(left.pop())
        return step()

    monkeypatch.setattr(llm.llm_engine, "step", preempt_and_step)
    for pause_s in (0.0, 0.01, 0.03, 0.1, 0.3):
        empty_prefix_cache(llm)
        left += [pause_s] * 4
        listing = market.publish(llm, token_ids=document, title="preempted")
        if metric(llm, "vllm:num_preemptions") > preempted:
            break
        assert market.catalogue.evict(listing.document_id, "it was not preempted")
    assert metric(llm, "vllm:num_preemptions") > preempted
    empty_prefix_cache(llm)
    answer = ask(llm, document + question, market.params("alice"), rest_s=0)
    assert answer.market["reused_tokens"] == len(document) - len(document) % family.grain
    assert_same(family, answer, full, 0.1)
    assert market.catalogue.evict(listing.document_id, "a test")


def test_a_publication_that_is_aborted_lists_nothing(llm, market):
    """What it has stored by then is nobody's, and nothing is reused of it."""
    document = words(83, 1100)
    sampling = llm.get_default_sampling_params()
    wish = market.credentials.sign_params({"publish": {"terms": {"title": "left"}}})
    sampling.extra_args = {"kv_transfer_params": {"kvmarket": wish}}
    engine = llm.llm_engine
    engine.add_request("left", {"prompt_token_ids": document}, sampling)
    engine.abort_request(["left"])
    while engine.has_unfinished_requests():
        engine.step()
    answer = ask(llm, document + QUESTIONS[0], market.params("alice"), max_tokens=1, rest_s=0)
    assert not answer.market.get("reused_tokens")
    assert [each.terms.title for each in market.catalogue.listings(state="live")] == ["family"]


def test_an_audit_finds_the_stored_pages_exact(llm, market):
    """Also those that the window has left when the audit's request ends."""
    (listing,) = market.catalogue.listings(state="live")
    audit = market.audit(llm, listing.document_id, chunks=4, seed=1)
    assert (audit.result, audit.chunks) == ("exact", 4)


def test_a_damaged_chunk_is_computed_and_not_charged_and_repaired(llm, market, family, expected):
    """Whatever part of a load fails, the tokens stay right. Last in the module: it evicts."""
    (listing,) = market.catalogue.listings(state="live")
    (share,) = market.store.disk.files(listing.chunk_keys[-1])
    path = market.store.disk.path(listing.chunk_keys[-1], *share)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    answer = reuse(llm, market, len(DOCUMENT), 0)
    assert_same(family, answer, expected[len(DOCUMENT), 0])
    assert answer.market["reused_tokens"] in {0, 768}
    receipt = answer.market["receipt_id"]
    charge = market.receipt(receipt).charge_nano if receipt else 0
    assert charge == answer.market["charge_nano"] == answer.market["reused_tokens"] * 500
    assert market.catalogue.get(listing.document_id).state == "damaged"

    assert market.publish(llm, token_ids=DOCUMENT).state == "live"
    again = reuse(llm, market, len(DOCUMENT), 1)
    assert again.market["reused_tokens"] == family.whole
    assert_same(family, again, expected[len(DOCUMENT), 1])

    assert market.catalogue.evict(listing.document_id, "to make room")
    evicted = reuse(llm, market, len(DOCUMENT), 0, rest_s=1.0)
    assert not evicted.market.get("reused_tokens")
    assert_same(family, evicted, expected[len(DOCUMENT), 0])
    assert market.ledger.check_integrity() == []
