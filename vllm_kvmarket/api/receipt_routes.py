"""/v1/kvmarket/receipts, /transfers, /log and /jwks: charges, and their proofs."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Path, Query, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from vllm_kvmarket.api.account_routes import describe
from vllm_kvmarket.api.auth import ADMIN, Caller
from vllm_kvmarket.api.bodies import MarketRoute
from vllm_kvmarket.api.errors import invalid, not_found
from vllm_kvmarket.api.models import (
    WHOLE_ACCOUNT,
    Page,
    ReceiptModel,
    SignedReceiptModel,
    TransferModel,
    model_of,
    page_of,
)
from vllm_kvmarket.api.paging import After, Limit, receipts_page, transfers_page
from vllm_kvmarket.api.service import CallerOf, ServiceOf
from vllm_kvmarket.core.errors import KVMarketError, NotFoundError
from vllm_kvmarket.ledger import Receipt
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.proofs import ConsistencyProof, ProofError, TransparencyLog, signed_receipt

# An engine answers a moment before the ledger's commit.
PATIENCE_S = 2.0
POLL_S = 0.05

AccountQuery = Annotated[
    str | None, Query(pattern=WHOLE_ACCOUNT, description="for admins; default: all accounts")
]
Size = Annotated[int | None, Query(ge=0, lt=2**63)]
TEXT = {"text/plain": {"schema": {"type": "string"}}}
router = APIRouter(tags=["kvmarket receipts"], route_class=MarketRoute)
logger = logging.getLogger(__name__)


# A proof that the log only grew (RFC 9162).
Consistency = model_of(
    ConsistencyProof,
    "Consistency",
    object=(Literal["kvmarket.log.consistency"], "kvmarket.log.consistency"),
)


class Jwks(BaseModel):
    """The market's public keys, the newest first (RFC 7517)."""

    keys: list[dict[str, str | dict[str, str | int]]]


@router.get("/receipts", response_model=page_of(ReceiptModel))
def receipts(
    service: ServiceOf,
    caller: CallerOf,
    limit: Limit = 20,
    after: After = None,
    account: AccountQuery = None,
) -> Page[object]:
    """List receipts, the newest first. Needs any key; only admins see those of others."""
    page, cursor = receipts_page(service.market.ledger, _whose(caller, account), limit, after)
    return Page.of(msgspec.to_builtins(page), cursor)


@router.get("/receipts/{receipt_id}", response_model=SignedReceiptModel)
async def receipt(
    receipt_id: Annotated[
        str, Path(max_length=512, description="the receipt's id, or the request's")
    ],
    service: ServiceOf,
    caller: CallerOf,
) -> dict[str, Any]:
    """Look at a receipt, by its id or its request's, with its signed form. Needs any key."""
    whose = _whose(caller, None)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = await run_in_threadpool(_find, service.market, receipt_id, whose)
        if found is not None:
            signed = await run_in_threadpool(_signed, service.market, found.id)
            return {**msgspec.to_builtins(found), "signed": signed}
        if time.monotonic() > deadline:
            raise not_found("there is no such receipt of this account; nothing was charged")
        await asyncio.sleep(POLL_S)


@router.get("/transfers", response_model=page_of(TransferModel))
def transfers(
    service: ServiceOf,
    caller: CallerOf,
    limit: Limit = 20,
    after: After = None,
    account: AccountQuery = None,
) -> Page[object]:
    """List transfers, the newest first. Needs any key; only admins see those of others."""
    page, cursor = transfers_page(service.market.ledger, _whose(caller, account), limit, after)
    return Page.of([describe(each) for each in page], cursor)


@router.get(
    "/log/checkpoint",
    response_model=None,
    responses={200: {"content": TEXT, "description": "A note (c2sp.org/tlog-checkpoint)"}},
)
def checkpoint(service: ServiceOf, caller: CallerOf) -> PlainTextResponse:
    """The signed size and root of the log of all transfers."""
    caller.need_reader()
    log = TransparencyLog.of(service.market)
    return PlainTextResponse(log.checkpoint().note)


@router.get("/log/proof", response_model=Consistency, responses={200: {"content": TEXT}})
def proof(
    service: ServiceOf,
    caller: CallerOf,
    transfer: Annotated[str | None, Query(max_length=512)] = None,
    old: Size = None,
    new: Size = None,
) -> Response:
    """Prove that a `transfer` of the caller's account is in the log (text: c2sp.org/tlog-proof), or
    that the log of `new` transfers (default: of all) begins with the log of `old` transfers.
    """
    log = TransparencyLog.of(service.market)
    if (transfer is None) == (old is None) or (new is not None and old is None):
        raise invalid("give `transfer`, or `old` and perhaps `new`")
    if transfer is not None:
        caller.need_key()
        found = service.market.ledger.transfer(transfer)
        if not (caller.owns(found.debit) or caller.owns(found.credit)):
            raise not_found(f"there is no transfer {transfer!r}")
        return PlainTextResponse(log.prove(transfer).text())
    caller.need_reader()
    assert old is not None
    size = log.update()
    if not old <= (size if new is None else new) <= size:
        raise invalid(f"old, new: the log has {size} transfers; give sizes that it had", "old")
    proven = msgspec.to_builtins(log.prove_consistency(old, new))
    body = {"object": "kvmarket.log.consistency", **proven}
    return Response(msgspec.json.encode(body), media_type="application/json")


@router.get("/jwks", response_model=Jwks)
def jwks(service: ServiceOf, caller: CallerOf) -> Jwks:
    """The public keys that receipts and the log are signed with."""
    caller.need_reader()
    return Jwks(**key_set(service.market))


def key_set(market: Market) -> dict[str, Any]:
    """The market's public keys as a JWK set; makes the first key on first use."""
    keys = market.signing_keys
    keys.current()
    return keys.jwks()


def _whose(caller: Caller, account: str | None) -> str | None:
    """The account whose data is shown; None for all."""
    own = caller.need_key()
    if caller.is_admin:
        return account
    if account not in (None, own):
        caller.need(ADMIN)
    return own


def _find(market: Market, wanted: str, account: str | None) -> Receipt | None:
    """A receipt by its id, or the newest one of a request id, which clients may use twice."""
    try:
        found = market.ledger.receipt(wanted)
    except NotFoundError:
        # A completion's id in the answer has no number; vLLM's id of its first prompt has one.
        for request_id in (wanted, f"{wanted}-0"):
            of_request = market.ledger.receipts(account=account, request_id=request_id, limit=1)
            if of_request:
                return of_request[0]
        return None
    return found if account in (None, found.account) else None


def _signed(market: Market, receipt_id: str) -> dict[str, Any] | None:
    try:
        return signed_receipt(market, receipt_id).x402()
    except (ProofError, KVMarketError, OSError) as error:
        # The charge can be shown without its proof.
        logger.error("kvmarket: receipt %s could not be signed: %s", receipt_id, error)
        return None
