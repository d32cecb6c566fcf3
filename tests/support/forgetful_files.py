"""A file system that loses power: what was not synced may be gone, whole or in parts."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import NamedTuple

from vllm_kvmarket.core.durable_files import Content, Files
from vllm_kvmarket.store.quota import RECORD_NAME

SECTOR_BYTES = 512
FOLDER = -1


class CrashError(BaseException):
    """The process died here; no `except Exception` may see it."""


class Change(NamedTuple):
    """A change of names in `folder`: `gone` no longer is there, `path` is file number `number`."""

    folder: Path
    gone: Path | None
    path: Path | None
    number: int


class ForgetfulFiles(Files):
    """Real files, and beside them what of them would survive a power cut.

    Before step `crash_at` the process dies: nothing that it tries afterwards has an effect.
    Names are durable when their folder was synced, contents when the file was. With `is_ordered`
    all changes of names become durable in their order, and every sync waits for all before it, as a
    journal does; without, each may survive without the others.
    """

    def __init__(self, root: Path, *, is_ordered: bool, crash_at: int | None = None) -> None:
        self.root = root
        self.is_ordered = is_ordered
        self.crash_at = crash_at
        self.steps = 0
        self.boots = 0
        self._is_dead = False
        self._numbers = 0
        self._now: dict[Path, int] = {}
        self._durable: dict[Path, int] = {}
        self._pending: list[Change] = []
        self._synced: dict[int, bytes] = {}
        self._last: dict[int, bytes] = {}
        self._records: list[bytes] = []

    def boot_id(self) -> str:
        """Changes with each power cut."""
        return str(self.boots)

    def create(self, path: Path, mode: int = 0o600) -> int:
        """Make a file, with its own number."""
        self._step()
        descriptor = super().create(path, mode)
        self._numbers += 1
        self._now[path] = self._numbers
        self._change(Change(path.parent, None, path, self._numbers))
        return descriptor

    def allocate(self, descriptor: int, size: int) -> None:
        """Give it its size; durable with its content."""
        self._step()
        super().allocate(descriptor, size)

    def write(self, descriptor: int, content: Content) -> None:
        """Write it; nothing of it is durable yet."""
        self._step()
        super().write(descriptor, content)

    def record(self, descriptor: int, content: bytes) -> None:
        """Overwrite the record; never durable, as nobody syncs it."""
        self._step()
        super().record(descriptor, content)
        self._records.append(content)

    def sync(self, descriptor: int) -> None:
        """The file's present content survives."""
        self._step()
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        self._synced[self._now[path]] = path.read_bytes()
        if self.is_ordered:
            self._settle(self._pending)

    def rename(self, source: Path, target: Path) -> None:
        """One change within a folder; between folders, without a journal, two."""
        self._step()
        self._remember(target)
        super().rename(source, target)
        number = self._now[target] = self._now.pop(source)
        if source.parent == target.parent or self.is_ordered:
            self._change(Change(target.parent, source, target, number))
        else:
            self._change(Change(source.parent, source, None, number))
            self._change(Change(target.parent, None, target, number))

    def unlink(self, path: Path) -> None:
        """Gone for now; it may come back."""
        self._step()
        self._remember(path)
        super().unlink(path)
        self._change(Change(path.parent, path, None, self._now.pop(path)))

    def remove_tree(self, path: Path) -> None:
        """Folders of others are not part of this model."""
        raise NotImplementedError

    def make_folder(self, path: Path) -> None:
        """A folder that is lost takes along what is in it."""
        self._step()
        super().make_folder(path)
        self._now[path] = FOLDER
        self._change(Change(path.parent, None, path, FOLDER))

    def sync_folder(self, path: Path) -> None:
        """The names in it survive."""
        self._step()
        self._settle([c for c in self._pending if self.is_ordered or c.folder == path])

    def damage(self, path: Path) -> None:
        """Flip the last bit of a file, durably."""
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        self._synced[self._now[path]] = bytes(content)

    def restart(self) -> None:
        """Only the process died; the next one finds everything as it was."""
        self._is_dead, self.crash_at = False, None

    def power_cut(self, rng: random.Random) -> None:
        """Leave on the disk what survives, and start again."""
        for path in self._now:
            self._remember(path)
        survivors = self._pending[: rng.randint(0, len(self._pending))]
        if not self.is_ordered:
            survivors = [change for change in self._pending if rng.random() < 0.5]
        self._settle(survivors)
        contents = {
            path: self._content_after(number, rng)
            for path, number in self._durable.items()
            if number != FOLDER
        }
        shutil.rmtree(self.root)
        self.root.mkdir()
        folders = [path for path, number in self._durable.items() if number == FOLDER]
        for folder in folders:
            folder.mkdir()
        for path, content in contents.items():
            if path.parent.is_dir():
                path.write_bytes(content)
        if self._records:
            (self.root / RECORD_NAME).write_bytes(rng.choice(self._records))
        self._now = {path: n for path, n in self._durable.items() if path.exists()}
        self._durable = dict(self._now)
        self._synced |= {self._now[p]: c for p, c in contents.items() if p in self._now}
        self._pending, self._last, self._records = [], {}, []
        self.boots += 1
        self.restart()

    def _step(self) -> None:
        self.steps += 1
        if self._is_dead or self.steps == self.crash_at:
            self._is_dead = True
            raise CrashError

    def _change(self, change: Change) -> None:
        self._pending.append(change)

    def _settle(self, changes: list[Change]) -> None:
        for change in changes:
            if change.gone is not None:
                self._durable.pop(change.gone, None)
            if change.path is not None:
                self._durable[change.path] = change.number
        self._pending = [change for change in self._pending if change not in changes]

    def _remember(self, path: Path) -> None:
        """Keep what a file held last, as its name may come back after it is gone."""
        number = self._now.get(path, FOLDER)
        if number != FOLDER:
            self._last[number] = path.read_bytes()

    def _content_after(self, number: int, rng: random.Random) -> bytes:
        """Of each sector what was synced or what was written, of the size as well."""
        old, new = self._synced.get(number, b""), self._last.get(number, b"")
        if old == new:
            return old
        size = rng.choice((len(old), len(new)))
        sectors = range(0, size, SECTOR_BYTES)
        parts = [rng.choice((old, new))[at : at + SECTOR_BYTES] for at in sectors]
        wanted = [min(SECTOR_BYTES, size - at) for at in sectors]
        return b"".join(part.ljust(w, b"\0") for part, w in zip(parts, wanted, strict=True))
