"""Listings, and the prefix tree that finds the longest published prefix of a request."""

from vllm_kvmarket.catalogue.catalogue import Catalogue
from vllm_kvmarket.catalogue.listing import (
    Audit,
    Listing,
    ListingFilter,
    ListingState,
    Match,
    MatchedChunk,
    PublisherLimits,
    Segment,
    Usage,
    Use,
)

__all__ = [
    "Audit",
    "Catalogue",
    "Listing",
    "ListingFilter",
    "ListingState",
    "Match",
    "MatchedChunk",
    "PublisherLimits",
    "Segment",
    "Usage",
    "Use",
]
