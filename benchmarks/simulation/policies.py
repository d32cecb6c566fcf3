"""Published online policies to hold ours against, over chunks; none of them is the market's.

  s3-fifo    three FIFO queues (Yang et al., SOSP 2023)
  w-tinylfu  a small window, admission by frequency, a segmented LRU (Einziger et al., 2017), with
             exact counts where the original has a sketch of them
  gdsf       frequency x cost, with ageing (Cherkasova, 1998)

Cost is what computing a path takes per chunk of it, alike for all of its chunks: were the last ones
dearer, the first ones would go before them and leave them useless. For the same reason a path's
chunks are taken up from its last to its first.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Container
from typing import Literal

from benchmarks.simulation.reads import Read
from vllm_kvmarket.catalogue.eviction_policy import recompute_tokens

Queue = OrderedDict[int, int]
Published = Literal["s3-fifo", "w-tinylfu", "gdsf"]


class S3Fifo:
    """A small queue for what is new, a main one for what was read again, a ghost of what went."""

    def __init__(self, budget: int) -> None:
        self._small_size = max(1, budget // 10)
        self._budget = budget
        self._small: Queue = OrderedDict()
        self._main: Queue = OrderedDict()
        self._ghost: Queue = OrderedDict()

    def read(self, number: int, read: Read) -> int:
        """See Store."""
        matched = _leading(read.path, (self._small, self._main))
        for chunk in reversed(read.path):
            for queue in (self._small, self._main):
                if chunk in queue:
                    queue[chunk] = min(3, queue[chunk] + 1)
                    break
            else:
                self._make_room()
                known = self._ghost.pop(chunk, None) is not None
                (self._main if known else self._small)[chunk] = 0
        return matched

    def _make_room(self) -> None:
        while len(self._small) + len(self._main) >= self._budget:
            if self._small and (len(self._small) >= self._small_size or not self._main):
                chunk, reads = self._small.popitem(last=False)
                if reads > 1:
                    self._main[chunk] = 0
                else:
                    self._ghost[chunk] = 0
                    if len(self._ghost) > self._budget:
                        self._ghost.popitem(last=False)
            else:
                chunk, reads = self._main.popitem(last=False)
                if reads:
                    self._main[chunk] = reads - 1


class WTinyLfu:
    """An entry that leaves the window enters the main part only if it is read more often."""

    def __init__(self, budget: int) -> None:
        self._window_size = max(1, budget // 100)
        self._main_size = max(0, budget - self._window_size)
        self._protected_size = self._main_size * 8 // 10
        self._window: Queue = OrderedDict()
        self._probation: Queue = OrderedDict()
        self._protected: Queue = OrderedDict()
        self._counts: Counter[int] = Counter()
        self._counted = 0
        self._halve_after = 10 * budget

    def read(self, number: int, read: Read) -> int:
        """See Store."""
        matched = _leading(read.path, (self._window, self._probation, self._protected))
        for chunk in reversed(read.path):
            self._count(chunk)
            if chunk in self._window:
                self._window.move_to_end(chunk)
            elif chunk in self._protected:
                self._protected.move_to_end(chunk)
            elif chunk in self._probation:
                self._promote(chunk)
            else:
                self._window[chunk] = 0
                if len(self._window) > self._window_size:
                    self._admit(self._window.popitem(last=False)[0])
        return matched

    def _count(self, chunk: int) -> None:
        self._counts[chunk] = min(15, self._counts[chunk] + 1)
        self._counted += 1
        if self._counted >= self._halve_after:
            self._counted //= 2
            self._counts = Counter({key: n // 2 for key, n in self._counts.items() if n > 1})

    def _promote(self, chunk: int) -> None:
        del self._probation[chunk]
        self._protected[chunk] = 0
        if len(self._protected) > self._protected_size:
            self._probation[self._protected.popitem(last=False)[0]] = 0

    def _admit(self, chunk: int) -> None:
        if len(self._probation) + len(self._protected) >= self._main_size:
            queue = self._probation or self._protected
            victim = next(iter(queue), None)
            if victim is None or self._counts[chunk] <= self._counts[victim]:
                return
            del queue[victim]
        self._probation[chunk] = 0


class Gdsf:
    """Greedy dual size frequency: chunks are of one size."""

    def __init__(self, budget: int, chunk_tokens: int) -> None:
        self._budget = budget
        self._chunk_tokens = chunk_tokens
        self._age = 0.0
        self._held: dict[int, tuple[int, float, float]] = {}
        self._heap: list[tuple[float, int, int]] = []
        self._turn = 0

    def read(self, number: int, read: Read) -> int:
        """See Store."""
        matched = _leading(read.path, (self._held,))
        cost = _cost(read, self._chunk_tokens)
        for chunk in reversed(read.path):
            reads, dearest, _ = self._held.get(chunk, (0, 0.0, 0.0))
            dearest = max(dearest, cost)
            rank = self._age + (reads + 1) * dearest
            self._held[chunk] = reads + 1, dearest, rank
            self._turn += 1
            heapq.heappush(self._heap, (rank, self._turn, chunk))
        while len(self._held) > self._budget:
            rank, _, chunk = heapq.heappop(self._heap)
            if chunk in self._held and self._held[chunk][2] == rank:
                del self._held[chunk]
                self._age = rank
        return matched


def published(policy: Published, budget: int, chunk_tokens: int) -> S3Fifo | WTinyLfu | Gdsf:
    """Make the store of a published policy."""
    if policy == "s3-fifo":
        return S3Fifo(budget)
    if policy == "w-tinylfu":
        return WTinyLfu(budget)
    return Gdsf(budget, chunk_tokens)


def _cost(read: Read, chunk_tokens: int) -> float:
    return recompute_tokens(len(read.path) * chunk_tokens) / (len(read.path) * chunk_tokens)


def _leading(path: tuple[int, ...], held: tuple[Container[int], ...]) -> int:
    for depth, chunk in enumerate(path):
        if not any(chunk in each for each in held):
            return depth
    return len(path)
