"""Which documents go first: by value per byte that is freed, or by their last use."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvmarket.catalogue.eviction_policy import (
    HALF_LIFE_S,
    Candidate,
    decayed,
    demand,
    lost_share,
    order,
    pace_s,
    recompute_tokens,
    reused,
    value_nano,
)

NOW_S = 10 * HALF_LIFE_S
PRICE = 5_000_000_000


def candidate(name: str, **facts) -> Candidate:
    defaults = {"bytes": 1000, "tokens": 1000, "score": 1.0, "last_used_s": NOW_S}
    return Candidate(document_id=name, **{**defaults, **facts})


def names(candidates) -> str:
    return "".join(candidate.document_id for candidate in candidates)


@pytest.mark.parametrize(
    "worse",
    [
        {"last_used_s": NOW_S - 20.0},
        {"bytes": 1500},
        {"score": 2.0},
        {"first_used_s": NOW_S - 200.0},
    ],
    ids=["used longer ago", "more bytes", "fewer reuses", "reuses over a longer time"],
)
def test_the_least_value_per_byte_goes_first(worse):
    """Each makes a document go before its like."""
    usual = {"score": 3.0, "first_used_s": NOW_S - 100.0}
    one, other = candidate("a", **usual), candidate("b", **(usual | worse))
    assert names(order([one, other], "value", NOW_S)) == "ba"


def test_length_is_worth_more_than_its_bytes():
    """Of two documents that are reused alike, byte for byte the longer spares more work."""
    short, long = candidate("a"), candidate("b", tokens=30_000, bytes=30_000)
    assert names(order([long, short], "value", NOW_S)) == "ab"
    assert recompute_tokens(30_000) > 1.8 * 30 * recompute_tokens(1000)


def test_what_a_reuse_earns_counts():
    """Among equal documents the income decides."""
    cheap, dear = candidate("b"), candidate("a", uses=4, earned_nano=40_000_000)
    assert names(order([dear, cheap], "value", NOW_S)) == "ba"
    often = demand(1.0, 0.0, 0.0, 60.0)
    more = value_nano(dear, NOW_S, PRICE, 60.0) - value_nano(cheap, NOW_S, PRICE, 60.0)
    assert more == pytest.approx(often * 10_000_000)


def test_lru_goes_by_the_last_use_alone():
    """A document's worth does not matter."""
    old = candidate("b", score=99.0, last_used_s=1.0)
    new = candidate("a", score=0.1, last_used_s=2.0)
    assert names(order([new, old], "lru", NOW_S)) == "ba"
    assert names(order([new, old], "value", NOW_S)) == "ab"


@pytest.mark.parametrize("policy", ["value", "lru"])
def test_paid_ones_go_after_the_others_and_pinned_ones_never(policy):
    """Whatever they are worth."""
    all_ = [
        candidate("a", pinned=True, score=0.0, last_used_s=0.0),
        candidate("b", paid_for=True, score=0.0, last_used_s=0.0),
        candidate("c"),
    ]
    assert names(order(all_, policy, NOW_S)) == "cb"


@pytest.mark.parametrize("policy", ["value", "lru"])
def test_shared_chunks_are_freed_with_the_last_that_holds_them(policy):
    """A document all of whose chunks others hold goes when they are gone, and frees them then."""
    shared = ((b"x", 400), (b"y", 100))
    inside = candidate("a", bytes=0, shared=shared, score=0.1, last_used_s=0.0)
    whole = candidate("b", bytes=50, shared=shared)
    other = candidate("c", bytes=900, score=0.5, last_used_s=NOW_S - 1)
    going = order([inside, whole, other], policy, NOW_S)
    assert names(going) == "cba"
    assert [gone.bytes for gone in going] == [900, 50, 500]


def test_a_pinned_document_keeps_what_it_shares():
    """Its chunks are freed by nobody."""
    shared = ((b"x", 400),)
    going = order(
        [candidate("a", pinned=True, shared=shared), candidate("b", bytes=7, shared=shared)],
        "value",
        NOW_S,
    )
    assert [(gone.document_id, gone.bytes) for gone in going] == [("b", 7)]


def test_a_heir_is_judged_anew():
    """Once it alone holds many bytes, a document may go before one that was cheaper so far."""
    shared = ((b"x", 100_000),)
    first = candidate("a", bytes=1000, shared=shared, score=0.1)
    heir = candidate("b", bytes=1000, shared=shared, score=1.0)
    between = candidate("c", bytes=1000, score=0.5)
    assert names(order([heir, between, first], "value", NOW_S)) == "abc"


CANDIDATES = st.lists(
    st.builds(
        lambda size, score, used, flags, keys: {
            "bytes": size,
            "score": score,
            "last_used_s": used,
            "pinned": flags == 1,
            "paid_for": flags == 2,
            "keys": keys,
        },
        st.integers(0, 3),
        st.sampled_from([0.0, 0.5, 1.0]),
        st.sampled_from([0.0, NOW_S / 2]),
        st.integers(0, 3),
        st.sets(st.sampled_from("xyz")),
    ),
    max_size=7,
)


@settings(deadline=None)
@given(CANDIDATES, st.sampled_from(["value", "lru"]), st.randoms(use_true_random=False))
def test_the_order_is_whole_greedy_and_the_same_however_they_are_arranged(facts, policy, shuffled):
    """Against a naive model: each victim is the cheapest of those left, and frees what it says."""
    made = {}
    for number, fact in enumerate(facts):
        keys = fact.pop("keys")
        shared = tuple((key.encode(), 10 * ord(key)) for key in sorted(keys))
        made[str(number)] = candidate(str(number), shared=shared, **fact)
    going = order(made.values(), policy, NOW_S)
    again = list(made.values())
    shuffled.shuffle(again)
    assert order(again, policy, NOW_S) == going
    assert {gone.document_id for gone in going} == {
        name for name, each in made.items() if not each.pinned
    }
    left = dict(made)
    pace = pace_s(made.values(), NOW_S)

    def freed(name: str) -> int:
        others = {key for other, each in left.items() if other != name for key, _ in each.shared}
        mine = made[name]
        return mine.bytes + sum(size for key, size in mine.shared if key not in others)

    def rank(name: str):
        each, size = made[name], freed(name)
        if policy == "lru":
            return each.paid_for, size == 0, each.last_used_s, name
        worth = value_nano(each, NOW_S, PRICE, pace) * lost_share(each, size) / max(1, size)
        return each.paid_for, size == 0, worth, each.last_used_s, name

    for gone in going:
        name = gone.document_id
        assert name == min((other for other in left if not left[other].pinned), key=rank)
        assert gone.bytes == freed(name)
        del left[name]


def test_demand_fades_with_the_time_since_the_last_use():
    """From minutes to days; of two with as many reuses, that of the shorter time is asked for."""
    assert demand(1.0, 0.0, 0.0, 60.0) == demand(1.0, -5.0, -5.0, 60.0)
    faded = [demand(1.0, idle_s, idle_s, 60.0) for idle_s in (0.0, 60.0, 3600.0, HALF_LIFE_S)]
    assert faded == sorted(faded, reverse=True)
    assert faded[0] > 10 * faded[2] > 100 * faded[3]
    assert demand(5.0, 600.0, 60.0, 60.0) > 3 * demand(5.0, 6000.0, 60.0, 60.0)
    assert demand(5.0, 600.0, 60.0, 60.0) > 3 * demand(1.0, 600.0, 600.0, 60.0)


def test_one_that_came_by_is_worth_less_than_one_that_is_read_again():
    """A document that was published this moment does not push out one with many reuses."""
    assert demand(60.0, 3600.0, 60.0, 60.0) > demand(1.0, 0.0, 0.0, 60.0)


def test_what_was_popular_and_is_not_used_any_more_is_over():
    """The more often it was used, the sooner its silence tells: its new version is what is read."""
    assert demand(1000.0, 3600.0, 1.0, 60.0) > 100 * demand(2.0, 3600.0, 1.0, 60.0)
    assert demand(1000.0, 3600.0, 600.0, 60.0) < demand(2.0, 3600.0, 600.0, 60.0)
    assert demand(1000.0, 7200.0, 3600.0, 60.0) < demand(1.0, 3600.0, 3600.0, 60.0)
    assert demand(1e6, 1e9, 1e9 - 1.0, 60.0) >= 0.0


@given(st.floats(1.0, 1e6), st.floats(0.0, 1e9), st.floats(0.0, 1.0), st.floats(1e-3, 1e8))
def test_demand_is_a_number_for_every_history(score, age_s, share, pace):
    """Never negative, never more than all the reuses that there were, of which no time is known."""
    found = demand(score, age_s, share * age_s, pace)
    assert 0.0 <= found <= (1.0 + score) / 0.5


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_the_order_does_not_depend_on_the_scale_of_time(scale):
    """The order in a market of minutes is that in one of hours; over days the score decides."""
    chosen = random.Random(3)
    facts = [(chosen.uniform(1, 9), chosen.uniform(0, 400), chosen.random()) for _ in range(60)]

    def ordered(by: float) -> str:
        return names(
            order(
                (
                    candidate(
                        f"{number:02} ",
                        score=score,
                        first_used_s=NOW_S - age_s * by,
                        last_used_s=NOW_S - share * age_s * by,
                    )
                    for number, (score, age_s, share) in enumerate(facts)
                ),
                "value",
                NOW_S,
            )
        )

    assert pace_s([candidate("a", last_used_s=NOW_S - 7.0)], NOW_S) == 7.0
    same = [
        one == other
        for one, other in zip(ordered(scale).split(), ordered(1.0).split(), strict=True)
    ]
    assert sum(same) >= 40


def test_what_stays_of_a_document_is_not_lost():
    """A turn of a conversation is worth what its own tokens cost, not what the whole talk does."""
    talk = candidate("a", tokens=20_000, bytes=1000, shared=((b"x", 19_000),))
    assert lost_share(talk, 20_000) == lost_share(candidate("b"), 1000) == 1.0
    assert 0.05 < lost_share(talk, 1000) < 0.1
    assert lost_share(talk, 0) == 0.0
    alone = candidate("b", tokens=1000, bytes=1000, score=3.0)
    assert (
        names(order([talk, alone, candidate("c", pinned=True, shared=talk.shared)], "value", NOW_S))
        == "ab"
    )


def test_thousands_of_documents_are_ordered_in_a_moment():
    """A publisher waits for it (measured: 0.1 s for 5,000 documents that share a stem each)."""
    chosen = random.Random(1)
    many = [
        candidate(
            f"{number:05}",
            bytes=chosen.randrange(1000),
            score=chosen.random(),
            shared=tuple((bytes([number % 50, chunk]), 100) for chunk in range(4)),
        )
        for number in range(5_000)
    ]
    going = order(many, "value", NOW_S)
    assert sum(gone.bytes for gone in going) == sum(each.bytes for each in many) + 50 * 4 * 100


def test_scores_halve_in_a_day():
    """And do not grow when a clock goes back."""
    assert decayed(8.0, 3 * HALF_LIFE_S) == 1.0
    assert decayed(8.0, -5.0) == 8.0
    assert reused(2.0, NOW_S, 1.0, NOW_S - HALF_LIFE_S) == (2.5, NOW_S)
    assert reused(2.0, NOW_S, 1.0, NOW_S + HALF_LIFE_S) == (2.0, NOW_S + HALF_LIFE_S)
