"""The market's database is its owner's alone."""

import contextlib
import os
import subprocess
import sys

import pytest

from vllm_kvmarket.catalogue import Catalogue
from vllm_kvmarket.core import sqlite
from vllm_kvmarket.core.durable_files import make_private
from vllm_kvmarket.core.errors import ConfigError
from vllm_kvmarket.market.market import Market


def modes(folder):
    return {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}


def test_a_database_and_its_companions_are_private(tmp_path):
    """With any umask; the write-ahead log holds rows too."""
    before = os.umask(0)
    try:
        with contextlib.closing(sqlite.connect(tmp_path / "new" / "m.sqlite")) as db:
            db.execute("CREATE TABLE t (x); INSERT INTO t VALUES (1)")
            found = modes(tmp_path / "new")
    finally:
        os.umask(before)
    assert found == {"m.sqlite": 0o600, "m.sqlite-wal": 0o600, "m.sqlite-shm": 0o600}
    assert modes(tmp_path) == {"new": 0o700}


def test_a_readable_database_from_before_becomes_private(tmp_path):
    """With its log, which another process has open."""
    path = tmp_path / "m.sqlite"
    with contextlib.closing(sqlite.connect(path)) as other:
        other.execute("CREATE TABLE t (x)")
        for each in tmp_path.iterdir():
            each.chmod(0o644)
        with contextlib.closing(sqlite.connect(path)) as db:
            assert db.execute("SELECT count(*) FROM t").fetchall() == [(0,)]
        assert set(modes(tmp_path).values()) == {0o600}


def test_a_market_is_its_owners_alone(tmp_path):
    """The home is closed to others, also one that was open; no file in it is readable by them."""
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    home.chmod(0o755)
    with Market.open(home) as market:
        market.create_account("alice")
        files = [path for path in home.rglob("*") if path.is_file()]
        assert home.stat().st_mode & 0o777 == 0o700
        assert {path.name for path in files} >= {"market.sqlite", "market.sqlite-wal"}
        assert [path.name for path in files if path.stat().st_mode & 0o077] == []


@pytest.mark.parametrize(("version", "age"), [(7, "an older"), (9, "a newer")])
def test_tables_of_a_version_that_is_not_known_are_refused_and_left_alone(tmp_path, version, age):
    """In one line, which says what to do: this code would spoil them."""
    path = tmp_path / "m.sqlite"
    Catalogue.open(path).close()
    with contextlib.closing(sqlite.connect(path)) as db:
        db.execute("UPDATE schema_version SET version = ? WHERE room = 'catalogue'", (version,))
        with pytest.raises(ConfigError, match=rf"by {age} kvmarket \(version {version}, .* 8\)"):
            Catalogue.open(path)
        kept = db.execute("SELECT version FROM schema_version WHERE room = 'catalogue'").fetchall()
        assert kept == [(version,)]


def test_opening_twice_keeps_this_processs_locks(tmp_path):
    """Another process must not take itself for the database's only user."""
    path = tmp_path / "m.sqlite"
    # SQLite's readers share these bytes; it takes them alone before it removes the log.
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'r+b'); "
        "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 510, 0x40000002)"
    )
    with contextlib.closing(sqlite.connect(path)) as first:
        first.execute("CREATE TABLE t (x)")
        with contextlib.closing(sqlite.connect(path)):
            command = [sys.executable, "-c", code, str(path)]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert "BlockingIOError" in done.stderr


def test_a_missing_file_is_no_error(tmp_path):
    """It may have been removed meanwhile."""
    make_private(tmp_path / "none")
