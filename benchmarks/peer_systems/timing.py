"""How long reuse takes, in the process that saved and in a new one."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.peer_systems.processes import Bench, Run

Step = dict[str, Any]
WARM_UP: list[Step] = [
    {"op": "ask", "name": "warm-up", "document": [300, 900], "buy": False},
    {"op": "ask", "name": "warm-up", "document": [300, 900], "buy": False},
]
CONTROL = 800  # documents that are never published, for the prefix cache's own hit


def same_process(lengths: tuple[int, ...], repeats: int, *, reuses: bool) -> list[Step]:
    """Each round, each length: a miss, a hit in vLLM's prefix cache, and twice reuse without it."""
    steps = [*WARM_UP, {"op": "settle", "name": "start"}]
    for variant in range(repeats):
        for length in lengths:
            document = {"document": [length, variant]}
            steps += [
                {"op": "empty"},
                {"op": "ask", "name": f"miss/{length}", **document},
                {"op": "settle"},  # or the hit would share the machine with what is being saved
                {"op": "ask", "name": f"apc/{length}", **document},
            ]
            if reuses:
                steps += [{"op": "publish", **document}, {"op": "settle"}]
                again = [{"op": "empty"}, {"op": "ask", "name": f"reuse/{length}", **document}]
                steps += [*again, *again]
    return [*steps, {"op": "settle", "name": "stored"}] if reuses else steps


def new_process(lengths: tuple[int, ...], variants: range, *, control: bool) -> list[Step]:
    """The first reuse of each document, and a hit in vLLM's prefix cache in turn with it.

    A document that is sold is bought from the store also when its blocks are in the prefix cache,
    so that there (`control`) the hit is measured on a document that nobody published.
    """
    steps = [*WARM_UP]
    if control:
        steps += [{"op": "ask", "name": "control", "document": [n, CONTROL]} for n in lengths]
    for variant in variants:
        for length in lengths:
            document = [length, variant]
            steps += [
                {"op": "ask", "name": f"new/{length}", "document": document},
                {
                    "op": "ask",
                    "name": f"new-apc/{length}",
                    "document": [length, CONTROL] if control else document,
                },
            ]
    return steps


def times(run: Run) -> dict[str, list[float]]:
    """Seconds to the first token by step name."""
    found: dict[str, list[float]] = defaultdict(list)
    for line in run.lines():
        if line["op"] == "ask" and line.get("name") and not line["name"].startswith("warm"):
            found[line["name"]].append(line["ttft_s"])
    return dict(found)


def measure(
    bench: Bench, lengths: tuple[int, ...], repeats: int, *, cold: bool, timeout_s: float = 900
) -> dict[str, Any]:
    """One system's seconds, and bytes a stored token. What it dies of is under `error`."""
    cached = bench.system.name != "none"
    first = bench.run(same_process(lengths, repeats, reuses=cached), timeout_s)
    result: dict[str, Any] = {"seconds": times(first), "ended": first.ended}
    if first.ended != "finished":
        result["error"] = first.error()
    if not cached:
        return result
    stored = first.named("stored")
    if stored and bench.system.files:
        before = (first.named("start") or {"files": {}})["files"]
        new = (
            size for name, size in stored["files"].items() if name not in before and is_data(name)
        )
        result["stored_bytes"] = sum(new)
        result["bytes_per_token"] = result["stored_bytes"] / (repeats * sum(lengths))
    if not bench.system.survives_engine or first.ended != "finished":
        return result
    if bench.system.files:  # what was in a server's memory is to come from its files
        bench.stop_servers()
        bench.start_servers()
    warm = range(repeats)
    steps = new_process(lengths, warm, control=bench.system.kvmarket)
    second = bench.run(steps, timeout_s)
    result["seconds"] |= times(second)
    if second.ended != "finished":
        result["error"] = second.error()
    elif cold and bench.system.files:
        bench.stop_servers()
        bench.start_servers()
        bench.forget_pages()
        third = bench.run([s for s in steps if not s.get("name", "").startswith("new-")], timeout_s)
        result["seconds"] |= {k.replace("new/", "cold/"): v for k, v in times(third).items()}
    return result


def is_data(name: str) -> bool:
    """Whether a file holds KV, and not the market's books."""
    file = Path(name).name
    books = ("market.sqlite", ".usage", "operator.key", "config.json")
    return not file.startswith(books) and not name.startswith(("signing/", "trusted/"))


def columns(
    seconds: dict[str, list[float]], plain: dict[str, list[float]], length: int
) -> dict[str, float | None]:
    """One row of the table: medians and ratios, None where a figure is missing.

    `plain` are the seconds of an engine without any connector, in the same run.
    """

    def median(source: dict[str, list[float]], name: str) -> float | None:
        values = source.get(f"{name}/{length}")
        return statistics.median(values) if values else None

    def ratio(above: float | None, below: float | None) -> float | None:
        return above / below if above is not None and below is not None else None

    prefill = median(plain, "miss")
    row = {name: median(seconds, name) for name in ("miss", "apc", "reuse", "new", "cold")}
    hit, new_hit = row["apc"], median(seconds, "new-apc")
    return {
        **row,
        "new_apc": new_hit,
        "prefill": prefill,
        "reuse_over_apc": ratio(row["reuse"], hit),
        "new_over_apc": ratio(row["new"], new_hit),
        "cold_over_apc": ratio(row["cold"], new_hit),
        "prefill_over_reuse": ratio(prefill, row["reuse"]),
        "prefill_over_new": ratio(prefill, row["new"]),
        "miss_over_prefill": ratio(row["miss"], prefill),
    }


def probe(bench: Bench, length: int) -> dict[str, Any]:
    """A system that is expected not to run here: its error, or how often it missed."""
    ask = {"op": "ask", "document": [length, 0]}
    steps = [*WARM_UP, {**ask, "name": "first"}, {"op": "empty"}, {**ask, "name": "again"}]
    run = bench.run(steps, timeout_s=240)
    first, again = run.named("first"), run.named("again")
    if run.ended != "finished" or first is None or again is None:
        return {"ended": run.ended, "error": run.error()}
    found: dict[str, Any] = {
        "ended": run.ended,
        "again_over_first": again["ttft_s"] / first["ttft_s"],
    }
    if found["again_over_first"] > 0.5:
        found["error"] = f"starts, and every request misses: {run.error()}"
    return found
