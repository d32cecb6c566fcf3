"""TTFT of a reuse while other requests decode, beside a prefix-cache hit under the same load.

    python -m benchmarks.under_load [--model FOLDER] [--lengths 256,1024] [--others 4] [--rounds 5]

An engine on a market is asked in turn without buying, for a hit in its own prefix cache, and for a
reuse of the document that it has in its paged cache; and, each round, a new process, which loads it
from the page cache, and then has a hit of its own. Ratios are medians over rounds of one round's
times. Writes docs/results/under_load.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, read_whole
from benchmarks.prefill_vs_reuse import BATCHED_TOKENS, CONTEXT, RESULTS, documents, question
from vllm_kvmarket import Market
from vllm_kvmarket.cli.engine import engine_output
from vllm_kvmarket.connector.offline_engine import close_llm, open_llm
from vllm_kvmarket.market.timed_requests import REST_S, ask

# Tokens of each decoding request before the clock starts, and the most that it makes.
WARM_TOKENS, MOST_TOKENS = 8, 1000
_ids = itertools.count()


def ttft_under_load(
    llm: Any, tokens: Sequence[int], params: dict[str, Any] | None, others: int
) -> float:
    """Seconds to a request's first token while `others` requests decode."""
    from vllm.sampling_params import RequestOutputKind

    time.sleep(REST_S)
    engine = llm.llm_engine
    sampling = llm.get_default_sampling_params()
    sampling.temperature, sampling.output_kind = 0.0, RequestOutputKind.DELTA
    asked = sampling.clone()
    asked.max_tokens, asked.extra_args = 1, params
    sampling.max_tokens = sampling.min_tokens = MOST_TOKENS
    made = {f"other-{next(_ids)}": 0 for _ in range(others)}
    for name in made:
        engine.add_request(name, {"prompt_token_ids": question(next(_ids))}, sampling)
    while min(made.values(), default=WARM_TOKENS) < WARM_TOKENS:
        for output in engine.step():
            made[output.request_id] += len(output.outputs[0].token_ids)
    name = f"asked-{next(_ids)}"
    started = time.perf_counter()
    engine.add_request(name, {"prompt_token_ids": list(tokens)}, asked)
    while not any(output.request_id == name for output in engine.step()):
        pass
    seconds = time.perf_counter() - started
    engine.abort_request(list(made))
    while engine.has_unfinished_requests():
        engine.step()
    return seconds


class Bench:
    """An engine, the documents, and seconds by length and name."""

    def __init__(self, args: argparse.Namespace, market: Market) -> None:
        self.market = market
        self._model: str = args.model
        self._others: int = args.others
        self.lengths = tuple(int(length) for length in args.lengths.split(","))
        self.seconds: dict[int, dict[str, list[float]]] = {
            length: {name: [] for name in ("hit", "same_process", "new_hit", "new_process")}
            for length in self.lengths
        }
        self._sold = self._open()
        self._documents = documents(self._sold.get_tokenizer(), self.lengths)
        for tokens in self._documents.values():
            market.publish(self._sold, token_ids=tokens)
            self._fill(self._sold, tokens)
            ask(self._sold, tokens + question(next(_ids)), market.params("buyer"), max_tokens=1)

    def _open(self) -> Any:
        settings = {"max_model_len": CONTEXT, "max_num_batched_tokens": BATCHED_TOKENS}
        return open_llm(self._model, self.market, **settings)

    def _fill(self, llm: Any, tokens: list[int]) -> None:
        """Have vLLM's prefix cache hold a document for those who do not buy."""
        ask(llm, tokens + question(next(_ids)), max_tokens=1)

    def close(self) -> None:
        """End the engine."""
        close_llm(self._sold)

    def _ask(self, llm: Any, name: str, length: int, *, buys: bool) -> None:
        tokens = self._documents[length] + question(next(_ids))
        params = self.market.params("buyer") if buys else None
        seconds = ttft_under_load(llm, tokens, params, self._others)
        self.seconds[length][name].append(seconds)

    def round(self) -> None:
        """Each document once by each way, in turn."""
        new = self._open()
        ask(new, question(next(_ids)), max_tokens=8)
        for length in self.lengths:
            read_whole(self.market.store.disk.root)
            self._ask(self._sold, "hit", length, buys=False)
            self._ask(self._sold, "same_process", length, buys=True)
            self._ask(new, "new_process", length, buys=True)
        for length in self.lengths:
            self._fill(new, self._documents[length])
            self._ask(new, "new_hit", length, buys=False)
        close_llm(new)

    def rows(self) -> list[dict[str, Any]]:
        """Medians and ratios, one row a length."""
        rows = []
        for length, figures in self.seconds.items():
            row: dict[str, Any] = {"tokens": length, "rounds": figures}
            row["seconds"] = {name: statistics.median(each) for name, each in figures.items()}
            for name, bound in (("same_process", "hit"), ("new_process", "new_hit")):
                pairs = zip(figures[name], figures[bound], strict=True)
                row[f"{name}_over_hit"] = statistics.median(ours / hit for ours, hit in pairs)
            rows.append(row)
        return rows


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=".cache/models/SmolLM2-135M-Instruct")
    parser.add_argument("--lengths", default="256,1024,3774")
    parser.add_argument("--others", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "under_load.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvmarket-bench-") as home, Market.open(home) as market:
        market.create_account("buyer")
        market.deposit("buyer", 10**15, "first")
        with engine_output():
            bench = Bench(args, market)
            for _ in range(args.rounds):
                bench.round()
            bench.close()
    result = {
        "command": "python -m benchmarks.under_load " + " ".join(sys.argv[1:]),
        "model": Path(args.model).name,
        "others": args.others,
        "machine": describe_machine(),
        "rows": bench.rows(),
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"TTFT in seconds while {args.others} requests decode; medians of {args.rounds}\n")
    head = ("tokens", "hit", "same proc.", "new hit", "new proc.", "same/hit", "new/hit")
    print("".join(f"{word:>12}" for word in head))
    for row in result["rows"]:
        cells = [f"{row['tokens']}", *(f"{each:.3f}" for each in row["seconds"].values())]
        cells += [f"{row['same_process_over_hit']:.3f}", f"{row['new_process_over_hit']:.3f}"]
        print("".join(f"{cell:>12}" for cell in cells))
    print(f"\nwrote {args.output}")


if __name__ == "__main__":
    main()
