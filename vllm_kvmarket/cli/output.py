"""Input and output of commands: JSON or tables on stdout, errors and progress on stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vllm_kvmarket.core.errors import KVMarketError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

PIPE_WIDTH = 240  # characters of a line in a pipe or a file, where rich would use 80
GAP = 2  # characters between two columns
MIN_WIDTH = 10  # characters of a column that is cut to fit


def emit(args: argparse.Namespace, document: Any, show: Callable[[Console], None]) -> None:
    """Print a command's result: `document` as JSON under --json, else what `show` prints."""
    if args.json:
        print(json.dumps(document, indent=2))
    else:
        show(console())


def console(*, stderr: bool = False) -> Console:
    """A console on stdout, or on stderr."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not made.is_terminal:
        made.width = PIPE_WIDTH
    return made


def table(
    where: Console,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    empty: str = "",
) -> None:
    """Print rows under headings, or `empty` where there are none.

    `>` before a heading aligns its column to the right; `~` lets it be cut to the terminal's width.
    Every other column keeps its full width, so that ids can be copied.
    """
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    cells = [[clean(cell) for cell in row] for row in rows]
    if not cells and empty:
        where.print(empty)
        return
    names = [column.lstrip(">~") for column in columns]
    widths = [max(map(cell_len, column)) for column in zip(names, *cells, strict=True)]
    flexible = [number for number, column in enumerate(columns) if column.startswith("~")]
    if flexible and where.is_terminal:
        fixed = sum(widths) - sum(widths[number] for number in flexible) + GAP * len(columns)
        most = max(MIN_WIDTH, (where.width - fixed) // len(flexible))
        for number in flexible:
            widths[number] = min(widths[number], most)
    made = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
    for name, column, width in zip(names, columns, widths, strict=True):
        justify: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        made.add_column(name, justify=justify, width=width, no_wrap=True, overflow="ellipsis")
    for row in cells:
        made.add_row(*map(Text, row))
    before, where.width = where.width, max(where.width, sum(widths) + GAP * len(widths))
    where.print(made)
    where.width = before


def pairs(where: Console, facts: Iterable[tuple[str, object]]) -> None:
    """Print each fact on its own line, with its name in front."""
    from rich.table import Table
    from rich.text import Text

    made = Table.grid(padding=(0, 2))
    for name, value in facts:
        made.add_row(Text(name, style="bold"), Text(clean(value)))
    where.print(made)


def read_text(path: Path) -> str:
    """A file's text, or stdin's for -. Raises KVMarketError when it is not text."""
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text("utf-8")
    except UnicodeDecodeError:
        raise KVMarketError(
            f"{path} is not text; give a receipt, a checkpoint or a proof"
        ) from None


def progress() -> Progress:
    """Make a progress bar on stderr; without a terminal it shows only its console's output."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    where = console(stderr=True)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        console=where,
        disable=not where.is_terminal,
        transient=True,
    )


@contextmanager
def counted(text: str, shown: Callable[[int], str] = str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar; yields the function to call with what is done, and with all."""
    with progress() as bar:
        task = bar.add_task(text, total=None, note="")
        yield lambda done, total: bar.update(
            task, completed=done, total=total, note=f"{shown(done)} of {shown(total)}"
        )


def complain(message: object) -> None:
    """Print one line on stderr; line breaks in the message become blanks."""
    print(f"kvmarket: {clean(' '.join(str(message).split()))}", file=sys.stderr)


def clean(value: object) -> str:
    """Replace control characters, which a terminal would obey: publishers write the titles."""
    return "".join(
        char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(value)
    )


def moment(time_s: float) -> str:
    """Show a time as UTC, to the second."""
    return f"{datetime.fromtimestamp(time_s, UTC):%Y-%m-%d %H:%M:%S}Z"


def size(count: int) -> str:
    """Show bytes in the unit that leaves at most three digits before the point."""
    scaled, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if scaled < 1000:
            break
        scaled, unit = scaled / 1000, larger
    return f"{count} B" if unit == "B" else f"{scaled:.1f} {unit}"
