"""Receipts: the line item that a buyer gets for a request's reuse."""

from __future__ import annotations

import msgspec


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What one request reused, at which prices, and the transfers that paid for it.

    `tokens_reused` = `tokens_loaded` (from the store) + `tokens_from_paged_cache` is charged;
    `tokens_failed` could not be loaded and are among `tokens_computed`. `recompute_nano` is what
    prefilling the reused tokens would have cost. Prices are nano-units per million tokens.
    `transfer_ids` begins with the charge; the royalty, where there is one, comes next.
    """

    id: str
    request_id: str
    account: str
    document_id: str
    title: str
    publisher: str
    tokens_matched: int
    tokens_reused: int
    tokens_loaded: int
    tokens_from_paged_cache: int
    tokens_failed: int
    tokens_computed: int
    tokens_output: int
    input_nano_per_mtok: int
    cache_read_nano_per_mtok: int
    royalty_ppm: int
    charge_nano: int
    royalty_nano: int
    recompute_nano: int
    reservation_id: str
    transfer_ids: tuple[str, ...]
    created_at_s: float
    model: str
    namespace: str
