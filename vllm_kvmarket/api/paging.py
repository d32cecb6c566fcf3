"""Pages of lists, with opaque cursors that stay right while the list grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import Query

from vllm_kvmarket.api.errors import invalid
from vllm_kvmarket.auth.signing_keys import decode_base64url, encode_base64url
from vllm_kvmarket.core.errors import NotFoundError
from vllm_kvmarket.ledger import Ledger, Receipt, Transfer

Item = TypeVar("Item")
Limit = Annotated[int, Query(ge=1, le=100, description="most items on a page")]
After = Annotated[
    str | None, Query(max_length=1024, description="`next_cursor` of the page before")
]


def encode(value: Any) -> str:
    """A cursor that holds a JSON value."""
    return encode_base64url(msgspec.json.encode(value))


def decode(cursor: str, kind: type[Item]) -> Item:
    """The value in a cursor. Raises ApiError."""
    try:
        return msgspec.json.decode(decode_base64url(cursor), type=kind)
    except (ValueError, msgspec.DecodeError):
        raise invalid(
            "after: no cursor of this list; give `next_cursor` of the page before", "after"
        ) from None


def decode_place(cursor: str, order: str) -> tuple[float, str]:
    """The number and id that a cursor of an ordered list holds. Raises ApiError.

    Also for a cursor of another order.
    """
    made_for, number, name = decode(cursor, tuple[str, int | float, str])
    if made_for != order:
        raise invalid(f"after: this cursor is of a list by {made_for}, not by {order}", "after")
    return number, name


def receipts_page(
    ledger: Ledger, account: str | None, limit: int, after: str | None
) -> tuple[list[Receipt], str | None]:
    """A page of an account's receipts, or of all. Raises ApiError."""
    return newest_first(
        lambda count, last: ledger.receipts(account=account, limit=count, before=last),
        ledger.receipt,
        lambda receipt: receipt.id,
        limit,
        after,
    )


def transfers_page(
    ledger: Ledger, account: str | None, limit: int, after: str | None
) -> tuple[list[Transfer], str | None]:
    """A page of an account's transfers, or of all. Raises ApiError."""
    return newest_first(
        lambda count, last: ledger.transfers(account, count, last),
        ledger.transfer,
        lambda transfer: transfer.id,
        limit,
        after,
    )


def newest_first(
    read: Callable[[int, str | None], Sequence[Item]],
    find: Callable[[str], Item],
    id_of: Callable[[Item], str],
    limit: int,
    after: str | None,
) -> tuple[list[Item], str | None]:
    """A page of a list, and the next cursor: the id of the page's last item.

    `read(n, id)` gives the newest n items that are older than the one of that id, which `find`
    gives. Newer items change nothing. Raises ApiError.
    """
    last = None if after is None else decode(after, str)
    if last is not None:
        try:
            find(last)
        except NotFoundError:
            raise invalid("after: this cursor's item is not in this list", "after") from None
    found = read(limit + 1, last)
    page = list(found[:limit])
    return page, encode(id_of(page[-1])) if len(found) > limit else None
