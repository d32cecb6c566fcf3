"""Section 5: the prize: 80 million readers of one document, and who earns what under which tariff.

All amounts come from benchmarks.economics. Reuse is priced by the share of prefill's time
that it takes: the paper's, and the one measured here before (section 2), where there is one.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from benchmarks.economics import (
    PAPER_AGENTS,
    PAPER_PREFILL_TO_REUSE,
    PAPER_TOKENS,
    Economics,
)
from benchmarks.paper_sections.inputs import SOURCES, Prices, units
from benchmarks.paper_sections.tables import table
from vllm_kvmarket.core.pricing import NANO, PPM, Tariff

TARIFF_PPM = (20_000, 30_000, 50_000, 75_000, 100_000, 150_000, 200_000, 250_000)
ROYALTY_PPM = (0, 250_000, 500_000, 700_000)
MILLION = 1_000_000 * NANO


def prize(prices: Prices, ratio: Fraction, tariff_ppm: int, royalty_ppm: int) -> Economics:
    """The paper's document and readers, with a cache read at a share of the input price."""
    tariff = Tariff(
        input_nano_per_mtok=prices.input_nano_per_mtok,
        cache_read_nano_per_mtok=prices.input_nano_per_mtok * tariff_ppm // PPM,
        royalty_ppm=royalty_ppm,
    )
    return Economics(tariff=tariff, prefill_to_reuse=ratio)


def least_tariff(ratio: Fraction, royalty_ppm: int) -> float | None:
    """The share of the input price from which the provider earns; None: it never does."""
    kept = 1 - Fraction(royalty_ppm, PPM)
    return float(1 / ratio / kept) if kept else None


def prefill_to_reuse(known: dict[str, Any]) -> dict[str, Fraction]:
    """The paper's ratio of prefill to reuse, and those measured here at the longest length."""
    found = {"the paper": PAPER_PREFILL_TO_REUSE}
    measured = known.get("prefill_against_reuse")
    if measured:
        row = measured["rows"][-1]
        for unit, name in (("wall_s", "wall time"), ("cpu_s", "CPU time")):
            ratio = Fraction(row[unit]["prefill_over_reuse"]).limit_denominator(1000)
            found[f"{measured['model']} here, {row['tokens']:,} tokens, {name}"] = ratio
    return found


def run(prices: Prices, known: dict[str, Any]) -> dict[str, Any]:
    """Run the section; a result for JSON."""
    found = []
    for name, ratio in prefill_to_reuse(known).items():
        usual = prize(prices, ratio, TARIFF_PPM[0], 0).total
        found.append(
            {
                "measured_by": name,
                "prefill_to_reuse": float(ratio),
                "prefill_nano": usual.prefill_nano,
                "reuse_nano": usual.reuse_nano,
                "least_tariff": {str(ppm): least_tariff(ratio, ppm) for ppm in ROYALTY_PPM},
                "tariffs": [
                    {
                        "tariff_ppm": tariff_ppm,
                        "royalty_ppm": royalty_ppm,
                        "charge_nano": total.charge_nano,
                        "royalty_nano": total.royalty_nano,
                        "margin_nano": total.margin_nano,
                        "saved_nano": total.saved_nano,
                    }
                    for tariff_ppm in TARIFF_PPM
                    for royalty_ppm in ROYALTY_PPM
                    for total in [prize(prices, ratio, tariff_ppm, royalty_ppm).total]
                ],
            }
        )
    return {
        "agents": PAPER_AGENTS,
        "tokens": PAPER_TOKENS,
        "input_nano_per_mtok": prices.input_nano_per_mtok,
        "price_sources": {name: SOURCES[name] for name in ("input_price", "tariffs")},
        "by_ratio": found,
    }


def show(result: dict[str, Any]) -> None:
    """The prize by ratio, then the margin and the publisher's income by tariff and royalty."""
    print(
        f"{result['agents']:,} reads of {result['tokens']:,} tokens at "
        f"{units(result['input_nano_per_mtok'])} a million; amounts in millions\n"
    )
    table(
        ("prefill / reuse as measured by", "ratio", "prefill\nevery time", "reuse", "spared"),
        [
            (
                each["measured_by"],
                f"{each['prefill_to_reuse']:.1f}x",
                f"{each['prefill_nano'] / MILLION:.3f}",
                f"{each['reuse_nano'] / MILLION:.3f}",
                f"{(each['prefill_nano'] - each['reuse_nano']) / MILLION:.3f}",
            )
            for each in result["by_ratio"]
        ],
    )
    for each in result["by_ratio"]:
        print(f"\nReuse as measured by: {each['measured_by']}")
        _show_tariffs(each)
    for name, source in result["price_sources"].items():
        print(f"{name}: {source}")


def _show_tariffs(each: dict[str, Any]) -> None:
    cells = {(row["tariff_ppm"], row["royalty_ppm"]): row for row in each["tariffs"]}
    shares = [f"{ppm / PPM:.0%}" for ppm in ROYALTY_PPM]
    rows = []
    for tariff in TARIFF_PPM:
        of = [cells[tariff, royalty] for royalty in ROYALTY_PPM]
        rows.append(
            (
                f"{tariff / PPM:g}x",
                f"{of[0]['charge_nano'] / MILLION:.3f}",
                f"{of[0]['saved_nano'] / MILLION:.3f}",
                *(f"{row['margin_nano'] / MILLION:+.4f}" for row in of),
                *(f"{row['royalty_nano'] / MILLION:.3f}" for row in of),
            )
        )
    least = [each["least_tariff"][str(ppm)] for ppm in ROYALTY_PPM]
    rows.append(
        (
            "provider earns from",
            "",
            "",
            *("never" if tariff is None else f"{tariff:.4f}x" for tariff in least),
            *[""] * len(ROYALTY_PPM),
        )
    )
    table(
        (
            "tariff",
            "buyers\npay",
            "buyers\nsave",
            *(f"margin at\nroyalty {share}" for share in shares),
            *(f"publisher\nat {share}" for share in shares),
        ),
        rows,
    )
