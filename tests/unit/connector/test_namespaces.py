"""Namespaces while an engine runs: adapters and weights that change under it."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from vllm.config import LoRAConfig
from vllm.lora.request import LoRARequest
from vllm.v1.engine.core import EngineCore

from tests.support.model_folders import QWEN3, model_folder
from vllm_kvmarket.connector import namespaces as module
from vllm_kvmarket.connector import weight_changes
from vllm_kvmarket.connector.namespaces import Namespaces

weight_changes.install()


@pytest.fixture
def model(tmp_path):
    return model_folder(tmp_path / "m", QWEN3)


@pytest.fixture
def namespaces(model, tmp_path, monkeypatch):
    """The namespaces of an engine with this model, under these settings of adapters."""
    monkeypatch.setattr(module, "digested_settings", lambda _: "1" * 64)

    def namespaces(**adapters):
        config = SimpleNamespace(
            model_config=SimpleNamespace(
                model=str(model),
                revision=None,
                is_hybrid=False,
                is_attention_free=False,
                has_inner_state=False,
            ),
            load_config=SimpleNamespace(load_format="auto", download_dir=None),
            speculative_config=None,
            lora_config=LoRAConfig(**{"lora_dtype": "float16"} | adapters),
        )
        made = Namespaces(config, tmp_path / "home")
        made.is_exact = True
        return made

    return namespaces


@pytest.fixture
def known(namespaces):
    return namespaces()


def adapter(folder, weights, **more):
    """A request for an adapter, whose files have these weights from now on."""
    return LoRARequest("a", 1, str(model_folder(folder / "adapter", {}, weights=weights)), **more)


def soon(known, lora=None):
    """The namespace once it is known."""
    deadline = time.monotonic() + 10
    while (found := known.of(lora)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return found


def test_an_adapter_that_changes_on_the_disk_is_not_reused_until_it_is_loaded_anew(known, tmp_path):
    """The worker may have the old one, or may have read the new one."""
    lora = adapter(tmp_path, 1)
    first = soon(known, lora)
    adapter(tmp_path, 2)
    assert known.of(lora) is None
    known.adapter_changed(1)
    assert soon(known, lora) not in (first, known.of(None))


def test_an_id_with_another_folder_is_not_reused(known, tmp_path):
    """The worker keeps the first adapter of an id."""
    soon(known, adapter(tmp_path, 1))
    assert known.of(adapter(tmp_path / "other", 2)) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_dtype": "bfloat16"},
        {"target_modules": ["q_proj"]},
        {"enable_mixed_moe_lora_format": True},
        {"enable_moe_shared_loras": True},
    ],
)
def test_settings_that_decide_what_an_adapter_does_belong_to_it(namespaces, tmp_path, settings):
    """Its KV is other KV then; that of the model alone is not."""
    lora = adapter(tmp_path, 1)
    one, same, other = (
        namespaces(),
        namespaces(max_lora_rank=64, max_loras=2),
        namespaces(**settings),
    )
    assert soon(one, lora) == soon(same, lora) != soon(other, lora)
    assert one.of(None) == other.of(None)


def test_the_layout_that_a_request_says_its_adapter_has_belongs_to_it(namespaces, tmp_path):
    """And one engine takes the first that it hears of."""
    flat, known = adapter(tmp_path, 1), namespaces()
    layered = adapter(tmp_path, 1, is_3d_lora_weight=True)
    assert soon(known, flat) != soon(namespaces(), layered)
    assert known.of(layered) is None


def test_an_adapter_that_could_not_be_read_is_read_again_later(known, tmp_path, monkeypatch):
    """A disk's error passes; what the worker has read stays what it was."""
    lora, read = adapter(tmp_path, 1), module.adapter_digest
    monkeypatch.setattr(module, "RETRY_S", 0.05)
    failed = []

    def fail(*_):
        failed.append(1)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "adapter_digest", fail)
    deadline = time.monotonic() + 10
    while len(failed) < 3:
        assert known.of(lora) is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    monkeypatch.setattr(module, "adapter_digest", read)
    assert soon(known, lora)


def test_an_adapter_that_comes_while_weights_are_read_is_the_one_that_the_worker_has(
    known, core, tmp_path
):
    """Its files may be replaced before the weights are known again."""
    core.collective_rpc("update_weights")
    lora = adapter(tmp_path, 1)
    assert known.of(lora) is None
    adapter(tmp_path, 2)
    core.collective_rpc("reload_weights")
    soon(known)
    known._reader.submit(lambda: None).result()
    assert known.of(lora) is None


def test_nothing_has_a_namespace_before_reuse_was_shown_to_be_exact(known, tmp_path):
    """Neither the model nor an adapter."""
    lora = adapter(tmp_path, 1)
    assert soon(known, lora)
    known.is_exact = False
    assert known.of(None) is None
    assert known.of(lora) is None


class Half:
    """A scheduler half that only knows what was said to it."""

    def __init__(self, namespaces) -> None:
        self.namespaces = namespaces

    def weights_changed(self, _why: str, *, adapters: bool = True) -> None:
        self.namespaces.weights_changed(adapters=adapters)

    def adapter_changed(self, adapter_id: int) -> None:
        self.namespaces.adapter_changed(adapter_id)


@pytest.fixture
def core(known):
    """vLLM's engine core, with an executor that does nothing."""
    made = EngineCore.__new__(EngineCore)
    executor = SimpleNamespace(
        collective_rpc=lambda *_: [None],
        is_sleeping=False,
        sleep=lambda _: None,
        add_lora=lambda _: True,
        remove_lora=lambda _: True,
    )
    made.model_executor = executor
    made.scheduler = SimpleNamespace(connector=SimpleNamespace(scheduler_half=Half(known)))
    made.pause_scheduler = lambda **_: None
    return made


@pytest.mark.parametrize(
    "method", ["update_weights", "start_weight_update", "reset_weights", print]
)
def test_a_call_that_may_change_weights_ends_the_namespace(core, known, method):
    """Also one that nobody knows, and a function: weights in memory have no name."""
    core.collective_rpc(method)
    time.sleep(0.01)
    assert known.of(None) is None


def test_harmless_calls_and_a_light_sleep_end_nothing(core, known):
    """They happen in the life of every engine."""
    before = known.of(None)
    core.collective_rpc("check_health")
    core.sleep(1)
    assert known.of(None) == before is not None
    core.sleep(2)
    assert known.of(None) is None


def test_weights_that_are_loaded_from_files_have_a_namespace_again(core, known, model, tmp_path):
    """The same as before for the same content, another one for another."""
    before = known.of(None)
    core.collective_rpc("reload_weights")
    assert soon(known) == before
    other = model_folder(tmp_path / "other", QWEN3, weights=2)
    core.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
    assert soon(known) != before
    core.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(())})
    time.sleep(0.01)
    assert known.of(None) is None


def test_an_adapter_in_memory_is_not_known_after_a_call_that_may_change_it(core, known, tmp_path):
    """Until it is loaded anew; loading the model's weights anew leaves it as it is."""
    lora = adapter(tmp_path, 1)
    first = soon(known, lora)
    core.collective_rpc("reload_weights")
    assert soon(known, lora) == first
    core.collective_rpc(print)
    core.collective_rpc("reload_weights")
    assert soon(known)
    assert known.of(lora) is None
    core.add_lora(adapter(tmp_path, 1, load_inplace=True))
    assert soon(known, lora) == first


def test_weights_that_change_while_they_are_loaded_have_no_namespace(core, known, model):
    """Some of the old files and some of the new ones may be in memory."""
    core.model_executor.collective_rpc = lambda *_: model_folder(model, QWEN3, weights=3)
    core.collective_rpc("reload_weights")
    known._reader.submit(lambda: None).result()
    assert known.of(None) is None


def test_an_adapter_that_is_loaded_in_place_is_read_again(core, known, tmp_path):
    """Through the engine core's own call."""
    first = soon(known, adapter(tmp_path, 1))
    lora = adapter(tmp_path, 2, load_inplace=True)
    core.add_lora(lora)
    assert soon(known, lora) != first


def test_an_adapter_that_the_worker_refuses_is_not_taken_for_the_one_that_it_has(
    core, known, tmp_path
):
    """Loading in place failed: the files are new, and the worker has the old ones."""
    lora = adapter(tmp_path, 1)
    soon(known, lora)

    def refuse(_):
        raise ValueError("rank 64 is greater than max_lora_rank")

    core.model_executor.add_lora = refuse
    with pytest.raises(ValueError, match="rank"):
        core.add_lora(adapter(tmp_path, 2, load_inplace=True))
    known._reader.submit(lambda: None).result()
    assert known.of(lora) is None


def test_an_adapter_that_was_not_there_can_come_later(core, known, tmp_path):
    """A first attempt to load it failed, so that the worker has none."""
    early = LoRARequest("a", 1, str(tmp_path / "adapter"))
    core.model_executor.add_lora = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        core.add_lora(early)
    core.model_executor.add_lora = lambda _: True
    core.add_lora(adapter(tmp_path, 1))
    assert soon(known, early)
