"""`kvmarket database ...`: the tables in PostgreSQL, and who may use them."""

from __future__ import annotations

import argparse
import contextlib

from vllm_kvmarket.auth.admin_log import ADMIN_LOG
from vllm_kvmarket.auth.api_keys import KEYS
from vllm_kvmarket.auth.sealed_secret import SECRETS
from vllm_kvmarket.auth.shared_keys import PUBLIC_KEYS
from vllm_kvmarket.catalogue.schema import CATALOGUE
from vllm_kvmarket.cli.command import UsageError, argument, command
from vllm_kvmarket.cli.output import clean, emit
from vllm_kvmarket.core import config
from vllm_kvmarket.core.database import open_database
from vllm_kvmarket.ledger import Ledger


@command(
    argument(
        "--role",
        help="a role that exists, for engines and servers: it may read and write the market, but "
        "not make or change tables, nor change what is final",
    )
)
def database_init(args: argparse.Namespace) -> None:
    """Make or update all tables at the configuration's database_url, as their owner."""
    url = config.load(args.config).database_url
    if url is None:
        raise UsageError("give a configuration with database_url: --config market.toml")
    Ledger.open(url).close()
    for room in (CATALOGUE, KEYS, ADMIN_LOG, SECRETS, PUBLIC_KEYS):
        with contextlib.closing(open_database(url, room)):
            pass
    if args.role is not None:
        from vllm_kvmarket.core import postgres_database

        postgres_database.allow(url, args.role)
    emit(
        args,
        {"database_url": url, "role": args.role},
        lambda where: where.print(clean(f"{url} has all tables of this version")),
    )
