"""The object tier against a real S3 server, behind a network that fails in every way."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.proxy import Proxy
from tests.support.seaweed import SeaweedFS, free_ports
from vllm_kvmarket.core.errors import ConfigError, StoreError
from vllm_kvmarket.store import object_tier
from vllm_kvmarket.store.chunk_format import chunk_name
from vllm_kvmarket.store.object_client import Breaker
from vllm_kvmarket.store.object_tier import PART_BYTES, ObjectFacts, ObjectReplacedError, ObjectTier

KEY = bytes(range(32))
Connect = Callable[..., ObjectTier]
Proxied = Callable[[SeaweedFS], Proxy]


class Download:
    """A file to be uploaded, and an empty one to be filled."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "source"
        self.target = folder / "target"
        self.descriptor = os.open(self.target, os.O_RDWR | os.O_CREAT)

    def fill(self, size: int) -> Path:
        """Put random bytes into the source."""
        self.source.write_bytes(random.Random(size).randbytes(size))
        return self.source

    def is_whole(self) -> bool:
        """Whether what came is what was sent."""
        return self.target.read_bytes() == self.source.read_bytes()


@pytest.fixture(params=["s3", "file", "memory"])
def tier(request: pytest.FixtureRequest, tmp_path: Path, connect: Connect) -> ObjectTier:
    """Every kind of store that can be had here, empty."""
    if request.param == "s3":
        seaweed = request.getfixturevalue("seaweed")
        return connect(request.getfixturevalue("bucket"), seaweed.options())
    return connect(f"file://{tmp_path}/a folder/b" if request.param == "file" else "memory:///")


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Download]:
    """Two files."""
    made = Download(tmp_path)
    yield made
    os.close(made.descriptor)


def elapsed_s(work: Callable[[], object], match: str) -> float:
    """How long it takes `work` to raise a StoreError that says `match`."""
    started_s = time.monotonic()
    with pytest.raises(StoreError, match=match):
        work()
    return time.monotonic() - started_s


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, 3 * PART_BYTES + 17, (32 << 20) + 1])
def test_a_file_comes_back_as_it_was(tier: ObjectTier, load: Download, size: int) -> None:
    """Of any size: in one request, in several ranges, uploaded in one piece or in parts."""
    file = load.fill(size)
    assert tier.upload("ab/x.kv", file) == size
    facts = tier.facts("ab/x.kv")
    assert facts is not None and (facts.name, facts.size) == ("ab/x.kv", size)
    tier.download("ab/x.kv", load.descriptor, size, version=facts.version)
    assert load.is_whole()


def test_what_is_not_there_is_none(tier: ObjectTier, load: Download) -> None:
    """A missing object has no size and no content, and can be deleted."""
    assert tier.head("ab/x.kv") is None
    assert tier.get_bytes("ab/x.kv") is None
    assert list(tier.names()) == []
    assert tier.files(KEY) == []
    tier.delete("ab/x.kv")
    with pytest.raises(ObjectReplacedError):
        tier.download("ab/x.kv", load.descriptor, 1)


def test_names_and_shares(tier: ObjectTier) -> None:
    """Names are listed by folder; a chunk's shares are found among those of similar keys."""
    others = [KEY[:-1] + bytes([last]) for last in (0, 30, 32, 255)]
    for name in ["listings/one", *map(chunk_name, others)]:
        tier.put_bytes(name, b"content")
    assert tier.files(KEY) == []
    for share in [(1, 2), (0, 1), (0, 2), (10, 11)]:
        tier.put_bytes(chunk_name(KEY, *share), b"content")
    assert [each[:2] for each in tier.files(KEY)] == [(0, 1), (0, 2), (1, 2), (10, 11)]
    assert list(tier.names("listings")) == ["listings/one"]
    assert len(list(tier.names())) == 9
    tier.delete("listings/one")
    assert list(tier.names("listings")) == []


def test_shares_are_found_without_the_rest_of_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket of a million chunks has four thousand names in each folder."""
    tier = ObjectTier("s3://bucket", {"region": "us-east-1"})

    def entries(_folder: str, *, after: str) -> Iterator[ObjectFacts]:
        assert after == chunk_name(KEY).removesuffix(".kv")
        for name in (chunk_name(KEY, 0, 2), chunk_name(KEY, 1, 2), chunk_name(KEY[:-1] + b"\xff")):
            yield ObjectFacts(name, 1, None)
        pytest.fail("the whole folder is listed")

    monkeypatch.setattr(tier, "entries", entries)
    assert tier.files(KEY) == [(0, 2, ""), (1, 2, "")]
    tier.close()


def test_more_names_than_one_answer_holds(
    tier: ObjectTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long list comes in several batches and is whole."""
    monkeypatch.setattr(object_tier, "_LISTED_AT_ONCE", 7)
    wanted = {f"listings/{number:03}" for number in range(30)}
    for name in wanted:
        tier.put_bytes(name, b"")
    assert sorted(tier.names("listings")) == sorted(wanted)


def test_an_object_that_was_replaced_is_not_mixed(tier: ObjectTier, load: Download) -> None:
    """A reader that began with one content does not go on with another."""
    tier.put_bytes("ab/x.kv", b"before")
    before = tier.facts("ab/x.kv")
    assert before is not None
    tier.put_bytes("ab/x.kv", b"behind")
    with pytest.raises(ObjectReplacedError):
        tier.download("ab/x.kv", load.descriptor, 6, version=before.version)
    with pytest.raises(ObjectReplacedError):
        tier.download("ab/x.kv", load.descriptor, 5)
    assert tier.get_bytes("ab/x.kv") == b"behind"


def test_a_document_that_is_too_large_is_not_read(
    tier: ObjectTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody fills another home's memory through the bucket."""
    monkeypatch.setattr(object_tier, "MAX_DOCUMENT_BYTES", 3)
    tier.put_bytes("listings/x", b"four")
    with pytest.raises(StoreError, match="more than 3 bytes"):
        tier.get_bytes("listings/x")


@pytest.mark.parametrize(
    ("url", "options", "match"),
    [
        ("s3://bucket", {"acess_key_id": "key"}, "acess_key_id"),
        ("s3://bucket", {"timeout": "soon"}, "soon"),
        ("ftp://host/folder", {}, "ftp://host/folder"),
        ("bucket", {}, "bucket"),
        ("file:folder", {}, "whole path"),
        ("memory:///", {"region": "x"}, "takes no options"),
    ],
)
def test_a_bad_url_or_option_is_told(url: str, options: dict[str, str], match: str) -> None:
    """The message names what is wrong, in one line."""
    with pytest.raises(ConfigError, match=match) as refusal:
        ObjectTier(url, options)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("wrong", ["access_key_id", "secret_access_key"])
def test_wrong_credentials(seaweed: SeaweedFS, connect: Connect, bucket: str, wrong: str) -> None:
    """They are refused at once, whatever is asked, and no circuit breaks."""
    tier = connect(bucket, seaweed.options(**{wrong: "wrong"}), timeout_s=30)
    for work in (
        lambda: tier.put_bytes("x", b""),
        lambda: tier.get_bytes("x"),
        lambda: tier.head("x"),
        lambda: tier.delete("x"),
        lambda: list(tier.names()),
    ):
        assert elapsed_s(work, "refused .* check the credentials") < tier.timeout_s / 3


def test_a_bucket_that_is_not_there(seaweed: SeaweedFS, connect: Connect) -> None:
    """Listing it says so; what it would hold is missing."""
    tier = connect("s3://nobody-made-it", seaweed.options())
    with pytest.raises(StoreError, match="make the bucket"):
        list(tier.names())
    assert tier.head("x") is None


def test_a_store_that_is_dead_from_the_start(connect: Connect, bucket: str) -> None:
    """The first call costs a deadline and says why; the next ones fail at once."""
    options = {"endpoint": f"http://127.0.0.1:{free_ports(1)[0]}", "allow_http": "true"}
    tier = connect(
        bucket, {**options, "access_key_id": "key", "secret_access_key": "secret"}, timeout_s=1
    )
    first_s = elapsed_s(lambda: tier.head("x"), r"did not answer within 1\.0 s \(HTTP error")
    assert 0.9 < first_s < 2
    for work in (lambda: tier.put_bytes("x", b""), lambda: list(tier.names())):
        assert elapsed_s(work, "is not asked again for") < first_s / 3


def test_a_store_that_says_nothing(
    seaweed: SeaweedFS, proxied: Proxied, connect: Connect, bucket: str
) -> None:
    """Many threads wait for one deadline together, later ones for none; then it is tried again."""
    proxy = proxied(seaweed)
    tier = connect(bucket, seaweed.options(proxy.port), timeout_s=1)
    tier.put_bytes("x", b"content")
    proxy.is_silent = True
    started_s = time.monotonic()
    failures: list[str] = []

    def ask() -> None:
        try:
            tier.get_bytes("x")
        except StoreError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 12 and time.monotonic() - started_s < 3
    assert elapsed_s(lambda: tier.get_bytes("x"), "is not asked again") < 0.3
    proxy.is_silent = False
    tier._calls._breaker._until_s = 0.0  # the pause is over
    assert tier.get_bytes("x") == b"content"
    assert tier.get_bytes("x") == b"content"


def test_one_request_that_hangs_is_made_again(
    seaweed: SeaweedFS, proxied: Proxied, connect: Connect, bucket: str
) -> None:
    """A connection that says nothing costs a part of the deadline, and not the answer."""
    proxy = proxied(seaweed)
    connect(bucket, seaweed.options()).put_bytes("x", b"content")
    proxy.silent_connections = 1
    tier = connect(bucket, seaweed.options(proxy.port), timeout_s=3)
    assert tier.get_bytes("x") == b"content"
    assert proxy.connections == 2


def test_latency_is_borne_once_and_not_a_range(
    seaweed: SeaweedFS, proxied: Proxied, connect: Connect, bucket: str, load: Download
) -> None:
    """Ranges are read at once: eight of them take less time than eight one after another."""
    size = 8 * PART_BYTES
    file = load.fill(size)
    connect(bucket, seaweed.options()).upload("x", file)
    proxy = proxied(seaweed)
    proxy.latency_s = 0.5
    tier = connect(bucket, seaweed.options(proxy.port), threads=8, timeout_s=60)
    started_s = time.monotonic()
    tier.download("x", load.descriptor, size)
    assert time.monotonic() - started_s < 8 * proxy.latency_s
    assert load.is_whole()


def test_a_connection_that_is_cut_is_made_again(
    seaweed: SeaweedFS, proxied: Proxied, connect: Connect, bucket: str, load: Download
) -> None:
    """A download survives the loss of every connection in the middle of its answer."""
    size = 3 * PART_BYTES
    file = load.fill(size)
    connect(bucket, seaweed.options()).upload("x", file)
    proxy = proxied(seaweed)
    proxy.cut_after_bytes = PART_BYTES // 2
    tier = connect(bucket, seaweed.options(proxy.port), timeout_s=20)
    mended = threading.Timer(0.5, lambda: setattr(proxy, "cut_after_bytes", None))
    mended.start()
    tier.download("x", load.descriptor, size)
    mended.join()
    assert load.is_whole()


def test_nothing_is_written_after_the_deadline(
    seaweed: SeaweedFS, proxied: Proxied, connect: Connect, bucket: str, load: Download
) -> None:
    """Late bytes do not end up in a file that has the same descriptor since."""
    file = load.fill(PART_BYTES)
    connect(bucket, seaweed.options()).upload("x", file)
    proxy = proxied(seaweed)
    tier = connect(bucket, seaweed.options(proxy.port), timeout_s=1)
    assert tier.head("x") == PART_BYTES
    proxy.is_silent = True
    descriptor = os.dup(load.descriptor)
    try:
        with pytest.raises(StoreError, match="did not answer"):
            tier.download("x", descriptor, PART_BYTES)
        other = os.open(load.source, os.O_RDWR | os.O_TRUNC)
        os.dup2(other, descriptor)
        os.close(other)
        proxy.is_silent = False
        time.sleep(0.5)
        assert load.source.read_bytes() == b""
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_server_that_is_killed_during_a_download(
    own_seaweed: SeaweedFS,
    proxied: Proxied,
    connect: Connect,
    load: Download,
    comes_back: bool,
) -> None:
    """When it comes back within the deadline the download ends well, otherwise with an error."""
    size = 4 * PART_BYTES
    file = load.fill(size)
    connect("s3://bucket", own_seaweed.options()).upload("x", file)
    proxy = proxied(own_seaweed)
    proxy.block_s = 0.02
    tier = connect(
        "s3://bucket", own_seaweed.options(proxy.port), timeout_s=60 if comes_back else 2
    )

    def strike() -> None:
        proxy.forwarded.wait(10)
        own_seaweed.kill()
        if comes_back:
            proxy.block_s = 0.0
            own_seaweed.start()

    striker = threading.Thread(target=strike)
    striker.start()
    try:
        if comes_back:
            tier.download("x", load.descriptor, size)
            assert load.is_whole()
        else:
            work = lambda: tier.download("x", load.descriptor, size)  # noqa: E731
            assert elapsed_s(work, "did not answer within") < 2 * tier.timeout_s
    finally:
        striker.join()


def test_closing_ends_what_is_under_way(
    seaweed: SeaweedFS, proxied: Proxied, connect: Connect, bucket: str
) -> None:
    """A thread that waits for the store gets an error, long before its deadline."""
    proxy = proxied(seaweed)
    proxy.is_silent = True
    tier = connect(bucket, seaweed.options(proxy.port), timeout_s=60)
    closer = threading.Timer(0.3, tier.close)
    closer.start()
    assert elapsed_s(lambda: tier.head("x"), "closed meanwhile") < tier.timeout_s / 3
    closer.join()
    tier.close()
    with pytest.raises(StoreError, match="is closed"):
        tier.head("x")


def test_a_fork_of_a_process_that_used_it_is_told(seaweed: SeaweedFS, bucket: str) -> None:
    """obstore would hang there; the error says how to avoid it. And an exit waits for nothing."""
    script = f"""
import os
from vllm_kvmarket.core.errors import StoreError
from vllm_kvmarket.store.object_tier import ObjectTier
make = lambda: ObjectTier({bucket!r}, {seaweed.options()!r})
tier = make()
tier.put_bytes("x", b"content")
if os.fork() == 0:
    for mine in (tier, make()):
        try:
            mine.get_bytes("x")
        except StoreError as error:
            assert "forked" in str(error)
        else:
            os._exit(1)
        mine.close()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
assert tier.get_bytes("x") == b"content"
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=60)


def test_the_breaker_lets_one_probe_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure none may call, then one: its failure doubles the pause, an answer ends it."""
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    breaker = Breaker()
    assert breaker.enter() == breaker.enter() == 0
    breaker.failed()
    breaker.failed()
    assert breaker.enter() == 5
    now_s += 5
    assert breaker.enter() == 0
    assert breaker.enter() > 0
    breaker.failed()
    assert breaker.enter() == 10
    now_s += 10
    assert breaker.enter() == 0
    breaker.answered()
    assert breaker.enter() == breaker.enter() == 0
