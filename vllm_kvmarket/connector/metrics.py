"""What the workers count, on its way to vLLM's log line and to Prometheus.

vLLM collects a connector's stats once an engine step, adds up the ranks', and hands their `data` to
the process that serves /metrics.
"""

from __future__ import annotations

import threading
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

_COUNTS, _SECONDS, _HOST_BYTES = "counts", "load_seconds", "host_bytes"

# Counter: what it counts, and what its label says; without one, one number. The names begin like
# vLLM's own, which forgets them together when a second engine starts in one process.
COUNTERS: dict[str, tuple[str, str]] = {
    "chunks_loaded": ("Chunks loaded into the paged cache.", "tier"),
    "loaded_bytes": ("Bytes loaded into the paged cache.", "tier"),
    "chunks_converted": ("Chunks loaded from another layout.", ""),
    "load_failures": ("Chunks that could not be loaded and were computed.", "reason"),
    "chunks_quarantined": ("Damaged chunks taken out of the store.", ""),
    "prefetches": ("Chunks that were to be read ahead.", "result"),
    "chunks_saved": ("Chunks stored.", ""),
    "saved_bytes": ("Bytes stored.", ""),
    "save_failures": ("Publishing requests that could not be stored whole.", "reason"),
    "chunks_audited": ("Chunks compared with recomputed ones.", "result"),
}
LOAD_SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
PREFIX = "vllm:kvmarket_"


class MarketStats(KVConnectorStats):
    """Counts since the stats were last taken; `data` is plain JSON.

    `data["counts"]` maps `counter` or `counter/label value` to a number, `data["load_seconds"]`
    lists one duration a request and rank, `data["host_bytes"]` is the host tier's size as of now.
    """

    data: dict[str, Any]

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data=data or {})
        if not self.data:
            self.reset()

    def reset(self) -> None:
        """Begin anew; mutates."""
        self.data = {_COUNTS: {}, _SECONDS: []}

    def count(self, counter: str, label: str = "", amount: int = 1) -> None:
        """Add to a counter of COUNTERS; mutates. Not synchronised."""
        name = f"{counter}/{label}" if label else counter
        self.data[_COUNTS][name] = self.data[_COUNTS].get(name, 0) + amount

    def took(self, seconds: float) -> None:
        """Note how long a request's load took; mutates. Not synchronised."""
        self.data[_SECONDS].append(seconds)

    def host_bytes(self, bytes_used: int) -> None:
        """Note how much the host tier holds now; mutates."""
        self.data[_HOST_BYTES] = bytes_used

    def aggregate(self, other: KVConnectorStats) -> MarketStats:
        """Add another rank's or a later step's; mutates and returns self.

        Of several host tiers the largest stands: each rank has its own limit.
        """
        counts = self.data[_COUNTS]
        for name, amount in other.data[_COUNTS].items():
            counts[name] = counts.get(name, 0) + amount
        self.data[_SECONDS] += other.data[_SECONDS]
        if _HOST_BYTES in other.data:
            self.data[_HOST_BYTES] = max(self.data.get(_HOST_BYTES, 0), other.data[_HOST_BYTES])
        return self

    def reduce(self) -> dict[str, int | float]:
        """The log line's figures: every count, and the loads' mean duration."""
        figures: dict[str, int | float] = dict(sorted(self.data[_COUNTS].items()))
        if seconds := self.data[_SECONDS]:
            figures["loads"] = len(seconds)
            figures["mean_load_ms"] = round(1000 * sum(seconds) / len(seconds), 2)
        if _HOST_BYTES in self.data:
            figures["host_bytes"] = self.data[_HOST_BYTES]
        return figures

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not (self.data[_COUNTS] or self.data[_SECONDS])


class Tally:
    """Where threads count; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stats = MarketStats()

    def count(self, counter: str, label: str = "", amount: int = 1) -> None:
        """Add to a counter of COUNTERS; mutates."""
        with self._lock:
            self._stats.count(counter, label, amount)

    def took(self, seconds: float) -> None:
        """Note how long a request's load took; mutates."""
        with self._lock:
            self._stats.took(seconds)

    def take(self) -> MarketStats | None:
        """What was counted since the last call, None when nothing was."""
        with self._lock:
            if self._stats.is_empty():
                return None
            stats, self._stats = self._stats, MarketStats()
            return stats


class MarketPromMetrics(KVConnectorPromMetrics):
    """Registers the counters with Prometheus and feeds them what the workers counted."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(
                name=f"{PREFIX}{name}",
                documentation=f"kvmarket: {meaning}",
                labelnames=[*labelnames, label] if label else labelnames,
            )
            for name, (meaning, label) in COUNTERS.items()
        }
        self._load_seconds = self._histogram_cls(
            name=f"{PREFIX}load_seconds",
            documentation="kvmarket: how long a request waited for its chunks.",
            buckets=LOAD_SECONDS_BUCKETS,
            labelnames=labelnames,
        )
        self._host_bytes = self._gauge_cls(
            name=f"{PREFIX}host_cache_bytes",
            documentation="kvmarket: host memory that holds hot chunks, of the rank with most.",
            multiprocess_mode="mostrecent",
            labelnames=labelnames,
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one step's `MarketStats.data`."""
        labels = self.per_engine_labelvalues[engine_idx]
        for name, amount in transfer_stats_data[_COUNTS].items():
            counter, _, label = name.partition("/")
            values = [*labels, label] if label else labels
            self._counters[counter].labels(*values).inc(amount)
        for seconds in transfer_stats_data[_SECONDS]:
            self._load_seconds.labels(*labels).observe(seconds)
        if _HOST_BYTES in transfer_stats_data:
            self._host_bytes.labels(*labels).set(transfer_stats_data[_HOST_BYTES])
