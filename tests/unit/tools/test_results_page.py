"""docs/RESULTS.md says what docs/results says."""

from __future__ import annotations

from tools import results_page


def test_the_results_page_is_written_from_the_results():
    """python -m tools.results_page brings it up to date."""
    assert results_page.PAGE.read_text() == results_page.page()
