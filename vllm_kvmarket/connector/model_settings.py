"""The settings of an engine that decide the values of its KV cache, apart from the weights.

They are digested while vLLM creates its configuration: models change their configuration while
they are loaded, and the engine's processes must agree on one digest. Settings that have their
default value are left out, so that a new version of vLLM may add some. A unit test lists every
field of vLLM's configuration as deciding or as not deciding.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3
from huggingface_hub import try_to_load_from_cache
from vllm.transformers_utils.config import iter_rope_parameters

from vllm_kvmarket.core.errors import ConfigError
from vllm_kvmarket.core.model_identity import canonical_model_config, settings_digest

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

# Fields of vLLM's configuration objects that change KV, where they differ from their default.
DECIDING: dict[str, tuple[str, ...]] = {
    "model_config": ("quantization", "quantization_config", "model_class_overrides"),
    "cache_config": ("kv_cache_dtype_skip_layers",),
    "attention_config": (
        "disable_flashinfer_q_quantization",
        "hisparse_config",
        "indexer_kv_dtype",
        "indexer_sparse_logits",
        "use_non_causal",
        "use_prefill_query_quantization",
    ),
}
# The same for models with recurrent state only: a platform sets some of them for every model.
DECIDING_STATE: dict[str, tuple[str, ...]] = {
    "cache_config": (
        "mamba_cache_dtype",
        "mamba_ssm_cache_dtype",
        "replayssm_buffer_len",
        "use_kda_recoverssm",
        "use_replayssm",
    ),
    "mamba_config": ("enable_stochastic_rounding", "stochastic_rounding_philox_rounds"),
}
# Formats whose weights are the files in the model's folder; of the others nothing is known.
FOLDER_FORMATS = (
    *("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "pt", "npcache", "gguf"),
    *("mistral", "bitsandbytes", "sharded_state", "runai_streamer", "runai_streamer_sharded"),
)
# These scale attention by the context's length from here on, unless told otherwise.
_SCALES_WITH_CONTEXT = {"llama4": 32_768, "llama4_text": 32_768}


def digest_of_settings(vllm_config: VllmConfig) -> str:
    """Digest the settings. Raises ConfigError, in one line, for those with which KV is not sold."""
    return settings_digest(settings_of(vllm_config))


def settings_of(vllm_config: VllmConfig) -> dict[str, Any]:
    """Everything but weights that decides KV; reads the code that comes with the model.

    Raises ConfigError for settings with which KV has no known origin.
    """
    refuse_unknown_weights(str(vllm_config.load_config.load_format))
    model = vllm_config.model_config
    settings = _model_settings(model) | {
        "kv_dtype": _kv_dtype(model, str(vllm_config.cache_config.cache_dtype)),
        "set": dict(_changed(vllm_config, DECIDING)),
    }
    if model.is_hybrid or model.has_inner_state:
        settings["state"] = dict(_changed(vllm_config, DECIDING_STATE))
    # For platforms that are added to vLLM.
    if vllm_config.additional_config:
        settings["additional"] = _plain(vllm_config.additional_config)
    draft = draft_model(vllm_config)
    if draft is not None:
        settings["draft"] = _model_settings(draft)
    return settings


def refuse_unknown_weights(load_format: str) -> None:
    """Raise ConfigError for weights that are not the files in the model's folder."""
    if load_format == "dummy":
        raise ConfigError(
            "--load-format dummy makes random weights, whose KV cache serves nobody; "
            "start it without kvmarket"
        )
    if load_format not in FOLDER_FORMATS:
        raise ConfigError(
            f"kvmarket cannot tell which weights --load-format {load_format} loads; "
            f"use one of {', '.join(FOLDER_FORMATS)}"
        )


def draft_model(vllm_config: VllmConfig) -> ModelConfig | None:
    """The model that drafts tokens, which has KV of its own; None where there is no other model."""
    speculative = vllm_config.speculative_config
    draft = speculative.draft_model_config if speculative else None
    return None if draft is vllm_config.model_config else draft


def _model_settings(model: ModelConfig) -> dict[str, Any]:
    """What decides a model's KV: its configuration after all overrides, and code."""
    described = {"model": canonical_model_config(model.hf_config.to_dict())}
    if model.hf_text_config is not model.hf_config:
        described["text"] = canonical_model_config(model.hf_text_config.to_dict())
    return described | {
        "architecture": model.architecture,
        "dtype": _dtype(model),
        "positions": _positions(model),
        "windows_off": bool(
            model.disable_sliding_window and getattr(model.hf_text_config, "sliding_window", None)
        ),
        "attention_scaling": _attention_scaling(model),
        "code": _remote_code(model),
        "class": _foreign_class(model),
    }


def _dtype(model: ModelConfig) -> str:
    return str(model.dtype).removeprefix("torch.")


def _kv_dtype(model: ModelConfig, cache_dtype: str) -> str:
    """The type of KV: of the model unless set; a checkpoint's own choice is in its config."""
    aliases = {"auto": _dtype(model), "fp8": "fp8_e4m3"}
    return aliases.get(cache_dtype, cache_dtype)


def _changed(config: Any, deciding: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, Any]]:
    """The fields that do not have their default value."""
    for part, names in deciding.items():
        values = getattr(config, part)
        defaults = {field.name: field for field in dataclasses.fields(values)}
        for name in names:
            value, default = getattr(values, name), _default(defaults[name])
            if value != default:
                yield f"{part}.{name}", _plain(value)


def _default(field: dataclasses.Field[Any]) -> Any:
    # pydantic keeps a default and a factory in an object of its own.
    declared = getattr(field.default, "default", field.default)
    factory = getattr(field.default, "default_factory", None) or field.default_factory
    return factory() if callable(factory) else declared


def _plain(value: Any) -> Any:
    """A configuration object as JSON has it, spelled as a model's config."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return canonical_model_config(value) if isinstance(value, dict) else value


def _positions(model: ModelConfig) -> list[bool]:
    """For each LongRoPE of the model, whether it uses its long factors: vLLM decides that once, by
    the longest context that it serves.

    Raises ConfigError where positions would depend on the other requests of a batch.
    """
    found = []
    for rope in iter_rope_parameters(model.hf_text_config):
        kind = rope.get("rope_type", "default")
        if kind in ("longrope", "dynamic") and model.using_transformers_backend():
            raise ConfigError(
                f"vLLM's Transformers backend computes {kind} positions anew for each batch, so "
                "this model's KV cache cannot be reused; start it without kvmarket"
            )
        if kind == "longrope":
            found.append(model.max_model_len > rope["original_max_position_embeddings"])
    return found


def _attention_scaling(model: ModelConfig) -> Any:
    """Whether attention is scaled with the position, for models that decide it by the context."""
    limit = _SCALES_WITH_CONTEXT.get(model.hf_text_config.model_type)
    if limit is None:
        return None
    generation = model.try_get_generation_config() | model.override_generation_config
    return generation.get("attn_temperature_tuning", model.max_model_len > limit)


def _remote_code(model: ModelConfig) -> str | None:
    """Digest the Python files that come with the model, where they may be run."""
    references = getattr(model.hf_config, "auto_map", None)
    if not model.trust_remote_code or not references:
        return None
    folders = set()
    for value in references.values():
        for name in value if isinstance(value, list | tuple) else [value]:
            if name:
                folders.add(_code_folder(model, name))
    files = {file for folder in folders for file in folder.glob("*.py")}
    return _digest_sources(sorted(files, key=lambda file: (file.name, file)))


def _code_folder(model: ModelConfig, reference: str) -> Path:
    """Where the code of `module.Class`, or of `repository--module.Class`, is on this machine."""
    repository, _, name = reference.rpartition("--")
    origin = Path(model.hf_config_path or model.model)
    if not repository and origin.exists():
        return origin if origin.is_dir() else origin.parent
    repository = repository or str(origin)
    own = model.revision if repository == model.model else None
    found = try_to_load_from_cache(
        repository, f"{name.partition('.')[0]}.py", revision=model.code_revision or own
    )
    if not isinstance(found, str):
        raise ConfigError(
            f"cannot find the code of {repository}, which --trust-remote-code runs, on this "
            "machine; give the model as a folder"
        )
    return Path(found).parent


def _foreign_class(model: ModelConfig) -> str | None:
    """The model's class where it does not come with vLLM, and its file's digest."""
    registered: Any = model.registry.models.get(model.architecture)
    loaded = getattr(registered, "model_cls", None)
    module = loaded.__module__ if loaded else getattr(registered, "module_name", "vllm.")
    if module.startswith("vllm."):
        return None
    found = importlib.util.find_spec(module)
    origin = Path(found.origin) if found and found.origin else None
    return f"{module} {_digest_sources([origin]) if origin and origin.is_file() else ''}"


def _digest_sources(files: Sequence[Path]) -> str:
    digest = blake3()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
