"""The moment for which the scheduler's thread may wait: only when the engine has nothing to run."""

from __future__ import annotations

import time
from collections.abc import Iterable

from vllm_kvmarket.market.purchase import Purchase, PurchaseState

# In each step. A reservation takes half of it on a local database; to ask again costs an idle
# engine a step without a forward pass, which takes 1.5 ms and more.
MOST_S = 0.001


class IdleTime:
    """Whether requests run, and how much of this step's moment is left."""

    def __init__(self) -> None:
        self._running: set[str] = set()
        self._left_s = MOST_S

    @property
    def is_idle(self) -> bool:
        """Whether the last step computed nothing for a request that still runs."""
        return not self._running

    def step_ended(self, scheduled: Iterable[str]) -> None:
        """Note the requests that have tokens in this step; mutates."""
        self._running = set(scheduled)
        self._left_s = MOST_S

    def request_ended(self, request_id: str) -> None:
        """Note that a request does not run any more; mutates."""
        self._running.discard(request_id)

    def wait_for(self, purchase: Purchase) -> None:
        """Wait a moment for the ledger's answer, where nobody else is kept waiting; mutates."""
        if self._running or self._left_s <= 0 or purchase.state() is not PurchaseState.RESERVING:
            return
        started_s = time.perf_counter()
        purchase.wait(self._left_s)
        self._left_s -= time.perf_counter() - started_s
