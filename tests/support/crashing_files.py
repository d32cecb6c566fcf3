"""Files under SQLite that lose power: what was not synced is there in part, torn, or not at all."""

from __future__ import annotations

import itertools

import apsw

SECTOR = 512
_names = itertools.count()


class PowerLossError(Exception):
    """The machine is off: no call to a file comes back with anything else."""


class CrashingFiles(apsw.VFS):
    """A file system that counts its writes and syncs, and fails from the `crash_at`th on.

    `chance` decides, for each write since the last sync of its file, whether its sectors are kept.
    """

    def __init__(self, chance, crash_at):
        self.name = f"crashing-{next(_names)}"
        self.chance = chance
        self.crash_at = crash_at
        self.steps = 0
        self.durable: dict[str, bytearray] = {}
        self.unsynced: dict[str, list[tuple[int, bytes] | int]] = {}
        super().__init__(self.name, base="")

    def xOpen(self, name, flags):  # noqa: N802  # SQLite's name
        return CrashingFile(self, name, flags)

    def xDelete(self, name, syncdir):  # noqa: N802
        self.step()
        self.unsynced.pop(name, None)
        self.durable.pop(name, None)
        super().xDelete(name, syncdir)

    def step(self):
        if self.steps >= self.crash_at:
            raise PowerLossError
        self.steps += 1

    def survivors(self):
        """The files that a restart finds: name -> content."""
        for name, writes in self.unsynced.items():
            content = self.durable.setdefault(name, bytearray())
            for write in writes:
                if isinstance(write, int):
                    if self.chance.random() < 0.5:
                        del content[write:]
                    continue
                offset, data = write
                for start in range(0, len(data), SECTOR):
                    if self.chance.random() < 0.5:
                        _put(content, offset + start, data[start : start + SECTOR])
        return {name: bytes(content) for name, content in self.durable.items()}


class CrashingFile(apsw.VFSFile):
    def __init__(self, files, name, flags):
        self.files = files
        self.path = name.filename() if isinstance(name, apsw.URIFilename) else name
        super().__init__("", name, flags)

    def xWrite(self, data, offset):  # noqa: N802
        self.files.step()
        self.files.unsynced.setdefault(self.path, []).append((offset, bytes(data)))
        super().xWrite(data, offset)

    def xTruncate(self, size):  # noqa: N802
        self.files.step()
        self.files.unsynced.setdefault(self.path, []).append(size)
        super().xTruncate(size)

    def xSync(self, flags):  # noqa: N802
        self.files.step()
        content = self.files.durable.setdefault(self.path, bytearray())
        for write in self.files.unsynced.pop(self.path, []):
            if isinstance(write, int):
                del content[write:]
            else:
                _put(content, *write)
        super().xSync(flags)


def _put(content, offset, data):
    if len(content) < offset + len(data):
        content.extend(bytes(offset + len(data) - len(content)))
    content[offset : offset + len(data)] = data
