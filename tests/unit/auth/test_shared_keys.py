"""Public keys in a database: what one machine signs, all verify; what one revokes, none does."""

from __future__ import annotations

import contextlib

import pytest

from vllm_kvmarket.auth.shared_keys import SharedKeys
from vllm_kvmarket.auth.signing_keys import SigningKeys, TrustedKeys
from vllm_kvmarket.core.errors import NotFoundError


@pytest.fixture
def place(tmp_path):
    return tmp_path / "market.sqlite"


@pytest.fixture
def machines(place, tmp_path):
    """Two machines' keys, each with a connection of its own."""
    with contextlib.ExitStack() as stack:
        shared = [stack.enter_context(contextlib.closing(SharedKeys(place))) for _ in range(2)]
        yield [SigningKeys(tmp_path / f"home{n}", each) for n, each in enumerate(shared)]


def test_a_machine_knows_the_keys_of_the_others_but_has_none_of_them(machines, tmp_path):
    """Each signs with its own; who verifies needs no more than either machine's key set."""
    first, second = (each.current() for each in machines)
    assert first.kid != second.kid
    for keys in machines:
        assert {key.kid for key in keys.public_keys()} == {first.kid, second.kid}
        assert [key.kid for key in keys.own_keys()] == [keys.current().kid]
        found = keys.find(first.kid)
        assert found is not None and found.verifies(first.sign(b"m"), b"m")
    secrets = [path.name for path in tmp_path.glob("home1/signing/*.pem")]
    assert secrets == [f"{second.kid}.pem"]


def test_a_key_after_a_rotation_signs_in_its_machines_name_everywhere(machines):
    """Its endorsement is shared too; nobody else's name is given to it."""
    one, other = machines
    first, stranger = one.current(), other.current()
    later = one.rotate()
    assert one.current().kid == later.kid
    known = {key.kid: key for key in other.public_keys()}
    assert known[later.kid].may_sign_for(first.kid)
    assert not known[later.kid].may_sign_for(stranger.kid)
    assert other.market() == stranger.kid


def test_a_key_that_one_machine_revokes_is_worthless_on_all(machines):
    """Whose it is signs with a new one, which the others know."""
    one, other = machines
    stolen = one.current()
    kept = other.revoke(stolen.kid, "a stolen machine")
    assert kept.kid == other.current().kid
    for keys in machines:
        found = keys.find(stolen.kid)
        assert found is not None and found.revoked_at_s > 0
    renewed = one.current()
    assert renewed.kid != stolen.kid and one.market() == renewed.kid
    assert renewed.kid in {key.kid for key in other.public_keys() if not key.revoked_at_s}
    with pytest.raises(NotFoundError, match="no signing key"):
        other.revoke("nobody's", "a typo")


def test_a_home_that_joins_brings_its_keys_and_its_revocations(machines, tmp_path):
    """A home that has worked alone before."""
    alone = SigningKeys(tmp_path / "home0")
    revoked = alone.current()
    signing = alone.revoke(revoked.kid, "before it joined")
    one, other = machines
    assert one.current().kid == signing.kid
    known = {key.kid: key for key in other.public_keys()}
    assert known[revoked.kid].revoked_at_s > 0 and not known[signing.kid].revoked_at_s


def test_a_machine_trusts_whom_another_trusts(place, machines, tmp_path):
    """And no more when the other does not; a file in one home counts for nobody."""
    stranger = SigningKeys(tmp_path / "stranger").current().public
    with contextlib.closing(SharedKeys(place)) as shared:
        one, other = (
            TrustedKeys(tmp_path / "home0", shared),
            TrustedKeys(tmp_path / "home1", shared),
        )
        TrustedKeys(tmp_path / "home0").add(SigningKeys(tmp_path / "by hand").current().public)
        assert one.all() == {}
        assert one.add(stranger)
        assert not other.add(stranger)
        assert other.all() == {stranger.kid: stranger}
        other.remove(stranger.kid)
        assert one.all() == {}
        with pytest.raises(NotFoundError, match="kvmarket trust list"):
            one.remove(stranger.kid)
