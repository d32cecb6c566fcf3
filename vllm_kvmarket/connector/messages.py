"""What the scheduler half and the worker half say to each other, once an engine step.

Plain values only: they cross a process boundary by pickle.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)


@dataclass(frozen=True, slots=True)
class ChunkLoad:
    """Copy pages `first_page`, `first_page + 1`, ... of a stored chunk into `block_ids`."""

    key: bytes
    first_page: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """All that one request loads from the store; chunks in the order of the prompt."""

    request_id: str
    namespace: bytes
    chunks: tuple[ChunkLoad, ...]


@dataclass(frozen=True, slots=True)
class ChunkSave:
    """Store a chunk from `block_ids`; `tokens` are little-endian uint32."""

    key: bytes
    parent: bytes
    tokens: bytes
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SavePlan:
    """All that one publishing request stores; chunks in the order of the document."""

    request_id: str
    namespace: bytes
    chunks: tuple[ChunkSave, ...]


@dataclass
class Instructions(KVConnectorMetadata):
    """Scheduler half to worker half."""

    loads: list[LoadPlan] = field(default_factory=list)
    saves: list[SavePlan] = field(default_factory=list)


@dataclass(slots=True)
class LoadReport:
    """How one request's load went on the ranks that have reported.

    `failures` maps a chunk key to the reason; `damaged` are those whose file is gone or bad, which
    nobody can load. `seconds` is the slowest rank's.
    """

    loaded_bytes: int = 0
    seconds: float = 0.0
    failures: dict[bytes, str] = field(default_factory=dict)
    damaged: set[bytes] = field(default_factory=set)

    def add(self, other: LoadReport) -> None:
        """Take in another rank's report of the same request; mutates."""
        self.loaded_bytes += other.loaded_bytes
        self.seconds = max(self.seconds, other.seconds)
        self.failures.update(other.failures)
        self.damaged |= other.damaged


@dataclass(slots=True)
class SaveReport:
    """How one publishing request's save went on the ranks that have reported."""

    stored_bytes: int = 0
    failure: str = ""

    def add(self, other: SaveReport) -> None:
        """Take in another rank's report of the same request; mutates."""
        self.stored_bytes += other.stored_bytes
        self.failure = self.failure or other.failure


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """Worker half to scheduler half: what ended since the last step, by request id."""

    loads: dict[str, LoadReport] = field(default_factory=dict)
    saves: dict[str, SaveReport] = field(default_factory=dict)

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
