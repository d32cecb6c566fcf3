"""What the charts show: break-even, reuse and revenue over time, TTFT by length."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import median

from vllm_kvmarket.api.models import Document
from vllm_kvmarket.api.observations import Observation
from vllm_kvmarket.api.pages import words
from vllm_kvmarket.api.pages.charts import Figure, Series, columns, lines
from vllm_kvmarket.ledger import Receipt

DAY_S = 86_400
HOUR_S = 3600
MOST_COLUMNS = 31
BREAK_EVEN_READS = 10
# Prompts of up to so many tokens are one group.
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
# A prompt counts as reused when at least this share of it was not computed, and as computed when
# less than the other one was.
REUSED_SHARE, COMPUTED_SHARE = 0.5, 0.05

Groups = dict[int, list[float]]


def break_even(shown: Document) -> Figure:
    """What so many reads of a document cost those who read: computed each time, or published once
    and reused.
    """
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
        f"{words.exactly(reads * once)}; computing it once and reusing it has cost "
        f"{words.exactly(once + reads * charge)}."
    )
    picture = lines(
        "break-even",
        title,
        description,
        [Series("Computed for every read", "other", computed), Series("Reused", "main", reused)],
        x_name="reads",
        y_name="cost",
        x_text=lambda value: f"{value:g}",
        y_text=lambda value: words.money(round(value)),
        mark=mark,
    )
    steps = sorted({0, 1, 2, reads // 2, reads, *([even] if even else [])})
    rows = [
        [str(read), words.exactly(read * once), words.exactly(once + read * charge)]
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
        f"{words.count(sum(tokens))} tokens in {words.count(sum(reuses))} reuses, from {labels[0]} "
        f"to {labels[-1]}."
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
        [label, words.count(number), words.count(saved)]
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
    """What reuse brought, and the publishers' part of it, by day or by hour."""
    labels, places = _periods(receipts, now_s)
    kept, royalties = [0] * len(labels), [0] * len(labels)
    for receipt in receipts:
        place = places(receipt.created_at_s)
        if place is not None:
            kept[place] += receipt.charge_nano - receipt.royalty_nano
            royalties[place] += receipt.royalty_nano
    title = "Revenue and royalties over time"
    description = (
        f"Reuse brought {words.exactly(sum(kept) + sum(royalties))}, of which publishers had "
        f"{words.exactly(sum(royalties))}, from {labels[0]} to {labels[-1]}."
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
        y_text=lambda value: words.money(round(value)),
    )
    rows = [
        [label, words.exactly(own + theirs), words.exactly(theirs), words.exactly(own)]
        for label, own, theirs in zip(labels, kept, royalties, strict=True)
        if own or theirs
    ]
    legend = [("main", "kept by the provider"), ("other", "royalties to publishers")]
    head = ["Time (UTC)", "Charged", "Royalties", "Kept"]
    return Figure("revenue", title, description, picture, legend, head, rows)


def ttft_by_length(seen: Sequence[Observation]) -> Figure | None:
    """The time to the first token of streams, reused against computed, by the prompt's length; None
    while none was seen whose length is known.
    """
    reused, computed = by_length(seen)
    groups = sorted({*reused, *computed})
    if not groups:
        return None
    title = "Time to the first token, by length of the prompt"
    description = "; ".join(
        f"up to {words.count(group)} tokens: reused {words.seconds(_median(reused.get(group)))}, "
        f"computed {words.seconds(_median(computed.get(group)))}"
        for group in groups
    )
    places = {group: number for number, group in enumerate(groups)}
    picture = lines(
        "ttft",
        title,
        f"Medians. {description}.",
        [
            Series("Computed", "other", _medians(computed, places)),
            Series("Reused", "main", _medians(reused, places)),
        ],
        x_name="tokens of the prompt, up to",
        y_name="median",
        x_text=lambda value: (
            words.count(groups[round(value)]) if value in range(len(groups)) else ""
        ),
        y_text=words.seconds,
        dots=True,
    )
    rows = [
        [
            words.count(group),
            str(len(computed.get(group, ()))),
            words.seconds(_median(computed.get(group))),
            str(len(reused.get(group, ()))),
            words.seconds(_median(reused.get(group))),
            _ratio(_median(computed.get(group)), _median(reused.get(group))),
        ]
        for group in groups
    ]
    head = ["Prompt, up to", "Computed", "Median", "Reused", "Median", "Times quicker"]
    legend = [("other", "computed (prefill)"), ("main", "reused")]
    return Figure("ttft", title, f"Medians. {description}.", picture, legend, head, rows)


def by_length(seen: Sequence[Observation]) -> tuple[Groups, Groups]:
    """How long streams waited for their first token, by the prompt's length: of those that were
    reused, and of those that were computed.
    """
    reused: Groups = defaultdict(list)
    computed: Groups = defaultdict(list)
    for each in seen:
        if not each.is_stream or not each.prompt_tokens:
            continue
        share = each.cached_tokens / each.prompt_tokens
        group = next((size for size in LENGTHS if each.prompt_tokens <= size), LENGTHS[-1])
        if share >= REUSED_SHARE:
            reused[group].append(each.first_s)
        elif share < COMPUTED_SHARE:
            computed[group].append(each.first_s)
    return reused, computed


def _median(values: Sequence[float] | None) -> float | None:
    return median(values) if values else None


def _medians(groups: Groups, places: dict[int, int]) -> list[tuple[float, float]]:
    return [
        (float(places[group]), median(values)) for group, values in sorted(groups.items()) if values
    ]


def _ratio(slow: float | None, quick: float | None) -> str:
    return f"{slow / quick:.1f}" if slow and quick else "-"


def _periods(
    receipts: Sequence[Receipt], now_s: float
) -> tuple[list[str], Callable[[float], int | None]]:
    """The columns from the first receipt to now, a day each, or an hour while that is not long ago;
    at most MOST_COLUMNS, the last ones.
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
