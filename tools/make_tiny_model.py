"""Make a small, randomly initialised model: for tests in which the weights do not matter.

Usage: python -m tools.make_tiny_model SEED OUT [TOKENIZER_FOLDER] [FAMILY]

FAMILY is one of FAMILIES, "qwen3" when it is left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TOKENIZER = Path(__file__).parents[1] / ".cache" / "models" / "SmolLM2-135M-Instruct"

_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_ATTENTION = {"hidden_size": 128, "intermediate_size": 256, **_HEADS, "head_dim": 32}
_WINDOWS = ["sliding_attention", "full_attention"]
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
# Heads so wide that vLLM's blocks of attention, into which a state must fit, have 256 tokens.
_DELTA_NET = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 4, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip
# The CPU's kernel knows only the sizes of DeepSeek's own models. These have YaRN,
# others (Moonlight, GLM-4.7-Flash) do not. Wider weights leave more of the answers to
# bfloat16's rounding.
_LATENT = {
    "kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 32,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32, "beta_slow": 1,
        "original_max_position_embeddings": 1024, "mscale": 0.707, "mscale_all_dim": 0.707,
    },
    "initializer_range": 0.06,
}  # fmt: skip
_DEEPSEEK = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 4, "num_hidden_layers": 3, "q_lora_rank": None, **_LATENT,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 3,
}  # fmt: skip
_LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}

# Each family: its configuration's class in transformers, and what is not the class's default.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", {**_ATTENTION, "num_hidden_layers": 3}),
    "llama": ("LlamaConfig", {**_ATTENTION, "num_hidden_layers": 3}),
    "gpt2": ("GPT2Config", {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 4096}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {**_ATTENTION, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 64},
    ),
    "phi3-longrope": (
        "Phi3Config",
        {"hidden_size": 128, "intermediate_size": 256, **_HEADS, "num_hidden_layers": 3,
         "pad_token_id": 0, "original_max_position_embeddings": 512, "sliding_window": None,
         "rope_parameters": {**_LONG_ROPE, "rope_theta": 10000.0}},
    ),
    "mistral": ("MistralConfig", {**_ATTENTION, "num_hidden_layers": 3, "sliding_window": 200}),
    "gemma3": (
        "Gemma3TextConfig",
        {**_ATTENTION, "num_hidden_layers": 6, "sliding_window": 200,
         "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
    ),
    "gpt-oss": (
        "GptOssConfig",
        {**_ATTENTION, "num_hidden_layers": 4, "sliding_window": 128, "num_local_experts": 4,
         "num_experts_per_tok": 2, "layer_types": _WINDOWS * 2},
    ),
    "llama4": (
        "Llama4TextConfig",
        {**_ATTENTION, "num_hidden_layers": 4, "attention_chunk_size": 256, "num_local_experts": 2,
         "intermediate_size_mlp": 256, "interleave_moe_layer_step": 2},
    ),
    "deepseek-v2": ("DeepseekV2Config", _DEEPSEEK),
    "deepseek-v2-plain": (
        "DeepseekV2Config",
        {**_DEEPSEEK, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "mamba2": (
        "Mamba2Config",
        {"hidden_size": 128, "num_hidden_layers": 3, "state_size": 16, "num_heads": 8,
         "head_dim": 32, "n_groups": 1},
    ),
    "bamba": (
        "BambaConfig",
        {"hidden_size": 128, "intermediate_size": 256, **_HEADS, "num_hidden_layers": 4,
         "attn_layer_indices": [1, 3], **_MAMBA},
    ),
    "granite4": (
        "GraniteMoeHybridConfig",
        {"hidden_size": 128, "intermediate_size": 256, **_HEADS, "num_hidden_layers": 4,
         "layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0,
         "shared_intermediate_size": 256, "position_embedding_type": "nope", **_MAMBA},
    ),
    "falcon-h1": (
        "FalconH1Config",
        {**_ATTENTION, "num_hidden_layers": 3, "mamba_d_ssm": 256, **_MAMBA},
    ),
    "lfm2": (
        "Lfm2Config",
        {"hidden_size": 128, "intermediate_size": 256, **_HEADS, "num_hidden_layers": 4,
         "layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False,
         "conv_dim": 128, "block_dim": 128},
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        {**_DELTA_NET, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
         "shared_expert_intermediate_size": 64},
    ),
    "qwen3.5": ("Qwen3_5TextConfig", _DELTA_NET),
    "qwen-vl": (
        "Qwen2_5_VLConfig",
        {"text_config": {"hidden_size": 128, "intermediate_size": 256, **_HEADS,
                         "num_hidden_layers": 3,
                         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                             "mrope_section": [4, 6, 6]}},
         "vision_config": {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2,
                           "out_hidden_size": 128}},
    ),
    "deepseek-v32": (
        "DeepseekV32Config",
        {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
         "num_key_value_heads": 4, "num_hidden_layers": 3, "q_lora_rank": 32, **_LATENT,
         "n_routed_experts": 8,
         "num_experts_per_tok": 2, "first_k_dense_replace": 3, "moe_intermediate_size": 64,
         "index_topk": 256, "index_head_dim": 128, "index_n_heads": 2},
    ),
    "gemma2": (
        "Gemma2Config",
        {**_ATTENTION, "num_hidden_layers": 4, "sliding_window": 200, "query_pre_attn_scalar": 32,
         "layer_types": _WINDOWS * 2},
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {**_ATTENTION, "num_hidden_layers": 6, "sliding_window": 200, "global_head_dim": 64,
         "hidden_size_per_layer_input": 0,
         "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
    ),
    "olmo3": (
        "Olmo3Config",
        {**_ATTENTION, "num_hidden_layers": 4, "sliding_window": 200, "layer_types": _WINDOWS * 2},
    ),
    "cohere2": (
        "Cohere2Config",
        {**_ATTENTION, "num_hidden_layers": 4, "sliding_window": 200, "layer_types": _WINDOWS * 2},
    ),
    "exaone4": (
        "Exaone4Config",
        {**_ATTENTION, "num_hidden_layers": 4, "sliding_window": 200, "layer_types": _WINDOWS * 2},
    ),
    "nemotron-h": (
        "NemotronHConfig",
        {**_ATTENTION, "layers_block_type": ["mamba", "mlp", "attention", "mlp"],
         "mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1,
         "n_routed_experts": 4, "moe_intermediate_size": 64,
         "moe_shared_expert_intermediate_size": 64},
    ),
    "kimi-linear": (
        "KimiLinearConfig",
        {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
         "num_key_value_heads": 4, "num_hidden_layers": 4, "kv_lora_rank": 32,
         "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "num_local_experts": 4,
         "num_experts_per_tok": 2, "moe_intermediate_size": 64, "linear_head_dim": 128,
         "linear_num_heads": 2, "pad_token_id": 0},
    ),
    "glm4-moe": (
        "Glm4MoeConfig",
        {**_ATTENTION, "num_hidden_layers": 3, "n_routed_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 64},
    ),
    "minimax-m2": (
        "MiniMaxM2Config",
        {**_ATTENTION, "num_hidden_layers": 3, "num_local_experts": 4, "num_experts_per_tok": 2,
         "rotary_dim": 32, "scoring_func": "sigmoid",
         "use_routing_bias": True},
    ),
}  # fmt: skip
# Of models that see: vLLM makes these for text, too.
_PROCESSORS = {
    "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor"},
    "video_preprocessor_config.json": {"video_processor_type": "Qwen2VLVideoProcessor"},
}
# These architectures are written by another class than AutoModelForCausalLM finds for them.
DTYPES = {"qwen3-next": "bfloat16", "qwen3.5": "bfloat16", "gpt-oss": "bfloat16"}


def make_tiny_model(
    seed: int, tokenizer_folder: Path, out: Path, family: str = "qwen3", dtype: str = ""
) -> Path:
    """Write the model for `seed` into `out`, with the tokenizer of another folder; returns `out`.

    The same seed gives the same bytes; two seeds give two models of the same shape and name with
    different weights. Leaves torch's random state as it was.
    """
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    name, facts = FAMILIES[family]
    common = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.2,  # wide, so that greedy answers depend on the whole prompt
    }
    kind = dtype or DTYPES.get(family, "float32")
    loader = transformers.AutoModelForCausalLM
    if "text_config" in facts:
        loader = transformers.AutoModelForImageTextToText
        facts = facts | {"text_config": common | facts["text_config"]}
    config = getattr(transformers, name)(**common | facts, dtype=kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = loader.from_config(config)
    model.to(getattr(torch, kind)).save_pretrained(out)
    tokenizer.save_pretrained(out)
    if "vision_config" in facts:
        for file, settings in _PROCESSORS.items():
            (out / file).write_text(json.dumps(settings))
    return out


def make_adapter(seed: int, model: Path, out: Path, rank: int = 8) -> Path:
    """Write a random LoRA adapter of the model's query and value projections; returns `out`."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, weight in load_file(model / "model.safetensors").items():
            if name.endswith(("q_proj.weight", "v_proj.weight")):
                rows, columns = weight.shape
                stem = f"base_model.model.{name.removesuffix('.weight')}"
                weights[f"{stem}.lora_A.weight"] = torch.randn(rank, columns) * 0.2
                weights[f"{stem}.lora_B.weight"] = torch.randn(rows, rank) * 0.2
    out.mkdir()
    save_file(weights, out / "adapter_model.safetensors")
    facts = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none",
             "target_modules": ["q_proj", "v_proj"]}  # fmt: skip
    (out / "adapter_config.json").write_text(json.dumps(facts))
    return out


if __name__ == "__main__":
    if len(sys.argv) not in {3, 4, 5}:
        sys.exit(__doc__)
    seed_, out_, *rest_ = sys.argv[1:]
    folder_ = Path(rest_[0]) if rest_ else TOKENIZER
    make_tiny_model(int(seed_), folder_, Path(out_), *rest_[1:])
