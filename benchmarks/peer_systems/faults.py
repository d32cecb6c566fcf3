"""Measures what damage does: flipped bytes, a truncated file, and kill -9 while saving."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from benchmarks.peer_systems.processes import Bench, Run
from benchmarks.peer_systems.timing import WARM_UP, Step, is_data

LENGTH, LONG = 1024, 3968
TOKENS = 24
TOLERANCE = 1e-3  # log-probabilities of right answers differ by 1e-5
PIECE = 4096
DAMAGES = ("byte", "piece", "truncated")


def question(document: list[int], name: str) -> Step:
    """The one question that is asked about a document, before and after."""
    return {
        "op": "ask", "name": name, "document": document, "question": 7, "max_tokens": TOKENS
    }  # fmt: skip


def documents() -> dict[str, list[int]]:
    """A document for each fault."""
    found = {name: [LENGTH, 100 + i] for i, name in enumerate(DAMAGES)}
    return {**found, "kill": [LONG, 103]}


def reference(bench: Bench) -> dict[str, Any]:
    """Plain vLLM's answers, by document."""
    steps = [*WARM_UP, *(question(d, name) for name, d in documents().items())]
    run = bench.run(steps, timeout_s=300)
    return {name: run.named(name) for name in documents()}


def flip_byte(path: Path) -> None:
    """One byte in the middle: sign and exponent of one float32 number."""
    place = path.stat().st_size // 2 // 4 * 4 + 3
    invert(path, place, 1)


def flip_piece(path: Path) -> None:
    """4 KiB in the middle."""
    invert(path, path.stat().st_size // 2 // PIECE * PIECE, PIECE)


def truncate(path: Path) -> None:
    """The second half is gone."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


DAMAGE = {"byte": flip_byte, "piece": flip_piece, "truncated": truncate}


def invert(path: Path, place: int, count: int) -> None:
    """Invert `count` bytes of a file in place."""
    with path.open("r+b") as file:
        file.seek(place)
        old = file.read(count)
        file.seek(place)
        file.write(bytes(byte ^ 0xFF for byte in old))


def verdict(run: Run, name: str, expected: dict[str, Any]) -> dict[str, Any]:
    """The answer to a buyer of the damaged document, compared with plain vLLM's."""
    got = run.named(name)
    if got is None:
        said = {"died": "the engine dies", "hung": "hangs"}.get(run.ended, run.ended)
        return {"outcome": said, "bad": True, "error": run.error()}
    return compare(got, expected)


def compare(got: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Tokens first, then log-probabilities, then how the right answer came about."""
    pairs = zip(got["tokens"], expected["tokens"], strict=True)
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(expected["tokens"]))
    numbers = zip(got["logprobs"][:equal], expected["logprobs"][:equal], strict=True)
    differences = [abs(float(a) - float(b)) for a, b in numbers]
    facts = {
        "equal_tokens": equal,
        "logprob_difference": repr(max(differences, default=0.0)),
        "ttft_s": got["ttft_s"],
        "reused": got["market"].get("reused_tokens"),
    }
    if any(math.isnan(float(value)) for value in got["logprobs"]):
        return {"outcome": "NaN, silently", "bad": True, **facts}
    if equal < len(expected["tokens"]):
        return {"outcome": "wrong tokens, silently", "bad": True, **facts}
    if max(differences, default=0.0) > TOLERANCE:
        return {"outcome": "wrong log-probabilities, silently", "bad": True, **facts}
    share = got["ttft_s"] / expected["ttft_s"]
    said = "recomputes" if share > 0.8 else "right" if share < 0.25 else "recomputes in part"
    return {"outcome": said, "bad": False, **facts}


def save_each(names: tuple[str, ...]) -> list[Step]:
    """Save the documents one by one, listing the files after each."""
    steps = [*WARM_UP, {"op": "settle", "name": "files/start"}]
    for name in names:
        document = documents()[name]
        steps += [question(document, name), {"op": "publish", "document": document}]
        steps.append({"op": "settle", "name": f"files/{name}"})
    return steps


def damaged(bench: Bench, expected: dict[str, Any]) -> dict[str, Any]:
    """Flipped and truncated files, each in another document, asked for in a new process."""
    first = bench.run(save_each(DAMAGES), timeout_s=300)
    if first.ended != "finished":
        return {"error": first.error()}
    bench.stop_servers()
    results: dict[str, Any] = {}
    seen = set((first.named("files/start") or {})["files"])
    for name in DAMAGES:
        files = (first.named(f"files/{name}") or {})["files"]
        new = sorted(f for f in files if f not in seen and is_data(f) and files[f] > 2 * PIECE)
        seen |= set(files)
        if not new:
            results[name] = {"outcome": "stores nothing in a file", "bad": False}
            continue
        path = bench.folder / "stored" / new[len(new) // 2]
        DAMAGE[name](path)
        results[name] = {"files": len(new), "size": files[new[len(new) // 2]]}
    bench.start_servers()
    asked = [name for name in DAMAGES if "outcome" not in results[name]]
    steps = [question(documents()[name], name) for name in asked]
    second = bench.run([*WARM_UP, *steps], timeout_s=240)
    for name in asked:
        results[name] |= verdict(second, name, expected[name])
    return results


def killed(bench: Bench, expected: dict[str, Any]) -> dict[str, Any]:
    """-9 to the engine and its servers as soon as something is being saved; then ask again."""
    document = documents()["kill"]
    before = bench.stored_bytes()
    watched: dict[str, float] = {}

    def saving(run: Run) -> bool:
        # An engine that keeps its store elsewhere is killed as soon as it has answered.
        if run.named("kill") is not None and not bench.system.kvmarket:
            watched.setdefault("answered", time.monotonic())
            return not bench.system.files or time.monotonic() - watched["answered"] > 3
        return bench.system.files and bench.stored_bytes() > before + 8 * 2**20

    steps = [question(document, "kill"), {"op": "publish", "document": document}, {"op": "settle"}]
    interrupted = bench.run(steps, timeout_s=240, kill_when=saving)
    bench.stop_servers(patience_s=0)
    after = bench.stored_bytes()
    shared = bench.shared_left()
    try:
        bench.start_servers()
        again = bench.run([*WARM_UP, question(document, "kill")], timeout_s=300)
    except RuntimeError as error:
        return {"outcome": "does not start again", "bad": True, "error": str(error)}
    return {
        "interrupted": interrupted.ended,
        "half_saved_bytes": after - before,
        "shared_memory_left_bytes": shared,
        **verdict(again, "kill", expected["kill"]),
    }


def measure(bench: Bench, expected: dict[str, Any]) -> dict[str, Any]:
    """All faults that can be inflicted on a system's store."""
    if bench.system.files:
        found = damaged(bench, expected)
    else:
        found = {
            name: {"outcome": "not measured: lies in the memory of a process", "bad": None}
            for name in DAMAGES
        }
    if "error" not in found:
        found["kill"] = killed(bench, expected)
    return found
