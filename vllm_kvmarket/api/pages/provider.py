"""/kvmarket/provider: how the market does, for its operator."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import Any

from fastapi import APIRouter, Response
from fastapi.concurrency import run_in_threadpool

from vllm_kvmarket.api.observations import Observation
from vllm_kvmarket.api.pages.counters import Counters
from vllm_kvmarket.api.pages.figures import (
    by_length,
    revenue_over_time,
    ttft_by_length,
)
from vllm_kvmarket.api.pages.page import PageRoute, VisitorOf
from vllm_kvmarket.api.service import ADMIN, Service
from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.ledger import PROVIDER, Receipt

# The charts and sums over sales are of so many of the newest receipts.
MOST_RECEIPTS = 5000
TOP = 10

router = APIRouter(route_class=PageRoute)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the gate saw of requests; shares and durations are None where nothing was seen."""

    requests: int
    reusing: int
    request_share: float | None
    token_share: float | None
    reused_s: float | None
    computed_s: float | None
    times_quicker: float | None


@dataclass(frozen=True, slots=True)
class Top:
    """A document that sells."""

    listing: Listing
    uses: int
    tokens: int
    earned_nano: int


@router.get("/provider")
async def provider(visitor: VisitorOf) -> Response:
    """Traffic, money, storage, faults, top documents. Needs the scope admin."""
    visitor.caller.need(ADMIN)
    facts = await run_in_threadpool(_facts, visitor.service)
    return visitor.page("provider.html", **facts)


def traffic(seen: Sequence[Observation]) -> Traffic:
    """Sum up what the gate saw. Durations are medians of streams: reused against computed ones;
    `times_quicker` compares prompts of about the same length, and is the median of those ratios.
    """
    known = [each for each in seen if each.prompt_tokens]
    reusing = [each for each in seen if each.reused_tokens]
    prompts = sum(each.prompt_tokens or 0 for each in known)
    reused, computed = by_length(seen)
    ratios = [
        median(computed[group]) / median(reused[group]) for group in reused if group in computed
    ]
    every_reused, every_computed = chain(*reused.values()), chain(*computed.values())
    return Traffic(
        requests=len(seen),
        reusing=len(reusing),
        request_share=len(reusing) / len(seen) if seen else None,
        token_share=sum(each.reused_tokens for each in known) / prompts if prompts else None,
        reused_s=median(every_reused) if reused else None,
        computed_s=median(every_computed) if computed else None,
        times_quicker=median(ratios) if ratios else None,
    )


def _facts(service: Service) -> dict[str, Any]:
    market = service.market
    receipts = market.ledger.receipts(limit=MOST_RECEIPTS)
    seen = service.observations.newest()
    revenue = revenue_over_time(receipts, time.time())
    ttft = ttft_by_length(seen)
    counted = Counters.now()
    return {
        "traffic": traffic(seen),
        "provider": market.ledger.account(PROVIDER),
        "sales": _sales(receipts),
        "most": MOST_RECEIPTS,
        "figures": [revenue] if ttft is None else [revenue, ttft],
        "has_ttft": ttft is not None,
        "tiers": _tiers(service, counted),
        "usage": market.store.usage(),
        "faults": _faults(counted),
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


def _tiers(service: Service, counted: Counters) -> list[tuple[str, str, int | None, int, int]]:
    """Name, what it is for, bytes held (None: not known here), bytes and chunks loaded from it."""
    market = service.market
    loaded, chunks = counted.by_label("loaded_bytes"), counted.by_label("chunks_loaded")

    def row(tier: str, name: str, held: int | None) -> tuple[str, str, int | None, int, int]:
        return name, tier, held, int(loaded.get(tier, 0)), int(chunks.get(tier, 0))

    rows = [
        row("host", "Host memory", int(counted.total("host_cache_bytes"))),
        row("disk", "Disk", market.store.bytes_used()),
    ]
    objects = market.store.objects
    if objects is not None:
        rows.append(row("objects", "Object store", None))
    known = {"host", "disk", "objects"}
    return rows + [row(tier, tier, None) for tier in loaded if tier not in known]


def _faults(counted: Counters) -> list[tuple[str, str, int]]:
    """What went wrong since the server started: kind, reason, how often."""
    rows = []
    for name, title in (
        ("load_failures", "Chunks that could not be loaded"),
        ("save_failures", "Publishing that could not be stored"),
        ("chunks_quarantined", "Damaged chunks taken out of the store"),
        ("declined_requests", "Requests that matched and were not let reuse"),
        ("charges_refused", "Charges that the ledger refused in the end"),
    ):
        found = {reason: times for reason, times in counted.by_label(name).items() if times}
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
