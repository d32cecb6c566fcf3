"""Which documents are evicted first when the store needs space: pure arithmetic.

A document's value is what keeping it earns and saves: the number of reuses that are likely soon,
times the computation that one reuse saves and the money that it brings. Documents are ordered by
the value that is lost for each byte that is really freed. A chunk that several documents share is
freed with the last of them: it counts for none of them while two hold it, and then for the last.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from vllm_kvmarket.core.pricing import MTOK, Tariff

Policy = Literal["value", "lru"]
ChunkKey = bytes

# A reuse counts half as much a day later, and less than a hundredth after a week.
HALF_LIFE_S = 24 * 3600.0
# A document of this score was used again, if in part only.
REUSED_SCORE = 1.5
SHORTEST_PACE_S = 1e-3
# What is not known yet of a document is put for it: so many reuses within so many times the pace
# (see pace_s), and that within a pace so many of a document's readers have gone for good.
# All three were chosen on the workloads of benchmarks/tune_eviction.py, which are not reported.
PRIOR_USES = 0.5
PRIOR_PACES = 1.5
GONE_A_PACE = 0.1
# Prefilling n tokens takes 24 x hidden size squared operations a token and layer for the weights,
# and 4 x hidden size x n / 2 for attention: twice the work at 12 x hidden size tokens. Models of 1
# to 10 billion parameters have hidden sizes of 2,048 to 4,096; this is for 2,730.
QUADRATIC_TOKENS = 32_768


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A document on offer, as a policy sees it.

    `bytes` are those that no other document holds; `shared` are the keys and bytes of chunks that
    other candidates hold too (chunks that something else needs are in neither). `score` is how many
    times the whole of it was reused, publishing included, each halved every HALF_LIFE_S up to
    `last_used_s`. `uses` and `earned_nano` count from its first use on, which was at `first_used_s`
    (publishing included, also an earlier one of a document that went meanwhile); None: at the last.
    """

    document_id: str
    bytes: int
    tokens: int
    score: float
    last_used_s: float
    first_used_s: float | None = None
    earned_nano: int = 0
    uses: int = 0
    pinned: bool = False
    paid_for: bool = False
    shared: tuple[tuple[ChunkKey, int], ...] = ()


def recompute_tokens(tokens: float) -> float:
    """Say what prefilling `tokens` costs, in tokens of a short prompt: attention grows squarely."""
    return tokens * (1 + tokens / QUADRATIC_TOKENS)


def decayed(score: float, age_s: float) -> float:
    """Return what a score is worth `age_s` seconds later; no more when a clock went back."""
    return float(score * 2.0 ** (-max(0.0, age_s) / HALF_LIFE_S))


def reused(score: float, scored_at_s: float, share: float, at_s: float) -> tuple[float, float]:
    """Add a reuse of a `share` (0 to 1) of the document's cost; returns the score and its time.

    Reuses may come in any order; the score is as of the latest.
    """
    latest = max(scored_at_s, at_s)
    return decayed(score, latest - scored_at_s) + decayed(share, latest - at_s), latest


def pace_s(candidates: Iterable[Candidate], now_s: float) -> float:
    """Say on which scale of time these documents are used: the usual time between two uses of one.

    The median of those that were used again; where there are none, the mean time since the last
    use. It is what makes the same policy serve a market of an hour and one of a year.
    """
    known = list(candidates)
    between_s = sorted(
        (each.last_used_s - each.first_used_s) / max(1.0, each.score - 1.0)
        for each in known
        if each.first_used_s is not None and each.score > REUSED_SCORE
    )
    if between_s:
        usual_s = between_s[len(between_s) // 2]
    else:
        idle_s = [max(0.0, now_s - each.last_used_s) for each in known]
        usual_s = sum(idle_s) / max(1, len(idle_s))
    return max(SHORTEST_PACE_S, usual_s)


def demand(score: float, age_s: float, idle_s: float, pace_s: float) -> float:
    """Say how often a document is likely to be reused from now on: reuses in a time of `pace_s`.

    `score` is as of `idle_s` ago, its last use; its first was `age_s` ago. Its rate is estimated
    from its reuses and the time that they took, as a gamma-Poisson model does; times the odds that
    its readers have not left since its last use, which fall the faster the more often it was used
    (Schmittlein, Morrison & Colombo's Pareto/NBD model, 1987, of customers who leave unseen).
    """
    idle_s = max(0.0, idle_s)
    age_s = max(idle_s, age_s)
    prior_s = PRIOR_PACES * pace_s
    # The first use says nothing of how often a document is used again.
    reuses = max(0.0, decayed(score, idle_s) - decayed(1.0, age_s))
    watched_s = HALF_LIFE_S / math.log(2) * (1.0 - decayed(1.0, age_s))
    rate = (PRIOR_USES + reuses) / (prior_s + watched_s)
    leaving = GONE_A_PACE / pace_s
    either = rate + leaving
    gone = leaving / either * math.expm1(min(700.0, either * idle_s))
    return rate * pace_s / (1.0 + gone)


def value_nano(
    candidate: Candidate, now_s: float, input_nano_per_mtok: int, pace_s: float
) -> float:
    """Say what keeping a document is worth, in nano-units: what its likely reuse earns and saves.

    Saved is the price of the computation, growing faster than the document; earned the average of
    its uses.
    """
    saved = recompute_tokens(candidate.tokens) * input_nano_per_mtok / MTOK
    earned = candidate.earned_nano / max(1, candidate.uses)
    first_s = candidate.last_used_s if candidate.first_used_s is None else candidate.first_used_s
    age_s, idle_s = now_s - first_s, now_s - candidate.last_used_s
    return demand(candidate.score, age_s, idle_s, pace_s) * (saved + earned)


def lost_share(candidate: Candidate, freed: int) -> float:
    """Say which share of a document's value is lost with `freed` of its bytes, its last ones.

    What others hold stays, and goes on sparing the computation of the document's beginning.
    """
    size = candidate.bytes + sum(each for _, each in candidate.shared)
    if freed >= size:
        return 1.0
    left = candidate.tokens * (1 - freed / size)
    return 1.0 - recompute_tokens(left) / recompute_tokens(candidate.tokens)


def order(
    candidates: Iterable[Candidate],
    policy: Policy,
    now_s: float,
    *,
    input_nano_per_mtok: int = Tariff().input_nano_per_mtok,
) -> list[Candidate]:
    """Put documents in the order in which they should go, victims first.

    Documents that someone paid to have stored come after all others; pinned ones are left out.
    Those whose going would free nothing come last among their like. Each comes with the `bytes`
    that its going frees once those before it are gone. The same candidates give the same order,
    however they are arranged.
    """
    return _Line(list(candidates), policy, now_s, input_nano_per_mtok).drain()


class _Line:
    """The documents that are still there, cheapest first; what goes changes what others free."""

    def __init__(
        self, candidates: Sequence[Candidate], policy: Policy, now_s: float, price: int
    ) -> None:
        self._candidates = candidates
        self._freed = [candidate.bytes for candidate in candidates]
        self._policy = policy
        pace = pace_s(candidates, now_s)
        self._values = [value_nano(candidate, now_s, price, pace) for candidate in candidates]
        self._holders: dict[ChunkKey, set[int]] = defaultdict(set)
        for number, candidate in enumerate(candidates):
            for key, _ in candidate.shared:
                self._holders[key].add(number)
        for key in [key for key, holders in self._holders.items() if len(holders) == 1]:
            self._inherit(key)

    def drain(self) -> list[Candidate]:
        """Take one after another; mutates."""
        heap = [
            (self._rank(number), number)
            for number, candidate in enumerate(self._candidates)
            if not candidate.pinned
        ]
        heapq.heapify(heap)
        waiting = {number for _, number in heap}
        gone: list[Candidate] = []
        while heap:
            rank, number = heapq.heappop(heap)
            # One whose rank has changed since is in the heap a second time.
            if number not in waiting or rank != self._rank(number):
                continue
            waiting.remove(number)
            candidate = self._candidates[number]
            gone.append(dataclasses.replace(candidate, bytes=self._freed[number], shared=()))
            for key, _ in candidate.shared:
                self._holders[key].discard(number)
                if len(self._holders[key]) == 1:
                    heir = self._inherit(key)
                    if heir in waiting:
                        heapq.heappush(heap, (self._rank(heir), heir))
        return gone

    def _inherit(self, key: ChunkKey) -> int:
        """Note that a chunk has one holder left, whose going will free it; returns which."""
        (heir,) = self._holders.pop(key)
        self._holders[key] = set()
        self._freed[heir] += dict(self._candidates[heir].shared)[key]
        return heir

    def _rank(self, number: int) -> tuple[bool, bool, float, float, str]:
        candidate, freed = self._candidates[number], self._freed[number]
        classes = (candidate.paid_for, freed == 0)
        if self._policy == "lru":
            return *classes, candidate.last_used_s, 0.0, candidate.document_id
        worth = self._values[number] * lost_share(candidate, freed) / max(1, freed)
        return *classes, worth, candidate.last_used_s, candidate.document_id
