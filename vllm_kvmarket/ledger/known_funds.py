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
from concurrent.futures import Future

from vllm_kvmarket.ledger.model import Account, Outcome, Result

ABOUT_FUNDS = (Outcome.OK, Outcome.EXISTS, Outcome.EXCEEDS_CREDITS)
PART = 10
MOST_AGE_S = 60.0
MOST_ACCOUNTS = 50_000


class KnownFunds:
    """Thread-safe; nothing here waits for the database."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._known: dict[str, tuple[Account, float]] = {}
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
                    self._known[account.id] = account, now_s

    def take(self, account_id: str, amount_nano: int, currency: str) -> bool:
        """Whether an amount is amply covered, in this currency; if so, it waits until `end`.
        Mutates.
        """
        with self._lock:
            account, at_s = self._known.get(account_id, (None, 0.0))
            if account is None or account.currency != currency:
                return False
            waiting_nano = self._waiting_nano.get(account_id, 0) + amount_nano
            is_old = self._monotonic() - at_s > MOST_AGE_S
            if waiting_nano * PART > account.available_nano or is_old:
                return False
            self._waiting_nano[account_id] = waiting_nano
            return True

    def available_nano(self, account_id: str) -> int | None:
        """What an account could spend at last, less what waits; None where that is not known."""
        with self._lock:
            account, at_s = self._known.get(account_id, (None, 0.0))
            if account is None or self._monotonic() - at_s > MOST_AGE_S:
                return None
            return max(0, account.available_nano - self._waiting_nano.get(account_id, 0))

    def end(self, account_id: str, amount_nano: int, answer: Future[list[Result]]) -> None:
        """The ledger answered for an amount that was taken, or it did not; mutates.

        If the answer is not about funds, nothing is known any more: the next purchases wait.
        """
        is_known = answer.exception() is None and answer.result()[0].outcome in ABOUT_FUNDS
        with self._lock:
            left_nano = self._waiting_nano.pop(account_id) - amount_nano
            if left_nano:
                self._waiting_nano[account_id] = left_nano
            if not is_known:
                self._known.pop(account_id, None)
