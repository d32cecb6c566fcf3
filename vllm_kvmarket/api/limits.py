"""Rate limits: a bucket of requests for each caller, refilled steadily."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MOST_CALLERS = 10_000


@dataclass(frozen=True, slots=True)
class Rate:
    """So many requests at once, and so many a second in the long run."""

    burst: int
    per_s: float


READS = Rate(burst=300, per_s=100)
# Quotes are tokenised, documents prefilled.
WRITES = Rate(burst=60, per_s=10)


class Limiter:
    """Counts requests by caller; used by one thread, an event loop's. Bounded: the callers that
    were not heard of for longest are forgotten, which only gives them a full bucket again.
    """

    def __init__(self, rate: Rate, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, caller: str) -> int:
        """Take one request out of a caller's bucket: 0, or, when it is empty, in how many whole
        seconds to come again. Mutates.
        """
        now = self._clock()
        left, at = self._buckets.pop(caller, (float(self._rate.burst), now))
        left = min(self._rate.burst, left + (now - at) * self._rate.per_s)
        granted = left >= 1
        self._buckets[caller] = (left - granted, now)
        if len(self._buckets) > MOST_CALLERS:
            self._buckets.popitem(last=False)
        return 0 if granted else max(1, math.ceil((1 - left) / self._rate.per_s))
