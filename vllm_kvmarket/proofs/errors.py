"""What is raised for a receipt, a checkpoint or a proof that does not hold."""

from __future__ import annotations

from vllm_kvmarket.core.errors import KVMarketError


class ProofError(KVMarketError):
    """A receipt, checkpoint or proof is malformed, not signed by a known key, or does not hold."""
