"""/kvmarket/money: an account's balance, holds, transfers, royalties and receipts."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from vllm_kvmarket.api.errors import ApiError, not_found
from vllm_kvmarket.api.models import WHOLE_ACCOUNT
from vllm_kvmarket.api.pages.page import HEADERS, PageRoute, Visitor, VisitorOf
from vllm_kvmarket.api.paging import After, receipts_page, transfers_page
from vllm_kvmarket.core.errors import KVMarketError, NotFoundError
from vllm_kvmarket.ledger import Account, Ledger, Receipt, Transfer
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.proofs import (
    ProofError,
    TransparencyLog,
    signed_receipt,
    verify,
    verify_with_proof,
)

PAGE_ROWS = 20
# Holds and royalties are searched in this many of an account's newest transfers.
MOST_TRANSFERS = 1000
MOST_ACCOUNTS = 1000

AccountQuery = Annotated[str | None, Query(pattern=WHOLE_ACCOUNT)]
IdQuery = Annotated[str, Query(min_length=1, max_length=512)]
router = APIRouter(prefix="/money", route_class=PageRoute)


@dataclass(frozen=True, slots=True)
class Proof:
    """The result of checking a receipt; `problem` is a sentence, empty if there is none."""

    jws: str
    kid: str
    log_index: int | None
    log_size: int | None
    problem: str


@router.get("")
def money(
    visitor: VisitorOf,
    account: AccountQuery = None,
    transfers_after: After = None,
    receipts_after: After = None,
) -> Response:
    """Your own account; admins may choose one."""
    whose = _whose(visitor, account)
    ledger = visitor.service.market.ledger
    facts = _facts(ledger, whose, transfers_after, receipts_after)
    everyone: list[str] = []
    if visitor.caller.is_admin:
        everyone = [each.id for each in ledger.accounts()[:MOST_ACCOUNTS]]
    chosen = None if whose == visitor.caller.account else whose
    return visitor.page("money.html", everyone=everyone, chosen=chosen, whose=whose, **facts)


@router.get("/receipt")
def receipt(visitor: VisitorOf, id: IdQuery) -> Response:
    """A receipt, and whether its signature and its place in the log hold."""
    found = _own_receipt(visitor, id)
    proof = prove(visitor.service.market, found)
    return visitor.page(
        "receipt.html", receipt=found, proof=proof, file=f"{_file_name(found.id)}.jws"
    )


@router.get("/receipt.jws")
def jws(visitor: VisitorOf, id: IdQuery) -> Response:
    """A receipt's signed form, as a file."""
    found = _own_receipt(visitor, id)
    proof = prove(visitor.service.market, found)
    if not proof.jws:
        raise ApiError(503, "not_signed", f"this receipt cannot be signed now: {proof.problem}")
    name = f'attachment; filename="{_file_name(found.id)}.jws"'
    headers = {**HEADERS, "Content-Disposition": name}
    return Response(proof.jws + "\n", media_type="application/jose", headers=headers)


def _whose(visitor: Visitor, account: str | None) -> str:
    """The account that is shown. Raises ApiError: only admins see those of others."""
    own = visitor.caller.need_key()
    if account in (None, own):
        return own
    if not visitor.caller.is_admin:
        raise not_found("there is no such account of yours")
    return account or own


def _facts(
    ledger: Ledger, whose: str, transfers_after: str | None, receipts_after: str | None
) -> dict[str, Any]:
    try:
        account = ledger.account(whose)
    except NotFoundError:
        # A key may be made before its account is opened.
        account = Account(whose, "buyer")
    transfers, more_transfers = transfers_page(ledger, whose, PAGE_ROWS, transfers_after)
    receipts, more_receipts = receipts_page(ledger, whose, PAGE_ROWS, receipts_after)
    newest = ledger.transfers(whose, MOST_TRANSFERS)
    return {
        "money": account,
        "holds": _holds(ledger, account, newest),
        "royalties": _royalties(whose, newest),
        "transfers": transfers,
        "transfers_cursor": more_transfers,
        "transfers_after": transfers_after,
        "receipts": receipts,
        "receipts_cursor": more_receipts,
        "receipts_after": receipts_after,
    }


def _holds(
    ledger: Ledger, account: Account, newest: list[Transfer]
) -> list[tuple[Transfer, float]]:
    """The holds that are pending, and when each is due."""
    if not account.debits_pending and not account.credits_pending:
        return []
    pending = [(each, ledger.due_at_s(each.id)) for each in newest if each.kind == "pending"]
    return [(each, due_at_s) for each, due_at_s in pending if due_at_s is not None]


def _royalties(whose: str, newest: list[Transfer]) -> list[tuple[str, list[int]]]:
    """Each document's royalties, the document that earned most first."""
    earned: dict[str, list[int]] = defaultdict(list)
    for each in newest:
        if each.code == "royalty" and each.credit == whose:
            earned[each.user_data].append(each.amount_nano)
    return sorted(earned.items(), key=lambda each: (-sum(each[1]), each[0]))


def _own_receipt(visitor: Visitor, receipt_id: str) -> Receipt:
    """Raises ApiError, the same for another account's receipt as for a missing one."""
    own = visitor.caller.need_key()
    missing = not_found("there is no such receipt of this account")
    try:
        found = visitor.service.market.ledger.receipt(receipt_id)
    except NotFoundError:
        raise missing from None
    if found.account != own and not visitor.caller.is_admin:
        raise missing
    return found


def prove(market: Market, receipt: Receipt) -> Proof:
    """Sign a receipt, then check it as its owner would: with the public keys and the log."""
    kid, text, index, size = "", "", None, None
    try:
        text = signed_receipt(market, receipt.id).jws
        keys = market.signing_keys.public_keys()
        checked = verify(text, keys)
        kid = checked.kid
        if receipt.transfer_ids:
            found = TransparencyLog.of(market).prove(receipt.transfer_ids[0])
            verify_with_proof(checked, found, keys)
            index, size = found.index, found.checkpoint.size
    except (ProofError, KVMarketError, OSError) as error:
        return Proof(text, kid, index, size, str(error) or type(error).__name__)
    return Proof(text, kid, index, size, "")


def _file_name(receipt_id: str) -> str:
    return "".join(each if each.isalnum() and each.isascii() else "-" for each in receipt_id)[:80]
