"""Accounts and transfers: what is charged, to whom, exactly once."""

from vllm_kvmarket.ledger.receipts import Receipt
from vllm_kvmarket.ledger.rules import (
    Account,
    Operation,
    Outcome,
    Result,
    Transfer,
    expire,
    pending,
    plain,
    post,
    void,
)
from vllm_kvmarket.ledger.sqlite import PROVIDER, WORLD, Ledger

__all__ = [
    "PROVIDER",
    "WORLD",
    "Account",
    "Ledger",
    "Operation",
    "Outcome",
    "Receipt",
    "Result",
    "Transfer",
    "expire",
    "pending",
    "plain",
    "post",
    "void",
]
