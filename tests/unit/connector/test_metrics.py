"""The connector's figures on their way from both halves to the log line and Prometheus."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from tests.support import ROOT
from vllm_kvmarket.connector import metric_definitions
from vllm_kvmarket.connector.metric_definitions import METRICS, PREFIX, named
from vllm_kvmarket.connector.metrics import MAX_DURATIONS, MarketPromMetrics, MarketStats, Tally


def counted() -> MarketStats:
    tally = Tally()
    tally.count("chunks_loaded", "host", 2)
    tally.count("chunks_loaded", "disk")
    tally.count("chunks_quarantined")
    tally.took("load_seconds", 0.5)
    stats = tally.take()
    assert stats is not None
    stats.stands_at("host_cache_bytes", 100)
    return stats


def of_scheduler() -> MarketStats:
    tally = Tally()
    tally.count("charged_nano", "reuse", 300_000)
    tally.took("ledger_commit_seconds", 0.004)
    tally.stand_at({"documents": 3, "stored_bytes/chunks": 4096})
    stats = tally.take()
    assert stats is not None
    return stats


def test_what_was_taken_is_not_counted_again():
    """Stats are those since the last step; nothing new is nothing at all."""
    tally = Tally()
    assert tally.take() is None
    tally.count("chunks_saved")
    assert tally.take().reduce() == {"chunks_saved": 1}
    assert tally.take() is None


def test_a_gauge_is_told_when_it_has_changed():
    """Engine steps do not carry the same number again and again."""
    tally = Tally()
    tally.stand_at({"documents": 1, "chunks": 3})
    assert tally.take().reduce() == {"documents": 1, "chunks": 3}
    tally.stand_at({"documents": 1, "chunks": 3})
    assert not tally.has_news
    tally.stand_at({"documents": 1, "chunks": 4})
    assert tally.take().reduce() == {"chunks": 4}


def test_an_engine_without_steps_does_not_hoard():
    """Durations that nobody takes are bounded; what is counted stays right."""
    tally = Tally()
    for _ in range(MAX_DURATIONS + 5):
        tally.took("ledger_commit_seconds", 0.001)
        tally.count("receipts")
    counted = tally.take().reduce()
    assert counted["ledger_commit_seconds_count"] == MAX_DURATIONS
    assert counted["receipts"] == MAX_DURATIONS + 5


def test_ranks_and_steps_add_up():
    """Counts and durations add up; of the host tiers the fullest stands."""
    stats, other = counted(), counted()
    other.stands_at("host_cache_bytes", 250)
    assert stats.aggregate(other) is stats
    stats.aggregate(counted())
    assert stats.reduce() == {
        "chunks_loaded/disk": 3,
        "chunks_loaded/host": 6,
        "chunks_quarantined": 3,
        "load_seconds_count": 3,
        "load_seconds_mean": 0.5,
        "host_cache_bytes": 250,
    }
    stats.reset()
    assert stats.is_empty()


def test_both_halves_add_up_and_of_their_gauges_the_later_stands():
    """As vLLM's scheduler does it: the workers' with the scheduler half's."""
    stats = counted().aggregate(of_scheduler())
    later = MarketStats()
    later.stands_at("documents", 2)
    figures_ = stats.aggregate(later).reduce()
    assert figures_["chunks_loaded/host"] == 2
    assert figures_["charged_nano/reuse"] == 300_000
    assert figures_["ledger_commit_seconds_mean"] == 0.004
    assert (figures_["documents"], figures_["stored_bytes/chunks"]) == (2, 4096)


def test_gauges_alone_are_worth_a_step():
    """vLLM drops stats that call themselves empty."""
    tally = Tally()
    tally.stand_at({"documents": 1})
    assert not tally.take().is_empty()
    assert MarketStats().is_empty()


def test_stats_survive_the_way_to_another_process():
    """The payload is plain JSON, and makes equal stats there."""
    stats = counted().aggregate(of_scheduler())
    again = MarketStats(json.loads(json.dumps(stats.to_dict())))
    assert again.reduce() == stats.reduce()


def registered() -> MarketPromMetrics:
    config = SimpleNamespace(kv_transfer_config=None)
    kinds = {kind: kind for kind in (Counter, Gauge, Histogram)}
    return MarketPromMetrics(config, kinds, ["engine"], {0: ["0"], 1: ["1"]})


@pytest.fixture
def metrics():
    unregister_vllm_metrics()
    yield registered()
    unregister_vllm_metrics()


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(PREFIX + name, {"engine": "1", **labels})


def test_prometheus_counts_what_both_halves_counted(metrics):
    """By engine and by label; a gauge is what it was last."""
    metrics.observe(counted().to_dict(), 1)
    metrics.observe(counted().aggregate(of_scheduler()).to_dict(), 1)
    assert value("chunks_loaded_total", tier="host") == 4
    assert value("chunks_quarantined_total") == 2
    assert value("load_seconds_count") == 2
    assert value("load_seconds_sum") == 1.0
    assert value("host_cache_bytes") == 100
    assert value("charged_nano_total", what="reuse") == 300_000
    assert value("stored_bytes", what="chunks") == 4096
    assert value("ledger_commit_seconds_bucket", le="0.005") == 1
    assert value("ledger_commit_seconds_bucket", le="0.0025") == 0
    assert value("chunks_loaded_total", engine="0", tier="host") == 0


def test_every_series_that_can_be_named_is_there_from_the_start(metrics):
    """A rate over the first occurrence needs the 0 before it."""
    for name, figure in METRICS.items():
        ending = {"counter": "_total", "gauge": "", "histogram": "_count"}[figure.kind]
        for label in figure.values or ("",):
            labels = {figure.label: label} if label else {}
            assert value(name + ending, **labels) == 0, (name, label)


def test_metrics_come_again_when_vllm_has_forgotten_them(metrics):
    """A second engine in the same process: vLLM drops all that begins with its prefix."""
    metrics.observe(counted().to_dict(), 1)
    unregister_vllm_metrics()
    assert value("chunks_quarantined_total") is None
    again = registered()
    again.observe(counted().to_dict(), 1)
    assert value("chunks_quarantined_total") == 1
    metrics.observe(counted().to_dict(), 1)  # the first engine goes on, unheard


def test_whatever_is_counted_is_registered_and_the_other_way_round():
    """A name that is counted and not registered would end the server's metrics task."""
    folder = ROOT / "vllm_kvmarket" / "connector"
    files = set(folder.glob("*.py")) - {folder / "figures.py"}
    text = "".join(path.read_text() for path in files)
    counted_ = set(re.findall(r'tally\.count\(\s*"(\w+)"', text))
    timed = set(re.findall(r'took[(,]\s*"(\w+)"', text))
    assert len(counted_) > 10
    assert counted_ <= set(named("counter"))
    assert timed == set(named("histogram"))
    unused = [name for name in METRICS if not re.search(rf'"{name}[/"]', text)]
    assert unused == []


def test_the_dashboard_shows_every_figure_and_no_other(metrics):
    """Grafana's panels ask for names that are registered, and leave none out."""
    dashboard = json.loads((ROOT / "docs" / "grafana" / "kvmarket.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    asked = {
        name
        for panel in panels
        for target in panel.get("targets", ())
        for name in re.findall(PREFIX + r"\w+", target["expr"])
    }
    assert asked <= set(REGISTRY._names_to_collectors)
    shown = {re.sub("_(bucket|sum|count)$", "", name) for name in asked}
    assert shown == {figure.exported(name) for name, figure in METRICS.items()}


def test_the_alerts_ask_for_what_is_registered():
    """Each expression names a metric, and a label's value; a rate is of a counter, a least value of
    a gauge.
    """
    kinds = {"rate(": "counter", "increase(": "counter", "min_over_time(": "gauge"}
    exported = {figure.exported(name): figure for name, figure in METRICS.items()}
    text = (ROOT / "docs" / "DEPLOYMENT.md").read_text().partition("## Alerts")[2]
    asked = re.findall(rf'(\w+\()?({PREFIX}\w+)(?:{{(\w+)="(\w+)"}})?(\[\w+\]\))?', text)
    assert len(asked) >= 8
    for function, name, label, value_, window in asked:
        figure = exported[name]
        assert (label, value_) == ("", "") or (label == figure.label and value_ in figure.values)
        assert bool(function) == bool(window)
        assert not function or kinds[function] == figure.kind


def test_the_documentation_has_the_table_of_figures():
    """docs/METRICS.md ends with what is registered; every reason to decline is explained."""
    text = (ROOT / "docs" / "METRICS.md").read_text()
    assert text.endswith("\n\n" + metric_definitions.table()), metric_definitions.table()
    explained = re.findall(r"^\| `(\w+)` \| ", text, re.MULTILINE)
    assert set(explained) == set(metric_definitions.DECLINED)
