"""Every metric that kvmarket exports: name, kind, unit, meaning. docs/METRICS.md is this table.

The names begin like vLLM's own, which forgets them together when a second engine starts in one
process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "vllm:kvmarket_"
TIERS = ("host", "disk", "objects")
# Why a request that matches a listing may not reuse it.
DECLINED = (
    "no_account",
    "unknown_account",
    "no_funds",
    "below_minimum",
    "max_price",
    "never",
    "invalid_token",
    "malformed",
    "other_tokens",
    "not_on_offer",
    "weights_changed",
    "ledger_busy",
    "ledger_unavailable",
    "ledger_refused",
)
LOAD_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
COMMIT_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `label` is the name of its one label, "" for none; `values` are what the label
    can say. A histogram has `buckets`, upper ends in its unit.
    """

    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    meaning: str
    label: str = ""
    values: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def exported(self, name: str) -> str:
        """The name that Prometheus knows; a histogram's series have endings behind it."""
        return f"{PREFIX}{name}_total" if self.kind == "counter" else f"{PREFIX}{name}"


def _counter(unit: str, meaning: str, label: str = "", values: tuple[str, ...] = ()) -> Metric:
    return Metric("counter", unit, meaning, label, values)


def _gauge(unit: str, meaning: str, label: str = "", values: tuple[str, ...] = ()) -> Metric:
    return Metric("gauge", unit, meaning, label, values)


# A request that publishes, preloads or audits is the operator's, and in none of the counts of
# requests' tokens. Each sample of a request with n > 1 is a request of its own.
METRICS: dict[str, Metric] = {
    # Requests
    "matched_tokens": _counter("tokens", "Tokens of ended requests that were on offer."),
    "reused_tokens": _counter("tokens", "Matched tokens that were not computed."),
    "loaded_tokens": _counter("tokens", "Reused tokens that came from the store."),
    "recomputed_tokens": _counter(
        "tokens",
        "Matched tokens that were computed: reuse was declined, chunks could not be loaded, or "
        "vLLM wanted them (a prompt's last token always is).",
        "reason",
        ("declined", "failed", "other"),
    ),
    "declined_requests": _counter(
        "requests", "Requests that matched and may not reuse it.", "reason", DECLINED
    ),
    "self_test_passed": _gauge(
        "boolean", "1: the engine has shown that it reuses exactly; 0: it reuses nothing."
    ),
    # Money
    "charged_nano": _counter(
        "nano-units of the settlement currency",
        "Charges that the ledger has booked, for reuse and for publishing.",
        "what",
        ("reuse", "publish"),
    ),
    "royalties_nano": _counter(
        "nano-units of the settlement currency", "Of the charges: royalties booked to publishers."
    ),
    "receipts": _counter("receipts", "Receipts that the ledger has booked."),
    "charges_refused": _counter(
        "charges", "Charges that the ledger refused in the end: delivered, and not paid."
    ),
    "provider_balance_nano": _gauge(
        "nano-units of the settlement currency", "What the provider's account has."
    ),
    "reserved_nano": _gauge(
        "nano-units of the settlement currency", "Reserved for the provider, and not settled yet."
    ),
    # The ledger
    "ledger_queue_batches": _gauge("batches", "Batches that wait for the ledger's writer."),
    "ledger_commit_seconds": Metric(
        "histogram",
        "seconds",
        "How long the ledger's writer took to make a group of batches durable.",
        buckets=COMMIT_BUCKETS,
    ),
    # What is on offer, and what it takes
    "documents": _gauge("documents", "Documents that can be matched, at least in part."),
    "chunks": _gauge(
        "chunks", "Chunks that can be matched; one that several documents share counts once."
    ),
    "stored_bytes": _gauge(
        "bytes",
        "What the disk tier's folder holds: chunks, and damaged files that were set aside.",
        "what",
        ("chunks", "quarantine"),
    ),
    "host_cache_bytes": _gauge(
        "bytes", "Host memory that holds hot chunks, of the rank with most."
    ),
    "pinned_blocks": _gauge("blocks", "Blocks of the paged cache that pinned documents have."),
    # Transfers, counted by every rank
    "chunks_loaded": _counter("chunks", "Chunks loaded into the paged cache.", "tier", TIERS),
    "loaded_bytes": _counter("bytes", "Bytes loaded into the paged cache.", "tier", TIERS),
    "chunk_load_seconds": _counter(
        "seconds", "Threads' time in loading chunks; several load at once.", "tier", TIERS
    ),
    "load_seconds": Metric(
        "histogram", "seconds", "How long a request waited for its chunks.", buckets=LOAD_BUCKETS
    ),
    "step_loads": _counter(
        "requests", "Loads from memory for which a step waited, because other requests ran."
    ),
    "chunks_converted": _counter("chunks", "Chunks loaded from another layout."),
    "load_failures": _counter(
        "chunks",
        "Chunks that could not be loaded and were computed.",
        "reason",
        ("damaged", "missing", "layout", "io"),
    ),
    "chunks_quarantined": _counter("chunks", "Damaged chunks taken out of the store."),
    "prefetches": _counter(
        "chunks",
        "Chunks that were to be read ahead.",
        "result",
        ("done", "present", "no_room", "dropped", "failed"),
    ),
    "chunks_saved": _counter("chunks", "Chunks stored."),
    "saved_bytes": _counter("bytes", "Bytes stored."),
    "chunk_save_seconds": _counter("seconds", "Threads' time in storing chunks."),
    "save_failures": _counter(
        "requests",
        "Publishing requests that could not be stored whole.",
        "reason",
        ("full", "io"),
    ),
    "chunks_audited": _counter(
        "chunks",
        "Chunks compared with recomputed ones.",
        "result",
        ("exact", "close", "different", "unread"),
    ),
}


def named(kind: str) -> list[str]:
    """The names of one kind of metric."""
    return [name for name, metric in METRICS.items() if metric.kind == kind]


def table() -> str:
    """All values as a table in Markdown, which docs/METRICS.md holds."""
    lines = ["| name | type | unit | labels | meaning |", "|---|---|---|---|---|"]
    for name, metric in METRICS.items():
        label = f"`{metric.label}`: {', '.join(metric.values)}" if metric.label else ""
        lines.append(
            f"| `{metric.exported(name)}` | {metric.kind} | {metric.unit} | {label} "
            f"| {metric.meaning} |"
        )
    return "\n".join(lines) + "\n"
