"""Replaying a workload through a store: what it hits, what that spares, costs and brings."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from benchmarks.economics import (
    GB,
    PAPER_KV_BYTES_PER_TOKEN,
    PAPER_PREFILL_TO_REUSE,
    Economics,
)
from benchmarks.simulation.policies import Published, published
from benchmarks.simulation.reads import Workload
from benchmarks.simulation.stores import Belady, ChunkLru, DocumentStore, Store
from vllm_kvmarket.catalogue.eviction_policy import recompute_tokens
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.core.pricing import NANO, Tariff

PUBLISHED: tuple[Published, ...] = ("s3-fifo", "w-tinylfu", "gdsf")
POLICIES = ("chunk-lru", *PUBLISHED, "lru", "value", "belady")
STORAGE_NANO_PER_GB_MONTH = 80_000_000  # a public cloud's block storage, list price
MONTH_S = 30 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How much of each read a store had, in chunks; `budget` is in chunks too.

    Shares and sums are those of the reads from number `counted_from` on.
    """

    policy: str
    budget: int
    chunk_tokens: int
    matched: np.ndarray
    asked: np.ndarray
    counted_from: int = 0

    @property
    def hit_rate(self) -> float:
        """The share of chunks that were there."""
        matched, asked = self.matched[self.counted_from :], self.asked[self.counted_from :]
        return float(matched.sum() / max(1, asked.sum()))

    @property
    def saved_tokens(self) -> float:
        """The work that was saved, in tokens of a short prompt: see eviction.recompute_tokens."""
        return self._work(self.matched)

    @property
    def saved_share(self) -> float:
        """The share of all prefill time that was spared."""
        return self.saved_tokens / max(1.0, self._work(self.asked))

    def _work(self, chunks: np.ndarray) -> float:
        tokens = (chunks[self.counted_from :] * self.chunk_tokens).tolist()
        return float(sum(map(recompute_tokens, tokens)))


def store_of(policy: str, workload: Workload, budget: int, tariff: Tariff) -> Store:
    """Make the store of that policy."""
    if policy == "belady":
        return Belady(workload, budget)
    if policy == "chunk-lru":
        return ChunkLru(budget)
    for name in PUBLISHED:
        if policy == name:
            return published(name, budget, workload.chunk_tokens)
    assert policy in ("lru", "value")
    return DocumentStore(policy, budget, workload.chunk_tokens, tariff)


def replay(workload: Workload, policy: str, budget: int, tariff: Tariff | None = None) -> Outcome:
    """Replay all reads, from an empty store on."""
    store = store_of(policy, workload, budget, tariff or Tariff())
    matched = [store.read(number, read) for number, read in enumerate(workload.reads)]
    asked = [len(read.path) for read in workload.reads]
    return Outcome(
        policy,
        budget,
        workload.chunk_tokens,
        np.array(matched),
        np.array(asked),
        workload.counted_from,
    )


def money(workload: Workload, outcome: Outcome, tariff: Tariff) -> dict[str, Any]:
    """The cost and income of a million such reads, in units of the settlement currency.

    Storage is paid for the workload's own time; charges are those of each read's listing.
    """
    reads = len(workload.reads)
    charges = royalties = 0
    for read, matched in zip(workload.reads, outcome.matched.tolist(), strict=True):
        terms = tariff.terms(ListingTerms(cache_read_nano_per_mtok=read.cache_read_nano_per_mtok))
        charge = terms.charge_nano(matched * workload.chunk_tokens)
        charges += charge
        royalties += terms.royalty_nano(charge)
    tokens = int(outcome.matched.sum()) * workload.chunk_tokens
    reused = Economics(
        agents=1,
        tokens=max(1, tokens),
        tariff=tariff,
        prefill_to_reuse=Fraction(PAPER_PREFILL_TO_REUSE),
    ).total
    stored_gb = outcome.budget * workload.chunk_tokens * PAPER_KV_BYTES_PER_TOKEN / GB
    seconds = workload.reads[-1].at_s - workload.reads[0].at_s
    storage = stored_gb * STORAGE_NANO_PER_GB_MONTH * seconds / MONTH_S
    scale = 1_000_000 / reads / NANO
    return {
        "charges": round(charges * scale, 2),
        "royalties": round(royalties * scale, 2),
        "reuse_compute": round(reused.reuse_nano * scale, 2),
        "storage": round(storage * scale, 2),
        "prefill_price_spared": round(reused.prefill_nano * scale, 2),
        "egress_if_shipped": round(reused.shipping_nano * scale, 2),
        "provider_keeps": round((charges - royalties - reused.reuse_nano - storage) * scale, 2),
    }
