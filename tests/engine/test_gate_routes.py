"""Every route that vLLM registers is in the gate's table: a new one cannot slip by."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from vllm_kvmarket.api.gate.route_kinds import ROUTES, Kind, listed

PROGRAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

arguments, tasks = json.loads(sys.argv[1])
args = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
app = build_app(args, tuple(tasks))
shown = [
    (type(route).__name__, route.path, sorted(getattr(route, "methods", None) or []))
    for route in app.routes
]
with open(sys.argv[2], "w") as out:
    json.dump(shown, out)
"""


def routes_of(tmp_path, arguments, tasks, **environment):
    """(class, path, methods) of every route of vLLM's app."""
    out = tmp_path / "routes.json"
    given = json.dumps([arguments, tasks])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, given, str(out)],
        # vLLM's own routes only: an engine that ran before has asked for our plugin here.
        env={**os.environ, "VLLM_PLUGINS": "", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("arguments", [[], ["--enable-scale-out"]])
def test_every_route_of_a_generating_server_is_listed(tmp_path, arguments):
    """One by one: each is gated, for admins, or knowingly open; and the table has none besides."""
    found = set()
    for kind, path, methods in routes_of(tmp_path, arguments, ["generate"]):
        if kind == "Mount":
            assert path == "/metrics"
            continue
        assert kind in ("APIRoute", "Route"), (kind, path)
        for method in set(methods) - {"HEAD"}:
            if path.startswith("/v1/kvmarket"):
                continue
            assert (path, method) in ROUTES, f"{method} {path} is not in the gate's table"
            found.add((path, method))
    print("\n".join(f"{ROUTES[route].value:12} {route[1]:5} {route[0]}" for route in sorted(found)))
    assert found == set(ROUTES)


def test_everything_else_that_vllm_can_serve_is_closed(tmp_path):
    """Development routes, adapters, speech, fault tolerance: admins only."""
    shown = routes_of(
        tmp_path,
        ["--enable-fault-tolerance", "--enable-tokenizer-info-endpoint"],
        ["generate", "transcription", "realtime", "embed", "classify", "score"],
        VLLM_SERVER_DEV_MODE="1",
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="1",
    )
    others = [
        (path, method)
        for _, path, methods in shown
        for method in methods or [""]
        if (path, method.replace("HEAD", "GET")) not in ROUTES
        and not path.startswith("/v1/kvmarket")
    ]
    assert len(others) > 10
    for path, method in others:
        if path != "/metrics":
            assert listed(path, method) is Kind.ADMIN, (path, method)
