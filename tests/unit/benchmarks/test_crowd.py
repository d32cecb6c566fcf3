"""The crowd benchmark's figures, without a server."""

from __future__ import annotations

from collections import Counter

from benchmarks.crowd import Run, parse, percentile, popularity, report


def test_percentiles_are_measured_values():
    """Also of few values."""
    values = [float(each) for each in range(100, 0, -1)]
    assert (percentile(values, 0.5), percentile(values, 0.99)) == (51.0, 100.0)
    assert percentile([3.0], 0.99) == 3.0


def test_popular_documents_are_asked_about_more_often_and_the_same_each_time():
    """As Zipf's law has it: the first as often as the second and third and more together."""
    chosen = popularity(8, 4000)
    assert chosen == popularity(8, 4000)
    counts = Counter(chosen)
    assert set(counts) == set(range(8))
    assert 1.6 < counts[0] / counts[1] < 2.4


def test_the_table_shows_each_system_beside_plain_vllm():
    """A row for each, with its share of plain vLLM's requests a second."""
    rows = []
    for system, seconds in (("many_accounts", 2.0), ("plain", 4.0)):
        run = Run(seconds, [0.1, 0.2, 0.3, 0.4], 0.2, 1, 11)
        rows.append({"documents": "one", "at_a_time": 4, "system": system} | run.figures())
    lines = report(rows).splitlines()
    assert len(lines) == 3
    assert lines[1].split() == (
        ["one", "4", "many_accounts", "2.00", "2.000", "0.300", "0.400", "20.0%", "1", "11"]
    )


def test_the_quick_run_is_small():
    """One set of documents, once."""
    args = parse(["--quick"])
    assert (args.requests, args.documents, args.concurrency, args.rounds) == (8, ["short"], [4], 1)
    assert parse([]).concurrency == [1, 4, 16]
