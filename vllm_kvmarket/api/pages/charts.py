"""The charts of the pages: break-even, reuse and revenue over time, time to the first token."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from vllm_kvmarket.api.models import Document
from vllm_kvmarket.api.pages import formatting
from vllm_kvmarket.api.pages.server_metrics import quantile
from vllm_kvmarket.api.pages.svg import Figure, Series, columns, lines
from vllm_kvmarket.ledger import Receipt

DAY_S = 86_400
HOUR_S = 3600
MOST_COLUMNS = 31
BREAK_EVEN_READS = 10


def break_even(shown: Document) -> Figure:
    """The cost of reads of a document: computed each time, or computed once and then reused."""
    once, charge = shown.recompute_nano, shown.charge_nano
    even = shown.break_even_reuses
    reads = BREAK_EVEN_READS if even is None else max(BREAK_EVEN_READS, min(2 * even, 1000))
    computed = [(read, read * once) for read in (0, reads)]
    reused = [(read, once + read * charge) for read in (0, reads)]
    if even is None:
        title = "Reuse costs as much as computing: it never pays back"
        mark = None
    else:
        title = f"Reuse has paid back from read {even} on"
        mark = (float(even), float(even * once), f"read {even}")
    description = (
        f"After {reads} reads, computing the document each time has cost "
        f"{formatting.exactly(reads * once)}; computing it once and reusing it has cost "
        f"{formatting.exactly(once + reads * charge)}."
    )
    picture = lines(
        "break-even",
        title,
        description,
        [Series("Computed for every read", "other", computed), Series("Reused", "main", reused)],
        x_name="reads",
        y_name="cost",
        x_text=lambda value: f"{value:g}",
        y_text=lambda value: formatting.money(round(value)),
        mark=mark,
    )
    steps = sorted({0, 1, 2, reads // 2, reads, *([even] if even else [])})
    rows = [
        [str(read), formatting.exactly(read * once), formatting.exactly(once + read * charge)]
        for read in steps
        if read <= reads
    ]
    legend = [("other", "computed for every read"), ("main", "computed once, then reused")]
    head = ["Reads", "Computed for every read", "Computed once, then reused"]
    return Figure("break-even", title, description, picture, legend, head, rows)


def reuse_over_time(receipts: Sequence[Receipt], now_s: float) -> Figure:
    """How many tokens of a document were reused, by day or by hour."""
    labels, places = _periods(receipts, now_s)
    reuses, tokens = [0] * len(labels), [0] * len(labels)
    for receipt in receipts:
        place = places(receipt.created_at_s)
        if place is not None:
            reuses[place] += 1
            tokens[place] += receipt.tokens_reused
    title = "Tokens reused over time"
    description = (
        f"{formatting.count(sum(tokens))} tokens in {formatting.count(sum(reuses))} reuses, "
        f"from {labels[0]} to {labels[-1]}."
    )
    points = [(float(place), float(number)) for place, number in enumerate(tokens)]
    picture = columns(
        "reuse",
        title,
        description,
        labels,
        [Series("Tokens reused", "main", points)],
        x_name="time, UTC",
        y_name="tokens",
        y_text=_short,
    )
    rows = [
        [label, formatting.count(number), formatting.count(saved)]
        for label, number, saved in zip(labels, reuses, tokens, strict=True)
        if number
    ]
    return Figure(
        "reuse",
        title,
        description,
        picture,
        [("main", "tokens reused")],
        ["Time (UTC)", "Reuses", "Tokens reused"],
        rows,
    )


def revenue_over_time(receipts: Sequence[Receipt], now_s: float) -> Figure:
    """Revenue from reuse, and the publishers' part of it, by day or by hour."""
    labels, places = _periods(receipts, now_s)
    kept, royalties = [0] * len(labels), [0] * len(labels)
    for receipt in receipts:
        place = places(receipt.created_at_s)
        if place is not None:
            kept[place] += receipt.charge_nano - receipt.royalty_nano
            royalties[place] += receipt.royalty_nano
    title = "Revenue and royalties over time"
    description = (
        f"Reuse brought {formatting.exactly(sum(kept) + sum(royalties))}, of which publishers had "
        f"{formatting.exactly(sum(royalties))}, from {labels[0]} to {labels[-1]}."
    )
    picture = columns(
        "revenue",
        title,
        description,
        labels,
        [
            Series("Kept", "main", [(float(at), float(nano)) for at, nano in enumerate(kept)]),
            Series(
                "Royalties",
                "other",
                [(float(at), float(nano)) for at, nano in enumerate(royalties)],
            ),
        ],
        x_name="time, UTC",
        y_name="amount",
        y_text=lambda value: formatting.money(round(value)),
    )
    rows = [
        [
            label,
            formatting.exactly(own + theirs),
            formatting.exactly(theirs),
            formatting.exactly(own),
        ]
        for label, own, theirs in zip(labels, kept, royalties, strict=True)
        if own or theirs
    ]
    legend = [("main", "kept by the provider"), ("other", "royalties to publishers")]
    head = ["Time (UTC)", "Charged", "Royalties", "Kept"]
    return Figure("revenue", title, description, picture, legend, head, rows)


def first_tokens(buckets: Sequence[tuple[float, int]]) -> Figure | None:
    """How long answers took to their first token, by bucket; None if there were none."""
    total = sum(count for _, count in buckets)
    if not total:
        return None
    used = [number for number, (_, count) in enumerate(buckets) if count]
    shown = buckets[used[0] : used[-1] + 1]
    labels = [formatting.seconds(end) if math.isfinite(end) else "more" for end, _ in shown]
    half, most = (formatting.seconds(quantile(buckets, share)) for share in (0.5, 0.95))
    title = "Time to the first token"
    description = f"{formatting.count(total)} answers: half within {half}, 95% within {most}."
    picture = columns(
        "ttft",
        title,
        description,
        labels,
        [Series("Answers", "main", [(float(at), float(n)) for at, (_, n) in enumerate(shown)])],
        x_name="first token within",
        y_name="answers",
        y_text=_short,
    )
    rows = [
        [label, formatting.count(count), formatting.share(count / total)]
        for label, (_, count) in zip(labels, shown, strict=True)
    ]
    head = ["First token within", "Answers", "Share"]
    return Figure("ttft", title, description, picture, [("main", "answers")], head, rows)


def _periods(
    receipts: Sequence[Receipt], now_s: float
) -> tuple[list[str], Callable[[float], int | None]]:
    """The columns from the first receipt to now: days, or hours while the first is not long ago.

    At most MOST_COLUMNS, the last ones. The function gives a time's column.
    """
    first_s = min((each.created_at_s for each in receipts), default=now_s)
    is_young = now_s - first_s < 2 * DAY_S
    width_s = HOUR_S if is_young else DAY_S
    last = int(now_s // width_s)
    start = max(min(int(first_s // width_s), last - 6), last - MOST_COLUMNS + 1)
    form = "%d %b %H:00" if is_young else "%d %b"
    labels = [
        time.strftime(form, time.gmtime(number * width_s)) for number in range(start, last + 1)
    ]

    def place(at_s: float) -> int | None:
        number = int(at_s // width_s) - start
        return number if 0 <= number < len(labels) else None

    return labels, place


def _short(value: float) -> str:
    """A count in few characters."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
