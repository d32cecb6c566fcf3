"""Listings, and the index that finds the longest published prefix of a request."""

from vllm_kvmarket.catalogue.catalogue import INDEX_FOLDER, Catalogue
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
    "INDEX_FOLDER",
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
