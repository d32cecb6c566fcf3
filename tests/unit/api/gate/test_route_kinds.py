"""Which route a request goes to, and what the gate does with it."""

from __future__ import annotations

import pytest
from fastapi import FastAPI

from vllm_kvmarket.api.gate.route_kinds import ROUTES, Kind, kind_of, listed


@pytest.fixture(scope="module")
def app():
    """An app with every route of the table, and some that are not in it."""
    made = FastAPI(openapi_url=None)

    async def answer():
        return {}

    for path, method in ROUTES:
        made.add_api_route(path, answer, methods=[method])
    made.add_api_route("/v9/dream", answer, methods=["POST", "GET"])
    made.add_api_route("/v1/kvmarket/documents/{id}", answer, methods=["DELETE"])
    return made


def kind(app, method, path):
    scope = {"type": "http", "method": method, "path": path, "headers": [], "root_path": ""}
    return kind_of(app.routes, scope)


def test_every_generating_route_is_known_by_its_own_path(app):
    """As the router finds it."""
    for (path, method), expected in ROUTES.items():
        assert kind(app, method, path.replace("{response_id}", "resp_1")) is expected


def test_a_route_that_is_not_known_is_closed(app):
    """With any method: its answer is unknown too."""
    assert kind(app, "POST", "/v9/dream") is Kind.ADMIN
    assert kind(app, "GET", "/v9/dream") is Kind.ADMIN
    assert listed("/server_info", "GET") is Kind.ADMIN
    assert listed("/v1/realtime", "") is Kind.ADMIN


@pytest.mark.parametrize(
    "path",
    [
        "//v1/completions",
        "/v1//completions",
        "/v1/completions/",
        "/V1/completions",
        "/v1%2Fcompletions",
        "/v1/../v1/completions",
        "/v1/completions;a",
        "/./v1/completions",
    ],
)
def test_a_path_that_only_looks_like_a_route_reaches_none(app, path):
    """The gate and the router agree: there is nothing to get around to."""
    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "root_path": ""}
    assert not any(route.matches(scope)[0].name == "FULL" for route in app.routes)


def test_our_own_routes_check_keys_themselves(app):
    """But nothing that only begins like them."""
    assert kind(app, "DELETE", "/v1/kvmarket/documents/kvd_1") is Kind.OURS
    assert listed("/kvmarket", "GET") is Kind.PAGES
    assert listed("/v1/kvmarketplace", "POST") is Kind.ADMIN


def test_what_generates_is_told_from_what_does_not():
    """Every kind that is not one of these generates."""
    quiet = {Kind.OPEN, Kind.METRICS, Kind.OURS, Kind.PAGES, Kind.ADMIN, Kind.WORK}
    assert {each for each in Kind if not each.generates} == quiet
