"""The scheduler half's counts: requests, money, the ledger, documents."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial

from vllm_kvmarket.connector.metrics import MarketStats, Tally
from vllm_kvmarket.ledger import PROVIDER, Result
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.market.purchase import Purchase, Usage, is_booked

_QUEUE = "ledger_queue_batches"


class SchedulerMetrics:
    """Counts for one engine; thread-safe. Nothing but `look` waits for disk or database."""

    def __init__(self, market: Market) -> None:
        self._market = market
        self._tally = Tally()
        # While the engine tests itself nobody would see what is taken.
        self.are_held = False
        market.ledger.on_commit(partial(self._tally.took, "ledger_commit_seconds"))

    # Requests

    def declined(self, reason: str) -> None:
        """A request matched and may not reuse it; `reason` is one of DECLINED."""
        self._tally.count("declined_requests", reason)

    def used(self, usage: Usage, *, declined: bool) -> None:
        """A request has ended. One without a token of output may not have been computed yet."""
        if not usage.matched:
            return
        amounts = {"matched_tokens": usage.matched}
        if usage.reused:
            amounts |= {"reused_tokens": usage.reused, "loaded_tokens": usage.loaded}
        missed = usage.matched - usage.reused
        if missed and usage.output:
            if declined:
                amounts["recomputed_tokens/declined"] = missed
            else:
                amounts["recomputed_tokens/failed"] = usage.failed
                amounts["recomputed_tokens/other"] = missed - usage.failed
        self._tally.add(amounts)

    # Money: only what the ledger says it has booked

    def bought(self, purchase: Purchase) -> None:
        """Count a settled purchase when the ledger has booked it."""
        assert purchase.settled is not None
        purchase.settled.add_done_callback(partial(self._answered, purchase))

    def _answered(self, purchase: Purchase, settled: Future[list[Result]]) -> None:
        booked = is_booked(settled)
        if booked is False:
            self._tally.count("charges_refused")
        elif booked:
            amounts = {f"charged_nano/{purchase.item.code}": purchase.charge_nano}
            if purchase.receipt is not None:
                amounts |= {"receipts": 1, "royalties_nano": purchase.receipt.royalty_nano}
            self._tally.add(amounts)

    # What is there

    def look(self) -> None:
        """Take the gauges that wait for disk or database; not on the scheduler's thread.

        Raises LedgerError and StoreError, with what could be taken noted.
        """
        catalogue, ledger = self._market.catalogue, self._market.ledger
        self._tally.stand_at(
            {
                "documents": catalogue.index.documents,
                "chunks": catalogue.index.chunks,
                _QUEUE: ledger.queue_depth,
            }
        )
        try:
            self._look_at_store()
        finally:
            provider = ledger.account(PROVIDER)
            self._tally.stand_at(
                {
                    "provider_balance_nano": provider.balance_nano,
                    "reserved_nano": provider.credits_pending,
                }
            )

    def _look_at_store(self) -> None:
        disk = self._market.store.disk
        quarantined = sum(entry.bytes for entry in disk.quarantined())
        self._tally.stand_at(
            {
                "stored_bytes/chunks": max(0, disk.bytes_counted() - quarantined),
                "stored_bytes/quarantine": quarantined,
            }
        )

    def self_tested(self, *, passed: bool) -> None:
        """Note the verdict on this engine, which serves from now on. Mutates."""
        self.are_held = False
        self._tally.stand_at({"self_test_passed": int(passed)})

    def pinned(self, blocks: int) -> None:
        """Note how many blocks pinned documents use now."""
        self._tally.stand_at({"pinned_blocks": blocks})

    # On its way to vLLM

    @property
    def has_news(self) -> bool:
        """Whether `take` would return something."""
        return self._tally.has_news and not self.are_held

    def take(self) -> MarketStats | None:
        """The counts since the last call; None, at once, when there are none."""
        if not self.has_news:
            return None
        self._tally.stand_at({_QUEUE: self._market.ledger.queue_depth})
        return self._tally.take()
