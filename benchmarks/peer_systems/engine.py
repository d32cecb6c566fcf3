"""One engine doing the steps of a plan: python -m benchmarks.peer_systems.engine PLAN RESULTS.

PLAN is JSON; RESULTS gets a line of JSON for each step as soon as it is done, so that the
process that started this one knows how far it came if it dies.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

QUESTION_TOKENS = 20


class Engine:
    """An engine with one system's connector, and the steps that a plan may ask of it."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.folder = Path(plan["folder"])
        self.market: Any = None
        transfer = plan["transfer"]
        if plan["kvmarket"]:
            from vllm_kvmarket import Market

            self.market = Market.open(self.folder / "stored")
            self.market.create_account("buyer")
            self.market.deposit("buyer", 10**15, "deposit")
            transfer = self.market.transfer_config()
        from vllm import LLM

        self.llm = LLM(
            model=plan["model"],
            dtype="float32",
            enforce_eager=True,
            max_model_len=4096,
            max_num_batched_tokens=8192,
            kv_transfer_config=transfer,
            **plan["engine_args"],
        )
        text = resources.files("vllm_kvmarket.cli").joinpath("gpl-3.0.txt").read_text()
        self.tokens: list[int] = self.llm.get_tokenizer()(text)["input_ids"]
        self._asked = 0

    def document(self, length: int, variant: int) -> list[int]:
        """Licence text from a place that depends on length, variant and seed."""
        rest = len(self.tokens) - length
        place = random.Random(f"{self.plan['seed']}/{length}/{variant}").randrange(1, rest)
        return self.tokens[place : place + length]

    def question(self, number: int) -> list[int]:
        """Tokens that no document holds at that place."""
        return [2000 + (number * 37 + i * 101) % 20000 for i in range(QUESTION_TOKENS)]

    def ask(self, step: dict[str, Any]) -> dict[str, Any]:
        """Ask about a document, with the step's own question or one that was not asked before."""
        from vllm_kvmarket.market.timed_requests import ask

        self._asked += 1
        question = self.question(step.get("question", 1000 * self.plan["process"] + self._asked))
        params = self.market.params("buyer") if self.market and step.get("buy", True) else None
        answer = ask(
            self.llm,
            self.document(*step["document"]) + question,
            params,
            max_tokens=step.get("max_tokens", 1),
        )
        return {
            "ttft_s": answer.ttft_s,
            "tokens": list(answer.token_ids),
            "logprobs": [repr(value) for value in answer.logprobs],  # a nan is no JSON
            "market": answer.market,
        }

    def empty(self, _step: dict[str, Any]) -> dict[str, Any]:
        """Empty vLLM's prefix cache; a small request first moves what waits for a step."""
        from vllm_kvmarket.market.timed_requests import empty_prefix_cache

        self.nudge()
        empty_prefix_cache(self.llm)
        return {}

    def nudge(self) -> None:
        """A request too short for any cache."""
        from vllm_kvmarket.market.timed_requests import ask

        ask(self.llm, [self._asked + 500, 17, 29], None, max_tokens=2, rest_s=0.2)

    def publish(self, step: dict[str, Any]) -> dict[str, Any]:
        """Put a document on the market; other systems have saved it already."""
        if self.market is None:
            return {}
        time.sleep(1.3)
        started = time.perf_counter()
        self.market.publish(self.llm, token_ids=self.document(*step["document"]), title="peers")
        return {"seconds": time.perf_counter() - started}

    def settle(self, _step: dict[str, Any]) -> dict[str, Any]:
        """Wait until nothing is saved any more, and list what lies in the folder then."""
        self.nudge()
        before: dict[str, int] = {}
        for _ in range(30):
            time.sleep(0.7)
            now = files_below(self.folder / "stored")
            if now == before:
                time.sleep(0 if now else 3)  # what lies in another process's memory shows nothing
                break
            before = now
        return {"files": before}

    def run(self, results: Path) -> None:
        """All steps of the plan, in turn."""
        with results.open("a") as lines:
            for step in [{"op": "ready"}, *self.plan["steps"]]:
                if step["op"] == "ready":
                    done = {"kv_cache_dtype": "float32"}
                else:
                    done = getattr(self, step["op"])(step)
                lines.write(json.dumps({**step, **done}) + "\n")
                lines.flush()
        self.llm.llm_engine.engine_core.shutdown()
        if self.market is not None:
            self.market.close()


def files_below(folder: Path) -> dict[str, int]:
    """Every file below a folder with its size in bytes."""
    found = {}
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                found[str(path.relative_to(folder))] = path.stat().st_size
        except FileNotFoundError:  # a draft that was renamed meanwhile
            continue
    return found


def main() -> None:
    """Run the plan that the command line names."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    Engine(plan).run(Path(sys.argv[2]))


if __name__ == "__main__":
    main()
