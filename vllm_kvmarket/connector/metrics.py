"""Counts of both halves, on their way to vLLM's log line and to Prometheus.

vLLM collects a connector's stats once an engine step: the ranks' are added up, and the scheduler
half's to them. Their `data` goes to the process that serves /metrics.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from vllm_kvmarket.connector.metric_definitions import METRICS, PREFIX, named

_COUNTS, _DURATIONS, _GAUGES = "counts", "durations", "gauges"
_HOST_BYTES = "host_cache_bytes"
# An engine without a step does not deliver: what is noted must not grow for ever.
MAX_DURATIONS = 10_000


class MarketStats(KVConnectorStats):
    """Counts since the stats were last taken; `data` is plain JSON.

    `data["counts"]` and `data["gauges"]` map `name` or `name/label value` of a metric to a number,
    `data["durations"]` maps a histogram's name to seconds, one each an observation.
    """

    data: dict[str, Any]

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data=data or {})
        if not self.data:
            self.reset()

    def reset(self) -> None:
        """Begin anew; mutates."""
        self.data = {_COUNTS: {}, _DURATIONS: {}, _GAUGES: {}}

    def add(self, amounts: Mapping[str, float]) -> None:
        """Add to counters, named as in `data["counts"]`; mutates. Not synchronised."""
        counts = self.data[_COUNTS]
        for name, amount in amounts.items():
            counts[name] = counts.get(name, 0) + amount

    def took(self, histogram: str, seconds: float) -> None:
        """Note a duration; mutates. Not synchronised."""
        noted = self.data[_DURATIONS].setdefault(histogram, [])
        if len(noted) < MAX_DURATIONS:
            noted.append(seconds)

    def stands_at(self, gauge: str, value: float) -> None:
        """Note what `gauge`, with `/label value` where it has a label, is now; mutates."""
        self.data[_GAUGES][gauge] = value

    def aggregate(self, other: KVConnectorStats) -> MarketStats:
        """Add another rank's, the other half's or a later step's; mutates and returns self.

        Of several host tiers the largest stands: each rank has its own limit. Of any other gauge
        the later one does.
        """
        self.add(other.data[_COUNTS])
        durations, gauges = self.data[_DURATIONS], self.data[_GAUGES]
        for name, seconds in other.data[_DURATIONS].items():
            durations[name] = durations.get(name, []) + seconds
        for name, value in other.data[_GAUGES].items():
            gauges[name] = max(gauges.get(name, 0), value) if name == _HOST_BYTES else value
        return self

    def reduce(self) -> dict[str, int | float]:
        """The numbers of a log line: every count, durations' number and mean, and gauges."""
        values: dict[str, int | float] = dict(sorted(self.data[_COUNTS].items()))
        for name, seconds in sorted(self.data[_DURATIONS].items()):
            values[f"{name}_count"] = len(seconds)
            values[f"{name}_mean"] = round(sum(seconds) / len(seconds), 5)
        return values | dict(sorted(self.data[_GAUGES].items()))

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not any(self.data.values())


class Tally:
    """Where threads count; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stats = MarketStats()
        self._stand: dict[str, float] = {}
        # Read without the lock, once an engine step: that must cost nothing when there is nothing.
        self.has_news = False

    def count(self, counter: str, label: str = "", amount: float = 1) -> None:
        """Add to a counter; mutates."""
        self.add({f"{counter}/{label}" if label else counter: amount})

    def add(self, amounts: Mapping[str, float]) -> None:
        """Add to several counters, named `counter` or `counter/label value`; mutates."""
        with self._lock:
            self._stats.add(amounts)
            self.has_news = True

    def took(self, histogram: str, seconds: float) -> None:
        """Note a duration; mutates."""
        with self._lock:
            self._stats.took(histogram, seconds)
            self.has_news = True

    def stand_at(self, gauges: Mapping[str, float]) -> None:
        """Note what gauges are now; what has not changed is no news. Mutates."""
        with self._lock:
            for name, value in gauges.items():
                if self._stand.get(name) != value:
                    self._stand[name] = value
                    self._stats.stands_at(name, value)
                    self.has_news = True

    def take(self) -> MarketStats | None:
        """The counts since the last call, None when there are none."""
        if not self.has_news:
            return None
        with self._lock:
            stats, self._stats = self._stats, MarketStats()
            self.has_news = False
            return stats


class MarketPromMetrics(KVConnectorPromMetrics):
    """Registers every metric with Prometheus and feeds it what both halves counted.

    Series that can be named beforehand begin with 0, so that what happens once is a rate, too.
    """

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        kinds = {
            "counter": self._counter_cls,
            "gauge": self._gauge_cls,
            "histogram": self._histogram_cls,
        }
        self._metrics: dict[str, Any] = {}
        for name, metric in METRICS.items():
            more: dict[str, Any] = {}
            if metric.kind == "gauge":
                more["multiprocess_mode"] = "mostrecent"
            elif metric.kind == "histogram":
                more["buckets"] = metric.buckets
            self._metrics[name] = kinds[metric.kind](
                name=f"{PREFIX}{name}",
                documentation=f"kvmarket: {metric.meaning} In {metric.unit}.",
                labelnames=[*labelnames, metric.label] if metric.label else labelnames,
                **more,
            )
        self._counters = {name: self._metrics[name] for name in named("counter")}
        self._gauges = {name: self._metrics[name] for name in named("gauge")}
        for labels in per_engine_labelvalues.values():
            for name, metric in METRICS.items():
                for value in metric.values or ("",):
                    self._series(self._metrics, f"{name}/{value}" if value else name, labels)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one step's `MarketStats.data`."""
        labels = self.per_engine_labelvalues[engine_idx]
        for name, amount in transfer_stats_data[_COUNTS].items():
            self._series(self._counters, name, labels).inc(amount)
        for name, value in transfer_stats_data[_GAUGES].items():
            self._series(self._gauges, name, labels).set(value)
        for name, durations in transfer_stats_data[_DURATIONS].items():
            histogram = self._series(self._metrics, name, labels)
            for seconds in durations:
                histogram.observe(seconds)

    @staticmethod
    def _series(metrics: dict[str, Any], name: str, labels: list[object]) -> Any:
        """The series of `name` or `name/label value` of one engine."""
        metric, _, label = name.partition("/")
        return metrics[metric].labels(*labels, label) if label else metrics[metric].labels(*labels)
