"""Section 2: prefill against reuse over length, and after how many reuses publishing has paid.

Three engines: plain vLLM computes; one on a market publishes; one in a new process reuses from the
store (files in the system's page cache, vLLM's prefix cache emptied before each). Wall time is to
the first token. CPU seconds are those of all processes of the engine over the same time, in which
vLLM's processes also spin while they wait for each other: both sides have that.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.paper_sections.clocks import EngineClock
from benchmarks.paper_sections.inputs import PAPER_BREAK_EVEN, PAPER_POINTS
from benchmarks.paper_sections.tables import table
from benchmarks.prefill_vs_reuse import BATCHED_TOKENS, CONTEXT, documents, question
from vllm_kvmarket import Market
from vllm_kvmarket.connector.offline_engine import close_llm, open_llm
from vllm_kvmarket.market.timed_requests import REST_S, ask, empty_prefix_cache

LENGTHS = (255, 512, 1024, 2048, 3000, 3774)
REPEATS = 3


@dataclass(frozen=True, slots=True)
class Cost:
    """The times of one step."""

    wall_s: float
    cpu_s: float


def break_even(publish: float, prefill: float, reuse: float) -> float | None:
    """From how many reads on publishing once and reusing costs less than prefilling each time.

    All in one unit. The paper's count: with publishing as dear as a prefill and a ratio r of
    prefill to reuse it is r / (r - 1). None when reuse is no cheaper than prefill.
    """
    return publish / (prefill - reuse) if prefill > reuse else None


def growth_exponent(lengths: Sequence[int], values: Sequence[float]) -> float | None:
    """The power of the length that values grow with: least squares on logarithms."""
    if len(lengths) < 2:
        return None
    xs, ys = [math.log(each) for each in lengths], [math.log(each) for each in values]
    return statistics.linear_regression(xs, ys).slope


class Growth:
    """The engines in turn, collecting costs by step and length."""

    def __init__(self, model: str, market: Market, lengths: tuple[int, ...], repeats: int) -> None:
        self.model, self.market = model, market
        self.lengths, self.repeats = lengths, repeats
        self.costs: dict[tuple[str, int], list[Cost]] = {}
        self.stored: dict[int, int] = {}
        self._asked = 0
        self._clock: EngineClock | None = None

    def _open(self, **engine_args: Any) -> tuple[Any, dict[int, list[int]]]:
        settings = {"max_model_len": CONTEXT, "max_num_batched_tokens": BATCHED_TOKENS}
        llm = open_llm(self.model, self.market, **settings, **engine_args)
        self._clock = EngineClock()
        texts = documents(llm.get_tokenizer(), self.lengths)
        ask(llm, texts[self.lengths[0]][5:] + question(0), max_tokens=1)  # warms up
        return llm, texts

    def _timed(self, name: str, length: int, work: Callable[[], object]) -> None:
        assert self._clock is not None
        time.sleep(REST_S)
        cpu, wall = self._clock.seconds(), time.perf_counter()
        work()
        taken = Cost(time.perf_counter() - wall, self._clock.seconds() - cpu)
        self.costs.setdefault((name, length), []).append(taken)

    def _ask(self, llm: Any, tokens: list[int], account: str | None = None) -> None:
        self._asked += 1
        params = self.market.params(account) if account else None
        answer = ask(llm, tokens + question(self._asked), params, max_tokens=1, rest_s=0)
        if account and answer.market.get("reused_tokens") != len(tokens):
            raise RuntimeError(f"reuse of {len(tokens)} tokens was wanted, got {answer.market}")

    def prefill(self) -> None:
        """Plain vLLM computes every document."""
        llm, texts = self._open(kv_transfer_config=None)
        for _ in range(self.repeats):
            for length, tokens in texts.items():
                empty_prefix_cache(llm)
                self._timed("prefill", length, lambda tokens=tokens: self._ask(llm, tokens))
        close_llm(llm)

    def publish(self) -> None:
        """Publish every document, again and again: computed, stored durably, and listed."""
        llm, texts = self._open()
        for number in range(self.repeats):
            for length, tokens in texts.items():
                empty_prefix_cache(llm)
                listings: list[Any] = []
                title = f"{length} tokens"
                self._timed(
                    "publish",
                    length,
                    lambda tokens=tokens, title=title, listings=listings: listings.append(
                        self.market.publish(llm, token_ids=tokens, title=title)
                    ),
                )
                self.stored[length] = listings[0].stored_bytes
                if number < self.repeats - 1:
                    self.market.delist(listings[0].document_id)
                    for key in listings[0].chunk_keys:
                        self.market.store.disk.delete(key)
        close_llm(llm)

    def reuse(self) -> None:
        """Reuse every document in a new process."""
        llm, texts = self._open()
        for _ in range(self.repeats):
            for length, tokens in texts.items():
                empty_prefix_cache(llm)
                self._timed("reuse", length, lambda tokens=tokens: self._ask(llm, tokens, "buyer"))
        close_llm(llm)

    def rows(self) -> list[dict[str, Any]]:
        """A row a length, of medians."""
        rows = []
        for length in self.lengths:
            row: dict[str, Any] = {"tokens": length, "stored_bytes": self.stored[length]}
            for unit in ("wall_s", "cpu_s"):
                median = {
                    name: statistics.median(getattr(c, unit) for c in self.costs[name, length])
                    for name in ("prefill", "publish", "reuse")
                }
                row[unit] = {
                    **median,
                    "prefill_over_reuse": median["prefill"] / median["reuse"],
                    "publish_over_prefill": median["publish"] / median["prefill"],
                    "break_even_reads": break_even(**median),
                    "rounds": {
                        name: [getattr(cost, unit) for cost in self.costs[name, length]]
                        for name in median
                    },
                }
            rows.append(row)
        return rows


def run(model: str, market: Market, repeats: int, quick: bool) -> dict[str, Any]:
    """Run the section; a result for JSON."""
    lengths, repeats = (LENGTHS[:2], 1) if quick else (LENGTHS, repeats)
    work = Growth(model, market, lengths, repeats)
    for part in (work.prefill, work.publish, work.reuse):
        print(f"prefill against reuse: {part.__doc__}", file=sys.stderr, flush=True)
        part()
    rows = work.rows()
    return {
        "repeats": repeats,
        "rows": rows,
        "growth_exponents": {
            unit: {
                name: growth_exponent(lengths, [row[unit][name] for row in rows])
                for name in ("prefill", "reuse", "prefill_over_reuse")
            }
            for unit in ("wall_s", "cpu_s")
        },
        "paper": paper_figures(),
    }


def paper_figures() -> dict[str, Any]:
    """The paper's two points, with what follows from them."""
    lengths = [point[0] for point in PAPER_POINTS]
    return {
        "rows": [
            {"tokens": tokens, "prefill_s": prefill, "reuse_s": reuse, "break_even_reads": count}
            for (tokens, prefill, reuse), count in zip(PAPER_POINTS, PAPER_BREAK_EVEN, strict=True)
        ],
        "growth_exponents": {
            "prefill": growth_exponent(lengths, [point[1] for point in PAPER_POINTS]),
            "reuse": growth_exponent(lengths, [point[2] for point in PAPER_POINTS]),
            "prefill_over_reuse": growth_exponent(
                lengths, [prefill / reuse for _, prefill, reuse in PAPER_POINTS]
            ),
        },
    }


def show(result: dict[str, Any]) -> None:
    """Wall and CPU seconds side by side, the paper's figures below."""
    names = ("prefill", "publish", "reuse")
    rows = []
    for row in result["rows"]:
        cells = [f"{row['tokens']:,}"]
        for unit in ("wall_s", "cpu_s"):
            cells += [f"{row[unit][name]:.3f}" for name in names]
            cells.append(f"{row[unit]['prefill_over_reuse']:.1f}x")
            count = row[unit]["break_even_reads"]
            cells.append("never" if count is None else f"{count:.2f}")
        rows.append(cells)
    for point in result["paper"]["rows"]:
        cells = [f"paper, {point['tokens']:,}", f"{point['prefill_s']:.3f}", "-"]
        cells += [f"{point['reuse_s']:.3f}", f"{point['prefill_s'] / point['reuse_s']:.1f}x"]
        rows.append([*cells, f"{point['break_even_reads']:.2f}", *["-"] * 5])
    head = [
        f"{unit}\n{name}"
        for unit in ("wall s", "CPU s")
        for name in (*names, "ratio", "break-even")
    ]
    table(("tokens", *head), rows)
    print(
        f"\nMedians of {result['repeats']}. Wall: to the first token; publishing: until the "
        "document is stored durably and on offer.\n"
        "Break-even: publishing / (prefill - reuse), in reads."
    )
    for unit, name in (("wall_s", "wall time"), ("cpu_s", "CPU time")):
        found = result["growth_exponents"][unit]
        if found["prefill"] is not None:
            print(
                f"In {name}, prefill grows with length^{found['prefill']:.2f}, reuse with "
                f"length^{found['reuse']:.2f}, their ratio with length^"
                f"{found['prefill_over_reuse']:.2f}"
            )
    paper = result["paper"]["growth_exponents"]
    print(
        f"In the paper's two points: prefill {paper['prefill']:.2f}, reuse {paper['reuse']:.2f}, "
        f"ratio {paper['prefill_over_reuse']:.2f}"
    )
