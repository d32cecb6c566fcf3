"""The scheduler half: one object for each request that concerns the market, and its steps.

It lives in vLLM's engine core and never waits: a match is read from the machine's index; what asks
the ledger, or a database on another machine, is a future that it looks at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.logger import init_logger

from vllm_kvmarket.catalogue import Match
from vllm_kvmarket.connector.audit_requests import AuditRequest
from vllm_kvmarket.connector.housekeeping import Housekeeping
from vllm_kvmarket.connector.messages import (
    ChunkPrefetch,
    Instructions,
    LoadReport,
    WorkerReport,
)
from vllm_kvmarket.connector.namespaces import Namespaces
from vllm_kvmarket.connector.pins import PinnedBlocks
from vllm_kvmarket.connector.probe_requests import ProbeRequest
from vllm_kvmarket.connector.publish_requests import PublishRequest
from vllm_kvmarket.connector.purchases import Purchases
from vllm_kvmarket.connector.request_params import (
    FIELD,
    NO_PARAMS,
    Declined,
    Refusal,
    RequestParams,
    read_params,
)
from vllm_kvmarket.connector.request_state import (
    Engine,
    EngineFacts,
    Lookup,
    only_tokens,
)
from vllm_kvmarket.connector.reuse_requests import PreloadRequest, ReuseRequest
from vllm_kvmarket.connector.scheduler_metrics import SchedulerMetrics
from vllm_kvmarket.connector.shared_hashes import SharedHashes
from vllm_kvmarket.connector.shared_loads import SharedLoads
from vllm_kvmarket.connector.step_loads import StepLoads
from vllm_kvmarket.core.config import MarketConfig
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.model_identity import keeps_states
from vllm_kvmarket.ledger import Outcome, Result
from vllm_kvmarket.market.market import Market

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.kvmarket.scheduler")

_LOST = (Outcome.EXPIRED, Outcome.ALREADY_VOIDED, Outcome.PENDING_NOT_FOUND)
# How soon it is seen that a document is pinned no more, or that vLLM's cache was emptied.
PINS_INTERVAL_S = 0.25
NOT_LOOKED_UP = "the documents on offer could not be looked up"


@dataclass(frozen=True, slots=True)
class DatabaseLookup:
    """A request whose match ends inside a chunk whose tokens are read from another machine."""

    params: RequestParams | Declined
    namespace: bytes
    found: Future[Match | None]


# What the market knows of a request.
AnyRequest = ReuseRequest | PreloadRequest | PublishRequest | AuditRequest | ProbeRequest
COPIED = PublishRequest | AuditRequest | ProbeRequest


class SchedulerHalf:
    """Owns every request's object; called on the scheduler's thread only."""

    def __init__(self, vllm_config: VllmConfig, config: MarketConfig, facts: EngineFacts) -> None:
        self._config = config
        self._market = market = Market.open(config=config)
        market.catalogue.watch(config.refresh_interval_s)
        market.store.disk.sweep_temporary()
        market.catalogue.fail_abandoned()
        self.metrics = SchedulerMetrics(market)
        model = vllm_config.model_config
        hashes = SharedHashes(
            vllm_config.cache_config.prefix_caching_hash_algo,
            config.chunk_tokens,
            market.credentials,
        )
        self._engine = Engine(
            facts=facts,
            market=market,
            metrics=self.metrics,
            purchases=Purchases(market, facts.id, str(model.model), metrics=self.metrics),
            pins=PinnedBlocks(config.pin_budget, model.max_model_len, facts.block_tokens),
            hashes=hashes,
            # Longer than that no load waits for the object store.
            loads=SharedLoads(hashes, config.object_store_timeout_s),
        )
        self._step_loads = StepLoads(vllm_config, facts, market.store.disk, self._engine.idle_time)
        # Its first round releases reservations of an engine that died.
        self._housekeeping = Housekeeping(market, self.metrics)
        self._housekeeping.start()
        self.namespaces = Namespaces(vllm_config, market.home)
        self._requests: dict[str, AnyRequest | DatabaseLookup] = {}
        # A self-test's requests that have not arrived, and the folder where it stores.
        self.probes: dict[str, Callable[[Request], ProbeRequest]] = {}
        self.scratch = ""
        # Ids of requests that may still have their chunks read ahead, and those among them that
        # have waited for a whole step.
        self._waiting: dict[str, bool] = {}
        # How loads went on the ranks that have reported, while others have not.
        self._load_reports: dict[str, LoadReport] = {}
        self._renew_at_s = self._look_at_pins_s = time.monotonic()
        self._next = Instructions()

    @property
    def pins(self) -> PinnedBlocks:
        """The documents that are pinned in this engine's paged cache."""
        return self._engine.pins

    @property
    def engine(self) -> Engine:
        """The parts that every kind of request uses."""
        return self._engine

    def bind(self, pool: BlockPool) -> None:
        """Take the engine's block pool: vLLM's paged cache."""
        self._engine.pins.bind(pool)
        self._engine.hashes.bind(pool)

    def self_tested(self, *, passed: bool) -> None:
        """Begin to reuse, if the self-test has shown that reuse is exact. Mutates."""
        self.namespaces.is_exact = passed
        self.metrics.self_tested(passed=passed)

    def weights_changed(self, why: str, *, adapters: bool = True) -> None:
        """This call may change the model's weights, and its adapters': what has not begun must
        not. Mutates.
        """
        logger.warning(
            "kvmarket: %s may change the model's weights; nothing is reused or published until "
            "reload_weights has loaded them from files",
            why,
        )
        self.namespaces.weights_changed(adapters=adapters)
        self._other_weights(self._requests.values())

    def adapter_changed(self, adapter_id: int) -> None:
        """The worker loads another adapter under this id, or none. Mutates."""
        self.namespaces.adapter_changed(adapter_id)
        self._other_weights(
            made
            for made in self._requests.values()
            if not isinstance(made, DatabaseLookup)
            and (adapter := made.reuse.request.lora_request) is not None
            and adapter.lora_int_id == adapter_id
        )

    def _other_weights(self, changed: Iterable[AnyRequest | DatabaseLookup]) -> None:
        """The weights of these requests are others from now on. Mutates."""
        # Those that run write KV of the new weights under hashes of the old ones.
        self._engine.hashes.forget()
        self.pins.unpin_unless(lambda _: False)
        for made in changed:
            if not isinstance(made, DatabaseLookup):
                made.weights_changed()

    def _look_at_adapter(self, made: AnyRequest) -> None:
        """Notice an adapter whose files have changed since its request came. Mutates."""
        adapter = made.reuse.request.lora_request
        if adapter is not None and self.namespaces.of(adapter) is None:
            made.weights_changed()

    def close(self) -> None:
        """Release what is still reserved, finish the ledger's and the catalogue's work."""
        self._engine.purchases.close()
        self._housekeeping.close()
        self._market.close()

    # Arrival

    def arrived(self, request: Request) -> None:
        """Match a new request and start what it asks for."""
        if (probe := self.probes.pop(request.request_id, None)) is not None:
            self._requests[request.request_id] = probe(request)
            return
        params = read_params(
            request.kv_transfer_params,
            self._market.credentials,
            trusted=self._config.trust_requests is True,
            request_id=request.request_id,
        )
        namespace = self.namespaces.of(request.lora_request)
        tokens = only_tokens(request)
        match: Match | None = None
        if namespace is not None and tokens is not None:
            if keeps_states(namespace):
                # The last one is computed, and there is no state before a document's last token.
                tokens = tokens[:-1]
            if not _may_wait(request, params):
                match = self._market.catalogue.match(namespace, tokens)
            else:
                found = self._market.catalogue.match_later(namespace, tokens)
                if not found.done() or found.exception() is not None:
                    self._requests[request.request_id] = DatabaseLookup(params, namespace, found)
                    return
                match = found.result()
        self._admit(request, params, namespace, match)

    def _admit(
        self,
        request: Request,
        params: RequestParams | Declined,
        namespace: bytes | None,
        match: Match | None,
    ) -> AnyRequest | None:
        """Start what the request asks for, now that its match is known."""
        if match is not None and isinstance(params, RequestParams) and params.document:
            params, match = self._only_the_document(request, params, match)
        is_operators = isinstance(params, RequestParams) and params.is_operators
        named = isinstance(params, RequestParams) and params.document is not None
        if match is not None and (sold := self._market.sold_part(match, named=named)) is not match:
            if isinstance(params, RequestParams) and params.account is not None and sold is None:
                self.metrics.declined("below_minimum")
            # The operator's requests buy nothing: all that is stored serves them.
            match = match if is_operators and self._market.is_worth_loading(match) else sold
        if match is None and params is NO_PARAMS:
            return None
        made: AnyRequest
        if isinstance(params, Declined) or not params.is_operators:
            made = ReuseRequest.arrived(self._engine, request, params, match)
        elif params.publish is not None:
            made = PublishRequest.arrived(self._engine, request, params.publish, namespace, match)
        elif params.audit is not None:
            made = AuditRequest.arrived(self._engine, request, params.audit, namespace, match)
        else:
            made = PreloadRequest(self._engine, request, match)
        self._requests[request.request_id] = made
        if match is not None:
            self._waiting[request.request_id] = False
        return made

    def _only_the_document(
        self, request: Request, params: RequestParams, match: Match
    ) -> tuple[RequestParams | Declined, Match]:
        """The match up to the end of the document that the request names, and nothing behind it.

        Declines a prompt that does not begin with exactly the document's tokens.
        """
        name, catalogue = params.document, self._market.catalogue
        if name is not None and (listing := catalogue.index.listing(name)) is not None:
            tokens = request.prompt_token_ids[: listing.token_count]
            namespace = match.listing.namespace
            document = DocumentChunks.of(namespace, tokens, catalogue.chunk_tokens)
            if document.document_id != name:
                message = f"the prompt does not begin with document {name}"
                return Declined(message, "other_tokens", params.must_reserve), match
            # The last chunk of a document with a state is no part of a longer one.
            found = catalogue.match(namespace, tokens) if keeps_states(namespace) else match
            if found is not None and found.token_count >= listing.token_count:
                cut = found.until(listing.token_count)
                return params, msgspec.structs.replace(cut, whole=listing)
        # Damaged or withdrawn since the client was answered a price, or never there.
        message = f"document {name} is not on offer whole now"
        return Declined(message, "not_on_offer", params.must_reserve), match

    def _looked_up(self, request: Request, lookup: DatabaseLookup) -> None:
        """Go on with a request now that the database has answered."""
        del self._requests[request.request_id]
        current = self.namespaces.of(request.lora_request)
        if current == lookup.namespace and lookup.found.exception() is None:
            self._admit(request, lookup.params, lookup.namespace, lookup.found.result())
            return
        made = self._admit(request, lookup.params, current, None)
        if isinstance(made, ReuseRequest):
            made.decline(NOT_LOOKED_UP, "catalogue_unavailable")

    # Scheduling

    def ready(self, request: Request, local: int) -> tuple[int | None, bool]:
        """Tokens to load behind the `local` ones, and whether asynchronously; None: ask again."""
        made = self._requests.get(request.request_id)
        if made is None:
            return 0, False
        if isinstance(made, DatabaseLookup):
            if made.found.done():
                self._looked_up(request, made)
            # vLLM looks into its cache again, by the hashes that the request has now.
            return None, False
        self._look_at_adapter(made)
        found = made.ready()
        if found is Lookup.PENDING:
            return None, False
        if isinstance(made, PublishRequest) and made.repairs(local):
            return None, False
        if found is Lookup.MISS:
            return 0, False
        external = made.reuse.external_tokens(local)
        if external and self._engine.loads.must_wait(request, local):
            return None, False
        is_reader = isinstance(made, ReuseRequest | PreloadRequest)
        made.reuse.in_step = is_reader and self._step_loads.suits(made.reuse, external)
        return external, external > 0 and not made.reuse.in_step

    def allocated(self, request: Request, blocks: KVCacheBlocks, external: int) -> None:
        """Plan the load into the blocks that the scheduler has just given the request."""
        block_ids = blocks.get_block_ids()
        self.pins.taken(sum(map(len, block_ids)))
        made = self._requests.get(request.request_id)
        if made is None or isinstance(made, DatabaseLookup):
            return
        self._waiting.pop(request.request_id, None)
        self._step_loads.admitted(made.reuse)
        if made.reuse.allocated(external):
            local = made.reuse.local
            if not made.reuse.in_step:
                self._engine.loads.began(request, local, local + external)
            plan = made.reuse.load_plan(block_ids, self._engine.facts)
            self._next.loads.append(plan)

    def scheduled(self, tokens: int, requests: int) -> None:
        """Note how much of how many requests this step computes. Mutates vLLM's queue of blocks."""
        groups = self._engine.facts.groups
        self.pins.taken(sum(tokens // group.block_tokens + requests for group in groups))

    def take_instructions(self, scheduled: Collection[str] = ()) -> Instructions:
        """This step's plans for the worker half; the next step starts empty.

        `scheduled`: the requests whose tokens the step computes.
        """
        self._next.idle = not scheduled
        self._next.scratch = self.scratch
        self._prefetch()
        self._engine.idle_time.step_ended(scheduled)
        self._renew()
        self._look_at_pins()
        instructions, self._next = self._next, Instructions()
        return instructions

    def _look_at_pins(self) -> None:
        """Let documents go that are pinned no more, or have lost blocks; mutates."""
        if not self.pins.block_count:
            return
        if time.monotonic() >= self._look_at_pins_s:
            self._look_at_pins_s = time.monotonic() + PINS_INTERVAL_S
            self.pins.unpin_unless(self._market.catalogue.index.is_pinned)
            self.pins.forget_lost()
        self.metrics.pinned(self.pins.block_count)

    def copy_pages(self, output: SchedulerOutput) -> None:
        """Have the pages copied that the step will compute of documents; mutates."""
        state = output.kv_connector_block_state
        if self._engine.facts.is_plain:
            return
        for request_id, count in output.num_scheduled_tokens.items():
            made = self._requests.get(request_id)
            if state is not None and isinstance(made, COPIED):
                self._next.copies += made.copies(count, state.resolve_block_ids(request_id))

    def copies_pages_of(self, request: Request) -> bool:
        """Whether the pages that a request computes are stored or compared."""
        return isinstance(self._requests.get(request.request_id), COPIED)

    def _renew(self) -> None:
        """Extend reservations of requests under way, three times in their life; mutates."""
        if time.monotonic() < self._renew_at_s:
            return
        timeout_s = self._config.reservation_timeout_s
        self._renew_at_s = time.monotonic() + timeout_s / 3
        ids = self._engine.purchases.held()
        for made in self._requests.values():
            if isinstance(made, PublishRequest) and made.charge is not None:
                ids.append(made.charge.reservation_id)
        if ids:
            self._market.ledger.renew(ids, timeout_s).add_done_callback(_log_lost_holds)

    def _prefetch(self) -> None:
        """Have chunks read for requests that may load but have waited for a whole step; mutates.

        One that is scheduled at once loads straight into the paged cache, which is faster.
        """
        for request_id, waited in list(self._waiting.items()):
            made = self._requests.get(request_id)
            if made is None or isinstance(made, DatabaseLookup):
                del self._waiting[request_id]
                continue
            if self._engine.loads.waits(request_id):
                continue
            found = made.ready()
            if found is Lookup.PENDING:
                continue
            if found is Lookup.HIT and not waited:
                self._waiting[request_id] = True
                continue
            del self._waiting[request_id]
            match = made.reuse.match
            if found is Lookup.HIT and match is not None:
                keys = tuple(chunk.key for chunk in match.chunks)
                known = tuple(chunk.known for chunk in match.chunks)
                self._next.prefetches.append(ChunkPrefetch(match.listing.namespace, keys, known))

    # Ends

    def take_refusals(self) -> dict[str, Refusal]:
        """The requests that vLLM's scheduler must end now, by its ids; mutates."""
        if not (refusals := self._engine.refusals):
            return {}
        taken = dict(refusals)
        refusals.clear()
        return taken

    def finished(
        self, request: Request, block_ids: Sequence[Sequence[int]]
    ) -> tuple[bool, dict[str, Any] | None]:
        """End a request; returns whether its blocks are still needed, and the answer's object."""
        self._engine.idle_time.request_ended(request.request_id)
        made = self._requests.pop(request.request_id, None)
        self._engine.loads.ended(request.request_id)
        if isinstance(made, DatabaseLookup):
            made.found.cancel()
            return False, None
        if made is None:
            return False, None
        if isinstance(made, PublishRequest | AuditRequest):
            self._look_at_adapter(made)
        ended = made.finished(block_ids)
        if ended.saves is not None:
            self._next.saves.append(ended.saves)
        elif ended.compares is not None:
            self._next.audits.append(ended.compares)
        else:
            if not self._engine.facts.is_plain:
                self._next.ended.append(request.request_id)
            return False, {FIELD: ended.answer}
        self._requests[request.request_id] = made
        return True, {FIELD: ended.answer}

    def step_loads_ended(self, output: KVConnectorOutput) -> None:
        """Take in the loads that this step waited for, before vLLM ends any of its requests."""
        meta = output.kv_connector_worker_meta
        report = meta if isinstance(meta, WorkerReport) else None
        for request_id, load in self._step_loads.ended(report).items():
            self._note_failures(load)
            self._load_ended(request_id, load)

    def worker_reported(self, output: KVConnectorOutput) -> None:
        """Take in what the workers loaded, stored and compared since the last step."""
        report = output.kv_connector_worker_meta
        if isinstance(report, WorkerReport):
            for request_id, load in report.loads.items():
                self._note_failures(load)
                self._load_reports.setdefault(request_id, LoadReport()).add(load)
            for request_id, save in report.saves.items():
                made = self._requests.get(request_id)
                if isinstance(made, PublishRequest | ProbeRequest):
                    made.report.add(save)
            for request_id, audit in report.audits.items():
                if isinstance(made := self._requests.get(request_id), AuditRequest):
                    made.report.add(audit)
        # vLLM names a request here when all ranks have reported it, which may take several steps.
        for request_id in output.finished_recving or ():
            if (whole := self._load_reports.pop(request_id, None)) is not None:
                self._load_ended(request_id, whole)
        for request_id in output.finished_sending or ():
            made = self._requests.pop(request_id, None)
            if isinstance(made, PublishRequest | AuditRequest | ProbeRequest):
                made.transferred()

    def _note_failures(self, load: LoadReport) -> None:
        """Log what a rank could not load; what is damaged is not sold, nor loaded by others."""
        for key, reason in load.failures.items():
            logger.warning("kvmarket: chunk %s not loaded: %s", key.hex(), reason)
        for key in load.damaged:
            self._market.report_damage(key)
        if load.damaged:
            for made in self._requests.values():
                if not isinstance(made, DatabaseLookup):
                    made.reuse.exclude(load.damaged, self._config.chunk_tokens)

    def _load_ended(self, request_id: str, load: LoadReport) -> None:
        self._engine.loads.ended(request_id, brought=not load.failures)
        made = self._requests.get(request_id)
        if made is not None and not isinstance(made, DatabaseLookup):
            made.reuse.load_ended(load, self._engine.facts)


def _may_wait(request: Request, params: RequestParams | Declined) -> bool:
    """Whether vLLM lets a request wait for its match; those that reuse nothing it does not."""
    is_audit = isinstance(params, RequestParams) and params.audit is not None
    return not request.skip_reading_prefix_cache and not is_audit


def _log_lost_holds(renewed: Future[list[Result]]) -> None:
    """Warn of requests whose reservation is gone: they may not be paid when they end."""
    if (error := renewed.exception()) is not None:
        logger.warning("kvmarket: reservations could not be extended: %s", error)
        return
    lost = [each for each in renewed.result() if each.outcome in _LOST]
    if lost:
        logger.warning(
            "kvmarket: %d reservations of running requests are gone, the first because of %s",
            len(lost),
            lost[0].outcome.name,
        )
