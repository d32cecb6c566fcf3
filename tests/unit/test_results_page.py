"""docs/RESULTS.md says what docs/results says."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import results_page


def test_the_results_page_is_written_from_the_results():
    """python tools/results_page.py brings it up to date."""
    assert results_page.PAGE.read_text() == results_page.page()
