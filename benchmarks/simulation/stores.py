"""Stores with a budget of chunks: our own eviction, and what it is held against.

Every store answers a read with the number of leading chunks that it had, and keeps the whole path
afterwards if it can.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.simulation.reads import Read, Workload
from vllm_kvmarket.catalogue import eviction_policy
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.core.pricing import Tariff

NEVER = 2**62
# An order serves until so much of the budget has gone by it; making one for each victim would take
# the simulation hours. What was used meanwhile is passed over.
ORDER_SERVES = 0.05


class Store(Protocol):
    """A store that reads are replayed on."""

    def read(self, number: int, read: Read) -> int:
        """Serve the read of that number; returns how many of its leading chunks were there."""
        ...


@dataclass(slots=True)
class Held:
    """A document that is there; `score` and `last_used_s` as in the catalogue's listing_use."""

    name: str
    path: tuple[int, ...]
    score: float
    last_used_s: float
    first_used_s: float
    uses: int = 0
    earned_nano: int = 0


class DocumentStore:
    """The market's: whole documents, evicted by its own order.

    A chunk's number says what lies before it, so a read matches its leading chunks that are there;
    the first document that had the last of them is used.
    """

    def __init__(
        self, policy: eviction_policy.Policy, budget: int, chunk_tokens: int, tariff: Tariff
    ) -> None:
        self._policy = policy
        self._budget = budget
        self._chunk_tokens = chunk_tokens
        self._tariff = tariff
        self._held: dict[str, Held] = {}
        # The catalogue keeps the listings of documents that went, and what it knows of their use.
        self._gone: dict[tuple[int, ...], Held] = {}
        self._holders: Counter[int] = Counter()
        # Each chunk's documents, the first on top; some may have gone.
        self._line_up: dict[int, list[int]] = defaultdict(list)
        self._line: Iterator[eviction_policy.Candidate] = iter(())
        self._ordered_at_s = 0.0
        self._by_this_order = 0

    @property
    def used(self) -> int:
        """Chunks that are there."""
        return len(self._holders)

    def read(self, number: int, read: Read) -> int:
        """See Store."""
        matched, payee = _leading(read.path, self._holders), None
        if matched:
            payee = self._first_with(read.path[matched - 1])
            self._note_use(self._held[payee], matched, read)
        missing = len(read.path) - matched
        if missing and self._make_room(missing, payee, read.at_s):
            self._publish(f"{number}", read)
        return matched

    def _first_with(self, chunk: int) -> str:
        line = self._line_up[chunk]
        while f"{line[0]}" not in self._held:
            heapq.heappop(line)
        return f"{line[0]}"

    def _note_use(self, held: Held, matched: int, read: Read) -> None:
        tokens, whole = matched * self._chunk_tokens, len(held.path) * self._chunk_tokens
        share = eviction_policy.recompute_tokens(tokens) / eviction_policy.recompute_tokens(whole)
        held.score, held.last_used_s = eviction_policy.reused(
            held.score, held.last_used_s, share, read.at_s
        )
        terms = self._tariff.terms(
            ListingTerms(cache_read_nano_per_mtok=read.cache_read_nano_per_mtok)
        )
        charge = terms.charge_nano(tokens)
        held.uses += 1
        held.earned_nano += charge - terms.royalty_nano(charge)

    def _publish(self, name: str, read: Read) -> None:
        for chunk in read.path:
            heapq.heappush(self._line_up[chunk], int(name))
        held = self._gone.pop(read.path, None)
        if held is None:
            held = Held(name, read.path, 1.0, read.at_s, read.at_s)
        else:
            held.name = name
            held.score, held.last_used_s = eviction_policy.reused(
                held.score, held.last_used_s, 1.0, read.at_s
            )
        self._held[name] = held
        self._holders.update(read.path)

    def _make_room(self, missing: int, protected: str | None, now_s: float) -> bool:
        if missing > self._budget:
            return False
        again = False
        while self.used + missing > self._budget:
            victim = next(self._line, None)
            if victim is None or self._by_this_order > ORDER_SERVES * self._budget:
                if again and victim is None:
                    return False
                again = True
                self._line = iter(self._order(now_s))
                self._ordered_at_s, self._by_this_order = now_s, 0
                continue
            held = self._held.get(victim.document_id)
            if held is None or held.name == protected or held.last_used_s > self._ordered_at_s:
                continue
            self._by_this_order += self._remove(held)
        return True

    def _remove(self, held: Held) -> int:
        """Let a document go; returns how many chunks that freed."""
        self._gone[held.path] = self._held.pop(held.name)
        freed = 0
        for chunk in held.path:
            self._holders[chunk] -= 1
            if not self._holders[chunk]:
                del self._holders[chunk], self._line_up[chunk]
                freed += 1
        return freed

    def _order(self, now_s: float) -> list[eviction_policy.Candidate]:
        candidates = [self._candidate(held) for held in self._held.values()]
        return eviction_policy.order(
            candidates,
            self._policy,
            now_s,
            input_nano_per_mtok=self._tariff.input_nano_per_mtok,
        )

    def _candidate(self, held: Held) -> eviction_policy.Candidate:
        # Behind one another, chunks with as many holders have the same holders: one part of them.
        own = 0
        parts: dict[int, tuple[int, int]] = {}
        for chunk in held.path:
            holders = self._holders[chunk]
            if holders == 1:
                own += 1
            else:
                first, size = parts.get(holders, (chunk, 0))
                parts[holders] = first, size + 1
        return eviction_policy.Candidate(
            document_id=held.name,
            bytes=own,
            tokens=len(held.path) * self._chunk_tokens,
            score=held.score,
            last_used_s=held.last_used_s,
            first_used_s=held.first_used_s,
            earned_nano=held.earned_nano,
            uses=held.uses,
            shared=tuple((b"%d" % first, size) for first, size in parts.values()),
        )


class ChunkLru:
    """Chunks, least recently used first and a path's last before its first: what engines do."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._chunks: OrderedDict[int, None] = OrderedDict()

    def read(self, number: int, read: Read) -> int:  # as of Store
        """See Store."""
        matched = _leading(read.path, self._chunks)
        for chunk in reversed(read.path):
            self._chunks[chunk] = None
            self._chunks.move_to_end(chunk)
        while len(self._chunks) > self._budget:
            self._chunks.popitem(last=False)
        return matched


class Belady:
    """Knows the future: keeps the chunks that are read again soonest; no store hits more chunks.

    What is read later, and behind it in the path, goes first; what is never read again is not kept.
    """

    def __init__(self, workload: Workload, budget: int) -> None:
        self._budget = budget
        self._following = following_reads(workload.reads)
        self._chunks: dict[int, int] = {}
        self._farthest: list[tuple[int, int, int]] = []

    def read(self, number: int, read: Read) -> int:
        """See Store."""
        matched = _leading(read.path, self._chunks)
        following = self._following[number]
        for depth, (chunk, next_read) in enumerate(zip(read.path, following, strict=True)):
            if next_read == NEVER:
                self._chunks.pop(chunk, None)
            else:
                self._chunks[chunk] = next_read
                heapq.heappush(self._farthest, (-next_read, -depth, chunk))
        while len(self._chunks) > self._budget:
            next_read, _, chunk = heapq.heappop(self._farthest)
            if self._chunks.get(chunk) == -next_read:
                del self._chunks[chunk]
        return matched


def following_reads(reads: Sequence[Read]) -> list[list[int]]:
    """Say for each chunk of each read which read has it next, NEVER for none."""
    upcoming: dict[int, int] = defaultdict(lambda: NEVER)
    following: list[list[int]] = []
    for number in range(len(reads) - 1, -1, -1):
        following.append([upcoming[chunk] for chunk in reads[number].path])
        for chunk in reads[number].path:
            upcoming[chunk] = number
    following.reverse()
    return following


def _leading(path: tuple[int, ...], chunks: OrderedDict[int, None] | dict[int, int]) -> int:
    for depth, chunk in enumerate(path):
        if chunk not in chunks:
            return depth
    return len(path)
