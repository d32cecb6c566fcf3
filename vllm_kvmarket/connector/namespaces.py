"""The namespace of the engine's model, and of each adapter on it."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from huggingface_hub import try_to_load_from_cache

from vllm_kvmarket.connector.model_settings import draft_model
from vllm_kvmarket.core.config import load as load_market_config
from vllm_kvmarket.core.errors import ConfigError
from vllm_kvmarket.core.model_identity import (
    NamespaceFacts,
    adapter_digest,
    namespace_digest,
    weights_digest,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.lora.request import LoRARequest

DIGEST_CACHE_FILE = "weights/digests.json"
# With these vLLM loads other files than safetensors, also where there are some.
OTHER_FORMATS = ("pt", "npcache", "gguf", "bitsandbytes")
NOT_PREPARED = (
    "kvmarket has not seen this engine's configuration: let vLLM's EngineArgs make it "
    "(vllm serve, LLM or AsyncEngineArgs), with the plugin loaded"
)


def model_folder(model: ModelConfig, download_dir: str | None) -> Path:
    """Where the model's files are on this machine: a folder, or a single .gguf file.

    Raises ConfigError when they are not there.
    """
    path = Path(model.model)
    if path.exists():
        return path
    found = try_to_load_from_cache(
        model.model, "config.json", cache_dir=download_dir, revision=model.revision
    )
    if not isinstance(found, str):
        raise ConfigError(
            f"cannot find the files of model {model.model!r} on this machine, which tell its "
            "KV from another model's; download it first, or give its folder as the model"
        )
    return Path(found).parent


def base_facts(vllm_config: VllmConfig, home: Path) -> NamespaceFacts:
    """Everything that decides what the model's KV bytes mean; reads the weights when they are
    new.
    """
    models = [vllm_config.model_config]
    if (draft := draft_model(vllm_config)) is not None:
        models.append(draft)
    load = vllm_config.load_config
    return NamespaceFacts(
        weights=tuple(
            weights_digest(
                model_folder(model, load.download_dir),
                home / DIGEST_CACHE_FILE,
                all_formats=load.load_format in OTHER_FORMATS,
            )
            for model in models
        ),
        settings=digested_settings(vllm_config),
    )


def digested_settings(vllm_config: VllmConfig) -> str:
    """The digest of the settings that was taken while vLLM created this configuration."""
    transfer = vllm_config.kv_transfer_config
    config = load_market_config(transfer.kv_connector_extra_config if transfer else None)
    if config.model_settings is None:
        raise ConfigError(NOT_PREPARED)
    return config.model_settings


class Namespaces:
    """Answers which namespace a request's KV belongs to; adapters are read beside the scheduler."""

    def __init__(self, vllm_config: VllmConfig, home: Path) -> None:
        self._facts = base_facts(vllm_config, home)
        self._cache_file = home / DIGEST_CACHE_FILE
        self.base = namespace_digest(self._facts)
        self._adapters: dict[str, Future[bytes]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="kvmarket-adapters")

    def of(self, adapter: LoRARequest | None) -> bytes | None:
        """The namespace, or None while an adapter's weights are being read (no reuse until
        then).
        """
        if adapter is None:
            return self.base
        if adapter.lora_path not in self._adapters:
            self._adapters[adapter.lora_path] = self._reader.submit(self._read, adapter.lora_path)
        future = self._adapters[adapter.lora_path]
        if not future.done() or future.exception() is not None:
            return None
        return future.result()

    def _read(self, path: str) -> bytes:
        adapter = adapter_digest(Path(path), self._cache_file)
        return namespace_digest(msgspec.structs.replace(self._facts, adapter=adapter))
