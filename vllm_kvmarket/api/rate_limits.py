"""Rate limits: a bucket of requests for each caller, refilled steadily."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from vllm_kvmarket.api.errors import ApiError

MOST_CALLERS = 10_000


@dataclass(frozen=True, slots=True)
class Rate:
    """At most `burst` requests at once, and `per_s` a second in the long run."""

    burst: int
    per_s: float


READS = Rate(burst=300, per_s=100)
# Quotes are tokenised, documents prefilled.
WRITES = Rate(burst=60, per_s=10)


class Limiter:
    """Counts requests by caller. For one thread, the event loop's.

    Bounded: the callers that were silent for longest are forgotten, and have a full bucket again.
    """

    def __init__(self, rate: Rate, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, caller: str) -> int:
        """Take one request out of a caller's bucket; mutates.

        Returns 0, or, if the bucket is empty, after how many whole seconds to come again.
        """
        now = self._clock()
        left, at = self._buckets.pop(caller, (float(self._rate.burst), now))
        left = min(self._rate.burst, left + (now - at) * self._rate.per_s)
        granted = left >= 1
        self._buckets[caller] = (left - granted, now)
        if len(self._buckets) > MOST_CALLERS:
            self._buckets.popitem(last=False)
        return 0 if granted else max(1, math.ceil((1 - left) / self._rate.per_s))

    def count(self, caller: str) -> None:
        """Count one request of a caller; mutates. Raises ApiError for one too many."""
        wait_s = self.wait_s(caller)
        if wait_s:
            raise ApiError(
                429,
                "rate_limit_exceeded",
                f"too many requests; come again in {wait_s} s",
                headers={"retry-after": str(wait_s)},
            )
