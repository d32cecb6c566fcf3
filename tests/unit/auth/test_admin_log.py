"""The admin log: appended by anyone who administers, changed by nobody."""

import apsw
import pytest

from vllm_kvmarket.auth.admin_log import AdminLog
from vllm_kvmarket.core.errors import UnavailableError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "market.sqlite"


@pytest.fixture
def place(path):
    return path


def test_entries_come_newest_first_in_pages(place):
    """Each with its actor, its action and the details."""
    log, other = AdminLog(place), AdminLog(place)
    for number in range(5):
        (log if number % 2 else other).record("key_1", "account deposit", {"amount_nano": number})
    newest = log.entries(2)
    assert [entry.details["amount_nano"] for entry in newest] == [4, 3]
    older = log.entries(10, before=newest[-1].number)
    assert [entry.details["amount_nano"] for entry in older] == [2, 1, 0]
    assert {(entry.actor, entry.action) for entry in older} == {("key_1", "account deposit")}


@pytest.mark.parametrize(
    "statement",
    ["UPDATE admin_log SET actor = 'x'", "DELETE FROM admin_log"],
)
def test_no_entry_is_changed_or_removed(path, statement):
    """The database itself refuses, whatever program asks."""
    log = AdminLog(path)
    log.record("cli:root", "key rotate", {})
    with apsw.Connection(str(path)) as db, pytest.raises(apsw.ConstraintError, match="never"):
        db.execute(statement)
    assert len(log.entries(10)) == 1


def test_a_database_that_is_none_is_unavailable(path):
    """So that the change, which comes after its entry, is not made."""
    path.write_bytes(b"no database" * 100)
    with pytest.raises(UnavailableError, match="admin log"):
        AdminLog(path)
