"""Fixtures for unit and engine tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.support")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds pyproject.toml."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def home_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A test that forgets to name a market's home must not write into its reader's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVMARKET_HOME", str(tmp_path_factory.mktemp("home")))
        yield
