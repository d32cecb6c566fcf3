"""The connector's figures on their way from the workers to the log line and Prometheus."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram

from vllm_kvmarket.connector.metrics import (
    COUNTERS,
    PREFIX,
    MarketPromMetrics,
    MarketStats,
    Tally,
)


def counted() -> MarketStats:
    tally = Tally()
    tally.count("chunks_loaded", "host", 2)
    tally.count("chunks_loaded", "disk")
    tally.count("chunks_quarantined")
    tally.took(0.5)
    stats = tally.take()
    assert stats is not None
    stats.host_bytes(100)
    return stats


def test_what_was_taken_is_not_counted_again():
    """Stats are those since the last step; nothing new is nothing at all."""
    tally = Tally()
    assert tally.take() is None
    tally.count("chunks_saved")
    assert tally.take().reduce() == {"chunks_saved": 1}
    assert tally.take() is None


def test_ranks_and_steps_add_up():
    """Counts and durations add up; of the host tiers the fullest stands."""
    stats, other = counted(), counted()
    other.host_bytes(250)
    assert stats.aggregate(other) is stats
    assert stats.reduce() == {
        "chunks_loaded/disk": 2,
        "chunks_loaded/host": 4,
        "chunks_quarantined": 2,
        "loads": 2,
        "mean_load_ms": 500.0,
        "host_bytes": 250,
    }
    stats.reset()
    assert stats.is_empty()


def test_stats_survive_the_way_to_another_process():
    """The payload is plain JSON, and makes equal stats there."""
    stats = counted()
    again = MarketStats(json.loads(json.dumps(stats.to_dict())))
    assert again.reduce() == stats.reduce()


@pytest.fixture
def metrics():
    made = []

    def remember(kind):
        def make(**facts):
            made.append(kind(**facts))
            return made[-1]

        return make

    kinds = {kind: remember(kind) for kind in (Counter, Gauge, Histogram)}
    config = SimpleNamespace(kv_transfer_config=None)
    yield MarketPromMetrics(config, kinds, ["engine"], {0: ["0"], 1: ["1"]})
    for metric in made:
        REGISTRY.unregister(metric)


def test_prometheus_counts_what_the_workers_counted(metrics):
    """By engine and by label; a gauge is what it was last."""
    metrics.observe(counted().to_dict(), 1)
    metrics.observe(counted().to_dict(), 1)

    def value(name, **labels):
        return REGISTRY.get_sample_value(PREFIX + name, {"engine": "1", **labels})

    assert value("chunks_loaded_total", tier="host") == 4
    assert value("chunks_quarantined_total") == 2
    assert value("load_seconds_count") == 2
    assert value("load_seconds_sum") == 1.0
    assert value("host_cache_bytes") == 100
    assert REGISTRY.get_sample_value(f"{PREFIX}chunks_loaded_total", {"engine": "0"}) is None


def test_every_counter_is_known_to_prometheus(metrics):
    """A name that is counted and not registered would end the server's metrics thread."""
    for name, (_, label) in COUNTERS.items():
        stats = MarketStats()
        stats.count(name, "x" if label else "")
        metrics.observe(stats.to_dict(), 0)
        labels = {"engine": "0"} | ({label: "x"} if label else {})
        assert REGISTRY.get_sample_value(f"{PREFIX}{name}_total", labels) == 1


def test_the_dashboard_shows_every_metric_and_no_other(metrics):
    """Grafana's panels ask for the names that are registered, and leave none out."""
    path = Path(__file__).parents[2] / "docs" / "grafana" / "kvmarket.json"
    asked = set(re.findall(PREFIX + r"\w+", path.read_text()))
    counters = {f"{PREFIX}{name}_total" for name in COUNTERS}
    assert asked == counters | {f"{PREFIX}load_seconds_bucket", f"{PREFIX}host_cache_bytes"}
    registered = REGISTRY._names_to_collectors
    assert asked <= set(registered)
