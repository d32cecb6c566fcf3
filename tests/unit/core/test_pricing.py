"""Prices: integers only, rounded once, never beyond int64."""

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.core.pricing import (
    INT64_MAX,
    MTOK,
    NANO,
    PPM,
    Tariff,
    Terms,
    amount_nano,
    format_nano,
    parse_nano,
    parse_ppm,
)

prices = st.integers(0, 10**15)
tokens = st.integers(0, 10_000_000)
shares = st.integers(0, PPM)


@pytest.mark.parametrize(
    ("count", "price", "expected"),
    [
        (0, 5_000_000_000, 0),
        (1, 5_000_000_000, 5_000),
        (3_774, 5_000_000_000, 18_870_000),
        (3_774, 500_000_000, 1_887_000),
        (1, 999_999, 0),
        (1, 1_000_000, 1),
        (999_999, 1, 0),
        (1_000_000, 1, 1),
    ],
)
def test_an_amount_is_tokens_times_the_price_of_a_million_rounded_down(count, price, expected):
    """Known amounts, among them those just below and at a whole nano-unit."""
    assert amount_nano(count, price) == expected


@given(tokens, prices)
def test_rounding_loses_less_than_a_nano_unit(count, price):
    """The amount is the exact one, or less than one nano-unit below it."""
    exact = Fraction(count * price, MTOK)
    assert 0 <= exact - amount_nano(count, price) < 1


@given(tokens, tokens, prices)
def test_splitting_a_charge_never_costs_the_buyer_more(first, second, price):
    """Two charges for parts are at most one nano-unit below one charge for both, never above."""
    parts = amount_nano(first, price) + amount_nano(second, price)
    assert 0 <= amount_nano(first + second, price) - parts <= 1


@given(st.integers(0, INT64_MAX), shares)
def test_a_royalty_is_never_more_than_its_share(charge, share):
    """The publisher's share is rounded down: provider and publisher split the charge exactly."""
    royalty = Terms(0, 0, share).royalty_nano(charge)
    assert 0 <= Fraction(charge * share, PPM) - royalty < 1
    assert 0 <= royalty <= charge


def test_amounts_beyond_int64_and_negative_tokens_are_refused():
    """The largest amount that the ledger can hold passes; one more token does not."""
    assert amount_nano(MTOK, INT64_MAX) == INT64_MAX
    with pytest.raises(ValueError, match="overflow int64"):
        amount_nano(MTOK + 1, INT64_MAX)
    with pytest.raises(ValueError, match="cannot price -1 tokens"):
        amount_nano(-1, 1)


def test_reuse_costs_a_tenth_of_input_unless_the_tariff_says_otherwise():
    """The default cache_read is a tenth of input, in whole nano-units."""
    assert Tariff().terms().cache_read_nano_per_mtok == 500_000_000
    assert Tariff(input_nano_per_mtok=19).terms().cache_read_nano_per_mtok == 1
    assert Tariff(cache_read_nano_per_mtok=0).terms().cache_read_nano_per_mtok == 0


@given(prices, st.none() | prices, shares, st.none() | prices, st.none() | shares)
def test_a_listing_overrides_the_tariff(input_price, read, share, listing_read, listing_share):
    """A listing's own price and royalty win, 0 included; what it leaves open the tariff says."""
    tariff = Tariff(
        input_nano_per_mtok=input_price, cache_read_nano_per_mtok=read, royalty_ppm=share
    )
    terms = tariff.terms(
        ListingTerms(cache_read_nano_per_mtok=listing_read, royalty_ppm=listing_share)
    )
    from_tariff = input_price // 10 if read is None else read
    assert terms == Terms(
        input_price,
        from_tariff if listing_read is None else listing_read,
        share if listing_share is None else listing_share,
    )


def test_terms_price_reuse_and_its_alternative():
    """Charge, royalty and the price of recomputing the paper's document at the default tariff."""
    terms = Tariff().terms()
    assert terms.charge_nano(3_774) == 1_887_000
    assert terms.royalty_nano(1_887_000) == 943_500
    assert terms.recompute_nano(3_774) == 18_870_000
    assert Tariff(cache_write_nano_per_mtok=2_000_000).write_nano(3) == 6


@given(st.integers(0, INT64_MAX))
@example(0)
@example(1)
@example(INT64_MAX)
def test_an_amount_survives_being_shown_and_read(amount):
    """Every amount has one spelling with 2 to 9 decimals, which reads back as the same integer."""
    shown = format_nano(amount)
    assert 2 <= len(shown.partition(".")[2]) <= 9
    assert parse_nano(shown) == amount
    assert format_nano(-amount) == (f"-{shown}" if amount else shown)


@given(st.integers(0, PPM))
def test_a_share_survives_being_shown_and_read(share):
    """A share of six decimals is read exactly, which a float would not be."""
    assert parse_ppm(f"{share // PPM}.{share % PPM:06d}") == share


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("5", 5 * NANO),
        ("0.1", 100_000_000),
        (".5", 500_000_000),
        ("5.", 5 * NANO),
        (" 1.25 ", 1_250_000_000),
        ("0.000000001", 1),
        ("0.10000000000000", 100_000_000),
    ],
)
def test_amounts_are_read_exactly(text, expected):
    """Decimal amounts become nano-units without a float in between."""
    assert parse_nano(text) == expected


NO_AMOUNTS = ["", ".", "-1", "+1", "1e3", "1,5", "1_000", "nan", "1.2.3", "abc", "٣", "²"]
TOO_FINE_OR_LARGE = ["0.0000000001", "9223372036.854775808", "1" * 5000]


@pytest.mark.parametrize("text", [*NO_AMOUNTS, *TOO_FINE_OR_LARGE])
def test_what_is_no_amount_is_refused(text):
    """Anything but digits with at most one point is refused, and so is what would be rounded."""
    with pytest.raises(ValueError, match="expected an amount"):
        parse_nano(text)


@pytest.mark.parametrize("text", ["1.1", "-0.1", "0.0000001", "50%", ""])
def test_what_is_no_share_is_refused(text):
    """A share lies from 0 to 1 and has at most six decimals."""
    with pytest.raises(ValueError, match="expected a share from 0 to 1"):
        parse_ppm(text)
