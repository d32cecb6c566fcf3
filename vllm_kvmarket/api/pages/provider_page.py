"""/kvmarket/provider: traffic, money, storage and faults, for the operator."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import REGISTRY, CollectorRegistry, multiprocess

from vllm_kvmarket.api.auth import ADMIN
from vllm_kvmarket.api.pages.charts import first_tokens, quantile, revenue_over_time
from vllm_kvmarket.api.pages.page import PageRoute, VisitorOf
from vllm_kvmarket.api.service import Service
from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.ledger import PROVIDER, Receipt

# Charts and sums are over this many of the newest receipts.
MOST_RECEIPTS = 5000
TOP = 10
FIRST_ANSWER_TIMES = "time_to_first_token_seconds"
PREFIX = "vllm:"
MARKET = "kvmarket_"
_ENGINE_LABELS = frozenset({"model_name", "engine"})

router = APIRouter(route_class=PageRoute)


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


@dataclass(frozen=True, slots=True)
class Traffic:
    """The engine's work since it started; shares and durations are None without requests."""

    requests: int
    reusing: int
    request_share: float | None
    token_share: float | None
    first_token_s: float | None
    slow_first_token_s: float | None


@dataclass(frozen=True, slots=True)
class Top:
    """A document that sells."""

    listing: Listing
    uses: int
    tokens: int
    earned_nano: int


@router.get("/provider")
def provider(visitor: VisitorOf) -> Response:
    """Traffic, money, storage, faults, top documents. Needs the scope admin."""
    visitor.caller.need(ADMIN)
    return visitor.page("provider.html", **_facts(visitor.service))


def traffic(metrics: ServerMetrics) -> Traffic:
    """Sum up requests and prompts by the market's and vLLM's metrics."""
    requests, reusing = metrics.total("request_success"), metrics.total("kvmarket_receipts")
    prompts, reused = metrics.total("prompt_tokens"), metrics.total("kvmarket_reused_tokens")
    first = metrics.histogram(FIRST_ANSWER_TIMES)
    return Traffic(
        requests=int(requests),
        reusing=int(reusing),
        request_share=reusing / requests if requests else None,
        token_share=reused / prompts if prompts else None,
        first_token_s=quantile(first, 0.5),
        slow_first_token_s=quantile(first, 0.95),
    )


def _facts(service: Service) -> dict[str, Any]:
    market = service.market
    receipts = market.ledger.receipts(limit=MOST_RECEIPTS)
    metrics = ServerMetrics.now()
    revenue = revenue_over_time(receipts, time.time())
    first = first_tokens(metrics.histogram(FIRST_ANSWER_TIMES))
    return {
        "traffic": traffic(metrics),
        "provider": market.ledger.account(PROVIDER),
        "sales": _sales(receipts),
        "most": MOST_RECEIPTS,
        "figures": [revenue] if first is None else [revenue, first],
        "has_first_tokens": first is not None,
        "tiers": _tiers(service, metrics),
        "usage": market.store.disk.usage(),
        "faults": _faults(metrics),
        "top": _top(service),
    }


def _sales(receipts: Sequence[Receipt]) -> dict[str, int]:
    return {
        "count": len(receipts),
        "reused": sum(each.tokens_reused for each in receipts),
        "charged": sum(each.charge_nano for each in receipts),
        "royalties": sum(each.royalty_nano for each in receipts),
        "saved": sum(each.recompute_nano - each.charge_nano for each in receipts),
    }


def _tiers(service: Service, metrics: ServerMetrics) -> list[tuple[str, str, int | None, int, int]]:
    """Name, what it is for, bytes held (None: not known here), bytes and chunks loaded from it."""
    market = service.market
    loaded, chunks = (
        metrics.by_label(f"{MARKET}{name}") for name in ("loaded_bytes", "chunks_loaded")
    )

    def row(tier: str, name: str, held: int | None) -> tuple[str, str, int | None, int, int]:
        return name, tier, held, int(loaded.get(tier, 0)), int(chunks.get(tier, 0))

    rows = [
        row("host", "Host memory", int(metrics.total(f"{MARKET}host_cache_bytes"))),
        row("disk", "Disk", market.store.disk.bytes_used()),
    ]
    objects = market.store.objects
    if objects is not None:
        rows.append(row("objects", "Object store", None))
    known = {"host", "disk", "objects"}
    return rows + [row(tier, tier, None) for tier in loaded if tier not in known]


def _faults(metrics: ServerMetrics) -> list[tuple[str, str, int]]:
    """Faults since the server started: kind, reason, how often."""
    rows = []
    for name, title in (
        ("load_failures", "Chunks that could not be loaded"),
        ("save_failures", "Publishing that could not be stored"),
        ("chunks_quarantined", "Damaged chunks taken out of the store"),
        ("declined_requests", "Requests that matched and were declined"),
        ("charges_refused", "Charges that the ledger refused in the end"),
    ):
        found = {
            reason: times for reason, times in metrics.by_label(f"{MARKET}{name}").items() if times
        }
        rows += [(title, reason or "all", int(times)) for reason, times in found.items()] or [
            (title, "all", 0)
        ]
    return rows


def _top(service: Service) -> list[Top]:
    market = service.market
    used = sorted(
        (each for each in market.catalogue.candidates() if each.uses),
        key=lambda each: (-each.earned_nano, -each.uses, each.document_id),
    )
    found = []
    for each in used[:TOP]:
        usage = market.catalogue.usage_of(each.document_id)
        listing = market.catalogue.get(each.document_id)
        found.append(Top(listing, usage.uses, usage.tokens_reused, usage.earned_nano))
    return found
