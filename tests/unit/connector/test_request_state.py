"""One request's loads and how they are counted, without an engine."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as structs_replace
from vllm.v1.metrics.stats import PrefillStats

from tests.support.paged import one_group
from vllm_kvmarket.catalogue import Listing, Match, MatchedChunk, Segment
from vllm_kvmarket.connector.cache_groups import CacheGroup, GroupKind
from vllm_kvmarket.connector.messages import LoadReport
from vllm_kvmarket.connector.purchases import client_request_id, ledger_key, purchase_group
from vllm_kvmarket.connector.request_state import EngineFacts, Reuse
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.core.model_identity import ROOT, marked

CHUNK, BLOCK = 64, 16
NAMESPACE = b"n" * 32
DOCUMENT = list(range(1000, 1250))  # 3 whole chunks of 64 tokens and one of 58
KEYS = DocumentChunks.of(NAMESPACE, DOCUMENT, CHUNK).keys
BLOCK_IDS = list(range(500, 530))
FACTS = EngineFacts("e", (one_group(["layer"], BLOCK),), CHUNK, 1)


def matching(count):
    """A match of the document's first `count` tokens."""
    listing = Listing(
        document_id="kvd_x",
        namespace=NAMESPACE,
        token_count=len(DOCUMENT),
        terms=ListingTerms(publisher="pat"),
        state="live",
        reason="",
        created_at_s=1.0,
        stored_bytes=1,
        chunk_keys=KEYS,
    )
    chunks = [
        MatchedChunk(
            key=KEYS[index],
            parent=KEYS[index - 1] if index else ROOT,
            token_count=len(DOCUMENT[start : start + CHUNK]),
            matched=min(CHUNK, count - start),
            known=bytes([index]) * 8,
        )
        for index, start in enumerate(range(0, count, CHUNK))
    ]
    return Match((Segment(listing, 0, count),), count, tuple(chunks))


def asking(count, prompt=400):
    """A request that may reuse a match of `count` tokens."""
    return Reuse(request_of(prompt), matching(count))


def request_of(prompt, output=0):
    return SimpleNamespace(
        request_id="r",
        num_prompt_tokens=prompt,
        num_output_tokens=output,
        num_tokens=prompt + output,
        num_preemptions=0,
        prefill_stats=None,
    )


def admit(state, local, most=10_000):
    """Act as the scheduler does: ask, then admit with the answer."""
    return state.allocated(external_tokens(state, local, most))


def external_tokens(state, local, most):
    """Ask for a prompt of which `most` tokens may be reused."""
    state.request.num_tokens = most + 1
    return state.external_tokens(local)


def usage_of(state, output):
    state.request.num_output_tokens = output
    return state.usage()


def planned(state):
    plan = state.load_plan([BLOCK_IDS], FACTS)
    assert plan.namespace == NAMESPACE
    assert [chunk.known[0] for chunk in plan.chunks] == [KEYS.index(c.key) for c in plan.chunks]
    return [
        (KEYS.index(chunk.key), pages.first_page, [each - BLOCK_IDS[0] for each in pages.block_ids])
        for chunk in plan.chunks
        for pages in chunk.groups
    ]


def blocks(start, stop):
    return list(range(start, stop))


PLANS = [
    # match, local, most, chunk by chunk: (chunk, first page, blocks)
    (64, 0, 399, [(0, 0, blocks(0, 4))]),
    (65, 0, 399, [(0, 0, blocks(0, 4)), (1, 0, [4])]),  # one token into a chunk: one page of it
    (100, 0, 399, [(0, 0, blocks(0, 4)), (1, 0, [4, 5, 6])]),  # ends inside a block
    (100, 32, 399, [(0, 2, [2, 3]), (1, 0, [4, 5, 6])]),  # a local hit inside a chunk
    (100, 64, 399, [(1, 0, [4, 5, 6])]),  # a local hit at a chunk's end
    (100, 96, 399, [(1, 2, [6])]),  # four tokens of one block
    (128, 0, 127, [(0, 0, blocks(0, 4)), (1, 0, blocks(4, 8))]),  # the last token is computed
    (250, 176, 249, [(2, 3, [11]), (3, 0, blocks(12, 16))]),  # ends inside the short last chunk
    (7, 0, 399, [(0, 0, [0])]),
]


@pytest.mark.parametrize(("match", "local", "most", "expected"), PLANS)
def test_a_plan_covers_what_lies_behind_the_local_hit(match, local, most, expected):
    """Loads begin at the first page that vLLM has not, and end with the one the match ends in."""
    state = asking(match)
    assert admit(state, local, most)
    assert state.external == min(match, most) - local
    assert planned(state) == expected


@given(match=st.integers(1, 250), local=st.integers(0, 15), most=st.integers(1, 400))
def test_each_page_goes_into_the_block_of_its_tokens(match, local, most):
    """At all boundaries: no block twice, none left out, none in front of the local hit."""
    state = asking(match)
    end = min(match, most)
    if not admit(state, local * BLOCK, most):
        assert end <= local * BLOCK
        return
    filled = []
    for chunk, first_page, ids in planned(state):
        assert 0 <= first_page < first_page + len(ids) <= CHUNK // BLOCK
        first = chunk * CHUNK // BLOCK + first_page
        assert ids == blocks(first, first + len(ids))
        filled += ids
    assert filled == blocks(local, -(-end // BLOCK))


def test_a_preempted_request_pays_no_token_more_than_was_quoted():
    """It finds its whole prompt in the paged cache, or loads all of it: the last was computed."""
    for local, external in ((128, 0), (64, 63)):
        state = asking(128, prompt=128)
        assert external_tokens(state, 0, 127) == 127
        state.allocated(127)
        state.load_ended(LoadReport(), FACTS)
        assert usage_of(state, 1).reused == 127
        assert external_tokens(state, local, 130) == external, "with three tokens of output"
        state.allocated(external)
        if external:
            state.load_ended(LoadReport(), FACTS)
        assert usage_of(state, 4).reused == 127


@pytest.mark.parametrize("local", [96, 112, 320])
def test_nothing_is_loaded_when_the_local_hit_reaches_the_match(local):
    """The paged cache has it all: counted as reused, at most to the match's end."""
    state = asking(96)
    assert not admit(state, local)
    usage = usage_of(state, 5)
    assert (usage.reused, usage.loaded, usage.from_paged_cache) == (96, 0, 96)
    assert (usage.matched, usage.failed, usage.computed, usage.output) == (96, 0, 304, 5)


def test_an_admission_counts_once_for_a_question():
    """The scheduler may admit without having asked: then there is nothing to load."""
    state = asking(100)
    assert not state.allocated(100)
    assert admit(state, 0)
    assert not state.allocated(100)


def test_a_whole_load_is_counted_from_store_and_paged_cache():
    """Loaded tokens and cached tokens add up to the charged ones."""
    state = asking(100)
    admit(state, 32)
    assert usage_of(state, 0).reused == 0, "nothing is charged before it has arrived"
    state.load_ended(LoadReport(), FACTS)
    usage = usage_of(state, 3)
    assert (usage.reused, usage.loaded, usage.from_paged_cache, usage.failed) == (100, 68, 32, 0)
    assert usage.computed == 300


def stateful(count, prompt, *, with_states=()):
    """A request that may reuse `count` tokens where the model keeps a state, also behind these
    chunks.
    """
    match = matching(count)
    (segment,) = match.segments
    listing = replace(segment.listing, namespace=marked(NAMESPACE))
    segments = (structs_replace(segment, listing=listing),)
    chunks = tuple(
        structs_replace(chunk, key=marked(chunk.key)) if index in with_states else chunk
        for index, chunk in enumerate(match.chunks)
    )
    return Reuse(request_of(prompt), structs_replace(match, segments=segments, chunks=chunks))


@pytest.mark.parametrize(("prompt", "external"), [(251, 250), (400, 250), (250, 0), (120, 0)])
def test_where_the_model_keeps_a_state_all_of_a_match_is_loaded_or_nothing(prompt, external):
    """There is no state to go on from before its end."""
    state = stateful(250, prompt)
    assert external_tokens(state, 0, prompt - 1) == external
    state.exclude({KEYS[2]}, CHUNK)
    assert external_tokens(state, 0, prompt - 1) == 0


def test_of_a_hybrid_all_pages_and_one_state_are_loaded():
    """The state in front of the first token that is computed, once."""
    state = stateful(250, 400, with_states=(0, 2))
    admit(state, 0)
    groups = (FACTS.groups[0], CacheGroup(GroupKind.STATE, 4096, ("state",), 1))
    plan = state.load_plan([BLOCK_IDS, [7]], replace(FACTS, groups=groups))
    attention, states = zip(*(chunk.groups for chunk in plan.chunks), strict=True)
    assert [len(pages.block_ids) for pages in attention] == [4, 4, 4, 4]
    assert [pages.block_ids for pages in states] == [(), (), (), (7,)]


def test_states_inside_a_document_are_ends_of_a_match_too():
    """The last one before what cannot be had, whatever that is."""
    state = stateful(250, 250, with_states=(0, 2))
    assert external_tokens(state, 0, 249) == 192
    assert [state.match.last_end(end) for end in (63, 64, 191, 192, 249, 250, 300)] == [
        0, 64, 64, 192, 192, 250, 250,
    ]  # fmt: skip
    state.exclude({KEYS[1]}, CHUNK)
    assert external_tokens(state, 0, 249) == 64
    facts = EngineFacts("e", (CacheGroup(GroupKind.STATE, 4096, ("layer",), 1),), CHUNK, 1)
    state = stateful(250, 400, with_states=(0, 2))
    admit(state, 0)
    state.load_ended(LoadReport(failures={KEYS[3]: "gone"}), facts)
    assert external_tokens(state, 0, 399) == 192
    assert state.allocated(192)
    state.load_ended(LoadReport(), facts)
    assert (state.usage().reused, state.usage().failed) == (192, 58)


def test_where_the_model_keeps_a_state_a_load_that_fails_is_not_tried_for_a_part():
    """And nothing of it is charged."""
    facts = EngineFacts("e", (CacheGroup(GroupKind.STATE, 4096, ("layer",), 1),), CHUNK, 1)
    state = stateful(250, 400)
    admit(state, 0)
    state.load_ended(LoadReport(failures={KEYS[3]: "gone"}), facts)
    assert external_tokens(state, 0, 399) == 0
    assert not state.allocated(0)
    assert (state.usage().reused, state.usage().failed) == (0, 250)


FAILURES = [
    # local, failed chunks: reused, loaded, from the paged cache, failed, limit
    (0, [3], (192, 192, 0, 48, 192)),
    (0, [1, 3], (64, 64, 0, 176, 64)),  # what lies behind a gap is of no use
    (0, [0], (0, 0, 0, 240, 0)),
    (32, [2], (128, 96, 32, 112, 128)),
    (80, [1], (80, 0, 80, 160, 64)),  # vLLM has the failed chunk's beginning
    (80, [2, 1], (80, 0, 80, 160, 64)),
]


@pytest.mark.parametrize(("local", "failed", "expected"), FAILURES)
def test_only_what_lies_in_front_of_a_failure_counts(local, failed, expected):
    """The rest is computed, not charged, and not asked for again."""
    state = asking(240)
    admit(state, local)
    state.prefill = PrefillStats()
    state.prefill.set(400, local, 240 - local)
    state.load_ended(LoadReport(failures={KEYS[chunk]: "bad" for chunk in failed}), FACTS)
    assert state.prefill.num_cached_tokens == expected[0], "the answer's usage says what was reused"
    usage = usage_of(state, 0)
    counted = (usage.reused, usage.loaded, usage.from_paged_cache, usage.failed, state.limit)
    assert counted == expected
    assert usage.reused + usage.computed == 400
    assert usage.failed <= usage.computed
    assert external_tokens(state, 0, 399) == state.limit
    assert external_tokens(state, local, 399) == max(0, state.limit - local)


def test_a_later_failure_takes_nothing_back():
    """A second load fails further in front: what was reused once has not failed."""
    state = asking(240)
    admit(state, 0)
    state.load_ended(LoadReport(failures={KEYS[3]: "bad"}), FACTS)
    admit(state, 0)
    state.load_ended(LoadReport(failures={KEYS[1]: "bad"}), FACTS)
    usage = usage_of(state, 0)
    assert (usage.reused, usage.failed, state.limit) == (192, 240 - 192, 64)


def test_what_a_request_computed_after_a_failure_is_not_sold_to_it():
    """Preempted, it finds its own blocks in vLLM's prefix cache."""
    state = asking(240)
    admit(state, 0)
    state.load_ended(LoadReport(failures={KEYS[1]: "bad"}), FACTS)
    assert not admit(state, 240)
    assert usage_of(state, 0).reused == 64


@pytest.mark.parametrize("local", [32, 64, 320])
@pytest.mark.parametrize("is_late", [True, False])
def test_what_another_sample_computed_after_a_failure_is_not_sold(local, is_late):
    """It finds the tokens in the paged cache, where one of its own buyer's samples put them; also
    one that was made or admitted before.
    """
    other = asking(240)
    state = Reuse(request_of(400), matching(240), other.countable)
    if not is_late:
        assert admit(state, 0)
    admit(other, 0)
    other.load_ended(LoadReport(failures={KEYS[1]: "bad"}), FACTS)
    assert admit(state, local) == (local < 240)
    state.load_ended(LoadReport(), FACTS) if local < 240 else None
    usage = usage_of(state, 0)
    assert (usage.reused, usage.from_paged_cache) == (64, min(local, 64))
    assert usage.loaded == 64 - min(local, 64)


def test_another_samples_failure_raises_no_bound():
    """Its own load failed earlier: what lies between the two was computed too."""
    state = asking(240)
    admit(state, 0)
    state.load_ended(LoadReport(failures={KEYS[1]: "bad"}), FACTS)
    other = Reuse(request_of(400), matching(240), state.countable)
    admit(other, 0)
    other.load_ended(LoadReport(failures={KEYS[2]: "bad"}), FACTS)
    admit(state, 240)
    assert usage_of(state, 0).reused == usage_of(other, 0).reused == 64


def test_what_a_model_with_several_groups_computed_after_a_failure_is_not_sold_to_it():
    """vLLM keeps nothing of its first load, and asks again; then it is preempted."""
    window = replace(FACTS.groups[0], kind=GroupKind.WINDOW, reach=32)
    state, facts = asking(240), replace(FACTS, groups=(*FACTS.groups, window))
    assert not facts.is_plain
    admit(state, 0)
    state.load_ended(LoadReport(failures={KEYS[1]: "bad"}), facts)
    admit(state, 0)
    state.load_ended(LoadReport(), facts)
    assert usage_of(state, 0).reused == 64
    admit(state, 240)
    assert usage_of(state, 0).reused == 64


def test_a_preempted_request_pays_for_its_best_admission():
    """Loading again is not reusing twice, and a worse second time takes nothing back."""
    state = asking(100)
    admit(state, 0)
    state.load_ended(LoadReport(), FACTS)
    admit(state, 64)
    state.load_ended(LoadReport(), FACTS)
    assert (state.reused, state.loaded, state.cached) == (100, 100, 0)
    admit(state, 0, most=50)
    state.load_ended(LoadReport(), FACTS)
    assert usage_of(state, 0).reused == 100


def test_a_preempted_request_pays_nothing_for_what_it_computed_itself():
    """It was admitted with less than the match: what it finds of the rest later is its own work."""
    state = asking(240)
    state.exclude({state.match.chunks[1].key}, FACTS.chunk_tokens)
    admit(state, 0)
    state.load_ended(LoadReport(), FACTS)
    before = usage_of(state, 0).reused
    assert 0 < before < 240
    admit(state, 240)
    assert usage_of(state, 1).reused == before


ADMISSIONS = st.lists(
    st.tuples(st.integers(0, 24), st.none() | st.integers(0, 3)), min_size=1, max_size=4
)


@given(admissions=ADMISSIONS)
def test_the_answers_usage_covers_what_is_charged_whatever_comes_later(admissions):
    """What vLLM says in the usage is of the first admission, and so is the charge. It admits a
    request again when it was preempted, or when nothing of its load could be kept.
    """
    state = asking(240)
    stats = state.request.prefill_stats = PrefillStats()
    for blocks_found, failed in admissions:
        external = external_tokens(state, local := blocks_found * BLOCK, 399)
        if state.request.num_preemptions == 0:
            stats.set(400, local, external)
        if state.allocated(external):
            failures = {} if failed is None else {KEYS[failed]: "bad"}
            state.load_ended(LoadReport(failures=failures), FACTS)
        state.request.num_preemptions += state.local + state.external > 0
        if state.request.num_preemptions:
            state.request.prefill_stats = None  # the answer's first token has taken it
    usage = usage_of(state, 1)
    assert usage.reused <= stats.num_cached_tokens
    assert usage.computed == 400 - stats.num_cached_tokens


def test_a_request_without_a_match_computes_all():
    """A request that only publishes, or may not reuse, has a usage too."""
    usage = usage_of(Reuse(request_of(400), None), 9)
    assert (usage.matched, usage.reused, usage.computed, usage.output) == (0, 0, 400, 9)


IDS = [
    # vLLM's id, what its samples share, what the client knows: of one request, of a sample
    ("7", "7", "7", "7"),
    ("cmpl-ab-0", "cmpl-ab-0", "cmpl-ab-0", "cmpl-ab-0"),
    ("cmpl-ab-0-0123abcd", "cmpl-ab-0-0123abcd", "cmpl-ab-0", "cmpl-ab-0"),
    ("0_chat-0123abcd", "chat-0123abcd", "0_chat", "chat"),
    ("15_chat-0123abcd", "chat-0123abcd", "15_chat", "chat"),
    ("1_2_x", "2_x", "1_2_x", "2_x"),
    ("a_b", "a_b", "a_b", "a_b"),
    ("3_", "3_", "3_", "3_"),
    ("chat-0123ABCD", "chat-0123ABCD", "chat-0123ABCD", "chat-0123ABCD"),
    ("chat-0123abcd0", "chat-0123abcd0", "chat-0123abcd0", "chat-0123abcd0"),
]


@pytest.mark.parametrize(("request_id", "group", "alone", "sample"), IDS)
def test_the_client_knows_its_id_without_what_vllm_adds(request_id, group, alone, sample):
    """A number in front is vLLM's only where there are several samples; else the client's own."""
    assert purchase_group(request_id) == group
    assert client_request_id(request_id) == alone
    assert client_request_id(request_id, is_sample=True) == sample


def test_keys_for_the_ledger_are_short_and_differ_by_request_and_instant():
    """A client that sends one id twice, or a very long one, spoils no transfer's id."""
    keys = {
        ledger_key("e", request_id, arrived_s)
        for request_id in ("a", "b", "x" * 100_000, "\n/\u00e9")
        for arrived_s in (1.0, 1.0000001)
    }
    assert len(keys) == 8
    assert all(len(key) == 34 and key.isascii() and key.isprintable() for key in keys)
    assert ledger_key("e", "a", 1.0) in keys, "the same request has the same key in every process"
