"""What this server's process counted: the market's own figures in the Prometheus registry."""

from __future__ import annotations

import os
from collections import defaultdict

from prometheus_client import REGISTRY, CollectorRegistry, multiprocess

PREFIX = "vllm:kvmarket_"
_ENGINE_LABELS = frozenset({"model_name", "engine"})


class Counters:
    """The figures as of one moment; what nobody counted is 0."""

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
    def now(cls) -> Counters:
        """Read the registry, that of all API server processes where there are several."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return cls(REGISTRY)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return cls(registry)

    def total(self, name: str) -> float:
        """A figure over all of its labels."""
        return sum(self._sums[name].values()) if name in self._sums else 0.0

    def by_label(self, name: str) -> dict[str, float]:
        """A figure by its label, the largest first."""
        found = self._sums.get(name, {})
        return dict(sorted(found.items(), key=lambda each: (-each[1], each[0])))
