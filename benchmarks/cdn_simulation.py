"""A market at the size of the internet, simulated: eviction, routing, copies, money, limits.

    python -m benchmarks.cdn_simulation [--trace FILE ...] [--reads 30000]

Discrete events, seeded. Eviction, tariff and economics are the market's own
code. Workloads are populations of agents made from the seed, and traces of Mooncake's format
(timestamp, hash_ids) where --trace names some. The eviction's constants were chosen on other seeds
and on the traces' first halves (tune_eviction.py), so that a trace counts from its second half on,
with a store that the first has filled. For each: hit rate and prefill time spared by storage budget
and policy:

  chunk-lru  chunks, least recently used first: what an engine's own prefix cache does
  s3-fifo, w-tinylfu, gdsf
             published policies, over chunks: how far others get (simulation/policies.py)
  lru        whole documents, least recently used first (eviction.order's "lru")
  value      whole documents, by what they are worth (eviction.order's "value", the default)
  belady     chunks, knowing the future, and keeping nothing that is not read again: no store hits
             more chunks (chunks far into a document cost more to compute, for which it does not
             look, so it is nearly the limit in time)
  known rates  populations only: the most that can be expected of a policy that knows how often
             each document is read, but not by whom next (simulation/limits.py)

The store is the market's, of documents that someone publishes: it takes whatever is published, and
nothing that it could refuse. Belady, w-tinylfu and known rates may refuse.

Everything that is read is published when it is not there. Beside it: what a million reads cost and
bring, copies on several storage nodes (first population), and a fleet of 1 to 10,000 engines with
random and prefix-aware routing (a crowd whose documents are all stored). A scaling table sets each
part's demand beside its measured capacity (docs/results). Reads are a sample: with more of them,
the share of first reads, which nobody can hit, gets smaller, and a large fleet's paged caches get
warmer. Writes docs/results/cdn_simulation.json and .png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from collections import Counter
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.economics import PAPER_AGENTS, PAPER_KV_BYTES_PER_TOKEN
from benchmarks.machine import describe_machine
from benchmarks.simulation.fleet import ROUTES, Engine, replicated, simulate
from benchmarks.simulation.limits import known_rates_share
from benchmarks.simulation.reads import Population, Workload, read_trace
from benchmarks.simulation.replay import POLICIES, PUBLISHED, Outcome, money, replay
from benchmarks.simulation.scaling import ENGINES, Demand, breaking_points, measured_parts, table
from vllm_kvmarket.core.pricing import Tariff

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "cdn_simulation.json"
BUDGETS = (0.02, 0.05, 0.15, 0.4)
COPIES_BUDGET = 0.2
PUBLISHED_A_SECOND = 10.0
CATALOGUE_CHUNKS = 10_000_000


def populations(reads: int, seed: int) -> list[Population]:
    """Kinds of agents: a skewed crowd, a flat one, and one whose documents change all the time."""
    documents = max(50, reads // 10)
    return [
        Population(name="agents", reads=reads, documents=documents, seed=seed),
        Population(name="agents-flat", reads=reads, documents=documents, zipf=0.6, seed=seed),
        Population(name="agents-churn", reads=reads, documents=documents, churn=0.5, seed=seed),
    ]


def compare_policies(
    workload: Workload, population: Population | None, tariff: Tariff, pool: Executor
) -> dict[str, Any]:
    """Replay a workload under every policy and budget, in several processes."""
    known = known_rates_share(population, workload, BUDGETS) if population else {}
    chunks = workload.distinct_chunks
    cases = [(policy, max(1, int(chunks * share))) for share in BUDGETS for policy in POLICIES]
    each = partial(replay, workload, tariff=tariff)
    outcomes = pool.map(each, *zip(*cases, strict=True))
    rows = []
    for share in BUDGETS:
        of_share = {policy: next(outcomes) for policy in POLICIES}
        rows.append(_compared(workload, share, of_share, tariff, known.get(share)))
        show(workload.name, rows[-1])
    return {
        "reads": len(workload.reads),
        "counted_reads": len(workload.reads) - workload.counted_from,
        "busiest_hour_over_mean": busiest_hour(workload),
        "hours": round((workload.reads[-1].at_s - workload.reads[0].at_s) / 3600, 2),
        "chunk_tokens": workload.chunk_tokens,
        "distinct_chunks": chunks,
        "distinct_gb": round(chunks * workload.chunk_tokens * PAPER_KV_BYTES_PER_TOKEN / 1e9, 1),
        "rows": rows,
    }


def busiest_hour(workload: Workload) -> float:
    """Say how far the load of the busiest hour is above the mean: what bandwidth must be there."""
    begin, end = workload.reads[0].at_s, workload.reads[-1].at_s
    hours = max(1.0, (end - begin) / 3600)
    counts = Counter(int((read.at_s - begin) // 3600) for read in workload.reads)
    return round(max(counts.values()) * hours / len(workload.reads), 2)


def _compared(
    workload: Workload,
    share: float,
    outcomes: dict[str, Outcome],
    tariff: Tariff,
    known: float | None,
) -> dict[str, Any]:
    saved = {policy: outcome.saved_tokens for policy, outcome in outcomes.items()}
    reads = len(workload.reads) - workload.counted_from
    rate = Engine().prefill_tokens_per_s
    per_million = {p: round(tokens / rate / reads * 1e6) for p, tokens in saved.items()}
    chunk_gb = workload.chunk_tokens * PAPER_KV_BYTES_PER_TOKEN / 1e9
    value = outcomes["value"]
    best = max(PUBLISHED, key=lambda policy: saved[policy])
    limit = outcomes["belady"].saved_share
    return {
        "budget_share": share,
        "budget_chunks": value.budget,
        "storage_gb": round(value.budget * chunk_gb, 1),
        "loaded_gb_per_million_reads": round(
            float(value.matched[value.counted_from :].sum()) * chunk_gb / reads * 1e6
        ),
        "hit_rate": {policy: round(each.hit_rate, 4) for policy, each in outcomes.items()},
        "saved_share": {policy: round(each.saved_share, 4) for policy, each in outcomes.items()},
        "prefill_s_spared_per_million_reads": per_million,
        "value_over_lru": round(saved["value"] / max(1.0, saved["lru"]), 3),
        "value_over_chunk_lru": round(saved["value"] / max(1.0, saved["chunk-lru"]), 3),
        "value_over_belady": round(saved["value"] / max(1.0, saved["belady"]), 3),
        "best_published": best,
        "value_over_best_published": round(saved["value"] / max(1.0, saved[best]), 3),
        "best_published_over_belady": round(saved[best] / max(1.0, saved["belady"]), 3),
        "known_rates_saved_share": None if known is None else round(known, 4),
        "known_rates_over_belady": None if known is None else round(known / limit, 3),
        "per_million_reads": money(workload, value, tariff),
    }


def show(name: str, row: dict[str, Any]) -> None:
    """One line of the table."""
    saved = "  ".join(f"{policy} {share:.3f}" for policy, share in row["saved_share"].items())
    print(
        f"{name:20} budget {row['budget_share']:5.0%}  prefill spared: {saved}   "
        f"value: {row['value_over_lru']} of lru, {row['value_over_belady']} of Belady's; "
        f"known rates: {row['known_rates_over_belady']}",
        flush=True,
    )


def verdict(workloads: dict[str, Any]) -> dict[str, Any]:
    """Hold the results against the aims."""
    rows = [(name, row) for name, each in workloads.items() for row in each["rows"]]

    def behind(key: str, limit: float) -> list[str]:
        return [
            f"{name} at {row['budget_share']:.0%}: {row[key]}"
            for name, row in rows
            if row[key] is not None and row[key] < limit
        ]

    return {
        "cases": len(rows),
        "behind_lru_of_documents": behind("value_over_lru", 1.0),
        "behind_lru_of_chunks": behind("value_over_chunk_lru", 1.0),
        "behind_the_best_published": behind("value_over_best_published", 1.0),
        "more_than_a_tenth_behind_belady": behind("value_over_belady", 0.9),
        "best_published_more_than_a_tenth_behind": behind("best_published_over_belady", 0.9),
        "out_of_reach_even_with_known_rates": behind("known_rates_over_belady", 0.9),
    }


def fleets(reads: int, seed: int, tariff: Tariff) -> tuple[Workload, list[dict[str, Any]]]:
    """Engines and routing, for a population whose documents are all stored."""
    crowd = Population(name="crowd", reads=reads, documents=max(50, reads // 20), seed=seed)
    workload = crowd.generate()
    outcome = replay(workload, "value", workload.distinct_chunks, tariff)
    rows = []
    for engines in ENGINES:
        for route in ROUTES:
            row = simulate(workload, outcome, engines, route, engine=Engine())
            rows.append(row)
            print(
                f"{engines:6,} engines, {route:12} TTFT p50 {row['ttft_s_p50']} s "
                f"p99 {row['ttft_s_p99']} s, {row['reused_from_paged_cache']:.0%} of reuse from "
                f"the paged cache, {row['gb_per_s_from_store']} GB/s from the store",
                flush=True,
            )
    return workload, rows


def copied(workload: Workload, tariff: Tariff) -> list[dict[str, Any]]:
    """Copies on storage nodes, under one budget for all of them."""
    rows = []
    for copies in (1, 2, 3):
        budget = int(workload.distinct_chunks * COPIES_BUDGET) // copies
        outcome = replay(workload, "value", budget, tariff)
        rows.append(replicated(workload, outcome, nodes=16, copies=copies))
        print(f"copies: {rows[-1]}", flush=True)
    return rows


def scale(workload: Workload, fleet: list[dict[str, Any]], results: Path) -> dict[str, Any]:
    """The part that breaks first, for each way of routing."""
    parts = measured_parts(results)
    tokens = sum(len(read.path) for read in workload.reads) * workload.chunk_tokens
    found: dict[str, Any] = {}
    for route in ROUTES:
        demands = {
            row["engines"]: Demand(
                reads_per_s=row["reads_per_s"] / row["engines"],
                store_bytes_a_read=row["bytes_from_store_a_read"],
                tokens_a_read=tokens / len(workload.reads),
                published_documents_per_s=PUBLISHED_A_SECOND / ENGINES[-1],
                catalogue_chunks=CATALOGUE_CHUNKS,
            )
            for row in fleet
            if row["route"] == route
        }
        # What one engine of ten asks for, whose paged caches are warm.
        demand = demands[10]
        found[route] = {
            "one_engine_of_ten": {
                "reads_per_s": round(demand.reads_per_s, 2),
                "gb_per_s_from_store": round(
                    demand.reads_per_s * demand.store_bytes_a_read / 1e9, 3
                ),
                "days_for_80_million_reads": round(PAPER_AGENTS / demand.reads_per_s / 86_400, 1),
            },
            "breaks": breaking_points(parts, demand),
            "table": table(parts, demands),
        }
        print(f"what breaks first, {route} routing:")
        for point in found[route]["breaks"]:
            print(
                f"  {point['part']:22} {point['capacity']:>16,} {point['unit']:11} "
                f"beyond {point['breaks_beyond_engines']} engines; then: {point['then']}"
            )
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """A panel for each workload: prefill time spared over the budget, by policy."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    workloads = result["workloads"]
    figure, panels = plt.subplots(
        1, len(workloads), figsize=(3.6 * len(workloads), 3.4), sharey=True, squeeze=False
    )
    for panel, (name, each) in zip(panels[0], workloads.items(), strict=True):
        shares = [100 * row["budget_share"] for row in each["rows"]]
        for policy in POLICIES:
            spared = [100 * row["saved_share"][policy] for row in each["rows"]]
            thin = policy in PUBLISHED
            panel.plot(
                shares,
                spared,
                marker="o",
                markersize=2 if thin else 3,
                linewidth=0.8 if thin else 1.6,
                linestyle=":" if thin else "-",
                label=policy,
            )
        known = [row["known_rates_saved_share"] for row in each["rows"]]
        if None not in known:
            panel.plot(
                shares, [100 * one for one in known], "k--", linewidth=1, label="known rates"
            )
        panel.set_title(name, fontsize=9)
        panel.set_xlabel("storage, % of all that is read")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("prefill time spared, %")
    panels[0][0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the result holds."""
    tariff = Tariff()
    made = populations(args.reads, args.seed)
    workloads: list[tuple[Workload, Population | None]] = [
        (population.generate(), population) for population in made
    ]
    first = workloads[0][0]
    for path in args.trace:
        trace = read_trace(path, args.trace_reads)
        half = len(trace.reads) // 2
        workloads.append((dataclasses.replace(trace, counted_from=half), None))
    with ProcessPoolExecutor(args.jobs) as pool:
        compared = {
            workload.name: compare_policies(workload, population, tariff, pool)
            for workload, population in workloads
        }
    held = verdict(compared)
    print(json.dumps(held, indent=1), flush=True)
    return {
        "workloads": compared,
        "verdict": held,
        **at_scale(first, args, tariff),
    }


def at_scale(first: Workload, args: argparse.Namespace, tariff: Tariff) -> dict[str, Any]:
    """The parts of the result that are about engines, storage nodes, and what breaks."""
    crowd, fleet = fleets(args.fleet_reads, args.seed, tariff)
    return {
        "fleet": {"reads": args.fleet_reads, "engines": fleet},
        "copies": {"budget_share": COPIES_BUDGET, "rows": copied(first, tariff)},
        "scaling": scale(crowd, fleet, RESULTS.parent),
    }


def main() -> None:
    """Simulate, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trace", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--trace-reads", type=int, help="only so many of each trace")
    parser.add_argument("--reads", type=int, default=30_000, help="of each population")
    parser.add_argument("--fleet-reads", type=int, default=100_000, help="of the fleet's crowd")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--note", default="", help="what to know of this run, kept in the result")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    started = time.perf_counter()
    traces = "".join(f" --trace {path.name}" for path in args.trace)
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.cdn_simulation{traces} --reads {args.reads} "
        f"--seed {args.seed}",
        "note": args.note,
        "machine": describe_machine(),
        "python": platform.python_version(),
        "assumed_engine": {name: getattr(Engine(), name) for name in Engine.__dataclass_fields__},
    }
    try:
        result |= run(args)
    except (OSError, ValueError) as error:
        sys.exit(f"{error}; give --trace a JSON lines file with timestamp and hash_ids")
    result["seconds"] = round(time.perf_counter() - started, 1)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, args.output.with_suffix(".png"))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
