"""The self-test: an engine shows that it reuses exactly before it serves, or reuses nothing.

Before an engine serves for the first time on its model's namespace, it computes a random prompt
that is longer than the model's windows, stores it, reuses it whole and to its middle, and compares
greedy tokens and log-probabilities with those of a full prefill. vLLM's connector interface has no
such moment, so `install` changes vLLM's class of engine cores, once a process.
"""

from __future__ import annotations

import functools
import inspect
import math
import platform as host
import random
import secrets
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from blake3 import blake3
from vllm import SamplingParams
from vllm.config import ParallelConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import DPEngineCoreProc, EngineCore, EngineCoreProc
from vllm.v1.sample import sampler
from vllm.v1.sample.ops import logprobs
from vllm.version import __version__ as vllm_version

from vllm_kvmarket.connector.cache_groups import GroupKind
from vllm_kvmarket.connector.probe_requests import ProbeRequest, match_of
from vllm_kvmarket.connector.state_steps import end_steps_at_states, steps_end_at
from vllm_kvmarket.connector.weight_changes import half_of
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.verdicts import VERDICTS_FOLDER, Verdict, read_verdict, write_verdict

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.request import Request

    from vllm_kvmarket.catalogue import Match
    from vllm_kvmarket.connector.scheduler import SchedulerHalf

logger = init_logger("vllm.kvmarket.self_test")

_INSTALLED = "_kvmarket_self_test"
_TESTED = "_kvmarket_self_tested"
# An answer's first token is computed with the end of its prompt, the second as all that follow.
ANSWER_TOKENS, QUESTION_TOKENS, BEST = 2, 5, 5
# How far two log-probabilities of one token may be apart where sums have another order. A reuse
# that is farther from full prefill, or chooses another token, must be as near to vLLM's own prefill
# in two pieces and choose its tokens, and may be so many times as far from full prefill.
TOLERANCE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}
TIMES_TOLERANCE = 5.0
DEADLINE_S = 120.0
# Of these a document can be reused to any of its tokens.
_ENDS_ANYWHERE = (GroupKind.FULL, GroupKind.WINDOW, GroupKind.LOCAL)
# Folders of engines that were killed meanwhile.
_LEFT_OVER_S = 3600.0


@dataclass(slots=True)
class Answer:
    """Greedy tokens, and the best tokens of each step with their log-probabilities."""

    tokens: list[int] = field(default_factory=list)
    best: list[dict[int, float]] = field(default_factory=list)
    request: ProbeRequest | None = None

    def add(self, output: EngineCoreOutput) -> None:
        """Take in what one step brought. Mutates."""
        self.tokens += output.new_token_ids
        if output.new_logprobs is not None:
            ids, values = output.new_logprobs.logprob_token_ids, output.new_logprobs.logprobs
            self.best += [
                dict(zip(row.tolist(), found.tolist(), strict=True))
                for row, found in zip(ids, values, strict=True)
            ]

    def distance(self, other: Answer) -> float:
        """The largest difference of log-probabilities, up to the first step where the answers
        part; of that step the price of the other's choice. Infinite where it is not among the best.
        """
        worst = 0.0
        steps = zip(self.tokens, other.tokens, self.best, other.best, strict=True)
        for mine, theirs, best, others in steps:
            apart = [abs(best[mine] - others.get(mine, -math.inf))]
            apart.append(abs(others[theirs] - best.get(theirs, -math.inf)))
            worst = max(worst, *(math.inf if math.isnan(each) else each for each in apart))
            if mine != theirs:
                return max(worst, best[mine] - best.get(theirs, -math.inf))
        return worst


def install() -> None:
    """Have vLLM's engine cores test themselves before they serve."""
    if getattr(EngineCore, _INSTALLED, False):
        return
    for kind in (EngineCoreProc, DPEngineCoreProc):
        kind.run_busy_loop = _after_the_test(kind.run_busy_loop)
    # An engine without a process of its own has no loop.
    EngineCore.add_request = _after_the_test(EngineCore.add_request)
    setattr(EngineCore, _INSTALLED, True)


def _after_the_test(call: Any) -> Any:
    @functools.wraps(call)
    def test_and_call(self: EngineCore, *args: Any, **kwargs: Any) -> Any:
        half = half_of(self)
        if half is not None and not hasattr(self, _TESTED):
            setattr(self, _TESTED, True)
            end_steps_at_states(self.scheduler, half)
            decide(self, half)
        return call(self, *args, **kwargs)

    return test_and_call


def decide(core: EngineCore, half: SchedulerHalf) -> None:
    """Find or make the verdict on this engine, and let it reuse if that is good. Mutates."""
    market, engine = half.engine.market, engine_of(core, half)
    home, always = market.home, market.config.self_test == "always"
    known = None if always else read_verdict(home, engine)
    # In data parallelism every rank computes in every step, so all test or none does.
    if not _any_rank(core, known is None):
        assert known is not None
        _conclude(core, half, known)
        return
    half.metrics.are_held = True
    began_s, model = time.monotonic(), core.vllm_config.model_config.model
    try:
        reason = SelfTest(core, half).run()
        seconds = time.monotonic() - began_s
        known = Verdict(str(model), engine, reason, seconds, time.time())
        write_verdict(home, known)
    except Exception as error:
        logger.exception("kvmarket: the self-test could not be run")
        seconds = time.monotonic() - began_s
        known = Verdict(str(model), engine, f"it could not be run: {error}", seconds, time.time())
    _conclude(core, half, known)


def _conclude(core: EngineCore, half: SchedulerHalf, verdict: Verdict) -> None:
    others_fail = _any_rank(core, not verdict.passed)
    half.self_tested(passed=not others_fail)
    if verdict.passed and not others_fail:
        logger.info("kvmarket: the self-test passed (%.2f s): reuse is exact", verdict.seconds)
        return
    logger.error(
        "kvmarket: THE SELF-TEST FAILED, so nothing is reused, sold or published: %s. Test again "
        "with `kvmarket env --test-again`, then start the engine anew",
        verdict.reason or "another rank's did",
    )


def engine_of(core: EngineCore, half: SchedulerHalf) -> dict[str, str]:
    """All that a verdict depends on."""
    config, facts = core.vllm_config, half.engine.facts
    parallel, attention = config.parallel_config, config.attention_config
    return {
        "namespace": half.namespaces.base.hex(),
        "vllm": vllm_version.partition("+")[0],
        "kvmarket": metadata.version("vllm-kvmarket"),
        "device": f"{current_platform.device_name} {host.machine()} {_device_name()}",
        "attention": str(attention.backend),
        # A compiled model computes by other operations than one that is not.
        "operations": ",".join(sorted(config.compilation_config.custom_ops)),
        "blocks": ",".join(f"{g.kind.value}:{g.block_tokens}" for g in facts.groups),
        "chunk_tokens": str(facts.chunk_tokens),
        "codec": half.engine.market.config.codec,
        "ranks": f"{parallel.tensor_parallel_size}x{parallel.pipeline_parallel_size}",
    }


def _device_name() -> str:
    try:
        return str(current_platform.get_device_name())
    except (NotImplementedError, RuntimeError):
        return ""


def _any_rank(core: EngineCore, is_so: bool) -> bool:
    """Whether it is so on any data-parallel rank that must compute in step with this one."""
    group = getattr(core, "dp_group", None)
    return is_so if group is None else bool(ParallelConfig.has_unfinished_dp(group, is_so))


def count_ranks(_worker: object, *, compiled: bool) -> None:
    """Have a worker count the ranks of log-probabilities by compiled code, as vLLM does, or not:
    on a CPU compiling it takes seconds, and the self-test does not look at ranks.
    """
    count = logprobs.batched_count_greater_than
    sampler.batched_count_greater_than = count if compiled else inspect.unwrap(count)


class SelfTest:
    """One run, on an engine core that serves nobody meanwhile."""

    def __init__(self, core: EngineCore, half: SchedulerHalf) -> None:
        self._core = core
        self._half = half
        self._name = f"kvmarket-self-test-{secrets.token_hex(8)}"
        self._names: list[str] = []
        config = core.vllm_config
        chooser = random.Random(self._name)  # noqa: S311  # any tokens will do
        vocabulary = config.model_config.get_vocab_size()
        # Special tokens are the first and the last ones.
        lowest, highest = (256, vocabulary // 2) if vocabulary > 1024 else (0, vocabulary)
        self._tokens = [chooser.randrange(lowest, highest) for _ in range(self._length())]
        self._questions = [
            [chooser.randrange(lowest, highest) for _ in range(QUESTION_TOKENS)] for _ in range(2)
        ]
        # A namespace's last bytes may say what kind it is.
        base = half.namespaces.base
        namespace = blake3(base + self._name.encode()).digest()[:-8] + base[-8:]
        self._document = DocumentChunks.of(namespace, self._tokens, half.engine.facts.chunk_tokens)
        self._deadline_s = time.monotonic() + DEADLINE_S

    def _length(self) -> int:
        """Tokens that leave every window behind, twice, and end inside a block and a chunk."""
        config, facts = self._core.vllm_config, self._half.engine.facts
        reach = max(group.reach for group in facts.groups)
        wanted = 2 * reach + min(facts.chunk_tokens, 512) + facts.block_tokens // 2 + 3
        blocks = int(config.cache_config.num_gpu_blocks or 0) // (2 * len(facts.groups))
        room = [each.block_tokens * blocks for each in facts.groups if each.kind in _ENDS_ANYWHERE]
        most = min([config.model_config.max_model_len, *room])
        return max(1, min(wanted, most - QUESTION_TOKENS - ANSWER_TOKENS - 1))

    def run(self) -> str:
        """Why reuse is not exact here; "" where it is. The paged cache is empty afterwards."""
        folder = self._half.engine.market.home / VERDICTS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("engine-*"):
            if time.time() - old.stat().st_mtime > _LEFT_OVER_S:
                shutil.rmtree(old, ignore_errors=True)
        self._half.scratch = tempfile.mkdtemp(prefix="engine-", dir=folder)
        call = self._core.model_executor.collective_rpc
        call(count_ranks, kwargs={"compiled": False})
        try:
            return self._run()
        finally:
            call(count_ranks, kwargs={"compiled": True})
            self._core.abort_requests(self._names)
            shutil.rmtree(self._half.scratch, ignore_errors=True)
            self._half.scratch = ""
            self._half.probes.clear()
            self._core.reset_prefix_cache()

    def _run(self) -> str:
        whole = [*self._tokens, *self._questions[0]]
        is_plain = self._half.engine.facts.is_plain
        full = stored = self._ask(whole, salt="full", stores=is_plain)
        if not is_plain:
            # The pages in the end are not those in the middle.
            stored = self._ask(self._tokens, "stored", stores=True)
        assert stored.request is not None
        if stored.request.failure:
            raise OSError(stored.request.failure)
        match, grain = match_of(self._document), self._half.engine.facts.grain
        match = match.until(match.token_count - match.token_count % grain or match.token_count)
        reused = self._ask(whole, "whole", match=match)
        reason = self._compare(full, reused, whole, "whole")
        half = match.last_end(len(self._tokens) // 2)
        half -= half % grain
        if _any_rank(self._core, bool(reason)) or half == 0:
            return reason
        part = [*self._tokens[:half], *self._questions[1]]
        # Of a plain model vLLM's cache has whole blocks of it, from the full prefill.
        full = self._ask(part, "full" if is_plain else "half")
        reused = self._ask(part, "part", match=match.until(half))
        return self._compare(full, reused, part, "to its middle")

    def _compare(self, full: Answer, reused: Answer, prompt: Sequence[int], what: str) -> str:
        """Why these two answers to a prompt are not the same; "" when they are."""
        assert reused.request is not None
        reuse = reused.request.reuse
        assert reuse.match is not None
        wanted = reuse.match.token_count
        dtype = str(self._core.vllm_config.model_config.dtype).removeprefix("torch.")
        least = TOLERANCE.get(dtype, 0.1)
        apart = reused.distance(full)
        is_same = apart <= least and reused.tokens == full.tokens and reuse.reused == wanted
        # In data parallelism all ranks ask, or none does.
        if not _any_rank(self._core, not is_same):
            return ""
        own = self._ask(prompt, f"cut {what}", cut=wanted)
        if reuse.reused < wanted:
            return (
                f"of a document of {wanted} tokens, reused {what}, only {reuse.reused} could be "
                "loaded"
            )
        is_vllms = reused.distance(own) <= least and reused.tokens == own.tokens
        if is_same or (is_vllms and apart <= TIMES_TOLERANCE * least):
            return ""
        return (
            f"a document reused {what} gives other answers than computed: tokens "
            f"{reused.tokens} instead of {full.tokens}, log-probabilities up to {apart:.3g} apart "
            f"(vLLM's own prefill in two pieces: {own.tokens}, {own.distance(full):.3g})"
        )

    def _ask(
        self,
        prompt: Sequence[int],
        salt: str,
        *,
        stores: bool = False,
        match: Match | None = None,
        cut: int = 0,
    ) -> Answer:
        """Run one greedy request to its end, and until it has stored what it stores; if asked for,
        with a step that ends after `cut` tokens.
        """
        core, name = self._core, f"{self._name}-{len(self._names)}"
        self._names.append(name)
        answer = Answer()

        def probe(request: Request) -> ProbeRequest:
            document = self._document if stores else None
            answer.request = ProbeRequest(self._half.engine.facts, request, document, match)
            return answer.request

        self._half.probes[name] = probe
        # A recurrent state must not leave the document's end.
        tokens = 1 if len(prompt) == len(self._tokens) else ANSWER_TOKENS
        request, _ = core.preprocess_add_request(
            EngineCoreRequest(
                request_id=name,
                prompt_token_ids=list(prompt),
                mm_features=None,
                sampling_params=SamplingParams(
                    temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=BEST
                ),
                pooling_params=None,
                arrival_time=time.time(),
                lora_request=None,
                cache_salt=f"{self._name}-{salt}",
                data_parallel_rank=None,
            )
        )
        EngineCore.add_request(core, request)
        with steps_end_at(core.scheduler, cut) if cut else nullcontext():
            while _any_rank(core, name in core.scheduler.requests or bool(core.batch_queue)):
                for output in self._step():
                    if output.request_id == name:
                        answer.add(output)
                if time.monotonic() > self._deadline_s:
                    raise TimeoutError(f"it took longer than {DEADLINE_S:.0f} s")
        if not len(answer.tokens) == len(answer.best) == tokens:
            raise RuntimeError("the engine gave no answer")
        return answer

    def _step(self) -> list[EngineCoreOutput]:
        """One step of vLLM's own loop."""
        core = self._core
        found, executed = core.step_fn()
        core.post_step(executed)
        if not executed:
            if getattr(core, "dp_group", None) is not None:
                # Another rank may have computed in this step.
                core.execute_dummy_batch()
            else:
                time.sleep(0.0005)
        return [output for each in (found or {}).values() for output in each.outputs]
