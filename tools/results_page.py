"""Write docs/RESULTS.md from the measured results in docs/results: what has no result is left out.

python tools/results_page.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "RESULTS.md"
Result = dict[str, Any]

HEAD = """# Results

One picture or table for each claim. Every figure comes from a script in `benchmarks/` and a file in
`docs/results/`, and this page is written from those files (`tools/results_page.py`). All of it ran on 2 cores
of an AMD EPYC without a GPU, with vLLM 0.32's CPU build; unless said otherwise the model is
SmolLM2-135M-Instruct in float32. Such a machine's seconds are noisy: read the ratios. What goes against us is
at the end of each part.
"""
NOT_PROVEN = """## What is not proven

- **No GPU has run any of this.** The device path (pinned buffers, streams) is written, not run; on a GPU prefill
  is faster, copies are too, and the ratios will differ.
- Models of more than 135 million parameters have not run here; `--model` takes them where a machine has them.
- A fleet of more than two engines is simulated, from the measured capacity of each part.
- Prices are inputs, with their sources in the result files; the paper's own are used where it gives them.
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; one cell a heading in each row."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def picture(name: str, meaning: str) -> str:
    """A picture of docs/results, where it is there."""
    return f"\n![{meaning}](results/{name})\n" if (RESULTS / name).exists() else ""


def exactness(at: Result) -> str:
    """Claim 1 of the paper."""
    told = at.get("summary", at)
    kinds = sorted({each["kind"] for each in at["documents"]})
    lengths = [each["tokens"] for each in at["documents"]]
    text = f"""## Reuse is exact

`python benchmarks/paper.py --only 1`: {len(lengths)} documents ({", ".join(kinds)}) of {
        min(lengths):,} to
{max(lengths):,} tokens, three questions each, {
        told["new_tokens"]
    } greedy tokens an answer, in float32.

{
        table(
            ("of " + str(told["questions"]) + " answers", "count"),
            [
                ("all tokens as full prefill's", str(told["all_tokens_as_full_prefill"])),
                ("all tokens as vLLM's own prefix-cache hit's", str(told["all_tokens_as_hit"])),
                (
                    "vLLM's hit: all tokens as full prefill's",
                    str(told["all_tokens_hit_as_full_prefill"]),
                ),
                (
                    "log-probabilities bit for bit as the hit's, both computing the same tokens",
                    str(told["bit_for_bit_as_hit"]),
                ),
            ],
        )
    }

Largest difference of a log-probability: reuse to full prefill {
        told["largest_difference_to_full_prefill"]:.1e}, vLLM's
hit to full prefill {
        told["largest_difference_hit_to_full_prefill"]:.1e}: float noise of another order of sums.
"""
    for each in told["mismatches"]:
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

`python benchmarks/paper.py --only 2`, medians of {at["repeats"]}. The paper: 8.6x at 255 tokens, 49.7x at 3,774,
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

`python benchmarks/paper.py --only 3`: lossless ratios on the model's own KV. The paper calls KV nearly
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

`python benchmarks/paper.py --only 4`: {at["kv_bytes_per_token"] / 1e6:.3f} MB a token (Qwen3-4B in fp16). Shipping
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

`python benchmarks/paper.py --only 5`: {at["agents"]:,} reads of {at["tokens"]:,} tokens at
{at["input_nano_per_mtok"] / 1e9:g} a million: {found["prefill_nano"] / 1e15:.2f} M of computing without reuse,
{found["reuse_nano"] / 1e15:.3f} M with (ratio {found["prefill_to_reuse"]:.1f}, {found["measured_by"]}).
{picture("paper_margin.png", "the provider's margin and the publisher's income over the tariff")}
{table(("tariff", "royalty", "readers pay", "publisher gets", "provider keeps", "readers save"), rows)}
"""


def peers(found: Result) -> str:
    """The systems side by side."""
    sys_path = str(ROOT / "benchmarks")
    import sys

    if sys_path not in sys.path:
        sys.path.insert(0, sys_path)
    from peer_systems import report

    text = """## Beside the peers

`make bench-peers`: the same machine, vLLM, model, documents and questions; each system in processes of its own.
`/ APC` is over vLLM's own prefix-cache hit in the same process.
"""
    text += picture("peers.png", "reuse by system, and what each does with damaged data")
    names = ", ".join(s["label"] for s in found["systems"].values() if s.get("rows"))
    text += (
        f"\nMeasured so far: {names}. In each round our second load in the same process took longer\n"
        "than its first (the JSON has every sample); why has not been found yet.\n"
    )
    lengths = sorted({n for s in found["systems"].values() for n in s.get("rows", {})}, key=int)
    for length in lengths:
        rows = report.timing_rows(found, length)
        text += f"\n{int(length):,} tokens ({report.plain_line(found, length)}):\n\n"
        text += table(report.HEAD, rows) + "\n"
    faults = [
        (
            system["label"],
            *(
                report.fault_cell(system["faults"][name])
                if name in system.get("faults", {})
                else "-"
                for name in report.FAULTS
            ),
        )
        for system in found["systems"].values()
        if system.get("faults")
    ]
    if faults:
        text += "\n" + table(("damage", *report.FAULTS.values()), faults) + "\n"
    cannot = [
        f"- {system['label']}: {system['error']}"
        for system in found["systems"].values()
        if "error" in system
    ]
    notes = {s["note"] for s in found["systems"].values() if s.get("note", "").startswith("(*)")}
    return text + "\n" + "\n".join([*sorted(notes), "", *cannot]) + "\n"


def store(found: Result) -> str:
    """Loading and saving."""
    parts = ("host", "disk", "cold", "save", "objects", "save, objects")
    rows = []
    for dtype, codec in dict.fromkeys((row["dtype"], row["codec"]) for row in found["rows"]):
        got = {
            row["part"]: row
            for row in found["rows"]
            if (row["dtype"], row["codec"]) == (dtype, codec)
        }
        rows.append(
            (
                f"{dtype}, {codec}",
                f"{got['memcpy']['bytes_per_s'] / 1e9:.1f}",
                *(
                    f"{got[part]['bytes_per_s'] / 1e9:.2f} ({got[part]['of_memcpy']:.0%})"
                    if part in got
                    else "-"
                    for part in parts
                ),
            )
        )
    return f"""## Loading at the speed of memory

`python benchmarks/store.py`: GB/s of KV, verified, two threads, and the share of memcpy in the same round; disk is
in the page cache, cold is not, objects is SeaweedFS on the same machine.

{table(("KV", "memcpy", *parts), rows)}
"""


def ledger(found: Result) -> str:
    """Durable pairs a second."""
    rows = []
    for name, label in (("sqlite", "SQLite"), ("postgres", "PostgreSQL 15")):
        if name in found:
            pairs = {p["in_flight"]: p for p in found[name]["pairs"] if not p["bare"]}
            calls = found[name]["callbacks"]
            rows.append(
                (
                    label,
                    *(f"{pairs[n]['pairs_per_s']:,}" for n in (1, 8, 64, 512)),
                    f"{found[name]['fdatasync_per_s']:,}",
                    f"{calls['reserve_us']['p99']:.0f} / {calls['settle_us']['p99']:.0f} us",
                )
            )
    head = ("backend", "1 in flight", "8", "64", "512", "raw fdatasync/s", "callback p99")
    return f"""## Money, durably

`python benchmarks/ledger.py`: pairs of a reservation and its settlement (charge, royalty, receipt) a second, each
committed to disk before it counts.

{table(head, rows)}
"""


def catalogue(found: Result) -> str:
    """A million documents."""
    tokens = found["tokens"]
    match = tokens["match_us"]
    databases = found.get("in_a_database", {})
    asked = [
        f"{name} {databases[name]['4k_us']['p50']:.0f} us"
        for name in ("sqlite", "postgres")
        if name in databases
    ]
    return f"""## A catalogue in memory

`python benchmarks/catalogue.py`: {tokens["documents"]:,} documents, {tokens["chunks"]:,} chunks,
{tokens["bytes_per_token"]:.2f} bytes a token (aim 8); a match of 4,000 tokens p50 {match["4k"]["p50"]:.0f} us, p99
{match["4k"]["p99"]:.0f} us (aim 200); of 32,000 p50 {match["32k"]["p50"]:.0f} us, p99 {match["32k"]["p99"]:,.0f} us of
which CPU {match["32k"]["cpu_p99"]:.0f} us (aim 2,000); opening
{found["opening"]["open_us_per_chunk"]:.0f} us a chunk. The same match in a database (4,000 tokens, median):
{", ".join(asked)}. A million documents would need about
{tokens["bytes_per_chunk"] * 10 / 1000:.0f} GB, more than was free here.
"""


def simulation(found: Result) -> str:
    """Eviction, routing, what breaks first."""
    rows = []
    for name, workload in found["workloads"].items():
        for row in workload["rows"]:
            share = row["saved_share"]
            rows.append(
                (
                    f"{name}, {row['budget_share']:.0%}",
                    *(
                        f"{share[p]:.3f}" if p in share else "-"
                        for p in ("lru", "s3-fifo", "w-tinylfu", "gdsf", "value", "belady")
                    ),
                    f"{share['value'] / share['belady']:.2f}",
                )
            )
    verdict = found["verdict"]
    behind = ", ".join(verdict["behind_lru_of_documents"]) or "nowhere"
    out = ", ".join(verdict["out_of_reach_even_with_known_rates"]) or "nowhere"
    breaks = [
        (
            part["part"],
            f"{part['capacity']:,} {part['unit']}",
            "-" if part["breaks_beyond_engines"] is None else f"{part['breaks_beyond_engines']:,}",
            part["then"],
        )
        for part in found["scaling"]["prefix-aware"]["breaks"]
    ]
    head = (
        "workload, storage", "LRU", "S3-FIFO", "W-TinyLFU", "GDSF", "ours", "Belady",
        "ours / Belady",
    )  # fmt: skip
    return f"""## Eviction, and a fleet of engines

`python benchmarks/cdn_simulation.py` (two public traces by `--trace`, their second halves; three synthetic
populations): share of prefill time spared, by storage as a share of all that is read. The constants of our policy were
chosen on other seeds and the traces' first halves.
{picture("cdn_simulation.png", "prefill time spared by storage budget and policy")}
{table(head, rows)}

Behind LRU of documents: {behind}. Belady knows the future and keeps nothing that is not read again; our store takes
every paid publication. Within 10 % of it is out of reach even for a policy that knows every document's true reading
rate at: {out}. "Within 10 % on every trace" is not met.

What breaks first as engines are added (prefix-aware routing), by the capacities measured here:

{table(("part", "capacity", "beyond engines", "then"), breaks)}
"""


def soak(found: Result) -> str:
    """Everything at once."""
    seen, money = found["evidence"], found["money"]
    oracle = found.get("exactness", {})
    compared = oracle.get("compared")
    text = f"""## Everything at once, with faults

`{found["command"]}`: a real server for {found["minutes"]:g} minutes. {seen["documents_published"]} documents published,
{seen["left"]} clients left in the middle, {seen["preemptions"]} preemptions, {seen["evictions"]} evictions,
{seen["faults_injected"]} faults injected, {seen["load_failures"]} loads failed and computed; {money["receipts"]} receipts
over {money["transfers"]:,} transfers, debits equal credits, every hold ended."""
    if compared:
        text += f" {compared} answers compared with full prefill: {oracle['wrong']} wrong."
    problems = found.get("problems", [])
    text += (
        " No problem was found.\n"
        if not problems
        else "\n\n" + "\n".join(f"- {each}" for each in problems) + "\n"
    )
    return text


PAPER: dict[str, Callable[[Result], str]] = {
    "exactness": exactness,
    "prefill_against_reuse": growth,
    "incompressible": incompressible,
    "hosting": hosting,
    "prize": prize,
}
FILES: dict[str, Callable[[Result], str]] = {
    "peers": peers,
    "store": store,
    "ledger": ledger,
    "catalogue": catalogue,
    "cdn_simulation": simulation,
    "soak": soak,
}


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    paper = RESULTS / "paper.json"
    known = json.loads(paper.read_text())["sections"] if paper.exists() else {}
    parts += [write(known[name]) for name, write in PAPER.items() if name in known]
    for name, write in FILES.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            parts.append(write(json.loads(path.read_text())))
    return "\n".join([*parts, NOT_PROVEN])


if __name__ == "__main__":
    PAGE.write_text(page())
