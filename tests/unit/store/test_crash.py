"""The store when the process dies, or the power goes, at every single step."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.forgetful_files import CrashError, ForgetfulFiles
from tests.support.store_chunks import Sample, files_in, layout_of, sample
from vllm_kvmarket.core.errors import StoreError, StoreFullError
from vllm_kvmarket.store import DiskStore
from vllm_kvmarket.store.quota import tree_bytes

KEYS = 3
OPERATIONS = 6
# Every chunk as two layouts arrange it; both are stored under one name.
VERSIONS = [
    [sample(layout_of(page_bytes, layers=2), seed=seed) for page_bytes in (600, 700)]
    for seed in range(KEYS)
]


def content_of(chunk: Sample) -> bytes:
    """The file of a chunk."""
    with tempfile.TemporaryDirectory() as folder:
        store = DiskStore(Path(folder))
        chunk.put(store)
        return store.path(chunk.key).read_bytes()


CONTENTS = [[content_of(chunk) for chunk in versions] for versions in VERSIONS]
LARGEST = max(len(content) for contents in CONTENTS for content in contents)


class World:
    """A store on a file system that forgets, and what has been promised about it.

    `allowed[key]` are the versions that a reader may find; None stands for nothing, and for damage
    that is detected. A cache promises nothing but to keep its quota.
    """

    def __init__(self, root: Path, files: ForgetfulFiles, *, is_cache: bool = False) -> None:
        self.root = root
        self.files = files
        self.is_cache = is_cache
        self.quota_bytes = (2 if is_cache else 3) * LARGEST
        self.allowed: list[set[int | None]] = [{None} for _ in range(KEYS)]
        self.open()

    def open(self) -> None:
        """Open the store as the next process does."""
        self.store = DiskStore(
            self.root, quota_bytes=self.quota_bytes, is_cache=self.is_cache, files=self.files
        )

    def run(self, seed: int) -> None:
        """Store, replace, receive, damage and delete chunks, by a seed."""
        rng = random.Random(seed)
        steps = (self.put, self.put, self.put, self.receive, self.delete, self.damage)
        for _ in range(OPERATIONS):
            rng.choice(steps)(rng.randrange(KEYS), rng.randrange(2))

    def run_until_crash(self, seed: int) -> None:
        """The same, as far as it comes."""
        with contextlib.suppress(CrashError):
            self.run(seed)

    def put_all(self) -> None:
        """Publish again after a crash."""
        for number in range(KEYS):
            self.put(number, 0)

    def put(self, number: int, version: int) -> None:
        """Store a version durably, where there is room."""
        with self._becoming(number, version):
            VERSIONS[number][version].put(self.store)

    def receive(self, number: int, version: int) -> None:
        """The same by its bytes."""
        key, content = VERSIONS[number][version].key, CONTENTS[number][version]
        with (
            self._becoming(number, version),
            self.store.receive(key, 0, 1, len(content)) as descriptor,
        ):
            os.pwrite(descriptor, content, 0)

    def delete(self, number: int, version: int) -> None:
        """Delete a chunk; a power cut may bring it back."""
        self.allowed[number].add(None)
        self.store.delete(VERSIONS[number][version].key)

    def damage(self, number: int, version: int) -> None:
        """Damage a chunk, if it is there, and have it quarantined."""
        key = VERSIONS[number][version].key
        if self.store.has(key):
            self.allowed[number].add(None)
            self.files.damage(self.store.path(key))
            assert self.store.quarantine(key, 0, 1, "damaged by the test")

    @contextlib.contextmanager
    def _becoming(self, number: int, version: int) -> Iterator[None]:
        """Until this ends well the old may be found or the new; then only the new."""
        before = self.allowed[number]
        self.allowed[number] = before | {version}
        try:
            yield
        except StoreFullError:
            # Damage that was in its place may have gone into quarantine.
            self.allowed[number] = before
        else:
            self.allowed[number] = {version}

    def check(self) -> None:
        """Every promise is kept, every byte is counted, and what died can be swept away."""
        for number, allowed in enumerate(self.allowed):
            found = {v for v, chunk in enumerate(VERSIONS[number]) if self._is_whole(chunk)}
            assert self.is_cache or None in allowed or found & allowed
        assert self.store.usage().bytes_used >= tree_bytes(self.root)
        self.store.sweep_temporary()
        assert self.store.usage().bytes_used == tree_bytes(self.root)
        assert not [name for name in files_in(self.store) if name.startswith(".draft")]

    def check_quota(self) -> None:
        """No file is there beyond the quota."""
        assert tree_bytes(self.root) <= self.quota_bytes

    def _is_whole(self, chunk: Sample) -> bool:
        try:
            chunk.load(self.store)
        except StoreError:
            return False
        return True


def every_crash(
    folder: Path, seed: int, kind: type[ForgetfulFiles] = ForgetfulFiles, **facts: bool
) -> Iterator[tuple[World, random.Random]]:
    """Let the same work die before each of its steps in turn."""
    is_ordered = facts.pop("is_ordered", False)
    for step in itertools.count(1):
        root = folder / f"{seed}-{step}"
        root.mkdir()
        files = kind(root, is_ordered=is_ordered, crash_at=step)
        world = World(root, files, **facts)
        world.run_until_crash(seed)
        died = files.steps >= step
        yield world, random.Random(step)
        shutil.rmtree(root)
        if not died:
            return


def cut_power(world: World, rng: random.Random) -> None:
    """Cut the power and look at what is left."""
    world.files.power_cut(rng)
    world.open()
    if world.files.is_ordered:
        world.check_quota()
    world.check()


def kill_then_cut_power(world: World, rng: random.Random) -> None:
    """Kill the process; publish everything again in the next one; cut the power then."""
    world.files.restart()
    world.check_quota()
    world.open()
    world.check()
    world.put_all()
    cut_power(world, rng)


@pytest.mark.parametrize("is_ordered", [False, True])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("end", [cut_power, kill_then_cut_power])
def test_a_crash_at_every_step(tmp_path: Path, end, seed: int, is_ordered: bool) -> None:
    """Chunks reported as stored are whole after a crash; all others are absent or detected."""
    rounds = 0
    for world, rng in every_crash(tmp_path, seed, is_ordered=is_ordered):
        end(world, rng)
        rounds += 1
    assert rounds > 20


def test_a_cache_that_crashes_at_every_step(tmp_path: Path) -> None:
    """A cache that evicts keeps its quota, serves no wrong byte, and counts what survived."""
    for world, rng in every_crash(tmp_path, 7, is_ordered=True, is_cache=True):
        kill_then_cut_power(world, rng)


class NamesFirst(ForgetfulFiles):
    """Wrong on purpose: a file gets its name before its content is synced."""

    owed = -1

    def sync(self, descriptor: int) -> None:
        self.owed = descriptor

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        if self.owed >= 0:
            owed, self.owed = self.owed, -1
            super().sync(owed)


class ForgetsFolders(ForgetfulFiles):
    """Wrong on purpose: names are never made durable."""

    def sync_folder(self, path: Path) -> None:
        self._step()


class ForgetsContent(ForgetfulFiles):
    """Wrong on purpose: contents are never made durable."""

    def sync(self, descriptor: int) -> None:
        self._step()


class CountsLate(ForgetfulFiles):
    """Wrong on purpose: the count follows the files instead of preceding them."""

    owed: tuple[int, bytes] | None = None

    def record(self, descriptor: int, content: bytes) -> None:
        self.owed = (os.dup(descriptor), content)

    def allocate(self, descriptor: int, size: int) -> None:
        super().allocate(descriptor, size)
        if self.owed:
            owed, self.owed = self.owed, None
            super().record(*owed)
            os.close(owed[0])


class NeverReboots(ForgetfulFiles):
    """Wrong on purpose: the count of before a power cut is believed after it."""

    def boot_id(self) -> str:
        return "0"


def crash_often(folder: Path, kind: type[ForgetfulFiles], end) -> None:
    """Crash with many seeds."""
    for seed in range(20):
        for world, rng in every_crash(folder, seed, kind):
            end(world, rng)


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        (NamesFirst, cut_power),
        (NamesFirst, kill_then_cut_power),
        (ForgetsFolders, cut_power),
        (ForgetsContent, cut_power),
        (CountsLate, kill_then_cut_power),
        (NeverReboots, cut_power),
    ],
)
def test_the_wrong_order_is_caught(tmp_path: Path, kind, end) -> None:
    """Each of these mistakes breaks a promise in some crash, and the checks above see it."""
    with pytest.raises(AssertionError):
        crash_often(tmp_path, kind, end)
