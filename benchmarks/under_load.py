"""TTFT of a reuse while other requests decode, beside a prefix-cache hit under the same load.

    python -m benchmarks.under_load [--model FOLDER] [--lengths 256,1024] [--others 4] [--rounds 5]

Plain vLLM and an engine on a market are open at once and asked in turn. On the market a document is
reused in the process that has it in its paged cache, and, each round, for the first time in a new
process, from the page cache. Ratios are medians over rounds of one round's times. Writes
docs/results/under_load.json.
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

from benchmarks.machine import describe_machine
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
    """Two engines, the documents, and seconds by length and name."""

    def __init__(self, args: argparse.Namespace, market: Market) -> None:
        self.market = market
        self._model: str = args.model
        self._others: int = args.others
        self.lengths = tuple(int(length) for length in args.lengths.split(","))
        self.seconds: dict[int, dict[str, list[float]]] = {
            length: {"apc_hit": [], "same_process": [], "new_process": []}
            for length in self.lengths
        }
        self._plain = self._open(kv_transfer_config=None)
        self._sold = self._open()
        self._documents = documents(self._plain.get_tokenizer(), self.lengths)
        for number, tokens in enumerate(self._documents.values()):
            market.publish(self._sold, token_ids=tokens)
            ask(self._plain, tokens + question(number), max_tokens=1)
            ask(self._sold, tokens + question(number), market.params("buyer"), max_tokens=1)

    def _open(self, **more: Any) -> Any:
        settings = {"max_model_len": CONTEXT, "max_num_batched_tokens": BATCHED_TOKENS}
        return open_llm(self._model, self.market, **settings, **more)

    def close(self) -> None:
        """End both engines."""
        close_llm(self._plain)
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
            self._ask(self._plain, "apc_hit", length, buys=False)
            self._ask(self._sold, "same_process", length, buys=True)
            self._ask(new, "new_process", length, buys=True)
        close_llm(new)

    def rows(self) -> list[dict[str, Any]]:
        """Medians and ratios, one row a length."""
        rows = []
        for length, figures in self.seconds.items():
            row: dict[str, Any] = {"tokens": length, "rounds": figures}
            row["seconds"] = {name: statistics.median(each) for name, each in figures.items()}
            for name in ("same_process", "new_process"):
                pairs = zip(figures[name], figures["apc_hit"], strict=True)
                row[f"{name}_over_apc_hit"] = statistics.median(ours / hit for ours, hit in pairs)
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
    head = ("tokens", "APC hit", "same proc.", "new proc.", "same/hit", "new/hit")
    print("".join(f"{word:>12}" for word in head))
    for row in result["rows"]:
        cells = [f"{row['tokens']}", *(f"{each:.3f}" for each in row["seconds"].values())]
        cells += [f"{row['same_process_over_apc_hit']:.3f}"]
        cells += [f"{row['new_process_over_apc_hit']:.3f}"]
        print("".join(f"{cell:>12}" for cell in cells))
    print(f"\nwrote {args.output}")


if __name__ == "__main__":
    main()
