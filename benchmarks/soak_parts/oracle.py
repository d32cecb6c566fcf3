"""Full prefill of the same prompts, against which answers are compared token by token.

Either a second engine, started without kvmarket and without vLLM's prefix cache, or the soaked
server itself, asked by nobody in particular with `"reuse": "never"`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import httpx

from benchmarks.soak_parts.plan import CONTEXT, MODEL_NAME, Asked, Plan, Story

# Sums of the same float32 numbers in another order: where the two best tokens' log-probabilities
# are nearer than this, which one is best is decided by rounding.
TIE = 1e-3
TOP = 20
Pair = tuple[list[int], int]


class Oracle(Protocol):
    """Who knows the right answers."""

    def answers(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """Greedy tokens of each (prompt, count)."""

    def log_probabilities(self, prompt: list[int]) -> dict[int, float]:
        """The next token's, of the most probable ones."""


class ServerOracle:
    """The server, computing everything."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._http = httpx.Client(timeout=300)

    def answers(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """See Oracle. Raises RuntimeError when something was reused."""
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(self._answer, pairs))

    def _answer(self, pair: Pair) -> list[int]:
        answer = self._ask(pair[0], pair[1])
        if (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens"):
            raise RuntimeError("the oracle's prompt was not computed in full")
        return list(answer["choices"][0]["token_ids"])

    def log_probabilities(self, prompt: list[int]) -> dict[int, float]:
        """See Oracle."""
        answer = self._ask(prompt, 1, logprobs=5, return_tokens_as_token_ids=True)
        (top,) = answer["choices"][0]["logprobs"]["top_logprobs"]
        return {int(name.removeprefix("token_id:")): value for name, value in top.items()}

    def _ask(self, prompt: list[int], count: int, **more: Any) -> dict[str, Any]:
        body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": count, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True, "kvmarket": {"reuse": "never"}}
        response = self._http.post(f"{self._base}/v1/completions", json={**body, **more})
        response.raise_for_status()
        return dict(response.json())


class EngineOracle:
    """A separate engine, without kvmarket and without a prefix cache."""

    def __init__(self, plan: Plan) -> None:
        import os

        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        self._llm = LLM(
            str(plan.model),
            dtype="float32",
            max_model_len=CONTEXT,
            enforce_eager=True,
            enable_prefix_caching=False,
            max_num_seqs=8,
        )

    def answers(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """See Oracle."""
        return [list(output.outputs[0].token_ids) for output in self._run(pairs)]

    def log_probabilities(self, prompt: list[int]) -> dict[int, float]:
        """See Oracle."""
        (output,) = self._run([(prompt, 1)], logprobs=TOP)
        (top,) = output.outputs[0].logprobs
        return {token: entry.logprob for token, entry in top.items()}

    def _run(self, pairs: Sequence[Pair], **more: Any) -> list[Any]:
        from vllm import SamplingParams

        sampling = [
            SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, **more)
            for _, count in pairs
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in pairs]
        return list(self._llm.generate(prompts, sampling, use_tqdm=False))

    def close(self) -> None:
        """End the engine's processes."""
        from vllm_kvmarket.connector.offline_engine import close_llm

        close_llm(self._llm)


def compare(oracle: Oracle, story: Story, seed: int, most: int) -> dict[str, Any]:
    """Compare a sample of greedy answers, cut-off ones included; what is wrong is a problem."""
    candidates = [each for each in story.asked if each.greedy and each.tokens and each.prompt]
    chosen = _sample(candidates, seed, most)
    right = oracle.answers([(each.prompt, len(each.tokens)) for each in chosen])
    ties: list[dict[str, Any]] = []
    wrong = 0
    for each, expected in zip(chosen, right, strict=True):
        if each.tokens == expected:
            continue
        place = next(
            i for i, (a, b) in enumerate(zip(each.tokens, expected, strict=True)) if a != b
        )
        top = oracle.log_probabilities([*each.prompt, *expected[:place]])
        gap = max(top.values()) - top.get(each.tokens[place], min(top.values()) - 1)
        facts = {"request": each.id, "shape": each.shape, "at": place, "gap": round(gap, 6)}
        if gap < TIE:
            ties.append(facts)
            continue
        wrong += 1
        story.fail(
            f"request {each.id} ({each.shape}): token {place} of {len(expected)} is wrong "
            f"({each.tokens[place]}, full prefill says {expected[place]}, {gap:.4f} "
            f"below it in log-probability)"
        )
    reused = [each for each in chosen if _reused(each)]
    return {
        "answers": len(candidates),
        "compared": len(chosen),
        "compared_with_reuse": len(reused),
        "compared_partial": sum(each.outcome == "left" for each in chosen),
        "tokens_compared": sum(len(each.tokens) for each in chosen),
        "wrong": wrong,
        "ties": ties,
    }


def _reused(asked: Asked) -> bool:
    return bool(asked.sold.get("reused_tokens") or asked.receipts)


def _sample(candidates: list[Asked], seed: int, most: int) -> list[Asked]:
    """All of them, or a sample with as many of each shape as there are, in turn."""
    rng = random.Random(f"oracle {seed}")
    by_shape: dict[str, list[Asked]] = {}
    for each in rng.sample(candidates, len(candidates)):
        by_shape.setdefault(each.shape, []).append(each)
    chosen: list[Asked] = []
    while len(chosen) < most and any(by_shape.values()):
        for shape in sorted(by_shape):
            if by_shape[shape] and len(chosen) < most:
                chosen.append(by_shape[shape].pop())
    return chosen
