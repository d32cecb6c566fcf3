"""Secret keys in a file that only a passphrase opens."""

import json

import pytest

from vllm_kvmarket.auth.sealed_keys import seal, unseal
from vllm_kvmarket.core.errors import ConfigError

FILES = {"operator.key": b"secret \x00\xff", "signing/a.pem": b""}
PASSPHRASE = "correct horse battery staple"


@pytest.fixture(scope="module")
def sealed():
    return seal(FILES, PASSPHRASE)


def test_only_the_passphrase_opens_it(sealed):
    """All names and contents come back; another passphrase gives nothing."""
    assert unseal(sealed, PASSPHRASE) == FILES
    for wrong in (PASSPHRASE + " ", PASSPHRASE.upper(), ""):
        with pytest.raises(ConfigError, match="passphrase is wrong, or the file was changed"):
            unseal(sealed, wrong)


@pytest.mark.parametrize("field", ["salt", "nonce", "box"])
def test_a_changed_file_does_not_open(sealed, field):
    """Not one character may differ."""
    document = json.loads(sealed)
    text = document[field]
    document[field] = ("B" if text[0] == "A" else "A") + text[1:]
    with pytest.raises(ConfigError, match="do not open"):
        unseal(json.dumps(document).encode(), PASSPHRASE)


@pytest.mark.parametrize("cost", [1 << 40, 0, 3, "x"])
def test_a_file_cannot_ask_for_all_memory(sealed, cost):
    """The cost of a guess is bounded from above."""
    document = json.loads(sealed) | {"cost": cost}
    with pytest.raises(ConfigError, match="do not open"):
        unseal(json.dumps(document).encode(), PASSPHRASE)


def test_the_same_keys_are_sealed_differently_each_time(sealed):
    """Nobody can tell from two backups whether a key changed."""
    assert json.loads(seal(FILES, PASSPHRASE))["box"] != json.loads(sealed)["box"]


def test_a_short_passphrase_is_refused():
    """It could be guessed."""
    with pytest.raises(ConfigError, match="12 characters"):
        seal(FILES, "elevenchars")
