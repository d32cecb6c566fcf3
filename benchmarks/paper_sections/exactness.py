"""Section 1: reuse gives the tokens and log-probabilities of full prefill and of vLLM's own hit.

Three engines on the same documents and questions:

1. one on a market publishes every document and ends;
2. one in a new process answers every question from the store, with vLLM's prefix cache emptied;
3. plain vLLM without kvmarket answers by full prefill, and by a hit in its own prefix cache.

A hit of vLLM's ends at a block boundary and computes the document's tail again, reuse does not; in
other matrix shapes float sums come in another order. Documents are therefore also asked cut at the
last block boundary, where both compute the same tokens: there not a bit may differ.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.paper_sections import texts
from benchmarks.paper_sections.tables import table
from benchmarks.paper_sections.traces import (
    NEW_TOKENS,
    TOP,
    Comparison,
    Trace,
    compare,
    is_explained,
    trace,
)
from benchmarks.prefill_vs_reuse import BATCHED_TOKENS, CONTEXT
from vllm_kvmarket import Market
from vllm_kvmarket.connector.offline_engine import close_llm, open_llm
from vllm_kvmarket.market.timed_requests import ask, empty_prefix_cache

QUICK = {"prose": (200,), "code": (255,), "json": (230,), "other language": (300,)}
BUYER = "buyer"
Key = tuple[int, int, bool]  # document, question, whether the document is whole


@dataclass(frozen=True, slots=True)
class Case:
    """One question about one document, with every comparison of its answers.

    `cut` is reuse against a hit where both compute the same tokens. `mean_logprob` is that of full
    prefill's tokens: answers that a model is sure of cannot differ much.
    """

    document: int
    question: int
    full_reuse: Comparison
    hit_reuse: Comparison
    full_hit: Comparison
    cut: Comparison
    mean_logprob: float


class Exactness:
    """The documents, and every answer by document, question and whether the document was whole."""

    def __init__(self, model: str, market: Market, seed: int, quick: bool) -> None:
        from transformers import AutoTokenizer

        self.model, self.market = model, market
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.documents = texts.documents(self.tokenizer, seed, QUICK if quick else None)
        self.questions = texts.questions(self.tokenizer)
        self.block = 0
        self.reuse: dict[Key, Trace] = {}
        self.hit: dict[Key, Trace] = {}
        self.full: dict[Key, Trace] = {}

    def _open(self, **engine_args: Any) -> Any:
        settings = {"max_model_len": CONTEXT, "max_num_batched_tokens": BATCHED_TOKENS}
        llm = open_llm(self.model, self.market, **settings, **engine_args)
        self.block = llm.llm_engine.vllm_config.cache_config.block_size
        return llm

    def _length(self, document: int, whole: bool) -> int:
        length = len(self.documents[document].tokens)
        return length if whole else length // self.block * self.block

    def prompt(self, key: Key) -> list[int]:
        """A document, whole or cut at its last block boundary, and a question."""
        document, question, whole = key
        cut = self.documents[document].tokens[: self._length(document, whole)]
        return [*cut, *self.questions[question]]

    def keys(self) -> list[Key]:
        """Everything that is asked; a document that ends at a block boundary is not cut."""
        return [
            (document, question, whole)
            for document in range(len(self.documents))
            for question in range(len(self.questions))
            for whole in (True, False)
            if whole or self._length(document, True) != self._length(document, False)
        ]

    def publish(self) -> None:
        """Publish every document."""
        llm = self._open()
        for number, document in enumerate(self.documents):
            self.market.publish(llm, token_ids=list(document.tokens), title=f"{number}")
        close_llm(llm)

    def buy(self) -> None:
        """Answer from the store in a new process. Raises RuntimeError when a token was computed."""
        llm = self._open()
        for key in self.keys():
            empty_prefix_cache(llm)
            answer = trace(llm, self.prompt(key), self.market.params(BUYER))
            expected = self._length(key[0], key[2])
            if answer.market.get("reused_tokens") != expected:
                raise RuntimeError(f"reuse of {expected} tokens was wanted, got {answer.market}")
            self.reuse[key] = answer
        close_llm(llm)

    def compute(self) -> None:
        """Answer by plain vLLM. Raises RuntimeError when a hit was none, or full prefill a hit."""
        llm = self._open(kv_transfer_config=None)
        for key in self.keys():
            if key[1:] == (
                0,
                True,
            ):  # a new document, alone as it was published
                empty_prefix_cache(llm)
                ask(llm, self.documents[key[0]].tokens, max_tokens=1, rest_s=0)
            self.hit[key] = self._checked(llm, key, self._length(key[0], whole=False))
        for key in self.keys():
            if key[2]:
                empty_prefix_cache(llm)
                self.full[key] = self._checked(llm, key, 0)
        close_llm(llm)

    def _checked(self, llm: Any, key: Key, cached: int) -> Trace:
        answer = trace(llm, self.prompt(key))
        if answer.cached_tokens != cached:
            raise RuntimeError(f"{key}: vLLM cached {answer.cached_tokens} tokens, not {cached}")
        return answer

    def cases(self) -> list[Case]:
        """All comparisons."""
        found = []
        for whole in self.keys():
            if not whole[2]:
                continue
            cut = (*whole[:2], False)
            alike = cut if cut in self.hit else whole
            found.append(
                Case(
                    *whole[:2],
                    full_reuse=compare(self.full[whole], self.reuse[whole]),
                    hit_reuse=compare(self.hit[whole], self.reuse[whole]),
                    full_hit=compare(self.full[whole], self.hit[whole]),
                    cut=compare(self.hit[alike], self.reuse[alike]),
                    mean_logprob=self.full[whole].mean_logprob,
                )
            )
        return found


def vllms_noise(cases: Sequence[Case]) -> float:
    """How much plain vLLM differs from itself: its own hits from its own full prefill."""
    return max(case.full_hit.difference for case in cases)


def summarise(cases: Sequence[Case]) -> dict[str, Any]:
    """Counts over all questions, and every mismatch with its explanation or the lack of one."""
    noise = vllms_noise(cases)
    mismatches = []
    for case in cases:
        for name in ("full_reuse", "hit_reuse", "full_hit", "cut"):
            parted = getattr(case, name).divergence
            if parted is None:
                continue
            # Where both compute the same tokens there is no noise that could explain anything.
            limit = 0.0 if name == "cut" else noise
            mismatches.append(
                {
                    "document": case.document,
                    "question": case.question,
                    "between": name,
                    **asdict(parted),
                    "noise": limit,
                    "explained": limit > 0 and is_explained(parted, limit),
                }
            )
    return {
        "questions": len(cases),
        "new_tokens": NEW_TOKENS,
        "logprobs_a_step": TOP,
        "all_tokens_as_full_prefill": sum(c.full_reuse.divergence is None for c in cases),
        "all_tokens_as_hit": sum(c.hit_reuse.divergence is None for c in cases),
        "all_tokens_hit_as_full_prefill": sum(c.full_hit.divergence is None for c in cases),
        "bit_for_bit_as_hit": sum(c.cut.is_identical for c in cases),
        "largest_difference_to_full_prefill": max(c.full_reuse.difference for c in cases),
        "largest_difference_to_hit": max(c.hit_reuse.difference for c in cases),
        "largest_difference_hit_to_full_prefill": noise,
        "mismatches": mismatches,
    }


def run(model: str, market: Market, seed: int, quick: bool) -> dict[str, Any]:
    """Run the section; a result for JSON."""
    work = Exactness(model, market, seed, quick)
    for part in (work.publish, work.buy, work.compute):
        print(f"exactness: {part.__doc__}", file=sys.stderr, flush=True)
        part()
    cases = work.cases()
    summary = summarise(cases)
    for mismatch in summary["mismatches"]:
        mismatch["texts"] = [work.tokenizer.decode([token]) for token in mismatch["tokens"]]
    return {
        **summary,
        "block_tokens": work.block,
        "asked": list(texts.QUESTIONS),
        "documents": [
            {"kind": each.kind, "source": each.source, "tokens": len(each.tokens)}
            for each in work.documents
        ],
        "cases": [asdict(case) for case in cases],
    }


def show(result: dict[str, Any]) -> None:
    """A row a document, then every mismatch."""
    rows = []
    for number, document in enumerate(result["documents"]):
        cases = [case for case in result["cases"] if case["document"] == number]
        equal = [" ".join(str(case[name]["equal"]) for case in cases) for name in _COLUMNS]
        worst = [f"{max(case[name]['difference'] for case in cases):.1e}" for name in _COLUMNS]
        identical = sum(case["cut"]["is_identical"] for case in cases)
        rows.append(
            (
                f"{document['kind']}, {document['source']}"[:52],
                f"{document['tokens']:,}",
                *(cell for pair in zip(equal, worst, strict=True) for cell in pair),
                f"{identical} of {len(cases)}",
            )
        )
    table(("document", "tokens", *_HEADS, "bit for bit\nwhere both\ncompute alike"), rows)
    every = result["questions"]
    print(
        f"\n{result['new_tokens']} of {result['new_tokens']} greedy tokens: "
        f"{result['all_tokens_as_full_prefill']} of {every} as full prefill, "
        f"{result['all_tokens_as_hit']} of {every} as vLLM's own prefix-cache hit "
        f"(that hit against full prefill: {result['all_tokens_hit_as_full_prefill']} of {every}).\n"
        f"Bit for bit as the hit, where both compute the same tokens: "
        f"{result['bit_for_bit_as_hit']} of {every}, the {result['logprobs_a_step']} likeliest "
        "tokens of each step.\nLargest difference of a log-probability: "
        f"{result['largest_difference_to_full_prefill']:.1e} to full prefill, "
        f"{result['largest_difference_to_hit']:.1e} to the hit; vLLM's hit to its full prefill: "
        f"{result['largest_difference_hit_to_full_prefill']:.1e}."
    )
    if not result["mismatches"]:
        print("No mismatch in a token.")
    for each in result["mismatches"]:
        gap = "not among the likeliest" if each["gap"] is None else f"gap {each['gap']:.1e}"
        verdict = "a near tie that noise turns over" if each["explained"] else "NOT EXPLAINED"
        print(
            f"  mismatch {each['between']}, document {each['document']}, question "
            f"{each['question']}, token {each['step']}: {each['texts'][0]!r} or "
            f"{each['texts'][1]!r}, {gap}, vLLM's own noise {each['noise']:.1e}: {verdict}"
        )


def unexplained(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The mismatches that float noise cannot have made."""
    return [each for each in result["mismatches"] if not each["explained"]]


_COLUMNS = ("full_reuse", "hit_reuse", "full_hit")
_HEADS = (
    "equal tokens\nreuse = full",
    "largest\nlogprob diff.",
    "equal tokens\nreuse = hit",
    "largest\nlogprob diff.",
    "equal tokens\nhit = full",
    "largest\nlogprob diff.",
)
