"""The namespace of the engine's model, and of each adapter on it."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from huggingface_hub import try_to_load_from_cache
from vllm.logger import init_logger

from vllm_kvmarket.connector.model_settings import draft_model
from vllm_kvmarket.connector.supported_models import has_states
from vllm_kvmarket.core.config import load as load_market_config
from vllm_kvmarket.core.errors import ConfigError
from vllm_kvmarket.core.model_identity import (
    NamespaceFacts,
    adapter_digest,
    file_identity,
    namespace_digest,
    weight_files,
    weights_digest,
)

if TYPE_CHECKING:
    from vllm.config import LoRAConfig, ModelConfig, VllmConfig
    from vllm.lora.request import LoRARequest

    from vllm_kvmarket.core.config import MarketConfig

T = TypeVar("T")

logger = init_logger("vllm.kvmarket.namespaces")

DIGEST_CACHE_FILE = "weights/digests.json"
# An adapter whose files could not be read is tried again so much later.
RETRY_S = 10.0
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
        chunks_between_states=_chunks_between_states(vllm_config),
    )


def digested_settings(vllm_config: VllmConfig) -> str:
    """The digest of the settings that was taken while vLLM created this configuration."""
    if (settings := _market_config(vllm_config).model_settings) is None:
        raise ConfigError(NOT_PREPARED)
    return settings


def _chunks_between_states(vllm_config: VllmConfig) -> int | None:
    if not has_states(vllm_config):
        return None
    config = _market_config(vllm_config)
    return (config.state_every_tokens or 0) // config.chunk_tokens


def _market_config(vllm_config: VllmConfig) -> MarketConfig:
    transfer = vllm_config.kv_transfer_config
    return load_market_config(transfer.kv_connector_extra_config if transfer else None)


@dataclass(slots=True)
class _Adapter:
    """An adapter as vLLM's worker has it: its request, its files as they were then, their digest.

    `files` is None when the worker's copy may have been changed in memory.
    """

    request: LoRARequest
    files: tuple[str, ...] | None
    digest: Future[str]
    again_at_s: float = 0.0


class Namespaces:
    """Answers which namespace a request's KV belongs to; weights are read beside the scheduler.

    It answers None, so that nothing is reused or published, while that is not known: weights are
    being read, or were changed in the running engine. And until this engine has shown, by its
    self-test, that it reuses exactly. That holds for other weights and for adapters too.
    """

    def __init__(self, vllm_config: VllmConfig, home: Path) -> None:
        self._facts = base_facts(vllm_config, home)
        self.is_exact = False
        load = vllm_config.load_config
        self._folder = model_folder(vllm_config.model_config, load.download_dir)
        self._all_formats = load.load_format in OTHER_FORMATS
        self._adapter_settings = adapter_settings(vllm_config.lora_config)
        self._cache_file = home / DIGEST_CACHE_FILE
        # None: other weights than those of any file may be loaded.
        self._base: Future[NamespaceFacts] | None = Future()
        self._base.set_result(self._facts)
        self._adapters: dict[int, _Adapter] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="kvmarket-adapters")

    @property
    def base(self) -> bytes:
        """The namespace of the weights that the engine began with."""
        return namespace_digest(self._facts)

    def of(self, adapter: LoRARequest | None) -> bytes | None:
        """The namespace now; None: not known. Looks at the times of an adapter's files. Mutates."""
        # The worker reads the files of an adapter that it does not have at the next step.
        loaded = self._loaded(adapter) if adapter is not None else None
        facts = _result(self._base)
        if facts is None or not self.is_exact:
            return None
        if adapter is None or loaded is None:
            return namespace_digest(facts)
        known = loaded.request
        if (known.lora_path, known.is_3d_lora_weight) != (
            adapter.lora_path,
            adapter.is_3d_lora_weight,
        ) or loaded.files != _identities(Path(adapter.lora_path)):
            return None
        digest = self._digest_of(loaded)
        if digest is None:
            return None
        return namespace_digest(msgspec.structs.replace(facts, adapter=digest))

    def _loaded(self, adapter: LoRARequest) -> _Adapter:
        """The adapter as vLLM's worker has it: it keeps the first one of an id until told."""
        known = self._adapters.get(adapter.lora_int_id)
        if known is None:
            files = _identities(Path(adapter.lora_path))
            known = _Adapter(adapter, files, self._reader.submit(self._read, adapter))
            self._adapters[adapter.lora_int_id] = known
        return known

    def _digest_of(self, adapter: _Adapter) -> str | None:
        """Its digest; None while it is not known. Reading that failed begins again later."""
        if adapter.digest.done() and adapter.digest.exception() is not None:
            now_s = time.monotonic()
            if not adapter.again_at_s:
                adapter.again_at_s = now_s + RETRY_S
            elif now_s >= adapter.again_at_s:
                adapter.digest = self._reader.submit(self._read, adapter.request)
                adapter.again_at_s = 0.0
        return _result(adapter.digest)

    def _read(self, adapter: LoRARequest) -> str:
        settings = self._adapter_settings | {"experts in 3D": adapter.is_3d_lora_weight}
        try:
            return adapter_digest(Path(adapter.lora_path), self._cache_file, settings)
        except Exception as error:
            name = adapter.lora_name
            logger.warning("kvmarket: nothing is reused of adapter %s now: %s", name, error)
            raise

    def adapter_changed(self, adapter_id: int) -> None:
        """The worker loads this adapter anew, or has removed it: read it again. Mutates."""
        self._adapters.pop(adapter_id, None)

    def adapter_failed(self, adapter: LoRARequest) -> None:
        """The worker could not load this adapter. Mutates."""
        if adapter.load_inplace:
            # It still has the one before, of which nothing is known now.
            self._adapters[adapter.lora_int_id].files = None
        else:
            self.adapter_changed(adapter.lora_int_id)

    def weights_changed(self, *, adapters: bool) -> None:
        """The weights in memory may not be those of the files any more. Mutates."""
        self._base = None
        if adapters:
            for adapter in self._adapters.values():
                adapter.files = None

    def files_of(self, folder: str | None) -> tuple[str, ...]:
        """The weight files in a folder, or in the model's, as they are now."""
        return _identities(Path(folder) if folder else self._folder)

    def weights_reloaded(self, folder: str | None, files: tuple[str, ...]) -> None:
        """All weights were loaded from a folder, whose files were these before. Mutates."""
        self._base = self._reader.submit(
            self._digest_again, Path(folder) if folder else self._folder, files
        )

    def _digest_again(self, folder: Path, files: tuple[str, ...]) -> NamespaceFacts:
        try:
            digest = weights_digest(folder, self._cache_file, all_formats=self._all_formats)
            if not files or _identities(folder) != files:
                raise ConfigError(f"{folder} changed while its weights were loaded")
        except Exception as error:
            logger.warning("kvmarket: nothing is reused until weights are loaded again: %s", error)
            raise
        return msgspec.structs.replace(self._facts, weights=(digest, *self._facts.weights[1:]))


def adapter_settings(config: LoRAConfig | None) -> dict[str, Any]:
    """The settings of an engine that decide the KV of its adapters, apart from their files."""
    if config is None:
        return {}
    modules = config.target_modules
    return {
        "dtype": str(config.lora_dtype).removeprefix("torch."),
        "modules": None if modules is None else sorted(modules),
        "any layout of experts": config.enable_mixed_moe_lora_format,
        "shared experts": config.enable_moe_shared_loras,
    }


def _result(future: Future[T] | None) -> T | None:
    """What a future has found; None while it has not, and when it failed."""
    if future is None or not future.done() or future.exception() is not None:
        return None
    return future.result()


def _identities(folder: Path) -> tuple[str, ...]:
    """A model's or an adapter's files, as they are now; () where there are none."""
    files = [*weight_files(folder, all_formats=True), *folder.glob("adapter_config.json")]
    with contextlib.suppress(FileNotFoundError):
        return tuple(file_identity(file) for file in files)
    return ()
