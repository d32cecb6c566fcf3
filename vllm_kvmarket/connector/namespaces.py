"""The namespace of the engine's model, and of each adapter on it."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_kvmarket.core.errors import ConfigError
from vllm_kvmarket.core.model_identity import (
    NamespaceFacts,
    adapter_digest,
    canonical_model_config,
    namespace_digest,
    weights_digest,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest

DIGEST_CACHE_FILE = "weights.json"


def model_folder(vllm_config: VllmConfig) -> Path:
    """Where the model's files are on this machine: a folder, or a single .gguf file.

    Raises ConfigError when they are not there.
    """
    model = vllm_config.model_config.model
    path = Path(model)
    if path.exists():
        return path
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(
        model,
        "config.json",
        cache_dir=vllm_config.load_config.download_dir,
        revision=vllm_config.model_config.revision,
    )
    if not isinstance(found, str):
        raise ConfigError(
            f"cannot find the files of model {model!r} on this machine, which tell its "
            "KV from another model's; download it first, or give its folder as the model"
        )
    return Path(found).parent


def base_facts(vllm_config: VllmConfig, home: Path) -> NamespaceFacts:
    """Everything that decides what the model's KV bytes mean; reads the weights when they are
    new.
    """
    model = vllm_config.model_config
    folder = model_folder(vllm_config)
    config_file = (folder if folder.is_dir() else folder.parent) / "config.json"
    described = (
        json.loads(config_file.read_text()) if config_file.exists() else model.hf_config.to_dict()
    )
    # Overrides given on the command line (rope scaling, say) change KV as much as the file does.
    overrides = (
        model.hf_overrides if isinstance(model.hf_overrides, dict) else repr(model.hf_overrides)
    )
    described["kvmarket_overrides"] = overrides or None
    cache_dtype = vllm_config.cache_config.cache_dtype
    dtype = str(model.dtype).removeprefix("torch.")
    return NamespaceFacts(
        weights=weights_digest(folder, home / DIGEST_CACHE_FILE),
        model_config=canonical_model_config(described),
        dtype=dtype,
        kv_dtype=dtype if cache_dtype == "auto" else str(cache_dtype),
        quantization=model.quantization,
        adapter=None,
    )


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
        facts = NamespaceFacts(
            weights=self._facts.weights,
            model_config=self._facts.model_config,
            dtype=self._facts.dtype,
            kv_dtype=self._facts.kv_dtype,
            quantization=self._facts.quantization,
            adapter=adapter_digest(Path(path), self._cache_file),
        )
        return namespace_digest(facts)
