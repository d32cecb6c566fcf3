"""The frame of all pages: visitor, headers, forms, and error pages."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any
from urllib.parse import quote, unquote_to_bytes, urlsplit

import jinja2
from fastapi import Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse

from vllm_kvmarket.api.auth import PUBLISHER, Caller
from vllm_kvmarket.api.bodies import FORM_TYPE, MarketRoute, media_type
from vllm_kvmarket.api.errors import ApiError
from vllm_kvmarket.api.pages import formatting
from vllm_kvmarket.api.service import Service, ServiceOf, service_of
from vllm_kvmarket.api.sessions import LIFETIME_S, Session

BASE = "/kvmarket"
SESSION_COOKIE = "kvmarket_session"
FORM_COOKIE = "kvmarket_form"
CSRF_FIELD = "csrf"
MOST_FIELDS = 20
PIECE_BYTES = 1 << 16
_COOKIE = re.compile(r"[A-Za-z0-9_-]{16,128}")
_SESSION = re.compile(r"[A-Za-z0-9_-]{16,512}\.[0-9a-f]{64}")
# Where a sign-in may lead to: this server's pages, and nothing else.
_PAGE = re.compile(r"/kvmarket(?:/[A-Za-z0-9_.-]+){0,4}")

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

_templates = jinja2.Environment(
    loader=jinja2.PackageLoader(__package__ or __name__),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters.update(
    count=formatting.count,
    money=formatting.money,
    exactly=formatting.exactly,
    bytes=formatting.bytes_of,
    when=formatting.when,
    iso=formatting.iso,
    day=formatting.day,
    seconds=formatting.seconds,
    share=formatting.share,
)
_STATIC = {
    name: ((resources.files(__package__) / "static" / name).read_bytes(), kind)
    for name, kind in (("market.css", "text/css"), ("icon.svg", "image/svg+xml"))
}


def asset(name: str) -> Response:
    """A packaged file. Raises ApiError."""
    if name not in _STATIC:
        raise ApiError(404, "not_found", "there is no such file")
    content, kind = _STATIC[name]
    headers = {"Cache-Control": "max-age=3600", "X-Content-Type-Options": "nosniff"}
    return Response(content, media_type=kind, headers=headers)


@dataclass(slots=True)
class Visitor:
    """Who looks at a page. `cookie` is the value of the form's cookie, without a session."""

    request: Request
    service: Service
    caller: Caller
    session: Session | None
    cookie: str

    @property
    def base(self) -> str:
        """The beginning of links: a proxy may serve the pages under another path."""
        return f"{self.request.scope.get('root_path', '').rstrip('/')}{BASE}"

    @property
    def csrf(self) -> str:
        """The token of this visitor's forms."""
        return self.service.market.credentials.sign("form", self._form_subject)

    @property
    def _form_subject(self) -> str:
        return f"session:{self.session.id}" if self.session else f"visitor:{self.cookie}"

    def page(
        self,
        template: str,
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        **facts: Any,
    ) -> HTMLResponse:
        """A page; `facts` are the template's."""
        values = {
            "base": self.base,
            "here": self.request.url.path,
            "account": self.caller.account,
            "is_admin": self.caller.is_admin,
            "may_publish": self.caller.may(PUBLISHER),
            "csrf": self.csrf,
            "csrf_field": CSRF_FIELD,
            **facts,
        }
        body = _templates.get_template(template).render(values)
        answer = HTMLResponse(body, status, {**HEADERS, **(headers or {})})
        if self.session is not None:
            renewed = self.service.sessions.renewed(self.session)
            if renewed is not None:
                self._set(answer, SESSION_COOKIE, renewed, int(LIFETIME_S))
        elif f'name="{CSRF_FIELD}"' in body:
            self._set(answer, FORM_COOKIE, self.cookie)
        return answer

    def go(self, path: str) -> Response:
        """Send the browser to one of our own pages; `path` follows /kvmarket."""
        return RedirectResponse(f"{self.base}{path}", 303, HEADERS)

    def sign_in(self, answer: Response, value: str) -> None:
        """Give the browser its session; mutates the answer."""
        self._set(answer, SESSION_COOKIE, value, int(LIFETIME_S))
        answer.delete_cookie(FORM_COOKIE, path=self.base)

    async def sign_out(self, answer: Response) -> None:
        """End the session, on the server and in the browser; mutates both."""
        await self.end_session()
        answer.delete_cookie(SESSION_COOKIE, path=self.base)

    async def end_session(self) -> None:
        """End the session on the server, if there is one."""
        if self.session is not None:
            await run_in_threadpool(self.service.sessions.close, self.session)

    def _set(self, answer: Response, name: str, value: str, age_s: int | None = None) -> None:
        answer.set_cookie(
            name,
            value,
            max_age=age_s,
            path=self.base,
            httponly=True,
            samesite="strict",
            secure=self.request.url.scheme == "https",
        )

    async def form(self, limit: int = 1 << 16) -> dict[str, str]:
        """The fields of a form from this visitor's own page.

        Raises ApiError if it is too long, not a form, or another visitor's.
        """
        if not self._is_own_form():
            raise _foreign()
        if media_type(self.request.scope) != FORM_TYPE:
            raise ApiError(415, "not_a_form", "send the page's own form")
        body = await self.request.body()
        if len(body) > limit:
            raise ApiError(413, "body_too_long", f"this is longer than {limit} bytes")
        try:
            fields = await run_in_threadpool(_fields, body)
        except ValueError:
            raise ApiError(400, "not_a_form", "this is not what the page's form sends") from None
        token = fields.pop(CSRF_FIELD, "")
        if not self.service.market.credentials.verifies("form", self._form_subject, token):
            raise _foreign()
        return fields

    def _is_own_form(self) -> bool:
        """Whether the browser says that a form was on this server's own page.

        Every browser says one of the two; a request that says neither is refused.
        """
        site = self.request.headers.get("sec-fetch-site")
        if site is not None:
            return site == "same-origin"
        origin = urlsplit(self.request.headers.get("origin", "")).netloc
        return bool(origin) and origin == self.request.headers.get("host")


def _foreign() -> ApiError:
    return ApiError(
        403, "form_expired", "this form is not from your session; load the page and try again"
    )


def _fields(body: bytes) -> dict[str, str]:
    """Raises ValueError."""
    pairs = [pair.partition(b"=") for pair in body.split(b"&", MOST_FIELDS) if pair]
    fields = {_decoded(name): _decoded(value) for name, _, value in pairs}
    if len(pairs) > MOST_FIELDS or len(fields) != len(pairs) or not body.isascii():
        raise ValueError("too many fields, one twice, or not a form")
    return fields


def _decoded(part: bytes) -> str:
    """Decode a field's name or value in pieces, as one call for all would stop every thread."""
    content = bytearray()
    start = 0
    while start < len(part):
        end = start + PIECE_BYTES
        if end < len(part):
            cut = part.rfind(b"%", end - 2, end)  # an escape has three characters
            end = cut if cut > 0 else end
        content += unquote_to_bytes(part[start:end].replace(b"+", b" "))
        start = end
    return content.decode("utf-8")


async def visitor_of(request: Request, service: ServiceOf) -> Visitor:
    """The visitor of a request, with its session; counts the request. Raises ApiError."""
    session = None
    caller = Caller(anonymous_may_read=service.anonymous_may_read)
    given = request.cookies.get(SESSION_COOKIE, "")
    if _SESSION.fullmatch(given):
        address = service.address_of(request.scope)
        found = await run_in_threadpool(service.sessions.find, given, address)
        if found is not None:
            session, caller = found[0], Caller.of_key(found[1])
    given = request.cookies.get(FORM_COOKIE, "")
    cookie = given if _COOKIE.fullmatch(given) else secrets.token_urlsafe(24)
    service.count(request.scope, caller)
    visitor = request.state.visitor = Visitor(request, service, caller, session, cookie)
    return visitor


VisitorOf = Annotated[Visitor, Depends(visitor_of)]


def own_page(path: str) -> str:
    """Where to go after signing in: `path` if it is one of ours, else the money page."""
    return path.removeprefix(BASE) if _PAGE.fullmatch(path) and ".." not in path else "/money"


class PageRoute(MarketRoute):
    """A route that shows errors as pages, and sends visitors who need a session to sign in."""

    def refuse(self, error: ApiError, request: Request) -> Response:
        """The page for a request that is refused."""
        return error_page(error, request)


def error_page(error: ApiError, request: Request) -> Response:
    """An error as a page; without a session, the sign-in page if a session would help."""
    base = f"{request.scope.get('root_path', '').rstrip('/')}{BASE}"
    message = error.message
    if error.code == "missing_api_key":
        message = "your session is over; sign in, then go back and send it again"
    if error.code == "missing_api_key" and request.method == "GET":
        place = quote(request.url.path.removeprefix(base.removesuffix(BASE)), safe="/")
        return RedirectResponse(f"{base}/signin?next={place}", 303, HEADERS)
    headers = {key: value for key, value in error.headers.items() if key != "www-authenticate"}
    visitor = getattr(request.state, "visitor", None)
    if visitor is None:
        try:
            visitor = Visitor(request, service_of(request), Caller(), None, "")
        except ApiError:
            return PlainTextResponse(error.message, error.status, {**HEADERS, **headers})
    heading = "Not found" if error.status == 404 else "This did not work"
    return visitor.page(
        "refused.html",
        status=error.status,
        headers=headers,
        heading=heading,
        message=message,
    )
