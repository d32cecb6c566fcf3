"""Receipts that their buyer can show to anybody: compact JWS, signed with the market's key.

The payload has the fields of x402's receipt (the extension offer-receipt, version 1), and under
"kvmarket" what was sold:

    version, network, resourceUrl, payer, issuedAt, transaction
    kvmarket:
      receipt       the stored receipt with all its fields, see ledger.Receipt
      digest        the key of the document's last chunk, which covers its tokens and its namespace
      currency
      transfers     id, log_index and leaf_hash of the charge and the royalties
      log           the log's origin

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
    decode_base64url,
    encode_base64url,
)
from vllm_kvmarket.core.errors import NotFoundError, ProofError
from vllm_kvmarket.core.pricing import INT64_MAX, Terms
from vllm_kvmarket.ledger import PROVIDER, SUSPENSE, Receipt, ReceiptLine
from vllm_kvmarket.ledger.integrity import is_charge
from vllm_kvmarket.ledger.model import digest_of
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.proofs.log import LoggedTransfer, TransparencyLog
from vllm_kvmarket.proofs.merkle import leaf_hash
from vllm_kvmarket.proofs.notes import ORIGIN_PREFIX, InclusionProof, market_of

VERSION = 1
TYPE = "kvmarket-receipt"
ALGORITHM = "EdDSA"
MAX_JWS_CHARACTERS = 100_000
_HEADER = frozenset({"alg", "kid", "typ"})
# The ends of the names of those fields that are decimal strings.
_AMOUNTS = ("_nano", "_per_mtok")


class Sale(msgspec.Struct, frozen=True):
    """The claims under "kvmarket"."""

    receipt: Receipt
    digest: str
    currency: str
    transfers: tuple[LoggedTransfer, ...]
    log: str


class Payload(msgspec.Struct, frozen=True):
    """A receipt's claims; the fields beside `kvmarket` are x402's."""

    version: int
    network: str
    resourceUrl: str  # noqa: N815  # x402 spells it so
    payer: str
    issuedAt: int  # noqa: N815
    kvmarket: Sale
    transaction: str = ""

    @classmethod
    def of(cls, sale: Sale) -> Payload:
        """Put a sale into x402's fields."""
        receipt = sale.receipt
        return cls(
            version=VERSION,
            # CAIP-2 has room for 32 characters.
            network=f"kvmarket:{sale.log.removeprefix(ORIGIN_PREFIX)[:32]}",
            resourceUrl=f"urn:kvmarket:document:{receipt.document_id}",
            payer=receipt.account,
            issuedAt=int(receipt.created_at_s),
            transaction=receipt.transfer_ids[0] if receipt.transfer_ids else "",
            kvmarket=sale,
        )

    def claims(self) -> dict[str, Any]:
        """The claims as JSON has them."""
        claims: dict[str, Any] = _spelled(msgspec.to_builtins(self))
        return claims


def _spelled(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _spelled(each, name) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_spelled(each) for each in value]
    return str(value) if name.endswith(_AMOUNTS) else value


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
    """Sign a receipt of this market; a checkpoint has its transfers before it is signed.

    Raises NotFoundError, LedgerError, ConfigError; ProofError when the ledger was rolled back.
    """
    receipt = market.receipt(receipt_id)
    log = TransparencyLog.of(market)
    try:
        digest = market.catalogue.get(receipt.document_id).chunk_keys[-1].hex()
    except (NotFoundError, IndexError):
        digest = ""  # a catalogue that was lost; the id still has half of it
    currency = market.ledger.account(receipt.account).currency
    transfers = tuple(log.cover(receipt.transfer_ids))
    payload = Payload.of(Sale(receipt, digest, currency, transfers, log.origin))
    key = market.signing_keys.current()
    return SignedReceipt(payload, key.kid, sign(payload, key))


def sign(payload: Payload, key: SigningKey) -> str:
    """The compact JWS. Source: RFC 7515, section 7.1, and RFC 8037."""
    header = msgspec.json.encode({"alg": ALGORITHM, "kid": key.kid, "typ": TYPE})
    body = msgspec.json.encode(payload.claims())
    signed = f"{encode_base64url(header)}.{encode_base64url(body)}"
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
    if key.revoked_at_s:
        raise ProofError(f"it is signed by {key.kid}, a key that was revoked")
    if not key.verifies(signature, f"{parts[0]}.{parts[1]}".encode()):
        raise ProofError(f"the signature by {key.kid} is wrong: the receipt was changed")
    payload = read_claims(body)
    if 0 < key.not_after_s < payload.issuedAt:
        raise ProofError(f"it was issued after {key.kid}, the key that signed it, had expired")
    if wrong := list(contradictions(payload)):
        raise ProofError(f"it is signed, but contradicts itself: {'; '.join(wrong)}")
    origin = payload.kvmarket.log
    if not key.may_sign_for(market_of(origin)):
        raise ProofError(
            f"it is signed by {key.kid}, which the market of {origin} has not endorsed; get that "
            "market's keys with `kvmarket key show --all`"
        )
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


def read_claims(body: bytes) -> Payload:
    """Decode a signed payload. Raises ProofError for anything but the one spelling of a receipt."""
    try:
        payload = msgspec.convert(msgspec.json.decode(body), Payload, strict=False)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProofError(f"it is signed, but no receipt of version {VERSION}: {error}") from None
    if msgspec.json.encode(payload.claims()) != body:
        raise ProofError(f"it is signed, but no receipt of version {VERSION}: its spelling differs")
    return payload


def contradictions(payload: Payload) -> Iterable[str]:
    """Parts of a receipt that contradict each other, in words."""
    sale, receipt = payload.kvmarket, payload.kvmarket.receipt
    if payload.version != VERSION:
        yield f"version {payload.version} is not {VERSION}"
    if not 0 <= receipt.created_at_s < 1e12:
        yield "created_at_s is no time"
        return
    due = Payload.of(sale)
    if payload.network != due.network:
        yield "network and log are of different markets"
    if payload.resourceUrl != due.resourceUrl:
        yield "resourceUrl and document differ"
    if (payload.payer, payload.issuedAt) != (due.payer, due.issuedAt):
        yield "payer or issuedAt is not the receipt's"
    if payload.transaction != due.transaction:
        yield "transaction is not the first transfer"
    if tuple(each.id for each in sale.transfers) != receipt.transfer_ids:
        yield "its transfers are not the receipt's"
    if sale.digest and not sale.digest.startswith(receipt.document_id[4:]):
        yield "the document's digest is not that of its id"
    numbers = [
        value
        for each in (receipt, *receipt.lines)
        for value in msgspec.structs.astuple(each)
        if isinstance(value, int)
    ]
    if not all(0 <= number <= INT64_MAX for number in numbers):
        yield "a number of tokens, an amount or a price is below 0 or beyond int64"
        return
    reused = receipt.tokens_loaded + receipt.tokens_from_paged_cache
    if receipt.tokens_reused != reused or reused > receipt.tokens_matched:
        yield "tokens reused are not those loaded and those found in the paged cache"
    yield from _wrong_amounts(receipt)


def _wrong_amounts(receipt: Receipt) -> Iterable[str]:
    lines = receipt.all_lines()
    last = lines[-1]
    for name in ("document_id", "title", "publisher", "cache_read_nano_per_mtok", "royalty_ppm"):
        if getattr(last, name) != getattr(receipt, name):
            yield f"its {name} is not that of its last line"
    covered = 0
    for line in lines:
        if line.start != covered or line.end < line.start:
            yield "its lines do not follow each other"
            return
        covered = line.end
        yield from _wrong_line(receipt, line)
    if covered != receipt.tokens_reused:
        yield f"its lines have {covered} tokens, not the {receipt.tokens_reused} that were reused"
    if sum(line.charge_nano for line in lines) != receipt.charge_nano:
        yield "its lines do not add up to its charge"
    if sum(line.royalty_nano for line in lines) != receipt.royalty_nano:
        yield "its lines do not add up to its royalty"
    royalties = sum(line.royalty_nano > 0 for line in lines)
    if len(receipt.transfer_ids) != 1 + royalties:
        yield f"{len(receipt.transfer_ids)} transfers for a charge and {royalties} royalties"
    terms = Terms(receipt.input_nano_per_mtok, 0, 0)
    try:
        if receipt.recompute_nano != terms.recompute_nano(receipt.tokens_reused):
            yield "recompute_nano is not the price of computing them"
    except ValueError as error:
        yield str(error)


def _wrong_line(receipt: Receipt, line: ReceiptLine) -> Iterable[str]:
    charge, tokens = line.charge_nano, line.end - line.start
    terms = Terms(receipt.input_nano_per_mtok, line.cache_read_nano_per_mtok, line.royalty_ppm)
    try:
        if charge != terms.charge_nano(tokens):
            yield f"charge {charge} is not the price of {tokens} tokens"
    except ValueError as error:
        yield str(error)
    due = 0 if line.publisher == PROVIDER else terms.royalty_nano(charge)
    if line.royalty_nano != due:
        yield f"royalty {line.royalty_nano} is not the publisher's share of {charge}, {due}"


def verify_with_proof(
    signed: SignedReceipt, proof: InclusionProof, keys: Iterable[PublicKey]
) -> int:
    """Check that a transfer of a receipt is in the log, as the receipt says it is; which one.

    The first is the charge, which commits to the whole receipt; royalties follow. Raises
    ProofError.
    """
    leaf = proof.verify(keys)
    sale, receipt = signed.payload.kvmarket, signed.payload.kvmarket.receipt
    if leaf.id not in receipt.transfer_ids:
        raise ProofError(f"the proof is for transfer {leaf.id}, which is none of the receipt's")
    number = receipt.transfer_ids.index(leaf.id)
    if proof.checkpoint.origin != sale.log:
        raise ProofError(f"the proof is of the log {proof.checkpoint.origin}, not the receipt's")
    said = sale.transfers[number]
    if proof.index != said.log_index:
        raise ProofError(
            f"transfer {leaf.id} is leaf {proof.index}; the receipt says {said.log_index}"
        )
    if leaf_hash(proof.entry).hex() != said.leaf_hash:
        raise ProofError(f"transfer {leaf.id} is in the log, but not as the receipt has it")
    if number == 0:
        document_id, amount = leaf.user_data, receipt.charge_nano
        fits = is_charge(leaf.kind, leaf.code)
        debit, payees = receipt.account, [PROVIDER]
    else:
        line = [line for line in receipt.all_lines() if line.royalty_nano][number - 1]
        document_id, amount, fits = line.document_id, line.royalty_nano, leaf.kind == "plain"
        debit, payees = PROVIDER, [line.publisher, SUSPENSE]
    fits = fits and leaf.credit in payees
    if not fits or (leaf.debit, leaf.amount_nano) != (debit, str(amount)):
        raise ProofError(
            f"transfer {leaf.id} moved {leaf.amount_nano} from {leaf.debit} to {leaf.credit}, not "
            "what the receipt says"
        )
    if leaf.user_data != document_id:
        raise ProofError(f"transfer {leaf.id} is for {leaf.user_data}, not the receipt's document")
    if number == 0 and leaf.receipt_digest != digest_of(receipt):
        raise ProofError(f"transfer {leaf.id} was booked with another receipt than this one")
    return number
