"""`kvmarket economics`: the costs of many reads of one document, prefilled, reused or shipped.

Reuse compute is priced by time: prefill costs the tariff's `input` price, and reuse the same share
of it as its time is of prefill's. Shipping is the egress of the document's whole KV for each read.
Amounts are exact, and each is rounded down once, to a nano-unit.
Source: 'Can I Buy Your KV Cache?', arXiv 2606.13361; the defaults reproduce its abstract.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_kvmarket.cli.command import UsageError, amount, argument, command, count, share
from vllm_kvmarket.cli.output import emit, size, table
from vllm_kvmarket.core import config
from vllm_kvmarket.core.pricing import MTOK, Tariff, Terms, format_nano

if TYPE_CHECKING:
    from rich.console import Console

PAPER_AGENTS = 80_000_000
PAPER_TOKENS = 3_774
PAPER_PREFILL_TO_REUSE = Fraction(497, 10)
# The paper's model, Qwen3-4B in 16 bits: 36 layers x 8 KV heads x 128 x (key + value) x 2 bytes.
PAPER_KV_BYTES_PER_TOKEN = 36 * 8 * 128 * 2 * 2
# A public cloud's usual list price for traffic to the internet, 0.09 units per GB.
EGRESS_NANO_PER_GB = 90_000_000
GB = 1_000_000_000
COSTS = {
    "prefill_nano": "prefill for every read",
    "reuse_nano": "reuse, in compute",
    "shipping_nano": "shipping the KV",
    "charge_nano": "charge to the buyers",
    "royalty_nano": "royalty to the publisher",
    "margin_nano": "margin of the provider",
    "saved_nano": "saved by the buyers",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Costs and income of a number of reads of one document, in nano-units.

    `prefill` computes the document for every read, `reuse` is the compute of loading it instead,
    `shipping` the egress of sending its KV. `charge` is the buyers' price under the tariff,
    `royalty` the publisher's share of it.
    """

    reads: int
    prefill_nano: int
    reuse_nano: int
    shipping_nano: int
    charge_nano: int
    royalty_nano: int

    @property
    def margin_nano(self) -> int:
        """What is left to the provider; negative when reuse costs more than it brings."""
        return self.charge_nano - self.royalty_nano - self.reuse_nano

    @property
    def saved_nano(self) -> int:
        """The buyers' gain over paying for prefill."""
        return self.prefill_nano - self.charge_nano


@dataclass(frozen=True, slots=True, kw_only=True)
class Economics:
    """One document, the number of its readers, and the prices.

    `prefill_to_reuse` is the measured time of prefill divided by that of reuse. Raises ValueError
    for impossible figures.
    """

    agents: int = PAPER_AGENTS
    tokens: int = PAPER_TOKENS
    tariff: Tariff = field(default_factory=Tariff)
    prefill_to_reuse: Fraction = PAPER_PREFILL_TO_REUSE
    kv_bytes_per_token: int = PAPER_KV_BYTES_PER_TOKEN
    egress_nano_per_gb: int = EGRESS_NANO_PER_GB

    def __post_init__(self) -> None:
        for name in ("agents", "tokens", "prefill_to_reuse"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("kv_bytes_per_token", "egress_nano_per_gb"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")

    @property
    def terms(self) -> Terms:
        """The unit prices of a reservation under the tariff."""
        return self.tariff.terms()

    @property
    def kv_bytes(self) -> int:
        """Bytes of the document's KV."""
        return self.tokens * self.kv_bytes_per_token

    @property
    def break_even_reads(self) -> int | None:
        """The first number of reads at which publish-and-reuse costs less than prefill each time.

        None when reuse takes as long as prefill, so that publishing never pays back.
        """
        if self.prefill_to_reuse <= 1:
            return None
        # N * prefill > prefill + N * reuse, with reuse = prefill / ratio.
        return int(self.prefill_to_reuse / (self.prefill_to_reuse - 1)) + 1

    @property
    def per_read(self) -> Costs:
        """The costs of one read."""
        return self.costs(1)

    @property
    def total(self) -> Costs:
        """The costs of all agents' reads."""
        return self.costs(self.agents)

    def costs(self, reads: int) -> Costs:
        """The costs of `reads` reads; a charge and its royalty are rounded for each read."""
        prefill = Fraction(reads * self.tokens * self.tariff.input_nano_per_mtok, MTOK)
        charge = self.terms.charge_nano(self.tokens)
        return Costs(
            reads=reads,
            prefill_nano=int(prefill),
            reuse_nano=int(prefill / self.prefill_to_reuse),
            shipping_nano=reads * self.kv_bytes * self.egress_nano_per_gb // GB,
            charge_nano=reads * charge,
            royalty_nano=reads * self.terms.royalty_nano(charge),
        )


def _seconds(text: str) -> int:
    """Read seconds as nanoseconds: exact, as amounts are."""
    try:
        return amount(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected seconds like 1.5, not {text!r}") from None


@command(
    argument("--agents", type=count, help="how many read the document (default: 80M)"),
    argument("--tokens", type=count, help="the document's tokens (default: 3774)"),
    argument("--input-price", type=amount, help="of a million computed tokens"),
    argument("--price", type=amount, help="of a million reused tokens (cache_read)"),
    argument("--royalty", type=share, help="the publisher's share, from 0 to 1"),
    argument("--prefill-s", type=_seconds, help="measured time of a prefill"),
    argument("--reuse-s", type=_seconds, help="measured time of a reuse"),
    argument(
        "--kv-bytes", type=count, help="KV bytes a token (default: 147456, the paper's model)"
    ),
    argument("--egress-price", type=amount, help="of a GB sent to the internet (default: 0.09)"),
)
def economics(args: argparse.Namespace) -> None:
    """What prefill, reuse and shipping cost for many readers."""
    if (args.prefill_s is None) != (args.reuse_s is None):
        raise UsageError("give --prefill-s and --reuse-s together: their ratio is what counts")
    if args.reuse_s == 0:
        raise UsageError("--reuse-s must be above 0")
    prices = {
        "input_nano_per_mtok": args.input_price,
        "cache_read_nano_per_mtok": args.price,
        "royalty_ppm": args.royalty,
    }
    figures = {
        "agents": args.agents,
        "tokens": args.tokens,
        "tariff": msgspec.structs.replace(config.load(args.config).tariff, **_given(prices)),
        "prefill_to_reuse": args.reuse_s and Fraction(args.prefill_s, args.reuse_s),
        "kv_bytes_per_token": args.kv_bytes,
        "egress_nano_per_gb": args.egress_price,
    }
    try:
        economics = Economics(**_given(figures))
        document = {
            "agents": economics.agents,
            "tokens": economics.tokens,
            "kv_bytes": economics.kv_bytes,
            "prefill_to_reuse": float(economics.prefill_to_reuse),
            "break_even_reads": economics.break_even_reads,
            "egress_nano_per_gb": economics.egress_nano_per_gb,
            "terms": msgspec.to_builtins(economics.terms),
            "per_read": _described(economics.per_read),
            "total": _described(economics.total),
        }
    except ValueError as error:
        raise UsageError(str(error)) from None
    emit(args, document, lambda where: _show(where, document))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _described(costs: Costs) -> dict[str, int]:
    return {name: getattr(costs, name) for name in ("reads", *COSTS)}


def _show(where: Console, document: dict[str, Any]) -> None:
    read, total, agents = document["per_read"], document["total"], document["agents"]
    where.print(
        f"{agents:,} agents read one document of {document['tokens']:,} tokens, "
        f"{size(document['kv_bytes'])} of KV"
    )
    table(
        where,
        ["", ">a read", f">{agents:,} reads", ">in millions"],
        [
            (
                meaning,
                format_nano(read[cost]),
                format_nano(total[cost]),
                f"{total[cost] / 10**15:.2f}M",
            )
            for cost, meaning in COSTS.items()
        ],
    )
    where.print(f"reuse is {document['prefill_to_reuse']:.1f}x cheaper than prefill in compute")
    verb = "more" if read["shipping_nano"] > read["prefill_nano"] else "no more"
    where.print(f"shipping the KV costs {verb} than the prefill it saves")
    reads = document["break_even_reads"]
    where.print(
        "publishing never pays back" if reads is None else f"publishing pays back at read {reads}"
    )
