"""An offline engine on a market."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm_kvmarket.market import Market


def open_llm(
    model: str,
    market: Market,
    *,
    max_model_len: int | None = None,
    dtype: str | None = None,
    **engine_args: Any,
) -> Any:
    """A vllm.LLM for `model` on `market`; further arguments are vllm.LLM's and go first.

    On a CPU it uses every core and, unless told otherwise, float32, which is many times faster than
    bfloat16 where the CPU has no instructions for that.
    """
    if Path(model).exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import LLM
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        cores = sorted(os.sched_getaffinity(0))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}-{cores[-1]}")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        engine_args.setdefault("enforce_eager", True)
        dtype = dtype or "float32"
    return LLM(
        model=model,
        dtype=dtype or "auto",
        max_model_len=max_model_len,
        **{"kv_transfer_config": market.transfer_config(), **engine_args},
    )


def close_llm(llm: Any) -> None:
    """End an offline engine's processes now, not whenever Python collects it."""
    llm.llm_engine.engine_core.shutdown()
