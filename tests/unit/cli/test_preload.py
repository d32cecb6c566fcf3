"""`document preload`, which asks a running server."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

ANSWERS = {
    "kvd_1": (200, {"reused_tokens": 599, "loaded_tokens": 88, "pinned_tokens": 0}),
    "kvd_2": (404, {"error": {"message": "there is no document kvd_2 on offer"}}),
    "kvd_3": (502, "no JSON of ours"),
}


@pytest.fixture
def server(monkeypatch):
    """A server that knows an admin's key, and what was asked of it."""
    monkeypatch.setenv("KVMARKET_API_KEY", "kvm_admin")
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append((self.path, self.headers["authorization"]))
            status, body = ANSWERS[self.path.split("/")[4]]
            self.send_response(status)
            self.end_headers()
            if isinstance(body, dict) and status == 200:
                body = {**body, "not_pinned": None}
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()
        thread.join()


def test_preloading_asks_the_server_with_the_key_from_the_environment(run, run_json, server):
    """And shows what it answers."""
    base, asked = server
    assert run_json("document", "preload", "kvd_1", "--server", base + "/")["loaded_tokens"] == 88
    assert "599 tokens" in run("document", "preload", "kvd_1", "--server", base).out
    assert set(asked) == {("/v1/kvmarket/documents/kvd_1/preload", "Bearer kvm_admin")}


@pytest.mark.parametrize(
    ("name", "said"), [("kvd_2", "404: there is no document kvd_2 on offer"), ("kvd_3", "502: ")]
)
def test_a_refusal_is_shown_as_the_server_says_it(run, server, name, said):
    """Also an answer of a proxy in between."""
    assert said in run("document", "preload", name, "--server", server[0], code=1).err


def test_what_is_missing_is_named(run, server, monkeypatch):
    """A server, an address, a key."""
    ask = ("document", "preload", "kvd_1", "--server")
    assert "cannot be reached" in run(*ask, "http://127.0.0.1:1", code=1).err
    assert "no address of a server" in run(*ask, "ftp://host", code=2).err
    monkeypatch.delenv("KVMARKET_API_KEY")
    assert "KVMARKET_API_KEY is not set" in run(*ask, server[0], code=2).err
