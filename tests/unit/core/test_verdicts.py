"""Verdicts of self-tests: kept for just one engine."""

from __future__ import annotations

import pytest

from vllm_kvmarket.core.verdicts import (
    VERDICTS_FOLDER,
    Verdict,
    forget_verdicts,
    read_verdict,
    verdicts,
    write_verdict,
)

ENGINE = {"namespace": "00", "vllm": "0.32.0", "kvmarket": "1", "device": "cpu", "ranks": "1x1"}


@pytest.mark.parametrize("changed", sorted(ENGINE))
def test_a_verdict_is_for_just_one_engine(tmp_path, changed):
    """Another version, device or namespace is tested again."""
    assert read_verdict(tmp_path, ENGINE) is None
    write_verdict(tmp_path, Verdict("m", ENGINE, "", 1.0, 5.0))
    found = read_verdict(tmp_path, dict(reversed(ENGINE.items())))
    assert found is not None
    assert found.passed
    assert read_verdict(tmp_path, ENGINE | {changed: "other"}) is None
    write_verdict(tmp_path, Verdict("m", ENGINE, "wrong", 1.0, 6.0))
    found = read_verdict(tmp_path, ENGINE)
    assert found is not None
    assert not found.passed


def test_verdicts_are_listed_and_forgotten(tmp_path):
    """The newest first; what cannot be read is none."""
    for at_s in (1.0, 3.0, 2.0):
        write_verdict(tmp_path, Verdict("m", ENGINE | {"n": str(at_s)}, "", 1.0, at_s))
    (tmp_path / VERDICTS_FOLDER / "half.json").write_text("{")
    assert [each.at_s for each in verdicts(tmp_path)] == [3.0, 2.0, 1.0]
    for _ in range(2):
        forget_verdicts(tmp_path)
        assert verdicts(tmp_path) == []
