"""Statements of accounts, and payouts.

A statement has everything that was moved to and from an account in a period, with the balance that
was brought forward: closing balance = brought forward + the lines' amounts, and the next period's
balance brought forward. Reservations move nothing and are not on it. Amounts are nano-units of the
account's currency, positive for what came in.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Literal

import msgspec

from vllm_kvmarket.core.errors import LedgerRefusedError, NotFoundError
from vllm_kvmarket.core.pricing import format_nano
from vllm_kvmarket.ledger import PROVIDER, WORLD, Ledger, Outcome, Receipt, Transfer, plain
from vllm_kvmarket.ledger.model import OWED, ROYALTY
from vllm_kvmarket.ledger.periods import signed

PAYOUT = "payout"
SALES = ("reuse", OWED)
# A royalty that waited in suspense is paid under the id of the first transfer and this.
PAID_SUFFIX = ":paid"
# Neutralised in CSV: a spreadsheet would take a title that begins so for a formula.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")

LineKind = Literal["purchase", "sale", "royalty", "deposit", "payout", "storage", "other"]
_KINDS: dict[str, LineKind] = {
    ROYALTY: "royalty",
    "deposit": "deposit",
    "payout": "payout",
    "publish": "storage",
}


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One movement of the account, or a sale of its document that brought it nothing.

    `kind` is a buyer's purchase, the provider's sale, a royalty, deposit, payout, the price of
    storing a document, or other. For what a receipt explains: the document, the tokens that were
    reused and what the buyer paid for them, `sale_nano`.
    """

    at_s: float
    kind: LineKind
    transfer_id: str
    counterparty: str
    amount_nano: int
    balance_nano: int
    reference: str = ""
    document_id: str = ""
    title: str = ""
    receipt_id: str = ""
    tokens_reused: int = 0
    sale_nano: int = 0
    log_index: int | None = None


class Statement(msgspec.Struct, frozen=True, kw_only=True):
    """An account from `from_s` up to, and without, `to_s`; None is the beginning, or now.

    `sales` counts receipts of the account's own documents, or, for the provider, of all;
    `totals_nano` sums the lines by kind. `debt_nano` is what the account owed at the end, for
    settlements that came after its funds were spent.
    """

    account: str
    account_kind: str
    currency: str
    from_s: float | None
    to_s: float | None
    brought_forward_nano: int
    closing_nano: int
    sales: int
    tokens_sold: int
    sold_nano: int
    totals_nano: dict[str, int]
    lines: list[Line]
    debt_nano: int = 0


class _Sale(msgspec.Struct, frozen=True):
    """A line of a receipt, or for a charge the receipt as a whole."""

    receipt_id: str
    at_s: float
    transfer_id: str
    seller: str
    document_id: str
    title: str
    tokens: int
    charge_nano: int


def statement(
    ledger: Ledger,
    account_id: str,
    from_s: float | None = None,
    to_s: float | None = None,
    *,
    documents: Iterable[str] = (),
    indexes_of: Callable[[list[str]], Mapping[str, int]] | None = None,
) -> Statement:
    """Draw up a statement. Raises NotFoundError and LedgerError.

    Everything is cut by the time of booking, which never goes back: a period that is over keeps its
    lines and balances. `documents` are documents of the account, so that sales without a royalty
    are on it as well; `indexes_of` finds transfers' places in the log.
    """
    account = ledger.account(account_id)
    period = ledger.moves(account_id, from_s, to_s)
    sales = _sales(ledger, account_id, period, documents, (from_s, to_s))
    by_transfer = {sale.transfer_id: sale for sale in sales if sale.transfer_id}
    brought_forward = 0 if from_s is None else ledger.moved_before(account_id, from_s)
    balance = brought_forward
    places = {} if indexes_of is None else indexes_of([each.id for each in period])
    lines = []
    for each in period:
        balance += signed(each, account_id)
        sale = by_transfer.get(each.id.removesuffix(PAID_SUFFIX))
        lines.append(_line(each, account_id, balance, sale, places.get(each.id)))
    sold = [
        sale
        for sale in sales
        if sale.seller == account_id
        and (from_s is None or sale.at_s >= from_s)
        and (to_s is None or sale.at_s < to_s)
    ]
    listed = {line.transfer_id for line in lines}
    lines += [_free_sale(sale, balance) for sale in sold if sale.transfer_id not in listed]
    totals: dict[str, int] = {}
    for line in lines:
        totals[line.kind] = totals.get(line.kind, 0) + line.amount_nano
    return Statement(
        account=account_id,
        account_kind=account.kind,
        currency=account.currency,
        from_s=from_s,
        to_s=to_s,
        brought_forward_nano=brought_forward,
        closing_nano=balance,
        sales=len({sale.receipt_id for sale in sold}),
        tokens_sold=sum(sale.tokens for sale in sold),
        sold_nano=sum(sale.charge_nano for sale in sold),
        totals_nano=totals,
        lines=lines,
        debt_nano=0 if account.may_go_negative else max(0, -balance),
    )


def _sales(
    ledger: Ledger,
    account_id: str,
    moves: list[Transfer],
    documents: Iterable[str],
    bounds: tuple[float | None, float | None],
) -> list[_Sale]:
    """The sales that explain an account's movements, in the order of their booking."""
    if account_id == PROVIDER:
        found = ledger.receipts_booked(*bounds)
    else:
        royalties = [each for each in moves if each.code == ROYALTY]
        named = {each.user_data for each in royalties} | set(documents)
        found = ledger.receipts_booked(*bounds, account_id, sorted(named))
        # What waited in suspense may have been sold before.
        waited = {each.user_data for each in royalties if each.id.endswith(PAID_SUFFIX)}
        for document_id in sorted(waited):
            found += ledger.receipts(document_id=document_id)
    receipts = {each.id: each for each in found}.values()
    sales = [sale for receipt in receipts for sale in _sales_of(receipt)]
    return sorted(sales, key=lambda sale: sale.at_s)


def _sales_of(receipt: Receipt) -> Iterator[_Sale]:
    yield _Sale(
        receipt.id,
        receipt.created_at_s,
        receipt.transfer_ids[0] if receipt.transfer_ids else "",
        PROVIDER,
        receipt.document_id,
        receipt.title,
        receipt.tokens_reused,
        receipt.charge_nano,
    )
    royalties = iter(receipt.transfer_ids[1:])
    for line in receipt.all_lines():
        if line.publisher == PROVIDER:
            continue  # the provider sells the receipt as a whole
        yield _Sale(
            receipt.id,
            receipt.created_at_s,
            next(royalties, "") if line.royalty_nano else "",
            line.publisher,
            line.document_id,
            line.title,
            line.end - line.start,
            line.charge_nano,
        )


def _line(
    transfer: Transfer, account_id: str, balance: int, sale: _Sale | None, index: int | None
) -> Line:
    kind = _KINDS.get(transfer.code, "other")
    if transfer.code in SALES:
        kind = "sale" if transfer.credit == account_id else "purchase"
    line = Line(
        at_s=transfer.created_at_s,
        kind=kind,
        transfer_id=transfer.id,
        counterparty=transfer.debit if transfer.credit == account_id else transfer.credit,
        amount_nano=signed(transfer, account_id),
        balance_nano=balance,
        reference=transfer.user_data if transfer.code == PAYOUT else "",
        document_id=transfer.user_data if transfer.code in (*SALES, ROYALTY, "publish") else "",
        log_index=index,
    )
    if sale is None:
        return line
    return msgspec.structs.replace(
        line,
        title=sale.title,
        receipt_id=sale.receipt_id,
        tokens_reused=sale.tokens,
        sale_nano=sale.charge_nano,
    )


def _free_sale(sale: _Sale, balance: int) -> Line:
    """A sale that moved nothing to or from the account."""
    return Line(
        at_s=sale.at_s,
        kind="sale",
        transfer_id=sale.transfer_id,
        counterparty="",
        amount_nano=0,
        balance_nano=balance,
        document_id=sale.document_id,
        title=sale.title,
        receipt_id=sale.receipt_id,
        tokens_reused=sale.tokens,
        sale_nano=sale.charge_nano,
    )


def as_csv(made: Statement) -> str:
    """Write a statement as CSV, in currency units: a line for what was brought forward, one for
    each movement, one for the closing balance. Times are UTC, ISO 8601.
    """
    text = io.StringIO()
    columns = [field for field in Line.__struct_fields__ if not field.endswith("_nano")]
    amounts = [field for field in Line.__struct_fields__ if field.endswith("_nano")]
    names = ["currency", *(field.removesuffix("_nano") for field in amounts)]
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow([*("at" if field == "at_s" else field for field in columns), *names])
    empty = [""] * (len(columns) - 2)
    brought, closing = format_nano(made.brought_forward_nano), format_nano(made.closing_nano)
    writer.writerow([_iso(made.from_s), "brought forward", *empty, made.currency, "", brought, ""])
    for line in made.lines:
        facts = [_iso(line.at_s), *(_cell(getattr(line, field)) for field in columns[1:])]
        money = [format_nano(getattr(line, field)) for field in amounts]
        writer.writerow([*facts, made.currency, *money])
    writer.writerow([_iso(made.to_s), "closing", *empty, made.currency, "", closing, ""])
    return text.getvalue()


def _cell(value: object) -> str:
    text = "" if value is None else str(value)
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text


def _iso(time_s: float | None) -> str:
    if time_s is None:
        return ""
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds")


def payout(
    ledger: Ledger, account_id: str, reference: str, amount_nano: int | None = None
) -> tuple[Transfer, bool]:
    """Move money out of the market, once for an account and reference; and whether it did so now.

    `amount_nano` is all that is available by default. `reference` names the payment in the world
    outside, such as a bank's. Raises NotFoundError; LedgerError for an account without that much,
    and for a reference that was used for another amount.
    """
    account = ledger.account(account_id)
    if account_id == WORLD:
        raise LedgerRefusedError(f"{WORLD} is the world outside; name the account that is paid out")
    if not reference.strip():
        raise LedgerRefusedError("a payout needs a reference; give the payment's, such as a bank's")
    # Accounts and references may contain colons: the length tells them apart.
    transfer_id = f"payout:{len(account_id)}:{account_id}:{reference}"
    before = _find(ledger, transfer_id)
    if before is None:
        amount = account.available_nano if amount_nano is None else amount_nano
        if amount <= 0:
            raise LedgerRefusedError(f"account {account_id!r} has nothing to pay out")
        operation = plain(
            id=transfer_id,
            debit=account_id,
            credit=WORLD,
            amount_nano=amount,
            code=PAYOUT,
            user_data=reference,
        )
        (result,) = ledger.submit([operation]).result()
        if result.outcome is Outcome.OK:
            return ledger.transfer(transfer_id), True
        # Another process may have been faster, with the balance that it saw.
        before = _find(ledger, transfer_id)
        if before is None:
            reason = result.outcome.name.lower().replace("_", " ")
            raise LedgerRefusedError(
                f"{format_nano(amount)} of account {account_id!r} cannot be paid out: {reason} "
                f"({format_nano(account.available_nano)} is available)"
            )
    if amount_nano is not None and amount_nano != before.amount_nano:
        raise LedgerRefusedError(
            f"reference {reference!r} was used for {format_nano(before.amount_nano)}; "
            "give another payment another reference"
        )
    return before, False


def _find(ledger: Ledger, transfer_id: str) -> Transfer | None:
    try:
        return ledger.transfer(transfer_id)
    except NotFoundError:
        return None
