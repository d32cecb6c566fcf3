"""The one durable write: after a crash at any step there is the old file or the new one, whole."""

import os
import random

import pytest

from tests.support.forgetful_files import CrashError, ForgetfulFiles
from vllm_kvmarket.core.durable_files import (
    Files,
    append_line,
    draft_path,
    durable_file,
    sweep_drafts,
    write_durably,
)

OLD, NEW = b"old" * 400, b"new" * 700


@pytest.mark.parametrize("is_ordered", [True, False])
def test_a_power_cut_at_any_step_leaves_the_old_file_or_the_new_one(tmp_path, is_ordered):
    """A file survives once `write_durably` returned; before that, nothing is half written."""
    seen = set()
    for step in range(1, 12):
        for seed in range(20):
            root = tmp_path / f"{step}-{seed}"
            root.mkdir()
            files = ForgetfulFiles(root, is_ordered=is_ordered)
            write_durably(root / "key", OLD, files=files)
            files.crash_at = files.steps + step
            has_ended = True
            try:
                write_durably(root / "key", NEW, files=files)
            except CrashError:
                has_ended = False
            files.power_cut(random.Random(seed))
            found = (root / "key").read_bytes()
            assert found == NEW if has_ended else found in {OLD, NEW}
            seen.add((has_ended, found))
    assert len(seen) == 3


class NeverSyncs(ForgetfulFiles):
    """Wrong on purpose: the content is never made durable."""

    def sync(self, descriptor: int) -> None:
        self._step()


def test_the_test_sees_a_missing_sync(tmp_path):
    """With a file system that does not sync, some file is torn."""
    found = set()
    for seed in range(20):
        root = tmp_path / str(seed)
        root.mkdir()
        files = NeverSyncs(root, is_ordered=True)
        write_durably(root / "key", NEW, files=files)
        files.power_cut(random.Random(seed))
        found.add((root / "key").read_bytes())
    assert found - {NEW}


def test_a_file_is_private_unless_its_mode_says_otherwise(tmp_path):
    """Keys, books and chunks are for their owner."""
    write_durably(tmp_path / "key", NEW)
    write_durably(tmp_path / "public", NEW, mode=0o644)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "public").stat().st_mode & 0o777 == 0o644


def test_an_existing_file_can_be_spared(tmp_path):
    """The first of two writers wins, and the second one is refused."""
    write_durably(tmp_path / "key", OLD, replace=False)
    with pytest.raises(FileExistsError):
        write_durably(tmp_path / "key", NEW, replace=False)
    assert list(tmp_path.iterdir()) == [tmp_path / "key"]
    assert (tmp_path / "key").read_bytes() == OLD


def test_a_block_that_raises_changes_nothing(tmp_path):
    """The old file stays, and no draft is left."""
    write_durably(tmp_path / "key", OLD)
    with pytest.raises(ZeroDivisionError), durable_file(tmp_path / "key"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == [tmp_path / "key"]
    assert (tmp_path / "key").read_bytes() == OLD


def test_a_draft_that_is_swept_before_it_is_locked_is_made_again(tmp_path):
    """Another process may clean up between the two calls; the file is written nevertheless."""
    made = []

    class Slow(Files):
        def create(self, path, mode=0o600):
            descriptor = super().create(path, mode)
            made.append(path)
            if len(made) == 1:
                sweep_drafts(tmp_path)
            return descriptor

    write_durably(tmp_path / "key", b"whole", files=Slow())
    assert [each.name for each in tmp_path.iterdir()] == ["key"]
    assert (tmp_path / "key").read_bytes() == b"whole" and len(made) == 2


def test_only_drafts_without_a_writer_are_swept(tmp_path):
    """A draft that is being written is locked."""
    left = draft_path(tmp_path / "key")
    left.write_bytes(b"half")
    other = draft_path(tmp_path / "other")
    other.write_bytes(b"half")
    with durable_file(tmp_path / "key") as descriptor:
        os.write(descriptor, NEW)
        assert not left.exists()
        assert other.exists()
        sweep_drafts(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "key"]
    assert (tmp_path / "key").read_bytes() == NEW


def test_half_a_line_goes_before_the_next_one(tmp_path):
    """A crash while a line was written leaves no trace in the file."""
    append_line(tmp_path / "log", b"one")
    with (tmp_path / "log").open("ab") as stream:
        stream.write(b"tw")
    append_line(tmp_path / "log", b"three")
    assert (tmp_path / "log").read_bytes() == b"one\nthree\n"
