"""What accounts could spend when this process last wrote the ledger, and what of theirs waits.

A purchase may go on while its hold becomes durable if the account's funds cover it amply: all that
waits for this account in this process, the purchase included, is at most a tenth of what the
account had available after the last group that named it, a minute ago at most. Several engines
look at one account at the same time, so that the sum may be refused: then the sale is booked as the
account's debt. With n engines that is at most n tenths of what the account had.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from vllm_kvmarket.ledger.model import Account

PART = 10
MOST_AGE_S = 60.0
MOST_ACCOUNTS = 50_000


class KnownFunds:
    """Thread-safe; nothing here waits for the database."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._known: dict[str, tuple[int, float]] = {}
        self._waiting_nano: dict[str, int] = {}
        self._lock = threading.Lock()

    def learn(self, accounts: Iterable[Account]) -> None:
        """Take in accounts as a group that is committed has left them; mutates."""
        now_s = self._monotonic()
        with self._lock:
            if len(self._known) > MOST_ACCOUNTS:
                self._known.clear()
            for account in accounts:
                if account.kind == "buyer":
                    self._known[account.id] = account.available_nano, now_s

    def take(self, account_id: str, amount_nano: int) -> bool:
        """Whether an amount is amply covered; if so, it waits until `end`. Mutates."""
        with self._lock:
            available_nano, at_s = self._known.get(account_id, (0, 0.0))
            waiting_nano = self._waiting_nano.get(account_id, 0) + amount_nano
            if waiting_nano * PART > available_nano or self._monotonic() - at_s > MOST_AGE_S:
                return False
            self._waiting_nano[account_id] = waiting_nano
            return True

    def end(self, account_id: str, amount_nano: int, *, answered: bool) -> None:
        """The ledger answered for an amount that was taken, or it did not; mutates.

        Without an answer nothing is known any more: the next purchases wait.
        """
        with self._lock:
            left_nano = self._waiting_nano.pop(account_id) - amount_nano
            if left_nano:
                self._waiting_nano[account_id] = left_nano
            if not answered:
                self._known.pop(account_id, None)
