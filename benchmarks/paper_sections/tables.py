"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: the first column to the left, the others to the right.

    A line break in a heading makes it two lines. Every row has as many cells as the head.
    """
    lines = [heading.split("\n") for heading in head]
    depth = max(map(len, lines))
    top = [[""] * (depth - len(each)) + each for each in lines]
    every = [*([each[n] for each in top] for n in range(depth)), *rows]
    widths = [max(len(row[n]) for row in every) for n in range(len(head))]
    for number, row in enumerate(every):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())
        if number == depth - 1:
            print("  ".join("-" * width for width in widths))
