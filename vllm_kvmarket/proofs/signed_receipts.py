"""Receipts that their buyer can show to anybody: compact JWS, signed with the market's key.

The payload has the fields of x402's receipt (the extension offer-receipt, version 1), and under
"kvmarket" what was sold:

    version, network, resourceUrl, payer, issuedAt, transaction
    kvmarket: receipt_id, request_id, model, namespace,
      document      id, digest (the key of its last chunk, which covers all its tokens and the
                    namespace), title, publisher
      tokens        matched, reused = loaded + from_paged_cache, failed, computed, output
      tariff        currency, prices in nano-units a million tokens, royalty_ppm
      charge_nano, royalty_nano, recompute_nano, created_at_s
      lines         for each listing of the sale: document_id, title, publisher, its tokens from
                    start to end, prices, royalty_ppm, charge_nano, royalty_nano
      reservation_id, transfers (id, log_index and leaf_hash of charge and royalties), log (origin)

Amounts and prices are decimal strings, as x402's are: not every reader of JSON keeps int64 exact.
`network` is kvmarket:<the beginning of the origin>, `resourceUrl` a URN: neither is a chain or a
page. The header names the key by its RFC 7638 thumbprint, where x402 would have a DID URL; look it
up in the market's JWK set, which keeps the keys of before a rotation. Signed on demand, from what
the ledger stored with the charge: the same bytes each time, until the key is rotated.
"""

from __future__ import annotations

import json
import re
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
from vllm_kvmarket.ledger import PROVIDER, SUSPENSE, Receipt, ReceiptLine
from vllm_kvmarket.ledger.integrity import CHARGES
from vllm_kvmarket.ledger.model import digest_of
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.proofs import merkle
from vllm_kvmarket.proofs.log import LoggedTransfer, TransparencyLog
from vllm_kvmarket.proofs.notes import ORIGIN_PREFIX, InclusionProof, market_of

VERSION = 1
TYPE = "kvmarket-receipt"
ALGORITHM = "EdDSA"
MAX_JWS_CHARACTERS = 100_000
_HEADER = frozenset({"alg", "kid", "typ"})


class Document(msgspec.Struct, frozen=True):
    """The document that was sold."""

    id: str
    digest: str
    title: str
    publisher: str


class Tokens(msgspec.Struct, frozen=True):
    """The counts of tokens, see ledger.Receipt."""

    matched: int
    reused: int
    loaded: int
    from_paged_cache: int
    failed: int
    computed: int
    output: int


class Prices(msgspec.Struct, frozen=True):
    """The prices, in nano-units of `currency` per million tokens."""

    currency: str
    input_nano_per_mtok: str
    cache_read_nano_per_mtok: str
    royalty_ppm: int


class ReceiptedTransfer(msgspec.Struct, frozen=True):
    """A transfer that paid for the sale, and its place in the log; the hash in hexadecimal."""

    id: str
    log_index: int
    leaf_hash: str


class SoldLine(msgspec.Struct, frozen=True):
    """One listing's part of the sale: the tokens from `start` up to, and without, `end`."""

    document_id: str
    title: str
    publisher: str
    start: int
    end: int
    cache_read_nano_per_mtok: str
    royalty_ppm: int
    charge_nano: str
    royalty_nano: str


class LogName(msgspec.Struct, frozen=True):
    """The name of the log."""

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
    created_at_s: str
    lines: tuple[SoldLine, ...]
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
    """Sign a receipt of this market; a checkpoint has its transfers before it is signed.

    Raises NotFoundError, LedgerError, ConfigError; ProofError when the ledger was rolled back.
    """
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
        transfers=log.cover(receipt.transfer_ids),
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
            created_at_s=repr(float(receipt.created_at_s)),
            lines=tuple(
                SoldLine(
                    line.document_id,
                    line.title,
                    line.publisher,
                    line.start,
                    line.end,
                    str(line.cache_read_nano_per_mtok),
                    line.royalty_ppm,
                    str(line.charge_nano),
                    str(line.royalty_nano),
                )
                for line in receipt.lines
            ),
            reservation_id=receipt.reservation_id,
            transfers=logged,
            log=LogName(origin),
        ),
    )


def receipt_of(payload: Payload) -> Receipt:
    """The stored receipt that claims were made of: its digest is in the log.

    Raises ValueError for an amount that is no number.
    """
    sale = payload.kvmarket
    return Receipt(
        id=sale.receipt_id,
        request_id=sale.request_id,
        account=payload.payer,
        document_id=sale.document.id,
        title=sale.document.title,
        publisher=sale.document.publisher,
        tokens_matched=sale.tokens.matched,
        tokens_reused=sale.tokens.reused,
        tokens_loaded=sale.tokens.loaded,
        tokens_from_paged_cache=sale.tokens.from_paged_cache,
        tokens_failed=sale.tokens.failed,
        tokens_computed=sale.tokens.computed,
        tokens_output=sale.tokens.output,
        input_nano_per_mtok=int(sale.tariff.input_nano_per_mtok),
        cache_read_nano_per_mtok=int(sale.tariff.cache_read_nano_per_mtok),
        royalty_ppm=sale.tariff.royalty_ppm,
        charge_nano=int(sale.charge_nano),
        royalty_nano=int(sale.royalty_nano),
        recompute_nano=int(sale.recompute_nano),
        reservation_id=sale.reservation_id,
        transfer_ids=tuple(transfer.id for transfer in sale.transfers),
        created_at_s=float(sale.created_at_s),
        model=sale.model,
        namespace=sale.namespace,
        lines=tuple(
            ReceiptLine(
                document_id=line.document_id,
                title=line.title,
                publisher=line.publisher,
                start=line.start,
                end=line.end,
                cache_read_nano_per_mtok=int(line.cache_read_nano_per_mtok),
                royalty_ppm=line.royalty_ppm,
                charge_nano=int(line.charge_nano),
                royalty_nano=int(line.royalty_nano),
            )
            for line in sale.lines
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
    if key.revoked_at_s:
        raise ProofError(f"it is signed by {key.kid}, a key that was revoked")
    if not key.verifies(signature, f"{parts[0]}.{parts[1]}".encode()):
        raise ProofError(f"the signature by {key.kid} is wrong: the receipt was changed")
    try:
        payload = msgspec.json.decode(body, type=Payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProofError(f"it is signed, but no receipt of version {VERSION}: {error}") from None
    if wrong := list(contradictions(payload)):
        raise ProofError(f"it is signed, but contradicts itself: {'; '.join(wrong)}")
    origin = payload.kvmarket.log.origin
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


def contradictions(payload: Payload) -> Iterable[str]:
    """Parts of a receipt that contradict each other, in words."""
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
    texts = [
        sale.charge_nano,
        sale.royalty_nano,
        sale.recompute_nano,
        sale.tariff.input_nano_per_mtok,
        sale.tariff.cache_read_nano_per_mtok,
    ]
    for line in sale.lines:
        texts += [line.cache_read_nano_per_mtok, line.charge_nano, line.royalty_nano]
    if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in texts):
        yield "an amount is no whole number"
        return
    if not re.fullmatch(r"[0-9]{1,12}\.[0-9]{1,9}", sale.created_at_s):
        yield "created_at_s is no time"
    lines = _lines_of(sale)
    last = lines[-1]
    shown = (sale.document.id, sale.document.title, sale.document.publisher)
    prices = (sale.tariff.cache_read_nano_per_mtok, sale.tariff.royalty_ppm)
    if (last.document_id, last.title, last.publisher) != shown or prices != (
        last.cache_read_nano_per_mtok,
        last.royalty_ppm,
    ):
        yield "document and tariff are not those of its last line"
    royalties = covered = 0
    for line in lines:
        if line.start != covered or line.end < line.start:
            yield "its lines do not follow each other"
        covered = line.end
        yield from _wrong_line(sale, line)
        royalties += int(line.royalty_nano) > 0
    if covered != sale.tokens.reused:
        yield f"its lines have {covered} tokens, not the {sale.tokens.reused} that were reused"
    if sum(int(line.charge_nano) for line in lines) != int(sale.charge_nano):
        yield "its lines do not add up to its charge"
    if sum(int(line.royalty_nano) for line in lines) != int(sale.royalty_nano):
        yield "its lines do not add up to its royalty"
    if len(sale.transfers) != 1 + royalties:
        yield f"{len(sale.transfers)} transfers for a charge and {royalties} royalties"
    terms = Terms(int(sale.tariff.input_nano_per_mtok), 0, 0)
    try:
        if int(sale.recompute_nano) != terms.recompute_nano(sale.tokens.reused):
            yield "recompute_nano is not the price of computing them"
    except ValueError as error:
        yield str(error)


def _wrong_line(sale: Sale, line: SoldLine) -> Iterable[str]:
    charge, royalty, tokens = int(line.charge_nano), int(line.royalty_nano), line.end - line.start
    prices = int(sale.tariff.input_nano_per_mtok), int(line.cache_read_nano_per_mtok)
    terms = Terms(*prices, line.royalty_ppm)
    try:
        if charge != terms.charge_nano(tokens):
            yield f"charge {charge} is not the price of {tokens} tokens"
    except ValueError as error:
        yield str(error)
    due = 0 if line.publisher == PROVIDER else terms.royalty_nano(charge)
    if royalty != due:
        yield f"royalty {royalty} is not the publisher's share of {charge}, {due}"


def _lines_of(sale: Sale) -> tuple[SoldLine, ...]:
    """The sale's lines; the one that it describes itself where it lists none."""
    if sale.lines:
        return sale.lines
    line = SoldLine(
        sale.document.id,
        sale.document.title,
        sale.document.publisher,
        0,
        sale.tokens.reused,
        sale.tariff.cache_read_nano_per_mtok,
        sale.tariff.royalty_ppm,
        sale.charge_nano,
        sale.royalty_nano,
    )
    return (line,)


def verify_with_proof(
    receipt: SignedReceipt, proof: InclusionProof, keys: Iterable[PublicKey]
) -> int:
    """Check that a transfer of a receipt is in the log, as the receipt says it is; which one.

    The first is the charge, which commits to the whole receipt; royalties follow. Raises
    ProofError.
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
    if number == 0:
        document_id, amount = leaf.user_data, sale.charge_nano
        kinds: tuple[str, ...] = CHARGES
        debit, payees = receipt.payload.payer, [PROVIDER]
    else:
        line = [line for line in _lines_of(sale) if int(line.royalty_nano)][number - 1]
        document_id, amount, kinds = line.document_id, line.royalty_nano, ("plain",)
        debit, payees = PROVIDER, [line.publisher, SUSPENSE]
    moved = leaf.kind in kinds and leaf.credit in payees
    if not moved or (leaf.debit, leaf.amount_nano) != (debit, amount):
        raise ProofError(
            f"transfer {leaf.id} moved {leaf.amount_nano} from {leaf.debit} to {leaf.credit}, not "
            "what the receipt says"
        )
    if leaf.user_data != document_id:
        raise ProofError(f"transfer {leaf.id} is for {leaf.user_data}, not the receipt's document")
    if number == 0 and leaf.receipt_digest != digest_of(receipt_of(receipt.payload)):
        raise ProofError(f"transfer {leaf.id} was booked with another receipt than this one")
    return number


def _network(origin: str) -> str:
    # CAIP-2 has room for 32 characters.
    return f"kvmarket:{origin.removeprefix(ORIGIN_PREFIX)[:32]}"


def _resource(document_id: str) -> str:
    return f"urn:kvmarket:document:{document_id}"
