"""The families of models, and one family's steps: benchmarks/models.py runs each in a new process.

`publish` answers every question by full prefill and by vLLM's own prefix-cache hit, and publishes
the documents. `reuse` answers them in a new process from the store. `plain` asks vLLM without
kvmarket one question twice: whether the family runs here at all. Each leaves STEP.json and STEP.log
in the folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from benchmarks.paper_sections import texts
from benchmarks.paper_sections.traces import Trace, trace
from tests.support.engines import running
from tools.make_tiny_model import TOKENIZER, make_adapter, make_tiny_model
from vllm_kvmarket import Market
from vllm_kvmarket.connector.state_steps import steps_end_at
from vllm_kvmarket.market.timed_requests import ask, empty_prefix_cache

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec

MODELS = TOKENIZER.parent


@dataclass(frozen=True)
class Family:
    """What is measured: `tiny` is a family of make_tiny_model, `real` a folder of .cache/models.

    `engine` are further arguments of vllm.LLM, `begins` is what its tokenizer puts in front of a
    text.
    """

    name: str
    title: str
    tiny: str = ""
    real: str = ""
    dtype: str = "float32"
    adapter: bool = False
    begins: str = ""
    engine: dict[str, Any] = field(default_factory=dict)

    @property
    def is_recurrent(self) -> bool:
        """Whether vLLM's own prefix cache is off, because there is a recurrent state."""
        return self.engine.get("enable_prefix_caching") is False

    def make(self, out: Path) -> Path:
        """The model's folder; random weights are written to `out` when they are not there."""
        if self.real:
            return MODELS / self.real
        if not (out / "config.json").exists():
            make_tiny_model(1, TOKENIZER, out, self.tiny)
            if self.adapter:
                make_adapter(2, out, out / "adapter")
        return out


# Models with recurrent state: vLLM's own prefix cache keeps it in another place.
WITHOUT_CACHING: dict[str, Any] = {"enable_prefix_caching": False}
FP8_KV: dict[str, Any] = {"kv_cache_dtype": "fp8"}
LORA: dict[str, Any] = {"enable_lora": True}
TEXT: dict[str, Any] = {"language_model_only": True}
# vLLM's CPU operation rotates other parts of some models than it should.
NATIVE_ROTATION: dict[str, Any] = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
TWO_RANKS: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "distributed_executor_backend": "mp",
}

FAMILIES = (
    Family("smollm2", "Llama", real="SmolLM2-135M-Instruct"),
    Family("llama", "Llama", "llama"),
    Family("qwen3", "Qwen3", "qwen3"),
    Family("qwen3-bf16", "Qwen3", "qwen3", dtype="bfloat16"),
    Family("qwen3-fp16", "Qwen3", "qwen3", dtype="float16"),
    Family("qwen3-fp8-kv", "Qwen3, KV in fp8", "qwen3", dtype="bfloat16", engine=FP8_KV),
    Family("qwen3-lora", "Qwen3 with a LoRA adapter", "qwen3", adapter=True, engine=LORA),
    Family("qwen3-tp2", "Qwen3, two ranks", "qwen3", engine=TWO_RANKS),
    Family("gpt2", "GPT-2 (absolute positions)", "gpt2"),
    Family("qwen3-moe", "Qwen3 MoE", "qwen3-moe"),
    Family("phi3-longrope", "Phi-3 with LongRoPE", "phi3-longrope"),
    Family("glm4-moe", "GLM-4.5", "glm4-moe"),
    Family("minimax-m2", "MiniMax-M2", "minimax-m2"),
    Family("qwen-vl", "Qwen2.5-VL, text only", "qwen-vl", engine=TEXT),
    Family("mistral", "Mistral v0.1", "mistral"),
    Family("mistral-bf16", "Mistral v0.1", "mistral", dtype="bfloat16"),
    Family("mistral-fp16", "Mistral v0.1", "mistral", dtype="float16"),
    Family("gemma3-270m", "Gemma 3", real="gemma-3-270m", begins="<bos>"),
    Family("gemma3", "Gemma 3", "gemma3"),
    Family("gemma3-bf16", "Gemma 3", "gemma3", dtype="bfloat16"),
    Family("gemma3-fp8-kv", "Gemma 3, KV in fp8", "gemma3", dtype="bfloat16", engine=FP8_KV),
    Family("gemma2", "Gemma 2", "gemma2"),
    Family("gemma4", "Gemma 4", "gemma4"),
    Family("olmo3", "OLMo 3", "olmo3"),
    Family("cohere2", "Command R7B, Command A", "cohere2"),
    Family("exaone4", "EXAONE 4", "exaone4"),
    Family("gpt-oss", "gpt-oss", "gpt-oss"),
    Family("gpt-oss-bf16", "gpt-oss", "gpt-oss", dtype="bfloat16"),
    Family("llama4", "Llama 4", "llama4"),
    Family("llama4-bf16", "Llama 4", "llama4", dtype="bfloat16"),
    Family("deepseek-v2", "DeepSeek-V2", "deepseek-v2"),
    Family("deepseek-v2-bf16", "DeepSeek-V2", "deepseek-v2", dtype="bfloat16"),
    Family("deepseek-v2-plain", "DeepSeek-V2 without YaRN", "deepseek-v2-plain", dtype="bfloat16",
           engine=NATIVE_ROTATION),
    Family("deepseek-v32", "DeepSeek-V3.2", "deepseek-v32", dtype="bfloat16"),
    Family("mamba2", "Mamba2", "mamba2", engine=WITHOUT_CACHING),
    Family("bamba", "Bamba", "bamba"),
    Family("granite4", "Granite 4", "granite4", engine=WITHOUT_CACHING),
    Family("falcon-h1", "Falcon-H1", "falcon-h1", engine=WITHOUT_CACHING),
    Family("lfm2", "LFM2", "lfm2", engine=WITHOUT_CACHING),
    Family("lfm2-native", "LFM2, positions as PyTorch computes them", "lfm2",
           engine=WITHOUT_CACHING | NATIVE_ROTATION),
    Family("nemotron-h", "Nemotron-H", "nemotron-h", engine=WITHOUT_CACHING),
    Family("qwen3-next", "Qwen3-Next", "qwen3-next", dtype="bfloat16", engine=WITHOUT_CACHING),
    Family("qwen3.5", "Qwen3.5", "qwen3.5", dtype="bfloat16", engine=WITHOUT_CACHING),
    Family("kimi-linear", "Kimi Linear", "kimi-linear", dtype="bfloat16", engine=WITHOUT_CACHING),
)  # fmt: skip

# Of every kind of cache, the families whose answers take the least time.
SHORT = (
    "qwen3", "qwen3-bf16", "qwen3-fp16", "qwen3-fp8-kv", "qwen3-lora", "gpt2", "phi3-longrope",
    "mistral", "mistral-bf16", "gemma3", "gemma3-bf16", "gpt-oss", "gpt-oss-bf16", "llama4",
    "mamba2", "granite4", "falcon-h1",
)  # fmt: skip

BUYER = "buyer"
# Pieces of 256 tokens: a window has left most of a document before its prefill ends.
ENGINE = {"max_model_len": 2048, "max_num_batched_tokens": 256, "max_num_seqs": 4}
# Some end where a block of 128 ends: there vLLM's hit computes what a reuse computes.
LENGTHS = {
    "prose": (384, 301, 512, 333, 450, 384, 319, 512, 365, 470),
    "code": (384, 389, 512, 411, 300, 384, 347, 512, 500, 431),
}
QUICK = {"prose": (384, 301), "code": (333, 512)}


@dataclass(slots=True)
class Published:
    """Of each document all questions. `hit` is empty where vLLM's prefix caching is off, but of a
    model with recurrent state vLLM's own prefill in two pieces.
    """

    groups: list[str]
    document_tokens: list[int] = field(default_factory=list)
    full: list[Trace] = field(default_factory=list)
    hit: list[Trace] = field(default_factory=list)
    stored_bytes: int = 0


@dataclass(slots=True)
class Reused:
    """The same answers, and each document's seconds to a first token by prefill and by reuse."""

    answers: list[Trace] = field(default_factory=list)
    prefill_s: list[float] = field(default_factory=list)
    reuse_s: list[float] = field(default_factory=list)


def in_words(groups: Sequence[KVCacheGroupSpec]) -> list[str]:
    """KV cache groups in words, for example `2 x windows of 200, blocks of 128`."""
    words = {
        "FullAttentionSpec": "full attention",
        "SlidingWindowSpec": "windows of {0.sliding_window}",
        "ChunkedLocalAttentionSpec": "chunks of {0.attention_chunk_size}",
        "MLAAttentionSpec": "latent attention",
        "MambaSpec": "recurrent state ({0.mamba_type.name})",
    }
    told = []
    for group in groups:
        spec = group.kv_cache_spec
        layers = list(getattr(spec, "kv_cache_specs", {"": spec}).values())
        names = [type(each).__name__ for each in layers]
        kinds = [words.get(n, n).format(each) for n, each in zip(names, layers, strict=True)]
        kind = " or ".join(dict.fromkeys(kinds))
        told.append(f"{len(group.layer_names)} x {kind}, blocks of {spec.block_size}")
    return told


def use_adapter(llm: Any, model: Path) -> None:
    """From now on every request is for the adapter in the model's folder."""
    from vllm.lora.request import LoRARequest

    adapter = LoRARequest("adapter", 1, str(model / "adapter"))
    llm.generate = partial(llm.generate, lora_request=adapter)
    engine = llm.llm_engine
    engine.add_request = partial(engine.add_request, lora_request=adapter)
    # An engine reads an adapter's files, which name its KV, when the first request for it comes.
    llm.generate({"prompt_token_ids": [1, 2, 3]}, use_tqdm=False)


def worker_groups(worker: Any) -> list[str]:
    """The groups of a running engine; called inside its worker."""
    return in_words(worker.model_runner.kv_cache_config.kv_cache_groups)


def in_two_pieces(llm: Any, prompt: list[int], cut: int) -> Trace:
    """An answer by full prefill whose steps end after `cut` tokens, in an engine of this process.

    Behind `cut` it computes what a hit of so many tokens computes.
    """
    with steps_end_at(llm.llm_engine.engine_core.engine_core.scheduler, cut):
        return replace(trace(llm, prompt), cached_tokens=cut)


class Step:
    """A market, an engine on it, and what is asked."""

    def __init__(self, family: Family, folder: Path, market: Market, quick: bool) -> None:
        self.family, self.market = family, market
        self.model = family.make(folder / "model")
        self.lengths = QUICK if quick else LENGTHS

    @contextmanager
    def engine(self, **more: Any) -> Iterator[Any]:
        """The family's engine; with an adapter, every request is for that."""
        settings = {**ENGINE, "dtype": self.family.dtype, **self.family.engine, **more}
        with running(self.model, self.market, **settings) as llm:
            if self.family.adapter:
                use_adapter(llm, self.model)
            yield llm

    def prompts(self, llm: Any) -> list[tuple[list[int], list[list[int]]]]:
        """Each document, and its prompts: the document and a question."""
        tokenizer = llm.get_tokenizer()
        questions = texts.questions(tokenizer)
        head = tokenizer.encode(self.family.begins, add_special_tokens=False)
        documents = [
            [*head, *each.tokens][: len(each.tokens)]
            for each in texts.documents(tokenizer, 13, self.lengths)
        ]
        return [(tokens, [tokens + question for question in questions]) for tokens in documents]

    def publish(self) -> Published:
        """Full prefill, vLLM's own hit, and publishing."""
        self.market.create_account(BUYER)
        self.market.deposit(BUYER, 10**15, "deposit")
        with self.engine() as llm:
            found = Published([])
            caching = llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
            for document, prompts in self.prompts(llm):
                for prompt in prompts:
                    empty_prefix_cache(llm)
                    found.full.append(trace(llm, prompt))
                if self.family.is_recurrent:
                    found.hit.extend(in_two_pieces(llm, each, len(document)) for each in prompts)
                elif caching:
                    found.hit.extend(trace(llm, prompt) for prompt in prompts)
                listing = self.market.publish(llm, token_ids=document, title="document")
                found.document_tokens.append(len(document))
                found.stored_bytes += listing.stored_bytes
            # Last: for all that kvmarket knows, what a worker is asked may change its weights.
            found.groups = groups(llm)
        return found

    def reuse(self) -> Reused:
        """Every answer from the store, with vLLM's prefix cache emptied; then the times in turn."""
        found, params = Reused(), self.market.params(BUYER)
        with self.engine() as llm:
            for document, prompts in self.prompts(llm):
                for prompt in prompts:
                    empty_prefix_cache(llm)
                    found.answers.append(trace(llm, prompt, params))
                for seconds, wish in ((found.prefill_s, None), (found.reuse_s, params)):
                    empty_prefix_cache(llm)
                    answer = ask(llm, [*document, prompts[0][-1]], wish, max_tokens=1, rest_s=0)
                    seconds.append(answer.ttft_s)
        return found

    def plain(self) -> Published:
        """VLLM without kvmarket, on one question: full prefill, and its hit."""
        with self.engine(kv_transfer_config=None) as llm:
            _, prompts = self.prompts(llm)[0]
            return Published(groups(llm), [], [trace(llm, prompts[0]), trace(llm, prompts[0])])

    def specifications(self) -> Published:
        """The groups that vLLM builds for a model that it does not run here: layers of no memory.

        Raises kvmarket's ConfigError where it refuses one of them.
        """
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.distributed import init_distributed_environment, initialize_model_parallel
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.model_loader.utils import initialize_model
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
        from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
        from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
        from vllm.v1.kv_cache_interface import KVCacheConfig

        from vllm_kvmarket.connector.cache_groups import groups_of

        platform = type(current_platform)
        backend_of = platform.get_attn_backend_cls

        def backend_or_any(*args: Any, **kwargs: Any) -> str:
            try:
                return backend_of(*args, **kwargs)
            except NotImplementedError:
                return AttentionBackendEnum.CPU_MLA.get_path()

        platform.get_attn_backend_cls = staticmethod(backend_or_any)
        config = EngineArgs(
            str(self.model), dtype=self.family.dtype, enforce_eager=True, **self.family.engine
        ).create_engine_config()
        with set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"file://{self.model}/ranks", 0, "gloo")
            initialize_model_parallel()
            with torch.device("meta"):
                initialize_model(config)
            platform.update_block_size_for_backend(config)
        layers = config.compilation_config.static_forward_context
        having = {n: each for n, each in layers.items() if hasattr(each, "get_kv_cache_spec")}
        found = {name: layer.get_kv_cache_spec(config) for name, layer in having.items()}
        found = {name: spec for name, spec in found.items() if spec}
        resolve_kv_cache_layout(config, [["LBHNC", "BLHNC"]], found.values())
        made = get_kv_cache_groups(config, found)
        print(f"GROUPS {in_words(made)}")
        groups_of(KVCacheConfig(1, [], made), 256)
        return Published(in_words(made))


def groups(llm: Any) -> list[str]:
    """The engine's KV cache groups in words."""
    told, *_ = llm.collective_rpc(worker_groups)
    return list(told)


def run(step: str, name: str, folder: Path, quick: bool) -> None:
    """Run one step of one family; the target of a new process."""
    with (folder / f"{step}.log").open("wb") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    # The worker is asked for its groups by a function of ours.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    family = next(each for each in FAMILIES if each.name == name)
    if family.is_recurrent and step == "publish":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with Market.open(folder / "home", {"host_cache_bytes": 0}) as market:
        found = getattr(Step(family, folder, market, quick), step)()
    (folder / f"{step}.json").write_bytes(msgspec.json.encode(found))
