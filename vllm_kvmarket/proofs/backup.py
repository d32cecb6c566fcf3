"""Backup of a live market, and its restoration into an empty home.

A backup is a folder: `database`, `signing/` with public keys, `trusted/`, `log/checkpoints.jsonl`,
with chunks `chunks/`, and at last `backup.json` with every file's digest: a folder without it is no
backup. The home's secret keys are left out, or are in `keys.sealed`, which a passphrase opens. The
database is copied by SQLite in one read transaction, beside engines that go on charging
(https://www.sqlite.org/backup.html). Checkpoints are copied before it and keys after it, so that
the copy has every transfer that a copied checkpoint counts, and every key that signed one. A ledger
in PostgreSQL is replayed into the copy's database, so that a backup is a whole market either way.

Restoring an older backup takes back what was booked since. Anyone with a checkpoint from that
time can tell: no consistency proof leads to it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import apsw
import msgspec
from blake3 import blake3

from vllm_kvmarket.auth.operator_tokens import SECRET_FILE
from vllm_kvmarket.auth.sealed_keys import seal, unseal
from vllm_kvmarket.auth.signing_keys import KEY_SUFFIX, KEYS_FOLDER, TRUSTED_FOLDER
from vllm_kvmarket.catalogue import queries
from vllm_kvmarket.catalogue.listing import ON_OFFER
from vllm_kvmarket.core import sqlite
from vllm_kvmarket.core.durable_files import sync_path, write_durably
from vllm_kvmarket.core.errors import ConfigError, NotFoundError, ProofError, StoreError
from vllm_kvmarket.ledger import Ledger
from vllm_kvmarket.market.market import DATABASE_FILE, Market
from vllm_kvmarket.proofs.ledger_check import LedgerCheck, check_ledger
from vllm_kvmarket.proofs.log import CHECKPOINTS_FILE, EPOCHS_FILE, LOG_FOLDER
from vllm_kvmarket.proofs.replay import replay
from vllm_kvmarket.store import CHUNKS_FOLDER

FORMAT = 1
MANIFEST = "backup.json"
DATABASE = "database"
PIECE_BYTES = 1 << 20
_READ_ONLY = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
SEALED_KEYS = "keys.sealed"
_FIRST_PARTS = {DATABASE, SEALED_KEYS, KEYS_FOLDER, TRUSTED_FOLDER, LOG_FOLDER, CHUNKS_FOLDER}

# Called with the name of each file that was copied.
Progress = Callable[[str], object]


class BackedUpFile(msgspec.Struct, frozen=True):
    """A file of a backup; the digest is BLAKE3."""

    name: str
    bytes: int
    blake3: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The content of backup.json."""

    format: int
    with_keys: bool
    made_at_s: float
    with_chunks: bool
    files: list[BackedUpFile]
    chunks_missing: list[str]


class BackupReport(msgspec.Struct, frozen=True, kw_only=True):
    """A backup that was made or restored; `chunks_missing` says which chunks it lacks, and why."""

    folder: str
    home: str
    files: int
    bytes: int
    chunks: int
    chunks_missing: list[str]
    # Whether the market's secret keys are in it, or were restored; else new ones are made.
    with_keys: bool
    check: LedgerCheck


def backup(
    market: Market,
    folder: Path,
    *,
    with_chunks: bool = False,
    passphrase: str | None = None,
    on_progress: Progress | None = None,
) -> BackupReport:
    """Copy a live market into a folder that is new or empty, and check the copy.

    With a passphrase, the secret keys are in it, encrypted; else they are left out. Raises
    ConfigError for a short passphrase and for a market in PostgreSQL; ProofError when the folder is
    in use; LedgerError, OSError. What is unfinished then is no backup.
    """
    if market.config.database_url is not None:
        raise ConfigError(
            "this market is in PostgreSQL: use its backups (pg_dump, or point-in-time recovery), "
            "and copy the keys in each home"
        )
    _claim(folder)
    copier = _Copier(folder, on_progress)
    log = market.home / LOG_FOLDER / CHECKPOINTS_FILE
    if log.exists():
        # Under half a line there may be a whole one soon: what is there now was signed before.
        copier.add(f"{LOG_FOLDER}/{CHECKPOINTS_FILE}", log)
    epochs = market.home / LOG_FOLDER / EPOCHS_FILE
    if epochs.exists():
        copier.add(f"{LOG_FOLDER}/{EPOCHS_FILE}", epochs)
    newest = market.ledger.transfers(limit=1)
    _copy_database(market.home / DATABASE_FILE, folder / DATABASE)
    if market.config.ledger_url is not None:
        replay(market.ledger, folder / DATABASE)
        _into_one_file(folder / DATABASE)
    copier.note(DATABASE)
    for path in sorted(market.home.glob(f"{TRUSTED_FOLDER}/[!.]*")):
        copier.add(path.relative_to(market.home).as_posix(), path)
    for name, content in market.signing_keys.public_files().items():
        copier.write(f"{KEYS_FOLDER}/{name}", content)
    if passphrase is not None:
        patterns = (SECRET_FILE, f"{KEYS_FOLDER}/[!.]*{KEY_SUFFIX}")
        secret = [path for pattern in patterns for path in market.home.glob(pattern)]
        named = {path.relative_to(market.home).as_posix(): path.read_bytes() for path in secret}
        copier.write(SEALED_KEYS, seal(named, passphrase))
    missing = _copy_chunks(market, folder, copier) if with_chunks else []
    manifest = Manifest(
        format=FORMAT,
        made_at_s=time.time(),
        with_chunks=with_chunks,
        with_keys=passphrase is not None,
        files=copier.files,
        chunks_missing=missing,
    )
    encoded = msgspec.json.format(msgspec.json.encode(manifest))
    write_durably(folder / MANIFEST, encoded)
    sync_path(folder.absolute().parent)
    report = check_backup(folder, must_have=[each.id for each in newest])
    return _report(folder, market.home, manifest, report, with_keys=manifest.with_keys)


def restore(
    folder: Path,
    home: Path,
    on_progress: Progress | None = None,
    *,
    ledger_url: str | None = None,
    passphrase: str | None = None,
) -> BackupReport:
    """Put a backup into a home that is empty or not there, and check it.

    Without the passphrase of its sealed keys, the market makes new ones: receipts from before can
    be verified still, people sign in again, and others have to trust the new key. With
    `ledger_url`, the ledger is put into that database as well, which has none yet. Raises
    ProofError for what is no whole backup, and for a home or ledger in use; OSError, LedgerError.
    The home is there whole, or as it was.
    """
    manifest = _read_manifest(folder)
    home = home.absolute()
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise ProofError(f"{home} is not empty; restore into a new folder, then look at both")
    home.parent.mkdir(parents=True, exist_ok=True)
    draft = home.parent / f".{home.name}.restoring-{secrets.token_hex(8)}"
    try:
        _unpack(manifest, folder, draft, on_progress, with_chunks=True)
        if passphrase is not None:
            _unseal(manifest, draft, passphrase)
        (draft / SEALED_KEYS).unlink(missing_ok=True)
        report = _check_home(draft)
        if ledger_url is not None:
            with Ledger.open(draft / DATABASE_FILE) as ledger:
                replay(ledger, ledger_url)
            with Ledger.open(ledger_url) as ledger:
                report = check_ledger(ledger, draft)
        if home.exists():
            home.rmdir()
        draft.rename(home)
    finally:
        if draft.exists():
            shutil.rmtree(draft)
    sync_path(home.parent)
    return _report(folder, home, manifest, report, with_keys=passphrase is not None)


def check_backup(
    folder: Path, given: Iterable[str] = (), must_have: Iterable[str] = ()
) -> LedgerCheck:
    """Check a backup without restoring it, as `check_ledger` does a home; not its chunks.

    `must_have` are ids of transfers. Raises as `restore` does, and when it does not have one.
    """
    manifest = _read_manifest(folder)
    with tempfile.TemporaryDirectory(prefix=".check-", dir=folder) as scratch:
        draft = Path(scratch) / "home"
        _unpack(manifest, folder, draft, None, with_chunks=False)
        return _check_home(draft, given, must_have)


def _check_home(
    home: Path, given: Iterable[str] = (), must_have: Iterable[str] = ()
) -> LedgerCheck:
    with contextlib.closing(sqlite.connect(home / DATABASE_FILE)) as db:
        damage = [line for (line,) in db.execute("PRAGMA quick_check") if line != "ok"]
    if damage:
        raise ProofError(f"the backup's database is damaged: {damage[0]}; take an older backup")
    with Ledger.open(home / DATABASE_FILE) as ledger:
        for transfer_id in must_have:
            try:
                ledger.transfer(transfer_id)
            except NotFoundError:
                raise ProofError(
                    f"transfer {transfer_id} is not in the copy: the ledger is not the one "
                    "that the market's configuration names; give the right --config"
                ) from None
        return check_ledger(ledger, home, given)


def _claim(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ProofError(f"{folder} is not empty; give a new folder for each backup")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _unseal(manifest: Manifest, home: Path, passphrase: str) -> None:
    if not manifest.with_keys:
        raise ProofError("the backup has no secret keys; restore it without a passphrase")
    for name, content in unseal((home / SEALED_KEYS).read_bytes(), passphrase).items():
        # Nobody but an owner of the passphrase wrote these names; no other file is written anyway.
        parts = PurePosixPath(name).parts
        if name != SECRET_FILE and (len(parts) != 2 or parts[0] != KEYS_FOLDER or ".." in parts):
            raise ProofError(f"{SEALED_KEYS} names {name!r}, which is no key")
        (home / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_durably(home / name, content)


def _copy_database(source: Path, target: Path) -> None:
    """Copy a database of one moment into a single file."""
    with (
        contextlib.closing(apsw.Connection(str(source))) as live,
        contextlib.closing(apsw.Connection(str(target))) as copy,
    ):
        live.set_busy_timeout(sqlite.BUSY_TIMEOUT_MS)
        # All pages in one step: one read transaction, which no writer waits for.
        with copy.backup("main", live, "main") as running:
            while not running.done:
                running.step(-1)
    _into_one_file(target)


def _into_one_file(path: Path) -> None:
    """Leave nothing of a database in files beside it; durable on return."""
    with contextlib.closing(apsw.Connection(str(path))) as db:
        db.pragma("journal_mode", "delete")
    path.chmod(0o600)
    sync_path(path)


def _copy_chunks(market: Market, folder: Path, copier: _Copier) -> list[str]:
    """Copy every chunk that a listing of the copied catalogue needs; what is not there."""
    # As the copy has it, and written to by nobody.
    with contextlib.closing(
        apsw.Connection(f"file:{quote(str(folder / DATABASE))}?immutable=1", flags=_READ_ONLY)
    ) as db:
        needed = queries.all_held(db, ON_OFFER)
    missing = []
    for key in sorted(needed):
        try:
            shares = market.store.files(key)
            if not shares:
                raise StoreError("has no file")
            for share in shares:
                with market.store.open_share(key, *share[:2], layout=share.layout) as chunk:
                    chunk.verify()
                path = market.store.disk.path(key, *share)
                copier.add(f"{CHUNKS_FOLDER}/{path.relative_to(market.store.disk.root)}", path)
        except (StoreError, FileNotFoundError) as error:
            missing.append(f"{key.hex()}: {error}")
    return missing


class _Copier:
    """Copies files into a backup and remembers their digests."""

    def __init__(self, folder: Path, on_progress: Progress | None) -> None:
        self._folder = folder
        self._on_progress = on_progress
        self.files: list[BackedUpFile] = []

    def add(self, name: str, source: Path) -> None:
        path = self._folder / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        size, digest = _copy(source, path, _mode(name))
        self._note(name, size, digest)

    def write(self, name: str, content: bytes) -> None:
        path = self._folder / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_durably(path, content)
        self.note(name)

    def note(self, name: str) -> None:
        """A file that is in the backup already."""
        path = self._folder / name
        self._note(name, path.stat().st_size, blake3().update_mmap(path).hexdigest())

    def _note(self, name: str, size: int, digest: str) -> None:
        self.files.append(BackedUpFile(name, size, digest))
        if self._on_progress is not None:
            self._on_progress(name)


def _unpack(
    manifest: Manifest,
    folder: Path,
    home: Path,
    on_progress: Progress | None,
    *,
    with_chunks: bool,
) -> None:
    """Lay a home out, every file verified and durable."""
    home.mkdir(mode=0o700)
    for file in manifest.files:
        if file.name.startswith(f"{CHUNKS_FOLDER}/") and not with_chunks:
            continue
        target = home / (DATABASE_FILE if file.name == DATABASE else file.name)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        source = folder / file.name
        try:
            found = _copy(source, target, _mode(file.name))
        except FileNotFoundError:
            raise ProofError(f"{source} is missing; take another backup") from None
        if found != (file.bytes, file.blake3):
            raise ProofError(f"{source} was damaged or changed; take another backup")
        if on_progress is not None:
            on_progress(file.name)
    for place, _, _ in os.walk(home):
        sync_path(Path(place))


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise ProofError(
            f"{folder} is no backup, or an unfinished one: there is no {MANIFEST} in it"
        ) from None
    except msgspec.DecodeError as error:
        raise ProofError(f"{path} is damaged ({error}); take another backup") from None
    if manifest.format != FORMAT:
        raise ProofError(f"{path} has format {manifest.format}; this version reads {FORMAT}")
    for file in manifest.files:
        parts = PurePosixPath(file.name).parts
        if not parts or parts[0] not in _FIRST_PARTS or ".." in parts:
            raise ProofError(f"{path} names {file.name!r}, which is no file of a backup")
    return manifest


def _report(
    folder: Path, home: Path, manifest: Manifest, report: LedgerCheck, *, with_keys: bool
) -> BackupReport:
    return BackupReport(
        folder=str(folder),
        home=str(home),
        files=len(manifest.files),
        bytes=sum(file.bytes for file in manifest.files),
        chunks=sum(file.name.startswith(f"{CHUNKS_FOLDER}/") for file in manifest.files),
        chunks_missing=manifest.chunks_missing,
        with_keys=with_keys,
        check=report,
    )


def _mode(name: str) -> int:
    """Chunks are no secret, keys and books are."""
    return 0o644 if name.startswith(f"{CHUNKS_FOLDER}/") else 0o600


def _copy(source: Path, target: Path, mode: int) -> tuple[int, str]:
    """Copy a file durably; its size and digest."""
    size, digest = 0, blake3()
    # The source first: what has gone meanwhile leaves nothing at the target.
    with source.open("rb") as original:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as stream:
            while piece := original.read(PIECE_BYTES):
                digest.update(piece)
                stream.write(piece)
                size += len(piece)
            stream.flush()
            os.fsync(descriptor)
    return size, digest.hexdigest()
