"""The core in a separate environment: the wheel and its hard dependencies, nothing else."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

PROJECT = ("pyproject.toml", "README.md", "LICENSE")
MODULES = (
    "vllm_kvmarket",
    "vllm_kvmarket.catalogue",
    "vllm_kvmarket.cli",
    "vllm_kvmarket.ledger",
    "vllm_kvmarket.market.market",
    "vllm_kvmarket.plugin",
    "vllm_kvmarket.store",
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # pip may build and download
HEAVY = ("fastapi", "torch", "transformers", "vllm")


def environment():
    """This process's variables, without those that would lend the new environment our packages."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def run(*command):
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        check=False,
        text=True,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def bare(repository, tmp_path_factory) -> Path:
    """The `bin` folder of an environment that has the project's wheel and its dependencies."""
    folder = tmp_path_factory.mktemp("bare")
    # A copy, since building a wheel leaves folders beside the sources.
    source = folder / "source"
    source.mkdir()
    for file in PROJECT:
        shutil.copy(repository / file, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(repository / "vllm_kvmarket", source / "vllm_kvmarket", ignore=ignored)
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    binaries = folder / "venv" / "bin"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "--python", binaries / "python", "install", source)
    shutil.rmtree(source)
    return binaries


def test_the_core_is_imported_without_vllm_and_torch(bare):
    """Ledger, catalogue, store, market and the command line load where vLLM and torch are not."""
    script = (
        "import importlib, importlib.util, json, sys\n"
        f"for name in {MODULES!r}: importlib.import_module(name)\n"
        f"found = [name for name in {HEAVY!r} if importlib.util.find_spec(name)]\n"
        "print(json.dumps([found, sys.modules['vllm_kvmarket'].__file__]))"
    )
    found, file = json.loads(run(bare / "python", "-I", "-c", script))
    assert found == []
    assert Path(file).is_relative_to(bare.parent), "the installed wheel is tested, not the sources"


def test_the_command_keeps_books_without_vllm_and_torch(bare, tmp_path):
    """The installed `kvmarket` opens an account and brings money in, without a model in sight."""
    command = (bare / "kvmarket", "account")
    options = ("--json", "--home", tmp_path / "home")
    run(*command, "create", "alice", *options)
    run(*command, "deposit", "alice", "2.50", *options)
    assert "alice" in run(*command, "list", *options)


def test_the_wheel_carries_its_data(bare):
    """Type marker, licence and the demo's document arrive with the wheel."""
    script = (
        "from importlib.metadata import files\n"
        "print('\\n'.join(str(file) for file in files('vllm-kvmarket')))"
    )
    names = run(bare / "python", "-I", "-c", script).splitlines()
    assert "vllm_kvmarket/py.typed" in names
    assert "vllm_kvmarket/cli/gpl-3.0.txt" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
