"""/kvmarket/signin and /kvmarket/signout."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi.concurrency import run_in_threadpool

from vllm_kvmarket.api.pages.page import BASE, PageRoute, VisitorOf, own_page, too_many

router = APIRouter(route_class=PageRoute)


@router.get("/signin")
async def form(visitor: VisitorOf, next: Annotated[str, Query(max_length=500)] = "") -> Response:
    """Ask for a key."""
    return visitor.page("signin.html", next=BASE + own_page(next), wrong=False)


@router.post("/signin")
async def sign_in(visitor: VisitorOf) -> Response:
    """Begin a session with a key. The key itself is kept nowhere."""
    fields = await visitor.form()
    service = visitor.service
    address = visitor.request.client.host if visitor.request.client else ""
    wait_s = service.sessions.attempts.wait_s(address)
    if wait_s:
        raise too_many(wait_s)
    place = own_page(fields.get("next", ""))
    principal = await run_in_threadpool(service.keys.check, fields.get("key", "").strip())
    if principal is None:
        return visitor.page("signin.html", status=401, next=BASE + place, wrong=True)
    # What was signed in before, in this browser, ends.
    if visitor.session is not None:
        service.sessions.close(visitor.cookie)
    answer = visitor.go(place)
    visitor.sign_in(answer, service.sessions.open(principal))
    return answer


@router.post("/signout")
async def sign_out(visitor: VisitorOf) -> Response:
    """End the session."""
    await visitor.form()
    answer = visitor.go("")
    visitor.sign_out(answer)
    return answer
