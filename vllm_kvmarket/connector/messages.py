"""The messages between the scheduler half and the worker half, once an engine step.

Plain values only: they cross a process boundary by pickle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from vllm_kvmarket.core.model_identity import TOKEN_BYTES
from vllm_kvmarket.core.stored_share import StoredShare

# Why a chunk was not loaded: its file is bad, is gone, has a layout that this engine cannot use, or
# could not be read now.
FailureReason = Literal["damaged", "missing", "layout", "io"]
# How recomputed pages compare with stored ones: bit for bit, within the tolerance, not even that;
# unread ones could not be compared.
AuditResult = Literal["exact", "close", "different", "unread"]
_AUDIT_ORDER: tuple[AuditResult, ...] = ("exact", "close", "unread", "different")


@dataclass(frozen=True, slots=True)
class GroupPages:
    """Pages `first_page`, `first_page + 1`, ... of a chunk, and the blocks that they lie in.

    One KV cache group's: a block id means another block in each group.
    """

    first_page: int = 0
    block_ids: tuple[int, ...] = ()

    @property
    def last_page(self) -> int:
        """The page behind the last one."""
        return self.first_page + len(self.block_ids)


@dataclass(frozen=True, slots=True)
class ChunkLoad:
    """Copy pages of a stored chunk into blocks; `groups` has one entry for each KV cache group.

    `known` are the fingerprints of its shares, one after another: a copy that has another is old.
    """

    key: bytes
    groups: tuple[GroupPages, ...]
    known: bytes = b""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """All that one request loads from the store; chunks in the order of the prompt.

    `in_step`: the forward pass of this step computes the request, and waits for the load.
    """

    request_id: str
    namespace: bytes
    chunks: tuple[ChunkLoad, ...]
    in_step: bool = False


@dataclass(frozen=True, slots=True)
class ChunkPrefetch:
    """Chunks that a waiting request will load: bring them nearer while nothing else is to do."""

    namespace: bytes
    keys: tuple[bytes, ...]
    # As ChunkLoad.known, for each key; none at all when none is known.
    known: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class ChunkSave:
    """Store a chunk from blocks; `tokens` are little-endian uint32.

    `groups` has one entry for each KV cache group: all pages of the chunk, or in a PageCopy some.
    `is_new`: nothing of it was on offer, so nobody looks for it in other layouts.
    """

    key: bytes
    parent: bytes
    tokens: bytes
    groups: tuple[GroupPages, ...]
    is_new: bool = False

    @property
    def token_count(self) -> int:
        """Tokens in the chunk."""
        return len(self.tokens) // TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy pages of a request's chunk out of their blocks, after the forward pass of this step.

    The step has computed the chunk's tokens first_token .. last_token - 1; `chunk.groups` are the
    pages to copy now. Whole chunks are stored, or compared with stored ones.
    """

    request_id: str
    namespace: bytes
    chunk: ChunkSave
    first_token: int
    last_token: int
    compares: bool = False


@dataclass(frozen=True, slots=True)
class SavePlan:
    """The chunks that a finished request stores, or compares with stored ones; in the prompt's
    order.
    """

    request_id: str
    namespace: bytes
    chunks: tuple[ChunkSave, ...]


@dataclass
class Instructions(KVConnectorMetadata):
    """Scheduler half to worker half; `idle`: this step has no forward pass."""

    loads: list[LoadPlan] = field(default_factory=list)
    saves: list[SavePlan] = field(default_factory=list)
    prefetches: list[ChunkPrefetch] = field(default_factory=list)
    audits: list[SavePlan] = field(default_factory=list)
    idle: bool = False
    copies: list[PageCopy] = field(default_factory=list)
    # Requests that ended without a plan: their copies are needed no more.
    ended: list[str] = field(default_factory=list)
    # Where a self-test stores its chunks; "" when the engine serves.
    scratch: str = ""


@dataclass(slots=True)
class LoadReport:
    """How one request's load went on the ranks that have reported.

    `failures` maps a chunk key to what went wrong, `reasons` counts it by kind (a chunk once a
    rank); `damaged` are those whose file is gone or bad, which cannot be loaded. `seconds` is the
    slowest rank's.
    """

    loaded_bytes: int = 0
    seconds: float = 0.0
    failures: dict[bytes, str] = field(default_factory=dict)
    damaged: set[bytes] = field(default_factory=set)
    reasons: dict[FailureReason, int] = field(default_factory=dict)

    def add(self, other: LoadReport) -> None:
        """Take in another rank's report of the same request; mutates."""
        self.loaded_bytes += other.loaded_bytes
        self.seconds = max(self.seconds, other.seconds)
        self.failures.update(other.failures)
        self.damaged |= other.damaged
        for reason, count in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count


@dataclass(slots=True)
class SaveReport:
    """How one publishing request's save went on the ranks that have reported.

    `failure` says why it ended early, empty when it did not; `is_full`: the store was full.
    `shares` describe what is stored now of its chunks.
    """

    stored_bytes: int = 0
    shares: list[StoredShare] = field(default_factory=list)
    failure: str = ""
    is_full: bool = False

    def add(self, other: SaveReport) -> None:
        """Take in another rank's report of the same request; mutates."""
        self.stored_bytes += other.stored_bytes
        self.shares += other.shares
        self.failure = self.failure or other.failure
        self.is_full = self.is_full or other.is_full


@dataclass(frozen=True, slots=True)
class ChunkAudit:
    """How one chunk compares: the largest absolute difference, and where, empty when exact."""

    result: AuditResult
    difference: float = 0.0
    detail: str = ""


@dataclass(slots=True)
class AuditReport:
    """How one request's audit went on the ranks that have reported: the worst of them a chunk."""

    chunks: dict[bytes, ChunkAudit] = field(default_factory=dict)

    def add(self, other: AuditReport) -> None:
        """Take in another rank's report of the same request; mutates."""
        for key, theirs in other.chunks.items():
            ours = self.chunks.get(key, theirs)
            self.chunks[key] = max(
                ours, theirs, key=lambda each: (_AUDIT_ORDER.index(each.result), each.difference)
            )

    def count(self, result: AuditResult) -> int:
        """How many chunks compare so."""
        return sum(1 for chunk in self.chunks.values() if chunk.result == result)

    @property
    def result(self) -> AuditResult:
        """The worst that was found of any chunk."""
        found = (chunk.result for chunk in self.chunks.values())
        return max(found, key=_AUDIT_ORDER.index, default="exact")

    @property
    def refuted(self) -> list[bytes]:
        """Keys of chunks whose numbers are wrong, and not only others where none may differ."""
        return [
            key
            for key, chunk in self.chunks.items()
            if chunk.result == "different" and math.isfinite(chunk.difference)
        ]

    @property
    def worst_difference(self) -> float:
        """The largest absolute difference of any value; infinite for what is not a number."""
        return max((chunk.difference for chunk in self.chunks.values()), default=0.0)

    @property
    def details(self) -> list[str]:
        """A line for every chunk that is not exact."""
        return [
            f"{key.hex()}: {chunk.detail}" for key, chunk in self.chunks.items() if chunk.detail
        ]


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """Worker half to scheduler half: what ended since the last step, by request id."""

    loads: dict[str, LoadReport] = field(default_factory=dict)
    saves: dict[str, SaveReport] = field(default_factory=dict)
    audits: dict[str, AuditReport] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether nothing ended."""
        return not (self.loads or self.saves or self.audits)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerReport:
        """Merge the reports of two ranks of one step; mutates and returns self."""
        assert isinstance(other, WorkerReport)
        self.merge(other)
        return self

    def merge(self, other: WorkerReport) -> None:
        """Take in another report, of another rank or a later step; mutates."""
        for request_id, load in other.loads.items():
            self.loads.setdefault(request_id, LoadReport()).add(load)
        for request_id, save in other.saves.items():
            self.saves.setdefault(request_id, SaveReport()).add(save)
        for request_id, audit in other.audits.items():
            self.audits.setdefault(request_id, AuditReport()).add(audit)
