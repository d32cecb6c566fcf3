"""The machine's index beside everything else: its file, its processes, its loss, its age."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import apsw
import pytest

from tests.support.catalogue_documents import (
    NAMESPACE,
    ended,
    heard,
    listing_of,
    matched,
    publish,
    start_process,
    tokens,
)
from vllm_kvmarket.catalogue import Catalogue, index_file, queries
from vllm_kvmarket.catalogue import index as index_module
from vllm_kvmarket.catalogue.first_offers import LISTINGS
from vllm_kvmarket.catalogue.sqlite_connections import SqliteConnections
from vllm_kvmarket.core.errors import CatalogueError, CatalogueUnavailableError, ConfigError
from vllm_kvmarket.core.model_identity import ROOT
from vllm_kvmarket.core.pricing import Tariff

DOCUMENT = tokens(700)
PARTED = [*DOCUMENT[:300], 1, 2, 3]


@pytest.fixture
def far(monkeypatch) -> None:
    """SQLite, read as if it were on another machine."""
    monkeypatch.setattr(SqliteConnections, "is_near", False)


def read_from_now_on(monkeypatch) -> list[str]:
    """Which documents are read from the database to be put into the index."""
    read: list[str] = []
    read_changes = queries.read_changes

    def noted(*asked):
        changes = read_changes(*asked)
        read.extend(change.listing.document_id for change in changes)
        return changes

    monkeypatch.setattr(queries, "read_changes", noted)
    return read


def folders(path: Path) -> list[Path]:
    return sorted((path.parent / "index").iterdir())


def lookup_threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("kvmarket-match")]


# What a match says


def test_a_match_names_its_chunks_and_is_cut_anywhere(catalogue):
    """Keys, parents and how far it reaches into each; `until` cuts as a shorter request would."""
    listing = publish(catalogue, DOCUMENT)
    keys = listing.chunk_keys
    longer = publish(catalogue, [*DOCUMENT[:600], *tokens(100, 1)])
    match = catalogue.match(NAMESPACE, [*DOCUMENT[:600], *tokens(50, 1), 9, 9])
    assert [(each.listing, each.end) for each in match.segments] == [(listing, 600), (longer, 650)]
    assert [(each.key, each.parent) for each in match.chunks] == list(
        zip(longer.chunk_keys, (ROOT, *longer.chunk_keys), strict=False)
    )
    assert [(each.matched, each.token_count) for each in match.chunks] == [
        (256, 256), (256, 256), (138, 188),
    ]  # fmt: skip
    assert match.whole is None
    for end in (1, 256, 300, 512, 600, 620):
        cut, asked = match.until(end), catalogue.match(NAMESPACE, [*DOCUMENT, 1][:end])
        if end <= 600:
            assert cut.segments == asked.segments
            assert [each.matched for each in cut.chunks] == [each.matched for each in asked.chunks]
    whole = catalogue.match(NAMESPACE, DOCUMENT)
    assert whole.whole == listing
    assert [each.key for each in whole.chunks] == list(keys)


# Processes


def test_what_another_process_took_over_is_not_read_again(catalogue, path, monkeypatch):
    """One index for all: a process that opens it finds it as new as it was left."""
    listing = publish(catalogue, DOCUMENT)
    read = read_from_now_on(monkeypatch)
    process = start_process(
        """
with Catalogue.open(place) as catalogue:
    print(matched(catalogue, tokens(700)), flush=True)
    publish(catalogue, tokens(700, 1))
""",
        path,
    )
    assert heard(process) == "700"
    assert ended(process) == 0
    assert matched(catalogue, tokens(700, 1)) == 700
    with Catalogue.open(path) as second:
        assert second.match(NAMESPACE, DOCUMENT).listing == listing
        assert second.match(NAMESPACE, tokens(700, 1)).token_count == 700
    assert read == []


def test_a_process_that_dies_while_it_writes_leaves_a_whole_index(path):
    """Killed in the middle of a change: the next one to look makes that change."""
    with Catalogue.open(path) as catalogue:
        first = publish(catalogue, DOCUMENT)
        process = start_process(
            """
from vllm_kvmarket.catalogue.first_offers import FirstOffers
insert = FirstOffers._insert
def stuck(*asked):
    insert(*asked)
    print("in the middle", flush=True)
    time.sleep(60)
FirstOffers._insert = stuck
with Catalogue.open(place) as catalogue:
    publish(catalogue, tokens(700, 1))
""",
            path,
        )
        assert heard(process) == "in the middle"
        process.send_signal(signal.SIGKILL)
        assert ended(process) == -signal.SIGKILL
        catalogue.refresh()
        assert matched(catalogue, tokens(700, 1)) == 700
        assert catalogue.match(NAMESPACE, DOCUMENT).listing == first
        assert catalogue.check_integrity() == []


def test_a_forked_child_opens_the_index_for_itself(path):
    """What the parent had open is not touched, and goes on working."""
    with Catalogue.open(path) as catalogue:
        publish(catalogue, DOCUMENT)
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                own = Catalogue.open(path)
                publish(own, tokens(700, 1))
                os._exit(0 if matched(own, DOCUMENT) == 700 else 1)
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        catalogue.refresh()
        assert matched(catalogue, tokens(700, 1)) == 700


# Loss and age


def test_a_lost_index_is_made_again(path, caplog):
    """Also while it is used, by all who use it; an unreadable one is said once."""
    with Catalogue.open(path) as catalogue, Catalogue.open(path) as other:
        listing = publish(catalogue, DOCUMENT)
        shutil.rmtree(path.parent / "index")
        for each in (catalogue, other):
            each.refresh()
            assert each.match(NAMESPACE, DOCUMENT).listing == listing
        assert caplog.records == []
        with catalogue.index._file.writing() as rows:
            ((place, _),) = rows.scan(LISTINGS, b"")
            rows.put(LISTINGS, place, b"?")
        assert catalogue.match(NAMESPACE, DOCUMENT) is None
        (problem,) = other.check_integrity()
        assert "cannot be read" in problem
        assert other.match(NAMESPACE, DOCUMENT) is None
        for each in (catalogue, other):
            each.refresh()
            assert each.match(NAMESPACE, DOCUMENT).listing == listing
            assert each.check_integrity() == []
    assert "cannot be read" in caplog.text


def test_a_file_that_is_no_index_is_made_again(path):
    """Whatever wrote it."""
    with Catalogue.open(path) as catalogue:
        publish(catalogue, DOCUMENT)
    (folder,) = folders(path)
    (folder / "index.sqlite").write_bytes(b"This is a diary. " * 1000)
    with Catalogue.open(path) as catalogue:
        assert matched(catalogue, DOCUMENT) == 700


def test_an_index_that_is_newer_than_its_database_is_made_again(path, tmp_path):
    """The database was restored from a copy: what was published since is off the market."""
    with Catalogue.open(path) as catalogue:
        publish(catalogue, DOCUMENT)
    copy = tmp_path / "copy"
    shutil.copy(path, copy)
    with Catalogue.open(path) as catalogue:
        publish(catalogue, tokens(700, 1))
    shutil.copy(copy, path)
    with Catalogue.open(path) as catalogue:
        assert matched(catalogue, DOCUMENT) == 700
        assert matched(catalogue, tokens(700, 1)) == 0
        assert catalogue.check_integrity() == []


def test_another_database_or_tariff_has_another_index(path, tmp_path):
    """In the same folder, too; what nobody uses any more is removed."""
    shared = tmp_path / "indexes"
    other = path.with_name("other.sqlite")
    dear = Tariff(input_nano_per_mtok=10, cache_read_nano_per_mtok=1)
    with (
        Catalogue.open(path, index_folder=shared) as one,
        Catalogue.open(other, index_folder=shared) as two,
        Catalogue.open(path, index_folder=shared, tariff=dear) as three,
    ):
        first = publish(one, DOCUMENT, cache_read_nano_per_mtok=11)
        second = publish(one, [*DOCUMENT, 5], cache_read_nano_per_mtok=10)
        three.refresh()
        assert matched(two, DOCUMENT) == 0
        assert one.match(NAMESPACE, DOCUMENT).listing == first
        # Where computing is cheaper, the first listing cannot be sold.
        assert three.match(NAMESPACE, DOCUMENT).listing == second
        one.set_price(second.document_id, 11)
        three.refresh()
        assert three.match(NAMESPACE, DOCUMENT).listing == first
        assert all(each.check_integrity() == [] for each in (one, two, three))
        assert len(list(shared.iterdir())) == 3
    with Catalogue.open(path, index_folder=shared):
        assert len(list(shared.iterdir())) == 1


def test_an_index_that_is_behind_sells_nothing(path, monkeypatch):
    """Opening does not wait for it: what was delisted meanwhile could still be in it."""
    with Catalogue.open(path) as catalogue:
        gone = publish(catalogue, DOCUMENT)
        shutil.copytree(path.parent / "index", path.parent / "old")
        catalogue.delist(gone.document_id)
        for seed in range(1, 4):
            publish(catalogue, tokens(300, seed))
    shutil.rmtree(path.parent / "index")
    (path.parent / "old").rename(path.parent / "index")
    monkeypatch.setattr(index_module, "_AT_ONCE", 1)
    with monkeypatch.context() as hurried:
        hurried.setattr(index_module, "_AT_MOST_S", -1)
        catalogue = Catalogue.open(path)
    with catalogue:
        assert catalogue.match(NAMESPACE, DOCUMENT) is None
        assert catalogue.index.listing(gone.document_id) is None
        catalogue.watch(0.01)
        deadline = time.monotonic() + 10
        while matched(catalogue, tokens(300, 3)) != 300:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert matched(catalogue, DOCUMENT) == 0
        assert catalogue.check_integrity() == []


def test_an_index_on_a_network_disk_is_refused(path, tmp_path, monkeypatch):
    """Machines that shared one file would spoil it; another folder is named by the setting."""
    mounts = tmp_path / "mountinfo"
    monkeypatch.setattr(index_file, "_MOUNTS", mounts)
    root = "22 1 8:1 / / rw - ext4 /dev/sda1 rw"
    mounts.write_text(f"{root}\n30 22 0:50 / {tmp_path} rw shared:1 - nfs4 server:/ rw\n")
    with pytest.raises(ConfigError, match=r"network disk \(nfs4\); set index_folder"):
        Catalogue.open(path)
    mounts.write_text(f"{root}\n30 22 0:50 / {tmp_path}/elsewhere rw - nfs4 server:/ rw\n")
    Catalogue.open(path).close()


def test_the_index_is_its_owners_alone(catalogue, path):
    """Others on the machine do not read what is on offer."""
    publish(catalogue, DOCUMENT)
    for each in [path.parent / "index", *(path.parent / "index").rglob("*")]:
        assert each.stat().st_mode & 0o077 == 0, each


def test_a_folder_of_others_keeps_its_rights_and_what_is_in_it(path, tmp_path):
    """`index_folder` may be one where other programs have folders too."""
    shared = tmp_path / "shared"
    (shared / "theirs").mkdir(parents=True)
    (shared / "theirs" / "in-use").touch()
    shared.chmod(0o777)
    Catalogue.open(path, index_folder=shared).close()
    Catalogue.open(path, index_folder=shared, tariff=Tariff(input_nano_per_mtok=3)).close()
    assert shared.stat().st_mode & 0o777 == 0o777
    assert (shared / "theirs" / "in-use").exists() and len(list(shared.iterdir())) == 2


def test_an_index_that_another_user_may_have_made_is_refused(path, tmp_path):
    """It would say what documents cost, and who earns."""
    shared = tmp_path / "shared"
    with Catalogue.open(path, index_folder=shared) as catalogue:
        publish(catalogue, DOCUMENT)
    (made,) = shared.iterdir()
    made.rename(shared / "elsewhere")
    made.symlink_to(shared / "elsewhere")
    Catalogue.open(path, index_folder=shared).close()
    shared.chmod(0o777)
    with pytest.raises(ConfigError, match="which another user has made; set index_folder"):
        Catalogue.open(path, index_folder=shared)


def test_a_database_that_fails_at_the_start_leaves_nothing_open(path, monkeypatch):
    """Neither the index's file nor its lock, nor the database itself."""
    Catalogue.open(path).close()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for failing in ("news", "transaction"):
        with monkeypatch.context() as broken:
            broken.setattr(SqliteConnections, failing, _away)
            with pytest.raises(CatalogueError, match="away") as refused:
                Catalogue.open(path)
        assert len(list(Path("/proc/self/fd").iterdir())) == before, refused


def _away(*_args, **_kwargs):
    raise CatalogueUnavailableError("it is away")


# Time to live


def test_what_has_ended_is_not_matched_though_nobody_looked(catalogue):
    """From the moment on; what others own before it still is."""
    publish(catalogue, DOCUMENT[:512])
    publish(catalogue, DOCUMENT, expires_at_s=time.time() + 0.3)
    publish(catalogue, [*DOCUMENT, 7])
    assert [each.end for each in catalogue.match(NAMESPACE, [*DOCUMENT, 7]).segments] == [
        512, 700, 701,
    ]  # fmt: skip
    time.sleep(0.35)
    assert catalogue.match(NAMESPACE, [*DOCUMENT, 7]).token_count == 512
    catalogue.refresh()
    found = catalogue.match(NAMESPACE, [*DOCUMENT, 7])
    assert [each.end for each in found.segments] == [512, 701]


# Tokens on another machine


@pytest.mark.usefixtures("far")
def test_only_a_match_that_ends_inside_a_chunk_waits_for_another_machine(path):
    """By a thread, once: tokens that were read are kept."""
    with Catalogue.open(path) as catalogue:
        publish(catalogue, DOCUMENT)
    with Catalogue.open(path) as catalogue:
        for asked, count in ((DOCUMENT, 700), ([*DOCUMENT, 1], 700), (DOCUMENT[:512], 512)):
            assert catalogue.match_later(NAMESPACE, asked).done()
            assert catalogue.match(NAMESPACE, asked).token_count == count
        assert lookup_threads() == []
        assert catalogue.match(NAMESPACE, PARTED).token_count == 256
        assert catalogue.match_later(NAMESPACE, PARTED).result().token_count == 300
        assert lookup_threads() != []
        assert catalogue.match_later(NAMESPACE, [*PARTED, 9]).done()
        assert catalogue.match(NAMESPACE, PARTED).token_count == 300
    assert lookup_threads() == []


@pytest.mark.usefixtures("far")
def test_a_database_that_cannot_be_read_leaves_whole_chunks(path):
    """The future holds the error; who waits gets what the index knows."""
    with Catalogue.open(path) as catalogue:
        publish(catalogue, DOCUMENT)
    with Catalogue.open(path) as catalogue:
        aside = path.with_name("aside")
        path.rename(aside)
        with pytest.raises(CatalogueError, match="is gone"):
            catalogue.match_later(NAMESPACE, PARTED).result()
        assert catalogue.match_anywhere(NAMESPACE, PARTED).token_count == 256
        assert catalogue.match_anywhere(NAMESPACE, [*DOCUMENT, 1]).token_count == 700
        aside.rename(path)
        assert catalogue.match_anywhere(NAMESPACE, PARTED).token_count == 300


def test_writers_do_not_hold_up_who_matches(path):
    """Neither in the database nor in the index."""
    with Catalogue.open(path) as catalogue:
        publish(catalogue, DOCUMENT)
    with Catalogue.open(path) as catalogue:
        other = apsw.Connection(str(path))
        other.execute("BEGIN EXCLUSIVE")
        with catalogue.index._file.writing():
            assert catalogue.match(NAMESPACE, PARTED).token_count == 300
        other.close()


@pytest.mark.usefixtures("far")
def test_closing_ends_what_waits_and_leaves_nothing_open(path, monkeypatch):
    """A running match is finished; threads and descriptors go."""
    Catalogue.open(path).close()
    before = len(list(Path("/proc/self/fd").iterdir()))
    catalogue = Catalogue.open(path)
    publish(catalogue, DOCUMENT)
    go = threading.Event()
    read = queries.tokens_of
    monkeypatch.setattr(queries, "tokens_of", lambda *asked: go.wait(10) and read(*asked))
    futures = [catalogue.match_later(NAMESPACE, PARTED) for _ in range(5)]
    assert not futures[0].done()
    while not futures[1].running():
        time.sleep(0.001)
    threading.Timer(0.05, go.set).start()
    catalogue.close()
    assert [future.cancelled() for future in futures] == [False, False, True, True, True]
    assert futures[0].result().token_count == 300
    assert lookup_threads() == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_progress_is_said_while_a_large_index_is_made(path, monkeypatch, caplog):
    """At most so often; a small one says nothing."""
    with Catalogue.open(path) as catalogue:
        for seed in range(3):
            publish(catalogue, tokens(100, seed))
    shutil.rmtree(path.parent / "index")
    monkeypatch.setattr(index_module, "_AT_ONCE", 1)
    with caplog.at_level(logging.INFO), Catalogue.open(path):
        assert caplog.text == ""
    shutil.rmtree(path.parent / "index")
    monkeypatch.setattr(index_module, "_SAID_EVERY_S", -1)
    with caplog.at_level(logging.INFO), Catalogue.open(path):
        assert caplog.text.count("index at change") == 2


def test_a_purged_document_cannot_hold_up_the_index(path):
    """Its tokens are gone before every machine knows that it is off the market."""
    with Catalogue.open(path) as catalogue:
        publish(catalogue, DOCUMENT)
    copied = path.parent / "old"
    shutil.copytree(path.parent / "index", copied)
    with Catalogue.open(path) as catalogue:
        name = listing_of(DOCUMENT).document_id
        publish(catalogue, PARTED)
        catalogue.delist(name)
        raw = apsw.Connection(str(path))
        raw.execute("DELETE FROM listing_chunk WHERE document_id = ?", (name,))
        raw.execute("DELETE FROM chunk WHERE key NOT IN (SELECT key FROM listing_chunk)")
        raw.close()
    shutil.rmtree(path.parent / "index")
    copied.rename(path.parent / "index")
    with Catalogue.open(path) as catalogue:
        assert matched(catalogue, PARTED) == 303
        assert matched(catalogue, DOCUMENT) == 300
