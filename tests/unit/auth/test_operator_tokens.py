"""Tokens under a home's secret: for one purpose, one request, one minute, until it is rotated."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvmarket.auth import operator_tokens
from vllm_kvmarket.auth.operator_tokens import SECRET_FILE, Credentials
from vllm_kvmarket.core.errors import ConfigError

PARAMS = {"account": "alice", "max_price_nano": 7, "document": None, "request_id": "r1"}


class Clock:
    def __init__(self):
        self.now_s = 1_000_000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def credentials(tmp_path, clock):
    return Credentials.of_home(tmp_path, clock)


def test_every_purpose_has_a_key_of_its_own(credentials):
    """A session's token is none for a request or an account's salt."""
    token = credentials.sign("session", "alice")
    assert credentials.verifies("session", "alice", token)
    assert not credentials.verifies("request", "alice", token)
    assert not credentials.verifies("salt", "alice", token)
    assert not credentials.verifies("session", "bob", token)


def test_the_secret_is_its_owners_and_never_a_key(credentials, tmp_path):
    """Mode 0600, in a home of mode 0700; no token shows the secret."""
    home = tmp_path / "new"
    Credentials.of_home(home)
    assert (home / SECRET_FILE).stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700
    secret = json.loads((home / SECRET_FILE).read_text())["secret"]
    assert secret not in Credentials.of_home(home).sign("salt", "x")


def test_signed_parameters_are_good_for_a_minute(credentials, clock):
    """Then, and before they were made, they are worth nothing."""
    signed = credentials.sign_params(PARAMS)
    assert signed["expires_at_s"] == clock.now_s + 60
    assert credentials.allows_params(json.loads(json.dumps(signed)))
    clock.now_s += 59.9
    assert credentials.allows_params(signed)
    clock.now_s += 0.1
    assert not credentials.allows_params(signed)
    clock.now_s -= 120
    assert not credentials.allows_params(signed)


CHANGES = [
    {"account": "bob"},
    {"max_price_nano": 8},
    {"max_price_nano": None},
    {"request_id": "r2"},
    {"document": "kvd_1"},
    {"publish": {}},
    {"expires_at_s": 1_000_061.0},
    {"expires_at_s": "soon"},
    {"expires_at_s": float("nan")},
    {"token": ""},
    {"token": None},
    {"token": "0" * 64},
    {"added": {1}},  # nothing that JSON can hold
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_change_to_any_parameter_is_refused(credentials, change):
    """The token is over all of them, the expiry and the request's id too."""
    assert not credentials.allows_params({**credentials.sign_params(PARAMS), **change})


def test_a_parameter_that_is_missing_is_refused(credentials):
    """Any of the parts may be missing."""
    signed = credentials.sign_params(PARAMS)
    for left_out in signed:
        assert not credentials.allows_params({k: v for k, v in signed.items() if k != left_out})


@given(
    st.dictionaries(
        st.text(max_size=8),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
            lambda each: st.lists(each) | st.dictionaries(st.text(), each),
            max_leaves=8,
        ),
    )
)
def test_any_parameters_survive_the_way_through_json(tmp_path_factory, params):
    """In any order of their keys."""
    try:
        json.dumps(params, allow_nan=False)
    except ValueError:
        return
    credentials = Credentials.of_home(tmp_path_factory.getbasetemp())
    signed = json.loads(json.dumps(credentials.sign_params(params)))
    assert credentials.allows_params(dict(reversed(signed.items())))


def test_a_rotation_reaches_running_processes(credentials, tmp_path, clock, monkeypatch):
    """Within a second; tokens from before are good for a minute more, and no longer."""
    monkeypatch.setattr(operator_tokens, "REFRESH_S", 0.0)
    running = Credentials.of_home(tmp_path, clock)
    old = running.sign("session", "alice")
    credentials.rotate()
    new = running.sign("session", "alice")
    assert new == credentials.sign("session", "alice") != old
    assert running.verifies("session", "alice", old)
    clock.now_s += 60
    assert not running.verifies("session", "alice", old)
    assert running.verifies("session", "alice", new)


def test_a_second_rotation_ends_the_first_secret_at_once(credentials):
    """Only one secret from before is kept."""
    old = credentials.sign("session", "alice")
    credentials.rotate()
    credentials.rotate()
    assert not credentials.verifies("session", "alice", old)


def test_a_process_reads_the_secret_again_twice_a_second(credentials, tmp_path, clock):
    """Not for each token: between two looks it costs no system call."""
    running = Credentials.of_home(tmp_path, clock)
    old = running.sign("session", "alice")
    credentials.rotate()
    assert running.sign("session", "alice") == old
    assert operator_tokens.REFRESH_S <= 0.5


def test_a_token_under_a_new_secret_is_known_at_once(credentials, tmp_path, clock):
    """The gate may see a rotation half a second before the engine does."""
    running = Credentials.of_home(tmp_path, clock)
    assert not running.verifies("salt", "alice", "0" * 64)
    credentials.rotate()
    assert running.allows_params(credentials.sign_params(PARAMS))


def test_another_process_makes_the_same_tokens(credentials, tmp_path):
    """They come from the home alone."""
    code = (
        "import sys; from pathlib import Path\n"
        "from vllm_kvmarket.auth.operator_tokens import Credentials\n"
        "print(Credentials.of_home(Path(sys.argv[1])).sign('salt', 'alice'))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == credentials.sign("salt", "alice")


@pytest.mark.parametrize(
    "content", [b"", b"x" * 32, b'{"secret": "00"}', b'{"secret": "zz"}', b"[]", b"\xff"]
)
def test_a_file_that_is_no_secret_is_refused(tmp_path, content):
    """With its path, and what to do."""
    (tmp_path / SECRET_FILE).write_bytes(content)
    with pytest.raises(ConfigError, match="does not hold an operator's secret; restore it"):
        Credentials.of_home(tmp_path)


def test_a_running_process_goes_on_without_the_file(credentials, tmp_path, monkeypatch):
    """Its tokens are the last known ones."""
    monkeypatch.setattr(operator_tokens, "REFRESH_S", 0.0)
    token = credentials.sign("salt", "alice")
    (tmp_path / SECRET_FILE).unlink()
    assert credentials.sign("salt", "alice") == token
