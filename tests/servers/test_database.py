"""One PostgreSQL database for all rooms: keys, the admin log, and who may do what."""

from __future__ import annotations

import inspect
import itertools
import json

import pytest

from tests.support.catalogue_documents import store, tokens
from tests.support.proof_market import open_shop, sell
from tests.unit.auth import (
    test_admin_log,
    test_api_keys,
    test_api_servers,
    test_sealed_secret,
    test_shared_keys,
)
from vllm_kvmarket import Market, bundles
from vllm_kvmarket.auth.admin_log import AdminLog
from vllm_kvmarket.auth.api_keys import Keys, KeysUnavailableError
from vllm_kvmarket.auth.sealed_secret import KEY_VARIABLE
from vllm_kvmarket.cli import main
from vllm_kvmarket.core.database import Room, open_database
from vllm_kvmarket.core.errors import BundleError, KVMarketError, ProofError, UnavailableError
from vllm_kvmarket.ledger import pending, post
from vllm_kvmarket.market.garbage_collection import purge, release_leftovers
from vllm_kvmarket.proofs import signed_receipt, verify

psycopg = pytest.importorskip("psycopg", reason="pip install vllm-kvmarket[postgres]")
from tests.support.postgres import running_postgres  # noqa: E402  # needs psycopg

_numbers = itertools.count()

# Tests of every database ask for a `place`; those that ask for a `path` are SQLite's own.
for _module in (
    test_admin_log,
    test_api_keys,
    test_api_servers,
    test_sealed_secret,
    test_shared_keys,
):
    for _name, _member in inspect.getmembers(_module):
        if _name.startswith("test_") and inspect.isfunction(_member):
            parameters = set(inspect.signature(_member).parameters)
            if parameters & {"place", "keys", "dated", "machines"} and "path" not in parameters:
                assert _name not in globals(), _name
                globals()[_name] = _member
keys, dated, wall = test_api_keys.keys, test_api_keys.dated, test_api_keys.wall
machines = test_shared_keys.machines


@pytest.fixture(scope="module")
def server():
    yield from running_postgres()


@pytest.fixture
def own_server():
    """One that the test may stop."""
    yield from running_postgres()


@pytest.fixture
def place(server):
    return server.create_database(f"database-{next(_numbers)}")


@pytest.mark.parametrize(
    "statement",
    ["UPDATE admin_log SET actor = 'x'", "DELETE FROM admin_log", "TRUNCATE admin_log"],
)
def test_no_entry_of_the_admin_log_is_changed_or_removed(place, statement):
    """The database itself refuses, also its owner."""
    log = AdminLog(place)
    log.record("cli:root", "key rotate", {})
    with psycopg.connect(place, options="-c search_path=kvmarket") as db:
        with pytest.raises(psycopg.IntegrityError, match="never"):
            db.execute(statement)
        db.rollback()
    assert len(log.entries(10)) == 1


def test_nobody_is_let_in_while_the_keys_cannot_be_read(own_server):
    """Once the server is back, everyone is, at once."""
    keys = Keys(own_server.create_database("keys"))
    secret, _ = keys.create("alice")
    assert keys.check(secret) is not None
    own_server.stop()
    keys._fresh_until_s = 0.0
    with pytest.raises(KeysUnavailableError):
        keys.check(secret)
    own_server.start()
    principal = keys.check(secret)
    assert principal is not None and principal.account == "alice"
    keys.close()


@pytest.mark.parametrize("way", ["reading", "snapshot", "transaction"])
def test_a_connection_that_broke_is_opened_again(place, way):
    """Before the first statement: an idle client learns of a server's restart only then."""
    room = Room("numbers", ["CREATE TABLE number (n INTEGER);"], KeysUnavailableError)
    database = open_database(place, room)
    statement = "SELECT ? WHERE 'a' LIKE '%a'"
    for number in range(3):
        with getattr(database, way)() as db:
            for n in (number, number + 1):
                assert db.execute(statement, (n,)).fetchall() == [(n,)]
        with psycopg.connect(place) as other:
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
    database.close()


def test_a_session_of_one_home_holds_on_another(config, tmp_path, monkeypatch):
    """With the key in the environment; without it each home has its own secret."""
    homes = [tmp_path / "first", tmp_path / "second"]
    for key in (bytes(32).hex(), None):
        if key:
            monkeypatch.setenv(KEY_VARIABLE, key)
        else:
            monkeypatch.delenv(KEY_VARIABLE)
        with Market.open(homes[0], config) as first, Market.open(homes[1], config) as second:
            token = first.credentials.sign("session", "alice")
            assert second.credentials.verifies("session", "alice", token) == bool(key)


def test_what_one_machine_signs_every_machine_verifies(config, tmp_path):
    """Receipts and bundles, until any machine revokes the key."""
    with (
        open_shop(tmp_path / "first", config) as first,
        Market.open(tmp_path / "second", config) as second,
    ):
        jws = signed_receipt(first, sell(first, "sale").id).jws
        (listing,) = first.catalogue.listings("live")
        bundle = bundles.export(first, listing.document_id, tmp_path / "bundle.kvb")
        kid = first.signing_keys.current().kid
        assert bundle.kid == kid
        for market in (first, second):
            assert verify(jws, market.signing_keys.public_keys()).kid == kid
            bundles.import_(market, bundle.path, bundles.trusted_keys(market))
        # The same sale, signed by the other machine in its own name.
        theirs = signed_receipt(second, "kvr_sale").jws
        assert theirs != jws
        assert verify(theirs, first.signing_keys.public_keys()).payload.payer == "alice"
        second.signing_keys.revoke(kid, "stolen")
        for market in (first, second):
            with pytest.raises(ProofError, match="revoked"):
                verify(jws, market.signing_keys.public_keys())
            with pytest.raises(BundleError, match="revoked"):
                bundles.import_(market, bundle.path, bundles.trusted_keys(market))
        again = signed_receipt(first, "kvr_sale").jws
        assert verify(again, second.signing_keys.public_keys()).kid != kid


# Roles


@pytest.fixture
def config(place, tmp_path):
    (tmp_path / "bucket").mkdir()
    return {"database_url": place, "object_store_url": (tmp_path / "bucket").as_uri()}


@pytest.fixture
def runtime(server, config):
    """The configuration of a role that `kvmarket database init` lets in."""
    role = f"engine{next(_numbers)}"
    with psycopg.connect(config["database_url"], autocommit=True) as db:
        db.execute(f"CREATE ROLE {role} LOGIN")
    words = ["database", "init", "--config", json.dumps(config), "--role", role]
    assert main(words) == 0
    assert main(words) == 0, "again, as after an update"
    return config | {"database_url": config["database_url"].replace("market@", f"{role}@")}


def test_engines_need_no_right_to_make_tables(runtime, tmp_path):
    """They publish, sell, count uses and delete what is left over, and keys are made."""
    with Market.open(tmp_path / "home", runtime) as market:
        first = store(market, 1, publisher="acme")
        market.catalogue.delist(store(market, 2).document_id)
        market.create_account("buyer")
        market.deposit("buyer", 1_000, "payment")
        pair = {"debit": "buyer", "credit": "provider", "code": "hold"}
        market.ledger.transact(pending(id="h", amount_nano=9, timeout_s=9, **pair))
        market.ledger.transact(post(id="p", pending_id="h", amount_nano=5))
        assert market.ledger.account("buyer").available_nano == 995
        assert len(market.ledger.transfers_after(0, 9)) == len(market.ledger.transfers())
        assert market.ledger.moved_before("buyer", 1e11) == 995
        release_leftovers(market)
        purge(market, [each.document_id for each in market.catalogue.listings("delisted")])
        assert market.catalogue.check_integrity() == []
        assert market.match(first.namespace, tokens(600, 1)) is not None
        keys = Keys(market.database)
        _, key_id = keys.create("buyer")
        keys.revoke(key_id)
        keys.close()
        AdminLog(market.database).record("cli:test", "account create", {})


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE kvmarket.more (x int)",
        "DROP TABLE kvmarket.listing",
        "ALTER TABLE kvmarket.listing ADD COLUMN x int",
        "TRUNCATE kvmarket.listing CASCADE",
        "DELETE FROM kvmarket.listing",
        "UPDATE kvmarket.transfer SET amount_nano = 0",
        "INSERT INTO kvmarket.transfer (sequence) VALUES (1)",
        "DELETE FROM kvmarket.receipt",
        "DELETE FROM kvmarket.account",
        "UPDATE kvmarket.account SET credits_posted = 9",
        "INSERT INTO kvmarket.account (id, credits_posted) VALUES ('x', 9)",
        "UPDATE kvmarket.balance_part SET credits_posted = 9",
        "INSERT INTO kvmarket.balance_part VALUES ('x', 0, 0, 0, 0, 9, 0)",
        "INSERT INTO kvmarket.log_leaf VALUES (1, 1)",
        "UPDATE kvmarket.log_leaf SET number = 1",
        "DELETE FROM kvmarket.log_leaf",
        "UPDATE kvmarket.numbering SET leaves = 0",
        "UPDATE kvmarket.period_sum SET moved_nano = 0",
        "DELETE FROM kvmarket.clock",
        "DELETE FROM kvmarket.api_key",
        "UPDATE kvmarket.admin_log SET actor = 'x'",
        "DELETE FROM kvmarket.revoked_key",
        "DELETE FROM kvmarket.signing_key",
        "UPDATE kvmarket.schema_version SET version = 0",
        "DROP SCHEMA kvmarket CASCADE",
    ],
)
def test_engines_may_not_change_tables_nor_what_is_final(runtime, statement):
    """Also somebody who takes an engine over cannot."""
    with (
        psycopg.connect(runtime["database_url"]) as db,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        db.execute(statement)


def test_a_database_without_tables_says_what_to_do(server, config, tmp_path):
    """To a role that cannot make them."""
    role = f"engine{next(_numbers)}"
    with psycopg.connect(config["database_url"], autocommit=True) as db:
        db.execute(f"CREATE ROLE {role} LOGIN")
    url = config["database_url"].replace("market@", f"{role}@")
    with pytest.raises(UnavailableError, match="kvmarket database init"):
        Keys(url)
    with pytest.raises(KVMarketError):
        Market.open(tmp_path / "home", config | {"database_url": url})


def test_init_says_what_is_missing(config, capsys):
    """A database_url, or the role."""
    assert main(["database", "init"]) == 2
    assert "database_url" in capsys.readouterr().err
    words = ["database", "init", "--config", json.dumps(config), "--role", "nobody-there"]
    assert main(words) == 2
    assert "make the role" in capsys.readouterr().err
