"""Folders of models that vLLM can make a configuration for: a config.json, and bytes as weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]} | SIZES
PHI3 = {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "original_max_position_embeddings": 1024,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16},
} | SIZES
# It scales attention with the position from 32,768 tokens of context on.
LLAMA4 = (
    {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]}
    | SIZES
    | {"max_position_embeddings": 65_536, "attention_chunk_size": None, "intermediate_size_mlp": 64}
)


def model_folder(folder: Path, config: dict[str, Any], *, weights: int = 1, **more: Any) -> Path:
    """Write a model's files; `weights` is the seed of its bytes, `more` changes its config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | more))
    values = np.random.default_rng(weights).standard_normal(1000).astype(np.float32)
    (folder / "model.safetensors").write_bytes(values.tobytes())
    return folder
