"""docs/RESULTS.md's parts on the paper's claims, and what its other parts are made with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs" / "results"
Result = dict[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; one cell a heading in each row."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def picture(name: str, meaning: str) -> str:
    """A picture of docs/results, where it is there."""
    return f"\n![{meaning}](results/{name})\n" if (RESULTS / name).exists() else ""


def exactness(at: Result) -> str:
    """Claim 1 of the paper."""
    summary = at.get("summary", at)
    kinds = sorted({each["kind"] for each in at["documents"]})
    lengths = [each["tokens"] for each in at["documents"]]
    text = f"""## Reuse is exact

`python -m benchmarks.paper --only 1`: {len(lengths)} documents ({", ".join(kinds)}) of {
        min(lengths):,} to
{max(lengths):,} tokens, three questions each, {
        summary["new_tokens"]
    } greedy tokens an answer, in float32.

{
        table(
            ("of " + str(summary["questions"]) + " answers", "count"),
            [
                ("all tokens as full prefill's", str(summary["all_tokens_as_full_prefill"])),
                ("all tokens as vLLM's own prefix-cache hit's", str(summary["all_tokens_as_hit"])),
                (
                    "vLLM's hit: all tokens as full prefill's",
                    str(summary["all_tokens_hit_as_full_prefill"]),
                ),
                (
                    "log-probabilities bit for bit as the hit's, both computing the same tokens",
                    str(summary["bit_for_bit_as_hit"]),
                ),
            ],
        )
    }

Largest difference of a log-probability: reuse to full prefill {
        summary["largest_difference_to_full_prefill"]:.1e}, vLLM's
hit to full prefill {
        summary[
            "largest_difference_hit_to_full_prefill"
        ]:.1e}: float noise of another order of sums.
"""
    for each in summary["mismatches"]:
        why = "explained by that noise" if each["explained"] else "NOT explained"
        text += (
            f"\nMismatch: {each['document']}, {each['question']!r} ({each['between']}): {why}.\n"
        )
    return text


def growth(at: Result) -> str:
    """Claim 2 of the paper."""
    rows = [
        (
            f"{row['tokens']:,}",
            f"{row['wall_s']['prefill']:.2f} s",
            f"{row['wall_s']['reuse']:.3f} s",
            f"{row['wall_s']['prefill_over_reuse']:.1f}x",
            f"{row['cpu_s']['prefill_over_reuse']:.1f}x",
            f"{row['wall_s']['publish_over_prefill']:.3f}",
            f"{row['wall_s']['break_even_reads']:.2f}",
            f"{row['cpu_s']['break_even_reads']:.2f}",
        )
        for row in at["rows"]
    ]
    head = (
        "tokens", "prefill", "reuse", "ratio", "in CPU seconds", "publish / prefill",
        "break-even reads", "in CPU seconds",
    )  # fmt: skip
    return f"""## Reuse beats prefill, the more the longer

`python -m benchmarks.paper --only 2`, medians of {at["repeats"]}. The paper: 8.6x at 255 tokens, 49.7x at 3,774,
break-even after 1.02 to 1.13 reads.
{picture("paper_prefill_reuse.png", "time to first token of prefill and reuse over length")}
{table(head, rows)}
{picture("paper_break_even.png", "cost of reading a document so many times, with and without reuse")}"""


def incompressible(at: Result) -> str:
    """Claim 3 of the paper."""
    ratios = {(row["codec"], row["dtype"]): row["ratio"] for row in at["rows"]}
    names = list(dict.fromkeys(row["codec"] for row in at["rows"]))
    dtypes = list(dict.fromkeys(row["dtype"] for row in at["rows"]))

    def cell(dtype: str, name: str) -> str:
        found = ratios.get((name, dtype))
        return "-" if found is None else f"{found:.3f}"

    return f"""## KV compresses a little, if one knows how

`python -m benchmarks.paper --only 3`: lossless ratios on the model's own KV. The paper calls KV nearly
incompressible; mantissas are, exponents are not, and `zstd-exponent` (ours) takes them apart. It is for slow disks:
decoding costs more than reading from a fast one.
{picture("paper_codecs.png", "ratio and speed of lossless codecs by type of number")}
{table(("codec", *dtypes), [(name, *(cell(dtype, name) for dtype in dtypes)) for name in names])}
"""


def hosting(at: Result) -> str:
    """Claim 4 of the paper."""
    limits = [
        (
            f"{row['input_nano_per_mtok'] / 1e9:g}",
            *(f"{nano / 1e9:.4f}" for nano in row["pays_up_to_nano_per_gb"].values()),
        )
        for row in at["by_input_price"]
    ]
    ratios = list(at["by_input_price"][0]["pays_up_to_nano_per_gb"])
    return f"""## KV is hosted where it is read

`python -m benchmarks.paper --only 4`: {at["kv_bytes_per_token"] / 1e6:.3f} MB a token (Qwen3-4B in fp16). Shipping
pays only where a GB of egress costs less than this, by the price of a million input tokens and compression:
{picture("paper_shipping.png", "cost of shipping over the prefill it saves, by egress price")}
{table(("input, a million tokens", *(f"{name}: up to, a GB" for name in ratios)), limits)}

So the paper's claim holds at usual prices of egress (0.05 to 0.09 a GB) and input, and not for cheap bandwidth
beside expensive models.
"""


def prize(at: Result) -> str:
    """Claim 5 of the paper."""
    found = at["by_ratio"][-1]
    shown = [
        each
        for each in found["tariffs"]
        if each["royalty_ppm"] in (0, 500_000)
        and each["tariff_ppm"] in (20_000, 50_000, 100_000, 250_000)
    ]
    rows = [
        (
            f"{each['tariff_ppm'] / 1e6:g}x",
            f"{each['royalty_ppm'] / 1e6:.0%}",
            *(
                f"{each[name] / 1e15:,.3f} M"
                for name in ("charge_nano", "royalty_nano", "margin_nano", "saved_nano")
            ),
        )
        for each in shown
    ]
    return f"""## What it is worth

`python -m benchmarks.paper --only 5`: {at["agents"]:,} reads of {at["tokens"]:,} tokens at
{at["input_nano_per_mtok"] / 1e9:g} a million: {found["prefill_nano"] / 1e15:.2f} M of computing without reuse,
{found["reuse_nano"] / 1e15:.3f} M with (ratio {found["prefill_to_reuse"]:.1f}, {found["measured_by"]}).
{picture("paper_margin.png", "the provider's margin and the publisher's income over the tariff")}
{table(("tariff", "royalty", "readers pay", "publisher gets", "provider keeps", "readers save"), rows)}
"""
