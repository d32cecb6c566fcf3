"""Work that an engine does for its market every few seconds, in one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from vllm.logger import init_logger

from vllm_kvmarket.connector.scheduler_metrics import SchedulerMetrics
from vllm_kvmarket.market.garbage_collection import purge
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.proofs import TransparencyLog

INTERVAL_S = 2.0

logger = init_logger("vllm.kvmarket.housekeeping")


class Housekeeping:
    """Expires overdue reservations, writes down what was used, signs the log, and takes the metrics
    that wait for disk or database.
    """

    def __init__(
        self, market: Market, metrics: SchedulerMetrics, interval_s: float = INTERVAL_S
    ) -> None:
        self._market = market
        self._interval_s = interval_s
        self._chores: dict[str, Callable[[], object]] = {
            "expiring reservations": market.ledger.expire_pending,
            "noting uses": market.flush_uses,
            "removing old documents' tokens": partial(purge, market),
            "signing the log": TransparencyLog.of(market).keep_signed,
            "taking metrics": metrics.look,
        }
        self._problems: dict[str, str] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvmarket-housekeeping", daemon=True)

    def start(self) -> None:
        """Begin; the first round starts at once, in the thread."""
        self._thread.start()

    def do_all(self) -> None:
        """Do every chore once; what fails is logged, and tried again next time."""
        for name, chore in self._chores.items():
            try:
                chore()
            except Exception as error:  # noqa: BLE001  # one chore that fails must not end the others
                problem = f"{type(error).__name__}: {error}"
                if self._problems.get(name) != problem:
                    logger.warning("kvmarket: %s did not work: %s", name, problem)
                self._problems[name] = problem
            else:
                self._problems.pop(name, None)

    def close(self) -> None:
        """Stop, once the chore under way is done."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            self.do_all()
            if self._closing.wait(self._interval_s):
                return
