"""The OpenAPI of the market's routes, and whatever else may be sent to them."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.api_server import as_, running

BASE = "/v1/kvmarket"
# What each operation needs: nobody's key, anybody's, or a scope.
PUBLIC, KEY = "", "key"
OPERATIONS = {
    ("GET", ""): PUBLIC,
    ("POST", "/documents"): "publisher",
    ("GET", "/documents"): PUBLIC,
    ("GET", "/documents/{document_id}"): PUBLIC,
    ("PATCH", "/documents/{document_id}"): "publisher",
    ("DELETE", "/documents/{document_id}"): "publisher",
    ("POST", "/documents/{document_id}/preload"): "admin",
    ("POST", "/quotes"): PUBLIC,
    ("GET", "/accounts"): "admin",
    ("POST", "/accounts"): "admin",
    ("GET", "/accounts/me"): KEY,
    ("GET", "/accounts/{account_id}"): KEY,
    ("GET", "/accounts/{account_id}/statement"): KEY,
    ("POST", "/accounts/{account_id}/deposits"): "admin",
    ("GET", "/accounts/{account_id}/keys"): "admin",
    ("POST", "/accounts/{account_id}/keys"): "admin",
    ("DELETE", "/accounts/{account_id}/keys/{key_id}"): "admin",
    ("GET", "/receipts"): KEY,
    ("GET", "/receipts/{receipt_id}"): KEY,
    ("GET", "/transfers"): KEY,
    ("GET", "/log/checkpoint"): PUBLIC,
    ("GET", "/log/proof"): PUBLIC,
    ("GET", "/jwks"): PUBLIC,
}
BODIES = {
    "/documents": {"text": "a"},
    "/documents/{document_id}": {"ttl_s": 1},
    "/quotes": {"document": "kvd_0"},
    "/accounts": {"id": "a"},
    "/accounts/{account_id}/deposits": {"amount_nano": 1, "transfer_id": "t"},
    "/accounts/{account_id}/keys": {"scopes": ["buyer"]},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("home")) as opened:
        opened.keys["ron"] = opened.service.keys.create("bea", ["read-only"])[0]
        yield opened


def send(server, method, path, who=None, body=None):
    path = path.format(document_id="kvd_0", account_id="pat", key_id="k", receipt_id="r")
    headers = as_(server, who) if who else {}
    return server.client.request(method, BASE + path, json=body, headers=headers)


def test_every_operation_is_described_with_its_errors_and_none_is_forgotten_here(server):
    """A new route must be given its scope in this file."""
    reply = server.client.get("/openapi.json").json()
    found = {
        (method.upper(), path.removeprefix(BASE))
        for path, methods in reply["paths"].items()
        for method in methods
    }
    assert found == set(OPERATIONS)
    for methods in reply["paths"].values():
        for operation in methods.values():
            assert operation["description"]
            assert {"4XX", "5XX"} <= set(operation["responses"])
            assert "422" not in operation["responses"]


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_an_operation_needs_its_key_or_scope(server, method, path):
    """401 without a key, 403 without the scope; a key that only reads changes nothing."""
    needs = OPERATIONS[method, path]
    body = BODIES.get(path) if method in ("POST", "PATCH") else None
    status = send(server, method, path, None, body).status_code
    assert (status == 401) is (needs != PUBLIC), status
    if needs in ("admin", "publisher"):
        for who in ("ron", "bea", *(["pat"] if needs == "admin" else [])):
            refused = send(server, method, path, who, body)
            assert refused.status_code == 403, (who, refused.text)
            assert needs in refused.json()["error"]["message"]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [name for body in BODIES.values() for name in body]
    + ["title", "messages", "token_ids", "as", "royalty_ppm", "prompt", "kind", "label"]
)
QUERIES = "limit after search publisher state sort from to format account old new"


@given(
    operation=st.sampled_from([each for each in OPERATIONS if each[0] in ("POST", "PATCH")]),
    body=st.dictionaries(FIELDS | st.text(), JSON, max_size=4) | JSON,
)
@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_body_breaks_a_route(server, operation, body):
    """Any JSON, also from an admin, is done or refused in our shape; never a 5xx."""
    server.service.writes._buckets.clear()
    answer = send(server, *operation, "admin", body)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@given(
    path=st.sampled_from([path for method, path in OPERATIONS if method == "GET"]),
    query=st.dictionaries(
        st.sampled_from(QUERIES.split()) | st.text(),
        st.text() | st.integers().map(str),
        max_size=3,
    ),
    name=st.text(min_size=1),
)
@settings(max_examples=120, deadline=None)
def test_no_query_or_path_breaks_a_route(server, path, query, name):
    """The same for what stands in the URL."""
    server.service.reads._buckets.clear()
    if "receipt_id" in path:
        return  # waits for the ledger, for a moment
    url = server.client.base_url.copy_with(path="/").join(BASE.lstrip("/"))
    made = path.format(document_id=name, account_id=name, key_id=name)
    answer = server.client.get(str(url) + _quoted(made), params=query, headers=as_(server, "admin"))
    assert answer.status_code < 500, answer.text


def _quoted(path):
    from urllib.parse import quote

    return quote(path, safe="/")
