"""How far any policy can get that does not know the future: one that knows all there is to know.

It knows how often every document is read, from its first read on, and learns at once when one is
replaced. The draws themselves it does not know: each read is drawn anew by these rates, so that
what is there can be expected to spare no more than the sum over its chunks of rate x cost, however
it was chosen, and the best that fits into a budget are the chunks of the highest (Aho, Denning &
Ullman's A0, 1971, with costs). Chunks count without those before them, which makes it higher still.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.simulation.reads import DAY_S, Population, Workload
from vllm_kvmarket.catalogue.eviction_policy import recompute_tokens

LOOKED_AT_EVERY = 20  # reads


def known_rates_share(
    population: Population, workload: Workload, shares: Sequence[float]
) -> dict[float, float]:
    """Return the share of all prefill time that can be expected to be spared at most, by budget.

    `workload` is what the population generates; `shares` are of its distinct chunks.
    """
    width = workload.chunk_tokens
    places: dict[int, int] = {}
    costs: list[float] = []
    for read in workload.reads:
        for depth, chunk in enumerate(read.path):
            if places.setdefault(chunk, len(costs)) == len(costs):
                upto = recompute_tokens((depth + 1) * width)
                costs.append(upto - recompute_tokens(depth * width))
    cost, rate = np.array(costs), np.zeros(len(costs))
    _, ranks, versions = population.draw(np.random.default_rng(population.seed))
    weights = population.weights()
    period_s = DAY_S / population.churn if population.churn else np.inf
    ends_s: dict[int, float] = {}
    held: dict[int, tuple[int, np.ndarray]] = {}
    spared = dict.fromkeys(shares, 0.0)
    best = dict.fromkeys(shares, 0.0)
    offsets = _offsets(population)
    for number, (read, rank, version) in enumerate(
        zip(workload.reads, ranks.tolist(), versions.tolist(), strict=True)
    ):
        if number % LOOKED_AT_EVERY == 0:
            for gone in [each for each, end_s in ends_s.items() if end_s <= read.at_s]:
                rate[held.pop(gone)[1]] -= weights[gone]
                del ends_s[gone]
            sums = np.cumsum(np.sort(rate * cost)[::-1])
            best = {share: float(sums[max(1, int(share * len(cost))) - 1]) for share in shares}
        for share in shares:
            spared[share] += best[share]
        if rank not in held or held[rank][0] != version:
            if rank in held:
                rate[held[rank][1]] -= weights[rank]
            chunks = np.array([places[chunk] for chunk in read.path])
            rate[chunks] += weights[rank]
            held[rank] = version, chunks
            ends_s[rank] = (version + 1 - offsets[rank]) * period_s
    asked = sum(recompute_tokens(len(read.path) * width) for read in workload.reads)
    return {share: spared[share] / asked for share in shares}


def _offsets(population: Population) -> np.ndarray:
    """Draw again where in their first period the ranks change: see Population.draw."""
    random = np.random.default_rng(population.seed)
    random.random(2 * population.reads)  # times and ranks
    return random.random(population.documents)
