"""Accounts and transfers: what is charged, to whom, exactly once."""

from vllm_kvmarket.ledger.ledger import PROVIDER, WORLD, Ledger
from vllm_kvmarket.ledger.model import (
    ACCOUNT_ID,
    Account,
    Operation,
    Outcome,
    Receipt,
    ReceiptLine,
    Result,
    Transfer,
    expire,
    pending,
    plain,
    post,
    renew,
    void,
)

__all__ = [
    "ACCOUNT_ID",
    "PROVIDER",
    "WORLD",
    "Account",
    "Ledger",
    "Operation",
    "Outcome",
    "Receipt",
    "ReceiptLine",
    "Result",
    "Transfer",
    "expire",
    "pending",
    "plain",
    "post",
    "renew",
    "void",
]
