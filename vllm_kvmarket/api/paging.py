"""Pages of lists, with opaque cursors that stay right while the list grows."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import Query

from vllm_kvmarket.api.errors import invalid

Item = TypeVar("Item")
Limit = Annotated[int, Query(ge=1, le=100, description="most items on a page")]
After = Annotated[
    str | None, Query(max_length=1024, description="`next_cursor` of the page before")
]
MOST_SKIPPED = 1_000_000


def encode(value: Any) -> str:
    """A cursor that holds a JSON value."""
    return base64.urlsafe_b64encode(msgspec.json.encode(value)).decode().rstrip("=")


def decode(cursor: str, kind: type[Item]) -> Item:
    """The value in a cursor. Raises ApiError."""
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        return msgspec.json.decode(raw, type=kind)
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


def newest_first(
    read: Callable[[int], Sequence[Item]],
    id_of: Callable[[Item], str],
    limit: int,
    after: str | None,
) -> tuple[list[Item], str | None]:
    """A page of a list, and the next cursor; `read(n)` gives the newest n items.

    The cursor has the last item's id and its position. Newer items only move it further back.
    Raises ApiError.
    """
    seen, last = decode(after, tuple[int, str]) if after is not None else (0, "")
    if not 0 <= seen <= MOST_SKIPPED:
        raise invalid("after: no cursor of this list", "after")
    asked = seen + limit + 1
    found = list(read(asked))
    start = _behind(found, id_of, seen, last)
    while after is not None and start is None and len(found) == asked:
        asked *= 2
        found = list(read(asked))
        start = _behind(found, id_of, seen, last)
    if after is None:
        start = 0
    if start is None:
        raise invalid("after: this cursor's item is not in this list", "after")
    if len(found) < start + limit + 1 and len(found) == asked:
        found = list(read(start + limit + 1))
    page = found[start : start + limit]
    more = len(found) > start + limit
    return page, encode((start + limit, id_of(page[-1]))) if more else None


def _behind(
    found: Sequence[Item], id_of: Callable[[Item], str], seen: int, last: str
) -> int | None:
    for place in range(max(seen - 1, 0), len(found)):
        if id_of(found[place]) == last:
            return place + 1
    return None
