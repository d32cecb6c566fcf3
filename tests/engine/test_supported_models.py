"""Models that would give wrong tokens are refused at the start, in one line."""

from __future__ import annotations

import pytest
import torch
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

from tools.make_tiny_model import make_tiny_model
from vllm_kvmarket import ConfigError, Market
from vllm_kvmarket.connector.offline_engine import open_llm
from vllm_kvmarket.connector.supported_models import check_model

# Of a model with recurrent state.
REFUSED = {"max_model_len": 1024, "enable_prefix_caching": True}


@pytest.fixture(scope="module")
def mamba2(smollm, tmp_path_factory):
    return make_tiny_model(1, smollm, tmp_path_factory.mktemp("refused") / "tiny", "mamba2")


def test_a_model_with_wrong_tokens_is_refused_before_an_engine_starts(mamba2, tmp_path):
    """The offline API ends with our own message, of one line."""
    complaint = "--no-enable-prefix-caching"
    with Market.open(tmp_path) as market, pytest.raises(ConfigError, match=complaint) as refusal:
        open_llm(str(mamba2), market, **REFUSED)
    assert "\n" not in str(refusal.value)


def test_without_kvmarket_they_are_none_of_our_business(mamba2):
    """Plain vLLM takes them as before."""
    EngineArgs(model=str(mamba2), **REFUSED).create_engine_config()


@pytest.mark.parametrize(
    ("family", "caching", "complaint"),
    [
        ("mamba2", None, ""),
        ("mamba2", False, ""),
        ("mamba2", True, "--no-enable-prefix-caching"),
        ("granite4", None, "--no-enable-prefix-caching"),
        ("granite4", False, ""),
    ],
)
def test_models_with_recurrent_state_are_taken_where_they_were_tried(
    family, caching, complaint, smollm, tmp_path
):
    """Without prefix caching, with which vLLM keeps the state elsewhere."""
    model = make_tiny_model(1, smollm, tmp_path / "tiny", family)
    with Market.open(tmp_path / "home") as market:
        arguments = AsyncEngineArgs(
            model=str(model),
            max_model_len=1024,
            enable_prefix_caching=caching,
            kv_transfer_config=KVTransferConfig(**market.transfer_config()),
        )
        if not complaint:
            arguments.create_engine_config()
            return
        with pytest.raises(ConfigError, match=complaint) as refusal:
            arguments.create_engine_config()
    assert "\n" not in str(refusal.value)


@pytest.fixture
def amx(monkeypatch):
    """A CPU with AMX, whatever this one has."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)


WITHOUT_ROTARY = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}


@pytest.mark.parametrize(
    ("family", "options", "complaint"),
    [
        ("deepseek-v2", {}, ""),
        ("deepseek-v2", {"enable_prefix_caching": False}, "own prefix caching"),
        # Which cannot go on from a cached prefix.
        ("deepseek-v2", {"attention_backend": "CPU_MLA"}, "own prefix caching"),
        # Whose keys vLLM's operation leaves unrotated.
        ("deepseek-v2-plain", {}, "rotary_embedding"),
        ("deepseek-v2-plain", WITHOUT_ROTARY, ""),
        # vLLM compiles it, and rotates by code of its own.
        ("deepseek-v2-plain", {"enforce_eager": False}, ""),
        # Beside recurrent layers, for which prefix caching must be off.
        ("kimi-linear", {"enable_prefix_caching": False}, "own prefix caching"),
    ],
)
@pytest.mark.usefixtures("amx")
def test_latent_attention_is_taken_on_a_cpu_where_vllm_reuses_it(
    family, options, complaint, smollm, tmp_path
):
    """And refused with what to do, where there is something."""
    model = make_tiny_model(1, smollm, tmp_path / "tiny", family, "bfloat16")
    given = {"model": str(model), "max_model_len": 1024, "enforce_eager": True, **options}
    with Market.open(tmp_path / "home") as market:
        transfer = KVTransferConfig(**market.transfer_config())
        arguments = EngineArgs(**given, kv_transfer_config=transfer)
        if not complaint:
            arguments.create_engine_config()
            return
        with pytest.raises(ConfigError, match=complaint) as refusal:
            arguments.create_engine_config()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("family", "caching"), [("deepseek-v2-plain", True), ("kimi-linear", False)]
)
def test_latent_attention_is_taken_on_a_device(family, caching, smollm, tmp_path):
    """Of Kimi Linear kvmarket asks for no prefix caching, so it does not refuse it for that."""
    model = make_tiny_model(1, smollm, tmp_path / "tiny", family, "bfloat16")
    options = {"model": str(model), "max_model_len": 1024, "enable_prefix_caching": caching}
    config = EngineArgs(**options).create_engine_config()
    with pytest.raises(ConfigError, match=r"latent attention|turns prefix caching off"):
        check_model(config, caching_refused=not caching)
    config.device_config.device_type = "cuda"
    config.cache_config.enable_prefix_caching = caching
    check_model(config, caching_refused=not caching)
    config.cache_config.enable_prefix_caching = not caching
    complaint = "--no-enable-prefix-caching" if not caching else "multi-head latent attention"
    with pytest.raises(ConfigError, match=complaint):
        check_model(config, caching_refused=caching)


@pytest.mark.parametrize(
    ("transfer", "options", "complaint"),
    [
        ({"kv_role": "kv_producer"}, {}, "kv_both"),
        ({"kv_role": "kv_consumer"}, {}, "kv_both"),
        ({}, {"tensor_parallel_size": 4, "decode_context_parallel_size": 2}, "context parallelism"),
    ],
)
def test_engines_that_hold_a_part_of_the_tokens_are_refused(
    tiny, tmp_path, transfer, options, complaint
):
    """Of a request or of a block: in one line, before an engine starts."""
    with Market.open(tmp_path) as market:
        arguments = EngineArgs(
            model=str(tiny(1)),
            kv_transfer_config=KVTransferConfig(**market.transfer_config() | transfer),
            **options,
        )
        with pytest.raises(ConfigError, match=complaint) as refusal:
            arguments.create_engine_config()
    assert "\n" not in str(refusal.value)


def test_a_model_of_full_attention_is_taken_with_and_without_prefix_caching(tiny, tmp_path):
    """An operator may turn vLLM's prefix caching off; that alone is no reason to refuse."""
    with Market.open(tmp_path) as market:
        for caching in (None, True, False):
            EngineArgs(
                model=str(tiny(1)),
                enable_prefix_caching=caching,
                kv_transfer_config=KVTransferConfig(**market.transfer_config()),
            ).create_engine_config()
