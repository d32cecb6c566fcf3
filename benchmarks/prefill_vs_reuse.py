"""Prefill against reuse, over length: `make bench`.

    python -m benchmarks.prefill_vs_reuse --model FOLDER [--repeats 5] [--lengths 256,512,...]

Three engines, one after another, on one market:

1. plain vLLM without kvmarket: full prefill, and the hit in vLLM's own prefix cache (APC);
2. an engine on the market: full prefill again, publishing, reuse from the store with vLLM's prefix
   cache emptied, reuse after that (full blocks from the paged cache, the last page from the store),
   and what the plugin costs a request that matches nothing;
3. a new process, several times: its first reuse.

Ratios are medians; each round measures its parts in turn, so that a slow moment of the machine hits
all of them. Writes docs/results/prefill_vs_reuse.json and .png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, memcpy_bytes_per_s
from vllm_kvmarket import Market
from vllm_kvmarket.cli.engine import engine_output
from vllm_kvmarket.connector.offline_engine import close_llm, open_llm
from vllm_kvmarket.market.timed_requests import ask, empty_prefix_cache

LENGTHS = (256, 512, 1024, 2048, 3774)
QUESTION_TOKENS = 20
CONTEXT = 4096
BATCHED_TOKENS = 8192
RESULTS = Path(__file__).parents[1] / "docs" / "results"
Figures = dict[str, list[float]]


def documents(tokenizer: Any, lengths: tuple[int, ...]) -> dict[int, list[int]]:
    """Licence text cut so that no document is a prefix of another, nor of what was asked before."""
    text = resources.files("vllm_kvmarket.cli").joinpath("gpl-3.0.txt").read_text()
    tokens = tokenizer(text)["input_ids"]
    return {length: tokens[7 * i : 7 * i + length] for i, length in enumerate(lengths)}


def question(number: int) -> list[int]:
    """Tokens that no document holds at that place, different for each request."""
    return [2000 + (number * 37 + i * 101) % 20000 for i in range(QUESTION_TOKENS)]


class Bench:
    """The parts of the benchmark, collecting seconds by name and length."""

    def __init__(self, args: argparse.Namespace, market: Market) -> None:
        self.market = market
        self.model: str = args.model
        self.repeats: int = args.repeats
        self.lengths = tuple(int(length) for length in args.lengths.split(","))
        self.figures: dict[int, Figures] = {length: {} for length in self.lengths}
        self.ids: dict[int, str] = {}
        self._asked = 0

    def open(self, **engine_args: Any) -> Any:
        """An engine with the benchmark's settings."""
        settings = {"max_model_len": CONTEXT, "max_num_batched_tokens": BATCHED_TOKENS}
        return open_llm(self.model, self.market, **settings, **engine_args)

    def ttft(self, llm: Any, tokens: list[int], account: str | None = None) -> float:
        """One request's time to first token; every request asks something new."""
        self._asked += 1
        params = self.market.params(account) if account else None
        return ask(llm, tokens + question(self._asked), params, max_tokens=1).ttft_s

    def note(self, length: int, name: str, seconds: float) -> None:
        """Keep a figure."""
        self.figures[length].setdefault(name, []).append(seconds)

    def plain(self) -> None:
        """Plain vLLM: full prefill and its own prefix-cache hit."""
        llm = self.open(kv_transfer_config=None)
        texts = documents(llm.get_tokenizer(), self.lengths)
        self.ttft(llm, texts[self.lengths[0]])
        for _ in range(self.repeats):
            for length, tokens in texts.items():
                empty_prefix_cache(llm)
                self.note(length, "prefill_plain", self.ttft(llm, tokens))
                self.note(length, "apc_hit", self.ttft(llm, tokens))
        close_llm(llm)

    def sold(self) -> None:
        """On the market: a miss, publishing, and reuse from the store and from the paged cache."""
        llm = self.open()
        texts = documents(llm.get_tokenizer(), self.lengths)
        self.ttft(llm, texts[self.lengths[0]][5:])
        for _ in range(self.repeats):
            for length, tokens in texts.items():
                empty_prefix_cache(llm)
                self.note(length, "miss", self.ttft(llm, tokens))
        for number in range(self.repeats):
            for length, tokens in texts.items():
                empty_prefix_cache(llm)
                time.sleep(1.3)
                started = time.perf_counter()
                listing = self.market.publish(llm, token_ids=tokens, title=f"{length} tokens")
                self.note(length, "publish", time.perf_counter() - started)
                self.ids[length] = listing.document_id
                if number < self.repeats - 1:
                    self.market.delist(listing.document_id)
                    for key in listing.chunk_keys:
                        self.market.store.disk.delete(key)
        time.sleep(1)
        for _ in range(self.repeats):
            for length, tokens in texts.items():
                empty_prefix_cache(llm)
                self.note(length, "reuse_store", self.ttft(llm, tokens, "buyer"))
                self.note(length, "reuse_again", self.ttft(llm, tokens, "buyer"))
        close_llm(llm)

    def fresh(self) -> None:
        """The first reuse of each document in a new process; a small other request warms it up."""
        for _ in range(self.repeats):
            llm = self.open()
            texts = documents(llm.get_tokenizer(), self.lengths)
            self.ttft(llm, texts[self.lengths[0]][5:])
            for length, tokens in texts.items():
                self.note(length, "reuse_new_process", self.ttft(llm, tokens, "buyer"))
            close_llm(llm)


def summarise(bench: Bench) -> list[dict[str, Any]]:
    """Medians, ratios, bytes and money, one row a length."""
    rows = []
    for length, figures in bench.figures.items():
        median = {name: statistics.median(values) for name, values in figures.items()}
        receipts = bench.market.ledger.receipts(document_id=bench.ids[length])
        listing = bench.market.catalogue.get(bench.ids[length])
        hit = median["apc_hit"]
        rows.append(
            {
                "tokens": length,
                "seconds": median,
                "prefill_over_apc_hit": median["prefill_plain"] / hit,
                "prefill_over_reuse_store": median["prefill_plain"] / median["reuse_store"],
                "prefill_over_reuse_new_process": median["prefill_plain"]
                / median["reuse_new_process"],
                "reuse_store_over_apc_hit": median["reuse_store"] / hit,
                "reuse_again_over_apc_hit": median["reuse_again"] / hit,
                "reuse_new_process_over_apc_hit": median["reuse_new_process"] / hit,
                "miss_over_plain": median["miss"] / median["prefill_plain"],
                "publish_over_miss": median["publish"] / median["miss"],
                "stored_bytes": listing.stored_bytes,
                "charge_nano": receipts[0].charge_nano,
                "recompute_nano": receipts[0].recompute_nano,
                "rounds": figures,
            }
        )
    return rows


def show(result: dict[str, Any]) -> None:
    """The table on the terminal."""
    print(f"\n{result['model']} on {result['machine']['cpu']}, {result['machine']['cores']} cores")
    print(f"medians of {result['repeats']}; seconds to the first token\n")
    head = ("tokens", "prefill", "APC hit", "store", "again", "new proc.", "prefill/", "new proc.")
    print("".join(f"{word:>11}" for word in head) + f"{'miss/':>11}{'publish/':>11}{'charge/':>11}")
    tail = ("", "", "", "", "", "", "store", "/APC hit", "plain", "miss", "recompute")
    print("".join(f"{word:>11}" for word in tail))
    for row in result["rows"]:
        s = row["seconds"]
        cells = [f"{row['tokens']}", f"{s['prefill_plain']:.3f}", f"{s['apc_hit']:.3f}"]
        cells += [f"{s['reuse_store']:.3f}", f"{s['reuse_again']:.3f}"]
        cells += [f"{s['reuse_new_process']:.3f}", f"{row['prefill_over_reuse_store']:.1f}x"]
        cells += [f"{row['reuse_new_process_over_apc_hit']:.2f}", f"{row['miss_over_plain']:.3f}"]
        cells += [f"{row['publish_over_miss']:.3f}"]
        cells += [f"{row['charge_nano'] / row['recompute_nano']:.2f}"]
        print("".join(f"{cell:>11}" for cell in cells))
    load = result["load"]
    print(
        f"\nloading {load['bytes'] / 1e6:.0f} MB from the page cache, verified, two threads: "
        f"{load['bytes_per_s'] / 1e9:.1f} GB/s, {load['of_memcpy']:.0%} of memcpy "
        f"({load['memcpy_bytes_per_s'] / 1e9:.1f} GB/s)"
    )


def measure_load(market: Market) -> dict[str, Any]:
    """Load bandwidth of the longest document's chunks beside memcpy, in a separate process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load_bandwidth", "--home", str(market.home), "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def plot(result: dict[str, Any], path: Path) -> None:
    """TTFT over length, and the ratio that buying brings."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lengths = [row["tokens"] for row in result["rows"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    lines = {
        "prefill_plain": "full prefill",
        "apc_hit": "vLLM prefix-cache hit",
        "reuse_store": "kvmarket, from the store",
        "reuse_new_process": "kvmarket, new process",
    }
    for name, label in lines.items():
        left.plot(lengths, [row["seconds"][name] for row in result["rows"]], "o-", label=label)
    left.set(xlabel="document tokens", ylabel="time to first token, s", yscale="log")
    left.legend()
    for name, label in (
        ("prefill_over_apc_hit", "vLLM prefix-cache hit"),
        ("prefill_over_reuse_store", "kvmarket, from the store"),
        ("prefill_over_reuse_new_process", "kvmarket, new process"),
    ):
        right.plot(lengths, [row[name] for row in result["rows"]], "o-", label=label)
    right.set(xlabel="document tokens", ylabel="prefill TTFT / TTFT")
    right.legend()
    figure.suptitle(
        f"{result['model']}, {result['machine']['cpu']}, {result['machine']['cores']} cores"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run everything, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=".cache/models/SmolLM2-135M-Instruct")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kvmarket-bench-") as home, Market.open(home) as market:
        market.create_account("buyer")
        market.deposit("buyer", 10**15, "deposit")
        bench = Bench(args, market)
        with engine_output():
            for part in (bench.plain, bench.sold, bench.fresh):
                print(f"benchmark: {part.__doc__}", file=sys.stderr, flush=True)
                part()
        result = {
            "command": "python -m benchmarks.prefill_vs_reuse " + " ".join(sys.argv[1:]),
            "model": Path(args.model).name,
            "repeats": args.repeats,
            "machine": describe_machine(),
            "versions": {
                name: metadata.version(name)
                for name in ("vllm", "torch", "vllm-kvmarket", "transformers")
            },
            "memcpy_bytes_per_s": memcpy_bytes_per_s(threads=2),
            "load": measure_load(market),
            "rows": summarise(bench),
        }
    (args.output / "prefill_vs_reuse.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, args.output / "prefill_vs_reuse.png")
    show(result)
    print(f"\nwrote {args.output}/prefill_vs_reuse.json and .png")


if __name__ == "__main__":
    main()
