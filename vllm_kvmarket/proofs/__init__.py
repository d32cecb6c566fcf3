"""Proof for both sides: signed receipts, a transparency log over all transfers, checks, backups.

The ledger decides what was charged; here is what lets others check it. Every transfer is a leaf of
an RFC 9162 Merkle tree (`leaves`, `log`), whose root the market signs in checkpoints (`notes`). A
buyer's receipt is a JWS (`receipts`) that names the leaves of its charge and its royalty.

**How a publisher checks that its royalties count all sales shown to buyers.** It needs the market's
public keys (`kvmarket key show --all`), its statement (`kvmarket ledger statement`) and receipts:
those of its own test purchases, and those that buyers show.

1. Each receipt's signature holds (`kvmarket receipt verify`): the market says that it sold so many
   tokens of this document, for this charge, with this royalty, in these transfers.
2. Each of the receipt's transfers is in the log (`kvmarket log prove ID`, then `receipt verify
   --proof`): the market cannot show the buyer one book and keep another.
3. The statement has the royalty's transfer, under the same id, log index and amount. A receipt
   whose royalty is not there is a signed proof against the market.
4. Checkpoints are kept, and compared with those that buyers have: the same size must have the same
   root, and `kvmarket log consistency OLD NEW` must lead from each to every later one. A market
   that shows two people different logs, or changes the past, cannot give that proof.

The leaf of a charge contains its receipt's digest: the market cannot sign another receipt for it.
Hashes prove that every sale that was shown was booked; they do not find a sale that nobody shows.
An auditor, who may read the whole ledger, finds those: `kvmarket ledger check --checkpoint FILE
--from-the-start` recomputes every balance and the root of every checkpoint from the transfers, and
compares charges and royalties with their receipts.
"""

from vllm_kvmarket.core.errors import ProofError
from vllm_kvmarket.proofs.backup import BackupReport, backup, check_backup, restore
from vllm_kvmarket.proofs.ledger_check import LedgerCheck, check_ledger, check_new
from vllm_kvmarket.proofs.log import TransparencyLog
from vllm_kvmarket.proofs.notes import (
    PROOF_HEADER,
    Checkpoint,
    ConsistencyProof,
    InclusionProof,
    read_inclusion,
    verifier_key,
    verify_checkpoint,
)
from vllm_kvmarket.proofs.signed_receipts import (
    SignedReceipt,
    read_jws,
    signed_receipt,
    verify,
    verify_with_proof,
)

__all__ = [
    "PROOF_HEADER",
    "BackupReport",
    "Checkpoint",
    "ConsistencyProof",
    "InclusionProof",
    "LedgerCheck",
    "ProofError",
    "SignedReceipt",
    "TransparencyLog",
    "backup",
    "check_backup",
    "check_ledger",
    "check_new",
    "read_inclusion",
    "read_jws",
    "restore",
    "signed_receipt",
    "verifier_key",
    "verify",
    "verify_checkpoint",
    "verify_with_proof",
]
