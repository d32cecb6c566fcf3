"""One server with two API processes: sessions, keys and budgets are the same in both."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.support.engines import NANO, words
from tests.support.page_visitor import Forms
from tests.support.serving import DOCUMENT, MODEL, PRICE_NANO, serving, sold
from vllm_kvmarket.api.pages.page import BASE
from vllm_kvmarket.auth.api_keys import KeyLimits

pytestmark = pytest.mark.long

PROCESSES = 2
ROUNDS = 24  # each on a new connection, which either process may accept


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    home = tmp_path_factory.mktemp("several") / "home"
    with serving(tiny(1), home, "--api-server-count", str(PROCESSES)) as running:
        running.market.create_account("alice")
        running.market.deposit("alice", NANO, "first")
        running.publish(DOCUMENT, "tokens")
        yield running


def everywhere(server, path, **request):
    """The statuses of a request on many connections; both processes have answered some."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(timeout=60)) for _ in range(ROUNDS)]
        sent = [each.request(url=f"{server.base}{path}", **request) for each in clients]
        asked = {process for process in psutil.process_iter() if answers_at(process, server.port)}
        assert len(asked) == PROCESSES
    return {each.status_code for each in sent}


def answers_at(process, port):
    """Whether a process has a client's connection at a port."""
    try:
        connections = process.net_connections("tcp")
    except psutil.Error:
        return False
    return any(each.raddr and each.laddr.port == port for each in connections)


def test_a_session_of_one_process_is_good_in_the_other_until_it_ends(server):
    """Signed in and out once."""
    key = server.keys.create("alice", ["buyer"])[0]
    with httpx.Client(
        base_url=f"{server.base}{BASE}", headers={"origin": server.base}, timeout=60
    ) as visitor:

        def send(page, form, **fields):
            given = Forms(visitor.get(page).text).found[form]
            return visitor.post(f"{server.base}{given['action']}", data=given["fields"] | fields)

        assert send("/signin", "signin", key=key).status_code == 303
        cookies = {"cookie": "; ".join(f"{each.name}={each.value}" for each in visitor.cookies.jar)}
        money = {"path": f"{BASE}/money", "method": "GET", "headers": cookies}
        assert everywhere(server, **money) == {200}
        assert send("/money", "signout").status_code == 303
        assert everywhere(server, **money) == {303}  # a copy of the cookie is worth nothing


def test_a_key_is_good_in_both_processes_and_ends_in_both_within_a_second(server):
    """Also if each has just looked it up."""
    key, key_id = server.keys.create("alice", ["buyer"])
    (document,) = server.market.catalogue.listings()
    quote = {
        "path": "/v1/kvmarket/quotes",
        "method": "POST",
        "json": {"document": document.document_id},
        "headers": {"authorization": f"Bearer {key}"},
    }
    assert everywhere(server, **quote) == {200}
    server.keys.revoke(key_id)
    time.sleep(1)
    assert everywhere(server, **quote) == {401}


def test_a_budget_is_one_for_both_processes(server):
    """Twelve requests at once, and money for three."""
    limits = KeyLimits(total_budget_nano=3 * 600 * PRICE_NANO + 1)
    key, _ = server.keys.create("alice", ["buyer"], limits=limits)
    before = server.spent("alice")

    def buy(number):
        body = {"model": MODEL, "prompt": DOCUMENT + words(8800 + number, 9), "max_tokens": 2}
        return sold(server.post("/v1/completions", body, key).json())

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(buy, range(12)))
    assert sorted(each.get("charge_nano", 0) for each in answers)[-4:] == [0] + 3 * [300_000]
    assert server.spent("alice") - before == 3 * 600 * PRICE_NANO
