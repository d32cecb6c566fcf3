"""A soak on a real `vllm serve --kv-connector kvmarket`: everything at once, for a long time.

    python -m benchmarks.soak [--minutes 30] [--seed N] [--model FOLDER | --model SmolLM2]

Clients buy (whole, streamed, by id, several choices, with a bounded price, with reuse required or
never), leave on the way, and ask what nobody published; two of them have funds, one's end on the
way, one never had any, some have no key. Publishers publish, reprice, withdraw and repair. The
paged cache is too small for all of them, so that vLLM preempts; the disk quota holds a third of the
documents, so that they are evicted. Meanwhile a seeded fault injector damages chunk files and stops
processes, and an operator runs store gc, check and repair, ledger check and log checkpoint.

Afterwards: a sample of greedy answers, those cut off included, is compared with full prefill token
by token (`--oracle engine`: an engine without kvmarket; `--oracle server`: the same server, nothing
reused); every answer was charged once, for what it reused; the books, holds and proofs are right;
memory, handles and threads level off; the disk was never above its quota; what was damaged is
repaired. Prints a table, writes JSON; exit code 1 and a list of what failed otherwise. A seed gives
the same requests of each client and the same kinds of faults; their order is the machine's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import random
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import describe_machine
from benchmarks.soak_parts import money, oracle
from benchmarks.soak_parts.clients import Client
from benchmarks.soak_parts.documents import Library
from benchmarks.soak_parts.faults import FaultInjector, Operator
from benchmarks.soak_parts.growth import FLATTER, WARM_UP_SHARE, Sampler
from benchmarks.soak_parts.plan import Plan, Story, kv_bytes_per_token
from benchmarks.soak_parts.publishers import Publisher
from benchmarks.soak_parts.server import PUBLISHERS, Soaked, account_facts, soaked, stop
from benchmarks.soak_parts.settling import evidence, missing, repair, scan_log
from tools.make_tiny_model import make_tiny_model

ROOT = Path(__file__).parents[1]
SMOLLM = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"
RESULTS = ROOT / "docs" / "results" / "soak.json"
DRAIN_S = 240.0


async def _load(server: Soaked, library: Library, story: Story) -> None:
    """All clients, publishers, faults and the operator, until the time is over."""
    limits = httpx.Limits(max_connections=server.plan.clients + 8)
    async with httpx.AsyncClient(timeout=200, limits=limits) as http:
        publishers = [Publisher(server, library, story, http, name) for name in PUBLISHERS]
        await publishers[0].publish_all(library.documents[: server.plan.documents // 4])
        stopping = asyncio.Event()
        injector = FaultInjector(server, story)
        clients = [
            Client(server, library, story, http, f"client{number}")
            for number in range(server.plan.clients)
        ]
        work = [*clients, *publishers, Operator(server, story)]
        tasks = [asyncio.create_task(each.run(stopping)) for each in work]
        tasks += [asyncio.create_task(each(stopping)) for each in (injector.damage, injector.pause)]
        await _until(server, story, tasks)
        stopping.set()
        _, pending = await asyncio.wait(tasks, timeout=DRAIN_S)
        if pending:
            story.fail(f"{len(pending)} clients did not end within {DRAIN_S:.0f} s")
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                story.fail(f"a client of the soak failed: {result!r}")


async def _until(server: Soaked, story: Story, tasks: list[asyncio.Task[None]]) -> None:
    """Wait for the end of the soak's time, or of the server; say now and then how it goes."""
    end_s = time.monotonic() + server.plan.seconds
    told_s = time.monotonic()
    while time.monotonic() < end_s:
        await asyncio.sleep(0.5)
        if server.process.poll() is not None:
            story.fail(f"the server ended with exit code {server.process.returncode}")
            return
        if any(task.done() and task.exception() for task in tasks):
            return
        if time.monotonic() - told_s > 60:
            told_s = time.monotonic()
            left = (end_s - told_s) / 60
            print(
                f"{left:5.1f} minutes left: {len(story.asked)} requests, "
                f"{story.counts['evicted']} evictions, {len(story.problems)} problems",
                flush=True,
            )


def soak(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run everything; the report."""
    model = _model(args, folder)
    plan = Plan(
        minutes=args.minutes,
        seed=args.seed,
        model=model,
        home=folder / "home",
        bytes_per_token=kv_bytes_per_token(model),
    )
    story = Story()
    report: dict[str, Any] = {
        "seed": args.seed,
        "minutes": args.minutes,
        "model": args.model,
        "oracle": args.oracle,
        "quota_bytes": plan.quota_bytes,
        "machine": describe_machine(),
        "vllm": metadata.version("vllm"),
        "command": f"python -m benchmarks.soak --minutes {args.minutes} --seed {args.seed} "
        f"--model {args.model} --oracle {args.oracle}",
    }
    with soaked(plan) as server:
        sampler = Sampler(server, story)
        sampler.start()
        library = Library(args.seed, plan.documents)
        asyncio.run(_load(server, library, story))
        money.wait_for_holds(server.market, story)
        sampler.stop()
        report["evidence"] = evidence(server, story)
        report["repair"] = repair(server, library, story)
        if args.oracle == "server":
            judge = oracle.ServerOracle(server.base)
            report["exactness"] = oracle.compare(judge, story, args.seed, args.compare)
        # Before it stops: vLLM's front end may call an engine that ends a moment earlier dead.
        scan_log(server, story)
        if not stop(server.process):
            story.fail("the server did not end by itself")
        report["money"] = money.audit(server, story)
        report["accounts"] = account_facts(server.market)
    if args.oracle == "engine":
        engine = oracle.EngineOracle(plan)
        try:
            report["exactness"] = oracle.compare(engine, story, args.seed, args.compare)
        finally:
            engine.close()
    report["growth"] = sampler.verdict()
    report["growth_rule"] = (
        f"after the first {WARM_UP_SHARE:.0%}, the second half may rise by {FLATTER} of the first "
        f"half's rise, or by {sampler.tolerance()}, whichever is more"
    )
    report["disk"] = {
        "peak_bytes": max(sampler.disk.values, default=0),
        "database_bytes": sampler.database.values[-1] if sampler.database.values else 0,
    }
    # For a closer look at what failed, where the folder is kept.
    with (folder / "requests.jsonl").open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(dataclasses.asdict(each)) + "\n" for each in story.asked)
    report["counts"] = dict(sorted(story.counts.items()))
    report["requests"] = len(story.asked)
    for problem in missing(report, plan):
        story.fail(problem)
    report["problems"] = story.problems
    report["ok"] = not story.problems
    return report


def _model(args: argparse.Namespace, folder: Path) -> Path:
    """The model's folder; random weights by default."""
    if args.model == "SmolLM2":
        return SMOLLM
    if args.model != "tiny":
        return Path(args.model)
    return make_tiny_model(1, SMOLLM, folder / "tiny")


def show(report: dict[str, Any]) -> None:
    """Print the report as tables."""
    print(f"\nseed {report['seed']}, {report['minutes']} minutes, {report['requests']} requests")
    for title in ("counts", "evidence", "exactness", "money", "repair", "disk"):
        print(f"\n{title}")
        for name, value in report.get(title, {}).items():
            print(f"  {name:<44} {value}")
    print("\ngrowth (rise in the first and in the second half, limit)")
    for process, figures in report["growth"].items():
        for figure, facts in figures.items():
            print(
                f"  {process:<24} {figure:<8} {facts['start']:9.1f} -> {facts['end']:9.1f}   "
                f"{facts['first']:8.2f} {facts['second']:8.2f} {facts['limit']:8.2f}"
            )
    print("\nok" if report["ok"] else f"\n{len(report['problems'])} problems")
    for problem in report["problems"][:100]:
        print(f"  {problem}")


def main() -> int:
    """Run the soak; 0 when nothing failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="how long clients are active")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31))
    parser.add_argument(
        "--model", default="tiny", help="a folder; tiny: random weights; SmolLM2: that of the demo"
    )
    parser.add_argument("--oracle", choices=("engine", "server"), default="engine")
    parser.add_argument("--compare", type=int, default=2000, help="most answers to compare")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--keep", type=Path, help="a folder for home and logs, which stays")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    with contextlib.ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        report = soak(args, folder)
    show(report)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
