"""A home's keys: named by what they are, made once, rotated, and trusted by others."""

import json
import os
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from joserfc.jwk import OKPKey

from vllm_kvmarket.auth.signing_keys import (
    VALID_S,
    PublicKey,
    SigningKeys,
    TrustedKeys,
    bound,
    decode_base64url,
    encode_base64url,
    read_jwks,
)
from vllm_kvmarket.core.errors import ConfigError, NotFoundError

# RFC 8037, appendix A.1 to A.4.
SECRET = "nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A"
JWK = {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}
THUMBPRINT = "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"
SIGNED = b"eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc"
SIGNATURE = "hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg"


@pytest.fixture
def keys(tmp_path):
    return SigningKeys(tmp_path / "home")


def files_of(home):
    return sorted(path.name for path in home.rglob("*") if path.is_file())


def test_a_key_is_what_the_rfc_says():
    """Thumbprint and signature are those of RFC 8037's example."""
    key = PublicKey.of_jwk(JWK)
    assert key.kid == THUMBPRINT
    assert key.verifies(decode_base64url(SIGNATURE), SIGNED)
    assert not key.verifies(decode_base64url(SIGNATURE), SIGNED + b"!")
    assert not key.verifies(b"", SIGNED)
    assert key.jwk() == {**JWK, "kid": THUMBPRINT, "alg": "EdDSA", "use": "sig"}


def test_another_implementation_reads_our_keys(keys):
    """joserfc takes the JWK, and computes the same thumbprint."""
    key = keys.current()
    assert OKPKey.import_key(key.public.jwk()).thumbprint() == key.kid
    assert key.public.verifies(key.sign(b"a message"), b"a message")


def test_a_home_makes_its_key_on_first_use(keys, tmp_path):
    """Looking makes nothing; the first use makes one key, which only its owner may read."""
    assert (keys.public_keys(), keys.jwks(), keys.find("x")) == ([], {"keys": []}, None)
    assert not (tmp_path / "home").exists()
    key = keys.current()
    file = tmp_path / "home" / "signing" / f"{key.kid}.pem"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert keys.current().kid == SigningKeys(tmp_path / "home").current().kid == key.kid


def test_rotation_keeps_the_older_keys(keys, tmp_path):
    """The newest signs; what the others signed is still verified, and all are in the key set."""
    before = SigningKeys(tmp_path / "home")
    made = [keys.current(), keys.rotate(), keys.rotate()]
    newest_first = [key.kid for key in reversed(made)]
    assert [key.kid for key in keys.public_keys()] == newest_first
    assert [key["kid"] for key in keys.jwks()["keys"]] == newest_first
    assert before.current().kid == made[2].kid, "a process that was there already sees it"
    assert keys.find(made[0].kid).verifies(made[0].sign(b"m"), b"m")


def test_the_order_survives_a_copy(keys, tmp_path):
    """Which key is the newest is written in the files; a backup keeps no times."""
    keys.current()
    newest = keys.rotate()
    folder = tmp_path / "copy" / "signing"
    folder.mkdir(parents=True)
    for file in (tmp_path / "home" / "signing").glob("*.pem"):
        (folder / file.name).write_bytes(file.read_bytes())
        os.utime(folder / file.name, (0, 0))
    assert SigningKeys(tmp_path / "copy").current().kid == newest.kid


def test_threads_and_processes_make_one_key(tmp_path):
    """Whoever is first makes the home's key; everybody signs with it, and no draft is left."""
    script = (
        "import sys; from pathlib import Path; "
        "from vllm_kvmarket.auth.signing_keys import SigningKeys; "
        "print(SigningKeys(Path(sys.argv[1])).current().kid)"
    )
    home = tmp_path / "home"
    command = [sys.executable, "-c", script, home]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        kids = set(pool.map(lambda _: SigningKeys(home).current().kid, range(8)))
    kids |= {process.communicate(timeout=60)[0].strip() for process in running}
    assert len(kids) == 1
    assert files_of(home) == sorted([".lock", f"{kids.pop()}.pem"])


def test_what_a_dead_process_left_is_swept(keys, tmp_path):
    """A draft of a key, left by a crash, is no key and goes when the next one is made."""
    folder = tmp_path / "home" / "signing"
    folder.mkdir(parents=True)
    (folder / ".draft-0123-x.pem").write_bytes(b"half a k")
    keys.current()
    assert len(files_of(folder)) == 2


@pytest.mark.parametrize("kind", ["text", "p256", "password"])
def test_a_file_that_is_no_key_is_named(keys, tmp_path, kind):
    """Neither other text, nor another curve, nor an encrypted key signs anything."""
    keys.current()
    key = (
        ec.generate_private_key(ec.SECP256R1()) if kind == "p256" else Ed25519PrivateKey.generate()
    )
    cipher = serialization.NoEncryption()
    if kind == "password":
        cipher = serialization.BestAvailableEncryption(b"x")
    pem = serialization.Encoding.PEM
    content = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, cipher)
    file = tmp_path / "home" / "signing" / "odd.pem"
    file.write_bytes(b"hello" if kind == "text" else content)
    with pytest.raises(ConfigError, match=r"odd\.pem: not an Ed25519 key"):
        keys.current()


def test_a_key_from_elsewhere_can_be_put_there(keys, tmp_path):
    """A PEM file without our serial is the oldest of the home's keys."""
    raw = decode_base64url(SECRET)
    content = Ed25519PrivateKey.from_private_bytes(raw).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    folder = tmp_path / "home" / "signing"
    folder.mkdir(parents=True)
    (folder / "mine.pem").write_bytes(content)
    assert keys.current().kid == THUMBPRINT
    assert keys.rotate().serial == 1
    assert keys.public_keys()[1].kid == THUMBPRINT


def test_base64url_has_one_spelling():
    """Padding, other alphabets and loose last bits are refused: a key has one name."""
    for size in range(40):
        content = os.urandom(size)
        assert decode_base64url(encode_base64url(content)) == content
    for text in ("QQ==", "Q", "QR", "a+b/", "QQ\n", "QQ QQ", "äöü", "="):
        with pytest.raises(ValueError, match="base64url"):
            decode_base64url(text)


@pytest.mark.parametrize(
    ("jwk", "reason"),
    [
        ([], "not a JWK"),
        ({}, "not a JWK"),
        ({**JWK, "crv": "X25519"}, "not a JWK"),
        ({**JWK, "kty": "EC"}, "not a JWK"),
        ({**JWK, "x": JWK["x"][:-1]}, "not 32 bytes"),
        ({**JWK, "x": JWK["x"] + "AAAA"}, "not 32 bytes"),
        ({**JWK, "x": 5}, "not 32 bytes"),
        ({"kty": "OKP", "crv": "Ed25519"}, "not 32 bytes"),
        ({**JWK, "d": SECRET}, "holds a private key"),
    ],
)
def test_what_is_no_public_key_is_refused(tmp_path, jwk, reason):
    """The file and what is wrong with it are named; a private key is never taken for a public."""
    file = tmp_path / "acme.jwk"
    file.write_text(json.dumps(jwk))
    with pytest.raises(ConfigError, match=rf"acme\.jwk: .*{reason}") as caught:
        read_jwks(file)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b" " * (2 << 20)])
def test_a_file_that_is_no_json_is_refused(tmp_path, content):
    """Garbage, endless nesting and huge files are errors of one line."""
    file = tmp_path / "acme.jwk"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="not a JWK"):
        read_jwks(file)
    with pytest.raises(ConfigError, match="cannot read"):
        read_jwks(tmp_path / "none.jwk")


def test_the_kid_that_a_key_gives_itself_is_not_believed():
    """Keys are named by their thumbprint: nobody can pass for somebody else."""
    assert PublicKey.of_jwk({**JWK, "kid": "somebody else"}).kid == THUMBPRINT


def test_trust_is_given_and_taken(tmp_path):
    """Added once, listed, removed; also what an operator put into the folder by hand."""
    trusted = TrustedKeys(tmp_path)
    key = PublicKey.of_jwk(JWK)
    assert trusted.all() == {}
    assert trusted.add(key)
    assert not trusted.add(key)
    assert trusted.all() == {THUMBPRINT: key}
    (tmp_path / "trusted" / "by-hand.jwk").write_text(json.dumps(JWK))
    assert trusted.all() == {THUMBPRINT: key}
    trusted.remove(THUMBPRINT)
    assert trusted.all() == {}
    with pytest.raises(NotFoundError, match="kvmarket trust list"):
        trusted.remove(THUMBPRINT)
    with pytest.raises(NotFoundError, match="43 characters"):
        trusted.remove("../../x")


def test_a_bad_file_among_the_trusted_is_named(tmp_path):
    """It is not passed over: an operator who put it there thinks that it counts."""
    folder = tmp_path / "trusted"
    folder.mkdir()
    (folder / "bad.jwk").write_text("{}")
    with pytest.raises(ConfigError, match=r"bad\.jwk: not a JWK"):
        TrustedKeys(tmp_path).all()
    (folder / "bad.jwk").write_text(json.dumps({"keys": [JWK, JWK]}))
    with pytest.raises(ConfigError, match="2 keys instead of one"):
        TrustedKeys(tmp_path).all()


def test_a_key_set_is_read_whole(tmp_path, keys):
    """A file may hold one JWK, or all keys of a home."""
    keys.current()
    keys.rotate()
    file = tmp_path / "all.json"
    file.write_text(json.dumps(keys.jwks()))
    assert read_jwks(file) == keys.public_keys()


def test_a_key_signs_in_its_markets_name_only_when_the_first_key_endorsed_it(keys, tmp_path):
    """Anyone whose key is trusted could sign in another market's name otherwise."""
    first, second = keys.current(), keys.rotate()
    market = keys.market()
    assert market == first.kid
    file = tmp_path / "keys.jwks"
    file.write_text(json.dumps(keys.jwks()))
    read = {key.kid: key for key in read_jwks(file)}
    assert read[first.kid].may_sign_for(market)
    assert read[second.kid].may_sign_for(market)
    thief = SigningKeys(tmp_path / "thief").current()
    claimed = {**thief.public.jwk(), "kvmarket": {"market": market, "endorsement": "AAAA"}}
    stolen = keys.jwks()["keys"][0]["kvmarket"]
    copied = {**thief.public.jwk(), "kvmarket": stolen}
    for forged in (claimed, copied):
        file.write_text(json.dumps({"keys": [*keys.jwks()["keys"], forged]}))
        found = {key.kid: key for key in read_jwks(file)}[thief.kid]
        assert not found.may_sign_for(market)
        assert found.may_sign_for(thief.kid)
    alone = PublicKey.of_jwk(keys.jwks()["keys"][0])
    assert not bound([alone])[0].may_sign_for(market)


def test_a_key_that_is_revoked_signs_and_endorses_no_more(keys, tmp_path):
    """Its file stays, so that everybody can see that it was revoked; the first one's name goes."""
    first, second = keys.current(), keys.rotate()
    third = keys.revoke(second.kid, "a stolen laptop")
    assert third.kid not in (first.kid, second.kid)
    assert keys.market() == first.kid
    by_id = {key.kid: key for key in keys.public_keys()}
    assert by_id[second.kid].revoked_at_s > 0
    assert by_id[third.kid].may_sign_for(first.kid)
    other = SigningKeys(tmp_path / "home")
    assert other.revoke(first.kid, "as well").kid == third.kid
    assert keys.market() == third.kid
    assert not {key.kid: key for key in keys.public_keys()}[third.kid].may_sign_for(first.kid)
    with pytest.raises(NotFoundError, match="no signing key"):
        keys.revoke("nobody's", "a typo")


def test_a_key_whose_validity_is_over_is_followed_by_a_new_one(keys, monkeypatch):
    """In time, without an operator; the first key endorses it."""
    first = keys.current()
    assert keys.current().kid == first.kid
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + VALID_S + 1)
    second = keys.current()
    assert second.kid != first.kid
    assert [key.kid for key in keys.public_keys()] == [second.kid, first.kid]
    assert keys.public_keys()[0].may_sign_for(first.kid)
