"""The simulation's parts: workloads, stores, fleets and the scaling table."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulation.fleet import Engine, replicated, simulate
from benchmarks.simulation.limits import known_rates_share
from benchmarks.simulation.reads import DAY_S, Population, Read, Workload, read_trace
from benchmarks.simulation.replay import POLICIES, PUBLISHED, money, replay, store_of
from benchmarks.simulation.scaling import (
    Demand,
    breaking_points,
    ledger_parts,
    measured_parts,
    table,
    with_ledgers,
)
from benchmarks.simulation.stores import NEVER, DocumentStore, following_reads
from vllm_kvmarket.core.pricing import Tariff

ROOT = Path(__file__).parents[3]


def workload(*paths: tuple[int, ...]) -> Workload:
    return Workload("w", 256, [Read(float(at), path) for at, path in enumerate(paths)])


# Paths of a tree: a chunk's number says what lies before it.
PATHS = st.lists(
    st.lists(st.integers(1, 2), min_size=1, max_size=4).map(
        lambda steps: tuple(itertools.accumulate(steps, lambda above, step: above * 3 + step))
    ),
    min_size=1,
    max_size=14,
)


def best_possible(paths: list[tuple[int, ...]], budget: int) -> int:
    """The most chunks that any store of that budget can hit, by trying everything."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for path in paths:
        following: dict[frozenset[int], int] = {}
        for held, hits in states.items():
            hit = sum(1 for _ in itertools.takewhile(held.__contains__, path))
            everything = sorted(held | set(path))
            size = min(budget, len(everything))
            for kept in itertools.combinations(everything, size):
                key = frozenset(kept)
                following[key] = max(following.get(key, 0), hits + hit)
        states = following
    return max(states.values())


@settings(max_examples=40, deadline=None)
@given(PATHS.filter(lambda paths: len(paths) <= 7), st.integers(1, 3))
def test_belady_hits_as_much_as_any_store_could(paths, budget):
    """Against an exhaustive search over everything that could be kept."""
    outcome = replay(workload(*paths), "belady", budget)
    assert outcome.matched.sum() == best_possible(paths, budget)


@settings(max_examples=60, deadline=None)
@given(PATHS, st.integers(1, 8))
def test_no_policy_hits_more_than_belady_and_all_that_fits_is_kept(paths, budget):
    """And with room for everything, every policy hits whatever was read before."""
    limit = replay(workload(*paths), "belady", budget).matched.sum()
    seen: set[int] = set()
    again = []
    for path in paths:
        again.append(sum(1 for chunk in path if chunk in seen))
        seen |= set(path)
    for policy in POLICIES:
        assert replay(workload(*paths), policy, budget).matched.sum() <= limit
        # Published ones set parts of their room aside, for what is new or what is not.
        if policy not in PUBLISHED:
            assert replay(workload(*paths), policy, len(seen)).matched.tolist() == again


@pytest.mark.parametrize("policy", ["lru", "value"])
@settings(max_examples=40, deadline=None)
@given(PATHS, st.integers(1, 6))
def test_a_store_of_documents_keeps_its_budget_and_its_books(policy, paths, budget):
    """After every read: no more chunks than the budget, each counted for all who hold it."""
    store = DocumentStore(policy, budget, 256, Tariff())
    for number, path in enumerate(paths):
        store.read(number, Read(float(number), path))
        held = Counter(chunk for each in store._held.values() for chunk in each.path)
        assert held == store._holders
        assert store.used == len(held) <= budget


@pytest.mark.parametrize("policy", PUBLISHED)
def test_published_policies_keep_what_is_read_again(policy):
    """A chunk read twice outlives a scan of chunks read once; LRU loses it."""
    scan = [(100 + at,) for at in range(22)]
    paths = [(1,), *scan[:3], (1,), *scan[3:6], (1,), *scan[6:22], (1,)]
    assert replay(workload(*paths), policy, 10).matched[-1] == 1
    assert replay(workload(*paths), "lru", 10).matched[-1] == 0


@pytest.mark.parametrize("policy", PUBLISHED)
@settings(max_examples=40, deadline=None)
@given(PATHS, st.integers(1, 6))
def test_published_policies_keep_their_budget(policy, paths, budget):
    """All their queues together."""
    store = store_of(policy, workload(*paths), budget, Tariff())
    for number, path in enumerate(paths):
        store.read(number, Read(float(number), path))
        queues = [
            getattr(store, name)
            for name in ("_small", "_main", "_window", "_probation", "_protected", "_held")
            if hasattr(store, name)
        ]
        assert 0 < sum(map(len, queues)) <= budget
        assert not any(one.keys() & other for one, other in itertools.combinations(queues, 2))


@pytest.mark.slow
def test_known_rates_are_a_limit_that_no_policy_passes():
    """But for luck; with room for everything, what is read again is spared."""
    population = Population(name="p", reads=3000, documents=150, zipf=0.8, churn=0.3)
    reads = population.generate()
    limits = known_rates_share(population, reads, (0.05, 0.2, 1.0))
    for share in (0.05, 0.2):
        budget = int(reads.distinct_chunks * share)
        for policy in POLICIES:
            if policy != "belady":
                assert replay(reads, policy, budget).saved_share < limits[share] * 1.02
        assert limits[share] < replay(reads, "belady", budget).saved_share
    whole = replay(reads, "lru", reads.distinct_chunks).saved_share
    assert limits[1.0] == pytest.approx(whole, rel=0.03)


def test_what_was_tuned_on_is_not_counted():
    """A trace's first half fills the store, and is in no share."""
    reads = workload((1,), (2,), (1,), (2,))
    late = dataclasses.replace(reads, counted_from=2)
    assert replay(reads, "lru", 2).saved_share == 0.5
    assert replay(late, "lru", 2).saved_share == replay(late, "lru", 2).hit_rate == 1.0


def test_a_document_that_went_comes_back_with_its_history():
    """As in the catalogue: it is asked for more often than what is read for the first time."""
    store = DocumentStore("value", 2, 256, Tariff())
    for number, path in enumerate([(1,), (2,), (3,), (1,), (4,), (1,)]):
        store.read(number, Read(float(number), path))
    held = {each.path: each for each in store._held.values()}
    assert held[(1,)].first_used_s == 0.0
    assert held[(1,)].score > 2.9


def test_the_reads_that_follow():
    """By number; NEVER for the last."""
    paths = workload((1, 2), (3,), (1,)).reads
    assert following_reads(paths) == [[2, NEVER], [NEVER], [NEVER]]


def test_a_population_is_what_its_figures_say():
    """The same from the same seed; skewed, swinging with the hour, its documents replaced."""
    made = Population(name="p", reads=4000, documents=200, days=4.0)
    reads = made.generate().reads
    assert reads == made.generate().reads
    assert [read.at_s for read in reads] == sorted(read.at_s for read in reads)
    assert 0 <= reads[0].at_s < reads[-1].at_s <= 4 * DAY_S
    counts = Counter(read.path for read in reads).most_common()
    assert counts[0][1] > 10 * np.median([count for _, count in counts])
    by_quarter = Counter(int(read.at_s % DAY_S // (DAY_S / 4)) for read in reads)
    assert max(by_quarter.values()) > 2 * min(by_quarter.values())
    still = Population(name="p", reads=4000, documents=200, days=4.0, churn=0.0).generate()
    changing = Population(name="p", reads=4000, documents=200, days=4.0, churn=0.9).generate()
    assert changing.distinct_chunks > 1.5 * still.distinct_chunks


def test_chunks_follow_the_same_chunks_everywhere():
    """Chunks with the same number have the same chunks before them: they are prefixes."""
    before: dict[int, tuple[int, ...]] = {}
    for read in Population(name="p", reads=500, documents=100).generate().reads:
        for depth, chunk in enumerate(read.path):
            assert before.setdefault(chunk, read.path[:depth]) == read.path[:depth]


def test_traces_are_read_and_what_is_none_is_refused(tmp_path):
    """In the order of their time; a bad line is named."""
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 2000, "hash_ids": [0, 2]}, {"timestamp": 1000, "hash_ids": [0, 1]}]
    trace.write_text("\n".join(map(json.dumps, rows)))
    assert read_trace(trace).reads == [Read(1.0, (0, 1)), Read(2.0, (0, 2))]
    assert len(read_trace(trace, limit=1).reads) == 1
    trace.write_text(json.dumps(rows[0]) + "\n{}\n")
    with pytest.raises(ValueError, match=r"trace\.jsonl:2 is no line of a trace"):
        read_trace(trace)


def test_money_is_that_of_the_tariff():
    """Two reads of one chunk, one of them a hit: a million of them is half a million hits."""
    reads = workload((1,), (1,))
    outcome = replay(reads, "value", 1)
    amounts = money(reads, outcome, Tariff(input_nano_per_mtok=10**9, royalty_ppm=250_000))
    assert amounts["prefill_price_spared"] == pytest.approx(0.5 * 256, abs=0.01)
    assert amounts["charges"] == pytest.approx(0.05 * 256, abs=0.01)
    assert amounts["royalties"] == pytest.approx(amounts["charges"] / 4, abs=0.01)
    assert amounts["reuse_compute"] < amounts["charges"]


def test_routing_by_prefix_finds_more_in_the_paged_caches():
    """And more engines at random find less."""
    reads = Population(name="p", reads=1500, documents=100, churn=0.0).generate()
    outcome = replay(reads, "value", reads.distinct_chunks)
    engine = Engine(paged_cache_tokens=50_000)
    rows = {
        (engines, route): simulate(reads, outcome, engines, route, engine=engine)
        for engines in (1, 8)
        for route in ("random", "prefix-aware")
    }
    found = {key: row["reused_from_paged_cache"] for key, row in rows.items()}
    assert found[8, "prefix-aware"] > 2 * found[8, "random"]
    assert rows[8, "prefix-aware"]["gb_per_s_from_store"] < rows[8, "random"]["gb_per_s_from_store"]
    assert rows[8, "random"] == simulate(reads, outcome, 8, "random", engine=engine)


def test_copies_spread_the_load_and_survive_a_node():
    """One copy is lost with its node."""
    reads = Population(name="p", reads=500, documents=50).generate()
    outcome = replay(reads, "value", reads.distinct_chunks)
    one, three = (replicated(reads, outcome, nodes=8, copies=copies) for copies in (1, 3))
    assert three["hottest_node_over_mean"] < one["hottest_node_over_mean"]
    assert one["reuse_lost_with_the_hottest_node"] > 0.125
    assert three["reuse_lost_with_the_hottest_node"] == 0


def test_the_scaling_table_names_what_is_over(tmp_path):
    """Measured capacities are used where there are any; the first to break comes first."""
    run = {"bare": False, "pairs_per_s": 100}
    (tmp_path / "ledger.json").write_text(json.dumps({"sqlite": {"pairs": [run]}}))
    demand = Demand(
        reads_per_s=2.0,
        store_bytes_a_read=1e6,
        tokens_a_read=4000,
        published_documents_per_s=0.0,
        catalogue_chunks=1000,
    )
    parts = measured_parts(tmp_path)
    points = breaking_points(parts, demand)
    assert (points[0]["part"], points[0]["breaks_beyond_engines"]) == ("ledger on SQLite", 50)
    rows = {row["engines"]: row for row in table(parts, dict.fromkeys((10, 100), demand))}
    assert rows[10]["over"] == []
    assert rows[100]["over"] == ["ledger on SQLite"]
    assert rows[100]["run_then"].keys() == {"ledger on SQLite"}
    kept = measured_parts(ROOT / "docs" / "results")
    assert not [each for each in kept if "not measured" in each.source]


def test_a_ledger_on_postgresql_carries_what_its_groups_carry(tmp_path):
    """Two groups a pair, of the number of clients that commit most; the results page has them."""
    runs = [
        {"clients": 1, "pairs_per_s": 1500, "groups_per_s": 400},
        {"clients": 12, "pairs_per_s": 1400, "groups_per_s": 1000},
    ]
    measured = {"postgres": {"clients": runs, "pairs": []}}
    (tmp_path / "ledger.json").write_text(json.dumps(measured))
    (part,) = [each for each in ledger_parts(measured) if each.name == "ledger on PostgreSQL"]
    assert part.capacity == 500
    assert "12 clients, two a pair" in part.source
    points = [
        {"part": "ledger on PostgreSQL", "capacity": 350, "breaks_beyond_engines": 100},
        {"part": "disk", "capacity": 7, "breaks_beyond_engines": 120},
    ]
    newer = with_ledgers(points, 2.5, tmp_path)
    assert [(each["part"], each["breaks_beyond_engines"]) for each in newer] == [
        ("disk", 120),
        ("ledger on PostgreSQL", 200),
    ]
