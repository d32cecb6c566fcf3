"""Bundles that lie: refused with the reason, and nothing of them stays."""

import base64
import os
import random
import tarfile

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.bundle_files import (
    DOCUMENT,
    files_in,
    forge,
    member,
    members,
    open_market,
    pack,
    publish,
)
from vllm_kvmarket import bundles
from vllm_kvmarket.auth.signing_keys import SIGNATURE_BYTES, SigningKeys
from vllm_kvmarket.bundles.bundle_format import MANIFEST, MAX_MANIFEST_BYTES, SIGNATURE
from vllm_kvmarket.core.errors import BundleError
from vllm_kvmarket.core.model_identity import pack_tokens


@pytest.fixture(scope="module")
def seller(tmp_path_factory):
    """A home that exported one bundle; both are only read by the tests."""
    home = tmp_path_factory.mktemp("seller")
    with open_market(home) as market:
        listing = publish(market, title="Handbook", publisher="acme")
        bundles.export(market, listing.document_id, home / "good.kvb")
    return home


@pytest.fixture(scope="module")
def buyer(tmp_path_factory):
    with open_market(tmp_path_factory.mktemp("buyer")) as market:
        yield market


@pytest.fixture
def good(seller, tmp_path):
    path = tmp_path / "good.kvb"
    path.write_bytes((seller / "good.kvb").read_bytes())
    return path


@pytest.fixture
def refused(seller, buyer):
    """Import a file: it is refused, in one line with this reason, and nothing stays."""
    key = SigningKeys(seller).current().public

    def refused(path, reason=".", error=BundleError):
        with pytest.raises(error, match=reason) as caught:
            bundles.import_(buyer, path, [key])
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000
        assert files_in(buyer.store.disk.root) == {}
        assert buyer.catalogue.listings() == []
        assert all(account.id != "acme" for account in buyer.ledger.accounts())

    return refused


def test_every_byte_is_covered(seller, buyer, good, refused, tmp_path):
    """A bit flipped anywhere is found, but for bits that no tar reader looks at."""
    key = SigningKeys(seller).current().public
    content = good.read_bytes()
    rng = random.Random(1)
    positions = {*range(512), *rng.sample(range(len(content)), 300)}
    kept = []
    for position in sorted(positions):
        changed = bytearray(content)
        changed[position] ^= 1 << rng.randrange(8)
        good.write_bytes(changed)
        try:
            bundles.import_(buyer, good, [key], on_progress=lambda *_: 1 / 0)
        except BundleError:
            continue
        except ZeroDivisionError:
            kept.append(position)
    # Behind the six digits of a header's checksum.
    assert all((position % 512) in (154, 155) for position in kept)
    assert files_in(buyer.store.disk.root) == {}


def test_a_file_that_ends_too_soon_is_refused(good, refused):
    """Cut inside each part, at its edges, and to nothing."""
    content = good.read_bytes()
    cuts = [0, 1, 511, 512, 513, 1024, 2000, len(content) - 1, len(content) - 512]
    for size in [*cuts, *random.Random(2).sample(range(len(content)), 20)]:
        good.write_bytes(content[:size])
        refused(good, "ends before|ends inside|missing at its end")


@pytest.mark.parametrize("garbage", [b"x", bytes(512), bytes(10240), b"second"])
def test_nothing_may_follow(good, refused, garbage):
    """Neither garbage nor zeros nor another bundle behind the end."""
    content = good.read_bytes()
    good.write_bytes(content + (content if garbage == b"second" else garbage))
    refused(good, "behind its end")


@pytest.mark.parametrize("where", ["end", "padding"])
def test_nothing_is_hidden_in_padding(good, refused, where):
    """Unsigned bytes must be zero."""
    content = bytearray(good.read_bytes())
    size = len(members(good)[0][1])
    content[-1 if where == "end" else 512 + size] = 1
    good.write_bytes(content)
    refused(good, "something is hidden")


def parts_of(good, change):
    """The members of a good bundle, changed in one way."""
    parts = members(good)
    manifest, signature, first, second, *rest = parts
    name, content = first[0].name, first[1]
    link = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
    return {
        "absolute path": [manifest, signature, member(f"/{name}", content), second, *rest],
        "path upwards": [manifest, signature, member(f"../../{name}", content), second, *rest],
        "symbolic link": [manifest, signature, member(name, b"", **link), second, *rest],
        "hard link": [
            manifest,
            signature,
            member(name, b"", type=tarfile.LNKTYPE, linkname=SIGNATURE),
            second,
            *rest,
        ],
        "folder": [manifest, signature, member(name, type=tarfile.DIRTYPE), second, *rest],
        "device": [manifest, signature, member(name, type=tarfile.CHRTYPE), second, *rest],
        "pipe": [manifest, signature, member(name, type=tarfile.FIFOTYPE), second, *rest],
        "sparse": [
            manifest,
            signature,
            member(name, content, type=tarfile.GNUTYPE_SPARSE),
            second,
            *rest,
        ],
        "twice": [manifest, signature, first, first, second, *rest],
        "missing": [manifest, signature, second, *rest],
        "swapped": [manifest, signature, second, first, *rest],
        "extra": [*parts, member("chunks/extra", b"x")],
        "extra in front": [member("x", b"x"), *parts],
        "manifest twice": [manifest, *parts],
        "no signature": [manifest, *parts[2:]],
        "signature first": [signature, manifest, *parts[2:]],
        "no chunks": [manifest, signature],
        "longer": [manifest, signature, member(name, content + b"x"), second, *rest],
        "shorter": [manifest, signature, member(name, content[:-1]), second, *rest],
        "odd name": [manifest, signature, member("\udcff\n\x1b[31m", b"x"), second, *rest],
        "long name": [manifest, signature, member("x" * 5000, content), second, *rest],
    }[change]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("absolute path", "has '/chunks/.*' in place of chunks/"),
        ("path upwards", r"has '\.\./\.\./chunks/.*' in place of chunks/"),
        ("symbolic link", "is a link or something else"),
        ("hard link", "is a link or something else"),
        ("folder", "is a link or something else"),
        ("device", "is a link or something else"),
        ("pipe", "is a link or something else"),
        ("sparse", "is a link"),
        ("twice", "in place of chunks/"),
        ("missing", "in place of chunks/"),
        ("swapped", "in place of chunks/"),
        ("extra", "behind its end|something is hidden"),
        ("extra in front", "has 'x' in place of manifest.json"),
        ("manifest twice", "has 'manifest.json' in place of manifest.sig"),
        ("no signature", "has 'chunks/.*' in place of manifest.sig"),
        ("signature first", "has 'manifest.sig' in place of manifest.json"),
        ("no chunks", "no tar header in front of chunks/"),
        ("longer", "has [0-9]+ bytes instead of"),
        ("shorter", "has [0-9]+ bytes instead of"),
        ("odd name", "in place of chunks/"),
        ("long name", "in place of chunks/"),
    ],
)
def test_a_tar_with_other_members_is_refused(good, refused, tmp_path, change, reason):
    """Path tricks, links, duplicates: nothing is unpacked by the names that a file gives."""
    path = pack(tmp_path / "hostile.kvb", parts_of(good, change), format=tarfile.GNU_FORMAT)
    refused(path, reason)
    pad(path, good.stat().st_size)
    refused(path)


def pad(path, size):
    """Make a file as long as the good one, so that its size does not give it away."""
    os.truncate(path, size)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_bundle_that_was_packed_again_is_still_good(seller, buyer, good, tmp_path, form):
    """Another tar program, another owner, another time: none of it means anything."""
    parts = [
        member(found.name, content, uid=7, uname="me", mtime=12345, mode=0o4777)
        for found, content in members(good)
    ]
    path = pack(tmp_path / "again.kvb", parts, format=form)
    key = SigningKeys(seller).current().public
    with open_market(tmp_path / "other") as market:
        assert bundles.import_(market, path, [key]).state == "live"


@pytest.mark.parametrize("size", [0, -1, MAX_MANIFEST_BYTES + 1, 1 << 40, (1 << 63) - 1])
def test_a_manifest_of_any_size_costs_no_memory(refused, tmp_path, size):
    """The size that a header names is believed up to a bound, and only for what is there."""
    info = tarfile.TarInfo(MANIFEST)
    info.size = size
    path = tmp_path / "huge.kvb"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"{}")
    refused(path, f"manifest.json of {size} bytes")


@pytest.mark.parametrize(
    "manifest",
    [
        b"{}",
        b"[" * 100_000,
        b'{"format": "kvmarket-bundle/1", "exporter": {}}',
        b'{"format": 1, "exporter": {}}',
        b"\xff\xfe",
        b"\0",
    ],
)
def test_a_manifest_that_is_none_is_refused(refused, tmp_path, manifest):
    """Anything else in its place is refused."""
    parts = [member(MANIFEST, manifest), member(SIGNATURE, bytes(SIGNATURE_BYTES))]
    refused(pack(tmp_path / "odd.kvb", parts), "unreadable manifest")


def test_a_signature_is_of_its_own_manifest(seller, good, refused, tmp_path):
    """Neither no signature, nor one over another manifest, nor somebody else's, holds."""
    manifest, signature, *rest = members(good)
    for content in (bytes(SIGNATURE_BYTES), SigningKeys(seller).current().sign(b"{}")):
        path = pack(tmp_path / "b.kvb", [manifest, member(SIGNATURE, content), *rest])
        refused(path, "is not what .* signed")
    changed = manifest[1].replace(b'"Handbook"', b'"Textbook"')
    assert changed != manifest[1]
    path = pack(tmp_path / "b.kvb", [member(MANIFEST, changed), signature, *rest])
    refused(path, "is not what .* signed")


def test_a_stranger_cannot_sign_in_a_trusted_name(good, refused, tmp_path):
    """The key in the manifest is looked up by what it is, not by the name that it gives itself."""
    trusted = msgspec.json.decode(members(good)[0][1])["exporter"]

    def pretend(manifest):
        manifest["exporter"]["kid"] = trusted["kid"]

    stranger = tmp_path / "stranger"
    refused(forge(good, stranger, pretend), f"signed by {SigningKeys(stranger).current().kid}")
    refused(
        forge(good, stranger, lambda manifest: manifest.update(exporter=trusted)),
        "is not what .* signed",
    )


def set_share(field, value):
    return lambda manifest: manifest["chunks"][0]["shares"][0].update({field: value})


def encode(document):
    return base64.b64encode(pack_tokens(document)).decode()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(format="kvmarket-bundle/2"), "has format 'kvmarket-bundle/2'"),
        (lambda m: m.update(tokens=encode([1, *DOCUMENT[1:]])), "not those of its tokens"),
        (lambda m: m.update(tokens=encode(DOCUMENT[:-1])), "not those of its tokens"),
        (lambda m: m.update(tokens=encode(DOCUMENT)[:-4]), "not packed|unreadable"),
        (lambda m: m.update(tokens=""), "unreadable manifest"),
        (lambda m: m.update(namespace="00" * 32), "not those of its tokens"),
        (lambda m: m.update(namespace="00"), "unreadable manifest"),
        (lambda m: m.update(document_id="kvd_" + "0" * 32), "is not the id of its tokens"),
        (lambda m: m.update(chunk_tokens=32), "its chunks have 32 tokens, this market's 16"),
        (lambda m: m["chunks"].pop(), "not those of its tokens"),
        (lambda m: m["chunks"].append(m["chunks"][0]), "not those of its tokens"),
        (lambda m: m["chunks"][0].update(shares=[]), "unreadable manifest"),
        (lambda m: m["chunks"][0]["shares"].append(m["chunks"][0]["shares"][0]), "every rank"),
        (set_share("world_size", 2), "every rank"),
        (set_share("rank", 1), "every rank"),
        (set_share("rank", -1), "unreadable manifest"),
        (set_share("world_size", 0), "unreadable manifest"),
        (set_share("bytes", 1 << 49), "has [0-9]+ bytes instead of"),
        (set_share("bytes", 1 << 62), "unreadable manifest"),
        (set_share("bytes", 0), "unreadable manifest"),
        (set_share("blake3", "00" * 32), "is not what its exporter signed"),
        (set_share("blake3", "../../../x"), "unreadable manifest"),
        (lambda m: m["chunks"][0].update(key="../../etc/passwd"), "unreadable manifest"),
        (lambda m: m["terms"].update(publisher="not an id"), "no account's id"),
        (lambda m: m["terms"].update(publisher="x" * 200), "unreadable manifest"),
        (lambda m: m["terms"].update(title="x" * 5000), "unreadable manifest"),
        (lambda m: m["terms"].update(cache_read_nano_per_mtok=-1), "unreadable manifest"),
        (lambda m: m["terms"].update(cache_read_nano_per_mtok=1 << 63), "unreadable manifest"),
        (lambda m: m["terms"].update(royalty_ppm=1_000_001), "unreadable manifest"),
        (lambda m: m.update(created_at_s=1e300), "unreadable manifest"),
        (lambda m: m["terms"].update(rendered_as="html"), "unreadable manifest"),
        (lambda m: m.update(pinned=True), "unreadable manifest"),
        (lambda m: m["terms"].update(pinned=True), "unreadable manifest"),
        (lambda m: m.pop("terms"), "unreadable manifest"),
    ],
)
def test_a_signed_manifest_must_not_contradict_itself(seller, good, refused, change, reason):
    """Also an exporter who is trusted is checked: what cannot be true is refused."""
    refused(forge(good, seller, change), reason)


def test_signed_chunks_are_verified_all_the_same(seller, good, refused):
    """Not a chunk, another chunk, a damaged one, and one of another rank: signed, and refused."""
    names = [found.name for found, _ in members(good)[2:]]
    contents = [content for _, content in members(good)[2:]]
    damaged = bytearray(contents[1])
    damaged[-1] ^= 1
    for bad in (b"x", b"x" * 5000, contents[0], bytes(damaged), contents[1] + b"x"):
        path = forge(good, seller, contents={names[1]: bad})
        refused(path, "signed a damaged chunk")


def test_what_is_no_file_is_refused(refused, tmp_path):
    """A folder, a named pipe (without waiting for its writer), and nothing at all."""
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path, "no ordinary file")
    refused(tmp_path / "pipe", "no ordinary file")
    refused(tmp_path / "none", "cannot read")


@settings(deadline=None)  # a busy machine is no failure
@given(content=st.binary(max_size=3000), position=st.integers(0, 2000))
def test_any_bytes_are_refused_in_words(seller, buyer, content, position):
    """Any other content, alone or in place of a good bundle, is a BundleError."""
    key = SigningKeys(seller).current().public
    path = seller / "fuzz.kvb"
    good = (seller / "good.kvb").read_bytes()
    for whole in (content, good[:position] + content, good[:position] + content + good[position:]):
        if whole == good:
            continue
        path.write_bytes(whole)
        with pytest.raises(BundleError):
            bundles.import_(buyer, path, [key])
