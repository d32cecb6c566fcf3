"""Real engines, shared between tests: a start costs half a minute."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.asking import Bill, Requests
from tests.support.engines import NANO, SMALL, SMOLLM, running
from tests.support.forked import VERDICTS
from tests.support.serving import serving
from tools.make_tiny_model import make_tiny_model
from vllm_kvmarket import Market

# Small caches: several engines share 24 GiB, and few blocks make preemption easy to provoke.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/engine" in str(item.path):
            item.add_marker(pytest.mark.engine)


@pytest.fixture(scope="session", autouse=True)
def shared_verdicts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines that tests start take the self-tests of those before them."""
    os.environ[VERDICTS] = str(tmp_path_factory.mktemp("verdicts"))
    yield
    del os.environ[VERDICTS]


@pytest.fixture(scope="session")
def smollm() -> Path:
    assert (SMOLLM / "config.json").exists(), "run `make test`, which converts the model first"
    return SMOLLM


@pytest.fixture(scope="session")
def tiny(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    made: dict[int, Path] = {}

    def of_seed(seed: int) -> Path:
        if seed not in made:
            # The same folder name, so that only the weights tell two models apart.
            out = tmp_path_factory.mktemp(f"seed{seed}") / "tiny"
            made[seed] = make_tiny_model(seed, smollm, out)
        return made[seed]

    return of_seed


@pytest.fixture(scope="session")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    """The market of the shared engine, with a funded buyer and one without funds."""
    with Market.open(tmp_path_factory.mktemp("market")) as opened:
        opened.create_account("alice")
        opened.deposit("alice", 1000 * NANO, "first-deposit")
        opened.create_account("dave")
        yield opened


@pytest.fixture(scope="session")
def llm(tiny: Callable[[int], Path], market: Market) -> Iterator[Any]:
    """The shared engine: prefill in pieces of 512 tokens, blocks of 128, few of them."""
    with running(tiny(1), market, **SMALL) as engine:
        yield engine


@pytest.fixture(scope="session")
def open_server(tiny: Callable[[int], Path], market: Market) -> Iterator[str]:
    """The address of a server on the shared market and model."""
    config = {"metrics_money": True}
    with serving(tiny(1), market.home, "--enable-prompt-tokens-details", config=config) as running:
        yield running.base


@pytest.fixture
def bill(market: Market) -> Bill:
    """Alice's payments during a test."""
    return Bill(market)


@pytest.fixture
def requests(llm: Any) -> Iterator[Requests]:
    """Requests run by hand, finished when the test ends."""
    opened = Requests(llm)
    yield opened
    opened.finish()
