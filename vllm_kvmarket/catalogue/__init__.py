"""Listings, and the prefix tree that finds the longest published prefix of a request."""

from vllm_kvmarket.catalogue.catalogue import Catalogue
from vllm_kvmarket.catalogue.listing import Listing, ListingState, Match, MatchedChunk

__all__ = ["Catalogue", "Listing", "ListingState", "Match", "MatchedChunk"]
