"""From vLLM's own configurations to namespaces: other KV never shares one, equal KV always does."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import pytest
from vllm.config import (
    AttentionConfig,
    CacheConfig,
    KVTransferConfig,
    LoadConfig,
    ModelConfig,
    VllmConfig,
)
from vllm.config.mamba import MambaConfig
from vllm.engine.arg_utils import EngineArgs

from tests.support.model_folders import LLAMA4, PHI3, QWEN3, model_folder
from vllm_kvmarket import ConfigError
from vllm_kvmarket.connector import flags, model_settings
from vllm_kvmarket.connector.namespaces import base_facts
from vllm_kvmarket.core.model_identity import namespace_digest

flags.install()


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def config_of(model: Any, home: Any, **settings: Any) -> VllmConfig:
    """The configuration that vLLM makes for an engine on the market."""
    transfer = KVTransferConfig(
        kv_connector="kvmarket", kv_role="kv_both", kv_connector_extra_config={"home": str(home)}
    )
    given = {"dtype": "bfloat16", "max_model_len": 1024, "skip_tokenizer_init": True} | settings
    return EngineArgs(model=str(model), kv_transfer_config=transfer, **given).create_engine_config()


@pytest.fixture
def namespace(tmp_path):
    """The namespace of a model's folder under settings."""
    return lambda model, **settings: namespace_digest(
        base_facts(config_of(model, tmp_path / "home", **settings), tmp_path / "home")
    )


SAME_KV: dict[str, dict[str, Any]] = {
    "fewer requests at a time": {"max_num_seqs": 2},
    "smaller steps": {"max_num_batched_tokens": 1024},
    "a shorter context": {"max_model_len": 512},
    "another seed": {"seed": 5},
    "another name": {"served_model_name": "other"},
    "more ranks": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    "smaller blocks": {"block_size": 32},
    "no chunked prefill": {"enable_chunked_prefill": False, "max_num_batched_tokens": 4096},
    "adapters allowed": {"enable_lora": True},
    "no windows, of a model without": {"disable_sliding_window": True},
    "what is right already": {"hf_overrides": {"rms_norm_eps": 1e-6}, "kv_cache_dtype": "auto"},
    "labels": {"hf_overrides": {"id2label": {"0": "a"}}},
    "a function that changes nothing": {"hf_overrides": lambda config: config},
    "code that the model does not have": {"trust_remote_code": True},
    "drafts from the prompt": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2}
    },
}


def _with_eps(config):
    config.rms_norm_eps = 1e-5
    return config


OTHER_KV: dict[str, dict[str, Any]] = {
    "dtype": {"dtype": "float32"},
    "KV dtype": {"kv_cache_dtype": "fp8"},
    "layers of another KV dtype": {"kv_cache_dtype_skip_layers": ["0"]},
    "rope": {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}},
    "scaled rope": {
        "hf_overrides": {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 2.0,
                "original_max_position_embeddings": 2048,
            }
        }
    },
    "a norm": {"hf_overrides": {"rms_norm_eps": 1e-5}},
    "fewer layers": {"hf_overrides": {"num_hidden_layers": 1}},
    "a function that changes something": {"hf_overrides": _with_eps},
    "quantization": {"quantization": "fp8_per_tensor"},
    "Transformers' own code": {"model_impl": "transformers"},
}


@pytest.mark.parametrize("settings", SAME_KV.values(), ids=SAME_KV.keys())
def test_settings_that_do_not_change_kv_share_a_namespace(settings, namespace, tmp_path):
    """Another engine for the same model finds what was published."""
    model = model_folder(tmp_path / "m", QWEN3)
    assert namespace(model, **settings) == namespace(model)


@pytest.mark.parametrize("settings", OTHER_KV.values(), ids=OTHER_KV.keys())
def test_settings_that_change_kv_have_another_namespace(settings, namespace, tmp_path):
    """Nothing is shared between engines whose KV differs."""
    model = model_folder(tmp_path / "m", QWEN3)
    assert namespace(model, **settings) != namespace(model)


def test_each_part_of_a_quantization_counts(namespace, tmp_path):
    """Not its name alone: two engines may quantize other layers under one name."""
    model = model_folder(tmp_path / "m", QWEN3)
    parts = {"linear": "fp8_per_tensor"}
    whole = namespace(model, quantization_config=parts)
    partly = namespace(model, quantization_config=parts | {"ignore": ["lm_head"]})
    assert len({whole, partly, namespace(model)}) == 3
    assert namespace(model, quantization_config=parts) == whole


def test_a_context_counts_where_positions_depend_on_it(namespace, tmp_path):
    """LongRoPE has other keys beyond its original context, and only there."""
    model = model_folder(tmp_path / "m", PHI3)
    short, long, longer = (namespace(model, max_model_len=n) for n in (512, 2048, 4096))
    assert namespace(model, max_model_len=1024) == short != long == longer


def test_a_context_counts_where_attention_is_scaled_with_it(namespace, tmp_path):
    """Llama 4 scales attention in contexts of more than 32,768 tokens, unless it is told."""
    model = model_folder(tmp_path / "m", LLAMA4)
    short, long = (namespace(model, max_model_len=n) for n in (1024, 40_000))
    never = {"attn_temperature_tuning": False}
    told = namespace(model, max_model_len=40_000, override_generation_config=never)
    assert short == told != long


def test_the_config_that_vllm_uses_counts_not_the_file_beside_the_weights(namespace, tmp_path):
    """--hf-config-path and a changed config.json are the same change."""
    model = model_folder(tmp_path / "m", QWEN3)
    other = model_folder(tmp_path / "other", QWEN3, rms_norm_eps=1e-5)
    before = namespace(model)
    elsewhere = namespace(model, hf_config_path=str(other))
    assert elsewhere == namespace(other) != before


def test_a_copy_of_a_model_is_the_same_model(namespace, tmp_path):
    """Its folder, the order in its file, and who wrote the file do not count."""
    first = model_folder(tmp_path / "first", QWEN3)
    turned = dict(reversed(QWEN3.items())) | {"transformers_version": "4.0", "_name_or_path": "x"}
    assert namespace(first) == namespace(model_folder(tmp_path / "second", turned))
    assert namespace(first) != namespace(model_folder(tmp_path / "third", QWEN3, weights=2))


def test_weights_that_are_loaded_count_where_there_are_others(namespace, tmp_path):
    """With --load-format pt vLLM leaves safetensors aside."""
    model = model_folder(tmp_path / "m", QWEN3)
    (model / "pytorch_model.bin").write_bytes(b"1")
    safe, pickled = namespace(model), namespace(model, load_format="pt")
    (model / "pytorch_model.bin").write_bytes(b"2")
    assert namespace(model) == safe
    assert namespace(model, load_format="pt") != pickled


def test_code_that_comes_with_a_model_counts(namespace, tmp_path):
    """With --trust-remote-code: each file beside the config, and no other folder's."""
    model = model_folder(tmp_path / "m", QWEN3, auto_map={"AutoModelForCausalLM": "net.Net"})
    (model / "net.py").write_text("from .parts import x")
    (model / "parts.py").write_text("x = 1")
    first = namespace(model, trust_remote_code=True)
    assert namespace(model, trust_remote_code=True) == first != namespace(model)
    (model / "parts.py").write_text("x = 2")
    assert namespace(model, trust_remote_code=True) != first


def test_weights_of_equal_size_and_time_do_not_pass_for_each_other(namespace, tmp_path):
    """As when a layer of a container, or rsync -t, puts other weights in their place."""
    model = model_folder(tmp_path / "m", QWEN3)
    os.utime(model / "model.safetensors", ns=(5, 5))
    before = namespace(model)
    other = model_folder(tmp_path / "other", QWEN3, weights=2)
    os.utime(other / "model.safetensors", ns=(5, 5))
    (other / "model.safetensors").replace(model / "model.safetensors")
    assert namespace(model) != before


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"load_format": "dummy"}, "random weights"),
        ({"load_format": "tensorizer"}, "which weights --load-format tensorizer loads"),
    ],
)
def test_weights_of_unknown_origin_are_refused_before_the_start(settings, complaint, tmp_path):
    """In one line."""
    model = model_folder(tmp_path / "m", QWEN3)
    with pytest.raises(ConfigError, match=complaint) as refusal:
        config_of(model, tmp_path, **settings)
    assert "\n" not in str(refusal.value)


def test_positions_that_depend_on_the_batch_are_refused(tmp_path):
    """vLLM's Transformers backend runs the model's own LongRoPE, which looks at the batch."""
    with pytest.raises(ConfigError, match="computes longrope positions anew"):
        config_of(model_folder(tmp_path / "m", PHI3), tmp_path, model_impl="transformers")


def test_two_engines_from_one_object_have_their_own_settings(tmp_path):
    """A KVTransferConfig may be used for several engines before the first one starts."""
    transfer = KVTransferConfig(
        kv_connector="kvmarket", kv_role="kv_both", kv_connector_extra_config={}
    )
    models = [model_folder(tmp_path / str(eps), QWEN3, rms_norm_eps=eps) for eps in (1e-5, 1e-6)]
    made = [
        EngineArgs(
            model=str(model), kv_transfer_config=transfer, skip_tokenizer_init=True
        ).create_engine_config()
        for model in models
    ]
    digests = {
        config.kv_transfer_config.kv_connector_extra_config["model_settings"] for config in made
    }
    assert len(digests) == 2


# Every field of vLLM's configuration

# These are digested in a form of their own.
BY_NAME = {
    "ModelConfig": "model model_weights dtype hf_config hf_text_config hf_config_path "
    "trust_remote_code revision code_revision max_model_len disable_sliding_window hf_overrides "
    "model_impl generation_config override_generation_config config_format",
    "CacheConfig": "cache_dtype",
    "LoadConfig": "load_format download_dir",
    "VllmConfig": "model_config cache_config load_config attention_config mamba_config "
    "speculative_config additional_config kv_transfer_config",
}
# These decide how and when KV is computed, by whom, and what becomes of it; not its values.
NOT_DECIDING = {
    "ModelConfig": "runner convert tokenizer tokenizer_mode allowed_local_media_path "
    "allowed_media_domains seed is_submodel_config word_embeddings_untied_by_checkpoint "
    "tokenizer_revision spec_target_max_model_len allow_deprecated_quantization enforce_eager "
    "return_sampling_mask max_logprobs logprobs_mode use_fp64_gumbel enable_trace_replay "
    "disable_cascade_attn skip_tokenizer_init enable_prompt_embeds served_model_name hf_token "
    "enable_sleep_mode sleep_preserve_parameter_names sleep_mode_backend "
    "sleep_mode_offload_cudagraph enable_nccl_comm_suspend enable_cumem_allocator "
    "logits_processors io_processor_plugin renderer_num_workers pooler_config multimodal_config",
    "CacheConfig": "block_size user_specified_block_size kv_cache_layout prefix_match_unit "
    "gpu_memory_utilization is_attention_free num_gpu_blocks_override sliding_window "
    "enable_prefix_caching prefix_caching_hash_algo prefix_cache_retention_interval "
    "mamba_page_size_padded skip_page_size_padded mamba_block_size mamba_cache_mode "
    "enable_mamba_shared_prefix_checkpoint num_gpu_blocks num_cpu_blocks "
    "effective_attention_block_size kv_cache_size_tokens kv_cache_max_concurrency "
    "hash_block_size cache_hit_alignment_tokens kv_sharing_fast_prefill swa_bounded_replay "
    "kv_cache_memory_bytes kv_offloading_size kv_offloading_backend _block_size_resolved",
    "AttentionConfig": "backend backend_per_kind flash_attn_version "
    "flash_attn_max_num_splits_for_cuda_graph tokenspeed_mla_min_split_kv "
    "tq_max_kv_splits_for_cuda_graph use_trtllm_attention mla_prefill_backend "
    "sparse_mla_force_mqa sparse_mla_prefill_workspace_factor flex_attn_block_m flex_attn_block_n "
    "flex_attn_q_block_size flex_attn_kv_block_size minimax_m3_msa_decode_backend",
    "LoadConfig": "safetensors_load_strategy safetensors_prefetch_num_threads "
    "safetensors_prefetch_block_size model_loader_extra_config device ignore_patterns "
    "use_tqdm_on_load pt_load_map_location",
    "MambaConfig": "backend ssu_algorithm",
    # lora_config is part of an adapter's digest.
    "VllmConfig": "parallel_config scheduler_config device_config offload_config "
    "aux_output_config engram_config kernel_config lora_config watermark_config diffusion_config "
    "structured_outputs_config observability_config logging_config quant_config "
    "compilation_config profiler_config kv_events_config ec_transfer_config ec_manager_config "
    "reasoning_config instance_id optimization_level performance_mode weight_transfer_config "
    "shutdown_timeout",
}


@pytest.mark.parametrize(
    "kind", [ModelConfig, CacheConfig, AttentionConfig, LoadConfig, MambaConfig, VllmConfig]
)
def test_every_field_of_vllms_configuration_is_known(kind):
    """A new version of vLLM may add one that decides KV: then this test asks what it does."""
    parts = {"ModelConfig": "model", "CacheConfig": "cache", "AttentionConfig": "attention"}
    part = f"{parts.get(kind.__name__, 'mamba')}_config"
    deciding: set[str] = set()
    if kind is not VllmConfig and kind is not LoadConfig:
        deciding |= set(model_settings.DECIDING.get(part, ()))
        deciding |= set(model_settings.DECIDING_STATE.get(part, ()))
    named = set(BY_NAME.get(kind.__name__, "").split())
    others = set(NOT_DECIDING[kind.__name__].split())
    fields = {field.name for field in dataclasses.fields(kind)}
    assert fields == deciding | named | others
    assert len(fields) == len(deciding) + len(named) + len(others)


def test_a_part_of_a_config_is_spelled_without_its_origin_too():
    """Models with images keep the text's config inside their own."""
    part = {"model_type": "t", "_name_or_path": "x", "dtype": "float16", "hidden_size": 8}
    config = {"text_config": part, "quantization_config": {"dtype": "fp8"}}
    assert json.loads(model_settings.canonical_model_config(config)) == {
        "text_config": {"model_type": "t", "hidden_size": 8},
        "quantization_config": {"dtype": "fp8"},
    }
