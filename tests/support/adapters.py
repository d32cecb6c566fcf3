"""LoRA adapters of random weights for the tiny models of tools.make_tiny_model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK, HIDDEN, LAYERS = 8, 128, 3
OUT = {"q_proj": 128, "v_proj": 64}


def write_adapter(folder: Path, seed: int) -> Path:
    """Write the adapter of a seed over whatever is there."""
    folder.mkdir(parents=True, exist_ok=True)
    source = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name, size in OUT.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("lora_A", (RANK, HIDDEN)), ("lora_B", (size, RANK))):
                tensors[f"{prefix}.{part}.weight"] = torch.randn(shape, generator=source) / 4
    described = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": list(OUT)}
    (folder / "adapter_config.json").write_text(json.dumps(described | {"bias": "none"}))
    draft = folder / "draft"
    save_file(tensors, draft)
    draft.replace(folder / "adapter_model.safetensors")
    return folder
