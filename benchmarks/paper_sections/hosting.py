"""Section 4: shipping the KV, hosting it, or computing it again: arithmetic on stated prices.

What computing costs follows its time: the input price holds at the paper's 3,774 tokens, and at
another length a token costs as much more or less as its prefill takes. Between and beyond the
paper's two points times follow a power of the length, which is an extrapolation above 3,774.
Shipping sends the whole KV for every read, and spares the difference of prefill and reuse.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from fractions import Fraction
from typing import Any

from benchmarks.economics import GB, PAPER_KV_BYTES_PER_TOKEN, PAPER_TOKENS, Economics
from benchmarks.paper_sections.inputs import PAPER_MODEL, PAPER_POINTS, SOURCES, Prices, units
from benchmarks.paper_sections.tables import table
from vllm_kvmarket.core.pricing import NANO, Tariff

LENGTHS = (255, 1024, PAPER_TOKENS, 16_384, 32_768)
INPUT_SHARES = (1, 5, 10, 50)  # other models are cheaper: the input price divided by these
GBIT_PER_S = (0.1, 1, 10, 100)
HYPOTHETICAL_RATIO = 4.0


def paper_seconds(tokens: int) -> tuple[float, float]:
    """The paper's prefill and reuse at a length, by a power law through its two points."""
    (short, *low), (long, *high) = PAPER_POINTS
    at = math.log(tokens / short) / math.log(long / short)
    prefill, reuse = (a * (b / a) ** at for a, b in zip(low, high, strict=True))
    return prefill, reuse


def reading(tokens: int, prices: Prices, ratio: float = 1.0) -> Economics:
    """The paper's model at a length, its KV compressed by `ratio`, computing priced by time."""
    prefill, reuse = paper_seconds(tokens)
    dearer = prefill / tokens / (paper_seconds(PAPER_TOKENS)[0] / PAPER_TOKENS)
    return Economics(
        tokens=tokens,
        tariff=Tariff(input_nano_per_mtok=round(prices.input_nano_per_mtok * dearer)),
        prefill_to_reuse=Fraction(prefill / reuse).limit_denominator(1000),
        kv_bytes_per_token=round(PAPER_KV_BYTES_PER_TOKEN / ratio),
    )


def shipping_over_saved(economics: Economics, egress_nano_per_gb: int) -> float:
    """Sending the KV costs this many times what it saves; infinite if it saves nothing."""
    read = replace(economics, egress_nano_per_gb=egress_nano_per_gb).per_read
    saved = read.prefill_nano - read.reuse_nano
    return read.shipping_nano / saved if saved > 0 else math.inf


def paying_egress_nano_per_gb(economics: Economics) -> int:
    """The price of a GB up to which shipping pays, rounded down."""
    read = economics.per_read
    return (read.prefill_nano - read.reuse_nano) * GB // economics.kv_bytes


def ratios(known: dict[str, Any]) -> dict[str, float]:
    """Compression ratios to look at: none, the one measured here in 16 bits, and a supposed one."""
    found = {"as it is": 1.0}
    for row in known.get("incompressible", {}).get("rows", []):
        if row["codec"] == "zstd-exponent" and row["dtype"] != "float32":
            found[f"lossless {row['dtype']}, measured"] = row["ratio"]
    return {**found, "lossy, supposed": HYPOTHETICAL_RATIO}


def run(prices: Prices, known: dict[str, Any]) -> dict[str, Any]:
    """Run the section; a result for JSON."""
    shipping = [
        {
            "tokens": tokens,
            "ratio_name": name,
            "ratio": ratio,
            "kv_bytes": economics.kv_bytes,
            "prefill_nano": economics.per_read.prefill_nano,
            "pays_up_to_nano_per_gb": paying_egress_nano_per_gb(economics),
            "shipping_over_saved": {
                units(price): shipping_over_saved(economics, price)
                for price in prices.egress_nano_per_gb
            },
        }
        for name, ratio in ratios(known).items()
        for tokens in LENGTHS
        for economics in [reading(tokens, prices, ratio)]
    ]
    cheaper = [
        {
            "input_nano_per_mtok": prices.input_nano_per_mtok // share,
            "pays_up_to_nano_per_gb": {
                name: paying_egress_nano_per_gb(
                    reading(
                        PAPER_TOKENS,
                        replace(prices, input_nano_per_mtok=prices.input_nano_per_mtok // share),
                        ratio,
                    )
                )
                for name, ratio in ratios(known).items()
            },
        }
        for share in INPUT_SHARES
    ]
    return {
        "prices": asdict(prices),
        "price_sources": SOURCES,
        "kv_bytes_per_token": PAPER_KV_BYTES_PER_TOKEN,
        "shipping": shipping,
        "by_input_price": cheaper,
        "links": links(),
        "hosting": hosting(prices, known),
    }


def links() -> list[dict[str, Any]]:
    """How long shipping takes, and the link on which it takes as long as prefill spares."""
    found = []
    for tokens in LENGTHS:
        prefill, reuse = paper_seconds(tokens)
        bits = 8 * tokens * PAPER_KV_BYTES_PER_TOKEN
        found.append(
            {
                "tokens": tokens,
                "prefill_s": prefill,
                "reuse_s": reuse,
                "shipping_s": {str(speed): bits / speed / 1e9 for speed in GBIT_PER_S},
                "as_fast_as_prefill_gbit_per_s": bits / (prefill - reuse) / 1e9,
            }
        )
    return found


def hosting(prices: Prices, known: dict[str, Any]) -> list[dict[str, Any]]:
    """The monthly cost of a document of the paper's length, and how many reads pay for it."""
    read = reading(PAPER_TOKENS, prices).per_read
    saved = read.prefill_nano - read.reuse_nano
    models = {PAPER_MODEL: (float(PAPER_KV_BYTES_PER_TOKEN), 1.0, saved)}
    measured = known.get("incompressible", {})
    for row in measured.get("rows", []):
        if row["codec"] == "zstd-exponent":
            size = measured["bytes_per_token"][row["dtype"]]
            # No price is known of computing with this model, so nothing is said of what it saves.
            models[f"{measured['model']}, {row['dtype']}"] = (size, row["ratio"], None)
    rows = []
    for model, (size, ratio, saves) in models.items():
        for medium, price in prices.storage_nano_per_gb_month.items():
            month = size * PAPER_TOKENS * price / GB
            rows.append(
                {
                    "model": model,
                    "medium": medium,
                    "bytes": round(size * PAPER_TOKENS),
                    "nano_per_month": round(month),
                    "lossless_ratio": ratio,
                    "nano_per_month_compressed": round(month / ratio),
                    "reads_a_month_that_pay": month / saves if saves else None,
                }
            )
    return rows


def show(result: dict[str, Any]) -> None:
    """Shipping by price, ratio and length; by input price; by link; and hosting."""
    prices = result["prices"]
    print(
        f"{PAPER_MODEL}: {result['kv_bytes_per_token'] / 1e6:.3f} MB of KV a token. Egress of one "
        "document over what it saves (prefill\nless reuse), at "
        f"{units(prices['input_nano_per_mtok'])} a million computed tokens; below 1.00 shipping "
        "pays (*). Ratios measured here are another model's.\n"
    )
    egress = list(result["shipping"][0]["shipping_over_saved"])
    table(
        ("KV", "ratio", "tokens", *(f"egress\n{price}/GB" for price in egress), "pays up to\na GB"),
        [
            (
                row["ratio_name"],
                f"{row['ratio']:.2f}",
                f"{row['tokens']:,}",
                *(_cell(row["shipping_over_saved"][price]) for price in egress),
                f"{row['pays_up_to_nano_per_gb'] / NANO:.4f}",
            )
            for row in result["shipping"]
        ],
    )
    usual = str(egress[-1])
    row = next(row for row in result["shipping"] if row["tokens"] == PAPER_TOKENS)
    print(
        f"\nShipping {PAPER_TOKENS:,} tokens as they are costs "
        f"{row['shipping_over_saved'][usual]:.2f} times what it saves at {usual} a GB\n"
        f"(the paper: more than it saves), and pays up to "
        f"{row['pays_up_to_nano_per_gb'] / NANO:.4f} a GB."
    )
    print(f"\nA cheaper model's prefill, {PAPER_TOKENS:,} tokens: shipping pays up to, a GB")
    names = list(result["by_input_price"][0]["pays_up_to_nano_per_gb"])
    table(
        ("input price a million", *names),
        [
            (
                units(row["input_nano_per_mtok"]),
                *(f"{row['pays_up_to_nano_per_gb'][name] / NANO:.4f}" for name in names),
            )
            for row in result["by_input_price"]
        ],
    )
    _show_links(result)
    _show_hosting(result)
    print()
    for name in ("input_price", "egress_prices", "storage_prices"):
        print(f"{name}: {result['price_sources'][name]}")


def _show_links(result: dict[str, Any]) -> None:
    print("\nIn time, seconds (by a power law where the paper measured nothing):")
    table(
        (
            "tokens",
            "prefill",
            "reuse",
            *(f"shipped at\n{speed} Gbit/s" for speed in GBIT_PER_S),
            "as slow as\nprefill at",
        ),
        [
            (
                f"{row['tokens']:,}",
                f"{row['prefill_s']:.2f}",
                f"{row['reuse_s']:.3f}",
                *(f"{row['shipping_s'][str(speed)]:.2f}" for speed in GBIT_PER_S),
                f"{row['as_fast_as_prefill_gbit_per_s']:.2f} Gbit/s",
            )
            for row in result["links"]
        ],
    )


def _show_hosting(result: dict[str, Any]) -> None:
    print(f"\nHosting a document of {PAPER_TOKENS:,} tokens, a month:")
    table(
        ("model", "medium", "MB", "cost", "lossless\nratio", "cost so", "reads a month\nthat pay"),
        [
            (
                row["model"],
                row["medium"],
                f"{row['bytes'] / 1e6:.0f}",
                f"{row['nano_per_month'] / NANO:.4f}",
                f"{row['lossless_ratio']:.2f}",
                f"{row['nano_per_month_compressed'] / NANO:.4f}",
                "-"
                if row["reads_a_month_that_pay"] is None
                else f"{row['reads_a_month_that_pay']:.2f}",
            )
            for row in result["hosting"]
        ],
    )


def _cell(share: float) -> str:
    return f"{share:.2f}{'*' if share < 1 else ' '}"
