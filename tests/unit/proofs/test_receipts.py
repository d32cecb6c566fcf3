"""Signed receipts: what they say, who can check them, and how a publisher uses them."""

import json
from dataclasses import replace

import msgspec
import pytest
from joserfc import jws as joserfc_jws
from joserfc.jwk import KeySet, OKPKey

from tests.support.proof_market import open_shop, sell
from vllm_kvmarket.auth.signing_keys import SigningKeys, decode_base64url, encode_base64url
from vllm_kvmarket.core.errors import NotFoundError
from vllm_kvmarket.core.pricing import NANO
from vllm_kvmarket.ledger.statements import statement
from vllm_kvmarket.proofs import (
    ProofError,
    TransparencyLog,
    notes,
    read_inclusion,
    read_jws,
    signed_receipt,
    signed_receipts,
    verify,
    verify_checkpoint,
    verify_with_proof,
)


@pytest.fixture
def market(tmp_path):
    with open_shop(tmp_path / "home") as market:
        yield market


@pytest.fixture
def sold(market):
    """A receipt of a sale, signed."""
    return signed_receipt(market, sell(market, "p1").id)


@pytest.fixture
def keys(market):
    return SigningKeys(market.home)


def parts(jws):
    return [decode_base64url(part) for part in jws.split(".")]


def joined(key, header, body):
    """A JWS of any header and body, signed."""
    signed = f"{encode_base64url(header)}.{encode_base64url(body)}"
    return f"{signed}.{encode_base64url(key.sign(signed.encode()))}"


def forged(keys, sold, path, value):
    """The same receipt with another value, signed by the market: what a liar would give out."""
    payload = sold.payload.claims()
    place = payload
    *way, last = path.split(".")
    for step in way:
        place = place[int(step) if step.isdigit() else step]
    place[last] = value
    header, _, _ = parts(sold.jws)
    return joined(keys.current(), header, msgspec.json.encode(payload))


def test_a_receipt_says_what_was_sold_as_x402_would(market, sold):
    """x402's fields at the top, ours beneath; every amount exact, every transfer with its leaf."""
    receipt = market.ledger.receipts()[0]
    payload = sold.payload.claims()
    sale = payload.pop("kvmarket")
    assert payload.keys() == {
        "version",
        "network",
        "resourceUrl",
        "payer",
        "issuedAt",
        "transaction",
    }
    assert (payload["payer"], payload["transaction"]) == ("alice", receipt.transfer_ids[0])
    assert payload["network"].startswith("kvmarket:") and len(payload["network"]) <= 41
    listing = market.catalogue.get(receipt.document_id)
    assert sale["digest"] == listing.chunk_keys[-1].hex()
    assert sale["receipt"]["tokens_reused"] == 600
    assert sale["receipt"]["charge_nano"] == str(receipt.charge_nano)
    assert [each["id"] for each in sale["transfers"]] == list(receipt.transfer_ids)
    assert sold.x402() == {"format": "jws", "signature": sold.jws}


# RFC 9864 prefers the name Ed25519; x402 and most of what verifies a JWS know EdDSA.
@pytest.mark.filterwarnings("ignore:EdDSA is deprecated")
def test_another_implementation_verifies_a_receipt(sold, keys):
    """joserfc takes our JWS with our JWK set, and we take joserfc's."""
    known = KeySet.import_key_set(keys.jwks())
    taken = joserfc_jws.deserialize_compact(sold.jws, known, algorithms=["EdDSA"])
    assert signed_receipts.read_claims(taken.payload) == sold.payload
    assert taken.headers() == {
        "alg": "EdDSA",
        "kid": keys.current().kid,
        "typ": signed_receipts.TYPE,
    }
    private = OKPKey.import_key(keys.current().pem().partition(b"\n")[2])
    theirs = joserfc_jws.serialize_compact(
        taken.headers(), taken.payload, private, algorithms=["EdDSA"]
    )
    assert verify(theirs, keys.public_keys()).payload == sold.payload


def test_a_receipt_is_the_same_each_time(market, sold):
    """So that two copies are known to be one receipt."""
    assert signed_receipt(market, sold.payload.kvmarket.receipt.id).jws == sold.jws
    sell(market, "p2")
    assert signed_receipt(market, sold.payload.kvmarket.receipt.id).jws == sold.jws


def test_receipts_of_before_a_rotation_verify(market, sold, keys):
    """With the JWK set of today; the new key alone does not do."""
    keys.rotate()
    again = signed_receipt(market, sold.payload.kvmarket.receipt.id)
    assert again.payload == sold.payload
    assert again.kid != sold.kid
    for receipt in (sold, again):
        assert verify(receipt.jws, keys.public_keys()) == receipt
    with pytest.raises(ProofError, match=f"signed by key '{sold.kid}'.*key show --all"):
        verify(sold.jws, [keys.current().public])


@pytest.mark.parametrize("part", [0, 1, 2])
def test_any_changed_byte_is_found(sold, keys, part):
    """In header, payload or signature."""
    pieces = sold.jws.split(".")
    for place in range(0, len(pieces[part]), 17):
        old = pieces[part][place]
        new = "A" if old != "A" else "B"
        changed = pieces[part][:place] + new + pieces[part][place + 1 :]
        with pytest.raises(ProofError):
            verify(".".join([*pieces[:part], changed, *pieces[part + 1 :]]), keys.public_keys())


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"alg": "none"}, "header does not say EdDSA"),
        ({"alg": "HS256"}, "header does not say EdDSA"),
        ({"typ": "JWT"}, "header does not say EdDSA and kvmarket-receipt"),
        ({"crit": ["exp"]}, "header has crit, which no receipt has"),
        ({"jwk": {"kty": "OKP"}}, "header has jwk, which no receipt has"),
        ({"kid": None}, "not among those given"),
        ({"kid": ["x"]}, "not among those given"),
        ([], "header does not say"),
    ],
)
def test_a_header_that_no_receipt_has_is_refused(sold, keys, header, reason):
    """Also when it is signed by the right key: an algorithm or key in it is never believed."""
    usual, body, _ = parts(sold.jws)
    changed = {**json.loads(usual), **header} if isinstance(header, dict) else header
    with pytest.raises(ProofError, match=reason):
        verify(joined(keys.current(), json.dumps(changed).encode(), body), keys.public_keys())


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("version", 2, "version 2"),
        ("network", "kvmarket:other", "different markets"),
        ("resourceUrl", "urn:kvmarket:document:kvd_0", "resourceUrl and document differ"),
        ("transaction", "other", "not the first transfer"),
        ("kvmarket.receipt.charge_nano", "1", "do not add up to its charge"),
        ("kvmarket.receipt.lines.0.charge_nano", "1", "charge 1 is not the price of 600 tokens"),
        ("kvmarket.receipt.lines.0.royalty_nano", "0", "not the publisher's share"),
        ("kvmarket.receipt.lines.0.end", 599, "599 tokens, not the 600"),
        ("kvmarket.receipt.lines.0.start", 1, "do not follow each other"),
        ("kvmarket.receipt.lines.0.publisher", "bob", "publisher is not that of its last line"),
        ("kvmarket.receipt.charge_nano", "-1", "below 0"),
        ("kvmarket.receipt.charge_nano", "9" * 30, "beyond int64|no receipt of version 1"),
        ("kvmarket.receipt.royalty_nano", "0", "do not add up to its royalty"),
        ("kvmarket.receipt.recompute_nano", "1", "not the price of computing them"),
        ("kvmarket.receipt.tokens_reused", 10**15, "overflow|not those loaded"),
        ("kvmarket.receipt.tokens_loaded", 599, "not those loaded"),
        ("kvmarket.receipt.tokens_computed", -1, "below 0"),
        ("kvmarket.receipt.royalty_ppm", 1, "royalty_ppm is not that of its last line"),
        ("kvmarket.digest", "00" * 32, "not that of its id"),
        ("kvmarket.transfers", [], "transfers are not the receipt's"),
        ("kvmarket.receipt.transfer_ids", [], "transfers are not the receipt's"),
        ("payer", "bob", "payer or issuedAt"),
        ("issuedAt", 1, "payer or issuedAt"),
        ("kvmarket.receipt.created_at_s", 1e300, "no time"),
        ("kvmarket.receipt.charge_nano", "+1", "no receipt of version 1"),
        ("kvmarket.receipt.charge_nano", 1, "no receipt of version 1"),
        ("kvmarket.receipt", None, "no receipt of version 1"),
    ],
)
def test_a_signed_receipt_that_contradicts_itself_is_refused(sold, keys, path, value, reason):
    """A signature does not make a sum right."""
    with pytest.raises(ProofError, match=f"it is signed, but.*({reason})"):
        verify(forged(keys, sold, path, value), keys.public_keys())


@pytest.mark.parametrize(
    "text", ["", "a.b", "a.b.c", "..", "!.!.!", "a" * 200_000, "x.y.z.w", "\0", '{"format": "jws"}']
)
def test_what_is_no_receipt_is_refused_with_a_reason(keys, text):
    """Any content of a file."""
    keys.current()
    with pytest.raises(ProofError):
        verify(read_jws(text), keys.public_keys())


def test_a_receipt_is_read_alone_and_from_json(sold):
    """As `--jws` prints it, as x402 transports it."""
    assert read_jws(f"{sold.jws}\n") == sold.jws
    assert read_jws(json.dumps(sold.x402())) == sold.jws
    for text in ('{"format": "eip712", "signature": "0x"}', "{", '{"jws": 5}'):
        with pytest.raises(ProofError):
            read_jws(text)


def test_an_unknown_receipt_is_not_signed(market):
    """There is nothing to sign."""
    with pytest.raises(NotFoundError):
        market.ledger.receipt("kvr_nothing")


def test_a_publisher_checks_that_its_royalties_count_the_sales_that_buyers_show(market):
    """As the package's docstring tells: receipts -> inclusion proofs -> the publisher's statement.

    Each side has texts only, and the market's public keys.
    """
    # What the market gives: to the buyer receipts, to both proofs, to the publisher its statement.
    sales = [sell(market, f"p{number}", tokens) for number, tokens in enumerate((600, 256, 600))]
    log = TransparencyLog(market.ledger, market.home)
    shown_by_buyer = [signed_receipt(market, sale.id).jws for sale in sales]
    kept_by_buyer = log.checkpoint().note
    market.deposit("alice", NANO, "d2")
    transfers = [each for sale in sales for each in sale.transfer_ids]
    proofs = {each: log.prove(each).text() for each in transfers}
    made = statement(market.ledger, "pat", indexes_of=log.indexes_of)
    keys = log.keys.public_keys()

    # 1. the receipts hold, 2. their transfers are in the log, 3. the statement has the royalties
    on_statement = {line.transfer_id: line for line in made.lines}
    earned = 0
    for jws in shown_by_buyer:
        receipt = verify(jws, keys)
        sale = receipt.payload.kvmarket
        for number, transfer in enumerate(sale.transfers):
            proof = read_inclusion(proofs[transfer.id])
            assert verify_with_proof(receipt, proof, keys) == number
        charge, royalty = sale.transfers
        line = on_statement[royalty.id]
        assert (line.log_index, line.amount_nano) == (royalty.log_index, sale.receipt.royalty_nano)
        assert (line.receipt_id, line.sale_nano) == (sale.receipt.id, sale.receipt.charge_nano)
        earned += line.amount_nano
        # Proofs are of one transfer each.
        other = read_inclusion(proofs[transfers[-1] if charge.log_index < 8 else transfers[0]])
        with pytest.raises(ProofError, match="none of the receipt's"):
            verify_with_proof(receipt, other, keys)
    assert (earned, made.sales) == (made.closing_nano, 3)

    # 4. the buyer's checkpoint is of the same log
    old = verify_checkpoint(kept_by_buyer, keys)
    new = read_inclusion(proofs[transfers[0]]).checkpoint
    assert new.size > old.size
    log.prove_consistency(old.size, new.size).verify(keys)


def test_a_market_that_booked_otherwise_is_found_out(market, sold, keys):
    """A receipt for a royalty that the log does not have as such: its proof does not fit."""
    log = TransparencyLog(market.ledger, market.home)
    charge, royalty = sold.payload.kvmarket.transfers
    proof = log.prove(royalty.id)
    known = keys.public_keys()
    assert verify_with_proof(sold, proof, known) == 1
    for path, value, reason in (
        ("kvmarket.transfers.1.log_index", charge.log_index, "the receipt says"),
        ("kvmarket.transfers.1.leaf_hash", "00" * 32, "not as the receipt has it"),
    ):
        receipt = verify(forged(keys, sold, path, value), known)
        with pytest.raises(ProofError, match=reason):
            verify_with_proof(receipt, proof, known)
    sale = sold.payload.kvmarket
    lines = (msgspec.structs.replace(sale.receipt.lines[0], publisher="bob"),)
    for facts, shown, reason in (
        ({"lines": lines, "publisher": "bob"}, proof, "to pat, not what the receipt says"),
        ({"model": "a better one"}, log.prove(charge.id), "booked with another receipt"),
    ):
        changed = msgspec.structs.replace(sale.receipt, **facts)
        lying = signed_receipts.Payload.of(msgspec.structs.replace(sale, receipt=changed))
        receipt = verify(signed_receipts.sign(lying, keys.current()), known)
        with pytest.raises(ProofError, match=reason):
            verify_with_proof(receipt, shown, known)
    sale = msgspec.structs.replace(sold.payload.kvmarket, log=f"{log.origin}/2")
    lying = msgspec.structs.replace(sold.payload, kvmarket=sale)
    receipt = verify(signed_receipts.sign(lying, keys.current()), known)
    with pytest.raises(ProofError, match="not the receipt's"):
        verify_with_proof(receipt, proof, known)


def test_another_market_cannot_sign_in_this_ones_name(market, sold, keys, tmp_path):
    """A buyer who trusts the keys of two markets is not deceived by either."""
    stranger = SigningKeys(tmp_path / "stranger")
    known = [*keys.public_keys(), stranger.current().public]
    forged_jws = signed_receipts.sign(sold.payload, stranger.current())
    with pytest.raises(ProofError, match="has not endorsed"):
        verify(forged_jws, known)
    log = TransparencyLog(market.ledger, market.home)
    checkpoint = log.checkpoint()
    note = notes.sign_checkpoint(
        log.origin, checkpoint.size, checkpoint.root, stranger.current()
    ).note
    with pytest.raises(ProofError, match="has not endorsed"):
        verify_checkpoint(note, known)


def test_a_key_signs_no_sale_of_after_its_end(sold, keys):
    """What was issued later was signed by somebody who still has the key; older sales stand."""
    issued_s = sold.payload.issuedAt
    for end_s, good in ((issued_s - 1, False), (issued_s, True), (0, True)):
        known = [replace(key, not_after_s=end_s) for key in keys.public_keys()]
        if good:
            assert verify(sold.jws, known) == sold
        else:
            with pytest.raises(ProofError, match="had expired"):
                verify(sold.jws, known)


def test_what_a_revoked_key_signed_no_longer_verifies(market, sold, keys):
    """With the market's key set of today; the market signs it again with another key."""
    checkpoint = TransparencyLog(market.ledger, market.home).checkpoint()
    keys.revoke(sold.kid, "stolen")
    with pytest.raises(ProofError, match="revoked"):
        verify(sold.jws, keys.public_keys())
    with pytest.raises(ProofError, match="revoked"):
        verify_checkpoint(checkpoint.note, keys.public_keys())
    again = signed_receipt(market, sold.payload.kvmarket.receipt.id)
    assert verify(again.jws, keys.public_keys()) == again
