"""The provider's page: traffic, money, storage, faults and top documents, for admins alone."""

from __future__ import annotations

import math
import re
import time

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tests.support.api_server import publish, text_of
from tests.support.page_visitor import Visitor, sell
from vllm_kvmarket.api.pages.charts import (
    MOST_COLUMNS,
    first_tokens,
    quantile,
    reuse_over_time,
    revenue_over_time,
)
from vllm_kvmarket.api.pages.provider_page import ServerMetrics, traffic
from vllm_kvmarket.catalogue import Use
from vllm_kvmarket.core.pricing import format_nano

TEXT = text_of(600)
DAY_S = 86_400


@pytest.fixture
def admin(server):
    visitor = Visitor(server.app)
    visitor.sign_in(server.keys["admin"])
    return visitor


def registry_of(monkeypatch):
    """A registry that the page reads instead of the process's own."""
    registry = CollectorRegistry()
    metrics = classmethod(lambda cls: cls(registry))
    monkeypatch.setattr(ServerMetrics, "now", metrics)
    return registry


def table_of(page, name):
    """A table's rows as lists of texts, without its head."""
    table = re.search(rf'<table id="{name}">.*?</table>', page.text, re.DOTALL)[0]
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in table.split("<tr>")[2:]]
    return [[re.sub(r"<[^>]+>", "", cell) for cell in row] for row in rows]


def test_the_page_is_for_admins(server):
    """Publishers and buyers are refused; a visitor without a session may sign in."""
    for name in ("pat", "bea"):
        visitor = Visitor(server.app)
        visitor.sign_in(server.keys[name])
        assert visitor.get("/provider").status_code == 403
        assert "Provider</a>" not in visitor.get("/money").text
    assert Visitor(server.app).get("/provider").status_code == 303


def test_a_market_without_sales_has_a_page(admin):
    """Nothing is divided by nothing; what nobody counted is 0."""
    page = admin.get("/provider")
    assert page.status_code == 200 and page.text.count("<svg") == 1
    faults = table_of(page, "faults")
    assert len(faults) == 5 and {row[-1] for row in faults} == {"0"}
    assert [row[0] for row in table_of(page, "tiers")] == ["Host memory", "Disk"]


def test_sales_and_documents_are_the_ledgers_and_the_catalogues(server, admin):
    """Revenue, royalties and the best document are what was booked."""
    made = publish(server, title="Whales", text=TEXT)
    publish(server, title="Birds", text=text_of(80, "b"))
    sold = [sell(server, TEXT, key=f"k{number}") for number in range(3)]
    kept = sum(each.charge_nano - each.royalty_nano for each in sold)
    server.market.catalogue.note_uses([Use(made["id"], 1797, kept, time.time())])
    page = admin.get("/provider")
    assert format_nano(sum(each.charge_nano for each in sold)) in page.text
    assert format_nano(kept) in page.text
    ((title, publisher, uses, tokens, earned),) = table_of(page, "top")
    assert (title, publisher, uses, tokens) == ("Whales", "pat", "1", "1,797")
    assert earned == format_nano(kept)


def test_traffic_is_read_from_the_metrics(admin, monkeypatch):
    """Hit rate by requests and tokens, and how long answers took to their first token."""
    registry = registry_of(monkeypatch)
    engine = ["model_name", "engine"]
    served = Counter("vllm:request_success", "x", [*engine, "finished_reason"], registry=registry)
    served.labels("m", "0", "stop").inc(3)
    served.labels("m", "0", "length").inc()
    Counter("vllm:kvmarket_receipts", "x", engine, registry=registry).labels("m", "0").inc(2)
    Counter("vllm:prompt_tokens", "x", engine, registry=registry).labels("m", "0").inc(4000)
    reused = Counter("vllm:kvmarket_reused_tokens", "x", engine, registry=registry)
    reused.labels("m", "0").inc(1800)
    first = Histogram(
        "vllm:time_to_first_token_seconds", "x", engine, buckets=(0.1, 1, 10), registry=registry
    )
    for took_s in (0.05, 0.08, 2.0, 3.0):
        first.labels("m", "0").observe(took_s)
    page = admin.get("/provider").text
    assert "50.0%" in page and "45.0%" in page and "2 of 4 requests" in page
    assert page.count("<svg") == 2
    assert "half within 100 ms, 95% within 9.1 s" in page


def test_nothing_is_divided_by_nothing():
    """Without requests there are no shares, no times and no chart."""
    none = traffic(ServerMetrics(CollectorRegistry()))
    assert (none.requests, none.request_share, none.token_share) == (0, None, None)
    assert none.first_token_s is None and first_tokens([]) is None
    assert first_tokens([(1.0, 0), (math.inf, 0)]) is None


def test_a_quantile_lies_inside_its_bucket():
    """Evenly spread, as Prometheus takes it; beyond the last end there is no number."""
    buckets = [(1.0, 10), (2.0, 0), (4.0, 10), (math.inf, 0)]
    assert quantile(buckets, 0.25) == 0.5
    assert quantile(buckets, 0.5) == 1.0
    assert quantile(buckets, 0.75) == 3.0
    assert quantile([(1.0, 1), (math.inf, 3)], 0.9) is None


def test_the_chart_of_first_tokens_has_each_bucket_once():
    """From the first bucket with an answer to the last one, with counts and shares."""
    figure = first_tokens([(0.1, 0), (0.25, 3), (0.5, 0), (1.0, 1), (math.inf, 0)])
    assert figure.rows == [
        ["250 ms", "3", "75.0%"],
        ["500 ms", "0", "0.0%"],
        ["1 s", "1", "25.0%"],
    ]
    assert str(figure.svg).count("<rect") == 2


def test_the_charts_of_time_add_up(server):
    """All receipts of the period are in a column, those before it in none; at most so many."""
    publish(server, title="Whales", text=TEXT)
    one = sell(server, TEXT)
    now_s = 1_790_000_000.0
    receipts = [
        msgspec.structs.replace(one, created_at_s=now_s - days * DAY_S) for days in range(100)
    ]
    money, tokens = revenue_over_time(receipts, now_s), reuse_over_time(receipts, now_s)
    assert len(money.rows) == len(tokens.rows) == MOST_COLUMNS
    for label, charged, royalties, kept in money.rows:
        assert charged == format_nano(one.charge_nano), label
        assert float(royalties) + float(kept) == pytest.approx(float(charged))
    young = reuse_over_time([msgspec.structs.replace(one, created_at_s=now_s - 60)], now_s)
    assert len(young.rows) == 1 and young.rows[0][0].endswith(":00")
    assert revenue_over_time([], now_s).rows == []


def test_counters_are_read_by_name_and_label():
    """Over engines and models; other programs' figures are not ours."""
    registry = CollectorRegistry()
    failures = Counter(
        "vllm:kvmarket_load_failures", "x", ["model_name", "engine", "reason"], registry=registry
    )
    failures.labels("m", "0", "damaged").inc(2)
    failures.labels("m", "1", "damaged").inc(3)
    failures.labels("m", "0", "missing").inc()
    Gauge("vllm:kvmarket_host_cache_bytes", "x", ["engine"], registry=registry).labels("0").set(7)
    Histogram("vllm:kvmarket_load_seconds", "x", registry=registry).observe(1)
    Counter("vllm:other_load_failures", "x", registry=registry).inc(100)
    metrics = ServerMetrics(registry)
    assert metrics.by_label("kvmarket_load_failures") == {"damaged": 5, "missing": 1}
    assert metrics.total("kvmarket_load_failures") == 6
    assert metrics.total("kvmarket_host_cache_bytes") == 7
    assert metrics.total("nothing") == 0 and metrics.by_label("nothing") == {}


def test_faults_are_told_by_reason(admin, monkeypatch):
    """Failed loads with their reasons, and the quarantine; a reason is no markup."""
    registry = registry_of(monkeypatch)
    failures = Counter("vllm:kvmarket_load_failures", "x", ["reason"], registry=registry)
    failures.labels("<missing>").inc(4)
    Counter("vllm:kvmarket_chunks_quarantined", "x", registry=registry).inc(2)
    page = admin.get("/provider")
    rows = {row[0]: row[1:] for row in table_of(page, "faults")}
    assert rows["Chunks that could not be loaded"] == ["&lt;missing&gt;", "4"]
    assert rows["Damaged chunks taken out of the store"] == ["all", "2"]
