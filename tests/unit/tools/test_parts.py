"""The parts of `make test`: one after the other or side by side, with their times at the end."""

from __future__ import annotations

import re

from tools import parts


def test_parts_run_in_turn_or_side_by_side_and_the_first_failure_counts(capfd, tmp_path):
    """`+two` must run while `one` waits for it; `three` comes after both."""
    one = f"for i in $(seq 600); do [ -e {tmp_path}/two ] && exit 0; sleep 0.05; done; exit 9"
    two = f"touch {tmp_path}/two; echo hello; exit 3"
    assert parts.main([f"one={one}", f"+two={two}", f"three=ls {tmp_path}", "four=exit 4"]) == 3
    shown = capfd.readouterr().out
    assert re.findall(r"^(\w+) +\d+ min .* s  (\w+)$", shown, re.MULTILINE) == [
        ("one", "ok"),
        ("two", "failed"),
        ("three", "ok"),
        ("four", "failed"),
        ("together", "failed"),
    ]
    assert shown.index("two has ended:\nhello") < shown.index("== three")
