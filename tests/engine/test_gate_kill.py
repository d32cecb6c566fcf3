"""The API server dies in mid-request: nothing is charged twice, and nothing stays reserved."""

from __future__ import annotations

import os
import signal

import httpx
import psutil
import pytest

from tests.support.engines import words
from tests.support.serving import DOCUMENT, MODEL, PRICE_NANO, serving, sold

QUESTION = words(7400, 12)


@pytest.mark.long
def test_a_server_killed_in_mid_request_charges_once(tiny, tmp_path, monkeypatch):
    """Killed as hard as can be while it streams; the client asks again, and pays for that."""
    monkeypatch.setenv("KVMARKET_TESTS_FORK", "0")  # the engine must be the server's child
    home = tmp_path / "home"
    config = {"reservation_timeout_s": 5}
    body = {"model": MODEL, "prompt": DOCUMENT + QUESTION, "max_tokens": 3000, "stream": True}
    with serving(tiny(1), home, config=config) as server:
        server.publish(DOCUMENT, "tokens")
        headers = {"authorization": f"Bearer {server.key('alice')}", "x-request-id": "mine"}
        with httpx.stream(
            "POST",
            f"{server.base}/v1/completions",
            json=body | {"ignore_eos": True},
            headers=headers,
            timeout=120,
        ) as response:
            next(response.iter_raw())
            assert server.market.ledger.account("alice").debits_pending == 600 * PRICE_NANO
            family = psutil.Process(server.process.pid).children(recursive=True)
            os.kill(server.process.pid, signal.SIGKILL)
        # vLLM's engine may outlive its server; a supervisor ends what is left of the family.
        _, left = psutil.wait_procs(family, timeout=10)
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=30)
    with serving(tiny(1), home, config=config) as server:
        # Either the engine saw its server go, and settled what had been streamed; or nothing was
        # booked, and the new engine expires the reservation when its time is over.
        paid = server.spent("alice")
        assert paid in (0, 600 * PRICE_NANO)
        again = server.post(
            "/v1/completions",
            body | {"stream": False, "max_tokens": 2},
            headers=headers,
        )
        assert sold(again.json())["reused_tokens"] == 600
        assert server.spent("alice") == paid + 600 * PRICE_NANO
        assert server.market.ledger.check_integrity() == []
