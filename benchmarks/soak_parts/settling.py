"""When the load is over: what really happened, the repair of what was damaged, the server's log."""

from __future__ import annotations

import re
import time
from typing import Any

import httpx

from benchmarks.soak_parts.documents import Library
from benchmarks.soak_parts.faults import Operator
from benchmarks.soak_parts.plan import Plan, Story
from benchmarks.soak_parts.publishers import ROUTE
from benchmarks.soak_parts.server import Soaked
from vllm_kvmarket.catalogue import Listing

REPAIRED_WITHIN_S = 90.0
KVMARKET = "vllm:kvmarket_"
# What the log may not have: what broke, and charges that the ledger refused.
BAD_LINES = re.compile(r"Traceback|\bERROR\b|\bCRITICAL\b|was not booked|Task exception")


def evidence(server: Soaked, story: Story) -> dict[str, Any]:
    """That what was to be soaked took place, from the server's own counters."""
    counters = server.metrics()
    listings = server.market.catalogue.listings()
    kinds = ("load_failures", "chunks_loaded", "chunks_quarantined", "save_failures", "prefetches")
    metrics = {
        name: value
        for name, value in sorted(counters.items())
        if name.startswith(tuple(KVMARKET + kind for kind in kinds)) and "_created" not in name
    }
    failures = [n for n in metrics if n.startswith(f"{KVMARKET}load_failures") and "{" not in n]
    sold = {"published", *(each.document_id for each in listings if each.stored_bytes)}
    return {
        "preemptions": int(counters.get("vllm:num_preemptions_total", 0)),
        "load_failures": int(sum(metrics[name] for name in failures)),
        "faults_injected": sum(n for c, n in story.counts.items() if c.startswith("fault: ")),
        "faults_found_by_commands": story.counts["found by fsck"] + story.counts["found by repair"],
        "documents_published": len(sold) - 1,
        "evictions": story.counts["evicted"],
        "left": story.counts["left"],
        "metrics": metrics,
    }


def repair(server: Soaked, library: Library, story: Story) -> dict[str, Any]:
    """Verify all, publish again what was damaged, and check that nothing is left of the faults."""
    operator = Operator(server, story)
    operator.repair()
    with httpx.Client(timeout=120) as http:
        names = _publish_damaged(server, library, story, http)
    deadline = time.monotonic() + REPAIRED_WITHIN_S
    while open_ := _of_states(server, "publishing", "damaged"):
        if time.monotonic() > deadline:
            for each in open_:
                story.fail(f"{each.document_id} is {each.state} still: {each.reason}")
            break
        time.sleep(0.2)
    operator.gc()
    report = operator.execute("store", "check", good={0})  # here nothing may be bad
    return {
        "published_again": len(names),
        "chunks_verified": report.get("chunks_verified"),
        "chunks_damaged": report.get("chunks_damaged"),
        "used_bytes": report.get("used_bytes"),
        "live": len(_of_states(server, "live")),
    }


def _publish_damaged(
    server: Soaked, library: Library, story: Story, http: httpx.Client
) -> list[str]:
    """Each as its own publisher would; one that the library has forgotten is withdrawn."""
    known = {each.id: each for each in library.documents if each.id}
    names = []
    for listing in _of_states(server, "damaged"):
        document = known.get(listing.document_id)
        headers = {"authorization": f"Bearer {server.keys['operator']}"}
        if document is None:
            url = f"{server.base}{ROUTE}/{listing.document_id}"
            http.delete(url, headers=headers).raise_for_status()
            continue
        body: dict[str, Any] = {"title": document.title, "publisher": listing.terms.publisher}
        if document.text:
            body |= {"text": document.text, "as": "chat"}
        else:
            body["token_ids"] = document.tokens
        response = http.post(f"{server.base}{ROUTE}", json=body, headers=headers)
        if response.status_code not in (200, 202):
            story.fail(f"publishing {listing.document_id} again: {response.text[:200]}")
        story.accepted[listing.document_id] += 1
        names.append(listing.document_id)
    return names


def _of_states(server: Soaked, *states: str) -> list[Listing]:
    return [each for each in server.market.catalogue.listings() if each.state in states]


def scan_log(server: Soaked, story: Story) -> None:
    """Nothing in the server's log may tell of something that broke."""
    bad = [
        line
        for line in server.log.read_text(errors="replace").splitlines()
        if BAD_LINES.search(line)
    ]
    for line in bad[:20]:
        story.fail(f"server's log: {line[:300]}")


def missing(report: dict[str, Any], plan: Plan) -> list[str]:
    """Events that a soak needs, to prove anything."""
    found = report["evidence"]
    counts = report["counts"]
    needed = {
        "preemptions": found["preemptions"],
        "evictions": found["evictions"],
        "documents published": found["documents_published"],
        "clients that left": found["left"],
        "faults injected": found["faults_injected"],
        "faults found while loading": found["load_failures"],
        "answers charged": report["money"]["answers_charged"],
        "answers compared that were reused": report["exactness"]["compared_with_reuse"],
        "disk samples": counts.get("disk samples", 0),
    }
    return [f"the soak had no {what} (seed {plan.seed})" for what, n in needed.items() if not n]
