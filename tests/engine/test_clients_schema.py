"""The server's answers are as its OpenAPI description says, for any request."""

from __future__ import annotations

import contextlib
import itertools

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from tests.support.engines import words

pytest_plugins = ("tests.support.gate_server", "tests.support.clients_server")

OURS = "/v1/kvmarket"
EXAMPLES = 6
SEED = 20261124
# Waits for a receipt that may be on its way: each one that is not there takes its time.
SLOW = "/receipts/{receipt_id}"
CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def described(shop):
    """Our part of the server's OpenAPI description."""
    reply = httpx.get(f"{shop.base}/openapi.json", timeout=60).json()
    reply["paths"] = {path: each for path, each in reply["paths"].items() if path.startswith(OURS)}
    assert len(reply["paths"]) >= 17
    return schemathesis.openapi.from_dict(reply)


@pytest.fixture(scope="module")
def known(shop, ann, tokens_on_offer):
    """Path parameters that are there: a withdrawn document is not one that others buy."""
    shop.complete(words(7000, 600) + words(8001, 9), ann)
    spare = shop.publish(words(8000, 300), "spare")
    shop.market.create_account("spare")
    key_id = shop.keys.create("spare", ["buyer"])[1]
    shop.spent("ann")
    receipt = shop.market.receipts("ann")[0].id
    return {
        "document_id": spare,
        "account_id": "spare",
        "key_id": key_id,
        "receipt_id": receipt,
    }


@pytest.mark.parametrize("who", ["admin", "buyer", "nobody"])
def test_answers_are_as_described_whatever_is_asked(shop, described, known, who):
    """By the schema and against it, of things that are there and are not: no 5xx, and every answer
    has a documented status, type and shape.
    """
    seen: dict[str, set[int]] = {}
    for number, result in enumerate(described.get_all_operations()):
        operation = result.ok()
        # Of its own account, or the rate limit would be all that is tested.
        key = None
        if who != "nobody":
            key = shop.key(f"{who}-{number}", who, funds_nano=0)
        statuses = seen.setdefault(operation.label, set())
        slow = operation.path.endswith(SLOW)
        wanted = [each.name for each in operation.path_parameters]
        there = {name: known[name] for name in wanted}
        for mode, fixed in itertools.product(
            (GenerationMode.POSITIVE, GenerationMode.NEGATIVE), (None, there) if there else (None,)
        ):
            if fixed and mode is GenerationMode.NEGATIVE and len(operation.body) == 0:
                continue
            count = 1 if slow and not (fixed and who == "admin") else EXAMPLES
            attack(shop, operation, mode, fixed, key=key, count=count, statuses=statuses)
    print({label: sorted(found) for label, found in seen.items()})
    good = {label for label, found in seen.items() if found & {200, 201, 202, 204}}
    if who == "admin":
        # A transfer's proof and a deletion may not have had the luck; most must have worked.
        assert len(good) > len(seen) * 2 // 3, seen
    refused = set.union(*seen.values())
    assert {"admin": 400, "buyer": 403, "nobody": 401}[who] in refused


def attack(shop, operation, mode, fixed, *, key, count, statuses):
    """Send an operation examples of one kind, and check what comes."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    given_ids = {"path_parameters": dict(fixed)} if fixed else {}

    @seed(SEED)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode, **given_ids))
    def check(case):
        case.headers = {
            name: value
            for name, value in (case.headers or {}).items()
            if name.lower() not in ("authorization", "x-api-key")
        }
        answer = case.call(base_url=shop.base, headers=headers, timeout=30)
        statuses.add(answer.status_code)
        case.validate_response(answer, checks=CHECKS, headers=headers)

    # An operation without parameters cannot be called wrongly.
    with contextlib.suppress(Unsatisfiable):
        check()
