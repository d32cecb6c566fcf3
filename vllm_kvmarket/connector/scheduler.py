"""The scheduler half: match, reserve, hand out load and save plans, settle.

It lives in the engine core and never waits: the catalogue's match is in memory; the ledger, the
catalogue's writes and what it matches in the database are futures that it polls.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_kvmarket.catalogue import Match
from vllm_kvmarket.connector import request_params as wishes
from vllm_kvmarket.connector.answers import ANSWERED, answer_of, is_answered
from vllm_kvmarket.connector.audit_requests import audit_plan, audit_record, start_auditing
from vllm_kvmarket.connector.database_lookups import Lookup, Lookups
from vllm_kvmarket.connector.housekeeping import Housekeeping
from vllm_kvmarket.connector.messages import ChunkPrefetch, Instructions, WorkerReport
from vllm_kvmarket.connector.namespaces import Namespaces
from vllm_kvmarket.connector.pins import PinnedBlocks
from vllm_kvmarket.connector.publish_requests import EngineFacts, begun, save_plan, start_publishing
from vllm_kvmarket.connector.purchases import Purchases
from vllm_kvmarket.connector.request_state import Decision, RequestState
from vllm_kvmarket.connector.scheduler_metrics import SchedulerMetrics
from vllm_kvmarket.core.config import MarketConfig
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.market.purchase import PurchaseState

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.kvmarket.scheduler")


class SchedulerHalf:
    """Owns every request's state and purchase; called on the scheduler's thread only."""

    def __init__(self, vllm_config: VllmConfig, config: MarketConfig, engine: EngineFacts) -> None:
        self._market = Market.open(config=config)
        self._market.catalogue.watch(config.refresh_interval_s)
        self._market.store.sweep_temporary()
        self._market.catalogue.fail_abandoned()
        self.metrics = SchedulerMetrics(self._market)
        # Its first round expires what an engine that died had reserved.
        self._housekeeping = Housekeeping(self._market, self.metrics)
        self._housekeeping.start()
        self._namespaces = Namespaces(vllm_config, self._market.home)
        self._config = config
        self._purchases = Purchases(
            self._market, engine.id, str(vllm_config.model_config.model), metrics=self.metrics
        )
        self._engine = engine
        self._block_tokens = engine.block_tokens
        self.pins = PinnedBlocks(
            config.pin_budget, vllm_config.model_config.max_model_len, engine.block_tokens
        )
        self._waiting: dict[str, bool] = {}
        self._renew_at_s = time.monotonic()
        self._states: dict[str, RequestState] = {}
        self._saving: dict[str, RequestState] = {}
        self._bypass: list[Request] = []
        self._lookups = Lookups(self._market.catalogue)
        self._uncached: list[Request] = []
        self._next = Instructions()

    def close(self) -> None:
        """Release what is still reserved, finish the ledger's and the catalogue's work."""
        self._purchases.close()
        self._housekeeping.close()
        self._market.close()

    # Arrival

    def on_new_request(self, request: Request) -> None:
        """Match the request and start its reservation or its publishing."""
        wish = wishes.read(
            request.kv_transfer_params,
            self._market.credentials,
            trusted=self._config.trust_requests is not False,
        )
        namespace = self._namespaces.of(request.lora_request)
        tokens = request.prompt_token_ids
        match: Match | None = None
        if namespace is not None and tokens is not None and not request.mm_features:
            match = self._market.catalogue.match(namespace, tokens)
            if self._lookups.begin(request, wish, namespace, match):
                return
        self._admit(request, wish, namespace, match)

    def _admit(
        self, request: Request, wish: wishes.Wish, namespace: bytes | None, match: Match | None
    ) -> None:
        """Start what the request asks for, now that it is known what it matches; mutates both."""
        if match is not None and not self._market.is_sold(match):
            if isinstance(wish, wishes.RequestParams) and wish.account is not None:
                self.metrics.declined("below_minimum")
            match = None
        if match is None and wish is wishes.NOTHING:
            return
        state = RequestState(
            request_id=request.request_id,
            prompt_tokens=request.num_prompt_tokens,
            decision=Decision.REUSE,
            match=match,
            limit=match.token_count if match else 0,
        )
        self._states[request.request_id] = state
        if isinstance(wish, wishes.Declined):
            self._recompute(state, request, wish.told, wish.reason)
            return
        state.is_operators = wish.is_operators
        if wish.publish is not None:
            start_publishing(
                self._market,
                state,
                request,
                wish=wish.publish,
                namespace=namespace,
                engine=self._engine,
            )
        elif wish.audit is not None:
            start_auditing(
                state,
                request,
                wish=wish.audit,
                namespace=namespace,
                block_tokens=self._block_tokens,
                chunk_tokens=self._config.chunk_tokens,
            )
        elif not wish.preload:
            self._buy(state, request, wish)
        if match is not None and state.decision is not Decision.RECOMPUTE:
            self._waiting[request.request_id] = False

    def _buy(self, state: RequestState, request: Request, wish: wishes.RequestParams) -> None:
        if state.match is None:
            return
        if wish.account is None:
            if self._config.without_account == "recompute":
                self._recompute(state, request, "the request names no account", "no_account")
            return
        if wish.max_price_nano is not None:
            most = min(state.match.token_count, request.num_prompt_tokens - 1)
            if self._market.terms_of(state.match).charge_nano(most) > wish.max_price_nano:
                self._recompute(state, request, wishes.NOT_WANTED["max_price"], "max_price")
                return
        state.purchase = self._purchases.join(request, wish.account, state.match)
        state.match = state.purchase.match
        state.limit = state.match.token_count
        state.decision = Decision.PENDING

    def _recompute(self, state: RequestState, request: Request, told: str, reason: str) -> None:
        state.declined = told
        if state.match is not None and state.decision is not Decision.RECOMPUTE:
            self.metrics.declined(reason)
        state.decision = Decision.RECOMPUTE
        if state.match is not None:
            # What was published must not be had for nothing from vLLM's own prefix cache either.
            request.skip_reading_prefix_cache = True

    def _looked_up(self, request: Request, lookup: Lookup) -> bool:
        """Go on with a request once the database has answered; False: ask again. Mutates."""
        if not lookup.future.done():
            return False
        self._lookups.end(request.request_id)
        match, could_be_asked = lookup.match()
        self._admit(request, lookup.wish, lookup.namespace, match)
        if not could_be_asked and not lookup.is_operators:
            if (state := self._states.get(request.request_id)) is not None:
                self._recompute(state, request, "what is on offer could not be looked up", "")
            # It may have been published, and must not be had for nothing either.
            request.skip_reading_prefix_cache = True
        if request.skip_reading_prefix_cache:
            # vLLM has looked its prefix cache up already, and would take what it found: it learns
            # of it before it asks again.
            request.skip_reading_prefix_cache = False
            self._uncached.append(request)
            return False
        return True

    # Scheduling

    def num_external_tokens(self, request: Request, local: int) -> tuple[int | None, bool]:
        """Tokens to load behind the `local` ones, and whether asynchronously; None: ask again."""
        lookup = self._lookups.of(request.request_id)
        if lookup is not None and not self._looked_up(request, lookup):
            return None, False
        state = self._states.get(request.request_id)
        if state is None:
            return 0, False
        if state.publishing is not None and state.decision is Decision.PENDING:
            # Nothing is computed for a document that could not be listed afterwards.
            problem = begun(state.publishing)
            if problem is None:
                return None, False
            state.declined = problem
            state.decision = Decision.REUSE
        if state.match is None:
            return 0, False
        if state.decision is Decision.PENDING:
            assert state.purchase is not None
            purchase_state = state.purchase.state()
            if purchase_state is PurchaseState.RESERVING:
                return None, False
            if purchase_state is PurchaseState.REFUSED:
                # vLLM has looked its prefix cache up already: turn that off and be asked again.
                self._bypass.append(request)
                return None, False
            state.decision = Decision.REUSE
        if state.decision is Decision.RECOMPUTE or request.skip_reading_prefix_cache:
            return 0, False
        # At least one token must be computed, or there is nothing to sample from.
        external = state.external_tokens(local, request.num_tokens - 1)
        return external, external > 0

    def allocated(self, request: Request, blocks: KVCacheBlocks, external: int) -> None:
        """Plan the load into the blocks that the scheduler has just given the request."""
        state = self._states.get(request.request_id)
        if state is None or state.match is None:
            return
        self._waiting.pop(request.request_id, None)
        if not state.admitted(external):
            return
        # A preempted request has told its count already.
        state.prefill = request.prefill_stats if request.num_preemptions == 0 else None
        (block_ids,) = blocks.get_block_ids()
        self._next.loads.append(
            state.load_plan(
                state.match.listing.namespace,
                block_ids,
                self._block_tokens,
                self._config.chunk_tokens,
            )
        )

    def take_instructions(self) -> Instructions:
        """This step's plans for the worker half; the next step starts empty."""
        for request in self._bypass:
            state = self._states.get(request.request_id)
            if state is not None and state.purchase is not None:
                purchase = state.purchase
                self._recompute(state, request, purchase.refusal, purchase.refusal_reason)
        self._bypass.clear()
        for request in self._uncached:
            request.skip_reading_prefix_cache = True
        self._uncached.clear()
        self._prefetch()
        self._renew()
        if self.pins.block_count:
            self.pins.unpin_unless(self._market.catalogue.is_pinned)
            self.metrics.pinned(self.pins.block_count)
        instructions, self._next = self._next, Instructions()
        return instructions

    def _renew(self) -> None:
        """Keep reservations of requests under way alive, three times in their life; mutates."""
        if time.monotonic() < self._renew_at_s:
            return
        timeout_s = self._config.reservation_timeout_s
        self._renew_at_s = time.monotonic() + timeout_s / 3
        held = self._purchases.held()
        for state in (*self._states.values(), *self._saving.values()):
            if state.publishing is not None and state.publishing.charge is not None:
                held.append(state.publishing.charge.reservation_id)
        if held:
            self._market.ledger.renew(held, timeout_s)

    def _prefetch(self) -> None:
        """Have chunks read for requests that may load but have waited for a whole step; mutates.

        One that is scheduled at once loads straight into the paged cache, which is faster.
        """
        for request_id, waited in list(self._waiting.items()):
            state = self._states.get(request_id)
            if state is None or state.match is None or state.decision is Decision.RECOMPUTE:
                del self._waiting[request_id]
            elif state.purchase and state.purchase.state() is not PurchaseState.RESERVED:
                continue
            elif not waited:
                self._waiting[request_id] = True
            else:
                del self._waiting[request_id]
                keys = tuple(chunk.key for chunk in state.match.chunks)
                self._next.prefetches.append(ChunkPrefetch(state.match.listing.namespace, keys))

    # Ends

    def worker_reported(self, output: KVConnectorOutput) -> None:
        """Take in what the workers loaded and stored since the last step."""
        report = output.kv_connector_worker_meta
        if isinstance(report, WorkerReport):
            for request_id, load in report.loads.items():
                for key, reason in load.failures.items():
                    logger.warning("kvmarket: chunk %s not loaded: %s", key.hex(), reason)
                for key in load.damaged:
                    self._market.report_damage(key)
                if (state := self._states.get(request_id)) is not None:
                    state.load_ended(load, self._config.chunk_tokens)
            for request_id, save in report.saves.items():
                if (state := self._saving.get(request_id)) is not None and state.publishing:
                    state.publishing.report.add(save)
            for request_id, audit in report.audits.items():
                if (state := self._saving.get(request_id)) is not None and state.auditing:
                    state.auditing.report.add(audit)
        for request_id in output.finished_sending or ():
            state = self._saving.pop(request_id, None)
            if state is not None and state.publishing is not None:
                self._end_publishing(state, state.publishing.report.failure)
            elif state is not None and state.auditing is not None:
                record = audit_record(state.auditing, self._engine.id)
                self._market.record_audit(record).add_done_callback(_log_failure)

    def finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Close the request: settle or void, or start to save. Whether its blocks are still
        needed.
        """
        self._lookups.end(request.request_id)
        state = self._states.pop(request.request_id, None)
        if state is None:
            return False, None
        if state.publishing is not None:
            return self._finish_publishing(state, request, block_ids)
        charge = None
        if state.purchase is not None:
            answered = is_answered(request)
            usage = state.usage(request.num_output_tokens) if answered else None
            charge = self._purchases.leave(request.request_id, usage)
        if not state.is_operators:
            self.metrics.used(state, request.num_output_tokens)
        answer = {wishes.FIELD: answer_of(state, request, charge)}
        if state.auditing is not None and request.status in ANSWERED:
            self._next.audits.append(audit_plan(state, block_ids))
            self._saving[request.request_id] = state
            return True, answer
        self._pin(state, block_ids, answer[wishes.FIELD])
        return False, answer

    def _pin(self, state: RequestState, block_ids: list[int], answer: dict[str, Any]) -> None:
        """Hold the blocks of a document that is to be pinned and was reused whole; mutates both."""
        if state.match is None or not state.match.listing.pinned:
            return
        listing = state.match.listing
        # A match in the database may know of it before memory does, which would let it go at once.
        if not self._market.catalogue.is_pinned(listing.document_id):
            return
        # The last token of a prompt is computed, also of one that is just the document.
        if state.reused >= listing.token_count - 1:
            reason = self.pins.pin(listing.document_id, listing.token_count, block_ids)
            if reason:
                answer["not_pinned"] = reason
            else:
                whole = listing.token_count // self._block_tokens
                answer["pinned_tokens"] = whole * self._block_tokens
                self.metrics.pinned(self.pins.block_count)

    def _finish_publishing(
        self, state: RequestState, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        publishing = state.publishing
        assert publishing is not None
        answer = {wishes.FIELD: answer_of(state, request)}
        answer[wishes.FIELD]["document_id"] = publishing.document.document_id
        if request.status not in ANSWERED or state.declined:
            self._end_publishing(state, state.declined or "the publishing request was aborted")
            return False, answer
        self._next.saves.append(save_plan(state, block_ids, self._block_tokens))
        self._saving[request.request_id] = state
        return True, answer

    def _end_publishing(self, state: RequestState, failure: str) -> None:
        """List the document, or note why not; and charge for storing it, or do not."""
        publishing = state.publishing
        assert publishing is not None
        if failure:
            done = self._market.fail_listing(publishing.document.document_id, failure)
        else:
            done = self._market.commit_listing(
                publishing.document.document_id,
                publishing.report.stored_bytes,
                publishing.document.keys,
            )
        if publishing.charge is not None:
            if failure or not publishing.report.stored_bytes:
                publishing.charge.void()
            else:
                charge = publishing.charge
                self.metrics.stored(charge.amount_nano, charge.settle())
        done.add_done_callback(_log_failure)


def _log_failure(future: Future[None]) -> None:
    if (error := future.exception()) is not None:
        logger.error("kvmarket: the catalogue could not be written: %s", error)
