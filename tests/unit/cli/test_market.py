"""The commands on documents and money."""

import pytest

from vllm_kvmarket.core.pricing import NANO
from vllm_kvmarket.market.market import Market


def test_list_and_show_tell_prices_and_sales(run, run_json, sold):
    """A listing's terms, the charge for one reuse, and what was sold so far."""
    (listed,) = run_json("document", "list")["documents"]
    shown = run_json("document", "show", sold.document_id)
    assert {key: shown[key] for key in listed} == listed
    assert (listed["title"], listed["state"], listed["token_count"]) == ("The Licence", "live", 600)
    assert (listed["charge_nano"], listed["recompute_nano"]) == (300_000, 3_000_000)
    assert shown["terms"]["cache_read_nano_per_mtok"] == 500_000_000
    assert len(shown["chunk_keys"]) == shown["chunk_count"] == 3
    assert shown["sales"] == {
        "reuses": 1,
        "tokens_reused": 600,
        "charge_nano": 300_000,
        "royalty_nano": 150_000,
    }
    assert sold.document_id in run("document", "list").out
    assert "0.0003; computing it 0.003" in run("document", "show", sold.document_id).out


def test_list_filters_by_state_and_text(run, run_json, sold):
    """--state and --search narrow the list; a list of nothing says what to do."""
    assert (
        len(run_json("document", "list", "--search", "licence", "--state", "live")["documents"])
        == 1
    )
    assert run_json("document", "list", "--search", "nothing like it") == {"documents": []}
    assert (
        "publish one with `kvmarket document publish`"
        in run("document", "list", "--state", "failed").out
    )


def test_delisting_takes_a_document_off_the_market(run, run_json, sold):
    """A delisted document is no longer live; delisting it again is an error."""
    assert run_json("document", "delist", sold.document_id)["state"] == "delisted"
    assert run_json("document", "list", "--state", "live") == {"documents": []}
    assert "delisted" in run("document", "delist", sold.document_id, code=1).err
    assert "no document kvd_nothing" in run("document", "delist", "kvd_nothing", code=1).err


def test_purging_removes_the_tokens_of_a_delisted_document(run, run_json, sold):
    """By name, or by how long ago it left; what is on offer is refused."""
    assert "delist it first" in run("document", "purge", sold.document_id, code=1).err
    assert "give --older-than" in run("document", "purge", code=2).err
    run("document", "delist", sold.document_id)
    assert run_json("document", "purge", "--older-than", "1d")["purged"] == 0
    assert run_json("document", "purge", "--older-than", "0s")["purged"] == 1
    assert run_json("document", "purge", sold.document_id)["purged"] == 0
    assert run_json("document", "show", sold.document_id)["token_count"] == sold.token_count
    assert run_json("store", "check")["ok"]


def test_a_title_cannot_command_the_terminal(run, home, list_document):
    """Escape sequences and markup in a publisher's title are shown, not obeyed."""
    with Market.open(home) as market:
        list_document(market, list(range(20)), title="\x1b[2Jbold [red]move[/red]")
    assert "\ufffd[2Jbold [red]move[/red]" in run("document", "list").out


def test_accounts_are_created_funded_and_listed(run, run_json):
    """Amounts are given in currency units and kept exactly."""
    assert run_json("account", "create", "alice")["kind"] == "buyer"
    assert run_json("account", "create", "press", "--kind", "publisher")["kind"] == "publisher"
    done = run_json("account", "deposit", "alice", "12.000000001")
    assert done["transfer"]["amount_nano"] == 12_000_000_001
    assert done["account"]["available_nano"] == 12_000_000_001
    accounts = {account["id"]: account for account in run_json("account", "list")["accounts"]}
    assert set(accounts) == {"alice", "press", "provider", "suspense", "world"}
    assert accounts["world"]["balance_nano"] == -12_000_000_001
    assert "12.000000001" in run("account", "list").out


def test_a_deposit_under_the_same_id_happens_once(run, run_json):
    """Repeating a deposit under its id changes nothing; another amount under it is refused."""
    run("account", "create", "alice")
    words = ["account", "deposit", "alice", "5", "--id", "invoice-7"]
    assert run_json(*words) == run_json(*words)
    done = run("account", "deposit", "alice", "6", "--id", "invoice-7", code=1)
    assert "invoice-7" in done.err
    assert run_json("account", "deposit", "alice", "1")["account"]["balance_nano"] == 6 * NANO


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["account", "create", "not an id"], "not an id"),
        (["account", "create", "press"], "press"),
        (["account", "deposit", "nobody", "5"], "nobody"),
        (["account", "deposit", "press", "0"], "above 0"),
        (["ledger", "show", "--account", "nobody"], "nobody"),
        (["receipt", "list", "--account", "nobody"], "nobody"),
    ],
)
def test_what_the_ledger_refuses_is_one_line_that_names_it(run, argv, message):
    """A refused operation ends with exit code 1 and changes nothing."""
    run("account", "create", "press", "--kind", "publisher")
    before = run("ledger", "show", "--json").out
    done = run(*argv, code=1)
    assert message in done.err
    assert done.err.count("\n") == 1
    assert run("ledger", "show", "--json").out == before


def test_the_ledger_shows_transfers_and_its_balance(run, run_json, sold):
    """Deposit, reservation, charge and royalty, newest first; debits equal credits."""
    books = run_json("ledger", "show")
    assert [transfer["kind"] for transfer in books["transfers"]] == [
        "plain",
        "post",
        "pending",
        "plain",
    ]
    assert books["balanced"]
    assert books["debits_nano"] == books["credits_nano"] == NANO + 300_000 + 150_000
    balances = {account["id"]: account["balance_nano"] for account in books["accounts"]}
    assert balances == {
        "alice": NANO - 300_000,
        "provider": 150_000,
        "publisher": 150_000,
        "suspense": 0,
        "world": -NANO,
    }
    assert len(run_json("ledger", "show", "--limit", "2")["transfers"]) == 2
    mine = run_json("ledger", "show", "--account", "publisher")["transfers"]
    assert [transfer["code"] for transfer in mine] == ["royalty"]
    assert "debits 1.00045 = credits 1.00045" in run("ledger", "show").out


def test_receipts_say_what_was_reused_and_charged(run, run_json, sold):
    """One receipt for alice's reuse, none for the publisher."""
    (receipt,) = run_json("receipt", "list")["receipts"]
    assert (receipt["account"], receipt["tokens_reused"]) == ("alice", 600)
    assert (receipt["charge_nano"], receipt["recompute_nano"]) == (300_000, 3_000_000)
    assert receipt["document_id"] == sold.document_id
    assert run_json("receipt", "list", "--account", "alice")["receipts"] == [receipt]
    assert "0.0027" in run("receipt", "list").out
    assert "no receipts yet" in run("receipt", "list", "--account", "publisher").out
