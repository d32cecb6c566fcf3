"""An offline engine on a market."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_kvmarket.market.market import Market


def open_llm(
    model: str,
    market: Market,
    *,
    max_model_len: int | None = None,
    dtype: str | None = None,
    **engine_args: Any,
) -> Any:
    """A vllm.LLM for `model` on `market`; further arguments are vllm.LLM's and go first.

    On a CPU it uses every core and by default float32, which is many times faster than
    bfloat16 where the CPU has no instructions for that.
    """
    if Path(model).exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import LLM
    from vllm.platforms import current_platform

    settings = {}
    if current_platform.is_cpu():
        ranks = int(engine_args.get("tensor_parallel_size", 1))
        settings["VLLM_CPU_OMP_THREADS_BIND"] = cores_by_rank(ranks)
        settings["VLLM_CPU_KVCACHE_SPACE"] = "2"
        engine_args.setdefault("enforce_eager", True)
        dtype = dtype or "float32"
    with _set_where_missing(settings):
        return LLM(
            model=model,
            dtype=dtype or "auto",
            max_model_len=max_model_len,
            **{"kv_transfer_config": market.transfer_config(), **engine_args},
        )


@contextmanager
def _set_where_missing(settings: dict[str, str]) -> Iterator[None]:
    """Environment variables for one engine: another one may have another number of ranks."""
    missing = settings.keys() - os.environ.keys()
    os.environ.update({name: settings[name] for name in missing})
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def cores_by_rank(ranks: int) -> str:
    """The cores of this process in equal shares, as vLLM's CPU backend takes them: `0,1|2,3`."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(len(cores) // ranks, 1)
    groups = [cores[i * share : (i + 1) * share] or cores[-share:] for i in range(ranks)]
    return "|".join(",".join(map(str, group)) for group in groups)


def close_llm(llm: Any) -> None:
    """End an offline engine's processes now, not whenever Python collects it."""
    llm.llm_engine.engine_core.shutdown()
