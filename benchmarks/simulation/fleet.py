"""Engines behind a router: whose paged cache has a document, how long a reader waits, what flows.

Time runs by events: a read arrives, goes to an engine, waits for those before it, and is computed.
What the store had of it (see replay) is known; what of that lies in the engine's paged cache is not
loaded again.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.economics import PAPER_KV_BYTES_PER_TOKEN
from benchmarks.simulation.reads import Workload
from benchmarks.simulation.replay import Outcome
from vllm_kvmarket.catalogue.eviction_policy import recompute_tokens

ROUTES = ("random", "prefix-aware")
CANDIDATES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Assumptions about one engine; not measured here, where there is no GPU."""

    prefill_tokens_per_s: float = 10_000.0
    load_bytes_per_s: float = 6.8e9
    # A question's prefill and the answer's share of the engine, per request.
    other_s: float = 0.05
    paged_cache_tokens: int = 400_000
    utilisation: float = 0.6


class Fleet:
    """Engines with their queues and paged caches."""

    def __init__(self, engines: int, engine: Engine, seed: int) -> None:
        self._engine = engine
        self._free_at_s = np.zeros(engines)
        self._cached: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(engines)]
        self._cached_tokens = [0] * engines
        self._random = np.random.default_rng(seed)

    def choose(self, route: str, document: int, at_s: float) -> int:
        """Say which engine gets a read of that document."""
        engines = len(self._cached)
        if route == "random":
            return int(self._random.integers(engines))
        # Everyone computes the same candidates from the document alone; the next one is asked when
        # those before it are busy, which spreads what is read most over more engines.
        best, best_wait = 0, np.inf
        for turn in range(min(CANDIDATES, engines)):
            candidate = (document * 2_654_435_761 + turn * 40_503_011) % engines
            wait = self._free_at_s[candidate] - at_s
            if wait <= self._engine.other_s:
                return candidate
            if wait < best_wait:
                best, best_wait = candidate, wait
        # A document that these cannot serve alone is read by so many that any engine may keep it.
        for other in self._random.integers(engines, size=2).tolist():
            if self._free_at_s[other] - at_s < best_wait:
                best, best_wait = other, self._free_at_s[other] - at_s
        return best

    def serve(
        self, number: int, document: int, at_s: float, matched: int, missing: int
    ) -> tuple[float, int]:
        """Serve a read of `matched` published and `missing` other tokens.

        Returns its time to first token, and how many tokens were loaded. Mutates.
        """
        cached = self._cached[number].pop(document, 0)
        loaded = max(0, matched - cached)
        whole = matched + missing
        self._cached[number][document] = whole
        self._cached_tokens[number] += whole - cached
        while self._cached_tokens[number] > self._engine.paged_cache_tokens:
            _, tokens = self._cached[number].popitem(last=False)
            self._cached_tokens[number] -= tokens
        busy = self.seconds(loaded, max(0, matched, cached), whole)
        started = max(at_s, self._free_at_s[number])
        self._free_at_s[number] = started + busy
        return float(started + busy - at_s), loaded

    def seconds(self, loaded: int, reused: int, whole: int) -> float:
        """How long an engine is busy with a read."""
        engine = self._engine
        computed = recompute_tokens(whole) - recompute_tokens(min(reused, whole))
        copied = loaded * PAPER_KV_BYTES_PER_TOKEN / engine.load_bytes_per_s
        return computed / engine.prefill_tokens_per_s + copied + engine.other_s


def simulate(
    workload: Workload,
    outcome: Outcome,
    engines: int,
    route: str,
    *,
    engine: Engine,
    seed: int = 1,
) -> dict[str, Any]:
    """Run all reads through a fleet; the second half is reported.

    The reads' times are shrunk or stretched so that engines are as busy as `engine.utilisation`
    says, were everything loaded from the store: the load grows with the fleet.
    """
    fleet = Fleet(engines, engine, seed)
    width = workload.chunk_tokens
    matched = (outcome.matched * width).tolist()
    whole = (outcome.asked * width).tolist()
    work = sum(fleet.seconds(had, had, all_) for had, all_ in zip(matched, whole, strict=True))
    begin, end = workload.reads[0].at_s, workload.reads[-1].at_s
    scale = work / engines / engine.utilisation / max(1e-9, end - begin)
    half = len(workload.reads) // 2
    waits, loaded = [], []
    for number, read in enumerate(workload.reads):
        at_s = (read.at_s - begin) * scale
        document = hash(read.path)
        chosen = fleet.choose(route, document, at_s)
        wait, tokens = fleet.serve(
            chosen, document, at_s, matched[number], whole[number] - matched[number]
        )
        waits.append(wait)
        loaded.append(tokens)
    late = slice(half, None)
    seconds = (end - workload.reads[half].at_s) * scale
    had = sum(matched[late])
    bytes_loaded = sum(loaded[late]) * PAPER_KV_BYTES_PER_TOKEN
    return {
        "engines": engines,
        "route": route,
        "reads_an_engine": round(len(workload.reads) / engines),
        "reads_per_s": round(len(waits[late]) / seconds, 1),
        "ttft_s_p50": round(float(np.median(waits[late])), 3),
        "ttft_s_p99": round(float(np.percentile(waits[late], 99)), 3),
        "reused_from_paged_cache": round(1 - sum(loaded[late]) / max(1, had), 4),
        "gb_per_s_from_store": round(bytes_loaded / seconds / 1e9, 2),
        "bytes_from_store_a_read": round(bytes_loaded / max(1, len(waits[late]))),
    }


def replicated(workload: Workload, outcome: Outcome, nodes: int, copies: int) -> dict[str, Any]:
    """Say how loads spread over `nodes` that keep `copies` of every document.

    `outcome` is that of a store with a `copies`-th of the budget: copies take room. Which nodes
    have a document follows from the document; a reader takes any of them.
    """
    loads = np.zeros(nodes)
    for read, matched in zip(workload.reads, outcome.matched.tolist(), strict=True):
        first = hash(read.path) % nodes
        for copy in range(copies):
            loads[(first + copy) % nodes] += matched / copies
    total = max(1.0, float(loads.sum()))
    return {
        "nodes": nodes,
        "copies": copies,
        "saved_share": round(outcome.saved_share, 4),
        "hottest_node_over_mean": round(float(loads.max()) / (total / nodes), 2),
        "reuse_lost_with_the_hottest_node": 0.0
        if copies > 1
        else round(float(loads.max()) / total, 4),
    }
