"""Under which hashes vLLM's cache holds what is published, and what is private."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.lora.request import LoRARequest
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus, StreamingUpdate

from tests.support.catalogue_documents import NAMESPACE, store_and_list, tokens
from tests.support.scheduler_half import (
    BLOCK_TOKENS,
    CACHED,
    DOCUMENT,
    cache_blocks,
    local_tokens,
    opened_market,
    request_of,
)
from vllm_kvmarket.auth.operator_tokens import Credentials
from vllm_kvmarket.connector.shared_hashes import SharedHashes
from vllm_kvmarket.core.document_chunks import DocumentChunks

CHUNK = 256
LONG = tokens(2000)


@pytest.fixture(scope="module")
def credentials(tmp_path_factory):
    return Credentials.of_home(tmp_path_factory.mktemp("home"))


def hashes_of(credentials, algorithm="sha256", caching=True):
    made = SharedHashes(algorithm, CHUNK, credentials)
    made.bind(BlockPool(8, enable_caching=caching, hash_block_size=BLOCK_TOKENS))
    return made


def shared(hashes, prompt, count, salt, *, namespace=NAMESPACE, **more):
    """A request that reuses the first `count` tokens of its prompt, which are a document's."""
    request = request_of(prompt, {}, salt=salt, **more)
    document = DocumentChunks.of(namespace, prompt[:count], CHUNK)
    hashes.share(request, namespace, document.keys, count)
    return request


def common(one, other):
    """How many hashes two requests have in common; all of them stand in front."""
    equal = [ours == theirs for ours, theirs in zip(one, other, strict=False)]
    count = equal.index(False) if False in equal else len(equal)
    assert not any(equal[count:])
    return count


@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor", "xxhash", "xxhash_cbor"])
@pytest.mark.parametrize("count", [127, 128, 700, 1024, 1100])
def test_accounts_share_the_whole_blocks_that_they_reuse_and_none_behind(
    credentials, algorithm, count
):
    """One account's are the same each time; what does not reuse shares with nobody."""
    hashes = hashes_of(credentials, algorithm)
    alice, again, bob = (
        shared(hashes, LONG, count, salt, algorithm=algorithm) for salt in ("a", "a", "b")
    )
    assert len(alice.block_hashes) == len(LONG) // BLOCK_TOKENS
    assert alice.block_hashes == again.block_hashes
    assert common(alice.block_hashes, bob.block_hashes) == count // BLOCK_TOKENS
    for salt in ("a", "b", None):
        other = request_of(LONG, {}, salt=salt, algorithm=algorithm)
        found = common(alice.block_hashes, other.block_hashes)
        assert found == (15 if count < BLOCK_TOKENS and salt == "a" else 0)


@given(count=st.integers(1, 900), prompt=st.integers(0, 400), output=st.integers(0, 400))
def test_whatever_the_lengths_only_published_blocks_are_shared(credentials, count, prompt, output):
    """Also blocks that fill while the answer is computed."""
    hashes = hashes_of(credentials)
    text = [*LONG[:count], *tokens(prompt, 3)]
    requests = [shared(hashes, text, count, salt) for salt in ("a", "b")]
    for request in requests:
        for token in tokens(output, 4):
            request.append_output_token_ids(token)
        assert len(request.block_hashes) == request.num_tokens // BLOCK_TOKENS
    one, other = requests
    assert common(one.block_hashes, other.block_hashes) == count // BLOCK_TOKENS


def test_remembered_hashes_are_those_that_would_be_computed(credentials):
    """Also of documents that begin alike and part inside a chunk."""
    remembering = hashes_of(credentials)
    one, other = LONG[:1000], [*LONG[:640], *tokens(360, 5)]
    for prompt, count in ((one, 1000), (other, 1000), (one, 640), (one, 700), (other, 1000)):
        fresh = shared(hashes_of(credentials), prompt, count, "a")
        assert shared(remembering, prompt, count, "a").block_hashes == fresh.block_hashes
    found = [shared(remembering, prompt, 1000, "a").block_hashes for prompt in (one, other)]
    assert common(*found) == 640 // BLOCK_TOKENS


def test_other_models_and_other_markets_share_nothing(credentials, tmp_path):
    """A hash cannot be computed without the market's secret."""
    hashes = hashes_of(credentials)
    found = [
        shared(hashes, LONG, 1024, "a").block_hashes,
        shared(hashes, LONG, 1024, "a", namespace=b"m" * 32).block_hashes,
        shared(hashes_of(Credentials.of_home(tmp_path)), LONG, 1024, "a").block_hashes,
    ]
    assert common(found[0], found[1]) == common(found[0], found[2]) == 0


def test_a_request_gets_its_own_hashes_back(credentials):
    """As if it had never had others, also in the blocks that fill afterwards."""
    hashes = hashes_of(credentials)
    request, private = shared(hashes, LONG, 1024, "a"), request_of(LONG, {}, salt="a")
    for each in (request, private):
        each.append_output_token_ids(tokens(300, 5))
    hashes.unshare(request)
    assert request.block_hashes == private.block_hashes
    hashes.unshare(request)
    for each in (request, private):
        for token in tokens(300, 4):
            each.append_output_token_ids(token)
    assert request.block_hashes == private.block_hashes


def test_the_next_turn_of_a_resumable_request_keeps_the_published_blocks(credentials):
    """vLLM cuts its hashes where it was computed to, and appends the new input."""
    hashes = hashes_of(credentials)
    turns = [shared(hashes, LONG[:1100], 1024, salt, resumable=True) for salt in ("a", "b")]
    session = SimpleNamespace(
        hash_block_size=BLOCK_TOKENS, num_waiting_for_streaming_input=0, log_stats=False
    )
    for request in turns:
        request.append_output_token_ids(tokens(200, 4))
        request.num_computed_tokens = request.num_tokens - 1
        update = StreamingUpdate(None, tokens(300, 6), 9, 1.0, request.sampling_params)
        Scheduler._update_request_as_session(session, request, update)
        assert len(request.block_hashes) == request.num_tokens // BLOCK_TOKENS
    assert common(turns[0].block_hashes, turns[1].block_hashes) == 1024 // BLOCK_TOKENS


def test_an_adapters_name_stays_in_the_hashes_behind_the_published_blocks(credentials):
    """As vLLM has it; the published blocks have the adapter's namespace."""
    hashes = hashes_of(credentials)
    found = [
        shared(hashes, LONG, 1024, "a", lora_request=LoRARequest(name, 1, name)).block_hashes
        for name in ("one", "two")
    ]
    assert common(*found) == 1024 // BLOCK_TOKENS


def test_an_audited_request_finds_nothing_and_is_not_found(credentials):
    """Or it would compare stored pages with themselves."""
    hashes = hashes_of(credentials)
    requests = [request_of(LONG, {}) for _ in range(3)]
    for request in requests[:2]:
        hashes.isolate(request)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert common(requests[one].block_hashes, requests[other].block_hashes) == 0


def test_where_vllm_caches_nothing_no_hash_is_changed(credentials):
    """With prefix caching off."""
    hashes = hashes_of(credentials, caching=False)
    request = shared(hashes, LONG, 1024, "a")
    assert request.block_hashes == request_of(LONG, {}, salt="a").block_hashes


# In the scheduler half


@pytest.fixture
def market(tmp_path):
    with opened_market(tmp_path) as opened:
        opened.create_account("bob")
        opened.deposit("bob", 1 << 40, "d2")
        yield opened


def until_decided(half, request):
    """Ask as vLLM's scheduler asks; the local and the external tokens that it goes on with."""
    half.arrived(request)
    while True:
        local = local_tokens(half, request)
        external, _ = half.ready(request, local)
        if external is not None:
            return local, external
        half.take_instructions()


def test_who_buys_finds_the_one_copy_and_who_does_not_finds_nothing(half, market):
    """Whatever salt it sends, and also after others have bought."""
    prompt = [*DOCUMENT, *tokens(200, 8)]
    for salt, params, expected in (
        ("a", market.params("alice"), (CACHED, 600 - CACHED)),
        ("b", market.params("bob"), (CACHED, 600 - CACHED)),
        ("c", market.params("poor"), (0, 0)),
        (None, {}, (0, 0)),
        ("a", {}, (0, 0)),
    ):
        request = request_of(prompt, params, f"r-{salt}-{expected}", salt=salt)
        assert until_decided(half, request) == expected


def test_an_account_finds_its_own_history_behind_a_document_and_nobody_elses(half, market):
    """Two accounts ask the same."""
    prompt = [*DOCUMENT, *tokens(500, 8)]
    first = request_of(prompt, market.params("alice"), "r-1", salt="a")
    assert until_decided(half, first) == (CACHED, 600 - CACHED)
    cache_blocks(half, first)
    for salt, account, expected in (("a", "alice", (1024, 0)), ("b", "bob", (CACHED, 88))):
        again = request_of(prompt, market.params(account), f"r-{salt}", salt=salt)
        assert until_decided(half, again) == expected


def test_a_refused_buyer_finds_its_own_history_and_not_the_published_blocks(half, market):
    """vLLM looks again after the refusal, by the request's own hashes."""
    prompt = [*DOCUMENT, *tokens(200, 8)]
    own = request_of(prompt[:256], {}, "r-0", salt="p")
    cache_blocks(half, own)
    refused = request_of(prompt, market.params("poor"), "r-1", salt="p")
    assert until_decided(half, refused) == (256, 0)
    private = request_of(prompt, {}, "r-2", salt="p")
    assert refused.block_hashes == private.block_hashes


def test_a_buyer_with_a_price_cap_shares_what_it_buys_and_nothing_behind(half, market):
    """The dearer part is not found, though it lies in the cache."""
    longer = [*DOCUMENT, *tokens(600, 8)]
    store_and_list(market, longer, publisher="sam", cache_read_nano_per_mtok=2_000_000_000)
    half._market.catalogue.refresh()
    buyer = request_of([*longer, 7], market.params("alice"), "r-1", salt="a")
    assert until_decided(half, buyer) == (CACHED, 1200 - CACHED)
    cache_blocks(half, buyer)
    found = {}
    for name, most in (("whole", None), ("part", 1_000_000_000)):
        wish = {"account": "bob", "max_cache_read_nano_per_mtok": most}
        params = {"kv_transfer_params": {"kvmarket": wish}}
        found[name] = until_decided(half, request_of([*longer, 7], params, name, salt="b"))
    assert found == {"whole": (1152, 1200 - 1152), "part": (CACHED, 600 - CACHED)}


def test_what_is_being_published_is_found_by_its_buyers_once_it_is_on_offer(half, market):
    """And by nobody before."""
    document = tokens(700, 9)
    publishing = request_of(document, {"kv_transfer_params": {"kvmarket": {"publish": {}}}}, "r-0")
    half.arrived(publishing)
    cache_blocks(half, publishing)
    prompt = [*document, 7]
    for salt in ("a", None):
        early = request_of(prompt, market.params("alice"), f"early-{salt}", salt=salt)
        assert until_decided(half, early) == (0, 0)
    store_and_list(market, document, publisher="pat")
    half._market.catalogue.refresh()
    buyer = request_of(prompt, market.params("alice"), "r-1", salt="a")
    assert until_decided(half, buyer) == (640, 60)


def test_who_wants_the_probabilities_of_a_prompt_does_not_buy(half, market):
    """vLLM computes every token of it, and says so."""
    request = request_of([*DOCUMENT, 7], market.params("alice"), salt="a")
    request.skip_reading_prefix_cache = True
    private = list(request.block_hashes)
    half.arrived(request)
    assert half.ready(request, 0) == (0, False)
    assert request.block_hashes == private
    half.allocated(request, SimpleNamespace(get_block_ids=lambda: ([],)), 0)
    request.status = RequestStatus.FINISHED_STOPPED
    answer = half.finished(request, [])[1]["kvmarket"]
    assert "prompt_logprobs" in answer["declined"]
    assert market.ledger.account("alice").debits_pending == 0
