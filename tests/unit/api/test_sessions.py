"""Signing in: sessions, their cookies and forms, and how they end."""

from __future__ import annotations

import contextlib
import time

import pytest

from tests.support.api_server import as_
from tests.support.page_visitor import Forms, Visitor
from vllm_kvmarket.api import sessions
from vllm_kvmarket.api.auth import WRONG_KEYS, Limiter
from vllm_kvmarket.api.sessions import Sessions
from vllm_kvmarket.auth.api_keys import Keys, Principal
from vllm_kvmarket.auth.operator_tokens import SECRET_FILE, Credentials


@pytest.fixture
def bea(server):
    visitor = Visitor(server.app)
    assert visitor.sign_in(server.keys["bea"]).status_code == 303
    return visitor


def cookies(answer):
    return {line.partition("=")[0]: line for line in answer.headers.get_list("set-cookie")}


def test_a_key_opens_a_session(server):
    """The cookie is HttpOnly and SameSite=Strict, for our pages alone, and has no key in it."""
    visitor = Visitor(server.app)
    answer = visitor.sign_in(server.keys["bea"])
    assert answer.status_code == 303 and answer.headers["location"] == "/kvmarket/money"
    line = cookies(answer)["kvmarket_session"]
    assert "HttpOnly" in line and "samesite=strict" in line.lower() and "Path=/kvmarket" in line
    assert "Secure" not in line and server.keys["bea"][4:] not in line
    assert "Account <strong>bea</strong>" in visitor.get("/money").text


def test_over_https_cookies_are_secure(server):
    """Neither the session's nor the form's is ever sent in the clear."""
    visitor = Visitor(server.app, base_url="https://testserver")
    assert "Secure" in cookies(visitor.get("/signin"))["kvmarket_form"]
    assert "Secure" in cookies(visitor.sign_in(server.keys["bea"]))["kvmarket_session"]


@pytest.mark.parametrize("key", ["", "kvm_", "kvm_" + "a" * 43, "Bearer x", "<b>", "ä" * 50])
def test_a_wrong_key_opens_nothing(server, key):
    """The page says so, without what was typed, and gives no session."""
    visitor = Visitor(server.app)
    answer = visitor.sign_in(key)
    assert answer.status_code == 401 and "kvmarket_session" not in cookies(answer)
    assert len(key) < 10 or key not in answer.text
    assert visitor.get("/money").status_code == 303


def test_a_revoked_key_ends_its_session(server, bea):
    """At once, not when the session would have been over."""
    (key,) = server.service.keys.listed("bea")
    server.service.keys.revoke(key.key_id)
    answer = bea.get("/money")
    assert answer.status_code == 303
    assert answer.headers["location"] == "/kvmarket/signin?next=/kvmarket/money"


def test_signing_out_ends_the_session_on_the_server(server, bea):
    """A cookie that was copied before opens nothing any more."""
    copied = bea.client.cookies["kvmarket_session"]
    assert bea.send("/money", "signout").status_code == 303
    thief = Visitor(server.app)
    thief.client.cookies.set("kvmarket_session", copied, path="/kvmarket")
    assert thief.get("/money").status_code == 303


def test_a_session_is_not_fixed(server, bea):
    """A cookie that somebody planted is not the one that signing in gives; the old one ends."""
    planted = bea.client.cookies["kvmarket_session"]
    bea.sign_in(server.keys["pat"])
    now = bea.client.cookies["kvmarket_session"]
    assert now != planted and "pat" in bea.get("/money").text
    assert server.service.sessions.find(planted) is None


@pytest.mark.parametrize(
    ("page", "form"), [("/signin", "signin"), ("/money", "signout"), ("/publish", "publish")]
)
def test_a_form_without_its_token_is_refused(server, page, form):
    """Nothing, a made-up token and another visitor's token do nothing."""
    visitor, other = Visitor(server.app), Visitor(server.app)
    if form != "signin":
        visitor.sign_in(server.keys["pat"])
        other.sign_in(server.keys["eve"])
    foreign = Forms(other.get(page).text).found[form]["fields"]["csrf"]
    for token in ("", "x" * 43, foreign):
        answer = visitor.send(
            page, form, csrf=token, key=server.keys["pat"], title="T", text="w " * 50
        )
        assert answer.status_code == 403 and "form" in answer.text
    given = Forms(visitor.get(page).text).found[form]
    assert visitor.client.post(given["action"]).status_code in (403, 415)
    assert server.market.catalogue.listings() == []


def test_a_form_sent_after_the_session_ended_says_so(server):
    """It is not taken, and the page tells to sign in, not to send headers."""
    visitor = Visitor(server.app)
    visitor.sign_in(server.keys["pat"])
    given = Forms(visitor.get("/publish").text).found["publish"]
    (key,) = server.service.keys.listed("pat")
    server.service.keys.revoke(key.key_id)
    answer = visitor.client.post(given["action"], data=given["fields"])
    assert answer.status_code == 401 and "session is over" in answer.text.lower()
    assert "Bearer" not in answer.text and "www-authenticate" not in answer.headers


def test_a_form_from_another_site_is_refused(server, bea):
    """Even with the right token, where the browser says that it came from elsewhere."""
    for headers in (
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
    ):
        assert bea.send("/money", "signout", headers=headers).status_code == 403
    assert bea.get("/money").status_code == 200


def test_a_form_from_nowhere_is_refused(server, bea):
    """Every browser says where a form was; without Origin and Sec-Fetch-Site none is taken."""
    del bea.client.headers["origin"]
    assert bea.send("/money", "signout").status_code == 403
    assert (
        bea.send("/money", "signout", headers={"sec-fetch-site": "same-origin"}).status_code == 303
    )


@pytest.mark.parametrize(
    "next",
    [
        "https://evil.example/",
        "//evil.example",
        "/\\evil.example",
        "/kvmarket/../../evil",
        "/kvmarket//evil.example",
        "/kvmarket@evil.example",
        "/kvmarket?next=//evil.example",
        "javascript:alert(1)",
        "/v1/kvmarket",
        "/kvmarket/money\r\nx: y",
    ],
)
def test_signing_in_leads_to_our_own_pages_only(server, next):
    """A `next` that is none of our pages is forgotten; no header can be written with it."""
    visitor = Visitor(server.app)
    assert "evil" not in visitor.get("/signin", next=next).text
    answer = visitor.sign_in(server.keys["bea"], next=next)
    assert answer.headers["location"] == "/kvmarket/money" and "x" not in answer.headers


def test_signing_in_leads_back(server):
    """Where one was sent away from."""
    visitor = Visitor(server.app)
    sent = visitor.get("/provider").headers["location"]
    place = sent.partition("next=")[2]
    answer = visitor.sign_in(server.keys["admin"], next=place)
    assert answer.headers["location"] == "/kvmarket/provider"


def test_trying_keys_is_slowed_down(server):
    """After so many attempts from an address the right key is refused too, for a while."""
    visitor = Visitor(server.app)
    bucket = server.service.key_checker._wrong = Limiter(WRONG_KEYS, clock=lambda: 0.0)
    answers = [visitor.sign_in("kvm_wrong").status_code for _ in range(WRONG_KEYS.burst)]
    assert set(answers) == {401} and bucket.wait_s("somebody else") == 0
    late = visitor.sign_in(server.keys["bea"])
    assert late.status_code == 429 and int(late.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"csrf=%FF", "application/x-www-form-urlencoded"),
        (b"\xff\xfe", "application/x-www-form-urlencoded"),
        (b"csrf=a&csrf=b", "application/x-www-form-urlencoded"),
        (b"&".join(b"a%d=1" % n for n in range(50)), "application/x-www-form-urlencoded"),
        (b'{"key": "x"}', "application/json"),
        (b"x" * 100_000, "application/x-www-form-urlencoded"),
    ],
)
def test_what_is_no_form_is_refused(server, content, kind):
    """With a page, and never with an error of the server."""
    visitor = Visitor(server.app)
    answer = visitor.client.post(
        "/kvmarket/signin", content=content, headers={"content-type": kind}
    )
    assert answer.status_code in (400, 403, 413, 415) and "<h1>" in answer.text


@pytest.mark.parametrize("cookie", ["", "x", "x" * 5000, "%00", "a;b", "é"])
def test_a_cookie_that_is_no_session_is_nobody(server, cookie):
    """The public pages are shown, the others ask to sign in."""
    visitor = Visitor(server.app)
    headers = {"cookie": b"kvmarket_session=" + cookie.encode()}
    assert visitor.client.get("/kvmarket", headers=headers).status_code == 200
    assert visitor.client.get("/kvmarket/money", headers=headers).status_code == 303


def test_wrong_keys_are_counted_on_every_route(server):
    """The API and the pages have one count: guessing goes on nowhere else."""
    server.service.key_checker._wrong = Limiter(WRONG_KEYS, clock=lambda: 0.0)
    wrong = {"authorization": "Bearer kvm_" + "a" * 43}
    for number in range(WRONG_KEYS.burst):
        path = ("/v1/kvmarket/documents", "/v1/kvmarket/accounts/me")[number % 2]
        assert server.client.get(path, headers=wrong).status_code == 401
    refused = server.client.get("/v1/kvmarket/documents", headers=as_(server, "bea"))
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert Visitor(server.app).sign_in(server.keys["bea"]).status_code == 429
    assert server.client.get("/v1/kvmarket/documents").status_code == 200


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self):
        self.now_s = time.time()

    def __call__(self):
        return self.now_s


@pytest.fixture
def keys(tmp_path):
    with_keys = Keys(tmp_path / "keys.sqlite")
    yield with_keys
    with_keys.close()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def held(tmp_path, keys, clock):
    return Sessions(Credentials.of_home(tmp_path), keys, clock)


def a_key(keys, account="ann"):
    _, key_id = keys.create(account, ["buyer"], "")
    return Principal(account, frozenset({"buyer"}), key_id)


def test_sessions_end_by_idleness_and_by_age(held, keys, clock):
    """Use keeps a session, but not for longer than its lifetime."""
    began_s = clock.now_s
    idle, used = held.open(a_key(keys)), held.open(a_key(keys))
    while clock.now_s - began_s + sessions.IDLE_S / 2 < sessions.LIFETIME_S:
        clock.now_s += sessions.IDLE_S / 2
        session, _ = held.find(used)
        used = held.renewed(session)
    assert held.find(idle) is None
    clock.now_s = began_s + sessions.LIFETIME_S
    assert held.find(used) is None


def test_a_young_cookie_is_not_replaced(held, keys, clock):
    """Pages set one every few minutes, not each time."""
    session, _ = held.find(held.open(a_key(keys)))
    assert held.renewed(session) is None
    clock.now_s += sessions.RENEW_S
    assert held.find(held.renewed(session))[0].id == session.id


def test_every_server_of_a_market_knows_a_session(tmp_path, held, keys):
    """Also one with a home of its own takes the cookie, and knows when the session has ended."""
    home = tmp_path / "other"
    home.mkdir()
    (home / SECRET_FILE).write_bytes((tmp_path / SECRET_FILE).read_bytes())
    with contextlib.closing(Keys(tmp_path / "keys.sqlite")) as others_keys:
        other = Sessions(Credentials.of_home(home), others_keys)
        cookie = held.open(a_key(keys))
        session, principal = other.find(cookie)
        assert principal.account == "ann"
        other.close(session)
        assert held.find(cookie) is None and held.find(held.renewed(session) or cookie) is None


def test_what_remembers_ended_sessions_is_bounded(held, keys, clock):
    """A row goes when no cookie of its session can be good any more."""
    session, _ = held.find(held.open(a_key(keys)))
    held.close(session)
    assert keys.has_ended(session.id)
    clock.now_s += sessions.LIFETIME_S + 60
    later, _ = held.find(held.open(a_key(keys)))
    held.close(later)
    assert keys.has_ended(later.id) and not keys.has_ended(session.id)


def test_no_cookie_is_made_without_the_homes_secret(tmp_path, held, keys):
    """A changed one, one under another home's secret, and another kind of token open nothing."""
    cookie = held.open(a_key(keys))
    payload, _, signature = cookie.partition(".")
    foreign = Sessions(Credentials.of_home(tmp_path / "other"), keys)
    wrong = [
        foreign.open(a_key(keys)),
        f"{payload}.{held.credentials.sign('form', payload)}",
        f"{payload}A.{signature}",
        f"{payload}.{'0' * 64}",
        payload,
        f".{held.credentials.sign('session', '')}",
        f"bm9wZQ.{held.credentials.sign('session', 'bm9wZQ')}",
    ]
    assert [held.find(each) for each in wrong] == [None] * len(wrong)
    assert held.find(cookie) is not None
