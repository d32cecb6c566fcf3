"""One copy of a published document in vLLM's paged cache, for all who buy it, on a real engine."""

from __future__ import annotations

import time

import httpx
import pytest
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from tests.support.asking import Bill, Requests, sold, wait_until
from tests.support.engines import NANO, SMALL, metric, running, words
from tests.support.serving import MODEL
from tests.support.store_chunks import falsify
from vllm_kvmarket import Market
from vllm_kvmarket.auth.api_keys import Keys
from vllm_kvmarket.market.garbage_collection import collect_garbage
from vllm_kvmarket.market.market import DATABASE_FILE
from vllm_kvmarket.market.timed_requests import ask, empty_prefix_cache

# Ten whole blocks, five chunks: nothing of it lies in a block with a question.
LENGTH = 1280
QUESTION = words(994, 40)
BUYERS = [f"buyer{number}" for number in range(16)]


@pytest.fixture(scope="module")
def llm(tiny, market):
    """An engine of this module: vLLM shows the metrics of the engine that started last."""
    with running(tiny(1), market, **SMALL) as engine:
        yield engine


@pytest.fixture(scope="module", autouse=True)
def buyers(market):
    for name in BUYERS:
        market.create_account(name)
        market.deposit(name, NANO, f"first-of-{name}")


@pytest.fixture
def bills(market):
    return {name: Bill(market, name) for name in BUYERS}


@pytest.fixture
def requests(llm):
    opened = Requests(llm)
    yield opened
    opened.finish()


def published(llm, market, seed, length=LENGTH):
    """A document that is on offer, and in the store only."""
    document = words(seed, length)
    listing = market.publish(llm, token_ids=document)
    empty_prefix_cache(llm)
    return document, listing


def chunks_loaded(llm):
    return metric(llm, "vllm:kvmarket_chunks_loaded")


def crowd(llm, market, prompt, accounts, max_tokens=8, **sampling):
    """One request of each account at the same time, each with a salt of its own; None buys not."""
    chosen = []
    for account in accounts:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, min_tokens=max_tokens)
        params.extra_args = {} if account is None else market.params(account)
        for field, value in sampling.items():
            setattr(params, field, value)
        chosen.append(params)
    prompts = [
        {"prompt_token_ids": list(prompt), "cache_salt": f"salt of {account}"}
        for account in accounts
    ]
    return llm.generate(prompts, chosen, use_tqdm=False)


def said(output):
    return list(output.outputs[0].token_ids)


def test_sixteen_accounts_load_a_document_once_and_each_pays_for_it(llm, market: Market, bills):
    """Equal tokens, 16 charges, one load; private copies would not fit into the 43 blocks."""
    document, listing = published(llm, market, 9000)
    prompt = document + QUESTION
    full = ask(llm, prompt, market.params("dave"), max_tokens=8, rest_s=0)
    empty_prefix_cache(llm)
    before, preempted = chunks_loaded(llm), metric(llm, "vllm:num_preemptions")
    answers = crowd(llm, market, prompt, BUYERS)
    assert [said(each) for each in answers] == [list(full.token_ids)] * 16
    assert [sold(each)["reused_tokens"] for each in answers] == [LENGTH] * 16
    assert sorted(sold(each)["loaded_tokens"] for each in answers) == [0] * 15 + [LENGTH]
    assert [each.num_cached_tokens for each in answers] == [LENGTH] * 16
    assert [bill.tokens() for bill in bills.values()] == [LENGTH] * 16
    assert chunks_loaded(llm) - before == len(listing.chunk_keys) == 5
    assert metric(llm, "vllm:num_preemptions") == preempted
    for bill in bills.values():
        (receipt,) = bill.receipts()
        assert receipt.charge_nano == LENGTH * 500


def test_what_an_account_asks_behind_a_document_is_its_own(llm, market):
    """It finds its own question again; another account that asks the same finds the document."""
    document, _ = published(llm, market, 9010)
    prompt = document + words(9011, 600)
    found = [
        crowd(llm, market, prompt, [account])[0].num_cached_tokens
        for account in ("buyer0", "buyer1", "buyer0", "buyer2")
    ]
    whole = len(prompt) // 128 * 128
    assert found == [LENGTH, LENGTH, whole, LENGTH]


def test_who_does_not_buy_finds_nothing_of_a_document_that_others_have_bought(llm, market, bills):
    """Neither without an account nor without funds; after that, only what it computed itself."""
    document, _ = published(llm, market, 9020)
    prompt = document + QUESTION
    (bought,) = crowd(llm, market, prompt, ["buyer0"])
    for account in (None, "dave"):
        for own in (0, LENGTH):
            (answer,) = crowd(llm, market, prompt, [account])
            assert said(answer) == said(bought)
            assert answer.num_cached_tokens == own
            assert sold(answer)["declined"]
            assert (sold(answer)["reused_tokens"], sold(answer)["charge_nano"]) == (0, 0)
    (again,) = crowd(llm, market, prompt, ["buyer0"])
    assert (again.num_cached_tokens, sold(again)["loaded_tokens"]) == (LENGTH, 0)
    assert bills["buyer0"].tokens() == 2 * LENGTH


def test_prompts_that_nobody_published_are_shared_with_nobody(llm, market):
    """An account that buys elsewhere too."""
    prompt = words(9030, 700)
    found = [
        crowd(llm, market, prompt, [account])[0].num_cached_tokens
        for account in ("buyer0", "buyer1", "buyer0")
    ]
    assert found == [0, 0, 640]


def test_a_document_that_was_just_published_is_in_the_cache_for_its_buyers(llm, market):
    """Its blocks had the shared hashes while it was computed: there is nothing to load."""
    document = words(9040, LENGTH)
    market.publish(llm, token_ids=document)
    (answer,) = crowd(llm, market, document + QUESTION, ["buyer3"])
    assert (sold(answer)["reused_tokens"], sold(answer)["loaded_tokens"]) == (LENGTH, 0)


def test_a_republication_is_computed_and_its_buyers_find_that(llm, market):
    """Wrong pages, which verify, were loaded into the cache before the document left the market:
    neither the store nor the next buyers get them.
    """
    document, listing = published(llm, market, 9130)
    prompt = document + QUESTION
    full = ask(llm, prompt, market.params("dave"), max_tokens=8, rest_s=0)
    empty_prefix_cache(llm)
    for key in listing.chunk_keys:
        falsify(market.store.disk, key)
    (wrong,) = crowd(llm, market, prompt, ["buyer9"])
    assert said(wrong) != list(full.token_ids)
    assert market.catalogue.evict(listing.document_id, "to be repaired")
    wait_until(lambda: not sold(crowd(llm, market, prompt, ["buyer9"])[0])["matched_tokens"])
    collect_garbage(market)
    market.republish(llm, listing.document_id)
    for account, loaded in (("buyer10", 0), ("buyer11", LENGTH)):
        (answer,) = crowd(llm, market, prompt, [account])
        assert said(answer) == list(full.token_ids)
        assert (sold(answer)["reused_tokens"], sold(answer)["loaded_tokens"]) == (LENGTH, loaded)
        empty_prefix_cache(llm)
    assert market.audit(llm, listing.document_id, chunks=5).result in ("exact", "close")


def test_requests_that_share_are_preempted_and_come_back(llm, market, bills):
    """Eight at once, each with a long question of its own: what is shared stays, all pay once."""
    document, _ = published(llm, market, 9050)
    prompts = [document + words(9051 + number, 500) for number in range(8)]
    alone = [crowd(llm, market, prompt, ["dave"], 4)[0] for prompt in prompts]
    empty_prefix_cache(llm)
    preempted = metric(llm, "vllm:num_preemptions")
    chosen = []
    for name in BUYERS[:8]:
        params = SamplingParams(temperature=0.0, max_tokens=200, min_tokens=200)
        params.extra_args = market.params(name)
        chosen.append(params)
    given = [
        {"prompt_token_ids": prompt, "cache_salt": name}
        for prompt, name in zip(prompts, BUYERS, strict=False)
    ]
    answers = llm.generate(given, chosen, use_tqdm=False)
    assert metric(llm, "vllm:num_preemptions") > preempted
    for one, other in zip(alone, answers, strict=True):
        assert said(one) == said(other)[:4]
        assert sold(other)["reused_tokens"] == LENGTH
    assert [bills[name].tokens() for name in BUYERS[:8]] == [LENGTH] * 8


def test_shared_blocks_that_were_evicted_are_loaded_again(llm, market, bills):
    """Other requests need their room; the next buyer has equal tokens."""
    document, _ = published(llm, market, 9060)
    (first,) = crowd(llm, market, document + QUESTION, ["buyer0"])
    for number in range(6):
        ask(llm, words(9061 + number, 900), max_tokens=2, rest_s=0)
    (second,) = crowd(llm, market, document + QUESTION, ["buyer1"])
    assert sold(second)["loaded_tokens"] > 0
    assert sold(second)["reused_tokens"] == LENGTH
    assert said(first) == said(second)
    assert (bills["buyer0"].tokens(), bills["buyer1"].tokens()) == (LENGTH, LENGTH)


def test_damage_that_a_crowd_meets_is_computed_and_not_charged(llm, market, bills):
    """One load finds it while the others wait; each pays for what lies before it, or found."""
    document, listing = published(llm, market, 9070)
    prompt = document + QUESTION
    full = ask(llm, prompt, market.params("dave"), max_tokens=8, rest_s=0)
    empty_prefix_cache(llm)
    path = market.store.disk.path(listing.chunk_keys[2])
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    answers = crowd(llm, market, prompt, BUYERS[:6])
    assert [said(each) for each in answers] == [list(full.token_ids)] * 6
    assert sum(sold(each)["reused_tokens"] == 512 for each in answers) >= 1
    for name, answer in zip(BUYERS, answers, strict=False):
        # Blocks that another buyer has computed meanwhile are found, and paid for.
        assert 512 <= sold(answer)["reused_tokens"] <= LENGTH
        assert bills[name].tokens() == sold(answer)["reused_tokens"]
    wait_until(lambda: market.catalogue.get(listing.document_id).state == "damaged")
    assert len([key for key in listing.chunk_keys if not market.store.has(key)]) == 1
    market.republish(llm, listing.document_id)


def test_when_the_loading_request_is_aborted_the_others_are_served(llm, market, bills, requests):
    """The first of five leaves at once."""
    document, _ = published(llm, market, 9080)
    for name in BUYERS[:5]:
        requests.start(name, document + QUESTION, market.params(name))
    requests.abort("buyer0")
    answers = requests.finish()
    for name in BUYERS[1:5]:
        assert sold(answers[name][0])["reused_tokens"] == LENGTH
        assert bills[name].tokens() == LENGTH
    assert bills["buyer0"].tokens() == 0


def test_the_samples_of_one_request_share_one_load_and_one_charge(llm, market, bills):
    """With n=3 vLLM runs three requests."""
    document, _ = published(llm, market, 9090)
    before = chunks_loaded(llm)
    (answer,) = crowd(llm, market, document + QUESTION, ["buyer4"], n=3, temperature=1.0)
    assert len(answer.outputs) == 3
    assert bills["buyer4"].tokens() == LENGTH
    assert chunks_loaded(llm) - before == 5


def test_a_resumable_request_reuses_and_pays_once(llm, market, bills):
    """Its input comes in two parts, of which the first begins with the document."""
    document, _ = published(llm, market, 9100)
    parts = [document + QUESTION, words(9101, 400)]
    before = chunks_loaded(llm)
    answers = [session(llm, market, name, parts) for name in ("buyer5", "buyer6")]
    assert answers[0] == answers[1]
    assert [len(each) for each in answers[0]] == [4, 4]
    assert chunks_loaded(llm) - before == 5
    assert (bills["buyer5"].tokens(), bills["buyer6"].tokens()) == (LENGTH, LENGTH)


def session(llm, market, account, parts):
    """The answers to a request's input as it comes in parts, as vLLM's AsyncLLM sends it."""
    engine, answers = llm.llm_engine, []
    for number, part in enumerate([*parts, [0]]):
        params = SamplingParams(temperature=0.0, max_tokens=4, min_tokens=4)
        params.output_kind = RequestOutputKind.DELTA
        params.extra_args = market.params(account)
        made = engine.input_processor.process_inputs(
            f"session of {account}",
            {"prompt_token_ids": list(part), "cache_salt": account},
            params,
            supported_tasks=("generate",),
            resumable=number < len(parts),
        )
        made.external_req_id = made.request_id
        engine.output_processor.add_request(made, None, None, 0)
        engine.engine_core.add_request(made)
        if not made.resumable:  # the input has ended
            return answers
        answers.append([])
        deadline = time.monotonic() + 60
        while len(answers[-1]) < 4:
            assert time.monotonic() < deadline
            for output in engine.step():
                answers[-1] += output.outputs[0].token_ids
    return answers


def test_a_document_that_is_preloaded_and_pinned_over_http_serves_http_buyers(
    llm, market, bills, open_server
):
    """In a server that has never seen it: the buyer's request loads nothing."""
    document, listing = published(llm, market, 9120)
    market.catalogue.set_pinned(listing.document_id, pinned=True)
    keys = Keys(market.home / DATABASE_FILE)
    admin, buyer = (keys.create(*each)[0] for each in (("boss", ["admin"]), ("buyer8", ["buyer"])))

    def post(path, key, **body):
        headers = {"authorization": f"Bearer {key}"}
        answer = httpx.post(open_server + path, json=body or None, headers=headers, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.json()

    path = f"/v1/kvmarket/documents/{listing.document_id}/preload"
    wait_until(lambda: post(path, admin)["pinned_tokens"] == LENGTH)
    assert post(path, admin)["loaded_tokens"] < 128
    wish = {"prompt": document + QUESTION, "kvmarket": {"reuse": "require"}, "max_tokens": 2}
    answer = post("/v1/completions", buyer, model=MODEL, **wish)
    found = answer["kv_transfer_params"]["kvmarket"]
    assert (found["reused_tokens"], found["loaded_tokens"]) == (LENGTH, 0)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == LENGTH
    assert bills["buyer8"].tokens() == LENGTH
    keys.close()
    market.unpin(listing.document_id)


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        {"prefix_caching_hash_algo": "xxhash"},
        {"prefix_caching_hash_algo": "sha256_cbor", "block_size": 64},
        {"enable_prefix_caching": False},
    ],
    ids=["xxhash", "small blocks", "no prefix caching"],
)
def test_other_hashes_other_blocks_and_no_prefix_cache(tiny, market, settings):
    """Equal tokens, and each pays; without a cache each loads for itself."""
    document = words(9110, LENGTH)
    prompt = document + QUESTION
    with running(tiny(1), market, max_num_seqs=8, disable_log_stats=False, **settings) as llm:
        market.publish(llm, token_ids=document)
        if settings.get("enable_prefix_caching", True):
            empty_prefix_cache(llm)
        bills = [Bill(market, name) for name in BUYERS[:4]]
        (full,) = crowd(llm, market, prompt, [None])
        before = chunks_loaded(llm)
        answers = crowd(llm, market, prompt, BUYERS[:4])
        assert [said(each) for each in answers] == [said(full)] * 4
        assert [bill.tokens() for bill in bills] == [LENGTH] * 4
        loads = 1 if settings.get("enable_prefix_caching", True) else 4
        assert chunks_loaded(llm) - before == 5 * loads
