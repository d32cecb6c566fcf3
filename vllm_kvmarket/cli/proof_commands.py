"""`kvmarket receipt ...` and `kvmarket log ...`: receipts, proofs, and the admin log."""

from __future__ import annotations

import argparse
import base64
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_kvmarket import proofs
from vllm_kvmarket.auth.admin_log import AdminLog
from vllm_kvmarket.auth.signing_keys import PublicKey, SigningKeys, TrustedKeys, read_jwks
from vllm_kvmarket.cli.command import UsageError, argument, command, home_of, limit, open_market
from vllm_kvmarket.cli.output import clean, emit, moment, pairs, read_text, table
from vllm_kvmarket.core import config
from vllm_kvmarket.core.pricing import format_nano

if TYPE_CHECKING:
    from rich.console import Console

# receipts


@command(argument("--account", help="only receipts of this buyer"), limit("receipts"))
def receipt_list(args: argparse.Namespace) -> None:
    """List receipts: the reused tokens and the charge."""
    with open_market(args) as market:
        if args.account:
            market.ledger.account(args.account)
        receipts = market.receipts(args.account, args.limit)
    document = {"receipts": msgspec.to_builtins(receipts)}
    emit(args, document, lambda where: _show_receipts(where, document["receipts"]))


def _show_receipts(where: Console, receipts: list[dict[str, Any]]) -> None:
    table(
        where,
        ["time", "account", "~title", ">reused", ">computed", ">charge", ">saved", "~receipt"],
        [
            (
                moment(receipt["created_at_s"]),
                receipt["account"],
                receipt["title"],
                receipt["tokens_reused"],
                receipt["tokens_computed"],
                format_nano(receipt["charge_nano"]),
                format_nano(receipt["recompute_nano"] - receipt["charge_nano"]),
                receipt["id"],
            )
            for receipt in receipts
        ],
        empty="no receipts yet",
    )


JWKS = argument(
    "--jwks",
    metavar="FILE",
    type=Path,
    help="the market's public keys, as `kvmarket key show --all` prints them "
    "(default: this market's own and those it trusts)",
)


def _keys(args: argparse.Namespace) -> list[PublicKey]:
    if args.jwks:
        return read_jwks(args.jwks)
    home = home_of(args)
    if config.load(args.config).database_url is not None:
        from vllm_kvmarket.bundles import trusted_keys

        with open_market(args) as market:
            return trusted_keys(market)
    keys = [*SigningKeys(home).public_keys(), *TrustedKeys(home).all().values()]
    if not keys:
        raise UsageError(f"there are no keys at {home}; give the market's with --jwks")
    return keys


@command(
    argument("receipt_id", metavar="ID", help="the receipt's id, kvr_..."),
    argument(
        "--jws", action="store_true", help="print the signed receipt alone, to give to others"
    ),
)
def receipt_show(args: argparse.Namespace) -> None:
    """Show a receipt, or its signed form for others."""
    with open_market(args) as market:
        market.ledger.receipt(args.receipt_id)  # do not wait for one that does not exist
        receipt = proofs.signed_receipt(market, args.receipt_id)
    if args.jws:
        print(receipt.jws)
        return
    document = {
        "payload": receipt.payload.claims(),
        "kid": receipt.kid,
        **receipt.x402(),
    }
    emit(args, document, lambda where: _show_receipt(where, receipt))


def _show_receipt(where: Console, signed: proofs.SignedReceipt) -> None:
    sale, receipt = signed.payload.kvmarket, signed.payload.kvmarket.receipt
    pairs(
        where,
        [
            ("receipt", receipt.id),
            ("issued", moment(receipt.created_at_s)),
            ("payer", receipt.account),
            ("document", f"{receipt.document_id} {receipt.title}"),
            ("publisher", receipt.publisher),
            ("tokens", f"{receipt.tokens_reused} reused, {receipt.tokens_computed} computed"),
            ("charge", f"{format_nano(receipt.charge_nano)} {sale.currency}"),
            ("royalty", f"{format_nano(receipt.royalty_nano)} {sale.currency}"),
            *((f"leaf {each.log_index}", each.id) for each in sale.transfers),
            ("log", sale.log),
            ("signed by", signed.kid),
        ],
    )


@command(
    argument(
        "file", metavar="FILE", type=Path, help="a signed receipt, as JWS or JSON; - for stdin"
    ),
    JWKS,
    argument(
        "--proof",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="also check that this proof (`kvmarket log prove`) is of one of its transfers; "
        "may be repeated",
    ),
)
def receipt_verify(args: argparse.Namespace) -> int:
    """Check a signed receipt with nothing but the market's public keys."""
    keys = _keys(args)
    try:
        receipt = proofs.verify(proofs.read_jws(read_text(args.file)), keys)
        logged = []
        for path in args.proof:
            proof = proofs.read_inclusion(read_text(path))
            number = proofs.verify_with_proof(receipt, proof, keys)
            logged.append(receipt.payload.kvmarket.transfers[number].id)
    except proofs.ProofError as error:
        return _refused(args, error)
    document = {
        "valid": True,
        "kid": receipt.kid,
        "payload": receipt.payload.claims(),
        "in_log": logged,
    }

    def show(where: Console) -> None:
        _show_receipt(where, receipt)
        for transfer in logged:
            where.print(clean(f"in the log: {transfer}"))
        where.print("good: signed by the market, and its figures add up")

    emit(args, document, show)
    return 0


def _refused(args: argparse.Namespace, error: Exception) -> int:
    """Report a proof that does not hold: as JSON, or by raising its error."""
    if not args.json:
        raise error
    emit(args, {"valid": False, "reason": str(error)}, lambda _: None)
    return 1


# the log


@command()
def log_checkpoint(args: argparse.Namespace) -> None:
    """Sign the log's size and root."""
    with open_market(args) as market:
        checkpoint = proofs.TransparencyLog.of(market).checkpoint()
        key = market.signing_keys.current().public
    if not args.json:
        sys.stdout.write(checkpoint.note)
        return
    document = {
        "origin": checkpoint.origin,
        "size": checkpoint.size,
        "root": base64.b64encode(checkpoint.root).decode(),
        "note": checkpoint.note,
        "kid": key.kid,
        "verifier_key": proofs.verifier_key(checkpoint.origin, key),
    }
    emit(args, document, lambda _: None)


@command(
    argument("--reason", required=True, help="what happened, for those who read the log"),
    changes=True,
)
def log_epoch(args: argparse.Namespace) -> None:
    """Begin a new log after the ledger was rolled back, and record what was lost."""
    with open_market(args) as market:
        epoch = proofs.TransparencyLog.of(market).open_epoch(args.reason)
    lost = "unknown" if epoch.common_size is None else epoch.signed_size - epoch.common_size
    emit(
        args,
        msgspec.to_builtins(epoch),
        lambda where: where.print(
            f"epoch {epoch.number}: {epoch.ledger_size} transfers, "
            f"{epoch.signed_size} were signed for, {lost} of them are lost"
        ),
    )


@command(argument("transfer_id", metavar="TRANSFER_ID", help="a transfer's id"))
def log_prove(args: argparse.Namespace) -> None:
    """Prove that a transfer is in the log."""
    with open_market(args) as market:
        proof = proofs.TransparencyLog.of(market).prove(args.transfer_id)
    if not args.json:
        sys.stdout.write(proof.text())
        return
    document = {
        "index": proof.index,
        "transfer": json.loads(proof.entry),
        "path": [each.hex() for each in proof.path],
        "size": proof.checkpoint.size,
        "root": proof.checkpoint.root.hex(),
        "proof": proof.text(),
    }
    emit(args, document, lambda _: None)


@command(
    argument("old", metavar="OLD", help="a checkpoint's file, or a number of transfers"),
    argument("new", metavar="NEW", nargs="?", help="a later one (default: the log as it stands)"),
)
def log_consistency(args: argparse.Namespace) -> None:
    """Prove that the log only grew."""
    with open_market(args) as market:
        log = proofs.TransparencyLog.of(market)
        known = log.keys.public_keys()
        old, old_note = _size(args.old, known)
        new, new_note = _size(args.new, known) if args.new else (None, "")
        proof = log.prove_consistency(old, new)
    proof = msgspec.structs.replace(
        proof,
        old_checkpoint=old_note or proof.old_checkpoint,
        new_checkpoint=new_note or proof.new_checkpoint,
    )
    # The caller's checkpoint may differ from what this log has now.
    proof.verify(known)
    # JSON with and without --json: the output is a file for others.
    print(msgspec.json.format(msgspec.json.encode(proof), indent=2).decode())


def _size(text: str, keys: list[PublicKey]) -> tuple[int, str]:
    """A number of leaves and, if `text` names a file, the checkpoint in it."""
    if text.isascii() and text.isdigit() and len(text) < 19:
        return int(text), ""
    note = read_text(Path(text))
    return proofs.verify_checkpoint(note, keys).size, note


@command(
    argument(
        "file",
        metavar="FILE",
        type=Path,
        help="the output of `log checkpoint`, `log prove` or `log consistency`; - for stdin",
    ),
    JWKS,
)
def log_verify(args: argparse.Namespace) -> int:
    """Check a checkpoint or proof with nothing but the market's public keys."""
    keys = _keys(args)
    try:
        document = _check(read_text(args.file), keys)
    except proofs.ProofError as error:
        return _refused(args, error)
    emit(args, document, lambda where: where.print(clean(f"good: {document['says']}")))
    return 0


def _check(text: str, keys: list[PublicKey]) -> dict[str, Any]:
    if text.startswith("{"):
        try:
            proof = msgspec.json.decode(text, type=proofs.ConsistencyProof)
        except msgspec.DecodeError as error:
            raise proofs.ProofError(f"no proof of consistency: {error}") from None
        proof.verify(keys)
        says = f"the log of {proof.new_size} transfers begins with that of {proof.old_size}"
        unsigned = not (proof.old_checkpoint and proof.new_checkpoint)
        says += "; not both sizes have a signed checkpoint" if unsigned else ""
        return {"valid": True, "kind": "consistency", "says": says}
    if text.startswith(proofs.PROOF_HEADER):
        inclusion = proofs.read_inclusion(text)
        leaf = inclusion.verify(keys)
        says = (
            f"transfer {leaf.id} is leaf {inclusion.index}: {leaf.kind}, {leaf.amount_nano} "
            f"nano-units from {leaf.debit} to {leaf.credit}"
        )
        return {
            "valid": True,
            "kind": "inclusion",
            "says": says,
            "transfer": msgspec.to_builtins(leaf),
        }
    checkpoint = proofs.verify_checkpoint(text, keys)
    says = f"{checkpoint.origin} has {checkpoint.size} transfers"
    return {"valid": True, "kind": "checkpoint", "says": says, "size": checkpoint.size}


# what administrators changed


@command(limit("entries"))
def log_admin(args: argparse.Namespace) -> None:
    """List what administrators changed, over HTTP and with this command."""
    with open_market(args) as market:
        entries = AdminLog(market.database).entries(args.limit)
    described = msgspec.to_builtins(entries)
    emit(args, {"entries": described}, lambda where: _show_admin(where, described))


def _show_admin(where: Console, described: list[dict[str, Any]]) -> None:
    table(
        where,
        [">number", "time", "actor", "action", "~details"],
        [
            (
                entry["number"],
                moment(entry["at_s"]),
                entry["actor"],
                entry["action"],
                ", ".join(f"{name}={value}" for name, value in entry["details"].items()),
            )
            for entry in described
        ],
        empty="no changes yet",
    )
