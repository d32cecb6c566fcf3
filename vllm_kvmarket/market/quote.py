"""What the reuse of a match costs: one quote for the API, the gate and the scheduler.

A match is sold by segments. Each range of tokens is paid to the listing that offered it first, at
that listing's terms; a later listing that contains it earns only for the tokens that it adds.
"""

from __future__ import annotations

import msgspec

from vllm_kvmarket.catalogue import Listing, Match, Segment
from vllm_kvmarket.core.pricing import Tariff, Terms
from vllm_kvmarket.ledger import PROVIDER


class QuoteLine(msgspec.Struct, frozen=True):
    """One segment's price: tokens `start` to `end`, at the terms of the listing that owns them."""

    listing: Listing
    terms: Terms
    start: int
    end: int
    charge_nano: int
    royalty_nano: int


class Quote(msgspec.Struct, frozen=True):
    """The price of reusing the first `tokens` of a prompt; amounts are sums over the lines.

    Computing these tokens costs `recompute_nano`. Without a match there is nothing to pay.
    """

    match: Match | None
    tokens: int
    lines: tuple[QuoteLine, ...]
    charge_nano: int
    royalty_nano: int
    recompute_nano: int


def sold_part(match: Match, tariff: Tariff, min_tokens: int) -> Match | None:
    """Return what of a match is sold, with the segments that are paid; None for nothing.

    A listing that is dearer than computing, or adds fewer than `min_tokens`, is not sold: what it
    owns goes with the next listing that reaches further, and the match ends with the last one that
    is sold, or where the model's state was stored before.
    """
    sold: list[Segment] = []
    covered = 0
    for segment in match.segments:
        terms = tariff.terms(segment.listing.terms)
        if segment.end - covered >= min_tokens and not terms.is_dearer_than_computing:
            sold.append(Segment(segment.listing, covered, segment.end))
            covered = segment.end
    end = match.last_end(covered)
    if not end:
        return None
    if end == covered and len(sold) == len(match.segments):
        return match
    segments = (Segment(s.listing, s.start, min(s.end, end)) for s in sold if s.start < end)
    return msgspec.structs.replace(match.until(end), segments=tuple(segments))


class Budget(msgspec.Struct, frozen=True):
    """What a buyer agreed to pay: for a listing's tokens, and in all. None means no limit."""

    max_cache_read_nano_per_mtok: int | None = None
    max_price_nano: int | None = None


NO_LIMIT = Budget()


def affordable_part(
    match: Match, tariff: Tariff, budget: Budget, most: int | None = None
) -> Match | None:
    """Return the part of a match before its first segment that is dearer than a buyer agreed to, or
    with which `most` tokens cost more in all.

    None when already the first one is. What lies behind cannot be reused without it.
    """
    dearest, end, charge = budget.max_cache_read_nano_per_mtok, 0, 0
    for segment in match.segments:
        terms = tariff.terms(segment.listing.terms)
        if dearest is not None and terms.cache_read_nano_per_mtok > dearest:
            break
        reused = segment.end if most is None else min(segment.end, most)
        charge += terms.charge_nano(max(0, reused - segment.start))
        if budget.max_price_nano is not None and charge > budget.max_price_nano:
            break
        end = segment.end
    end = match.last_end(end)
    return match.until(end) if end else None


def quote_of(match: Match | None, tariff: Tariff, most: int | None = None) -> Quote:
    """Price the reuse of at most `most` tokens of a match that is sold; all of them without it.

    Each line is rounded down for itself. The provider's own documents earn it the whole charge.
    """
    lines = []
    tokens = 0
    for segment in match.segments if match else ():
        end = segment.end if most is None else min(segment.end, most)
        if end <= segment.start:
            break
        terms = tariff.terms(segment.listing.terms)
        charge = terms.charge_nano(end - segment.start)
        own = segment.listing.terms.publisher == PROVIDER
        royalty = 0 if own else terms.royalty_nano(charge)
        lines.append(QuoteLine(segment.listing, terms, segment.start, end, charge, royalty))
        tokens = end
    return Quote(
        match=match,
        tokens=tokens,
        lines=tuple(lines),
        charge_nano=sum(line.charge_nano for line in lines),
        royalty_nano=sum(line.royalty_nano for line in lines),
        recompute_nano=tariff.terms().recompute_nano(tokens),
    )
