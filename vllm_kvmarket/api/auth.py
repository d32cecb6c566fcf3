"""Who sends a request, found by its API key, and how much each sender may send."""

from __future__ import annotations

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from fastapi.concurrency import run_in_threadpool

from vllm_kvmarket.api.bodies import Scope, header_values
from vllm_kvmarket.api.errors import BEARER, RETRY, ApiError, invalid, missing_key
from vllm_kvmarket.auth.api_keys import NO_LIMITS, PREFIX, KeyLimits, Keys, Principal
from vllm_kvmarket.auth.api_keys import Scope as KeyScope

ADMIN: KeyScope = "admin"
PUBLISHER: KeyScope = "publisher"
BUYER: KeyScope = "buyer"
MOST_CHECKS = 256
MOST_CALLERS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who sends a request: the owner of a key, or an anonymous client (no account).

    On the routes of vLLM it may also be the holder of an operator's token: then `operation` is
    what the connector is asked to do, with that token, or `account` is the token's account.
    """

    account: str | None = None
    scopes: frozenset[KeyScope] = frozenset()
    key_id: str | None = None
    limits: KeyLimits = NO_LIMITS
    operation: dict[str, Any] | None = None
    anonymous_may_read: bool = True

    @classmethod
    def of_key(cls, principal: Principal) -> Self:
        """The owner of a key."""
        return cls(
            account=principal.account,
            scopes=principal.scopes,
            key_id=principal.key_id,
            limits=principal.limits,
        )

    @property
    def is_anonymous(self) -> bool:
        """Whether neither an account nor the operator is known to send this."""
        return self.account is None and self.operation is None

    @property
    def is_admin(self) -> bool:
        """Whether the caller may do everything."""
        return ADMIN in self.scopes

    def may(self, *scopes: KeyScope) -> bool:
        """Whether the caller's key has one of these scopes."""
        return self.is_admin or not self.scopes.isdisjoint(scopes)

    def owns(self, account: str) -> bool:
        """Whether the caller may act for an account."""
        return self.is_admin or account == self.account

    def need(self, *scopes: KeyScope) -> str:
        """The caller's account, if its key has one of these scopes. Raises ApiError."""
        account = self.need_key()
        if not self.may(*scopes):
            raise ApiError(
                403,
                "scope_missing",
                f"this key may not do that; it needs the scope {' or '.join(scopes)}",
            )
        return account

    def need_key(self) -> str:
        """The caller's account. Raises ApiError for an anonymous one."""
        if self.account is None:
            raise missing_key("this needs an API key; send it as `Authorization: Bearer kvm_...`")
        return self.account

    def need_reader(self) -> None:
        """Refuse anonymous callers if the configuration says so. Raises ApiError."""
        if self.is_anonymous and not self.anonymous_may_read:
            raise missing_key("this server answers with a key only: Authorization: Bearer kvm_...")


def key_in(scope: Scope) -> str | None:
    """The API key in a request's headers, None if there is none of ours. Raises ApiError."""
    given = header_values(scope, "authorization") + header_values(scope, "x-api-key")
    # Another key may be there for vLLM's own --api-key.
    ours = {secret for value in given if (secret := _secret(value)).startswith(PREFIX)}
    if len(ours) > 1:
        raise invalid("the request names several API keys; send one", code="several_api_keys")
    return ours.pop() if ours else None


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

    Each of `server_count` processes grants its part of the rate. Bounded: the callers that were
    silent for longest are forgotten, and have a full bucket again.
    """

    def __init__(
        self,
        rate: Rate,
        clock: Callable[[], float] = time.monotonic,
        server_count: Callable[[], int] = lambda: 1,
    ) -> None:
        self._rate = rate
        self._clock = clock
        self._server_count = server_count
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, caller: str, *, take: bool = True) -> int:
        """Take one request out of a caller's bucket, or only look; mutates.

        Returns 0, or, if the bucket is empty, after how many whole seconds to come again.
        """
        now, servers = self._clock(), self._server_count()
        burst, per_s = max(1.0, self._rate.burst / servers), self._rate.per_s / servers
        left, at = self._buckets.pop(caller, (burst, now))
        left = min(burst, left + (now - at) * per_s)
        granted = left >= 1
        self._buckets[caller] = (left - (granted and take), now)
        if len(self._buckets) > MOST_CALLERS:
            self._buckets.popitem(last=False)
        return 0 if granted else max(1, math.ceil((1 - left) / per_s))

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
                headers=RETRY,
            )
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1


class KeyChecker:
    """Checks API keys, bounded and beside the event loop."""

    def __init__(self, keys: Keys, server_count: Callable[[], int] = lambda: 1) -> None:
        self._keys = keys
        self._wrong = Limiter(WRONG_KEYS, server_count=server_count)
        self._waiting = Queue(MOST_CHECKS, "the check of an API key")

    async def check(self, secret: str, address: str) -> Principal | None:
        """The owner of a key; None for a wrong one, which is counted for its sender's address.

        Raises ApiError after too many wrong ones, and KeysUnavailableError.
        """
        sender = counted_as(address)
        self._wrong.count(sender, take=False)
        with self._waiting.place():
            principal = await run_in_threadpool(self._keys.check, secret, address)
        if principal is None:
            self._wrong.wait_s(sender)
        return principal


def wrong_key() -> ApiError:
    """401: a sender with a wrong key is not anonymous, so public routes refuse it as well."""
    return ApiError(
        401,
        "invalid_api_key",
        "this API key is unknown, revoked, expired, or not for this network address",
        headers=BEARER,
    )


def _secret(value: str) -> str:
    scheme, _, rest = value.strip().partition(" ")
    return rest.strip() if scheme.lower() == "bearer" else value.strip()


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
