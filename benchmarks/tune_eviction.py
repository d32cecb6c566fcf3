"""Choose the eviction policy's constants, on workloads that the results do not use.

    python -m benchmarks.tune_eviction [--trace FILE ...]

Populations from seeds 101 to 103 (benchmarks/cdn_simulation.py reports others), and the first half
of each trace (it reports the second). For each choice: prefill time spared, as a share of what
Belady's optimum spares, by workload and budget, and in how many cases it is behind LRU.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks.cdn_simulation import BUDGETS, populations
from benchmarks.simulation.reads import Workload, read_trace
from benchmarks.simulation.replay import replay
from vllm_kvmarket.catalogue import eviction_policy

SEEDS = (101, 102, 103)
NAMES = ("PRIOR_USES", "PRIOR_PACES", "GONE_A_PACE")
GRID: dict[str, Sequence[float]] = {
    "PRIOR_USES": (0.3, 0.5, 1.0),
    "PRIOR_PACES": (0.7, 1.5, 3.0),
    "GONE_A_PACE": (0.1, 0.2, 0.3, 0.4),
}
Case = tuple[int, float]
Choice = tuple[float, ...]


def workloads(reads: int, traces: Sequence[Path]) -> list[Workload]:
    """Make what is tuned on."""
    made = [each.generate() for seed in SEEDS for each in populations(reads, seed)]
    for path in traces:
        whole = read_trace(path)
        half = whole.reads[: len(whole.reads) // 2]
        made.append(Workload(whole.name, whole.chunk_tokens, half))
    return made


def saved(all_: Sequence[Workload], case: Case, policy: str, choice: Choice | None) -> float:
    """Replay one case; `choice` are the constants, in the order of NAMES."""
    for name, value in zip(NAMES, choice or (), strict=bool(choice)):
        setattr(eviction_policy, name, value)
    workload, share = all_[case[0]], case[1]
    return replay(workload, policy, max(1, int(workload.distinct_chunks * share))).saved_tokens


def main() -> None:
    """Replay every choice on every case, and print the best last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trace", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--reads", type=int, default=3_000, help="of each population")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    all_ = workloads(args.reads, args.trace)
    cases = list(itertools.product(range(len(all_)), BUDGETS))
    found = []
    with ProcessPoolExecutor(args.jobs) as pool:

        def row(policy: str, choice: Choice | None) -> list[float]:
            each = partial(saved, all_, policy=policy, choice=choice)
            return list(pool.map(each, cases))

        limit, lru = row("belady", None), row("lru", None)
        for choice in itertools.product(*(GRID[name] for name in NAMES)):
            got = row("value", choice)
            shares = [one / best for one, best in zip(got, limit, strict=True)]
            behind = sum(one < other for one, other in zip(got, lru, strict=True))
            found.append((sum(shares) / len(shares), behind, choice))
            print(
                f"{dict(zip(NAMES, choice, strict=True))}: {found[-1][0]:.4f} of Belady's, "
                f"behind LRU in {behind} of {len(cases)}",
                flush=True,
            )
    print("best on average:", dict(zip(NAMES, max(found)[2], strict=True)))


if __name__ == "__main__":
    main()
