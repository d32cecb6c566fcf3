"""A worker of vLLM's that turns LFM2's positions rightly on a CPU: `worker_extension_cls` names it.

vLLM 0.32's operator for a CPU takes queries and keys as (tokens, heads * head size). Its LFM2 gives
(tokens, heads, head size), and the operator takes the heads for tokens: what it computes of a
prompt depends on the pieces in which it came.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

WHOLE_ROWS = "tests.support.whole_rows.WholeRows"


class WholeRows:
    """Queries and keys are given to the operator as it takes them."""


_turn = RotaryEmbedding.forward_cpu


def _turn_whole_rows(
    self: RotaryEmbedding,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    turned = _turn(self, positions, query.flatten(1), None if key is None else key.flatten(1))
    return turned[0].view_as(query), None if key is None else turned[1].view_as(key)


RotaryEmbedding.forward_cpu = _turn_whole_rows
