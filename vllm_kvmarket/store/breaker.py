"""A circuit breaker: a store that does not answer costs one deadline, and not one a chunk."""

from __future__ import annotations

import threading
import time

FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 60.0


class Breaker:
    """Whether a store may be asked just now; thread-safe.

    After a call that was not answered, none may be made for a while; then one, as a probe, and if
    that is not answered either, none for twice as long.
    """

    def __init__(self, first_pause_s: float = FIRST_PAUSE_S) -> None:
        self._first_pause_s = first_pause_s
        self._pause_s = 0.0
        self._until_s = 0.0
        self._probing = False
        self._lock = threading.Lock()

    def enter(self) -> float:
        """Ask for a call: how many seconds it must be put off, 0 when it may be made.

        Whoever may make it must call `answered` or `failed` afterwards.
        """
        with self._lock:
            if self._pause_s == 0.0:
                return 0.0
            left = self._until_s - time.monotonic()
            if left > 0:
                return left
            if self._probing:
                return self._pause_s
            self._probing = True
            return 0.0

    def answered(self) -> None:
        """The store answered a call, be it with a refusal."""
        with self._lock:
            self._pause_s = 0.0
            self._probing = False

    def failed(self) -> None:
        """The store did not answer a call."""
        with self._lock:
            now_s = time.monotonic()
            # Calls that were under way together fail together: they make one pause.
            if self._probing or now_s >= self._until_s:
                doubled = min(2 * self._pause_s, LONGEST_PAUSE_S)
                self._pause_s = max(self._first_pause_s, doubled)
                self._until_s = now_s + self._pause_s
            self._probing = False
