"""The benchmark of the paper's claims: what it computes without an engine."""

import json
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from benchmarks.paper_sections import growth, hosting, pictures, prize
from benchmarks.paper_sections.inputs import Prices, storage
from benchmarks.paper_sections.tables import table
from vllm_kvmarket.core.pricing import NANO

MEASURED = {
    "prefill_against_reuse": {
        "model": "small",
        "rows": [
            {
                "tokens": 900,
                "wall_s": {"prefill_over_reuse": 20.0},
                "cpu_s": {"prefill_over_reuse": 10.0},
            }
        ],
    },
    "incompressible": {
        "model": "small",
        "bytes_per_token": {"float32": 400.0, "bfloat16": 200.0},
        "rows": [
            {"codec": "zstd-1", "dtype": "bfloat16", "ratio": 1.2},
            {"codec": "zstd-exponent", "dtype": "bfloat16", "ratio": 1.5},
            {"codec": "zstd-exponent", "dtype": "float32", "ratio": 1.2},
        ],
    },
}


@pytest.mark.parametrize(("prefill", "reuse", "count"), [(0.67, 0.078, 1.13), (14.71, 0.296, 1.02)])
def test_the_papers_break_even_follows_from_its_times(prefill, reuse, count):
    """A publishing as dear as a prefill gives the paper's 1.13 and 1.02 reads."""
    assert round(growth.break_even(prefill, prefill, reuse), 2) == count


def test_break_even_counts_what_publishing_costs_and_may_never_come():
    """At the count both roads cost the same; without a gain in reuse there is no such count."""
    count = growth.break_even(publish=3.0, prefill=2.0, reuse=0.5)
    assert count * 2.0 == pytest.approx(3.0 + count * 0.5)
    assert growth.break_even(publish=3.0, prefill=2.0, reuse=2.0) is None


def test_a_growth_exponent_is_the_power():
    """Squares grow with the second power; one point has no growth."""
    assert growth.growth_exponent((10, 20, 50), (100, 400, 2500)) == pytest.approx(2)
    assert growth.growth_exponent((10,), (100,)) is None


def test_the_power_law_meets_both_of_the_papers_points():
    """A value between two points is between their results."""
    assert hosting.paper_seconds(255) == pytest.approx((0.67, 0.078))
    assert hosting.paper_seconds(3774) == pytest.approx((14.71, 0.296))
    assert 0.67 < hosting.paper_seconds(1000)[0] < 14.71


def test_shipping_pays_up_to_exactly_the_price_that_is_named():
    """At the price named a document's egress costs no more than it saves, a little above more."""
    for tokens in hosting.LENGTHS:
        economics = hosting.reading(tokens, Prices(), ratio=1.5)
        price = hosting.paying_egress_nano_per_gb(economics)
        assert hosting.shipping_over_saved(economics, price) <= 1
        assert hosting.shipping_over_saved(economics, price + 100) > 1


def test_shipping_at_a_clouds_list_price_costs_more_than_prefill_and_at_a_cheap_hosts_less():
    """The paper's claim, and where it turns over: at 3.3 hundredths a GB, at its prices."""
    economics = hosting.reading(3774, Prices())
    assert hosting.shipping_over_saved(economics, 90_000_000) > 1
    assert hosting.shipping_over_saved(economics, 10_000_000) < 1
    by_hand = 5e-6 * (1 - 0.296 / 14.71) / 147_456 * 1e9
    assert hosting.paying_egress_nano_per_gb(economics) / NANO == pytest.approx(by_hand, rel=1e-3)


def test_compression_moves_the_price_in_proportion():
    """Half the bytes, twice the price of a GB."""
    one, half = (
        hosting.paying_egress_nano_per_gb(hosting.reading(1024, Prices(), ratio))
        for ratio in (1.0, 2.0)
    )
    assert half == pytest.approx(2 * one, rel=1e-4)


def test_ratios_measured_before_are_used_where_there_are_any():
    """Ours in 16 bits; without measurements, only what needs none."""
    assert list(hosting.ratios({}).values()) == [1.0, hosting.HYPOTHETICAL_RATIO]
    assert hosting.ratios(MEASURED)["lossless bfloat16, measured"] == 1.5


def test_hosting_is_bytes_times_price():
    """The paper's document of 0.557 GB in an object store, and how many reads pay for it."""
    rows = hosting.hosting(Prices(), MEASURED)
    row = rows[0]
    assert row["nano_per_month"] == pytest.approx(0.556_498_944 * 23_000_000, rel=1e-6)
    saved = 3774 * 5000 * (1 - 0.296 / 14.71)
    assert row["reads_a_month_that_pay"] == pytest.approx(row["nano_per_month"] / saved, rel=1e-4)
    assert {each["reads_a_month_that_pay"] for each in rows if "small" in each["model"]} == {None}


@pytest.mark.parametrize("royalty_ppm", [0, 250_000, 500_000])
def test_the_provider_earns_from_the_least_tariff_on(royalty_ppm):
    """A little below it the margin is negative, a little above positive."""
    ratio = Fraction(497, 10)
    least = prize.least_tariff(ratio, royalty_ppm)
    below, above = (
        prize.prize(Prices(), ratio, round(least * 1e6) + step, royalty_ppm).total.margin_nano
        for step in (-50, 50)
    )
    assert below < 0 < above
    assert prize.least_tariff(ratio, 1_000_000) is None


def test_the_prize_is_the_papers_and_also_told_by_what_was_measured():
    """1.5 against 0.03 million in the paper; with a ratio of 20 reuse costs a twentieth."""
    result = prize.run(Prices(), MEASURED)
    paper, wall, cpu = result["by_ratio"]
    assert round(paper["prefill_nano"] / prize.MILLION, 1) == 1.5
    assert round(paper["reuse_nano"] / prize.MILLION, 2) == 0.03
    assert wall["reuse_nano"] * 20 == wall["prefill_nano"]
    assert cpu["reuse_nano"] * 10 == cpu["prefill_nano"]
    for row in paper["tariffs"]:
        parts = row["royalty_nano"] + row["margin_nano"] + paper["reuse_nano"]
        assert parts == row["charge_nano"]
        assert row["charge_nano"] + row["saved_nano"] == paper["prefill_nano"]


def test_prices_are_read_exactly_or_refused():
    """By medium; a medium without a price is an error."""
    assert storage("ssd=0.08,tape=0.001") == {"ssd": 80_000_000, "tape": 1_000_000}
    with pytest.raises(ValueError, match="NAME=PRICE"):
        storage("ssd")
    dear = replace(Prices(), input_nano_per_mtok=10 * NANO)
    assert hosting.paying_egress_nano_per_gb(hosting.reading(3774, dear)) == pytest.approx(
        2 * hosting.paying_egress_nano_per_gb(hosting.reading(3774, Prices())), rel=1e-6
    )


def test_a_table_keeps_its_columns(capsys):
    """Headings of two lines, the first column to the left, all others to the right."""
    table(("name", "two\nlines"), [("a", "1"), ("long name", "12345")])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "             two",
        "name       lines",
        "---------  -----",
        "a              1",
        "long name  12345",
    ]


def test_sections_of_arithmetic_are_written_and_drawn(tmp_path, capsys):
    """--only 4 5 needs no model; sections that were there before stay."""
    from benchmarks import paper

    (tmp_path / "paper.json").write_text(json.dumps({"sections": {"other": {"kept": True}}}))
    assert paper.main(["--only", "4", "5", "--output", str(tmp_path)]) == 0
    sections = json.loads((tmp_path / "paper.json").read_text())["sections"]
    assert sections["other"] == {"kept": True}
    assert sections["prize"]["versions"]["numpy"] == np.__version__
    printed = capsys.readouterr().out
    assert "4. Where the KV lives" in printed
    assert "5. The prize" in printed
    drawn = {path.name: path.stat().st_size for path in tmp_path.glob("*.png")}
    assert set(drawn) == {"paper_shipping.png", "paper_margin.png"}
    assert all(10_000 < size < 120_000 for size in drawn.values())


def test_the_pictures_of_measurements_are_drawn_from_their_sections(tmp_path):
    """A break-even that never comes is drawn as a gap, not an error."""
    unit = {"prefill": 2.0, "publish": 2.1, "reuse": 0.5, "prefill_over_reuse": 4.0}
    rows = [
        {"tokens": n, **{name: {**unit, "break_even_reads": count} for name in ("wall_s", "cpu_s")}}
        for n, count in ((255, 1.4), (512, None))
    ]
    machine = {"cpu": "some", "cores": 2}
    found = {"rows": rows, "paper": growth.paper_figures(), "model": "small", "machine": machine}
    drawn = pictures.draw({"prefill_against_reuse": found}, tmp_path)
    assert [path.name for path in drawn] == ["paper_prefill_reuse.png", "paper_break_even.png"]
    assert math.prod(path.stat().st_size for path in drawn)
