"""What the scheduler half remembers of one request, and how its reuse is counted."""

from __future__ import annotations

import enum
import re
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from blake3 import blake3

from vllm_kvmarket.catalogue import Listing, Match
from vllm_kvmarket.connector.messages import (
    AuditReport,
    ChunkLoad,
    ChunkSave,
    LoadPlan,
    LoadReport,
    SaveReport,
)
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.market.purchase import Purchase, Usage, WriteCharge


class PrefillStats(Protocol):
    """What is used of vLLM's (vllm/v1/metrics/stats.py)."""

    def set(
        self,
        num_prompt_tokens: int,
        num_local_cached_tokens: int,
        num_external_cached_tokens: int,
    ) -> None:
        """Count anew; mutates."""


_CHILD = re.compile(r"\d+_(.+)")
_RANDOM_SUFFIX = re.compile(r"-[0-9a-f]{8}$")


def purchase_group(request_id: str) -> str:
    """What the samples `0_ID`, `1_ID`, ... of a request with n > 1 have in common: ID.

    A client may choose an id that looks the same; see buying.Purchases.
    """
    child = _CHILD.fullmatch(request_id)
    return child.group(1) if child else request_id


def client_request_id(request_id: str, *, is_sample: bool = False) -> str:
    """The id that the client knows: vLLM appends eight random digits to it, and puts a number in
    front of each of several samples.
    """
    return _RANDOM_SUFFIX.sub("", purchase_group(request_id) if is_sample else request_id)


def ledger_key(engine_id: str, request_id: str, arrival_time: float) -> str:
    """A key of fixed length for one request's transfers: no id that a client chose is in it, and a
    second request of the same id has another.
    """
    digest = blake3(f"{arrival_time!r} {request_id}".encode()).hexdigest(16)
    return f"{engine_id}:{digest}"


class Decision(enum.Enum):
    """Whether a request may reuse what it matches."""

    PENDING = "pending"  # a reservation is under way: ask again
    REUSE = "reuse"
    RECOMPUTE = "recompute"  # computed in full; not even vLLM's prefix cache is read


@dataclass(slots=True)
class Publishing:
    """A document on its way to a listing."""

    document: DocumentChunks
    begun: Future[Listing]
    charge: WriteCharge | None
    report: SaveReport = field(default_factory=SaveReport)


@dataclass(slots=True)
class Auditing:
    """A document whose stored chunks are compared with computed ones."""

    document_id: str
    namespace: bytes
    chunks: tuple[ChunkSave, ...]
    report: AuditReport = field(default_factory=AuditReport)


@dataclass(slots=True)
class RequestState:
    """One request that matches a listing, publishes, or names the market in its parameters."""

    request_id: str
    prompt_tokens: int
    decision: Decision
    match: Match | None = None
    purchase: Purchase | None = None
    publishing: Publishing | None = None
    auditing: Auditing | None = None
    declined: str = ""
    # The operator's work is not counted with what others ask.
    is_operators: bool = False
    # The most tokens of the match that can still be had; shrinks when a chunk fails to load.
    limit: int = 0
    # vLLM's prefix-cache hit as of the last time the scheduler asked, in whole blocks.
    local: int = 0
    asked: bool = False
    external: int = 0
    failed: int = 0
    # The best that any admission of this request got: a preempted request loads again, pays once.
    reused: int = 0
    loaded: int = 0
    cached: int = 0
    # After a failed load: what a preempted request finds of the rest, it has computed itself.
    countable: int | None = None
    # vLLM's own count of what it need not compute, until it has told it: for the answer's usage.
    prefill: PrefillStats | None = None

    def external_tokens(self, local: int, most: int) -> int:
        """How many tokens behind `local` to load, for a prompt of which `most` may be reused."""
        self.asked = True
        self.local = local
        return max(0, min(self.limit, most) - local)

    def admitted(self, external: int) -> bool:
        """Note what the scheduler decided; whether there is anything to load. Mutates."""
        if not self.asked:
            return False
        self.asked = False
        self.external = external
        if external == 0:
            self._count()
        return external > 0

    def load_plan(
        self, namespace: bytes, block_ids: list[int], block_tokens: int, chunk_tokens: int
    ) -> LoadPlan:
        """The pages that cover tokens local .. local + external, chunk by chunk."""
        assert self.match is not None
        end = self.local + self.external
        first_block, last_block = self.local // block_tokens, -(-end // block_tokens)
        pages_per_chunk = chunk_tokens // block_tokens
        loads: list[ChunkLoad] = []
        for index in range(self.local // chunk_tokens, -(-end // chunk_tokens)):
            chunk_start = index * pages_per_chunk
            start = max(first_block, chunk_start)
            stop = min(last_block, chunk_start + pages_per_chunk)
            loads.append(
                ChunkLoad(
                    key=self.match.chunks[index].key,
                    first_page=start - chunk_start,
                    block_ids=tuple(block_ids[start:stop]),
                )
            )
        return LoadPlan(request_id=self.request_id, namespace=namespace, chunks=tuple(loads))

    def load_ended(self, report: LoadReport, chunk_tokens: int) -> None:
        """Count what was loaded whole: everything in front of the first chunk that failed."""
        assert self.match is not None
        if report.failures:
            keys = [chunk.key for chunk in self.match.chunks]
            first = min(keys.index(key) for key in report.failures if key in keys)
            end = self.local + self.external
            good = max(self.local, min(end, first * chunk_tokens))
            self.failed += end - good
            self.external = good - self.local
            self.limit = min(self.limit, first * chunk_tokens)
            if self.prefill is not None:
                # vLLM counted when the load was planned.
                self.prefill.set(self.prompt_tokens, self.local, self.external)
        self._count()
        if report.failures:
            self.countable = self.reused

    def _count(self) -> None:
        assert self.match is not None
        cached = min(self.local, self.match.token_count)
        total = cached + self.external
        if self.countable is not None and total > self.countable:
            return
        if total > self.reused:
            self.reused, self.loaded, self.cached = total, self.external, cached

    def usage(self, output_tokens: int) -> Usage:
        """The request in tokens, as of now."""
        matched = self.match.token_count if self.match else 0
        return Usage(
            matched=matched,
            reused=self.reused,
            loaded=self.loaded,
            from_paged_cache=self.cached,
            # A preempted request may fail to load more than once; what it reused did not fail.
            failed=min(self.failed, matched - self.reused),
            computed=self.prompt_tokens - self.reused,
            output=output_tokens,
        )
