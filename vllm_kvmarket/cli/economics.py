"""`economics`: the paper's arithmetic, from its figures or from yours."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from vllm_kvmarket.cli.command import Command, UsageError, amount, count, share
from vllm_kvmarket.cli.output import emit, size, table

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_kvmarket.core.economics import Economics

COSTS = {
    "prefill_nano": "prefill for every read",
    "reuse_nano": "reuse, in compute",
    "shipping_nano": "shipping the KV",
    "charge_nano": "charge to the buyers",
    "royalty_nano": "royalty to the publisher",
    "margin_nano": "margin of the provider",
    "saved_nano": "saved by the buyers",
}


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--agents", type=count, help="how many read the document (default: 80M)")
    parser.add_argument("--tokens", type=count, help="the document's tokens (default: 3774)")
    parser.add_argument("--input-price", type=amount, help="of a million computed tokens")
    parser.add_argument("--price", type=amount, help="of a million reused tokens (cache_read)")
    parser.add_argument("--royalty", type=share, help="the publisher's share, from 0 to 1")
    parser.add_argument("--prefill-s", type=_seconds, help="measured time of a prefill")
    parser.add_argument("--reuse-s", type=_seconds, help="measured time of a reuse")
    parser.add_argument(
        "--kv-bytes", type=count, help="KV bytes a token (default: 147456, the paper's model)"
    )
    parser.add_argument(
        "--egress-price", type=amount, help="of a GB sent to the internet (default: 0.09)"
    )


def _seconds(text: str) -> int:
    """Read seconds as nanoseconds: exact, as amounts are."""
    try:
        return amount(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected seconds like 1.5, not {text!r}") from None


def _run(args: argparse.Namespace) -> int:
    economics = _economics(args)
    document = _describe(economics)
    emit(args, document, lambda where: _show(where, economics, document))
    return 0


def _economics(args: argparse.Namespace) -> Economics:
    from fractions import Fraction

    import msgspec

    from vllm_kvmarket.core import config
    from vllm_kvmarket.core.economics import Economics

    if (args.prefill_s is None) != (args.reuse_s is None):
        raise UsageError("give --prefill-s and --reuse-s together: their ratio is what counts")
    ratio = None
    if args.reuse_s is not None:
        if not args.reuse_s:
            raise UsageError("--reuse-s must be above 0")
        ratio = Fraction(args.prefill_s, args.reuse_s)
    prices = {
        "input_nano_per_mtok": args.input_price,
        "cache_read_nano_per_mtok": args.price,
        "royalty_ppm": args.royalty,
    }
    figures = {
        "agents": args.agents,
        "tokens": args.tokens,
        "tariff": msgspec.structs.replace(config.load(args.config).tariff, **_given(prices)),
        "prefill_to_reuse": ratio,
        "kv_bytes_per_token": args.kv_bytes,
        "egress_nano_per_gb": args.egress_price,
    }
    try:
        economics = Economics(**_given(figures))
        economics.per_read  # noqa: B018  # overflows here, if at all
    except ValueError as error:
        raise UsageError(str(error)) from None
    return economics


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _describe(economics: Economics) -> dict[str, Any]:
    import msgspec

    def costs(name: str) -> dict[str, int]:
        chosen = getattr(economics, name)
        return {cost: getattr(chosen, cost) for cost in ("reads", *COSTS)}

    return {
        "agents": economics.agents,
        "tokens": economics.tokens,
        "kv_bytes": economics.kv_bytes,
        "prefill_to_reuse": float(economics.prefill_to_reuse),
        "break_even_reads": economics.break_even_reads,
        "egress_nano_per_gb": economics.egress_nano_per_gb,
        "terms": msgspec.to_builtins(economics.terms),
        "per_read": costs("per_read"),
        "total": costs("total"),
    }


def _show(where: Console, economics: Economics, document: dict[str, Any]) -> None:
    from vllm_kvmarket.core.pricing import format_nano

    where.print(
        f"{economics.agents:,} agents read one document of {economics.tokens:,} tokens, "
        f"{size(economics.kv_bytes)} of KV"
    )
    table(
        where,
        ["", ">a read", f">{economics.agents:,} reads", ">in millions"],
        [
            (
                meaning,
                format_nano(document["per_read"][cost]),
                format_nano(document["total"][cost]),
                f"{document['total'][cost] / 10**15:.2f}M",
            )
            for cost, meaning in COSTS.items()
        ],
    )
    where.print(f"reuse is {document['prefill_to_reuse']:.1f}x cheaper than prefill in compute")
    read = document["per_read"]
    verb = "more" if read["shipping_nano"] > read["prefill_nano"] else "no more"
    where.print(f"shipping the KV costs {verb} than the prefill it saves")
    reads = economics.break_even_reads
    where.print(
        "publishing never pays back" if reads is None else f"publishing pays back at read {reads}"
    )


COMMANDS = (
    Command(
        "economics", "what prefill, reuse and shipping cost for many readers", _run, _configure
    ),
)
