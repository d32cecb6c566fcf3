"""Limits: how many requests a caller may send, and how many may wait for the same thing."""

from __future__ import annotations

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from vllm_kvmarket.api.bodies import Scope, header_values
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
# Nobody guesses 256 bits, but each wrong key costs a look into the database.
WRONG_KEYS = Rate(burst=20, per_s=1)


class Limiter:
    """Counts requests by caller. For one thread, the event loop's.

    Bounded: the callers that were silent for longest are forgotten, and have a full bucket again.
    """

    def __init__(self, rate: Rate, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, caller: str, *, take: bool = True) -> int:
        """Take one request out of a caller's bucket, or only look; mutates.

        Returns 0, or, if the bucket is empty, after how many whole seconds to come again.
        """
        now = self._clock()
        left, at = self._buckets.pop(caller, (float(self._rate.burst), now))
        left = min(self._rate.burst, left + (now - at) * self._rate.per_s)
        granted = left >= 1
        self._buckets[caller] = (left - (granted and take), now)
        if len(self._buckets) > MOST_CALLERS:
            self._buckets.popitem(last=False)
        return 0 if granted else max(1, math.ceil((1 - left) / self._rate.per_s))

    def count(self, caller: str, *, take: bool = True) -> None:
        """Count one request of a caller, or only look; mutates. Raises ApiError at the limit."""
        wait_s = self.wait_s(caller, take=take)
        if wait_s:
            raise ApiError(
                429,
                "rate_limit_exceeded",
                f"too many requests; come again in {wait_s} s",
                headers={"retry-after": str(wait_s)},
            )


class Queue:
    """Bounds how many requests wait for one thing. For one thread, the event loop's."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._inside = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place in the queue; mutates. Raises ApiError if there is none."""
        if self._inside >= self._most:
            raise ApiError(
                503,
                "server_busy",
                f"{self._most} requests wait for {self._name} already; come again later",
                headers={"retry-after": "5"},
            )
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1


def sender_address(scope: Scope, trusted_proxies: Sequence[str]) -> str:
    """The network address of a request's sender; "" if there is none.

    Behind trusted proxies it is the last address that they added and that is not theirs.
    """
    client = scope.get("client")
    last = client[0] if client else ""
    networks = [ipaddress.ip_network(each, strict=False) for each in trusted_proxies]
    forwarded = [
        each.strip()
        for value in header_values(scope, "x-forwarded-for")
        for each in value.split(",")
    ]
    address = _parsed(last)
    while forwarded and address is not None and any(address in each for each in networks):
        address = _parsed(forwarded.pop())
    return last if address is None else str(address)


def counted_as(address: str) -> str:
    """The name under which an address is counted.

    One customer usually has a whole /64 network of IPv6 addresses.
    """
    parsed = _parsed(address)
    if parsed is None or parsed.version == 4:
        return address
    return str(ipaddress.ip_network((parsed, 64), strict=False))


def _parsed(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if address.version == 6 else None
    return mapped or address
