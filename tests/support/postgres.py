"""A real PostgreSQL for tests: made, started, stopped and crashed by them, on a free port."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg

from tests.support.missing import skip_without

VERSIONS = Path("/usr/lib/postgresql")
START_S = 30.0


def binaries() -> Path | None:
    """The newest installed server's programs, or those on PATH."""
    installed = sorted(VERSIONS.glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    found = str(installed[-1]) if installed else shutil.which("postgres")
    return Path(found).parent if found else None


def needed_binaries() -> Path:
    """The programs; where there are none, or nobody who may run them, the test is skipped."""
    programs = binaries()
    if programs is None:
        skip_without("no PostgreSQL server on this machine: apt-get install postgresql")
    if os.getuid() == 0 and not any(user.pw_name == "postgres" for user in pwd.getpwall()):
        skip_without("PostgreSQL does not run as root, and there is no user `postgres`")
    return programs


class PostgreSQL:
    """One server with its own folder; `url` reaches it over loopback, `local_url` over a socket.

    With `primary`, which must run, it is a hot standby of that one.
    """

    def __init__(self, programs: Path, primary: PostgreSQL | None = None) -> None:
        self._programs = programs
        # Not pytest's folder: that is closed to the user that the server runs as.
        self.folder = Path(tempfile.mkdtemp(prefix="kvmarket-pg-"))
        self._data = self.folder / "data"
        self._process: subprocess.Popen[bytes] | None = None
        # PostgreSQL refuses to run as root.
        self._user = "postgres" if os.getuid() == 0 else None
        if self._user:
            os.chown(self.folder, pwd.getpwnam(self._user).pw_uid, -1)
        if primary is not None:
            self._run(
                "pg_basebackup", "-D", str(self._data), "-R", "--checkpoint=fast",
                "-d", primary.url("postgres"),
            )  # fmt: skip
        else:
            self._run(
                "initdb", "-D", str(self._data), "-U", "market", "-A", "trust", "-E", "UTF8", "-N",
                "--locale=C",
            )  # fmt: skip
        with socket.socket() as chosen:
            chosen.bind(("127.0.0.1", 0))
            self.port = chosen.getsockname()[1]

    def _identity(self) -> dict[str, object]:
        if self._user is None:
            return {}
        entry = pwd.getpwnam(self._user)
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._programs / program), *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            **self._identity(),
        )
        assert done.returncode == 0, done.stderr

    def start(self, *options: str) -> None:
        """Start with options like `-c fsync=off`, and wait until it lets clients in."""
        log = (self.folder / "log").open("ab")
        self._process = subprocess.Popen(
            [
                str(self._programs / "postgres"), "-D", str(self._data), "-p", str(self.port),
                "-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self.folder}",
                "-c", "max_connections=200", "-c", "shared_buffers=32MB", *options,
            ],
            stdout=log,
            stderr=log,
            cwd=self.folder,
            **self._identity(),
        )  # fmt: skip
        log.close()
        deadline = time.monotonic() + START_S
        while True:
            try:
                psycopg.connect(self.url("postgres")).close()
                return
            except psycopg.OperationalError:
                assert self._process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End it: SIGINT rolls back and disconnects everybody, SIGQUIT is a crash."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(timeout=START_S)
            self._process = None

    def wait_for_standby(self) -> None:
        """From now on confirm only what a standby has on its disk; it follows on return."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as db:
            db.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            db.execute("SELECT pg_reload_conf()")
            deadline = time.monotonic() + START_S
            state = "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"
            while not db.execute(state).fetchall():
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.05)

    def promote(self) -> None:
        """Make a standby the primary; it takes writes on return."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as db:
            assert db.execute("SELECT pg_promote()").fetchone() == (True,)

    def close(self) -> None:
        """Stop for good, without a last checkpoint; nothing is left."""
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder)

    def url(self, database: str) -> str:
        """Over loopback."""
        return f"postgresql://market@127.0.0.1:{self.port}/{database}"

    def local_url(self, database: str) -> str:
        """Over the socket in its folder."""
        return f"postgresql://market@/{database}?host={self.folder}&port={self.port}"

    def create_database(self, name: str) -> str:
        """A new, empty database; its URL."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as db:
            db.execute(f'CREATE DATABASE "{name}"')
        return self.url(name)


def running_postgres() -> Iterator[PostgreSQL]:
    """A server that runs until the fixture that yields from this ends."""
    server = PostgreSQL(needed_binaries())
    try:
        server.start()
        yield server
    finally:
        server.close()
