"""Parts of every kind of request: the engine that it runs on, and the count of its reuse."""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.sampling_params import RequestOutputKind
from vllm.v1.request import RequestStatus

from vllm_kvmarket.catalogue import Match
from vllm_kvmarket.connector.cache_groups import CacheGroup, GroupKind, is_plain
from vllm_kvmarket.connector.idle_time import IdleTime
from vllm_kvmarket.connector.messages import ChunkLoad, LoadPlan, LoadReport, SavePlan
from vllm_kvmarket.connector.pins import PinnedBlocks
from vllm_kvmarket.connector.purchases import Charge, Countable, Purchases
from vllm_kvmarket.connector.request_params import Refusal
from vllm_kvmarket.connector.scheduler_metrics import SchedulerMetrics
from vllm_kvmarket.connector.shared_hashes import SharedHashes
from vllm_kvmarket.connector.shared_loads import SharedLoads
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.market.purchase import Usage

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import PrefillStats
    from vllm.v1.request import Request

# With these an answer has come to its end.
ANSWERED = (
    RequestStatus.FINISHED_STOPPED,
    RequestStatus.FINISHED_LENGTH_CAPPED,
    RequestStatus.FINISHED_REPETITION,
)


class Lookup(enum.Enum):
    """The answer when vLLM's scheduler asks for a request's stored KV."""

    HIT = "hit"
    MISS = "miss"
    PENDING = "pending"  # not known yet: ask again


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """The engine's own measures."""

    id: str
    groups: tuple[CacheGroup, ...]
    chunk_tokens: int
    # Ranks that have pages of their own.
    world_size: int
    # A reuse ends with a multiple of so many tokens.
    grain: int = 1

    @property
    def block_tokens(self) -> int:
        """Tokens in a block of attention layers; 1 where there are none."""
        attention = [group for group in self.groups if group.kind is not GroupKind.STATE]
        return attention[0].block_tokens if attention else 1

    @property
    def is_plain(self) -> bool:
        """Whether all layers keep all tokens, in one block table."""
        return is_plain(self.groups)

    @property
    def has_states(self) -> bool:
        """Whether there are layers with a recurrent state, which is stored at a document's end."""
        return any(group.kind is GroupKind.STATE for group in self.groups)

    @property
    def forgets(self) -> bool:
        """Whether there are layers of which vLLM frees blocks while their request runs."""
        return any(group.reach for group in self.groups)

    def stored_bytes(self, tokens: int) -> int:
        """The bytes that so many tokens take on all ranks."""
        pages = ((-(-tokens // group.block_tokens), group) for group in self.groups)
        return self.world_size * sum(count * group.page_bytes for count, group in pages)


@dataclass(frozen=True, slots=True)
class Engine:
    """The parts of an engine that every kind of request uses."""

    facts: EngineFacts
    market: Market
    metrics: SchedulerMetrics
    purchases: Purchases
    pins: PinnedBlocks
    hashes: SharedHashes
    loads: SharedLoads
    # Requests that vLLM's scheduler must end, by its ids.
    refusals: dict[str, Refusal] = field(default_factory=dict)
    idle_time: IdleTime = field(default_factory=IdleTime)


@dataclass(frozen=True, slots=True)
class Ended:
    """A request's end: the market's object for its answer, and what its blocks are kept for."""

    answer: dict[str, Any]
    saves: SavePlan | None = None
    compares: SavePlan | None = None


@dataclass(slots=True)
class Reuse:
    """How much of a match one request reuses, from the paged cache and from the store."""

    request: Request
    match: Match | None
    # Shared by the samples of one request.
    countable: Countable = field(default_factory=Countable)
    # What is reused ends with a multiple of so many tokens.
    grain: int = 1
    # The most tokens of the match that can still be had; shrinks when a chunk fails to load.
    limit: int = field(init=False)
    # vLLM's prefix-cache hit as of the last time the scheduler asked, in whole blocks.
    local: int = 0
    asked: bool = False
    # Whether the request has had blocks, and so KV of its match or of its own.
    has_begun: bool = False
    external: int = 0
    # Whether the load ends within the step that computes the request: see step_loads.py.
    in_step: bool = False
    failed: int = 0
    # The best that any admission of this request got: a preempted request loads again, pays once.
    reused: int = 0
    loaded: int = 0
    cached: int = 0
    # vLLM's count of the first admission, which the answer's usage says. A preempted request is
    # charged for no more than that.
    prefill: PrefillStats | None = None

    def __post_init__(self) -> None:
        self.limit = self._most()

    def _most(self) -> int:
        """The tokens that may be charged. A prompt's last token is computed, also when a preempted
        request finds it in the paged cache: it was not quoted.
        """
        return self._last_end(self.request.num_prompt_tokens - 1)

    def _last_end(self, end: int) -> int:
        """The last place up to `end` behind which this engine goes on."""
        found = self.match.last_end(end) if self.match else 0
        return found - found % self.grain

    def lookup(self) -> Lookup:
        """Whether there is something to reuse, where nothing else speaks against it."""
        return Lookup.MISS if self.match is None else Lookup.HIT

    def external_tokens(self, local: int) -> int:
        """How many tokens behind the `local` ones to load, which the request can go on behind.
        Mutates.
        """
        self.asked = True
        self.local = local
        # At least one token must be computed, or there is nothing to sample from.
        end = min(self.limit, self.request.num_tokens - 1)
        return max(0, self._last_end(end) - local)

    def allocated(self, external: int) -> bool:
        """Note what the scheduler decided; whether there is anything to load. Mutates."""
        if self.request.num_preemptions == 0:
            self.prefill = self.request.prefill_stats or self.prefill
        if not self.asked:
            return False
        self.asked, self.has_begun = False, True
        self.external = external
        self.countable.lower(self.local + external)
        if external == 0:
            self._count()
        return external > 0

    def load_plan(self, block_ids: Sequence[Sequence[int]], facts: EngineFacts) -> LoadPlan:
        """The pages of tokens local .. local + external that are still read, chunk by chunk.

        `block_ids` are the request's blocks in each group.
        """
        assert self.match is not None
        end, size = self.local + self.external, facts.chunk_tokens
        loads: list[ChunkLoad] = []
        for index in range(self.local // size, -(-end // size)):
            start, stop = max(self.local, index * size), min(end, (index + 1) * size)
            pages = tuple(
                group.pages(blocks, max(start, group.first_token(end)), stop, index * size)
                for group, blocks in zip(facts.groups, block_ids, strict=True)
            )
            if any(group.block_ids for group in pages):
                chunk = self.match.chunks[index]
                loads.append(ChunkLoad(chunk.key, pages, chunk.known))
        namespace = self.match.listing.namespace
        return LoadPlan(self.request.request_id, namespace, tuple(loads), self.in_step)

    def exclude(self, keys: set[bytes], chunk_tokens: int) -> None:
        """Stop before the first of these chunks, which cannot be loaded. Mutates."""
        for index, chunk in enumerate(self.match.chunks if self.match else ()):
            if chunk.key in keys:
                self.limit = min(self.limit, index * chunk_tokens)
                return

    def lost(self, keys: Collection[bytes], chunk_tokens: int) -> None:
        """Count nothing behind the first of these chunks: what the paged cache seemed to have of
        them was still to come, and did not. Mutates.
        """
        for index, chunk in enumerate(self.match.chunks if self.match else ()):
            if chunk.key in keys and index * chunk_tokens < self.local:
                good = index * chunk_tokens
                self.countable.lower(good)
                self.reused, self.cached = min(self.reused, good), min(self.cached, good)
                self.loaded = self.reused - self.cached
                if self.prefill is not None and self.request.num_preemptions == 0:
                    self.prefill.set(self.request.num_prompt_tokens, good, 0)
                return

    def load_ended(self, report: LoadReport, facts: EngineFacts) -> None:
        """Count what was loaded whole: everything in front of the first chunk that failed.

        Where a model has several groups, vLLM keeps nothing of such a load, and asks again.
        """
        assert self.match is not None
        if report.failures:
            keys = [chunk.key for chunk in self.match.chunks]
            first = min(keys.index(key) for key in report.failures if key in keys)
            end = self.local + self.external
            self.limit = min(self.limit, first * facts.chunk_tokens)
            good = max(self.local, min(end, first * facts.chunk_tokens))
            self.countable.lower(max(self.reused, good))
            if not facts.is_plain:
                self.limit = self.match.last_end(self.limit)
                self.failed = max(self.failed, end - self.limit)
                return
            self.failed += end - good
            self.external = good - self.local
            if self.prefill is not None and self.request.num_preemptions == 0:
                # vLLM counted when the load was planned.
                self.prefill.set(self.request.num_prompt_tokens, self.local, self.external)
        self._count()

    def _count(self) -> None:
        assert self.countable.end is not None
        cached = min(self.local, self._most(), self.countable.end)
        total = min(cached + self.external, self.countable.end)
        if total > self.reused:
            self.reused, self.loaded, self.cached = total, total - cached, cached

    def usage(self) -> Usage:
        """The request in tokens, as of now."""
        matched = self.match.token_count if self.match else 0
        # More than was reused where the account's own earlier prompt goes on behind the document.
        found = max(self.reused, self.prefill.num_cached_tokens if self.prefill else 0)
        return Usage(
            matched=matched,
            reused=self.reused,
            loaded=self.loaded,
            from_paged_cache=self.cached,
            # A preempted request may fail to load more than once; what it reused did not fail.
            failed=min(self.failed, matched - self.reused),
            computed=self.request.num_prompt_tokens - found,
            output=self.request.num_output_tokens,
        )

    def answer(self, declined: str = "", charge: Charge | None = None) -> dict[str, Any]:
        """The object that the request's answer carries under the market's field."""
        usage = self.usage()
        answer: dict[str, Any] = {
            "document_id": self.match.listing.document_id if self.match else None,
            "matched_tokens": usage.matched,
            "reused_tokens": usage.reused,
            "loaded_tokens": usage.loaded,
            "computed_tokens": usage.computed,
            "charge_nano": charge.charge_nano if charge else 0,
            "receipt_id": charge.receipt_id if charge else None,
        }
        if declined:
            answer["declined"] = declined
        return answer


def only_tokens(request: Request) -> Sequence[int] | None:
    """A prompt's token ids; None where its KV depends on more: embeddings, images, audio, video."""
    if request.prompt_embeds is not None or request.mm_features:
        return None
    tokens: Sequence[int] | None = request.prompt_token_ids
    return tokens


def is_answered(request: Request) -> bool:
    """Whether an answer, or the beginning of one, has reached the client."""
    if request.status in ANSWERED:
        return True
    if request.status is not RequestStatus.FINISHED_ABORTED or not request.num_output_tokens:
        return False
    params = request.sampling_params
    # Of an answer that is not streamed nothing has gone out when its client leaves. Yet vLLM also
    # aborts a request whose answer is whole: one that came to a stop string, which only the
    # front end sees.
    return params is not None and (
        params.output_kind is not RequestOutputKind.FINAL_ONLY or bool(params.stop)
    )
