"""The operator's secret in a database: shared by machines, and sealed."""

from __future__ import annotations

import contextlib
import time

import pytest

from vllm_kvmarket.auth import sealed_secret
from vllm_kvmarket.auth.operator_tokens import Credentials
from vllm_kvmarket.auth.sealed_secret import KEY_VARIABLE, SealedSecret, secrets_key
from vllm_kvmarket.core.errors import ConfigError

KEY = bytes(range(32))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "market.sqlite"


@pytest.fixture
def place(path):
    return path


def opened(place, key=KEY):
    return contextlib.closing(Credentials(SealedSecret(place, key)))


def test_machines_with_the_key_accept_each_others_tokens(place, monkeypatch):
    """Also after one of them has rotated the secret, soon; the old tokens for a while."""
    monkeypatch.setattr(sealed_secret, "LOOKED_AT_S", 0.01)
    with opened(place) as first, opened(place) as second:
        before = first.sign("session", "alice")
        assert second.verifies("session", "alice", before)
        first.rotate()
        after = first.sign("session", "alice")
        assert after != before
        until_s = time.monotonic() + 10
        while not second.verifies("session", "alice", after):
            assert time.monotonic() < until_s
            time.sleep(0.01)
        assert second.verifies("session", "alice", before)
    with opened(place) as later:
        assert later.sign("session", "alice") == after


def test_another_key_opens_nothing(place):
    """The market does not start with a secret of its own instead."""
    with opened(place):
        pass
    with pytest.raises(ConfigError, match="other machines have"):
        opened(place, KEY[::-1])


def test_the_database_alone_tells_nobody_the_secret(path):
    """Neither as it is nor in hexadecimal digits."""
    with opened(path) as credentials:
        secret = credentials._current().secret
    stored = b"".join(each.read_bytes() for each in path.parent.iterdir())
    assert secret.encode() not in stored
    assert bytes.fromhex(secret) not in stored


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    """The file decides; without either there is no key."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert secrets_key(None) is None
    monkeypatch.setenv(KEY_VARIABLE, KEY.hex())
    assert secrets_key(None) == KEY
    file = tmp_path / "key"
    file.write_text(KEY[::-1].hex() + "\n")
    assert secrets_key(str(file)) == KEY[::-1]


@pytest.mark.parametrize("content", ["", "no key", KEY.hex()[:-2], "0x" + KEY.hex()])
def test_what_is_no_key_is_refused(tmp_path, content):
    """In one line that names the setting, and does not show it."""
    file = tmp_path / "key"
    file.write_text(content)
    with pytest.raises(ConfigError, match="secrets_key_file") as refused:
        secrets_key(str(file))
    assert KEY.hex()[:16] not in str(refused.value)
    with pytest.raises(ConfigError, match="secrets_key_file"):
        secrets_key(str(tmp_path / "nothing"))
