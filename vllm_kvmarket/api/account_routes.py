"""/v1/kvmarket/accounts: money, keys, statements."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Path, Query, Response

from vllm_kvmarket.api.auth import ADMIN
from vllm_kvmarket.api.bodies import MarketRoute
from vllm_kvmarket.api.errors import invalid, not_found
from vllm_kvmarket.api.models import (
    WHOLE_ACCOUNT,
    AccountModel,
    Key,
    KeyFacts,
    Limits,
    Me,
    NewAccount,
    NewDeposit,
    NewKey,
    Page,
    StatementModel,
    TransferModel,
)
from vllm_kvmarket.api.paging import After, Limit, decode, encode
from vllm_kvmarket.api.service import CallerOf, ServiceOf
from vllm_kvmarket.auth.api_keys import KeyLimits
from vllm_kvmarket.catalogue import ListingFilter
from vllm_kvmarket.core.errors import ConfigError
from vllm_kvmarket.ledger import Account, Transfer
from vllm_kvmarket.ledger.statements import as_csv, statement
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.proofs import TransparencyLog

ME = "me"
CSV = {"text/csv": {"schema": {"type": "string"}}}

AccountPath = Annotated[str, Path(pattern=WHOLE_ACCOUNT)]
Moment = Annotated[float | None, Query(ge=0, le=1e11, allow_inf_nan=False)]
Form = Literal["json", "csv"]
router = APIRouter(prefix="/accounts", tags=["kvmarket accounts"], route_class=MarketRoute)


def facts_of(account: Account) -> dict[str, Any]:
    """An account's fields as the API shows them."""
    return {
        "id": account.id,
        "kind": account.kind,
        "currency": account.currency,
        "balance_nano": account.balance_nano,
        "reserved_nano": account.debits_pending,
        "available_nano": account.available_nano,
        "debt_nano": account.debt_nano,
    }


def describe(transfer: Transfer) -> dict[str, Any]:
    """A transfer's fields as the API shows them."""
    return {**msgspec.structs.asdict(transfer), "created_at": transfer.created_at_s}


@router.get("/me", response_model=Me)
def me(service: ServiceOf, caller: CallerOf) -> Me:
    """The account of the key that asks. Needs any key."""
    account = service.market.ledger.account(caller.need_key())
    return Me(**facts_of(account), scopes=sorted(caller.scopes))


@router.get("", response_model=Page[AccountModel])
def accounts(
    service: ServiceOf, caller: CallerOf, limit: Limit = 20, after: After = None
) -> Page[AccountModel]:
    """List all accounts by id. Needs the scope admin."""
    caller.need(ADMIN)
    last = "" if after is None else decode(after, str)
    everyone = service.market.ledger.accounts()
    left = sorted((each for each in everyone if each.id > last), key=lambda each: each.id)
    cursor = encode(left[limit - 1].id) if len(left) > limit else None
    return Page.of([AccountModel(**facts_of(each)) for each in left[:limit]], cursor)


@router.post("", status_code=201, response_model=AccountModel)
def open_account(wish: NewAccount, service: ServiceOf, caller: CallerOf) -> AccountModel:
    """Open an account; an existing one of the same kind is returned. Needs the scope admin."""
    caller.need(ADMIN)
    if wish.id == ME:
        raise invalid(f"id: {ME!r} stands for the caller's own account", "id")
    service.record(caller, "account create", wish.model_dump())
    return AccountModel(**facts_of(service.market.create_account(wish.id, wish.kind)))


@router.get("/{account_id}", response_model=AccountModel)
def account(account_id: AccountPath, service: ServiceOf, caller: CallerOf) -> AccountModel:
    """Look at an account. Needs the scope admin, or its own key."""
    if caller.need_key() != account_id:
        caller.need(ADMIN)
    return AccountModel(**facts_of(service.market.ledger.account(account_id)))


@router.get(
    "/{account_id}/statement", response_model=StatementModel, responses={200: {"content": CSV}}
)
def account_statement(
    *,
    account_id: AccountPath,
    service: ServiceOf,
    caller: CallerOf,
    from_: Annotated[Moment, Query(alias="from")] = None,
    to: Moment = None,
    format: Annotated[Form, Query()] = "json",
) -> Response:
    """The statement of an account, or of `me`, from `from` up to `to`.

    Needs the scope admin, or its own key.
    """
    own = caller.need_key()
    account_id = own if account_id == ME else account_id
    if account_id != own:
        caller.need(ADMIN)
    return _statement(service.market, account_id, from_, to, format)


@router.post("/{account_id}/deposits", status_code=201, response_model=TransferModel)
def deposit(
    account_id: AccountPath, wish: NewDeposit, service: ServiceOf, caller: CallerOf
) -> dict[str, Any]:
    """Book money that came in, once for a transfer id. Needs the scope admin."""
    caller.need(ADMIN)
    # With a prefix, so that a caller's id is never the id of another kind of transfer.
    transfer_id = f"deposit:{wish.transfer_id}"
    details = {"account": account_id, **wish.model_dump()}
    service.record(caller, "account deposit", details)
    return describe(service.market.deposit(account_id, wish.amount_nano, transfer_id))


@router.post("/{account_id}/keys", status_code=201, response_model=Key)
def create_key(
    account_id: AccountPath, wish: NewKey, service: ServiceOf, caller: CallerOf, response: Response
) -> Key:
    """Make a key of an account; its secret is shown only now. Needs the scope admin."""
    caller.need(ADMIN)
    service.market.ledger.account(account_id)  # it must exist
    scopes = sorted(set(wish.scopes))
    details = {"account": account_id, **wish.model_dump()}
    service.record(caller, "apikey create", details)
    try:
        limits = KeyLimits(**wish.limits.model_dump() | {"networks": tuple(wish.limits.networks)})
        secret, key_id = service.keys.create(account_id, scopes, wish.label, limits)
    except ConfigError as error:
        raise invalid(str(error)) from None
    response.headers["cache-control"] = "no-store"
    return Key(id=key_id, account=account_id, scopes=scopes, label=wish.label, secret=secret)


@router.get("/{account_id}/keys", response_model=Page[KeyFacts])
def keys(account_id: AccountPath, service: ServiceOf, caller: CallerOf) -> Page[KeyFacts]:
    """List an account's keys, the newest first, revoked ones too. Needs the scope admin."""
    caller.need(ADMIN)
    data = [
        KeyFacts(
            id=key.key_id,
            account=key.account,
            scopes=list(key.scopes),
            label=key.label,
            created_at=key.created_at_s,
            revoked_at=key.revoked_at_s,
            limits=Limits(**msgspec.to_builtins(key.limits)),
            last_used_at=key.last_used_at_s,
            spent_today_nano=key.spent_today_nano,
            spent_nano=key.spent_nano,
        )
        for key in service.keys.listed(account_id)
    ]
    return Page.of(data)


@router.delete("/{account_id}/keys/{key_id}", status_code=204, response_class=Response)
def revoke_key(
    account_id: AccountPath,
    key_id: Annotated[str, Path(max_length=128)],
    service: ServiceOf,
    caller: CallerOf,
) -> Response:
    """Revoke a key of an account, on every server within a second. Needs the scope admin."""
    caller.need(ADMIN)
    service.record(caller, "apikey revoke", {"account": account_id, "key_id": key_id})
    if not any(key.account == account_id for key in service.keys.listed(key_id=key_id)):
        raise not_found(f"account {account_id} has no key {key_id}")
    service.keys.revoke(key_id)
    return Response(status_code=204)


def _statement(
    market: Market, account_id: str, from_s: float | None, to_s: float | None, form: Form
) -> Response:
    if from_s is not None and to_s is not None and from_s > to_s:
        raise invalid("from: it is after `to`", "from")
    wanted = ListingFilter(publisher=account_id, any_state=True, seen_by=account_id)
    made = statement(
        market.ledger,
        account_id,
        from_s,
        to_s,
        documents=market.catalogue.ids(wanted),
        indexes_of=TransparencyLog.of(market).indexes_of,
    )
    if form == "csv":
        name = f'attachment; filename="statement-{account_id.replace(":", "-")}.csv"'
        return Response(as_csv(made), media_type="text/csv", headers={"content-disposition": name})
    body = {"object": "kvmarket.statement", **msgspec.to_builtins(made)}
    return Response(msgspec.json.encode(body), media_type="application/json")
