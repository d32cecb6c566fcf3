"""Bundles between two markets: what arrives is what was exported, or nothing is left."""

import dataclasses
import os
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tests.support import ROOT
from tests.support.bundle_files import (
    DOCUMENT,
    files_in,
    forge,
    manifest_of,
    members,
    open_market,
    publish,
    store,
)
from tests.support.catalogue_documents import NAMESPACE, tokens
from vllm_kvmarket import bundles
from vllm_kvmarket.auth.signing_keys import SigningKeys, TrustedKeys, decode_base64url
from vllm_kvmarket.core.errors import (
    BundleError,
    ChunkDamagedError,
    LedgerError,
    NotFoundError,
    StoreError,
    StoreFullError,
)
from vllm_kvmarket.market.garbage_collection import release_unneeded


@pytest.fixture
def seller(tmp_path):
    with open_market(tmp_path / "seller") as market:
        yield market


@pytest.fixture
def buyer(tmp_path, seller):
    """Another home, which trusts the seller's key."""
    with open_market(tmp_path / "buyer") as market:
        TrustedKeys(market.home).add(SigningKeys(seller.home).current().public)
        yield market


@pytest.fixture
def bundle(seller, tmp_path):
    listing = publish(seller, title="Handbook", publisher="acme", royalty_ppm=250_000)
    return bundles.export(seller, listing.document_id, tmp_path / "handbook.kvb").path


def take(market, path, **options):
    return bundles.import_(market, path, bundles.trusted_keys(market), **options)


def assert_nothing_left(market):
    assert files_in(market.store.disk.root) == {}
    assert market.store.disk.usage().bytes_used == market.store.disk.recount() == 0
    assert market.catalogue.listings() == []
    assert [account.id for account in market.ledger.accounts() if account.id == "acme"] == []
    assert market.catalogue.check_integrity() == []


def test_what_arrives_is_what_was_exported(seller, buyer, bundle):
    """Listing, terms and every byte of every chunk; the publisher gets an account."""
    original = seller.catalogue.listings()[0]
    listing = take(buyer, bundle)
    assert listing.state == "live"
    same = dataclasses.replace(original, stored_bytes=listing.stored_bytes)
    assert listing == same
    assert buyer.catalogue.tokens_of(listing.document_id) == DOCUMENT
    assert files_in(buyer.store.disk.root) == files_in(seller.store.disk.root)
    assert listing.stored_bytes == sum(map(len, files_in(buyer.store.disk.root).values()))
    assert buyer.ledger.account("acme").kind == "publisher"
    assert buyer.catalogue.match(NAMESPACE, DOCUMENT).token_count == len(DOCUMENT)
    assert take(buyer, bundle) == listing, "once more changes nothing"


def test_a_layout_that_nobody_converts_travels_too(seller, buyer, tmp_path):
    """Its files say which layout they are in, and arrive beside others."""
    listing = publish(seller, publisher="acme")
    store(seller, DOCUMENT, tag="012/cuda-ONE")
    path = bundles.export(seller, listing.document_id, tmp_path / "two.kvb").path
    assert take(buyer, path).state == "live"
    found = files_in(buyer.store.disk.root)
    assert found == files_in(seller.store.disk.root) and len(found) == 2 * len(listing.chunk_keys)


def test_a_bundle_needs_no_kvmarket_to_be_checked(seller, bundle):
    """Any tar program reads it, and the signature is plain Ed25519 over the manifest's bytes."""
    (_, manifest), (_, signature), *_ = members(bundle)
    jwk = msgspec.json.decode(manifest)["exporter"]
    Ed25519PublicKey.from_public_bytes(decode_base64url(jwk["x"])).verify(signature, manifest)
    names = [member.name for member, _ in members(bundle)]
    keys = seller.catalogue.listings()[0].chunk_keys
    assert names == ["manifest.json", "manifest.sig", *(f"chunks/{key.hex()}.kv" for key in keys)]
    assert bundle.stat().st_size % tarfile.RECORDSIZE == 0


def test_every_ranks_file_travels(seller, buyer, tmp_path):
    """Chunks by one rank and by two; a set of which a rank is missing stays at home."""
    listing = publish(seller, world_size=2)
    store(seller, DOCUMENT)
    store(seller, DOCUMENT, world_size=3, ranks=(0, 2))
    path = bundles.export(seller, listing.document_id, tmp_path / "b.kvb").path
    take(buyer, path)
    for key in listing.chunk_keys:
        assert sorted(buyer.store.shares(key)) == [(0, 1), (0, 2), (1, 2)]
        buyer.store.verify(key)


def test_a_chunk_without_every_rank_cannot_be_exported(seller, tmp_path):
    """There is no bundle then."""
    listing = publish(seller, world_size=2)
    seller.store.disk.path(listing.chunk_keys[1], 1, 2).unlink()
    with pytest.raises(StoreError, match="publish its document again"):
        bundles.export(seller, listing.document_id, tmp_path / "b.kvb")
    assert list(tmp_path.glob("*.kvb*")) == list(tmp_path.glob(".*")) == []


def test_an_exporter_whom_nobody_trusts_is_refused(seller, bundle, tmp_path):
    """The message has the key's id and says how to trust it; then it is taken."""
    key = SigningKeys(seller.home).current().public
    with open_market(tmp_path / "stranger") as market:
        with pytest.raises(BundleError, match=f"signed by {key.kid}.*`kvmarket trust add FILE`"):
            take(market, bundle)
        assert_nothing_left(market)
        assert bundles.import_(market, bundle, [key]).state == "live"


def test_a_home_trusts_itself_also_after_a_rotation(seller, bundle):
    """A market imports its own export."""
    SigningKeys(seller.home).rotate()
    (listing,) = seller.catalogue.listings()
    seller.delist(listing.document_id)
    for key in listing.chunk_keys:
        seller.store.disk.delete(key)
    assert take(seller, bundle, relist=True).state == "live"


def test_a_key_that_is_trusted_no_more_is_refused(buyer, bundle):
    """Removing trust counts at once."""
    TrustedKeys(buyer.home).remove(manifest_of(bundle).exporter["kid"])
    with pytest.raises(BundleError, match="does not trust"):
        take(buyer, bundle)


def test_a_key_that_was_revoked_is_refused(seller, buyer, bundle):
    """By its own market, and by one that has trusted it before and knows of the revocation."""
    keys = SigningKeys(seller.home)
    stolen = keys.current().kid
    keys.revoke(stolen, "a stolen laptop")
    known = [key for key in keys.public_keys() if key.kid == stolen]
    with pytest.raises(BundleError, match=f"{stolen}, a key that was revoked"):
        take(seller, bundle)
    for order in ([*known, *bundles.trusted_keys(buyer)], [*bundles.trusted_keys(buyer), *known]):
        with pytest.raises(BundleError, match="revoked"):
            bundles.import_(buyer, bundle, order)


def test_the_quota_is_respected(buyer, bundle, tmp_path):
    """A bundle that does not fit is refused, and what was stored of it goes."""
    needed = sum(map(len, (content for member, content in members(bundle)[2:])))
    with open_market(buyer.home, disk_quota_bytes=needed - 1) as market:
        with pytest.raises(StoreFullError, match="quota"):
            take(market, bundle)
        assert_nothing_left(market)
    with open_market(buyer.home, disk_quota_bytes=needed + 65_536) as market:
        assert take(market, bundle).state == "live"


def test_what_another_listing_needs_stays_when_a_bundle_is_refused(seller, buyer, tmp_path):
    """Two documents begin alike: refusing one does not take the other's chunks."""
    publish(buyer, DOCUMENT[:32], title="shorter", publisher="other")
    before = files_in(buyer.store.disk.root)
    listing = publish(seller)
    path = bundles.export(seller, listing.document_id, tmp_path / "b.kvb").path
    bad = bytearray(members(path)[-1][1])
    bad[-1] ^= 1
    forged = forge(path, seller.home, contents={members(path)[-1][0].name: bytes(bad)})
    with pytest.raises(BundleError, match="signed a damaged chunk"):
        take(buyer, forged)
    assert files_in(buyer.store.disk.root) == before
    assert [found.terms.title for found in buyer.catalogue.listings()] == ["shorter"]
    assert buyer.store.disk.usage().bytes_used == buyer.store.disk.recount()


def test_a_document_that_is_on_offer_is_repaired_on_its_own_terms(buyer, bundle, seller):
    """A bundle brings back what was damaged; it never moves a royalty to somebody else."""
    home = publish(buyer, title="ours", publisher="us", royalty_ppm=7)
    first, second, _ = home.chunk_keys
    path = buyer.store.disk.path(first)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    buyer.store.disk.path(second).unlink()
    buyer.catalogue.report_damage(first)
    buyer.catalogue.report_damage(second)
    listing = take(buyer, bundle)
    assert (listing.state, listing.terms.title, listing.terms.publisher) == ("live", "ours", "us")
    assert listing.terms.royalty_ppm == 7
    for key in listing.chunk_keys:
        buyer.store.verify(key)


def test_a_delisted_document_stays_so_unless_asked(buyer, bundle):
    """Whoever delisted it had a reason."""
    listing = take(buyer, bundle)
    buyer.delist(listing.document_id)
    with pytest.raises(BundleError, match="--relist"):
        take(buyer, bundle)
    assert buyer.catalogue.get(listing.document_id).state == "delisted"
    assert take(buyer, bundle, relist=True).state == "live"


def test_who_earns_can_be_named(buyer, bundle):
    """The bundle's publisher may be somebody else here, or a buyer."""
    buyer.create_account("acme", "buyer")
    with pytest.raises(BundleError, match="is a buyer here; name the account"):
        take(buyer, bundle)
    with pytest.raises(BundleError, match="no account's id"):
        take(buyer, bundle, publisher="no spaces")
    assert files_in(buyer.store.disk.root) == {}
    assert take(buyer, bundle, publisher="partner").terms.publisher == "partner"
    assert buyer.ledger.account("partner").kind == "publisher"


def test_a_time_to_live_travels(seller, buyer, tmp_path):
    """A document that ends at the exporter's ends here too, and is not taken when it is over."""
    listing = publish(seller, expires_at_s=time.time() + 1000)
    path = bundles.export(seller, listing.document_id, tmp_path / "b.kvb").path
    over = forge(path, seller.home, lambda manifest: manifest["terms"].update(expires_at_s=1.0))
    with pytest.raises(BundleError, match="time to live is over"):
        take(buyer, over)
    assert take(buyer, path).terms.expires_at_s == listing.terms.expires_at_s


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_import_leaves_nothing(buyer, bundle, after):
    """Ctrl-C after any chunk."""
    calls = []

    def interrupt(done, total):
        calls.append(done)
        if len(calls) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take(buyer, bundle, on_progress=interrupt)
    assert_nothing_left(buyer)
    assert take(buyer, bundle).state == "live"


def test_a_killed_import_lists_nothing(buyer, bundle):
    """kill -9 after the second chunk: gc takes what lies there, and the next import works."""
    script = (
        "import os, signal, sys\n"
        "from tests.support.bundle_files import *\n"
        "from vllm_kvmarket import bundles\n"
        "market = open_market(Path(sys.argv[1]))\n"
        "done = []\n"
        "def die(*_):\n"
        "    done.append(1)\n"
        "    len(done) == 2 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "trusted = bundles.trusted_keys(market)\n"
        "bundles.import_(market, Path(sys.argv[2]), trusted, on_progress=die)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, buyer.home, bundle]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert len(files_in(buyer.store.disk.root)) == 2
    buyer.store.disk.sweep_temporary()
    release_unneeded(buyer, buyer.store.disk.keys())
    assert_nothing_left(buyer)
    assert take(buyer, bundle).state == "live"


def test_two_imports_at_once_end_with_one_listing(buyer, bundle):
    """Whoever is first lists it; everybody gets the same listing, and every chunk is whole."""

    def run(_):
        with open_market(buyer.home) as market:
            return take(market, bundle)

    with ThreadPoolExecutor(4) as pool:
        listings = list(pool.map(run, range(4)))
    assert {listing.state for listing in listings} == {"live"}
    assert len({listing.document_id for listing in listings}) == 1
    for key in listings[0].chunk_keys:
        buyer.store.verify(key)
    assert buyer.store.disk.usage().bytes_used == buyer.store.disk.recount()


def test_a_failing_ledger_leaves_no_chunks(buyer, bundle, monkeypatch):
    """The last step before the listing fails: no listing, no chunks."""

    def fail(*_):
        raise LedgerError("no")

    monkeypatch.setattr(buyer.ledger, "create_account", fail)
    with pytest.raises(LedgerError):
        take(buyer, bundle)
    assert_nothing_left(buyer)


def test_chunks_that_gc_takes_meanwhile_are_stored_again(buyer, bundle, tmp_path):
    """Before it is listed, a chunk looks like one that nobody needs to another process's gc."""
    with open_market(buyer.home) as other:

        def collect(done, total):
            if done == total:
                release_unneeded(other, other.store.disk.keys())

        listing = take(buyer, bundle, on_progress=collect)
    assert listing.state == "live"
    for key in listing.chunk_keys:
        buyer.store.verify(key)


def test_a_bundle_that_changes_while_it_is_read_is_refused(buyer, bundle):
    """The stored chunk is compared with the signature, not with an earlier comparison."""

    def change(done, total):
        content = bytearray(bundle.read_bytes())
        content[content.rindex(b"chunks/") + tarfile.BLOCKSIZE] |= 0xFF
        bundle.write_bytes(content)

    with pytest.raises(BundleError, match="not what its exporter signed"):
        take(buyer, bundle, on_progress=change)
    assert_nothing_left(buyer)


@pytest.mark.parametrize("state", ["delisted", "damaged"])
def test_only_a_live_document_is_exported(seller, tmp_path, state):
    """A bundle never has a hole, nor what its publisher took off the market."""
    listing = publish(seller)
    if state == "delisted":
        seller.delist(listing.document_id)
    else:
        seller.catalogue.report_damage(listing.chunk_keys[0])
    with pytest.raises(BundleError, match=f"is {state}; only a live"):
        bundles.export(seller, listing.document_id, tmp_path / "b.kvb")
    with pytest.raises(NotFoundError):
        bundles.export(seller, "kvd_unknown", tmp_path / "b.kvb")


def test_a_failed_export_leaves_the_file_as_it_was(seller, bundle, tmp_path):
    """Damage that nobody has noticed so far is found by exporting; no half file is left."""
    listing = seller.catalogue.listings()[0]
    before = bundle.read_bytes()
    path = seller.store.disk.path(listing.chunk_keys[-1])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ChunkDamagedError):
        bundles.export(seller, listing.document_id, bundle)
    assert bundle.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["handbook.kvb", "seller"]


def test_what_a_killed_export_left_goes_with_the_next(seller, bundle, tmp_path):
    """A draft whose writer is dead has no lock; other files are not touched."""
    (tmp_path / ".draft-0123-handbook.kvb").write_bytes(b"half")
    (tmp_path / ".draft-0123-other.kvb").write_bytes(b"half")
    bundles.export(seller, seller.catalogue.listings()[0].document_id, bundle)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".draft-0123-other.kvb", "handbook.kvb", "seller"]


def test_a_place_that_cannot_be_written_is_named(seller, tmp_path):
    """A missing folder, and a folder in the file's place."""
    listing = publish(seller)
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "none" / "b.kvb", tmp_path / "folder"):
        with pytest.raises(BundleError, match=f"cannot write {path}"):
            bundles.export(seller, listing.document_id, path)
    assert list((tmp_path / "folder").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "seller"]


def test_a_long_document_travels(seller, buyer, tmp_path):
    """Dozens of chunks: progress goes from the first byte to the last."""
    document = tokens(16 * 50 + 3, seed=9)
    listing = publish(seller, document)
    seen = []
    path = tmp_path / "b.kvb"
    bundles.export(seller, listing.document_id, path, lambda *done: seen.append(done))
    assert len(seen) == 51
    assert seen[-1][0] <= seen[-1][1] == path.stat().st_size
    seen.clear()
    take(buyer, path, on_progress=lambda *done: seen.append(done))
    assert seen[-1][0] == seen[-1][1] == sum(map(len, files_in(buyer.store.disk.root).values()))


def test_a_home_with_an_object_store_exports_and_imports(seller, bundle, tmp_path):
    """An export fetches chunks that only the bucket has; an import uploads its chunks."""
    options = {"object_store_url": (tmp_path / "bucket").as_uri()}
    key = SigningKeys(seller.home).current().public
    with open_market(tmp_path / "first", **options) as market:
        listing = bundles.import_(market, bundle, [key])
        for chunk in listing.chunk_keys:
            market.store.disk.delete(chunk)
            assert market.store.has(chunk), "the bucket has it"
        path = bundles.export(market, listing.document_id, tmp_path / "again.kvb").path
    assert members(path)[2][1] == members(bundle)[2][1]
    assert [part for _, part in members(path)[2:]] == [part for _, part in members(bundle)[2:]]
