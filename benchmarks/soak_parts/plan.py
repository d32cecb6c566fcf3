"""A soak's plan, and the record of what happened."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NANO = 1_000_000_000
MODEL_NAME = "soak"
CONTEXT = 2048
BLOCK_TOKENS = 128
# Of the paged cache: fewer than the requests under way grow to, so that vLLM preempts some.
BLOCKS = 24
MOST_SEQUENCES = 10
WRITE_NANO_PER_MTOK = 1 * NANO
# Short, so that what is remembered of a purchase for its retry is forgotten within the soak.
RESERVATION_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Plan:
    """How long, with which seed, on which model; sizes follow from the model's KV."""

    minutes: float
    seed: int
    model: Path
    home: Path
    bytes_per_token: int
    documents: int = 40
    clients: int = 12

    @property
    def seconds(self) -> float:
        """How long clients are active."""
        return self.minutes * 60

    @property
    def quota_bytes(self) -> int:
        """Room for about half of the documents."""
        return int(self.documents * 800 * self.bytes_per_token * 0.5)

    def config(self) -> dict[str, Any]:
        """The market's configuration."""
        return {
            "home": str(self.home),
            "disk_quota_bytes": self.quota_bytes,
            "quarantine_bytes": self.quota_bytes // 8,
            "host_cache_bytes": self.quota_bytes // 3,
            "reservation_timeout_s": RESERVATION_TIMEOUT_S,
            "tariff": {"cache_write_nano_per_mtok": WRITE_NANO_PER_MTOK},
        }


def kv_bytes_per_token(model: Path) -> int:
    """Bytes of KV a token, in float32, of a model's folder."""
    config = json.loads((model / "config.json").read_text("utf-8"))
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(config["num_hidden_layers"] * heads * size * 2 * 4)


@dataclass(slots=True)
class Asked:
    """A request to a generating route, and what came of it.

    `outcome` is answered, refused (with `status`), left (the client went away) or broken. `tokens`
    are those that were received, of the first choice. `sold` is the answer's kvmarket object,
    `receipts` are a stream's. `cached` is the usage's count of tokens that were not computed.
    """

    id: str
    shape: str
    account: str | None
    route: str
    prompt: list[int]
    max_tokens: int
    greedy: bool = True
    reuse: str = "prefer"
    max_price_nano: int | None = None
    streamed: bool = False
    outcome: str = ""
    status: int = 0
    tokens: list[int] = field(default_factory=list)
    sold: dict[str, Any] = field(default_factory=dict)
    receipts: list[dict[str, Any]] = field(default_factory=list)
    cached: int | None = None
    error: str = ""

    @property
    def receipt_request_id(self) -> str:
        """The id that its receipt has."""
        return f"cmpl-{self.id}-0" if self.route == "completions" else f"chatcmpl-{self.id}"


@dataclass(slots=True)
class Story:
    """The record: counts, requests one by one, and problems in words."""

    counts: Counter[str] = field(default_factory=Counter)
    asked: list[Asked] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    # By document: how often it was accepted for publishing, and the prices it ever had.
    accepted: Counter[str] = field(default_factory=Counter)
    prices: dict[str, set[int]] = field(default_factory=dict)
    checkpoints: list[str] = field(default_factory=list)
    # Documents on offer, as of a second ago.
    on_offer: set[str] = field(default_factory=set)

    def fail(self, problem: str) -> None:
        """Note a problem; mutates."""
        self.problems.append(problem)
