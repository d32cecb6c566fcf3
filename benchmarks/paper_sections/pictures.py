"""The pictures: each from the results of its section, skipped where there are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.paper_sections.growth import paper_figures
from vllm_kvmarket.core.pricing import NANO, PPM

Result = dict[str, Any]
BLUE, ORANGE, GREEN, RED, GREY = "#2a6fbb", "#e07b39", "#3f9b5b", "#c0392b", "#777777"
MILLION = 1_000_000 * NANO
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 5,
}


def draw(known: dict[str, Result], folder: Path) -> list[Path]:
    """Draw what can be drawn; the files."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    pictures: dict[str, tuple[str, Callable[[Any, Result], None]]] = {
        "paper_prefill_reuse.png": ("prefill_against_reuse", _prefill_reuse),
        "paper_break_even.png": ("prefill_against_reuse", _break_even),
        "paper_codecs.png": ("incompressible", _codecs),
        "paper_shipping.png": ("hosting", _shipping),
        "paper_margin.png": ("prize", _margin),
    }
    drawn = []
    with mpl.rc_context(STYLE):
        for name, (section, paint) in pictures.items():
            if section not in known:
                continue
            figure = plt.figure(figsize=(10, 4), layout="constrained")
            paint(figure, known[section])
            figure.savefig(folder / name, dpi=100)
            plt.close(figure)
            drawn.append(folder / name)
    return drawn


def _where(result: Result) -> str:
    machine = result["machine"]
    return f"{result['model']}, {machine['cpu']}, {machine['cores']} cores, no accelerator"


def _lengths_axis(axes: Any, lengths: list[int]) -> None:
    from matplotlib.ticker import NullFormatter

    axes.set_xscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("document, tokens")


def _prefill_reuse(figure: Any, result: Result) -> None:
    """Time to first token, and how many times longer prefill takes."""
    rows, paper = result["rows"], paper_figures()["rows"]
    lengths = [row["tokens"] for row in rows]
    paper_lengths = [point["tokens"] for point in paper]
    left, right = figure.subplots(1, 2)
    left.plot(lengths, [r["wall_s"]["prefill"] for r in rows], "o-", color=RED, label="prefill")
    left.plot(lengths, [r["wall_s"]["reuse"] for r in rows], "o-", color=BLUE, label="reuse")
    for name, color in (("prefill_s", RED), ("reuse_s", BLUE)):
        label = f"the paper's {name[:-2]} (Qwen3-4B)"
        values = [point[name] for point in paper]
        left.plot(paper_lengths, values, "*--", color=color, alpha=0.45, ms=10, lw=1, label=label)
    left.set(title="Time to first token", ylabel="seconds", yscale="log")
    left.legend(fontsize=8.5)
    for unit, color, label in (
        ("wall_s", BLUE, "wall time"),
        ("cpu_s", GREEN, "CPU time of the engine"),
    ):
        values = [row[unit]["prefill_over_reuse"] for row in rows]
        right.plot(lengths, values, "o-", color=color, label=label)
    ratios = [point["prefill_s"] / point["reuse_s"] for point in paper]
    right.plot(paper_lengths, ratios, "*--", color=GREY, ms=10, lw=1, label="the paper's")
    for length, ratio, place, side in zip(
        paper_lengths, ratios, ((8, 6), (8, -16)), ("left", "right"), strict=True
    ):
        right.annotate(f"{ratio:.1f}x", (length, ratio), place, textcoords="offset points", ha=side)
    right.set(title="Prefill over reuse", ylabel="times", ylim=(0, None))
    right.legend(loc="upper left")
    for axes in (left, right):
        _lengths_axis(axes, [n for n in lengths if n != 3000])
    figure.suptitle(_where(result), fontsize=9, color=GREY)


def _break_even(figure: Any, result: Result) -> None:
    """The break-even count over length, and the costs of the longest document's reads."""
    rows, paper = result["rows"], result["paper"]["rows"]
    lengths = [row["tokens"] for row in rows]
    left, right = figure.subplots(1, 2)
    for unit, color, label in (
        ("wall_s", BLUE, "wall time"),
        ("cpu_s", GREEN, "CPU time of the engine"),
    ):
        counts = [row[unit]["break_even_reads"] for row in rows]
        left.plot(lengths, counts, "o-", color=color, label=label)
    left.plot(
        [point["tokens"] for point in paper],
        [point["break_even_reads"] for point in paper],
        "*--",
        color=GREY,
        ms=10,
        lw=1,
        label="the paper's",
    )
    left.axhline(1, color="black", lw=0.8)
    left.set(title="Reads from which publishing has paid", ylabel="reads")
    left.legend()
    _lengths_axis(left, [n for n in lengths if n != 3000])
    last, reads = rows[-1], range(6)
    cost = last["cpu_s"]
    right.plot(reads, [n * cost["prefill"] for n in reads], "o-", color=RED, label="prefill each")
    published = [cost["publish"] + n * cost["reuse"] for n in reads]
    right.plot(reads, published, "o-", color=BLUE, label="publish once, then reuse")
    if cost["break_even_reads"] is not None:
        at = cost["break_even_reads"]
        right.axvline(at, color=GREY, lw=1, ls=":")
        right.annotate(
            f"{at:.2f} reads", (at, published[-1] * 0.3), (6, 0), textcoords="offset points"
        )
    right.set(
        title=f"CPU seconds for reads of {last['tokens']:,} tokens",
        xlabel="reads",
        ylabel="CPU seconds",
        ylim=(0, None),
    )
    right.legend(loc="upper left")
    figure.suptitle(_where(result), fontsize=9, color=GREY)


def _codecs(figure: Any, result: Result) -> None:
    """Ratios by codec and type, and how fast they decode."""
    names = list(dict.fromkeys(row["codec"] for row in result["rows"]))
    dtypes = list(result["bytes_per_token"])
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    colors = dict(zip(dtypes, (GREY, BLUE, ORANGE), strict=True))
    height = 0.8 / len(dtypes)
    for number, dtype in enumerate(dtypes):
        rows = {row["codec"]: row for row in result["rows"] if row["dtype"] == dtype}
        places = [n + (number - 1) * height for n in range(len(names))]
        bars = left.barh(
            places, [rows[n]["ratio"] for n in names], height, color=colors[dtype], label=dtype
        )
        left.bar_label(bars, fmt="%.2f", fontsize=7.5, padding=2)
        right.plot(
            [rows[name]["decode_bytes_per_s"] / 1e9 for name in names],
            places,
            "o",
            color=colors[dtype],
        )
    left.set(title="Lossless ratio", xlim=(0.9, 1.75), xlabel="bytes before / after")
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.legend(loc="lower right")
    right.set(title="Decoding, one core", xlabel="GB/s of KV", xscale="log")
    right.set_yticks(range(len(names)), [""] * len(names))
    right.invert_yaxis()
    figure.suptitle(f"KV of {result['tokens']:,} tokens, {_where(result)}", fontsize=9, color=GREY)


def _shipping(figure: Any, result: Result) -> None:
    """The price of a GB up to which shipping pays, and shipping's time by link."""
    left, right = figure.subplots(1, 2)
    by_ratio: dict[str, list[Result]] = {}
    for row in result["shipping"]:
        by_ratio.setdefault(row["ratio_name"], []).append(row)
    colors = (RED, ORANGE, BLUE, GREEN)
    for color, (name, rows) in zip(colors, by_ratio.items(), strict=False):
        left.plot(
            [row["tokens"] for row in rows],
            [row["pays_up_to_nano_per_gb"] / NANO for row in rows],
            "o-",
            color=color,
            label=f"KV {name}: {rows[0]['ratio']:.2f}x",
        )
    for price in result["prices"]["egress_nano_per_gb"]:
        left.axhline(price / NANO, color=GREY, lw=0.8, ls=":")
        left.annotate(
            f"{price / NANO:g}",
            (1.0, price / NANO),
            (3, 0),
            xycoords=left.get_yaxis_transform(),
            textcoords="offset points",
            fontsize=8,
            color=GREY,
            va="center",
        )
    million = result["prices"]["input_nano_per_mtok"] / NANO
    left.set(
        title=f"Shipping pays below the line\n({million:g} a million input tokens)",
        ylabel="price of egress, a GB",
        yscale="log",
    )
    left.legend(fontsize=8, loc="lower right")
    links = result["links"]
    lengths = [row["tokens"] for row in links]
    right.plot(lengths, [row["prefill_s"] for row in links], "-", color=RED, label="prefill")
    right.plot(lengths, [row["reuse_s"] for row in links], "-", color=BLUE, label="reuse, hosted")
    for speed, style in zip(
        links[0]["shipping_s"], (":", "-.", "--", (0, (6, 1, 1, 1, 1, 1))), strict=False
    ):
        values = [row["shipping_s"][speed] for row in links]
        right.plot(lengths, values, color=GREY, ls=style, label=f"shipped at {speed} Gbit/s")
    right.set(title="In time, raw 16-bit KV", ylabel="seconds", yscale="log")
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    for axes in (left, right):
        _lengths_axis(axes, lengths)
    figure.suptitle(
        "Arithmetic for the paper's Qwen3-4B on stated prices, not a measurement; above 3,774 "
        "tokens an extrapolation",
        fontsize=9,
        color=GREY,
    )


def _margin(figure: Any, result: Result) -> None:
    """The provider's margin and the publisher's income over the tariff."""
    paper = result["by_ratio"][0]
    left, right = figure.subplots(1, 2)
    royalties = sorted({row["royalty_ppm"] for row in paper["tariffs"]})
    for color, royalty in zip((BLUE, GREEN, ORANGE, RED), royalties, strict=False):
        rows = [row for row in paper["tariffs"] if row["royalty_ppm"] == royalty]
        tariffs = [row["tariff_ppm"] / PPM for row in rows]
        label = f"royalty {royalty / PPM:.0%}"
        margins = [row["margin_nano"] / MILLION for row in rows]
        left.plot(tariffs, margins, "o-", color=color, label=label)
        incomes = [row["royalty_nano"] / MILLION for row in rows]
        right.plot(tariffs, incomes, "o-", color=color, label=label)
    left.axhline(0, color="black", lw=0.8)
    low = min(0.0, *(row["margin_nano"] / MILLION for row in paper["tariffs"]))
    left.axhspan(1.6 * low, 0, color=RED, alpha=0.08, lw=0)
    left.set(title="The provider's margin", ylabel="millions", ylim=(1.6 * low, None))
    right.set(title="The publisher's income", ylabel="millions")
    for axes in (left, right):
        axes.axvline(0.1, color=GREY, lw=1, ls=":")
        axes.annotate(" usual: 0.1x", (0.1, axes.get_ylim()[1] * 0.97), fontsize=8, color=GREY)
        axes.set(xlabel="price of a cache read, as a share of the input price")
        axes.legend(loc="upper left")
    figure.suptitle(
        f"{result['agents']:,} reads of {result['tokens']:,} tokens, reuse "
        f"{paper['prefill_to_reuse']:.1f}x cheaper than prefill (the paper's); arithmetic",
        fontsize=9,
        color=GREY,
    )
