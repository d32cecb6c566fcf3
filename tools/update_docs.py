"""Write docs/COMMANDS.md, docs/CONFIGURATION.md, docs/MODELS.md, and the README's tables.

python -m tools.update_docs [--check]

With --check nothing is written; the exit code is 1 and stale files are named when there are any.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from tools import results_models
from vllm_kvmarket.cli.app import NOUNS, build_parser, commands_of
from vllm_kvmarket.cli.command import Command
from vllm_kvmarket.core import config

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
COMMANDS = ROOT / "docs" / "COMMANDS.md"
CONFIGURATION = ROOT / "docs" / "CONFIGURATION.md"
FOLDER = ROOT / "docs" / "results"
RESULTS = FOLDER / "prefill_vs_reuse.json"


GENERATED = "<!-- written by tools/update_docs.py; do not edit -->\n"
COMMANDS_HEAD = f"""# Commands

{GENERATED}
Every command takes `--json` (print one JSON document), `--home FOLDER` (the market's folder) and
`--config` (a JSON object, or the path of a .json or .toml file with one; see
[CONFIGURATION.md](CONFIGURATION.md)). Exit codes: 0 done, 1 failed, 2 wrong call, 130 interrupted.
"""
CONFIGURATION_HEAD = f"""# Configuration

{GENERATED}
A JSON object, or the path of a .json or .toml file, given to `vllm serve` by `--kvmarket-config`,
to `kvmarket` by `--config`, and in Python by `Market.open(config=...)`. A key `tariff.x` is the key
`x` inside the object `tariff`. Amounts are integers of nano-units of the settlement currency.

| key | type | default | meaning |
|---|---|---|---|
"""
COMMON = {"-h", "--json", "--home", "--config"}


def commands_page() -> str:
    """Every command with its arguments, as the parsers have them."""
    parts = [COMMANDS_HEAD]
    for noun, _, text in NOUNS:
        parts.append(f"\n## {noun}\n\n{text}\n")
        parser = build_parser(noun)
        parts += [_command(command, parser) for command in commands_of(noun)]
    return "".join(parts)


def _command(command: Command, parser: argparse.ArgumentParser) -> str:
    for word in command.name.split():
        (choices,) = [each.choices for each in parser._actions if isinstance(each.choices, dict)]
        parser = choices[word]
    actions = [each for each in parser._actions if not COMMON.intersection(each.option_strings)]
    lines = [f"| {_argument(each)} | {each.help} |" for each in actions]
    table = ["", "| argument | meaning |", "|---|---|", *lines] if lines else []
    return "\n".join([f"\n### `kvmarket {command.name}`\n", command.help, *table, ""])


def _argument(action: argparse.Action) -> str:
    value = action.metavar or action.dest.removesuffix("_s").rstrip("_").upper()
    if action.choices:
        value = ",".join(map(str, action.choices))
    if not action.option_strings:
        return f"`[{value}]`" if action.nargs in ("?", "*") else f"`{value}`"
    option = action.option_strings[0]
    shown = f"`{option}`" if action.nargs == 0 else f"`{option} {value}`"
    return f"{shown}, required" if action.required else shown


def configuration_page() -> str:
    """Every key with its type, default and meaning."""
    rows = [
        f"| `{key}` | {kind} | {f'`{default}`' if default else ''} | {meaning} |\n"
        for key, kind, default, meaning in config.describe()
    ]
    return CONFIGURATION_HEAD + "".join(rows)


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
    told = {outcome: list(dict.fromkeys(names)) for outcome, names in told.items()}
    cells = [f"{', '.join(names)}: {outcome}" for outcome, names in sorted(told.items())]
    return f"4 KiB of stored KV flipped, in a new process. {'; '.join(cells)}"


def _name(system: dict[str, Any]) -> str:
    return str(system["label"]).split(",")[0].removesuffix(" (*)")


def readme() -> str:
    """The README with its tables of results as they are now."""
    text = README.read_text()
    if RESULTS.exists():
        text = replaced(text, "results", results_table(json.loads(RESULTS.read_text())))
    return replaced(text, "claims", claims_table())


def main() -> int:
    """Write the files, or with --check name those that are stale."""
    pages = {
        COMMANDS: commands_page(),
        CONFIGURATION: configuration_page(),
        results_models.PAGE: results_models.page(),
        README: readme(),
    }
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale; run python -m tools.update_docs")
        return 1 if stale else 0
    for path in stale:
        path.write_text(pages[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
