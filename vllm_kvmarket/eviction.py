"""Which documents go first when the store needs room: pure arithmetic, no clock, no files.

A document's value is what keeping it earns and saves: how often it is likely to be reused soon,
times what one reuse spares the provider to compute and brings in. Documents are compared by the
value that would be lost per byte that would really be freed: a chunk that several documents share
is freed with the last of them, so it counts for none as long as two hold it, and for the one that
is left from then on; and what is left of a document still spares its readers that much.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from vllm_kvmarket.tariff import MTOK, Tariff

Policy = Literal["value", "lru"]
ChunkKey = bytes

# A reuse counts half as much a day later, and less than a hundredth after a week.
HALF_LIFE_S = 24 * 3600.0
# How soon a document is reused again is guessed from how long it has not been: twice as long, half
# as likely, on every time scale. Within this time after a use all are alike.
RECENT_S = 200.0
# What is reused all the time and then is not for so many times its usual interval is over: a new
# version has taken its place. Both numbers were chosen with benchmarks/cdn_simulation.py.
OVER_AFTER = 1 / 3
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
    `last_used_s`. `uses` and `earned_nano` count from its first use on.
    """

    document_id: str
    bytes: int
    tokens: int
    score: float
    last_used_s: float
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


def demand(score: float, idle_s: float) -> float:
    """Say how much a document is asked for now: 1 for one that was just reused for the first time.

    Falls with the time since its last use, and the more steeply the more often it was used before.
    """
    idle_s = max(0.0, idle_s)
    # Evenly reused, a document's score is that of its reuses within HALF_LIFE_S / ln 2.
    missed = score * idle_s * math.log(2) / HALF_LIFE_S
    return score / ((1.0 + idle_s / RECENT_S) * (1.0 + missed / OVER_AFTER))


def value_nano(candidate: Candidate, now_s: float, input_nano_per_mtok: int) -> float:
    """Say what keeping a document is worth, in nano-units: what its likely reuse earns and saves.

    Saved is the price of the computation, growing faster than the document; earned the average of
    its uses.
    """
    saved = recompute_tokens(candidate.tokens) * input_nano_per_mtok / MTOK
    earned = candidate.earned_nano / max(1, candidate.uses)
    return demand(candidate.score, now_s - candidate.last_used_s) * (saved + earned)


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
    include_pinned: bool = False,
) -> list[Candidate]:
    """Put documents in the order in which they should go, victims first.

    Documents that someone paid to have stored come after all others; pinned ones are left out, or
    come last if they are included. Those whose going would free nothing come last among their
    like. Each comes with the `bytes` that its going frees once those before it are gone. The same
    candidates give the same order, however they are arranged.
    """
    return _Line(list(candidates), policy, now_s, input_nano_per_mtok).drain(include_pinned)


class _Line:
    """The documents that are still there, cheapest first; what goes changes what others free."""

    def __init__(
        self, candidates: Sequence[Candidate], policy: Policy, now_s: float, price: int
    ) -> None:
        self._candidates = candidates
        self._freed = [candidate.bytes for candidate in candidates]
        self._policy = policy
        self._values = [value_nano(candidate, now_s, price) for candidate in candidates]
        self._holders: dict[ChunkKey, set[int]] = defaultdict(set)
        for number, candidate in enumerate(candidates):
            for key, _ in candidate.shared:
                self._holders[key].add(number)
        for key in [key for key, holders in self._holders.items() if len(holders) == 1]:
            self._inherit(key)

    def drain(self, include_pinned: bool) -> list[Candidate]:
        """Take one after another; mutates."""
        heap = [
            (self._rank(number), number)
            for number, candidate in enumerate(self._candidates)
            if include_pinned or not candidate.pinned
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

    def _rank(self, number: int) -> tuple[bool, bool, bool, float, float, str]:
        candidate, freed = self._candidates[number], self._freed[number]
        classes = (candidate.pinned, candidate.paid_for, freed == 0)
        if self._policy == "lru":
            return *classes, candidate.last_used_s, 0.0, candidate.document_id
        worth = self._values[number] * lost_share(candidate, freed) / max(1, freed)
        return *classes, worth, candidate.last_used_s, candidate.document_id
