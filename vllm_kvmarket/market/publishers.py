"""What a publisher needs before its listing can go live, and how much it may hold."""

from __future__ import annotations

from vllm_kvmarket.catalogue import PublisherLimits
from vllm_kvmarket.core.config import MarketConfig
from vllm_kvmarket.core.errors import LedgerRefusedError, NotFoundError
from vllm_kvmarket.ledger import PROVIDER, WORLD, Ledger


def ensure_account(ledger: Ledger, publisher: str) -> None:
    """Open a publisher's account unless there is one: royalties must have somewhere to go.

    An account of another kind earns royalties as well. Raises LedgerRefusedError for what is no
    account's id and for the world outside, LedgerUnavailableError when the ledger is away.
    """
    if publisher == WORLD:
        raise LedgerRefusedError(f"{WORLD} is the world outside; name the account that earns")
    try:
        ledger.account(publisher)
    except NotFoundError:
        ledger.create_account(publisher, "publisher")


def limits_of(config: MarketConfig, publisher: str) -> PublisherLimits | None:
    """How much a publisher may hold; the provider's own documents have no limit."""
    if publisher == PROVIDER:
        return None
    return PublisherLimits(config.publisher_max_documents, config.publisher_max_bytes)
