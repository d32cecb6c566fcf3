"""Without vLLM (`make check`), modules that need it are left out; `make test` runs all of them."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"vllm", "torch", "transformers"}
HAS_VLLM = find_spec("vllm") is not None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--after-check", action="store_true", help="leave out the tests that `make check` has run"
    )


def pytest_report_header() -> str | None:
    return None if HAS_VLLM else "kvmarket: no vLLM here, so test modules that need it are left out"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if is_test and not HAS_VLLM and needs_vllm(collection_path) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --after-check, keep only tests that `make check` leaves out: slow, or with vLLM."""
    if not config.getoption("--after-check"):
        return
    kept = [item for item in items if item.get_closest_marker("slow") or needs_vllm(item.path)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@cache
def needs_vllm(test: Path) -> bool:
    """Whether a test module imports vLLM, itself or through a module of ours."""
    seen: set[str] = set()
    # Inside a test's functions too: they run. Inside ours, imports wait until they are needed.
    waiting = imports(ast.walk(ast.parse(test.read_text("utf-8"))))
    while waiting := waiting - seen:
        if {name.partition(".")[0] for name in waiting} & HEAVY:
            return True
        seen |= waiting
        waiting = set().union(*map(imports_of_module, waiting))
    return False


def imports(statements: Iterable[ast.AST]) -> set[str]:
    """The modules that statements import; `from a import b` may mean a module a.b too."""
    names = set()
    for node in statements:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@cache
def imports_of_module(module: str) -> set[str]:
    """The imports of one of our modules while it is imported itself; none for any other name."""
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return imports(ast.parse(file.read_text("utf-8")).body) if file.is_file() else set()
