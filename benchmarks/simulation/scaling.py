"""Finds what breaks first as engines are added: each part's demand beside its measured capacity.

Capacities are this project's own measurements where docs/results has them, on the machine that they
name; those that are assumed say so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENGINES = (1, 10, 100, 1_000, 10_000)


@dataclass(frozen=True, slots=True)
class Part:
    """A part that all engines share, or that each has: what it can do, and what to run then."""

    name: str
    unit: str
    capacity: float
    source: str
    then: str
    shared: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """The demand of one engine, and of the market as a whole."""

    reads_per_s: float
    store_bytes_a_read: float
    tokens_a_read: float
    published_documents_per_s: float
    catalogue_chunks: int


def measured_parts(results: Path) -> list[Part]:
    """Read the capacities from docs/results, with stated assumptions for what is not there."""
    ledger = _json(results / "ledger.json")
    catalogue = _json(results / "catalogue.json")
    reuse = _json(results / "prefill_vs_reuse.json")
    match_us, source = 200.0, "the aim; not measured"
    bytes_a_chunk, bytes_source = 100.0, "an estimate; not measured"
    adopt_ms, adopt_source = 5.0, "an estimate; not measured"
    if catalogue:
        match_us, source = catalogue["new_process"]["match_us"]["4k"]["cpu_p99"], "catalogue.json"
        index, bytes_source = catalogue["index"], "catalogue.json"
        bytes_a_chunk = index["index_bytes"] / index["chunks"]
        adopt_ms, adopt_source = catalogue["adding"]["adopt_ms"]["p50"], "catalogue.json"
    load, load_source = 5e9, "assumed"
    if reuse:
        load, load_source = reuse["load"]["bytes_per_s"], "prefill_vs_reuse.json, warm page cache"
    return [
        Part(
            "catalogue: matching",
            "matches/s",
            1e6 / match_us,
            source,
            "nothing: every engine matches for itself, in its machine's index",
            shared=False,
        ),
        Part(
            "catalogue: index",
            "chunks",
            64e9 / bytes_a_chunk,
            f"64 GB of a machine's disk at {bytes_source}",
            "a larger disk, or a catalogue for each namespace",
            shared=False,
        ),
        Part(
            "catalogue: listing",
            "documents/s",
            1e3 / adopt_ms,
            adopt_source,
            "a market for each region",
        ),
        *ledger_parts(ledger),
        Part(
            "disk of one machine",
            "bytes/s",
            load,
            load_source,
            "host tiers, prefix-aware routing, and a disk cache in every machine",
        ),
        Part(
            "object store",
            "bytes/s",
            12.5e9,
            "assumed: 100 Gbit/s of one bucket",
            "several buckets by chunk key, codec zstd-exponent, replicas beside the engines",
        ),
        Part(
            "network of an engine",
            "bytes/s",
            12.5e9,
            "assumed: 100 Gbit/s a machine",
            "prefix-aware routing, more host memory, codec zstd-exponent",
            shared=False,
        ),
    ]


def ledger_parts(measured: dict[str, Any]) -> list[Part]:
    """What ledgers can do: on SQLite one process's pairs, on PostgreSQL the groups of many."""
    sqlite = postgres = 3_000.0
    sources = dict.fromkeys(("sqlite", "postgres"), "an estimate; not measured")
    if "sqlite" in measured:
        pairs = [run for run in measured["sqlite"]["pairs"] if not run["bare"]]
        sqlite = max(run["pairs_per_s"] for run in pairs)
        sources["sqlite"] = "ledger.json, durable pairs on 2 cores"
    if clients := measured.get("postgres", {}).get("clients"):
        # An engine has few pairs at a time: the reservation and the settlement are a group each.
        most = max(clients, key=lambda run: run["groups_per_s"])
        postgres = min(most["groups_per_s"] / 2, most["pairs_per_s"])
        sources["postgres"] = f"ledger.json, groups/s of {most['clients']} clients, two a pair"
    elif "postgres" in measured:
        pairs = [run for run in measured["postgres"]["pairs"] if not run["bare"]]
        postgres = min(run["pairs_per_s"] for run in pairs if run["in_flight"] == 1)
        sources["postgres"] = "ledger.json, one pair in flight"
    then = "a ledger for each region; PostgreSQL on a larger machine"
    then_postgres = "a ledger for each region or group of accounts"
    return [
        Part("ledger on SQLite", "pairs/s", float(sqlite), sources["sqlite"], then),
        Part(
            "ledger on PostgreSQL", "pairs/s", float(postgres), sources["postgres"], then_postgres
        ),
    ]


def with_ledgers(
    points: list[dict[str, Any]], reads_per_s: float, results: Path
) -> list[dict[str, Any]]:
    """Breaking points as they were simulated, but with the ledgers as they were measured last."""
    capacities = {part.name: part.capacity for part in ledger_parts(_json(results / "ledger.json"))}
    newer = [
        {
            **point,
            "capacity": round(capacities[point["part"]]),
            "breaks_beyond_engines": int(capacities[point["part"]] / reads_per_s),
        }
        if point["part"] in capacities
        else point
        for point in points
    ]
    return sorted(newer, key=_order)


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}


def needs(part: Part, engines: int, demand: Demand) -> float:
    """A part's load with so many engines."""
    count = engines if part.shared else 1
    each = {
        "matches/s": demand.reads_per_s,
        "pairs/s": demand.reads_per_s,
        "bytes/s": demand.reads_per_s * demand.store_bytes_a_read,
        "documents/s": demand.published_documents_per_s,
    }
    if part.unit == "chunks":
        return float(demand.catalogue_chunks)
    return each[part.unit] * count


def table(parts: list[Part], demands: Mapping[int, Demand]) -> list[dict[str, Any]]:
    """For each number of engines, at its own demand: how far parts are used, which are over."""
    rows = []
    for engines, demand in demands.items():
        used = {part.name: needs(part, engines, demand) / part.capacity for part in parts}
        over = sorted((name for name in used if used[name] > 1), key=lambda name: -used[name])
        rows.append(
            {
                "engines": engines,
                "reads_per_s": round(engines * demand.reads_per_s, 1),
                "used": {name: round(share, 5) for name, share in used.items()},
                "over": over,
                "run_then": {part.name: part.then for part in parts if part.name in over},
            }
        )
    return rows


def breaking_points(parts: list[Part], demand: Demand) -> list[dict[str, Any]]:
    """Say from how many engines on each shared part is over, the first first."""
    points = []
    for part in parts:
        one = needs(part, 1, demand) / part.capacity
        engines = (1 / one if part.shared else (0 if one > 1 else None)) if one else None
        points.append(
            {
                "part": part.name,
                "capacity": round(part.capacity),
                "unit": part.unit,
                "source": part.source,
                "used_by_one_engine": round(one, 6),
                "breaks_beyond_engines": None if engines is None else int(engines),
                "then": part.then,
            }
        )
    return sorted(points, key=_order)


def _order(point: dict[str, Any]) -> tuple[bool, int]:
    return point["breaks_beyond_engines"] is None, point["breaks_beyond_engines"] or 0
