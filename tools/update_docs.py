"""Write the README's generated parts: tables of configuration, commands, and measured results.

python tools/update_readme.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vllm_kvmarket.cli import commands
from vllm_kvmarket.core.config import markdown_table

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FOLDER = ROOT / "docs" / "results"
RESULTS = FOLDER / "prefill_vs_reuse.json"


def command_table() -> str:
    """One row a command, as the code has them."""
    return "\n".join(f"| `kvmarket {each.name}` | {each.help} |" for each in commands())


def replaced(text: str, name: str, content: str) -> str:
    """`text` with `content` between the marks of one part."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    return re.sub(pattern, lambda found: f"{found[1]}{content}\n{found[2]}", text, flags=re.DOTALL)


def results_table(result: dict[str, Any]) -> str:
    """The benchmark's medians and ratios, with the machine and the command."""
    machine, load = result["machine"], result["load"]
    lines = [
        f"{result['model']} in float32 on {machine['cpu']}, {machine['cores']} cores, no GPU; "
        f"vLLM {result['versions']['vllm']}; `make bench`, medians of {result['repeats']}, "
        "seconds to the first token (docs/results/prefill_vs_reuse.json has every round).",
        "",
        "| tokens | prefill | vLLM cache hit | reuse, store | reuse, new process | "
        "prefill / reuse | new process / cache hit | miss / plain | publish / prefill |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        seconds = row["seconds"]
        lines.append(
            f"| {row['tokens']:,} | {seconds['prefill_plain']:.3f} | {seconds['apc_hit']:.3f} | "
            f"{seconds['reuse_store']:.3f} | {seconds['reuse_new_process']:.3f} | "
            f"{row['prefill_over_reuse_store']:.1f}x | "
            f"{row['reuse_new_process_over_apc_hit']:.2f} | "
            f"{row['miss_over_plain']:.3f} | {row['publish_over_miss']:.3f} |"
        )
    lines += [
        "",
        f"Loading {load['bytes'] / 1e6:.0f} MB from the page cache, verified, two threads: "
        f"{load['bytes_per_s'] / 1e9:.1f} GB/s, {load['of_memcpy']:.0%} of memcpy. "
        "The buyer pays a tenth of the price of recomputing.",
    ]
    return "\n".join(lines)


def claims_table() -> str:
    """The three most telling rows, from the benchmarks' results."""
    paper, peers = (
        json.loads((FOLDER / f"{name}.json").read_text()) for name in ("paper", "peers")
    )
    exact = paper["sections"]["exactness"]
    told = exact.get("summary", exact)
    lengths = [document["tokens"] for document in exact["documents"]]
    rows = [
        (
            "exact",
            f"{told['all_tokens_as_full_prefill']} of {told['questions']} answers ({len(lengths)} "
            f"documents, {min(lengths):,} to {max(lengths):,} tokens): all {told['new_tokens']} "
            f"greedy tokens as full prefill's; {told['bit_for_bit_as_hit']} of "
            f"{told['questions']} log-probabilities bit for bit as vLLM's own hit's",
            "benchmarks/paper.py --only 1",
        ),
        ("quick", _quick(peers), "benchmarks/peers.py"),
        ("safe", _safe(peers), "benchmarks/peers.py"),
    ]
    lines = [f"| {claim} | {measured} | `{command}` |" for claim, measured, command in rows]
    return "\n".join(["| claim | measured | |", "|---|---|---|", *lines])


def _quick(peers: dict[str, Any]) -> str:
    """The longest document's first reuse in a new process, by system that has one."""
    systems = peers["systems"]
    longest = max((n for s in systems.values() for n in s.get("rows", {})), key=int)
    over = {
        _name(system): system["rows"][longest]["new_over_apc"]
        for system in systems.values()
        if system.get("rows", {}).get(longest, {}).get("new_over_apc") is not None
    }
    ours = over.pop("kvmarket")
    others: dict[str, float] = {}
    for label, value in over.items():
        others[label] = min(value, others.get(label, value))
    told = ", ".join(f"{label} {value:.2f}" for label, value in sorted(others.items()))
    return (
        f"{int(longest):,} tokens, first reuse in a new process over vLLM's own prefix-cache hit: "
        f"kvmarket {ours:.2f}, {told}"
    )


def _safe(peers: dict[str, Any]) -> str:
    """What 4 KiB of damage in stored KV do, by system."""
    told: dict[str, list[str]] = {}
    for system in peers["systems"].values():
        if "piece" in system.get("faults", {}):
            told.setdefault(system["faults"]["piece"]["outcome"], []).append(_name(system))
    cells = [f"{', '.join(names)}: {outcome}" for outcome, names in sorted(told.items())]
    return f"4 KiB of stored KV flipped, in a new process. {'; '.join(cells)}"


def _name(system: dict[str, Any]) -> str:
    return str(system["label"]).split(",")[0].removesuffix(" (*)")


def main() -> None:
    """Rewrite README.md in place."""
    text = README.read_text()
    text = replaced(text, "config table", markdown_table())
    if RESULTS.exists():
        text = replaced(text, "results", results_table(json.loads(RESULTS.read_text())))
    text = replaced(text, "claims", claims_table())
    # A comment inside a table would end it, so the command rows carry no marks of their own.
    head = "| command | what it does |\n|---|---|\n"
    start = text.index(head)
    end = text.index("\n\n", start)
    README.write_text(text[:start] + head + command_table() + text[end:])


if __name__ == "__main__":
    main()
