"""Draws charts as inline SVG, in the page's light or dark colours.

Colours are classes of the style sheet; series also differ in dash or pattern. Every chart has a
title and a description for people who cannot see it, and a table with the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 76, 30, 16, 52
LABEL_GAP = 14
# The width of a letter in the style sheet's 15 px text. Labels are at least one letter apart.
LETTER = 9.5

Text = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Series:
    """A named line, or the columns of one kind; `kind` is a class of the style sheet."""

    name: str
    kind: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its table: `head` and `rows` have everything that the picture shows."""

    id: str
    title: str
    description: str
    svg: Markup
    legend: Sequence[tuple[str, str]]
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Axes:
    """Turns values into places in the picture."""

    x_max: float
    y_max: float
    x_text: Text
    y_text: Text
    x_name: str
    y_name: str

    def x(self, value: float) -> float:
        """Pixels from the left."""
        return LEFT + (WIDTH - LEFT - RIGHT) * value / self.x_max

    def y(self, value: float) -> float:
        """Pixels from the top."""
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / self.y_max

    def drawn(self, x_ticks: Sequence[tuple[float, str]]) -> Markup:
        """The grid, the ticks and the names."""
        parts = []
        for value in ticks(self.y_max):
            parts.append(_line("grid", LEFT, self.y(value), WIDTH - RIGHT, self.y(value)))
            parts.append(_text(LEFT - 8, self.y(value) + 4, self.y_text(value), "end"))
        for value, text in x_ticks:
            parts.append(_text(self.x(value), HEIGHT - BOTTOM + 24, text, "middle"))
        parts.append(_line("axis", LEFT, self.y(0), WIDTH - RIGHT, self.y(0)))
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, self.x_name, "middle", "name"))
        return Markup("").join(parts)


def lines(
    chart_id: str,
    title: str,
    description: str,
    series: Sequence[Series],
    *,
    x_name: str,
    y_name: str,
    x_text: Text,
    y_text: Text,
    mark: tuple[float, float, str] | None = None,
    dots: bool = False,
) -> Markup:
    """Lines over whole numbers from 0; `mark` is a point with a word beside it."""
    every = [point for each in series for point in each.points]
    x_max = max((x for x, _ in every), default=0.0) or 1.0
    y_max = nice(max((y for _, y in every), default=0.0) or 1.0)
    axes = Axes(x_max, y_max, x_text, y_text, x_name, y_name)
    x_ticks = [(value, x_text(value)) for value in ticks(x_max) if value <= x_max]
    parts = [axes.drawn(x_ticks)]
    for each in series:
        path = " ".join(
            f"{'M' if number == 0 else 'L'}{axes.x(x):.1f} {axes.y(y):.1f}"
            for number, (x, y) in enumerate(each.points)
        )
        parts.append(Markup('<path class="stroke {}" d="{}"/>').format(each.kind, path))
        if dots:
            parts += [_dot(axes.x(x), axes.y(y), each.kind) for x, y in each.points]
    if mark is not None:
        x, y, text = mark
        parts.append(_dot(axes.x(x), axes.y(y), "mark"))
        parts.append(_text(axes.x(x), axes.y(y) - LABEL_GAP, text, "middle", "strong"))
    return _picture(chart_id, title, description, parts)


def columns(
    chart_id: str,
    title: str,
    description: str,
    labels: Sequence[str],
    series: Sequence[Series],
    *,
    x_name: str,
    y_name: str,
    y_text: Text,
) -> Markup:
    """Columns side by side; `series` are stacked. A point's x is the number of its column."""
    places = len(labels)
    heights = [sum(each.points[place][1] for each in series) for place in range(places)]
    axes = Axes(places or 1, nice(max(heights, default=0.0) or 1.0), str, y_text, x_name, y_name)
    longest = max((len(label) for label in labels), default=0)
    fitting = int((WIDTH - LEFT - RIGHT) / ((longest + 1) * LETTER))
    every = max(1, math.ceil(places / max(fitting, 1)))
    half = longest * LETTER / 2
    x_ticks = [
        (place + 0.5, labels[place])
        for place in range(0, places, every)
        if axes.x(place + 0.5) + half <= WIDTH
    ]
    parts = [axes.drawn(x_ticks)]
    width = (WIDTH - LEFT - RIGHT) / max(places, 1)
    for place in range(places):
        below = 0.0
        for each in series:
            value = each.points[place][1]
            if value > 0:
                top, bottom = axes.y(below + value), axes.y(below)
                parts.append(
                    Markup(
                        '<rect class="column {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" '
                        'height="{:.1f}"/>'
                    ).format(
                        each.kind,
                        axes.x(place) + width * 0.14,
                        top,
                        width * 0.72,
                        max(bottom - top, 0.5),
                    )
                )
            below += value
    return _picture(chart_id, title, description, parts)


def nice(value: float) -> float:
    """The next of 1, 2, 2.5 and 5 times a power of ten, from `value` (above 0) up."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * 0.999999)


def ticks(most: float) -> list[float]:
    """Four to six round values from 0 to `most`."""
    step = nice(most / 5)
    return [number * step for number in range(int(most / step + 1e-6) + 1)]


def _picture(chart_id: str, title: str, description: str, parts: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-labelledby="{}-title {}-description">'
        '<title id="{}-title">{}</title><desc id="{}-description">{}</desc>{}</svg>'
    ).format(
        WIDTH,
        HEIGHT,
        chart_id,
        chart_id,
        chart_id,
        title,
        chart_id,
        description,
        Markup("").join(parts),
    )


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<path class="{}" d="M{:.1f} {:.1f} L{:.1f} {:.1f}"/>').format(
        kind, x1, y1, x2, y2
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, escape(text)
    )


def _dot(x: float, y: float, kind: str) -> Markup:
    return Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="4"/>').format(kind, x, y)
