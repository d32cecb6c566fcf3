"""Prices: from tokens to integer amounts.

Rounding rule: every amount is rounded down to a whole nano-unit, a charge in the buyer's favour and
a royalty in the provider's. Amounts that do not fit int64 are refused with ValueError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec

if TYPE_CHECKING:
    from vllm_kvmarket.core.listing_terms import ListingTerms

MTOK = 1_000_000
PPM = 1_000_000
NANO = 1_000_000_000
INT64_MAX = 2**63 - 1
CACHE_READ_SHARE_OF_INPUT = 10  # cache_read costs 1/10 of input unless the tariff says otherwise

Price = Annotated[int, msgspec.Meta(ge=0, le=INT64_MAX)]
Share = Annotated[int, msgspec.Meta(ge=0, le=PPM)]


def amount_nano(tokens: int, nano_per_mtok: int) -> int:
    """Price `tokens`, rounded down to a nano-unit. Raises ValueError below 0 and beyond int64."""
    if tokens < 0:
        raise ValueError(f"cannot price {tokens} tokens")
    amount = tokens * nano_per_mtok // MTOK
    if amount > INT64_MAX:
        raise ValueError(f"{tokens} tokens at {nano_per_mtok} nano-units a million overflow int64")
    return amount


class Terms(msgspec.Struct, frozen=True):
    """The unit prices of one reservation; they stay when the tariff changes."""

    input_nano_per_mtok: int
    cache_read_nano_per_mtok: int
    royalty_ppm: int

    @property
    def is_dearer_than_computing(self) -> bool:
        """Whether reuse costs more than computing; nobody is sold that."""
        return self.cache_read_nano_per_mtok > self.input_nano_per_mtok

    def charge_nano(self, tokens: int) -> int:
        """Price reusing `tokens`, for the buyer."""
        return amount_nano(tokens, self.cache_read_nano_per_mtok)

    def royalty_nano(self, charge_nano: int) -> int:
        """Take the publisher's share of a charge."""
        return charge_nano * self.royalty_ppm // PPM

    def recompute_nano(self, tokens: int) -> int:
        """Price prefilling `tokens`, for the buyer."""
        return amount_nano(tokens, self.input_nano_per_mtok)


class Tariff(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The provider's prices, in nano-units of the settlement currency per million tokens."""

    input_nano_per_mtok: Annotated[
        Price, msgspec.Meta(description="price of computing (prefilling) tokens")
    ] = 5_000_000_000
    cache_read_nano_per_mtok: Annotated[
        Price | None,
        msgspec.Meta(description="price of reusing published tokens; null: a tenth of input"),
    ] = None
    cache_write_nano_per_mtok: Annotated[
        Price, msgspec.Meta(description="price of publishing, paid by the publisher")
    ] = 0
    output_nano_per_mtok: Annotated[
        Price | None,
        msgspec.Meta(description="price of generated tokens; only shown, never charged"),
    ] = None
    royalty_ppm: Annotated[
        Share, msgspec.Meta(description="the publisher's share of cache_read, in parts per million")
    ] = 500_000

    def terms(self, listing: ListingTerms | None = None) -> Terms:
        """Fix the prices of one listing, which may set its own cache_read and royalty."""
        cache_read = listing.cache_read_nano_per_mtok if listing else None
        if cache_read is None:
            cache_read = self.cache_read_nano_per_mtok
        if cache_read is None:
            cache_read = self.input_nano_per_mtok // CACHE_READ_SHARE_OF_INPUT
        royalty = listing.royalty_ppm if listing else None
        return Terms(
            self.input_nano_per_mtok, cache_read, self.royalty_ppm if royalty is None else royalty
        )

    def write_nano(self, tokens: int) -> int:
        """Price publishing `tokens`, for the publisher."""
        return amount_nano(tokens, self.cache_write_nano_per_mtok)


def parse_nano(text: str) -> int:
    """Read an amount in currency units, "0.5" for half a unit, exactly as nano-units.

    Raises ValueError for what is no such amount: negative, beyond int64, finer than a nano-unit.
    """
    return _parse_exactly(text, 9, INT64_MAX, "an amount like 12.5, with up to 9 decimals")


def parse_ppm(text: str) -> int:
    """Read a share from 0 to 1 exactly as parts per million. Raises ValueError."""
    return _parse_exactly(text, 6, PPM, "a share from 0 to 1, with up to 6 decimals")


def _parse_exactly(text: str, decimals: int, limit: int, expected: str) -> int:
    whole, _, fraction = text.strip().partition(".")
    digits = whole + fraction
    fraction = fraction.rstrip("0").ljust(decimals, "0")
    # At most 19 digits fit int64; longer ones are not even read.
    plain = digits.isascii() and digits.isdigit() and len(whole) < 20 and len(fraction) == decimals
    value = int(whole + fraction) if plain else -1
    if not 0 <= value <= limit:
        raise ValueError(f"expected {expected}, not {text!r}")
    return value


def format_nano(amount_nano: int) -> str:
    """Show nano-units in currency units, exactly: at least 2 decimals, at most 9."""
    units, rest = divmod(abs(amount_nano), NANO)
    decimals = f"{rest:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if amount_nano < 0 else ''}{units}.{decimals}"
