"""What benchmarks/models.py counts as wrong, and what it says of a family that did not run."""

from __future__ import annotations

import pytest

from benchmarks.model_family import FAMILIES, SHORT, Published, Reused
from benchmarks.models import DOCUMENTS, compared, reason
from benchmarks.paper_sections.traces import Trace
from tools.make_tiny_model import FAMILIES as TINY


def answer(*tokens: int, cached: int = 0, reused: int = 0, gap: float = 5.0) -> Trace:
    """An answer whose first token has this id; every step has tokens 1 and 2, `gap` apart."""
    steps = tuple({token: -0.1, 3 - token: -0.1 - gap} for token in tokens)
    return Trace(tokens, steps, cached, {"reused_tokens": reused} if reused else {})


def row(full: Trace, hit: Trace | None, ours: Trace) -> dict:
    """The row of one document with one question."""
    published = Published(["1 x full attention"], [100], [full], [hit] if hit else [], 5000)
    return compared(published, Reused([ours], [0.4], [0.1]))


def test_equal_answers_are_counted_to_the_bit():
    """And what was reused and stored."""
    found = row(answer(1, 1), answer(1, 1, cached=96), answer(1, 1, reused=96))
    assert (found["wrong"], found["alike"], found["identical"]) == (0, 1, 1)
    assert found["forks"] == {"hit": 0, "reuse": 0, "only_reuse": 0}
    assert (found["reused_tokens"], found["document_tokens"]) == (96, 100)
    assert (found["bytes_per_token"], found["prefill_over_reuse"]) == (50, pytest.approx(4))


@pytest.mark.parametrize(
    ("hit", "ours", "wrong", "forks"),
    [
        # The hit forked, and ours as the hit: vLLM's own answer.
        (answer(2, cached=96), answer(2, reused=96), 0, (1, 1, 0)),
        # Both computed the same tokens: nothing excuses another one.
        (answer(1, cached=96), answer(2, reused=96, gap=0.001), 1, (0, 1, 1)),
        (answer(2, cached=96), answer(1, reused=96), 1, (1, 0, 0)),
        # They computed different tokens, and vLLM has no noise that would explain it.
        (answer(1, cached=64), answer(2, reused=96), 1, (0, 1, 1)),
        # Either of vLLM's own answers is right.
        (answer(2, cached=64), answer(1, reused=96), 0, (1, 0, 0)),
        (None, answer(1, reused=96), 0, (None, 0, None)),
        (None, answer(2, reused=96), 1, (None, 1, None)),
    ],
)
def test_a_token_is_wrong_where_vllm_could_not_have_given_it(hit, ours, wrong, forks):
    """A fork is not yet wrong."""
    found = row(answer(1), hit, ours)
    assert found["wrong"] == wrong
    assert tuple(found["forks"].get(k) for k in ("hit", "reuse", "only_reuse")) == forks


def test_a_near_tie_is_turned_over_by_vllms_own_noise():
    """As large as vLLM's hits differ from its full prefill, in this run."""
    full, hit = answer(1, gap=0.5), answer(1, cached=64, gap=0.8)
    assert row(full, hit, answer(2, reused=96, gap=0.5))["wrong"] == 0
    assert row(full, answer(1, cached=64, gap=0.6), answer(2, reused=96))["wrong"] == 1


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("x\nvllm_kvmarket.core.errors.ConfigError: no MLA\nmore", ("refused", "no MLA")),
        (
            "(Worker) ERROR NotImplementedError: Sparse Attention is not supported\n"
            "RuntimeError: Engine core initialization failed. See above.",
            ("failed", "NotImplementedError: Sparse Attention is not supported"),
        ),
        (
            "ERROR kvmarket: THE SELF-TEST FAILED, so nothing is sold: other answers. Test again\n"
            "NotPublishableError: d: nothing can be published now",
            ("refused", "THE SELF-TEST FAILED, so nothing is sold: other answers"),
        ),
        ("nothing", ("failed", "no message")),
    ],
)
def test_why_a_family_did_not_run_is_taken_from_its_log(log, expected):
    """Our refusal, or else the first error that says something."""
    assert reason(log) == expected


def test_every_family_can_be_made():
    """By its own name, and once."""
    assert [each.name for each in FAMILIES if not each.real and each.tiny not in TINY] == []
    assert len({each.name for each in FAMILIES}) == len(FAMILIES)


def test_the_short_run_asks_a_thousand_questions():
    """Three about each document."""
    assert set(SHORT) <= {each.name for each in FAMILIES}
    assert 3 * DOCUMENTS * len(SHORT) >= 1000
