"""The charts of the pages: break-even, reuse and revenue over time, time to the first token.

They are inline SVG in the page's light or dark colours: colours are classes of the style sheet, and
series differ in dash or pattern too. Every chart has a title and a description for people who
cannot see it, and a table with the same numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from vllm_kvmarket.api.models import Document
from vllm_kvmarket.api.pages.formatting import count, exactly, money, seconds, share
from vllm_kvmarket.ledger import Receipt

DAY_S = 86_400
HOUR_S = 3600
MOST_COLUMNS = 31
BREAK_EVEN_READS = 10
WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 76, 30, 16, 52
LABEL_GAP = 14
# The width of a letter in the style sheet's 15 px text. Labels are at least one letter apart.
LETTER = 9.5

Text = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Series:
    """The values of one line or one kind of column; `kind` is a class of the style sheet."""

    kind: str
    name: str
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its table: `head` and `rows` have everything that the picture shows."""

    id: str
    title: str
    description: str
    picture: Picture
    series: Sequence[Series]
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def svg(self) -> Markup:
        """The picture, for the page."""
        return Markup(
            '<svg viewBox="0 0 {0} {1}" role="img" aria-labelledby="{2}-title {2}-description">'
            '<title id="{2}-title">{3}</title><desc id="{2}-description">{4}</desc>{5}</svg>'
        ).format(WIDTH, HEIGHT, self.id, self.title, self.description, self.picture.drawn())


def break_even(shown: Document) -> Figure:
    """The cost of reads of a document: computed each time, or computed once and then reused."""
    once, charge = shown.recompute_nano, shown.charge_nano
    even = shown.break_even_reuses
    reads = BREAK_EVEN_READS if even is None else max(BREAK_EVEN_READS, min(2 * even, 1000))
    title = "Reuse costs as much as computing: it never pays back"
    if even is not None:
        title = f"Reuse has paid back from read {even} on"
    description = (
        f"After {reads} reads, computing the document each time has cost "
        f"{exactly(reads * once)}; computing it once and reusing it has cost "
        f"{exactly(once + reads * charge)}."
    )
    series = [
        Series("other", "computed for every read", [0, reads * once]),
        Series("main", "computed once, then reused", [once, once + reads * charge]),
    ]
    picture = Picture(reads, max(series[0].values[1], series[1].values[1]))
    ticks = [(value, f"{value:g}") for value in _ticks(reads) if value <= reads]
    picture.axes(ticks, "reads", lambda value: money(round(value)))
    for each in series:
        picture.line(f"stroke {each.kind}", (0, each.values[0]), (reads, each.values[1]))
    if even is not None:
        picture.mark(even, even * once, f"read {even}")
    steps = sorted({0, 1, 2, reads // 2, reads, *([even] if even else [])})
    rows = [
        [str(read), exactly(read * once), exactly(once + read * charge)]
        for read in steps
        if read <= reads
    ]
    head = ["Reads", "Computed for every read", "Computed once, then reused"]
    return Figure("break-even", title, description, picture, series, head, rows)


def reuse_over_time(receipts: Sequence[Receipt], now_s: float) -> Figure:
    """How many tokens of a document were reused, by day or by hour."""
    labels, (tokens, reuses) = _by_period(
        receipts, now_s, lambda each: each.tokens_reused, lambda _: 1
    )
    description = (
        f"{count(sum(tokens))} tokens in {count(sum(reuses))} reuses, "
        f"from {labels[0]} to {labels[-1]}."
    )
    rows = [
        [label, count(number), count(saved)]
        for label, number, saved in zip(labels, reuses, tokens, strict=True)
        if number
    ]
    series = [Series("main", "tokens reused", tokens)]
    picture = _columns(labels, series, "time, UTC", _short)
    head = ["Time (UTC)", "Reuses", "Tokens reused"]
    return Figure("reuse", "Tokens reused over time", description, picture, series, head, rows)


def revenue_over_time(receipts: Sequence[Receipt], now_s: float) -> Figure:
    """Revenue from reuse, and the publishers' part of it, by day or by hour."""
    labels, (kept, royalties) = _by_period(
        receipts,
        now_s,
        lambda each: each.charge_nano - each.royalty_nano,
        lambda each: each.royalty_nano,
    )
    description = (
        f"Reuse brought {exactly(sum(kept) + sum(royalties))}, of which publishers had "
        f"{exactly(sum(royalties))}, from {labels[0]} to {labels[-1]}."
    )
    rows = [
        [label, exactly(own + theirs), exactly(theirs), exactly(own)]
        for label, own, theirs in zip(labels, kept, royalties, strict=True)
        if own or theirs
    ]
    series = [
        Series("main", "kept by the provider", kept),
        Series("other", "royalties to publishers", royalties),
    ]
    title = "Revenue and royalties over time"
    picture = _columns(labels, series, "time, UTC", lambda value: money(round(value)))
    head = ["Time (UTC)", "Charged", "Royalties", "Kept"]
    return Figure("revenue", title, description, picture, series, head, rows)


def first_tokens(buckets: Sequence[tuple[float, int]]) -> Figure | None:
    """How long answers took to their first token, by bucket; None if there were none."""
    total = sum(number for _, number in buckets)
    if not total:
        return None
    used = [place for place, (_, number) in enumerate(buckets) if number]
    shown = buckets[used[0] : used[-1] + 1]
    labels = [seconds(end) if math.isfinite(end) else "more" for end, _ in shown]
    half, most = (seconds(quantile(buckets, part)) for part in (0.5, 0.95))
    rows = [
        [label, count(number), share(number / total)]
        for label, (_, number) in zip(labels, shown, strict=True)
    ]
    description = f"{count(total)} answers: half within {half}, 95% within {most}."
    series = [Series("main", "answers", [number for _, number in shown])]
    picture = _columns(labels, series, "first token within", _short)
    head = ["First token within", "Answers", "Share"]
    return Figure("ttft", "Time to the first token", description, picture, series, head, rows)


def quantile(buckets: Sequence[tuple[float, int]], share: float) -> float | None:
    """The value below which `share` of a histogram lies; None if it is empty or beyond its ends.

    Inside a bucket values are taken as evenly spread, as Prometheus does.
    """
    wanted = share * sum(number for _, number in buckets)
    start = 0.0
    for end, number in buckets:
        if number and wanted <= number:
            return None if math.isinf(end) else start + (end - start) * wanted / number
        wanted -= number
        start = end
    return None


def _by_period(
    receipts: Sequence[Receipt], now_s: float, *sums: Callable[[Receipt], int]
) -> tuple[list[str], list[list[int]]]:
    """Labels from the first receipt to now, at most MOST_COLUMNS, and each sum by period.

    Periods are days, or hours while the first receipt is not long ago.
    """
    first_s = min((each.created_at_s for each in receipts), default=now_s)
    is_young = now_s - first_s < 2 * DAY_S
    width_s = HOUR_S if is_young else DAY_S
    last = int(now_s // width_s)
    start = max(min(int(first_s // width_s), last - 6), last - MOST_COLUMNS + 1)
    form = "%d %b %H:00" if is_young else "%d %b"
    labels = [time.strftime(form, time.gmtime(at * width_s)) for at in range(start, last + 1)]
    totals = [[0] * len(labels) for _ in sums]
    for receipt in receipts:
        place = int(receipt.created_at_s // width_s) - start
        if 0 <= place < len(labels):
            for total, of in zip(totals, sums, strict=True):
                total[place] += of(receipt)
    return labels, totals


def _columns(labels: Sequence[str], series: Sequence[Series], x_name: str, y_text: Text) -> Picture:
    """Columns side by side, one for each label, with the series stacked."""
    stacks = list(zip(*(each.values for each in series), strict=True))
    picture = Picture(len(labels), max(map(sum, stacks)))
    longest = max(map(len, labels))
    fitting = int((WIDTH - LEFT - RIGHT) / ((longest + 1) * LETTER))
    every = math.ceil(len(labels) / max(fitting, 1))
    ticks = [
        (place + 0.5, labels[place])
        for place in range(0, len(labels), every)
        if picture.x(place + 0.5) + longest * LETTER / 2 <= WIDTH
    ]
    picture.axes(ticks, x_name, y_text)
    for place, stack in enumerate(stacks):
        below = 0.0
        for each, value in zip(series, stack, strict=True):
            if value > 0:
                picture.column(each.kind, place, below, below + value)
            below += value
    return picture


class Picture:
    """A picture under way; turns values into places."""

    def __init__(self, x_max: float, y_max: float) -> None:
        self._x_max, self._y_max = x_max, _nice(y_max or 1.0)
        self._parts: list[Markup] = []

    def x(self, value: float) -> float:
        """Pixels from the left."""
        return LEFT + (WIDTH - LEFT - RIGHT) * value / self._x_max

    def y(self, value: float) -> float:
        """Pixels from the top."""
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / self._y_max

    def axes(self, x_ticks: Sequence[tuple[float, str]], x_name: str, y_text: Text) -> None:
        """Draw the grid, the ticks and the name of the axis."""
        for value in _ticks(self._y_max):
            self.line("grid", (0, value), (self._x_max, value))
            self._text(LEFT - 8, self.y(value) + 4, y_text(value), "end")
        for value, text in x_ticks:
            self._text(self.x(value), HEIGHT - BOTTOM + 24, text)
        self.line("axis", (0, 0), (self._x_max, 0))
        self._text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_name, kind="name")

    def line(self, kind: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Draw a line between two points."""
        places = [place for x, y in (start, end) for place in (self.x(x), self.y(y))]
        path = Markup('<path class="{}" d="M{:.1f} {:.1f} L{:.1f} {:.1f}"/>')
        self._parts.append(path.format(kind, *places))

    def column(self, kind: str, place: int, bottom: float, top: float) -> None:
        """Draw a part of a column."""
        width, height = self.x(1) - LEFT, self.y(bottom) - self.y(top)
        rect = Markup(
            '<rect class="column {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
        )
        x = self.x(place) + width * 0.14
        self._parts.append(rect.format(kind, x, self.y(top), width * 0.72, max(height, 0.5)))

    def mark(self, x: float, y: float, text: str) -> None:
        """Draw a point with a word above it."""
        dot = Markup('<circle class="dot mark" cx="{:.1f}" cy="{:.1f}" r="4"/>')
        self._parts.append(dot.format(self.x(x), self.y(y)))
        self._text(self.x(x), self.y(y) - LABEL_GAP, text, kind="strong")

    def _text(self, x: float, y: float, text: str, anchor: str = "middle", kind: str = "") -> None:
        tag = Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
        self._parts.append(tag.format(kind, x, y, anchor, text))

    def drawn(self) -> Markup:
        """Everything that was drawn."""
        return Markup("").join(self._parts)


def _nice(value: float) -> float:
    """The next of 1, 2, 2.5 and 5 times a power of ten, from `value` (above 0) up."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * 0.999999)


def _ticks(most: float) -> list[float]:
    """Four to six round values from 0 to `most`."""
    step = _nice(most / 5)
    return [number * step for number in range(int(most / step + 1e-6) + 1)]


def _short(value: float) -> str:
    """A count in few characters."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
