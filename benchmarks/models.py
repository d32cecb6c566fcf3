"""Every family of models: the same tokens in a new process, or a refusal that says why.

    python -m benchmarks.models [--only NAME,... | --short] [--quick] [--resume]

For each family of benchmarks/model_family.py one process answers three questions about each of
twenty documents, by full prefill and by vLLM's own prefix-cache hit, and publishes the documents; a
new process answers from the store. Writes docs/results/models.json, family by family, and
docs/MODELS.md. With --short, the families that give 1,000 answers over six kinds of cache in the
least time. With --resume, families that were measured in full are left as they are. Exit code
1 when a token was wrong, or a family that vLLM runs failed unexplained.
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import re
import shutil
import statistics
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.machine import describe_machine
from benchmarks.model_family import (
    FAMILIES,
    LENGTHS,
    MODELS,
    QUICK,
    SHORT,
    Family,
    Published,
    Reused,
    run,
)
from benchmarks.paper_sections.traces import Trace, compare, is_explained
from tests.support.forked import ForkedContext, forks
from tools import results_models

Row = dict[str, Any]
DOCUMENTS = sum(map(len, LENGTHS.values()))


def compared(published: Published, reused: Reused) -> Row:
    """Count the answers.

    `forks` are greedy answers that are not full prefill's: vLLM's hits, ours, and ours where the
    hit is full prefill's. Where hit and reuse computed the same tokens (`alike`), no token may
    differ. Where they did not, float sums come in another order; an answer that is neither the
    hit's nor full prefill's is wrong unless vLLM's own noise explains it.
    """
    full, ours = published.full, reused.answers
    hits: list[Trace | None] = [*published.hit] or [None] * len(full)
    noise = max((compare(f, h).difference for f, h in zip(full, hits, strict=True) if h), default=0)
    row: Row = {"answers": len(full), "wrong": 0, "alike": 0, "identical": 0}
    row["forks"] = {"hit": 0, "reuse": 0, "only_reuse": 0} if published.hit else {"reuse": 0}
    for prefill, hit, answer in zip(full, hits, ours, strict=True):
        fork = compare(prefill, answer).divergence
        hit_forks = hit is not None and compare(prefill, hit).divergence is not None
        row["forks"]["reuse"] += fork is not None
        alike = hit is not None and hit.cached_tokens == answer.market.get("reused_tokens")
        wrong = fork is not None and not is_explained(fork, noise)
        if hit is not None:
            row["forks"]["hit"] += hit_forks
            row["forks"]["only_reuse"] += fork is not None and not hit_forks
            beside = compare(hit, answer)
            row["alike"] += alike
            row["identical"] += alike and beside.is_identical
            wrong = beside.divergence is not None and (alike or wrong)
        row["wrong"] += wrong
    questions = len(full) // len(published.document_tokens)
    row["document_tokens"] = questions * sum(published.document_tokens)
    row["reused_tokens"] = sum(answer.market.get("reused_tokens", 0) for answer in ours)
    row["noise"] = noise
    row["bytes_per_token"] = published.stored_bytes / sum(published.document_tokens)
    medians = [statistics.median(each) for each in (reused.prefill_s, reused.reuse_s)]
    row["prefill_over_reuse"] = medians[0] / medians[1]
    return row


def reason(log: str) -> tuple[str, str]:
    """Why a family did not run, from its process's output: "refused" by kvmarket, else "failed"."""
    verdicts = re.findall(r"(THE SELF-TEST FAILED, .+)\. Test again", log)
    if refusals := re.findall(r"ConfigError: (.+)", log) or verdicts:
        return "refused", refusals[-1]
    errors = re.findall(r"(?:^|\s)((?:\w+\.)*\w+(?:Error|Exception): .+)", log)
    errors += [f"AssertionError: {each}" for each in re.findall(r" (assert .+)", log)]
    # A worker's assertion is not named by those that only point at it.
    silent = ("initialization failed", "stack trace")
    telling = [each for each in errors if not any(words in each for words in silent)]
    return "failed", (telling or errors or ["no message"])[0][:300]


def run_step(step: str, family: Family, folder: Path, quick: bool) -> str:
    """Run one step in a new process; returns its log when it failed, else nothing."""
    start = ForkedContext() if forks() else multiprocessing.get_context("spawn")
    process = start.Process(target=run, args=(step, family.name, folder, quick))
    process.start()
    process.join()
    log = (folder / f"{step}.log").read_text(errors="replace")
    return (log or "no output") if process.exitcode else ""


def measure(family: Family, folder: Path, quick: bool) -> Row:
    """A family's row: what was counted, or why there is nothing to count."""

    def result(step: str, kind: type[Any]) -> Any:
        return msgspec.json.decode((folder / f"{step}.json").read_bytes(), type=kind)

    shutil.rmtree(folder / "home", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    log = run_step("publish", family, folder, quick)
    if not log:
        published = result("publish", Published)
        row: Row = {"outcome": "served", "groups": published.groups}
        log = run_step("reuse", family, folder, quick)
        if not log:
            return row | compared(published, result("reuse", Reused))
        return row | dict(zip(("outcome", "reason"), reason(log), strict=True))
    outcome, why = reason(log)
    row = {"outcome": outcome, "reason": why, "groups": []}
    if not (log := run_step("plain", family, folder, quick)):
        return row | {"groups": result("plain", Published).groups}
    row = {"outcome": "not run", "reason": reason(log)[1], "groups": []}
    if not (log := run_step("specifications", family, folder, quick)):
        row["reason"] += "; its specifications are taken"
        return row | {"groups": result("specifications", Published).groups}
    if groups := re.findall(r"GROUPS (.+)", log):
        outcome, why = reason(log)
        row["reason"] += f"; its specifications are {outcome}: {why}"
        row["groups"] = ast.literal_eval(groups[-1])
    return row


def _results() -> dict[str, Any]:
    """What is written so far."""
    path = results_models.RESULTS
    return dict(json.loads(path.read_text())) if path.exists() else {"rows": {}}


def main() -> int:
    """Measure the families that are asked for, and write the results after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="names, with commas; all families if left out")
    parser.add_argument("--short", action="store_true", help=f"only {', '.join(SHORT)}")
    parser.add_argument("--quick", action="store_true", help="four documents instead of twenty")
    parser.add_argument("--resume", action="store_true", help="leave out what is there in full")
    parser.add_argument("--keep", type=Path, help="keep files and logs in this folder")
    args = parser.parse_args()
    families = {each.name: each for each in FAMILIES}
    only = SHORT if args.short else [name for name in args.only.split(",") if name]
    chosen = [families[name] for name in only or families]
    bad = 0
    for family in chosen:
        known = _results()["rows"].get(family.name, {})
        if args.resume and known.get("documents") == DOCUMENTS:
            continue
        if family.real and not (MODELS / family.real).exists():
            print(f"{family.name}: {MODELS / family.real} is not there, left out")
            continue
        with tempfile.TemporaryDirectory(prefix="kvmarket-models-") as folder:
            row = measure(family, (args.keep or Path(folder)) / family.name, args.quick)
        row["title"], row["dtype"] = family.title, family.dtype
        row["documents"] = sum(map(len, (QUICK if args.quick else LENGTHS).values()))
        row["weights"] = family.real or "random"
        row["engine"] = family.engine
        print(f"{family.name}: {json.dumps(row)}", flush=True)
        bad += row["outcome"] == "failed" or row.get("wrong", 0) > 0
        found = _results()
        found["machine"] = describe_machine()
        found["versions"] = {name: metadata.version(name) for name in ("vllm", "torch")}
        rows = found["rows"] | {family.name: row}
        found["rows"] = {name: rows[name] for name in families if name in rows}
        results_models.RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        results_models.PAGE.write_text(results_models.page())
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
