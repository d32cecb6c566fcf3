"""`bundle`, `trust` and `key`: a document goes from one home to another."""

import json
import time

import pytest

from vllm_kvmarket.market.market import Market


@pytest.fixture
def bundle(run, sold, tmp_path):
    run("bundle", "export", sold.document_id, tmp_path / "licence.kvb")
    return tmp_path / "licence.kvb"


@pytest.fixture
def other(tmp_path):
    """Options that name another home."""
    return ("--home", tmp_path / "other")


@pytest.fixture
def key_file(run, bundle, tmp_path):
    """The seller's public key, as its owner gives it away."""
    (tmp_path / "seller.jwk").write_text(run("key", "show").out)
    return tmp_path / "seller.jwk"


def test_a_document_goes_to_another_home(run, run_json, bundle, other, key_file):
    """Refused before the exporter is trusted, listed afterwards, with every chunk."""
    kid = json.loads(key_file.read_text())["kid"]
    done = run("bundle", "import", bundle, *other, code=1)
    assert f"signed by {kid}" in done.err
    assert "`kvmarket trust add FILE`" in done.err
    assert run_json("document", "list", *other)["documents"] == []
    assert f"trusted: {kid}" in run("trust", "add", key_file, *other).out
    document = run_json("bundle", "import", bundle, *other)
    assert (document["state"], document["title"]) == ("live", "The Licence")
    assert run_json("store", "check", *other)["chunks_verified"] == 3
    assert "The Licence" in run("bundle", "import", bundle, *other).out, "once more is fine"


def test_export_says_what_it_wrote(run, run_json, sold, tmp_path):
    """Path, size and the key that signed."""
    path = tmp_path / "a.kvb"
    document = run_json("bundle", "export", sold.document_id, path)
    assert document == {
        "document_id": sold.document_id,
        "file": str(path),
        "bytes": path.stat().st_size,
        "kid": run_json("key", "show")["kid"],
    }
    assert str(path) in run("bundle", "export", sold.document_id, path).out
    assert "there is no document" in run("bundle", "export", "kvd_none", path, code=1).err
    missing = tmp_path / "none" / "a.kvb"
    assert (
        f"cannot write {missing}" in run("bundle", "export", sold.document_id, missing, code=1).err
    )


def test_trust_may_be_given_once(run, run_json, bundle, other, key_file):
    """--trust counts for this import only; the publisher's account can be named."""
    document = run_json(
        "bundle", "import", bundle, "--trust", key_file, "--publisher", "partner", *other
    )
    assert document["publisher"] == "partner"
    assert run_json("trust", "list", *other)["keys"] == []
    assert "no key is trusted" in run("trust", "list", *other).out


def test_trust_is_listed_and_removed(run, run_json, bundle, other, key_file):
    """A trusted key is shown by its id, and refused after it was removed."""
    kid = json.loads(key_file.read_text())["kid"]
    assert run_json("trust", "add", key_file, *other)["added"] == 1
    assert "trusted already" in run("trust", "add", key_file, *other).out
    assert [key["kid"] for key in run_json("trust", "list", *other)["keys"]] == [kid]
    assert kid in run("trust", "list", *other).out
    run("trust", "remove", *other, "--", kid)
    assert "no trusted key" in run("trust", "remove", *other, "--", kid, code=1).err
    assert "does not trust" in run("bundle", "import", bundle, *other, code=1).err


def test_a_file_that_is_no_key_makes_no_market(run, bundle, other, tmp_path):
    """A bundle in a key's place is an error of usage."""
    assert "not a JWK" in run("trust", "add", bundle, *other, code=2).err
    assert "cannot read the key" in run("trust", "add", tmp_path / "none", *other, code=2).err
    assert not (tmp_path / "other").exists()


def test_a_tampered_bundle_is_refused_with_the_reason(run, run_json, bundle, other, key_file):
    """One bit of a chunk."""
    content = bytearray(bundle.read_bytes())
    position = content.index(b"chunks/") + 600
    content[position] ^= 1
    bundle.write_bytes(content)
    done = run("bundle", "import", bundle, "--trust", key_file, *other, code=1)
    assert "is not what its exporter signed" in done.err
    assert done.err.count("\n") == 1
    assert run_json("document", "list", *other)["documents"] == []


def test_a_delisted_document_needs_relist(run, run_json, bundle, sold):
    """A home imports its own export, when it is asked to."""
    run("document", "delist", sold.document_id)
    assert "--relist" in run("bundle", "import", bundle, code=1).err
    assert run_json("bundle", "import", bundle, "--relist")["state"] == "live"


def test_keys_rotate(run, run_json, bundle, other, key_file):
    """The new key signs; the older ones are in the key set, and trusting that takes both."""
    before = run_json("key", "show")
    assert json.loads(run("key", "show").out) == before
    after = run_json("key", "rotate")
    assert run_json("key", "show") == after != before
    assert "signs from now on" in run("key", "rotate").out
    both = run("key", "show", "--all").out
    assert [key["kid"] for key in json.loads(both)["keys"]][1:] == [after["kid"], before["kid"]]
    key_file.write_text(both)
    assert run_json("trust", "add", key_file, *other)["added"] == 3
    assert run_json("bundle", "import", bundle, *other)["state"] == "live"


def test_a_home_without_a_market_has_no_key(run, other, tmp_path):
    """A mistyped home is an error, and no key is made in it."""
    for words in (("key", "show"), ("key", "rotate"), ("trust", "list")):
        assert "there is no market" in run(*words, *other, code=1).err
    assert not (tmp_path / "other").exists()


def test_the_operators_secret_rotates(run, sold, home):
    """A market that is open meanwhile makes the new tokens, and takes the old ones for a minute."""
    with Market.open(home) as market:
        old = market.credentials.sign("salt", "alice")
        assert "running processes use it within a second" in run("key", "rotate-operator").out
        time.sleep(0.6)
        assert market.credentials.sign("salt", "alice") != old
        assert market.credentials.verifies("salt", "alice", old)
