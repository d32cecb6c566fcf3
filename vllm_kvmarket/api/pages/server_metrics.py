"""Metrics of this server's process, from the Prometheus registry: the market's and vLLM's."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Sequence

from prometheus_client import REGISTRY, CollectorRegistry, multiprocess

PREFIX = "vllm:"
MARKET = "kvmarket_"
_ENGINE_LABELS = frozenset({"model_name", "engine"})


class ServerMetrics:
    """The metrics at one moment. Names are without `vllm:`; a missing metric is 0."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for family in registry.collect():
            if not family.name.startswith(PREFIX):
                continue
            for sample in family.samples:
                labels = [
                    value
                    for name, value in sorted(sample.labels.items())
                    if name not in _ENGINE_LABELS
                ]
                name = sample.name.removeprefix(PREFIX).removesuffix("_total")
                self._sums[name]["/".join(labels)] += sample.value

    @classmethod
    def now(cls) -> ServerMetrics:
        """Read the registry, of all API server processes where there are several."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return cls(REGISTRY)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return cls(registry)

    def total(self, name: str) -> float:
        """A metric, summed over its labels."""
        return sum(self._sums[name].values()) if name in self._sums else 0.0

    def by_label(self, name: str) -> dict[str, float]:
        """A metric by its label, the largest first."""
        found = self._sums.get(name, {})
        return dict(sorted(found.items(), key=lambda each: (-each[1], each[0])))

    def histogram(self, name: str) -> list[tuple[float, int]]:
        """How many observations each bucket has, by its upper end; the last end is infinite."""
        below = 0.0
        found = []
        for end, count in sorted(
            (float(label), count) for label, count in self.by_label(f"{name}_bucket").items()
        ):
            found.append((end, round(count - below)))
            below = count
        return found


def quantile(buckets: Sequence[tuple[float, int]], share: float) -> float | None:
    """The value below which `share` of a histogram lies; None if it is empty or beyond its ends.

    Inside a bucket values are taken as evenly spread, as Prometheus does.
    """
    wanted = share * sum(count for _, count in buckets)
    start = 0.0
    for end, count in buckets:
        if count and wanted <= count:
            return None if math.isinf(end) else start + (end - start) * wanted / count
        wanted -= count
        start = end
    return None
