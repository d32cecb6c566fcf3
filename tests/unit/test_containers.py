"""Dockerfile and compose.yaml: right in form, and everything that they name exists.

Nothing is built or run: there is no Docker on the machines that run the tests.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.missing import skip_without
from vllm_kvmarket.cli.app import build_parser
from vllm_kvmarket.core import config

yaml = pytest.importorskip("ruamel.yaml", reason="pip install vllm-kvmarket[check]")

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
VARIABLE = re.compile(r"\$\{(\w+)(:\?[^}]*)?\}")


def read(path: str):
    return yaml.YAML(typ="safe").load((ROOT / path).read_text("utf-8"))


@pytest.fixture(scope="module")
def compose():
    return read("compose.yaml")


@pytest.fixture(scope="module")
def services(compose):
    return compose["services"]


def mounts(service) -> dict[str, str]:
    """What is mounted, by its place inside."""
    parts = [each.split(":") for each in service.get("volumes", [])]
    return {inside: outside for outside, inside, *_ in parts}


def words_of(service) -> list[str]:
    command = service.get("command", [])
    return shlex.split(command) if isinstance(command, str) else command


def test_the_dockerfile_passes_its_linter():
    """hadolint knows what Docker refuses, and what goes wrong later."""
    command = [str(Path(sys.executable).parent / "hadolint"), str(ROOT / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_what_the_dockerfile_copies_exists_and_is_what_an_installation_needs():
    """Also through .dockerignore, which lets nothing else in."""
    copied = [
        word
        for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE)
        for word in line.split()[:-1]
    ]
    allowed = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text("utf-8"), re.MULTILINE)
    assert sorted(copied) == sorted(allowed)
    assert all((ROOT / each).exists() for each in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert {project["readme"], *project["license-files"], "vllm_kvmarket"} <= set(copied)
    (extras,) = re.findall(r'"/build\[([\w,]+)\]"', DOCKERFILE)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    # The image's vLLM is one that this version works with.
    (release,) = re.findall(r"^ARG VLLM=\S+:v(\d+\.\d+)\.\d+$", DOCKERFILE, re.MULTILINE)
    assert any(f">={release}," in each for each in project["optional-dependencies"]["gpu"])


def test_compose_is_what_its_schema_says():
    """The Compose Specification's own schema, which check-jsonschema brings."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run(
        [*command, str(ROOT / "compose.yaml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_that_compose_names_exists(compose, services):
    """Files, volumes, services that others wait for, and the variables of the example."""
    used = set()
    for service in services.values():
        for inside, outside in mounts(service).items():
            if outside.startswith("./"):
                assert (ROOT / outside).exists(), outside
            else:
                used.add(outside)
            assert inside.startswith("/")
        for name, condition in service.get("depends_on", {}).items():
            if condition["condition"] == "service_healthy":
                assert "healthcheck" in services[name]
        assert "image" in service
    assert used == set(compose["volumes"])
    wanted = {name for name, _ in VARIABLE.findall((ROOT / "compose.yaml").read_text("utf-8"))}
    example = (ROOT / "deploy" / "example.env").read_text("utf-8")
    assert wanted == set(re.findall(r"^(\w+)=$", example, re.MULTILINE))


def test_no_port_is_open_to_others(services):
    """What has no TLS is reached from this machine only; databases from no machine."""
    ports = {name: service.get("ports", []) for name, service in services.items()}
    assert {name for name, each in ports.items() if each} == {"engine", "grafana"}
    assert all(port.startswith("127.0.0.1:") for each in ports.values() for port in each)


def test_the_configurations_are_valid_and_name_services(services):
    """Both are of one market; each user of the database and each host is there."""
    market, owner = (config.load(ROOT / "deploy" / f"{name}.toml") for name in ("market", "owner"))
    assert market.object_store_url == owner.object_store_url
    urls = [each.database_url or "" for each in (market, owner)]
    found = [re.fullmatch(r"postgresql://(\w+)@(\w+)/(\w+)", url) for url in urls]
    users, hosts, databases = zip(*(each.groups() for each in found if each), strict=True)
    assert set(hosts) == {"postgres"} <= set(services)
    settings = services["postgres"]["environment"]
    assert set(databases) == {settings["POSTGRES_DB"]}
    assert users[1] == settings["POSTGRES_USER"]
    role = (ROOT / "deploy" / "create_role.sh").read_text("utf-8")
    assert f"CREATE ROLE {users[0]} LOGIN" in role
    port = next(word for word in words_of(services["seaweedfs"]) if word.startswith("-s3.port="))
    endpoint = market.object_store_options["endpoint"]
    assert endpoint == f"http://seaweedfs:{port.partition('=')[2]}"
    for name, file in (("engine", "market"), ("tables", "owner")):
        (place,) = (word for word in words_of(services[name]) if word.endswith(".toml"))
        assert mounts(services[name])[place] == f"./deploy/{file}.toml"


@pytest.mark.slow  # it asks the vLLM that is installed
def test_the_commands_have_the_options_that_they_are_given(services):
    """kvmarket's by its own parser, vLLM's by what its parser is made from."""
    words = words_of(services["tables"])
    args = build_parser("database").parse_args(words)
    assert args.role == "kvmarket"
    given = [word for word in words_of(services["engine"]) if word.startswith("--")]
    flags = (ROOT / "vllm_kvmarket" / "connector" / "flags.py").read_text("utf-8")
    ours = [each for each in given if f'"{each}"' in flags]
    assert "--kvmarket-config" in ours
    spec = find_spec("vllm")
    if spec is None or spec.submodule_search_locations is None:
        skip_without("vLLM's options: pip install vllm-kvmarket[cpu]")
    folder = Path(spec.submodule_search_locations[0])
    text = "".join(
        (folder / file).read_text("utf-8")
        for file in ("engine/arg_utils.py", "entrypoints/launchers/cli_args.py")
    )
    for option in set(given) - set(ours):
        name = option.removeprefix("--")
        assert f'"{option}"' in text or re.search(
            rf"^    {name.replace('-', '_')}: ", text, re.MULTILINE
        )


def test_the_engine_is_checked_where_it_serves(services):
    """The image's own health check asks the port of the command that compose gives."""
    words = words_of(services["engine"])
    port = words[words.index("--port") + 1]
    assert f"http://127.0.0.1:{port}/health" in DOCKERFILE
    assert f"EXPOSE {port}\n" in DOCKERFILE
    (home,) = re.findall(r"KVMARKET_HOME=(\S+)", DOCKERFILE)
    assert mounts(services["engine"])[home] == "home"


def test_prometheus_and_grafana_find_what_they_show(services):
    """Prometheus scrapes the engine, Grafana asks Prometheus and has the dashboard."""
    (job,) = read("deploy/prometheus.yml")["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    words = words_of(services["engine"])
    assert target == f"engine:{words[words.index('--port') + 1]}"
    (source,) = read("deploy/grafana_sources.yaml")["datasources"]
    assert source["url"].startswith("http://prometheus:")
    (provider,) = read("deploy/grafana_dashboards.yaml")["providers"]
    folder = mounts(services["grafana"])[provider["options"]["path"]]
    boards = [json.loads(path.read_text("utf-8")) for path in (ROOT / folder).glob("*.json")]
    kinds = {each["query"] for board in boards for each in board["templating"]["list"]}
    assert source["type"] in kinds
