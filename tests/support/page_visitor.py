"""A browser without a screen: it keeps cookies, and sends the forms that pages have."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

from fastapi.testclient import TestClient

from tests.support.purchases import reserve
from vllm_kvmarket.market.purchase import Usage

BASE = "/kvmarket"


class Forms(HTMLParser):
    """The forms of a page: action, and the fields with what stands in them."""

    def __init__(self, text):
        super().__init__()
        self.found = {}
        self._now = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "form":
            self._now = self.found[given.get("id")] = {"action": given["action"], "fields": {}}
        elif tag in ("input", "textarea", "select") and self._now is not None:
            self._now["fields"][given["name"]] = given.get("value", "")

    def handle_endtag(self, tag):
        if tag == "form":
            self._now = None


class Visitor:
    """A visitor with a separate browser."""

    def __init__(self, app, base_url="http://testserver"):
        self.client = TestClient(app, base_url=base_url, follow_redirects=False)
        self.client.headers["origin"] = base_url

    def get(self, path="", **query):
        return self.client.get(f"{BASE}{path}", params=query or None)

    def send(self, page, form, *, headers=None, **fields):
        """Fill in a form of a page, and send it."""
        given = Forms(self.get(page).text).found[form]
        return self.client.post(given["action"], data=given["fields"] | fields, headers=headers)

    def sign_in(self, key, **fields):
        return self.send("/signin", "signin", key=key, **fields)


def text_in(page, name):
    """The text of the element with an id, without tags."""
    found = re.search(rf'<(\w+)[^>]* id="{name}"[^>]*>(.*?)</\1>', page.text, re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", " ", found[2])).strip() if found else None


def sell(server, text, who="bea", key="k1"):
    """Let somebody with enough money reuse all but one token of a published text; the receipt."""
    market = server.market
    market.catalogue.refresh()
    match = market.match(server.engine.namespace, server.engine.prompt(text, None))
    market.deposit(who, 10**9, f"deposit {key}")
    purchase = reserve(
        market, key=key, request_id=f"request {key}", account=who, match=match, model="words"
    )
    purchase._reservation.result()
    assert purchase.state().value == "reserved"
    reused = match.token_count - 1
    receipt = purchase.settle(Usage(match.token_count, reused, reused, 0, 0, 10, 5))
    return market.receipt(receipt.id)
