"""What the ledger's tests share: books in memory and on tables, a funded ledger, a receipt."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

from vllm_kvmarket import database
from vllm_kvmarket.ledger import Ledger, Receipt, pending, tables
from vllm_kvmarket.ledger.rules import Account, Transfer

NANO = 1_000_000_000


class MemoryBooks:
    """The smallest books that the rules can work on."""

    def __init__(self, *accounts: Account) -> None:
        self.accounts = {account.id: account for account in accounts}
        self.transfers: dict[str, Transfer] = {}

    def account(self, account_id):
        return self.accounts.get(account_id)

    def transfer(self, transfer_id):
        return self.transfers.get(transfer_id)

    def resolution(self, pending_id):
        found = (each for each in self.transfers.values() if each.pending_id == pending_id)
        return next(found, None)

    def put_account(self, account):
        assert account.id in self.accounts
        self.accounts[account.id] = account

    def put_transfer(self, transfer):
        assert transfer.id not in self.transfers, "transfers never change"
        self.transfers[transfer.id] = transfer


class TableBooks(tables.StoredBooks):
    """The ledger's own books, in a database that ends with the test."""

    def __init__(self, *accounts: Account) -> None:
        self.db = database.connect(Path(":memory:"))
        database.migrate(self.db, tables.ROOM, tables.MIGRATIONS)
        marks = ", ".join("?" * len(Account.__struct_fields__))
        for account in accounts:
            values = [getattr(account, field) for field in Account.__struct_fields__]
            self.db.execute(
                f"INSERT INTO account ({tables.ACCOUNT_COLUMNS}) VALUES ({marks})", values
            )
        super().__init__(self.db)

    def flush(self):
        super().flush()
        self._accounts.clear()  # the next transaction reads them anew

    @property
    def accounts(self):
        self.flush()
        return {account.id: account for account in tables.read_accounts(self.db)}

    @property
    def transfers(self):
        return {transfer.id: transfer for transfer in tables.read_transfers(self.db)}


@contextmanager
def funded_ledger(path):
    """A ledger in which alice has NANO to spend."""
    with Ledger.open(path) as ledger:
        ledger.create_account("alice", "buyer")
        ledger.create_account("pat", "publisher")
        ledger.deposit("alice", NANO, "d1")
        yield ledger


def hold(id, amount, timeout_s=900):
    return pending(
        id=id,
        debit="alice",
        credit="provider",
        amount_nano=amount,
        timeout_s=timeout_s,
        code="reuse",
    )


def receipt(id, charge, transfer):
    zeros = dict.fromkeys(
        ("tokens_matched", "tokens_reused", "tokens_loaded", "tokens_from_paged_cache"), 0
    )
    zeros |= dict.fromkeys(("tokens_failed", "tokens_computed", "tokens_output"), 0)
    zeros |= dict.fromkeys(("input_nano_per_mtok", "cache_read_nano_per_mtok", "royalty_ppm"), 0)
    return Receipt(
        id=id,
        request_id="r",
        account="alice",
        document_id="kvd_x",
        title="",
        publisher="pat",
        charge_nano=charge,
        royalty_nano=0,
        recompute_nano=0,
        reservation_id="h",
        transfer_ids=(transfer,),
        created_at_s=1.0,
        model="m",
        namespace="00",
        **zeros,
    )
