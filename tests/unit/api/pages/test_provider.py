"""The provider's page: traffic, money, storage, faults and top documents, for admins alone."""

from __future__ import annotations

import re
import time

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tests.support.api_server import publish, running, text_of
from tests.support.page_visitor import Visitor, sell
from vllm_kvmarket.api.observations import Observation
from vllm_kvmarket.api.pages import provider
from vllm_kvmarket.api.pages.counters import Counters
from vllm_kvmarket.api.pages.figures import (
    MOST_COLUMNS,
    reuse_over_time,
    revenue_over_time,
    ttft_by_length,
)
from vllm_kvmarket.api.pages.provider import traffic
from vllm_kvmarket.catalogue import Use
from vllm_kvmarket.core.pricing import format_nano

TEXT = text_of(600)
DAY_S = 86_400


@pytest.fixture
def server(tmp_path):
    with running(tmp_path) as served:
        yield served


@pytest.fixture
def admin(server):
    visitor = Visitor(server.app)
    visitor.sign_in(server.keys["admin"])
    return visitor


def seen(prompt, cached, first_s, *, stream=True, reused=None):
    charged = cached if reused is None else reused
    return Observation(time.time(), first_s, stream, prompt, charged, cached)


def table_of(page, name):
    """A table's rows as lists of texts, without its head."""
    table = re.search(rf'<table id="{name}">.*?</table>', page.text, re.DOTALL)[0]
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in table.split("<tr>")[2:]]
    return [[re.sub(r"<[^>]+>", "", cell) for cell in row] for row in rows]


def test_the_page_is_for_admins(server):
    """Publishers and buyers are told that they may not; who is not signed in may sign in."""
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


def test_what_the_gate_saw_is_summed_up(server, admin):
    """Hit rate by requests and tokens, medians of streams, and how many times quicker."""
    whole = seen(1000, 0, 9.0, stream=False)
    for each in (seen(1000, 900, 0.1), seen(1000, 900, 0.1), seen(1000, 0, 1.0), whole):
        server.service.observations.add(each)
    page = admin.get("/provider").text
    assert "50.0%" in page and "45.0%" in page and "10.0 times" in page
    assert page.count("<svg") == 2 and "100 ms" in page and "1 s" in page


def test_times_quicker_compares_prompts_of_the_same_length():
    """Many short computed prompts do not make reuse of long ones look slow, nor the reverse."""
    told = traffic(
        [seen(100, 0, 0.1) for _ in range(50)]
        + [seen(100, 90, 0.05)]
        + [seen(4000, 3900, 0.2) for _ in range(50)]
        + [seen(4000, 0, 4.0)]
    )
    assert told.computed_s == pytest.approx(0.1) and told.reused_s == pytest.approx(0.2)
    assert told.times_quicker == pytest.approx((2 + 20) / 2)


def test_unknown_lengths_are_in_no_rate_of_tokens():
    """A stream that does not say its prompt's length counts as a request, and in nothing else."""
    told = traffic([seen(None, 0, 1.0), seen(1000, 500, 1.0)])
    assert (told.requests, told.request_share, told.token_share) == (2, 0.5, 0.5)
    assert told.computed_s is None and ttft_by_length([seen(None, 0, 1.0)]) is None
    assert traffic([]).request_share is None


def test_the_ttft_chart_has_each_length_once():
    """A row for each group of lengths, with counts and medians; half reused is in neither line."""
    figure = ttft_by_length(
        [seen(200, 0, 0.2), seen(200, 0, 0.4), seen(3000, 2900, 0.1), seen(3000, 900, 5.0)]
    )
    assert [row[:5] for row in figure.rows] == [
        ["256", "2", "300 ms", "0", "-"],
        ["4,096", "0", "-", "1", "100 ms"],
    ]
    assert str(figure.svg).count("<circle") == 2


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
    counted = Counters(registry)
    assert counted.by_label("load_failures") == {"damaged": 5, "missing": 1}
    assert counted.total("load_failures") == 6 and counted.total("host_cache_bytes") == 7
    assert counted.total("nothing") == 0 and counted.by_label("nothing") == {}


def test_faults_are_told_by_reason(admin, monkeypatch):
    """What failed to load and why, what is in quarantine, and reasons are no markup."""
    registry = CollectorRegistry()
    failures = Counter("vllm:kvmarket_load_failures", "x", ["reason"], registry=registry)
    failures.labels("<missing>").inc(4)
    Counter("vllm:kvmarket_chunks_quarantined", "x", registry=registry).inc(2)
    monkeypatch.setattr(provider.Counters, "now", classmethod(lambda cls: cls(registry)))
    page = admin.get("/provider")
    told = {row[0]: row[1:] for row in table_of(page, "faults")}
    assert told["Chunks that could not be loaded"] == ["&lt;missing&gt;", "4"]
    assert told["Damaged chunks taken out of the store"] == ["all", "2"]
