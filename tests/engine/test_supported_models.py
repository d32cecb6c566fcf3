"""Models that would give wrong tokens are refused at the start, in one line."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, DeepseekV2Config, DeepseekV2ForCausalLM
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

from tools.make_tiny_model import make_tiny_model
from vllm_kvmarket import ConfigError, Market
from vllm_kvmarket.connector.offline_engine import open_llm

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "dtype": "float32"}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}

MODELS = {
    "MLA": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config(
            **SMALL,
            **HEADS,
            q_lora_rank=None,
            kv_lora_rank=32,
            qk_nope_head_dim=32,
            qk_rope_head_dim=32,
            v_head_dim=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            first_k_dense_replace=2,
        ),
        "multi-head latent attention",
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def refused_model(request, smollm, tmp_path_factory):
    """A model's folder, tiny and random, and the words that it is refused with."""
    model_class, config, complaint = MODELS[request.param]
    folder = tmp_path_factory.mktemp("refused")
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    config.vocab_size = len(tokenizer)
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, complaint


def test_a_model_with_wrong_tokens_is_refused_before_an_engine_starts(refused_model, tmp_path):
    """The offline API ends with our own message, of one line."""
    folder, complaint = refused_model
    with Market.open(tmp_path) as market, pytest.raises(ConfigError, match=complaint) as refusal:
        open_llm(str(folder), market, max_model_len=1024)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("caching", [None, True, False])
def test_a_server_refuses_it_too(refused_model, tmp_path, caching):
    """No flag for prefix caching makes the tokens right."""
    folder, complaint = refused_model
    with Market.open(tmp_path) as market:
        arguments = AsyncEngineArgs(
            model=str(folder),
            max_model_len=1024,
            enable_prefix_caching=caching,
            kv_transfer_config=KVTransferConfig(**market.transfer_config()),
        )
        with pytest.raises(ConfigError, match=complaint):
            arguments.create_engine_config()


def test_without_kvmarket_they_are_none_of_our_business(refused_model):
    """Plain vLLM takes them as before."""
    folder, _ = refused_model
    EngineArgs(model=str(folder), max_model_len=1024).create_engine_config()


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
        arguments = EngineArgs(
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
