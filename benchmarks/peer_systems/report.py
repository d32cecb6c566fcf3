"""The tables on the terminal, the picture, and the JSON that several runs write into."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.peer_systems.systems import SYSTEMS

FAULTS = {
    "byte": "a byte flipped",
    "piece": "4 KiB flipped",
    "truncated": "file cut in half",
    "kill": "kill -9 while saving",
}
Result = dict[str, Any]


def merge(path: Path, name: str, found: Result) -> None:
    """Put a system's results in place of its older ones; parts that were skipped stay."""
    result = json.loads(path.read_text()) if path.exists() else {"systems": {}}
    old = result["systems"].get(name, {})
    if "error" not in found and ("seconds" in found or "faults" in found):
        kept = {key: old[key] for key in ("seconds", "rows", "faults") if key in old}
        for key in ("stored_bytes", "bytes_per_token"):
            if key in old:
                kept[key] = old[key]
        found = {**kept, **found}
        for part in ("seconds", "rows"):  # other lengths stay
            if part in kept and part in found:
                found[part] = {**kept[part], **found[part]}
    result["systems"][name] = found
    path.write_text(json.dumps(result, indent=1) + "\n")


def describe(path: Path, facts: Result) -> Result:
    """Add what was measured on, and return it all in the systems' own order."""
    result: Result = json.loads(path.read_text())
    names = [system.name for system in SYSTEMS if system.name in result["systems"]]
    result = {**facts, "systems": {name: result["systems"][name] for name in names}}
    path.write_text(json.dumps(result, indent=1) + "\n")
    return result


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def timing_rows(result: Result, length: str) -> list[tuple[str, ...]]:
    """One line a system for one length."""
    lines = []
    for system in result["systems"].values():
        row = system.get("rows", {}).get(length)
        if row is None:
            continue
        kib = system.get("bytes_per_token")
        lines.append(
            (
                system["label"],
                number(row["reuse"], 3),
                number(row["reuse_over_apc"]),
                number(row["prefill_over_reuse"], 1, "x"),
                number(row["new"], 3),
                number(row["new_over_apc"]),
                number(row["prefill_over_new"], 1, "x"),
                number(row["cold_over_apc"]),
                number(row["miss_over_prefill"]),
                number(kib / 1000 if kib else None, 1),
            )
        )
    return lines


HEAD = (
    "system", "reuse s", "/ APC", "prefill/", "new p. s", "/ APC", "prefill/", "cold/APC", "miss",
    "KB/token",
)  # fmt: skip


def show(result: Result) -> None:
    """All tables."""
    machine = result["machine"]
    print(f"\n{result['model']}, {machine['cpu']}, {machine['cores']} cores")
    lengths = sorted(
        {length for s in result["systems"].values() for length in s.get("rows", {})}, key=int
    )
    for length in lengths:
        print(f"\n{length} tokens; {plain_line(result, length)}")
        for line in (HEAD, *timing_rows(result, length)):
            print(f"{line[0]:<36}" + "".join(f"{cell:>10}" for cell in line[1:]))
    print(
        "\nreuse: same process, vLLM's prefix cache emptied; new p.: first reuse in a new process;"
        "\n/ APC: over a prefix-cache hit of the same process; prefill/: plain vLLM's prefill over"
        "\nit; miss: a request that matches nothing, and what is saved of it, over plain prefill"
    )
    print("\nfaults (the same question in a new process, against plain vLLM)")
    for system in result["systems"].values():
        for name, label in FAULTS.items():
            if name in system.get("faults", {}):
                print(f"{system['label']:<36}{label:<22}{fault_cell(system['faults'][name])}")
    for system in result["systems"].values():
        if "error" in system:
            print(f"{system['label']:<36}{system['error']}")
        if system.get("note", "").startswith("(*)"):
            print(system["note"])


def plain_line(result: Result, length: str) -> str:
    """The row of plain vLLM."""
    seconds = result["systems"].get("none", {}).get("seconds", {})
    if f"miss/{length}" not in seconds:
        return "plain vLLM not measured"
    prefill, hit = (statistics.median(seconds[f"{name}/{length}"]) for name in ("miss", "apc"))
    return f"plain vLLM: prefill {prefill:.3f} s, prefix-cache hit {hit:.3f} s"


def fault_cell(fault: Result) -> str:
    """A fault's outcome, in a line."""
    text = str(fault["outcome"])
    if fault.get("bad") and "equal_tokens" in fault:
        text += f" ({fault['equal_tokens']} of 24 right)"
    if "error" in fault:
        text += f": {fault['error']}"
    return text


def plot(result: Result, path: Path) -> None:
    """Reuse over an APC hit, at the longest length, and the faults beside it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [s for s in result["systems"].values() if s.get("rows")]
    if not rows:
        return
    length = max((n for s in rows for n in s["rows"]), key=int)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(14, 1.8 + 0.62 * len(rows)), width_ratios=(1.25, 1)
    )
    rows.reverse()
    bars(left, rows, length)
    right.axis("off")
    right.set(xlim=(0, len(FAULTS)), ylim=(-0.6, len(rows) - 0.4))
    for x, title in enumerate(FAULTS.values()):
        right.text(x + 0.5, len(rows) - 0.45, title, ha="center", va="bottom", fontsize=9)
        for y, system in enumerate(rows):
            fault = system.get("faults", {}).get(list(FAULTS)[x], {"outcome": "-", "bad": None})
            colour = {True: "#f4b6ae", False: "#b9e0c0", None: "#e8e8e8"}[fault.get("bad")]
            box = plt.Rectangle((x + 0.02, y - 0.4), 0.96, 0.8, color=colour)
            right.add_patch(box)
            words = str(fault["outcome"]).replace(", silently", ",\nsilently")
            words = words.replace("log-probabilities", "log-prob.").replace(" in part", "\nin part")
            words = "not measured" if words.startswith("not measured") else words
            right.text(x + 0.5, y, words, ha="center", va="center", fontsize=8)
    machine = result["machine"]
    figure.suptitle(f"{result['model']} in float32, {machine['cpu']}, {machine['cores']} cores")
    failed = [f"{s['label']}: {s['error']}" for s in result["systems"].values() if "error" in s]
    notes = [s["note"] for s in result["systems"].values() if s.get("note", "").startswith("(*)")]
    text = "\n".join(line[:170] for line in (*notes, *failed))
    figure.text(0.01, 0.01, text, fontsize=8, va="bottom")
    figure.tight_layout(rect=(0, 0.035 * text.count("\n") + 0.05, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def bars(axes: Any, rows: list[Result], length: str) -> None:
    """TTFT of reuse over that of an APC hit: in the same process, and in a new one."""
    kinds = {
        "reuse_over_apc": ("same process, prefix cache emptied", "#4472a8", 0.2),
        "new_over_apc": ("new process, files in the page cache", "#e0913c", -0.2),
    }
    for name, (label, colour, shift) in kinds.items():
        values = [system["rows"].get(length, {}).get(name) for system in rows]
        places = [y + shift for y, value in enumerate(values) if value is not None]
        widths = [value for value in values if value is not None]
        drawn = axes.barh(places, widths, height=0.38, color=colour, label=label)
        axes.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [system["label"] for system in rows])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.1)
    axes.set_xlabel(f"TTFT of reuse / TTFT of vLLM's own prefix-cache hit, {int(length):,} tokens")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.13), ncols=2, fontsize=8, frameon=False)
