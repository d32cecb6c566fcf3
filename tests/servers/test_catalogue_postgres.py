"""The catalogue on a real PostgreSQL: what every storage does, and what is PostgreSQL's own."""

from __future__ import annotations

import inspect
import itertools
import signal
import statistics
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.catalogue_documents import (
    NAMESPACE,
    chunks_of,
    ended,
    heard,
    listing_of,
    matched,
    publish,
    start_process,
    store,
    tell,
    tokens,
)
from tests.support.catalogue_machine import CatalogueMachine
from tests.unit.catalogue import (
    test_chunk_shares,
    test_integrity,
    test_leftovers,
    test_processes,
    test_publishing,
    test_terms,
    test_uses,
)
from vllm_kvmarket import Market
from vllm_kvmarket.catalogue import Catalogue
from vllm_kvmarket.core.database import BusyError
from vllm_kvmarket.core.errors import CatalogueRefusedError, CatalogueUnavailableError, ConfigError

psycopg = pytest.importorskip("psycopg", reason="pip install vllm-kvmarket[postgres]")
from tests.support.postgres import running_postgres  # noqa: E402  # needs psycopg
from vllm_kvmarket.catalogue import publisher_lease  # noqa: E402  # the same

_numbers = itertools.count()
DOCUMENT = tokens(700)

# Tests of every storage ask for a `place`; those that ask for a `path` are SQLite's own.
for _module in (
    test_chunk_shares,
    test_integrity,
    test_leftovers,
    test_processes,
    test_publishing,
    test_terms,
    test_uses,
):
    for _name, _test in inspect.getmembers(_module, inspect.isfunction):
        _asked = set(inspect.signature(_test).parameters)
        if _name.startswith("test_") and _asked & {"place", "catalogue"} and "path" not in _asked:
            assert _name not in globals(), _name
            globals()[_name] = _test


@pytest.fixture(scope="module")
def server():
    yield from running_postgres()


@pytest.fixture
def own_server():
    """One that the test may stop."""
    yield from running_postgres()


@pytest.fixture
def place(server):
    return server.create_database(f"catalogue-{next(_numbers)}")


@pytest.fixture
def catalogue(place):
    with Catalogue.open(place) as catalogue:
        yield catalogue
        assert catalogue.check_integrity() == []
        assert catalogue.last_error is None


def wait_until(condition, at_most_s: float = 20.0) -> float:
    started_s = time.monotonic()
    while not condition():
        assert time.monotonic() < started_s + at_most_s
        time.sleep(0.002)
    return time.monotonic() - started_s


# Against a dictionary, beside SQLite


@pytest.fixture(scope="module", autouse=True)
def machine_url(server):
    BothStorages.url = server.create_database("machine")


class BothStorages(CatalogueMachine):
    """The same steps on SQLite and on PostgreSQL, with two machines on each."""

    url = ""

    def open_places(self) -> list[Path | str]:
        with psycopg.connect(BothStorages.url, autocommit=True) as db:
            db.execute("DROP SCHEMA IF EXISTS kvmarket CASCADE")
        self.folder = tempfile.TemporaryDirectory()
        return [Path(self.folder.name) / "market.sqlite", BothStorages.url]

    def teardown(self) -> None:
        super().teardown()
        self.folder.cleanup()


TestBothStorages = BothStorages.TestCase
TestBothStorages.settings = settings(max_examples=12, stateful_step_count=20, deadline=None)


# Several machines


def test_two_homes_on_one_database_sell_each_others_documents(server, place, tmp_path):
    """What one publishes the other matches and can load; prices and delistings follow, and the
    bucket has no directory.
    """
    config = {
        "database_url": place,
        "object_store_url": (tmp_path / "bucket").as_uri(),
    }
    (tmp_path / "bucket").mkdir()
    with (
        Market.open(tmp_path / "first", config) as first,
        Market.open(tmp_path / "second", config) as second,
    ):
        listing = store(first, 1, publisher="acme")
        request = [*tokens(600, 1), 5]
        second.catalogue.refresh()
        found = second.match(NAMESPACE, request)
        assert found is not None and found.listing == first.catalogue.get(listing.document_id)
        for chunk in found.chunks:
            second.store.verify(chunk.key)
        second.catalogue.set_price(listing.document_id, 7)
        first.catalogue.refresh()
        priced = first.match(NAMESPACE, request)
        assert priced is not None and priced.listing.terms.cache_read_nano_per_mtok == 7
        first.create_account("buyer")
        first.deposit("buyer", 1_000, "payment")
        assert second.ledger.account("buyer").available_nano == 1_000
        second.delist(listing.document_id)
        first.catalogue.refresh()
        assert first.match(NAMESPACE, request) is None
        assert not list((tmp_path / "bucket").glob("**/listings/*"))


def test_machines_with_a_database_must_share_their_chunks(place, tmp_path):
    """A listing of chunks on another machine's disk could not be loaded."""
    with pytest.raises(ConfigError, match="object_store_url"):
        Market.open(tmp_path, {"database_url": place})


def test_a_change_is_seen_at_once(place):
    """By NOTIFY: the machine that watches would look only once a minute."""
    with Catalogue.open(place) as writing, Catalogue.open(place) as watching:
        watching.watch(interval_s=60)
        time.sleep(0.5)
        took_s = []
        for seed in range(9):
            document = tokens(300, seed)
            publish(writing, document)
            took_s.append(wait_until(lambda document=document: matched(watching, document) == 300))
        assert statistics.median(took_s) < 1.0
        print(f"seen after {1000 * statistics.median(took_s):.1f} ms (median)")


def test_a_change_is_seen_without_notifications(place):
    """By looking, where the connection that listens has been ended."""
    with Catalogue.open(place) as writing, Catalogue.open(place) as watching:
        watching.watch(interval_s=0.1)
        time.sleep(0.5)
        with psycopg.connect(place, autocommit=True) as db:
            db.execute("DROP TRIGGER catalogue_changed ON kvmarket.catalogue")
        publish(writing, DOCUMENT)
        wait_until(lambda: matched(watching, DOCUMENT) == 700)


def test_closing_ends_all_threads_and_connections(place):
    """Also one that waits for changes, and one that renews a lease."""
    before = threading.active_count()
    watched = Catalogue.open(place)
    watched.begin(listing_of(DOCUMENT), chunks_of(DOCUMENT))
    watched.watch(interval_s=60)
    time.sleep(0.3)
    started_s = time.monotonic()
    watched.close()
    assert time.monotonic() - started_s < 5
    assert threading.active_count() == before
    with psycopg.connect(place) as db:
        statement = (
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

        def is_alone() -> bool:
            db.rollback()
            return db.execute(statement).fetchone() == (0,)

        wait_until(is_alone)


def test_who_does_not_want_to_wait_is_not_kept(place):
    """While another machine writes, a write that may be left for later is."""
    with Catalogue.open(place) as one, Catalogue.open(place) as other:
        with one._db.transaction(), pytest.raises(BusyError), other._db.transaction(wait=False):
            pass
        with other._db.transaction(wait=False) as db:
            assert db.execute("SELECT 1").fetchall() == [(1,)]


# Machines that die

DIE_WHILE_PUBLISHING = """
publisher_lease.RENEWED_EVERY_S = 0.1
catalogue = Catalogue.open(place)
catalogue.begin(listing_of(tokens(700)), chunks_of(tokens(700)))
print("begun", flush=True)
sys.stdin.readline()
os._exit(1)
"""


def test_what_a_dead_machine_was_publishing_is_given_up(place, monkeypatch):
    """Once its lease has ended by the server's clock, and not before."""
    process = start_process(
        "from vllm_kvmarket.catalogue import publisher_lease\n" + DIE_WHILE_PUBLISHING, place
    )
    assert heard(process) == "begun"
    monkeypatch.setattr(publisher_lease, "LEASE_S", 3.0)
    with Catalogue.open(place) as catalogue:
        assert catalogue.fail_abandoned() == []
        assert ended(process) == 1
        assert catalogue.fail_abandoned() == [], "it may only be away"
        wait_until(lambda: catalogue.fail_abandoned() != [])
        assert catalogue.get(listing_of(DOCUMENT).document_id).state == "failed"
        assert publish(catalogue, DOCUMENT).state == "live"


def test_a_process_that_cannot_renew_its_lease_deletes_nothing(place, monkeypatch):
    """Others may take it for dead, and store the chunk again meanwhile."""
    with Catalogue.open(place) as catalogue:
        catalogue.delist(publish(catalogue, DOCUMENT).document_id)
        monkeypatch.setattr(publisher_lease, "LEASE_S", 0.0)
        with pytest.raises(CatalogueUnavailableError, match="deleted the next time"):
            catalogue.leftovers.release(chunks_of(DOCUMENT).keys, pytest.fail)


DELETE_SLOWLY = """
with Catalogue.open(place) as catalogue:
    keys = chunks_of(tokens(700)).keys

    def delete(marked):
        print("deleting", flush=True)
        sys.stdin.readline()

    print(catalogue.leftovers.release(keys, delete), flush=True)
"""


def test_a_machine_that_stands_still_while_it_deletes_spoils_no_sale(place, monkeypatch):
    """Once it looks dead its chunks can be published; what it deletes later is known as lost."""
    with Catalogue.open(place) as catalogue:
        name = publish(catalogue, DOCUMENT).document_id
        catalogue.delist(name)
        process = start_process(DELETE_SLOWLY, place)
        assert heard(process) == "deleting"
        monkeypatch.setattr(publisher_lease, "LEASE_S", 2.0)
        process.send_signal(signal.SIGSTOP)
        assert publish(catalogue, DOCUMENT).state == "live"
        process.send_signal(signal.SIGCONT)
        tell(process)
        assert heard(process) == "3"
        assert ended(process) == 0
        assert catalogue.get(name).state == "damaged"
        catalogue.heal(*chunks_of(DOCUMENT).keys)
        assert catalogue.get(name).state == "live"


def test_a_process_that_stalls_inside_a_transaction_holds_nobody_up_for_long(place, monkeypatch):
    """The server rolls back what it began."""
    with Catalogue.open(place) as stalled, Catalogue.open(place) as other:
        publish(other, DOCUMENT)

        def stall() -> None:
            with stalled._db.transaction() as db:
                db.execute("SET idle_in_transaction_session_timeout = '300ms'")
                db.execute("UPDATE listing SET reason = 'half'")
                assert publish(other, tokens(300)).state == "live"
                db.execute("SELECT 1")

        with pytest.raises(CatalogueUnavailableError):
            stall()
        assert other.get(listing_of(DOCUMENT).document_id).reason == ""
        assert publish(stalled, tokens(400)).state == "live"


# The server is away


def test_without_its_database_a_catalogue_matches_what_it_knows(own_server, caplog):
    """Writes say what is wrong; once the server is back, everything goes on, unasked."""
    place = own_server.create_database("market")
    with Catalogue.open(place) as catalogue, Catalogue.open(place) as other:
        publish(catalogue, DOCUMENT)
        other.watch(interval_s=60)
        wait_until(lambda: matched(other, DOCUMENT) == 700)
        own_server.stop(signal.SIGQUIT)
        wait_until(lambda: other.last_error is not None)
        assert matched(other, DOCUMENT) == 700
        with pytest.raises(CatalogueUnavailableError, match="see whether PostgreSQL runs there"):
            catalogue.delist(listing_of(DOCUMENT).document_id)
        own_server.start()
        wait_until(lambda: other.last_error is None)
        catalogue.delist(listing_of(DOCUMENT).document_id)
        wait_until(lambda: matched(other, DOCUMENT) == 0)
        assert catalogue.check_integrity() == other.check_integrity() == []
    assert caplog.text.count("the catalogue is not up to date") >= 1


def test_a_server_that_was_restarted_is_used_at_once(own_server):
    """No call fails for a connection that broke while nobody used it."""
    with Catalogue.open(own_server.create_database("market")) as catalogue:
        publish(catalogue, DOCUMENT)
        own_server.stop()
        own_server.start()
        assert catalogue.get(listing_of(DOCUMENT).document_id).state == "live"
        catalogue.delist(listing_of(DOCUMENT).document_id)
        with pytest.raises(CatalogueRefusedError):
            catalogue.commit(listing_of(DOCUMENT).document_id, 1)
