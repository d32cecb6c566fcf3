"""Real engines for tests, and documents to give them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support import ROOT
from tests.support.forked import forked_engines
from vllm_kvmarket import Market
from vllm_kvmarket.connector.offline_engine import close_llm, open_llm

SMOLLM = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"
NANO = 1_000_000_000


# Prefill in pieces of 512 tokens, and so few blocks that preemption is easy to provoke.
SMALL: dict[str, Any] = {
    "max_num_batched_tokens": 512,
    "num_gpu_blocks_override": 44,
    "max_num_seqs": 8,
    "disable_log_stats": False,
}


@contextmanager
def running(model: Path, market: Market, **engine_args: Any) -> Iterator[Any]:
    """An engine on a market that is gone, process and all, afterwards."""
    with forked_engines():
        llm = open_llm(str(model), market, **{"max_model_len": 4096, **engine_args})
    try:
        yield llm
    finally:
        close_llm(llm)
        del llm
        gc.collect()


def words(seed: int, count: int) -> list[int]:
    """Distinct pseudo-random token ids: a document that no other test uses."""
    state = seed * 2654435761 % 2**32 or 1
    tokens = []
    for _ in range(count):
        state = (state * 1664525 + 1013904223) % 2**32
        tokens.append(1000 + state // 65536 % 40000)
    return tokens


def metric(llm: Any, name: str) -> float:
    """The sum of a counter of the engine that started last, over its labels."""
    return sum(each.value for each in llm.get_metrics() if each.name == name)
