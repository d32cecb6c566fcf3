"""A scheduler half over a market with one document, and requests as vLLM's scheduler has them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.v1.request import RequestStatus

from tests.support.catalogue_documents import NAMESPACE, store_and_list, tokens
from tests.support.paged import one_group
from vllm_kvmarket.connector import scheduler
from vllm_kvmarket.connector.request_state import EngineFacts
from vllm_kvmarket.core.config import load
from vllm_kvmarket.core.pricing import NANO
from vllm_kvmarket.market.market import Market

DOCUMENT = tokens(600)
BLOCK_TOKENS = 128
FACTS = EngineFacts("e", (one_group(["a", "b", "c"], BLOCK_TOKENS),), 256, 1)
# What vLLM finds in its own prefix cache.
CACHED = 600 // BLOCK_TOKENS * BLOCK_TOKENS


@contextmanager
def opened_market(home: Path) -> Iterator[Market]:
    """DOCUMENT is listed by pat; alice has funds, poor has none."""
    with Market.open(home) as opened:
        opened.create_account("pat", "publisher")
        opened.create_account("alice")
        opened.create_account("poor")
        opened.deposit("alice", NANO, "d1")
        store_and_list(opened, DOCUMENT, publisher="pat")
        yield opened


def half_of(market: Market, monkeypatch: Any, **settings: Any) -> scheduler.SchedulerHalf:
    """A half whose model's namespace is the documents'; the caller closes it."""
    known = SimpleNamespace(of=lambda _: NAMESPACE)
    monkeypatch.setattr(scheduler, "Namespaces", lambda *_: known)
    engine: Any = SimpleNamespace(model_config=SimpleNamespace(model="m", max_model_len=4096))
    config = load({"home": str(market.home), "trust_requests": True} | settings)
    return scheduler.SchedulerHalf(engine, config, FACTS)


def request_of(
    prompt: list[int],
    params: dict[str, Any],
    name: str = "r-1",
    status: RequestStatus = RequestStatus.FINISHED_STOPPED,
    output: int = 5,
) -> Any:
    """The part of vLLM's request that the half reads."""
    return SimpleNamespace(
        request_id=name,
        kv_transfer_params=params.get("kv_transfer_params"),
        lora_request=None,
        prompt_token_ids=prompt,
        mm_features=[],
        num_prompt_tokens=len(prompt),
        num_tokens=len(prompt),
        num_output_tokens=output,
        num_preemptions=0,
        prefill_stats=None,
        arrival_time=time.time(),
        skip_reading_prefix_cache=False,
        sampling_params=None,
        status=status,
    )
