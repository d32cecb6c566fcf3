"""Receipts that their buyer can show to anybody: compact JWS, signed with the market's key.

The payload has the fields of x402's receipt (the extension offer-receipt, version 1), and under
"kvmarket" what was sold:

    version, network, resourceUrl, payer, issuedAt, transaction
    kvmarket: receipt_id, request_id, model, namespace,
      document      id, digest (the key of its last chunk, which covers all its tokens and the
                    namespace), title, publisher
      tokens        matched, reused = loaded + from_paged_cache, failed, computed, output
      tariff        currency, prices in nano-units a million tokens, royalty_ppm
      charge_nano, royalty_nano, recompute_nano
      reservation_id, transfers (id, log_index and leaf_hash of charge and royalty), log (origin)

Amounts and prices are decimal strings, as x402's are: not every reader of JSON keeps int64 exact.
`network` is kvmarket:<the beginning of the origin>, `resourceUrl` a URN: neither is a chain or a
page. The header names the key by its RFC 7638 thumbprint, where x402 would have a DID URL; look it
up in the market's JWK set, which keeps the keys of before a rotation. Signed on demand, from what
the ledger stored with the charge: the same bytes each time, until the key is rotated.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from vllm_kvmarket.auth.signing_keys import (
    PublicKey,
    SigningKey,
    SigningKeys,
    decode_base64url,
    encode_base64url,
)
from vllm_kvmarket.core.errors import NotFoundError, ProofError
from vllm_kvmarket.core.pricing import Terms
from vllm_kvmarket.ledger import PROVIDER, Receipt
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.proofs import merkle
from vllm_kvmarket.proofs.log import LoggedTransfer, TransparencyLog
from vllm_kvmarket.proofs.notes import ORIGIN_PREFIX, InclusionProof

VERSION = 1
TYPE = "kvmarket-receipt"
ALGORITHM = "EdDSA"
MAX_JWS_CHARACTERS = 100_000
_HEADER = frozenset({"alg", "kid", "typ"})


class Document(msgspec.Struct, frozen=True):
    """What was sold."""

    id: str
    digest: str
    title: str
    publisher: str


class Tokens(msgspec.Struct, frozen=True):
    """How much of it, see ledger.Receipt."""

    matched: int
    reused: int
    loaded: int
    from_paged_cache: int
    failed: int
    computed: int
    output: int


class Prices(msgspec.Struct, frozen=True):
    """At which prices, in nano-units of `currency` per million tokens."""

    currency: str
    input_nano_per_mtok: str
    cache_read_nano_per_mtok: str
    royalty_ppm: int


class ReceiptedTransfer(msgspec.Struct, frozen=True):
    """A transfer that paid for it, and where in the log it is; the hash in hexadecimal."""

    id: str
    log_index: int
    leaf_hash: str


class LogName(msgspec.Struct, frozen=True):
    """Whose log that is."""

    origin: str


class Sale(msgspec.Struct, frozen=True):
    """The claims under "kvmarket"."""

    receipt_id: str
    request_id: str
    model: str
    namespace: str
    document: Document
    tokens: Tokens
    tariff: Prices
    charge_nano: str
    royalty_nano: str
    recompute_nano: str
    reservation_id: str
    transfers: tuple[ReceiptedTransfer, ...]
    log: LogName


class Payload(msgspec.Struct, frozen=True):
    """A receipt's claims; the fields beside `kvmarket` are x402's."""

    version: int
    network: str
    resourceUrl: str  # noqa: N815  # x402 spells it so
    payer: str
    issuedAt: int  # noqa: N815
    kvmarket: Sale
    transaction: str = ""


@dataclass(frozen=True, slots=True)
class SignedReceipt:
    """A receipt whose signature holds."""

    payload: Payload
    kid: str
    jws: str

    def x402(self) -> dict[str, Any]:
        """The artifact as x402's extension offer-receipt transports it."""
        return {"format": "jws", "signature": self.jws}


def signed_receipt(market: Market, receipt_id: str) -> SignedReceipt:
    """Sign a receipt of this market. Raises NotFoundError, ProofError, LedgerError, ConfigError."""
    receipt = market.receipt(receipt_id)
    log = TransparencyLog(market.ledger, market.home)
    try:
        digest = market.catalogue.get(receipt.document_id).chunk_keys[-1].hex()
    except (NotFoundError, IndexError):
        digest = ""  # a catalogue that was lost; the id still has half of it
    payload = payload_of(
        receipt,
        digest=digest,
        currency=market.ledger.account(receipt.account).currency,
        transfers=[log.locate(transfer) for transfer in receipt.transfer_ids],
        origin=log.origin,
    )
    key = SigningKeys(market.home).current()
    return SignedReceipt(payload, key.kid, sign(payload, key))


def payload_of(
    receipt: Receipt,
    *,
    digest: str,
    currency: str,
    transfers: Iterable[LoggedTransfer],
    origin: str,
) -> Payload:
    """Put a receipt into claims."""
    logged = tuple(
        ReceiptedTransfer(each.id, each.log_index, each.leaf_hash.hex()) for each in transfers
    )
    return Payload(
        version=VERSION,
        network=_network(origin),
        resourceUrl=_resource(receipt.document_id),
        payer=receipt.account,
        issuedAt=int(receipt.created_at_s),
        transaction=receipt.transfer_ids[0] if receipt.transfer_ids else "",
        kvmarket=Sale(
            receipt_id=receipt.id,
            request_id=receipt.request_id,
            model=receipt.model,
            namespace=receipt.namespace,
            document=Document(receipt.document_id, digest, receipt.title, receipt.publisher),
            tokens=Tokens(
                receipt.tokens_matched,
                receipt.tokens_reused,
                receipt.tokens_loaded,
                receipt.tokens_from_paged_cache,
                receipt.tokens_failed,
                receipt.tokens_computed,
                receipt.tokens_output,
            ),
            tariff=Prices(
                currency,
                str(receipt.input_nano_per_mtok),
                str(receipt.cache_read_nano_per_mtok),
                receipt.royalty_ppm,
            ),
            charge_nano=str(receipt.charge_nano),
            royalty_nano=str(receipt.royalty_nano),
            recompute_nano=str(receipt.recompute_nano),
            reservation_id=receipt.reservation_id,
            transfers=logged,
            log=LogName(origin),
        ),
    )


def sign(payload: Payload, key: SigningKey) -> str:
    """The compact JWS. Source: RFC 7515, section 7.1, and RFC 8037."""
    header = msgspec.json.encode({"alg": ALGORITHM, "kid": key.kid, "typ": TYPE})
    signed = f"{encode_base64url(header)}.{encode_base64url(msgspec.json.encode(payload))}"
    return f"{signed}.{encode_base64url(key.sign(signed.encode()))}"


def read_jws(text: str) -> str:
    """Find the compact JWS in a file's text: it alone, or x402's {"format": "jws", ...}.

    Raises ProofError.
    """
    text = text.strip()
    if not text.startswith("{"):
        return text
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProofError(f"neither a JWS nor JSON ({error})") from None
    jws = document.get("signature", document.get("jws"))
    if document.get("format", "jws") != "jws" or not isinstance(jws, str):
        raise ProofError('no receipt: expected {"format": "jws", "signature": "..."}')
    return jws.strip()


def verify(jws: str, keys: Iterable[PublicKey]) -> SignedReceipt:
    """Check a receipt with nothing but public keys. Raises ProofError that says what is wrong.

    The signature holds, by one of `keys`; the claims are complete and agree with each other.
    """
    parts = jws.split(".")
    if len(parts) != 3 or len(jws) > MAX_JWS_CHARACTERS:
        raise ProofError("no receipt: a compact JWS has three parts with dots between them")
    try:
        header, body, signature = (decode_base64url(part) for part in parts)
        facts = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise ProofError(f"no receipt: its parts are not a JWS's ({error})") from None
    key = _key_of(facts, {each.kid: each for each in keys})
    if not key.verifies(signature, f"{parts[0]}.{parts[1]}".encode()):
        raise ProofError(f"the signature by {key.kid} is wrong: the receipt was changed")
    try:
        payload = msgspec.json.decode(body, type=Payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProofError(f"it is signed, but no receipt of version {VERSION}: {error}") from None
    if wrong := list(contradictions(payload)):
        raise ProofError(f"it is signed, but contradicts itself: {'; '.join(wrong)}")
    return SignedReceipt(payload, key.kid, jws)


def _key_of(header: Any, known: Mapping[str, PublicKey]) -> PublicKey:
    if not isinstance(header, dict) or (header.get("alg"), header.get("typ")) != (ALGORITHM, TYPE):
        raise ProofError(f"no receipt: its header does not say {ALGORITHM} and {TYPE}")
    if unknown := sorted(set(header) - _HEADER):
        raise ProofError(f"its header has {', '.join(unknown)}, which no receipt has")
    kid = header.get("kid")
    key = known.get(kid) if isinstance(kid, str) else None
    if key is None:
        names = ", ".join(sorted(known)) or "none"
        raise ProofError(
            f"it is signed by key {kid!r}, which is not among those given ({names}); get the "
            "market's keys with `kvmarket key show --all`"
        )
    return key


def contradictions(payload: Payload) -> Iterable[str]:
    """What in a receipt does not agree with the rest of it, in words."""
    sale, tokens = payload.kvmarket, payload.kvmarket.tokens
    if payload.version != VERSION:
        yield f"version {payload.version} is not {VERSION}"
    if payload.network != _network(sale.log.origin):
        yield "network and log are of different markets"
    if payload.resourceUrl != _resource(sale.document.id):
        yield "resourceUrl and document differ"
    if sale.document.digest and not sale.document.digest.startswith(sale.document.id[4:]):
        yield "the document's digest is not that of its id"
    if payload.transaction != (sale.transfers[0].id if sale.transfers else ""):
        yield "transaction is not the first transfer"
    if min(msgspec.structs.astuple(tokens)) < 0:
        yield "tokens below 0"
    if tokens.reused != tokens.loaded + tokens.from_paged_cache or tokens.reused > tokens.matched:
        yield "tokens reused are not those loaded and those found in the paged cache"
    yield from _wrong_amounts(sale)


def _wrong_amounts(sale: Sale) -> Iterable[str]:
    texts = (
        sale.charge_nano,
        sale.royalty_nano,
        sale.recompute_nano,
        sale.tariff.input_nano_per_mtok,
        sale.tariff.cache_read_nano_per_mtok,
    )
    if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in texts):
        yield "an amount is no whole number"
        return
    charge, royalty, recompute, input_price, price = map(int, texts)
    terms = Terms(input_price, price, sale.tariff.royalty_ppm)
    try:
        if charge != terms.charge_nano(sale.tokens.reused):
            yield f"charge {charge} is not the price of {sale.tokens.reused} tokens"
        if recompute != terms.recompute_nano(sale.tokens.reused):
            yield "recompute_nano is not the price of computing them"
    except ValueError as error:
        yield str(error)
    due = 0 if sale.document.publisher == PROVIDER else terms.royalty_nano(charge)
    if royalty != due:
        yield f"royalty {royalty} is not the publisher's share of {charge}, {due}"
    if len(sale.transfers) != 1 + (royalty > 0):
        yield f"{len(sale.transfers)} transfers for a charge and a royalty of {royalty}"


def verify_with_proof(
    receipt: SignedReceipt, proof: InclusionProof, keys: Iterable[PublicKey]
) -> int:
    """Check that a transfer of a receipt is in the log, as the receipt says it is; which one.

    The first is the charge, the second the royalty. Raises ProofError.
    """
    leaf = proof.verify(keys)
    sale = receipt.payload.kvmarket
    ids = [transfer.id for transfer in sale.transfers]
    if leaf.id not in ids:
        raise ProofError(f"the proof is for transfer {leaf.id}, which is none of the receipt's")
    number = ids.index(leaf.id)
    if proof.checkpoint.origin != sale.log.origin:
        raise ProofError(f"the proof is of the log {proof.checkpoint.origin}, not the receipt's")
    said = sale.transfers[number]
    if proof.index != said.log_index:
        raise ProofError(
            f"transfer {leaf.id} is leaf {proof.index}; the receipt says {said.log_index}"
        )
    if merkle.leaf_hash(proof.entry).hex() != said.leaf_hash:
        raise ProofError(f"transfer {leaf.id} is in the log, but not as the receipt has it")
    expected = (
        ("post", receipt.payload.payer, PROVIDER, sale.charge_nano),
        ("plain", PROVIDER, sale.document.publisher, sale.royalty_nano),
    )[number]
    if (leaf.kind, leaf.debit, leaf.credit, leaf.amount_nano) != expected:
        raise ProofError(
            f"transfer {leaf.id} moved {leaf.amount_nano} from {leaf.debit} to {leaf.credit}, not "
            "what the receipt says"
        )
    if leaf.user_data != sale.document.id:
        raise ProofError(f"transfer {leaf.id} is for {leaf.user_data}, not the receipt's document")
    return number


def _network(origin: str) -> str:
    # CAIP-2 has room for 32 characters.
    return f"kvmarket:{origin.removeprefix(ORIGIN_PREFIX)[:32]}"


def _resource(document_id: str) -> str:
    return f"urn:kvmarket:document:{document_id}"
