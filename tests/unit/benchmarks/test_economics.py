"""The paper's arithmetic, and where it turns over."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.economics import Economics
from vllm_kvmarket.core.pricing import NANO, PPM, Tariff

MILLION = 1_000_000 * NANO

figures = st.builds(
    Economics,
    agents=st.integers(1, 10**9),
    tokens=st.integers(1, 10**6),
    prefill_to_reuse=st.fractions(Fraction(1, 10), 1000),
    tariff=st.builds(
        Tariff, input_nano_per_mtok=st.integers(0, 10**11), royalty_ppm=st.integers(0, PPM)
    ),
)


def test_the_defaults_reproduce_the_papers_abstract():
    """3,774 tokens for 80 million agents: $1.5M to prefill, $0.03M to reuse, 49.7 times less."""
    economics = Economics()
    total = economics.total
    assert (economics.agents, economics.tokens) == (80_000_000, 3_774)
    assert round(total.prefill_nano / MILLION, 1) == 1.5
    assert round(total.reuse_nano / MILLION, 2) == 0.03
    assert round(total.prefill_nano / total.reuse_nano, 1) == 49.7


def test_the_exact_figures_behind_the_abstract():
    """The abstract's rounded numbers, to the nano-unit."""
    total = Economics().total
    assert total.prefill_nano == 1_509_600 * NANO
    assert total.reuse_nano == 30_374_245_472_837
    assert total.charge_nano == 150_960 * NANO
    assert total.royalty_nano == 75_480 * NANO


def test_shipping_the_kv_costs_more_than_the_prefill_it_saves():
    """The paper's reason for hosting at the provider: one egress costs more than one prefill."""
    read = Economics().per_read
    assert read.shipping_nano == 50_084_904
    assert read.shipping_nano > read.prefill_nano == 18_870_000


def test_the_usual_tariff_leaves_the_provider_a_margin():
    """A tenth of the input price covers the royalty and reuse compute of a fiftieth."""
    read = Economics().per_read
    assert read.margin_nano == 1_887_000 - 943_500 - 379_678
    assert read.saved_nano == 18_870_000 - 1_887_000


@pytest.mark.parametrize(
    ("ratio", "reads"),
    [
        (Fraction(497, 10), 2),
        (Fraction(2), 3),
        (Fraction(3, 2), 4),
        (Fraction(101, 100), 102),
        (Fraction(1), None),
        (Fraction(1, 2), None),
    ],
)
def test_publishing_pays_back_after_few_reads(ratio, reads):
    """At fifty times the second read is already cheaper; at no gain publishing never pays."""
    assert Economics(prefill_to_reuse=ratio).break_even_reads == reads


@given(figures)
def test_break_even_is_the_first_read_that_is_cheaper(economics):
    """Against the plain definition: publish once and reuse, or prefill every time."""
    reads = economics.break_even_reads
    reuse = 1 / economics.prefill_to_reuse  # in units of one prefill
    if reads is None:
        assert reuse >= 1
    else:
        assert reads > 1 + reads * reuse
        assert reads - 1 <= 1 + (reads - 1) * reuse


@given(figures)
def test_totals_are_those_of_single_reads(economics):
    """A total differs from that many reads by rounding only, and charges not even by that."""
    one, many = economics.per_read, economics.total
    assert many.charge_nano == economics.agents * one.charge_nano
    assert many.royalty_nano == economics.agents * one.royalty_nano
    for name in ("prefill_nano", "reuse_nano", "shipping_nano"):
        rounding = getattr(many, name) - economics.agents * getattr(one, name)
        assert 0 <= rounding < economics.agents


@pytest.mark.parametrize(
    "wrong", [{"agents": 0}, {"tokens": -1}, {"prefill_to_reuse": 0}, {"egress_nano_per_gb": -1}]
)
def test_impossible_figures_are_refused_by_name(wrong):
    """The error names the figure."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Economics(**wrong)
