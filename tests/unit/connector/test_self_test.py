"""How the self-test compares two answers; what it asks an engine is in tests/engine."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from tests.support.paged import one_group
from vllm_kvmarket.connector.request_state import EngineFacts
from vllm_kvmarket.connector.self_test import Answer, SelfTest
from vllm_kvmarket.core.document_chunks import DocumentChunks


def answer(*steps):
    """Each step: the log-probabilities of the best tokens, the chosen one first."""
    return Answer([next(iter(best)) for best in steps], [dict(best) for best in steps])


FULL = answer({1: -0.1, 2: -0.3}, {3: -0.5, 4: -0.6})


@pytest.mark.parametrize(
    ("other", "apart"),
    [
        (FULL, 0.0),
        (answer({1: -0.12, 2: -0.3}, {3: -0.5}), 0.02),
        # They part at a near tie; what comes after is another text.
        (answer({1: -0.1, 2: -0.3}, {4: -0.55, 3: -0.56}), 0.1),
        (answer({2: -0.1, 1: -0.11}, {9: -0.5}), 0.2),
        # Neither is among the other's best.
        (answer({7: -0.1}, {3: -0.5}), math.inf),
        (answer({1: math.nan}, {3: -0.5}), math.inf),
    ],
)
def test_two_answers_are_as_far_apart_as_their_worst_step(other, apart):
    """Where they choose another token, as far as that choice costs."""
    assert FULL.distance(other) == pytest.approx(apart, abs=1e-9)
    assert math.isinf(other.distance(FULL)) == math.isinf(apart)


def test_answers_of_another_length_cannot_be_compared():
    """Rather than that the shorter one agrees with all."""
    with pytest.raises(ValueError, match="shorter"):
        FULL.distance(answer({1: -0.1, 2: -0.3}))


class Engine(SelfTest):
    """A self-test of an engine that answers as it is told, by salt."""

    def __init__(self, answers, reused=100):
        self._tokens, self._questions = list(range(100)), [[1], [2]]
        self._document = DocumentChunks.of(bytes(32), self._tokens)
        facts = EngineFacts("e", (one_group(["a"], 16),), 256, 1)
        self._half = SimpleNamespace(engine=SimpleNamespace(facts=facts))
        self._core = SimpleNamespace(
            vllm_config=SimpleNamespace(model_config=SimpleNamespace(dtype="torch.float32"))
        )
        self.asked = []
        self._answers, self._reused = answers, reused

    def _ask(self, prompt, salt, *, stores=False, match=None, cut=0):
        self.asked.append(salt)
        answer = self._answers[salt].pop(0) if len(self._answers[salt]) > 1 else FULL
        answer = Answer(answer.tokens, answer.best)
        most = match.token_count if match else 0
        reuse = SimpleNamespace(match=match, reused=min(self._reused, most))
        answer.request = SimpleNamespace(failure="", reuse=reuse)
        return answer


NEAR = answer({1: -0.102, 2: -0.3}, {3: -0.5})
FAR = answer({1: -0.2, 2: -0.3}, {3: -0.5})
# Two tokens so near to each other that either may be chosen.
TIE = answer({1: -0.7000, 2: -0.7004}, {3: -0.5})
FORK = answer({2: -0.7001, 1: -0.7003}, {3: -0.5})


def engine_of(whole=FULL, own=FULL, part=FULL, reused=100, full=FULL):
    """What it answers when it reuses the whole, and when vLLM computes the whole in two pieces."""
    answers = {"full": [full, FULL], "cut whole": [own, FULL], "cut to its middle": [FULL]}
    answers |= {"whole": [whole, FULL], "part": [part, FULL]}
    return Engine(answers, reused)


def test_an_engine_that_reuses_exactly_is_asked_for_no_more():
    """A full prefill, of which the document is stored, and two reuses."""
    tested = engine_of()
    assert tested._run() == ""
    assert tested.asked == ["full", "whole", "full", "part"]


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (engine_of(whole=FAR, own=FAR), "reused whole gives other answers"),
        (engine_of(whole=NEAR), "reused whole gives other answers"),
        (engine_of(whole=NEAR, own=NEAR), ""),
        (engine_of(full=TIE, whole=FORK), "tokens [2, 3] instead of [1, 3]"),
        (engine_of(full=TIE, whole=FORK, own=FORK), ""),
        (engine_of(part=FAR), "reused to its middle gives other answers"),
        (engine_of(reused=60), "of a document of 100 tokens, reused whole, only 60 could be"),
    ],
)
def test_reuse_may_differ_as_vllm_does_in_two_pieces_and_within_a_limit(engine, reason):
    """Sums have another order there too. Another token is never taken for rounding alone."""
    found = engine._run()
    assert reason in found
    assert bool(found) == bool(reason)
