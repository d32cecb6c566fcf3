"""Sessions of people who signed in on the pages: in this process's memory, and bounded.

A cookie holds 256 random bits; what is kept of them is a digest. It holds no key, and the key is
looked at again for every page: revoked, it ends the session.
"""

from __future__ import annotations

import hmac
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from blake3 import blake3

from vllm_kvmarket.api.rate_limits import Limiter, Rate
from vllm_kvmarket.auth.api_keys import Keys, Principal

LIFETIME_S = 8 * 3600.0
IDLE_S = 3600.0
MOST_SESSIONS = 10_000
MOST_OF_A_KEY = 50
# Nobody guesses 256 bits; this keeps trying from costing the server anything.
SIGN_INS = Rate(burst=20, per_s=0.2)

_CONTEXT = b"kvmarket session 1\0"


@dataclass(slots=True)
class Session:
    """One browser's: whose key it was opened with, and the token of its forms."""

    account: str
    key_id: str
    csrf: str
    ends_at_s: float
    idle_at_s: float


class Sessions:
    """The sessions of one server process; thread-safe.

    The oldest go first when there are too many, of one key or in all: whoever has them signs in
    again. Times are of `clock`, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._open: OrderedDict[bytes, Session] = OrderedDict()
        # Asked by the event loop alone.
        self.attempts = Limiter(SIGN_INS)

    def open(self, principal: Principal) -> str:
        """Begin a session; the cookie's value, known to nobody before. Mutates."""
        value = secrets.token_urlsafe(32)
        now_s = self._clock()
        made = Session(
            account=principal.account,
            key_id=principal.key_id,
            csrf=secrets.token_urlsafe(32),
            ends_at_s=now_s + LIFETIME_S,
            idle_at_s=now_s + IDLE_S,
        )
        with self._lock:
            self._make_room(principal.key_id)
            self._open[_digest(value)] = made
        return value

    def find(self, value: str, keys: Keys) -> tuple[Session, Principal] | None:
        """The session of a cookie, with what its key may do now; None when it is over, or the key
        ended. Raises KeysUnavailableError.
        """
        digest = _digest(value)
        now_s = self._clock()
        with self._lock:
            found = self._open.get(digest)
            if found is not None and now_s >= min(found.ends_at_s, found.idle_at_s):
                del self._open[digest]
                found = None
        if found is None:
            return None
        principal = keys.principal(found.key_id)
        if principal is None:
            self.close(value)
            return None
        found.idle_at_s = now_s + IDLE_S
        return found, principal

    def close(self, value: str) -> None:
        """End a session; mutates. One that is not there is ended already."""
        with self._lock:
            self._open.pop(_digest(value), None)

    def __len__(self) -> int:
        with self._lock:
            return len(self._open)

    def _make_room(self, key_id: str) -> None:
        own = [digest for digest, each in self._open.items() if each.key_id == key_id]
        for digest in own[: max(0, len(own) - MOST_OF_A_KEY + 1)]:
            del self._open[digest]
        while len(self._open) >= MOST_SESSIONS:
            self._open.popitem(last=False)


def same(one: str, other: str) -> bool:
    """Whether two tokens are the same; takes as long for any two."""
    return hmac.compare_digest(one.encode(), other.encode())


def _digest(value: str) -> bytes:
    return blake3(_CONTEXT + value.encode()).digest()
