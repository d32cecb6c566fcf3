"""Prefill against reuse, over length: `make bench`.

    python -m benchmarks.prefill_vs_reuse --model FOLDER [--repeats 5] [--lengths 256,512,...]

Each round asks in turn, for each length:

1. plain vLLM without kvmarket: full prefill;
2. an engine on the market: full prefill again, which is what the plugin costs a request that
   matches nothing, and the hit in vLLM's own prefix cache (APC); publishing; reuse from the store
   with that cache emptied; and reuse after that (full blocks from the paged cache, the last page
   from the store);
3. a new process: its first reuse, and then a hit in its prefix cache.

A reuse is compared with a hit of the same process: two processes of one engine differ by tens of
percent. Ratios are medians over rounds of one round's times. Writes
docs/results/prefill_vs_reuse.json and .png.
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

from benchmarks.machine import describe_machine, memcpy_bytes_per_s, read_whole
from vllm_kvmarket import Market
from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.cli.engine import engine_output
from vllm_kvmarket.connector.offline_engine import close_llm, open_llm
from vllm_kvmarket.market.timed_requests import REST_S, ask, empty_prefix_cache

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
    """The engines, and seconds by length and name."""

    def __init__(self, args: argparse.Namespace, market: Market) -> None:
        self.market = market
        self.model: str = args.model
        self.lengths = tuple(int(length) for length in args.lengths.split(","))
        self.figures: dict[int, Figures] = {length: {} for length in self.lengths}
        self.listings: dict[int, Listing] = {}
        self._asked = 0
        self._plain = self._open(kv_transfer_config=None)
        self._sold = self._open()
        self._texts = documents(self._plain.get_tokenizer(), self.lengths)
        self._warm_up(self._plain)
        self._warm_up(self._sold)

    def _open(self, **engine_args: Any) -> Any:
        settings = {"max_model_len": CONTEXT, "max_num_batched_tokens": BATCHED_TOKENS}
        return open_llm(self.model, self.market, **settings, **engine_args)

    def close(self) -> None:
        """End both engines."""
        close_llm(self._plain)
        close_llm(self._sold)

    def _warm_up(self, llm: Any) -> None:
        ask(llm, self._texts[self.lengths[0]][5:] + question(0), max_tokens=1)

    def _ask(self, length: int, name: str, llm: Any, account: str | None = None) -> None:
        """Note one request's time to first token; every request asks something new."""
        self._asked += 1
        params = self.market.params(account) if account else None
        tokens = self._texts[length] + question(self._asked)
        self._note(length, name, ask(llm, tokens, params, max_tokens=1).ttft_s)

    def _note(self, length: int, name: str, seconds: float) -> None:
        self.figures[length].setdefault(name, []).append(seconds)

    def round(self) -> None:
        """Everything once, with documents that were not on offer before."""
        for listing in self.listings.values():
            self.market.delist(listing.document_id)
            for key in listing.chunk_keys:
                self.market.store.disk.delete(key)
        for length in self.lengths:
            empty_prefix_cache(self._plain)
            empty_prefix_cache(self._sold)
            self._ask(length, "prefill_plain", self._plain)
            self._ask(length, "miss", self._sold)
            self._ask(length, "apc_hit", self._sold)
            empty_prefix_cache(self._sold)
            self._publish(length)
            empty_prefix_cache(self._sold)
            read_whole(self.market.store.disk.root)
            self._ask(length, "reuse_store", self._sold, "buyer")
            self._ask(length, "reuse_again", self._sold, "buyer")
        new = self._open()
        self._warm_up(new)
        read_whole(self.market.store.disk.root)
        for length in self.lengths:
            self._ask(length, "reuse_new_process", new, "buyer")
        for length in self.lengths:
            self._ask(length, "prefill_new_process", new)
            self._ask(length, "apc_hit_new_process", new)
        close_llm(new)

    def _publish(self, length: int) -> None:
        time.sleep(REST_S)
        started = time.perf_counter()
        listing = self.market.publish(
            self._sold, token_ids=self._texts[length], title=f"{length} tokens"
        )
        self._note(length, "publish", time.perf_counter() - started)
        self.listings[length] = listing


# A ratio's name, and the names of the two figures.
RATIOS = {
    "prefill_over_apc_hit": ("miss", "apc_hit"),
    "prefill_over_reuse_store": ("miss", "reuse_store"),
    "prefill_over_reuse_new_process": ("prefill_new_process", "reuse_new_process"),
    "reuse_store_over_apc_hit": ("reuse_store", "apc_hit"),
    "reuse_again_over_apc_hit": ("reuse_again", "apc_hit"),
    "reuse_new_process_over_apc_hit": ("reuse_new_process", "apc_hit_new_process"),
    "miss_over_plain": ("miss", "prefill_plain"),
    "publish_over_miss": ("publish", "miss"),
}


def summarise(bench: Bench) -> list[dict[str, Any]]:
    """Medians, ratios, bytes and money, one row a length."""
    rows = []
    for length, figures in bench.figures.items():
        receipts = bench.market.ledger.receipts(document_id=bench.listings[length].document_id)
        rows.append(
            {
                "tokens": length,
                "seconds": {name: statistics.median(each) for name, each in figures.items()},
                **{
                    name: statistics.median(
                        above / below
                        for above, below in zip(figures[one], figures[other], strict=True)
                    )
                    for name, (one, other) in RATIOS.items()
                },
                "stored_bytes": bench.listings[length].stored_bytes,
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
        with engine_output():
            bench = Bench(args, market)
            for number in range(args.repeats):
                print(f"benchmark: round {number + 1}", file=sys.stderr, flush=True)
                bench.round()
            bench.close()
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
