"""Signing in: sessions, their cookies and forms, and how they end."""

from __future__ import annotations

import pytest

from tests.support.api_server import running
from tests.support.page_visitor import Forms, Visitor
from vllm_kvmarket.api import sessions
from vllm_kvmarket.api.rate_limits import Limiter
from vllm_kvmarket.api.sessions import Sessions
from vllm_kvmarket.auth.api_keys import Keys, Principal


@pytest.fixture
def server(tmp_path):
    with running(tmp_path) as served:
        yield served


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
    assert len(server.service.sessions) == 0


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
    assert server.service.sessions.find(planted, server.service.keys) is None


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
    for site in ("cross-site", "same-site"):
        answer = bea.send("/money", "signout", headers={"sec-fetch-site": site})
        assert answer.status_code == 403
    assert bea.get("/money").status_code == 200


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
    bucket = server.service.sessions.attempts = Limiter(sessions.SIGN_INS, clock=lambda: 0.0)
    answers = [visitor.sign_in("kvm_wrong").status_code for _ in range(sessions.SIGN_INS.burst)]
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


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def keys(tmp_path):
    with_keys = Keys.open(tmp_path / "keys.sqlite")
    yield with_keys
    with_keys.close()


def a_key(keys, account="ann"):
    _, key_id = keys.create(account, ["buyer"], "")
    return Principal(account, frozenset({"buyer"}), key_id)


def test_sessions_end_by_idleness_and_by_age(keys):
    """Use keeps a session, but not for longer than its lifetime."""
    clock = Clock()
    held = Sessions(clock)
    idle, used = held.open(a_key(keys)), held.open(a_key(keys))
    while clock.now_s + sessions.IDLE_S / 2 < sessions.LIFETIME_S:
        clock.now_s += sessions.IDLE_S / 2
        assert held.find(used, keys) is not None
    assert held.find(idle, keys) is None
    clock.now_s = sessions.LIFETIME_S
    assert held.find(used, keys) is None and len(held) == 0


def test_sessions_are_bounded(keys, monkeypatch):
    """Of one key, and in all, the oldest go first."""
    monkeypatch.setattr(sessions, "MOST_OF_A_KEY", 3)
    monkeypatch.setattr(sessions, "MOST_SESSIONS", 5)
    held = Sessions()
    ann = a_key(keys)
    opened = [held.open(ann) for _ in range(4)]
    assert [held.find(each, keys) is not None for each in opened] == [False, True, True, True]
    bob = a_key(keys, "bob")
    last = [held.open(bob) for _ in range(3)][-1]
    assert len(held) == 5 and held.find(opened[1], keys) is None and held.find(last, keys)


def test_what_is_kept_of_a_session_opens_none(keys):
    """The server's memory holds digests, not cookies."""
    held = Sessions()
    value = held.open(a_key(keys))
    assert value.encode() not in b"".join(held._open)
    assert all(held.find(digest.hex(), keys) is None for digest in held._open)
