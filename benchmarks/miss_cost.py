"""What the plugin costs a request that matches nothing: plain and market servers, asked in turn.

    python -m benchmarks.miss_cost [--model FOLDER] [--rounds 20] [--tokens 512]

Two `vllm serve` run at once, one plain and one on a market with a document on offer. In each round
both get new prompts of the same length, in the order plain, market, market, plain. A round's ratio
is market over plain. The interval is the 95 % bootstrap interval of the ratios' median. Writes
docs/results/miss_cost.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import describe_machine
from vllm_kvmarket import Market
from vllm_kvmarket.auth.api_keys import Keys
from vllm_kvmarket.market.market import DATABASE_FILE

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "miss_cost.json"
STARTS_WITHIN_S = 300
# vLLM's processes spin for about a second after each step.
REST_S = 1.3
RESAMPLES = 10_000


@contextmanager
def server(model: str, log: Path, *arguments: str) -> Iterator[str]:
    """The address of a `vllm serve`; gone afterwards. Raises RuntimeError with its log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "vllm"), "serve", model, *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model"]
    command += ["--dtype", "float32", "--max-model-len", "4096", "--enforce-eager"]
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    # Both get every core, as one machine of either kind would.
    cores = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))))}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=quiet | cores | dict(os.environ)
        )
    base = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + STARTS_WITHIN_S
        while not _answers(base):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(log.read_text()[-3000:])
            time.sleep(0.5)
        yield base
    finally:
        process.terminate()
        process.wait(timeout=90)


def _answers(base: str) -> bool:
    try:
        return httpx.get(f"{base}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def complete(client: httpx.Client, base: str, tokens: Sequence[int], **more: Any) -> float:
    """Seconds of a completion of one token, from the client."""
    body = {"model": "model", "prompt": list(tokens), "max_tokens": 1, "temperature": 0, **more}
    started = time.perf_counter()
    client.post(f"{base}/v1/completions", json=body).raise_for_status()
    return time.perf_counter() - started


def interval(ratios: Sequence[float], seed: int = 1) -> tuple[float, float]:
    """The 95 % bootstrap interval of the ratios' median."""
    source = random.Random(seed)
    medians = sorted(
        statistics.median(source.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES)
    )
    return medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES) - 1]


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """Seconds of both servers, a row a round."""
    home = folder / "home"
    config = json.dumps({"home": str(home)})
    rows = []
    prompts = random.Random(0)
    with (
        Market.open(home) as market,
        server(args.model, folder / "plain.log") as plain,
        server(
            args.model,
            folder / "market.log",
            *("--kv-connector", "kvmarket", "--kvmarket-config", config),
        ) as sold,
        httpx.Client(timeout=600) as client,
    ):
        market.create_account("buyer")
        market.deposit("buyer", 10**15, "first")
        keys = Keys(market.home / DATABASE_FILE)
        client.headers["authorization"] = f"Bearer {keys.create('buyer', ('buyer',))[0]}"
        keys.close()

        def new() -> list[int]:
            return [prompts.randrange(1000, 40_000) for _ in range(args.tokens)]

        wish = market.credentials.sign_params({"publish": {"terms": {"title": "on offer"}}})
        complete(client, sold, new(), kv_transfer_params={"kvmarket": wish})

        def ask(base: str) -> float:
            time.sleep(REST_S)
            return complete(client, base, new())

        for base in (plain, sold):
            ask(base)
        for _ in range(args.rounds):
            first, second, third, fourth = ask(plain), ask(sold), ask(sold), ask(plain)
            rows.append({"plain": first + fourth, "market": second + third})
    return rows


def main() -> None:
    """Measure, print a line, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=".cache/models/SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvmarket-bench-") as folder:
        rows = measure(args, Path(folder))
    ratios = [row["market"] / row["plain"] for row in rows]
    low, high = interval(ratios)
    result = {
        "command": "python -m benchmarks.miss_cost " + " ".join(sys.argv[1:]),
        "model": Path(args.model).name,
        "tokens": args.tokens,
        "machine": describe_machine(),
        "ratio": statistics.median(ratios),
        "interval_95": [low, high],
        "rounds": rows,
    }
    print(
        f"market over plain, {args.tokens} tokens that match nothing, {args.rounds} rounds: "
        f"{result['ratio']:.4f} (95 %: {low:.4f} to {high:.4f})"
    )
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
