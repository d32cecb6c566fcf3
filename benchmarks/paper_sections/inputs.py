"""Prices: inputs of the last two sections, with where each default comes from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.economics import EGRESS_NANO_PER_GB
from vllm_kvmarket.core.pricing import NANO, Tariff, parse_nano

# Two ends of the paper's measurements: tokens, seconds of prefill, seconds of reuse.
PAPER_POINTS = ((255, 0.67, 0.078), (3774, 14.71, 0.296))
PAPER_BREAK_EVEN = (1.13, 1.02)
PAPER_MODEL = "Qwen3-4B, fp16 (the paper's)"
STORAGE = "object store=0.023,disk=0.08,host memory=2"
SOURCES = {
    "input_price": "the paper's: $1.5M for 80M reads of 3,774 tokens is 5 a million tokens",
    "egress_prices": (
        "assumptions: a sweep of steps; 0.09 a GB is benchmarks.economics' default, a "
        "large public cloud's usual list price to the internet; 0.01 stands for a cheap host; none "
        "was looked up today"
    ),
    "storage_prices": (
        "assumptions, a GB-month: the order of a public cloud's list prices for object storage and "
        "SSD, and of a rented server's memory; not looked up today"
    ),
    "tariffs": (
        "a cache read's price as a share of input: 0.02 to 0.25 is what was asked; "
        "by third-party comparisons of 2026, 0.1 is usual and 0.02 the cheapest; "
        "not checked with the providers"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Prices in nano-units: of a million computed tokens, of GBs sent, and of GB-months kept."""

    input_nano_per_mtok: int = Tariff().input_nano_per_mtok
    egress_nano_per_gb: tuple[int, ...] = (
        1_000_000,
        10_000_000,
        20_000_000,
        50_000_000,
        EGRESS_NANO_PER_GB,
    )
    storage_nano_per_gb_month: dict[str, int] = field(default_factory=lambda: storage(STORAGE))


def storage(text: str) -> dict[str, int]:
    """Read `name=price,...`. Raises ValueError."""
    found = {}
    for entry in text.split(","):
        name, given, price = entry.partition("=")
        if not (given and name.strip()):
            raise ValueError(f"expected NAME=PRICE, not {entry!r}")
        found[name.strip()] = parse_nano(price)
    return found


def add_prices(parser: argparse.ArgumentParser) -> None:
    """The options of prices."""
    default = Prices()
    parser.add_argument(
        "--input-price", default=units(default.input_nano_per_mtok), help="of a million tokens"
    )
    parser.add_argument(
        "--egress-prices",
        default=",".join(map(units, default.egress_nano_per_gb)),
        help="of a GB sent, with commas",
    )
    parser.add_argument("--storage-prices", default=STORAGE, help="of a GB-month, by medium")


def read_prices(args: argparse.Namespace) -> Prices:
    """The prices that were asked for. Raises ValueError."""
    egress: Sequence[str] = args.egress_prices.split(",")
    return Prices(
        input_nano_per_mtok=parse_nano(args.input_price),
        egress_nano_per_gb=tuple(map(parse_nano, egress)),
        storage_nano_per_gb_month=storage(args.storage_prices),
    )


def units(nano: int) -> str:
    """An amount in currency units, short: 0.09, 5, 0.001."""
    return f"{nano / NANO:.9f}".rstrip("0").rstrip(".")
