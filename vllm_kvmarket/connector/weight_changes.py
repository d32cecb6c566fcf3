"""Notices when weights or adapters change in a running engine, and tells the scheduler half.

vLLM's connector interface does not. `install` changes vLLM's class of engine cores, once a process;
each engine core tells its own connector. A call that is not known to leave the weights alone counts
as a change: then nothing is matched or published until all weights are loaded from files again.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from vllm.v1.engine.core import EngineCore

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from vllm_kvmarket.connector.scheduler import SchedulerHalf

# What API servers call of an engine core.
NAMESPACE = "kvmarket_namespace"
_INSTALLED = "_kvmarket_weight_changes"
# Calls of vLLM's workers that change neither weights nor adapters.
HARMLESS = frozenset(
    {
        *("check_health", "compute_weight_checksums", "get_model_inspection", "profile"),
        *("save_sharded_state", "save_tensorized_model", "synchronize_device"),
        *("update_max_model_len", "list_loras", "pin_lora", "get_kv_cache_spec"),
        *("get_compilation_match_table", "get_encoder_timing_stats", "get_supported_tasks"),
        *("reset_mm_cache", "reset_encoder_cache", "execute_dummy_batch"),
        *("init_weight_transfer_engine", "shutdown_weight_transfer_engine"),
    }
)
# A deeper sleep than this drops the weights.
_KEEPS_WEIGHTS = 1


def install() -> None:
    """Have vLLM's engine cores tell their connector of changes."""
    if getattr(EngineCore, _INSTALLED, False):
        return
    collective_rpc, sleep = EngineCore.collective_rpc, EngineCore.sleep
    add_lora, remove_lora = EngineCore.add_lora, EngineCore.remove_lora

    @functools.wraps(collective_rpc)
    def call_and_tell(
        self: EngineCore,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        half = half_of(self)
        if half is None or method in HARMLESS:
            return collective_rpc(self, method, timeout, args, kwargs)
        given = dict(zip(("weights_iterator", "weights_path"), args, strict=False)) | (kwargs or {})
        is_known = method == "reload_weights" and given.get("weights_iterator") is None
        half.weights_changed(str(method), adapters=not is_known)
        # None: the model's own folder.
        folder = given.get("weights_path")
        files = half.namespaces.files_of(folder) if is_known else ()
        found = collective_rpc(self, method, timeout, args, kwargs)
        if is_known:
            half.namespaces.weights_reloaded(folder, files)
        return found

    @functools.wraps(sleep)
    def sleep_and_tell(self: EngineCore, level: int = 1, *args: Any, **kwargs: Any) -> Any:
        if level > _KEEPS_WEIGHTS and (half := half_of(self)) is not None:
            half.weights_changed(f"sleep level {level}")
        return sleep(self, level, *args, **kwargs)

    @functools.wraps(add_lora)
    def add_and_tell(self: EngineCore, lora_request: LoRARequest) -> bool:
        if (half := half_of(self)) is None:
            return add_lora(self, lora_request)
        if lora_request.load_inplace:
            half.adapter_changed(lora_request.lora_int_id)
        # Its files are noted before they are loaded.
        half.namespaces.of(lora_request)
        try:
            return add_lora(self, lora_request)
        except BaseException:
            half.namespaces.adapter_failed(lora_request)
            raise

    @functools.wraps(remove_lora)
    def remove_and_tell(self: EngineCore, lora_id: int) -> bool:
        if (half := half_of(self)) is not None:
            half.adapter_changed(lora_id)
        return remove_lora(self, lora_id)

    EngineCore.collective_rpc, EngineCore.sleep = call_and_tell, sleep_and_tell
    EngineCore.add_lora, EngineCore.remove_lora = add_and_tell, remove_and_tell
    setattr(EngineCore, NAMESPACE, _namespace)
    setattr(EngineCore, _INSTALLED, True)


def _namespace(self: EngineCore) -> str | None:
    """The namespace whose KV this engine reuses now, in hexadecimal; None: it reuses nothing."""
    half = half_of(self)
    found = half.namespaces.of(None) if half is not None else None
    return found.hex() if found is not None else None


def half_of(core: EngineCore) -> SchedulerHalf | None:
    """The scheduler half of an engine core that is ready; None for other connectors."""
    scheduler = getattr(core, "scheduler", None)
    found: SchedulerHalf | None = getattr(
        getattr(scheduler, "connector", None), "scheduler_half", None
    )
    return found
