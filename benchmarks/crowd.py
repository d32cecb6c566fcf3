"""Many buyers of few documents on a real server, beside one account and beside plain vLLM.

    python -m benchmarks.crowd [--quick] [--model FOLDER] [--requests 64] [--accounts 16]
        [--concurrency 1,4,16] [--documents one,blocks,zipf] [--rounds 3]

`one`: all requests ask about one document of 3,774 tokens. `blocks`: of 2,816 tokens, which are 22
whole blocks. `zipf`: about 8 documents of 1,408 tokens, the n-th with a share of 1/n. Each request
has a question of its own, and is answered with 16 tokens.

The servers run at once and are asked in turn: the market from many accounts and from one account,
plain vLLM with its prefix cache, in blocks of 128 and of 32 tokens, and without it. (vLLM 0.32
refuses `--prefix-match-unit 16` for a model with one KV cache group, and its CPU kernels take
multiples of 32 only.) Before each run the prefix cache is emptied. Then plain vLLM is asked once
about each document, so that its cache is warm; the market has to load them. Figures are medians
over rounds; without a cache there is one, of few requests, since it takes so long. Writes
docs/results/crowd.json.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import describe_machine
from benchmarks.miss_cost import REST_S, server
from benchmarks.prefill_vs_reuse import RESULTS, documents, question
from vllm_kvmarket import Market
from vllm_kvmarket.auth.api_keys import Keys
from vllm_kvmarket.market.market import DATABASE_FILE

OUTPUT_TOKENS = 16
LOOK_EVERY_S = 0.5
UNCACHED, FEWEST = "plain_without_cache", 4
# A document's name, and the lengths of the documents that are asked about.
LENGTHS = {"one": (3774,), "blocks": (2816,), "zipf": (1408,) * 8, "short": (1000,)}
USAGE = "vllm:kv_cache_usage_perc"
LOADS, CHUNKS = "vllm:kvmarket_load_seconds_count", "vllm:kvmarket_chunks_loaded_total"
PLAIN = {
    "plain": (),
    "plain_blocks_of_32": ("--block-size", "32"),
    UNCACHED: ("--no-enable-prefix-caching",),
}


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: a prompt, and whose."""

    prompt: list[int]
    key: str


@dataclass(slots=True)
class Run:
    """One system's answers to all requests of a round."""

    seconds: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    peak_usage: float = 0.0
    loads: float = 0.0
    chunks_loaded: float = 0.0

    def figures(self) -> dict[str, float]:
        """What a round's run comes to."""
        return {
            "requests_per_s": len(self.ttft_s) / self.seconds,
            "ttft_p50_s": percentile(self.ttft_s, 0.5),
            "ttft_p99_s": percentile(self.ttft_s, 0.99),
            "peak_usage": self.peak_usage,
            "loads": self.loads,
            "chunks_loaded": self.chunks_loaded,
        }


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which that share of the others lies, of those that were measured."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def popularity(count: int, requests: int, seed: int = 1) -> list[int]:
    """Which of `count` documents each request asks about; the n-th has a share of 1/n."""
    weights = [1 / rank for rank in range(1, count + 1)]
    return random.Random(seed).choices(range(count), weights, k=requests)


class Clients:
    """Asks a server as many clients would."""

    def __init__(self, base: str, admin: str) -> None:
        self.base = base
        self._admin = {"authorization": f"Bearer {admin}"}

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """A request of the operator."""
        answer = httpx.post(self.base + path, json=body, headers=self._admin, timeout=600)
        answer.raise_for_status()
        return dict(answer.json()) if answer.content else {}

    def metrics(self) -> dict[str, float]:
        """Samples by their name, summed over labels."""
        found: dict[str, float] = {}
        for line in httpx.get(f"{self.base}/metrics", timeout=60).text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                bare = name.partition("{")[0]
                found[bare] = found.get(bare, 0.0) + float(value)
        return found

    def run(self, asks: Sequence[Ask], at_a_time: int) -> Run:
        """Answer all requests, so many at a time."""
        before, run = self.metrics(), Run()
        asyncio.run(self._run(list(asks), at_a_time, run))
        after = self.metrics()
        run.loads = after.get(LOADS, 0.0) - before.get(LOADS, 0.0)
        run.chunks_loaded = after.get(CHUNKS, 0.0) - before.get(CHUNKS, 0.0)
        return run

    async def _run(self, asks: list[Ask], at_a_time: int, run: Run) -> None:
        limits = httpx.Limits(max_connections=at_a_time + 1)
        async with httpx.AsyncClient(base_url=self.base, timeout=600, limits=limits) as client:

            async def work() -> None:
                while asks:
                    await self._ask(client, asks.pop(0), run)

            looking = asyncio.create_task(self._look(client, run))
            started = time.perf_counter()
            await asyncio.gather(*(work() for _ in range(at_a_time)))
            run.seconds = time.perf_counter() - started
            looking.cancel()

    async def _ask(self, client: httpx.AsyncClient, ask: Ask, run: Run) -> None:
        body = {"model": "model", "prompt": ask.prompt, "temperature": 0, "stream": True}
        body |= {"max_tokens": OUTPUT_TOKENS, "min_tokens": OUTPUT_TOKENS}
        headers = {}
        if ask.key:
            headers["authorization"] = f"Bearer {ask.key}"
            body["kvmarket"] = {"reuse": "prefer"}
        started, first = time.perf_counter(), 0.0
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data:") and not first:
                    first = time.perf_counter() - started
        run.ttft_s.append(first)

    async def _look(self, client: httpx.AsyncClient, run: Run) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            for line in (await client.get("/metrics")).text.splitlines():
                if line.startswith(USAGE):
                    run.peak_usage = max(run.peak_usage, float(line.rpartition(" ")[2]))


class Bench:
    """The servers, the accounts, and figures by documents, concurrency and system."""

    def __init__(self, args: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
        self._args = args
        home = folder / "home"
        self._market = stack.enter_context(Market.open(home))
        keys = Keys(self._market.home / DATABASE_FILE)
        admin = keys.create("boss", ["admin"])[0]
        self._keys = [self._account(keys, f"buyer{n}") for n in range(args.accounts)]
        keys.close()

        def clients(name: str, arguments: Sequence[str]) -> Clients:
            base = stack.enter_context(server(args.model, folder / f"{name}.log", *arguments))
            return Clients(base, admin)

        config = json.dumps({"home": str(home), "trust_requests": False})
        ours = ("--kv-connector", "kvmarket", "--kvmarket-config", config)
        self._sold = clients("market", ours)
        self._plain = {name: clients(name, arguments) for name, arguments in PLAIN.items()}
        self._asked = 0
        self._published: set[str] = set()
        self.rounds: dict[tuple[str, int, str], list[dict[str, float]]] = {}

    def _account(self, keys: Keys, name: str) -> str:
        self._market.create_account(name)
        self._market.deposit(name, 10**15, f"first:{name}")
        return keys.create(name, ["buyer"])[0]

    def measure(self, tokenizer: Any, name: str, at_a_time: int) -> None:
        """All rounds about one set of documents."""
        lengths = LENGTHS[name]
        cut = documents(tokenizer, tuple(range(max(lengths), max(lengths) + len(lengths))))
        texts = [tokens[:length] for tokens, length in zip(cut.values(), lengths, strict=True)]
        if name not in self._published:
            self._published.add(name)
            for tokens in texts:
                self._publish(tokens)
        for number in range(self._args.rounds):
            self._round(name, texts, at_a_time, first=number == 0)

    def _publish(self, tokens: list[int]) -> None:
        posted = self._sold.post("/v1/kvmarket/documents", {"token_ids": tokens})
        until = time.monotonic() + 300
        while self._market.catalogue.get(posted["id"]).state != "live":
            if time.monotonic() > until:
                raise RuntimeError("a document was not published")
            time.sleep(0.2)
        time.sleep(1)  # until the server has seen it

    def _round(self, name: str, texts: list[list[int]], at_a_time: int, *, first: bool) -> None:
        """Each system once, in turn; the one without a cache in the first round only."""
        chosen = popularity(len(texts), self._args.requests)

        def asks(keys: Sequence[str]) -> list[Ask]:
            made = []
            for number, index in enumerate(chosen):
                self._asked += 1
                prompt = texts[index] + question(self._asked)
                made.append(Ask(prompt, keys[number % len(keys)] if keys else ""))
            return made

        systems: dict[str, Callable[[], Run]] = {
            "many_accounts": lambda: self._run(self._sold, asks(self._keys), at_a_time),
            "one_account": lambda: self._run(self._sold, asks(self._keys[:1]), at_a_time),
        }
        warm = [Ask(each, "") for each in texts]
        for system, plain in self._plain.items():
            if system != UNCACHED:
                systems[system] = partial(self._run, plain, asks(()), at_a_time, warm)
            elif first:
                few = asks(())[: max(FEWEST, at_a_time)]
                systems[system] = partial(self._run, plain, few, at_a_time)
        for system, run in systems.items():
            self.rounds.setdefault((name, at_a_time, system), []).append(run().figures())

    def _run(
        self, clients: Clients, asks: list[Ask], at_a_time: int, warm: Sequence[Ask] = ()
    ) -> Run:
        clients.post("/reset_prefix_cache")
        if warm:
            clients.run(warm, 1)
        time.sleep(REST_S)
        return clients.run(asks, at_a_time)

    def rows(self) -> list[dict[str, Any]]:
        """One row for each set of documents, concurrency and system: medians over rounds."""
        rows = []
        for (name, at_a_time, system), rounds in self.rounds.items():
            figures = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
            rows.append(
                {"documents": name, "at_a_time": at_a_time, "system": system}
                | figures
                | {"rounds": rounds}
            )
        return rows


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table, with each system's requests/s over plain vLLM's."""
    plain = {
        (row["documents"], row["at_a_time"]): row["requests_per_s"]
        for row in rows
        if row["system"] == "plain"
    }
    lines = [
        f"{'documents':10}{'at a time':>10} {'system':20}{'req/s':>8}{'/ plain':>9}"
        f"{'TTFT p50':>10}{'p99':>8}{'peak':>7}{'loads':>7}{'chunks':>8}"
    ]
    for row in rows:
        share = row["requests_per_s"] / plain[row["documents"], row["at_a_time"]]
        lines.append(
            f"{row['documents']:10}{row['at_a_time']:>10} {row['system']:20}"
            f"{row['requests_per_s']:8.2f}{share:9.3f}{row['ttft_p50_s']:10.3f}"
            f"{row['ttft_p99_s']:8.3f}{row['peak_usage']:7.1%}{row['loads']:7.0f}"
            f"{row['chunks_loaded']:8.0f}"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=".cache/models/SmolLM2-135M-Instruct")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--accounts", type=int, default=16)
    parser.add_argument("--concurrency", default="1,4,16")
    parser.add_argument("--documents", default="one,blocks,zipf", help=f"of {', '.join(LENGTHS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="8 requests, 4 accounts, once")
    parser.add_argument("--output", type=Path, default=RESULTS / "crowd.json")
    args = parser.parse_args(argv)
    if args.quick:
        args.requests, args.accounts, args.rounds = 8, 4, 1
        args.concurrency, args.documents = "4", "short"
    args.concurrency = [int(each) for each in args.concurrency.split(",")]
    args.documents = args.documents.split(",")
    return args


def main() -> None:
    """Measure, print a table, write JSON."""
    args = parse()
    # It opens the route that empties the prefix cache.
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with (
        tempfile.TemporaryDirectory(prefix="kvmarket-bench-") as folder,
        ExitStack() as stack,
    ):
        bench = Bench(args, Path(folder), stack)
        for name, at_a_time in itertools.product(args.documents, args.concurrency):
            bench.measure(tokenizer, name, at_a_time)
            # A run takes an hour: what was measured stays when it is ended early.
            write(args, bench.rows())
    print(f"\nwrote {args.output}")


def write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write and print what has been measured so far."""
    result = {
        "command": "python -m benchmarks.crowd " + " ".join(sys.argv[1:]),
        "model": Path(args.model).name,
        "requests": args.requests,
        "accounts": args.accounts,
        "output_tokens": OUTPUT_TOKENS,
        "machine": describe_machine(),
        "rows": rows,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(report(rows), flush=True)


if __name__ == "__main__":
    main()
