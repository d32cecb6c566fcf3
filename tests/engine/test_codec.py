"""zstd-exponent on a real model's keys and values, in the pages that vLLM keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tests.support import ROOT
from vllm_kvmarket.store.codec import CODEC_EXPONENT, decode_into, encode

DOCUMENT = ROOT / "vllm_kvmarket" / "cli" / "gpl-3.0.txt"
TOKENS, CHUNK_TOKENS = 2048, 256


@pytest.fixture(scope="module")
def keys_and_values(smollm: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each layer, float32 (heads, tokens, head size)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm)
    tokens = tokenizer(DOCUMENT.read_text(), return_tensors="pt").input_ids[:, :TOKENS]
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    with torch.no_grad():
        cache = model(tokens, use_cache=True, logits_to_keep=1).past_key_values
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def pages(pair: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype, block: int) -> np.ndarray:
    """A layer's pages as the CPU backend packs them, uint8 (pages, page_bytes).

    Each head has its K, channel after channel, and then its V, token after token.
    """
    heads, tokens, size = pair[0].shape
    cut = [each.reshape(heads, tokens // block, block * size) for each in _packed(pair, block)]
    both = torch.stack(cut, dim=2).permute(1, 0, 2, 3).to(dtype).contiguous()
    return both.view(torch.uint8).numpy().reshape(tokens // block, -1)


def _packed(pair: tuple[torch.Tensor, torch.Tensor], block: int) -> tuple[torch.Tensor, ...]:
    keys, values = pair
    heads, tokens, size = keys.shape
    return keys.reshape(heads, tokens // block, block, size).transpose(2, 3), values


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize(
    ("dtype", "least"),
    [
        (torch.bfloat16, 1.48),
        (torch.float16, 1.17),
        (torch.float32, 1.17),
        (torch.float8_e4m3fn, 1.19),
        (torch.float8_e5m2, 1.39),
    ],
)
def test_ratio_on_a_real_models_kv(
    keys_and_values: list[tuple[torch.Tensor, torch.Tensor]],
    dtype: torch.dtype,
    least: float,
    block: int,
) -> None:
    """Chunks of SmolLM2's KV become as small as promised, and come back bit for bit."""
    name = str(dtype).removeprefix("torch.")
    step = CHUNK_TOKENS // block
    plain = stored = 0
    for pair in keys_and_values:
        layer = pages(pair, dtype, block)
        for first in range(0, len(layer), step):
            part = layer[first : first + step]
            encoded = encode(CODEC_EXPONENT, name, [part], page_bytes=layer.shape[1])
            decoded = np.empty_like(part)
            decode_into(CODEC_EXPONENT, name, encoded, [decoded], page_bytes=layer.shape[1])
            assert np.array_equal(decoded, part)
            plain += part.nbytes
            stored += len(encoded)
    print(f"\n{name} in blocks of {block}: {plain / stored:.4f}")
    assert plain / stored >= least
