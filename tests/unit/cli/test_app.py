"""The command line: through main(argv), and as a user types it."""

import json
import subprocess
import sys

import pytest

from vllm_kvmarket import cli
from vllm_kvmarket.cli import output
from vllm_kvmarket.core.errors import KVMarketError
from vllm_kvmarket.market.market import DATABASE_FILE, Market


def test_help_imports_no_command():
    """`kvmarket --help` imports no vLLM, no torch, no table printer and no command's module."""
    code = (
        "import sys; from vllm_kvmarket.cli import main; code = main(['--help']); "
        "slow = {'vllm', 'torch', 'transformers', 'rich'} & set(sys.modules); "
        "ours = {name for name in sys.modules if name.startswith('vllm_kvmarket.cli.')}; "
        "slow |= ours - {f'vllm_kvmarket.cli.{name}' for name in ('app', 'command', 'output')}; "
        "print(slow, file=sys.stderr); sys.exit(code or bool(slow))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command.name.split()[0] in done.stdout for command in cli.commands())


def test_the_program_works_as_a_user_types_it(program, tmp_path):
    """The installed `kvmarket`: JSON on stdout, errors on stderr, and an exit code."""
    words = [program, "account", "create", "alice", "--home", tmp_path / "m", "--json"]
    good = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout)["id"] == "alice"
    bad = subprocess.run(
        [program, "document", "show", "kvd_0", "--home", tmp_path], capture_output=True, check=False
    )
    assert (bad.returncode, bad.stdout, bad.stderr.count(b"\n")) == (1, b"", 1)


def test_a_reader_that_stops_reading_is_no_error(program, tmp_path):
    """`kvmarket ... | head` ends without a traceback."""
    command = [program, "account", "create", "alice", "--home", tmp_path / "m"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 1)
    process.stderr.close()


def test_every_command_has_help_and_the_common_options(capsys):
    """Each command explains itself and takes --json, --home and --config."""
    for command in cli.commands():
        name = command.name
        assert cli.main([*name.split(), "--help"]) == 0
        shown = capsys.readouterr().out
        assert command.help in " ".join(shown.split())
        assert all(option in shown for option in ("--json", "--home", "--config")), name


def test_the_version_is_the_packages(capsys):
    """--version says which kvmarket this is."""
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("kvmarket 0.")


USAGE = [
    ([], "required: COMMAND"),
    (["nonsense"], "invalid choice: 'nonsense'"),
    (["account"], "see `kvmarket account --help`"),
    (["document", "list", "--state", "sold"], "invalid choice: 'sold'"),
    (["account", "create", "x", "--kind", "provider"], "invalid choice"),
    (["account", "deposit", "x", "1.0000000001"], "argument AMOUNT: expected an amount"),
    (["account", "deposit", "x", "1,5"], "argument AMOUNT: expected an amount"),
    (["document", "publish", "f"], "required: --model"),
    (
        ["document", "publish", "f", "--model", "m", "--royalty", "1.5"],
        "--royalty: expected a share",
    ),
    (["document", "publish", "f", "--model", "m", "--price", "-1"], "--price: expected"),
    (
        ["document", "publish", "a", "b", "--model", "m", "--title", "t"],
        "--title names one document",
    ),
    (["document", "publish", "-", "-", "--model", "m"], "standard input can be published once"),
    (["ledger", "show", "--limit", "0"], "--limit: expected a number above 0"),
    (["document", "list", "--config", '{"royalty": 1}'], "unknown configuration key 'royalty'"),
    (["document", "list", "--config", "/no/such.toml"], "cannot read the configuration"),
]


@pytest.mark.parametrize(("argv", "message"), USAGE, ids=lambda value: str(value)[:50])
def test_a_wrong_call_is_one_line_and_exit_code_2(run, argv, message):
    """The line says what is wrong; nothing goes to stdout."""
    done = run(*argv, code=2)
    assert done.out == ""
    assert done.err.count("\n") == 1
    assert done.err.startswith("kvmarket: ")
    assert message in done.err


@pytest.mark.parametrize(
    "argv",
    [
        ["document", "list"],
        ["document", "show", "x"],
        ["document", "delist", "x"],
        ["ledger", "show"],
        ["receipt", "list"],
        ["store", "check"],
    ],
)
def test_a_mistyped_home_is_no_empty_market(run, home, argv):
    """Commands that only look make no market where there is none, and say so."""
    done = run(*argv, code=1)
    assert done.err.startswith(f"kvmarket: there is no market at {home};")
    assert not home.exists()


def test_a_database_that_is_none_is_one_line(run, home):
    """A file that SQLite cannot read is named."""
    home.mkdir()
    (home / DATABASE_FILE).write_bytes(b"not a database" * 100)
    done = run("document", "list", code=1)
    assert str(home / DATABASE_FILE) in done.err
    assert done.err.count("\n") == 1


def test_the_configuration_names_the_home_too(run_json, tmp_path):
    """--config's home is used, and --home goes before it."""
    config = json.dumps({"home": str(tmp_path / "configured")})
    run_json("account", "create", "a", "--config", config)
    run_json("account", "create", "b", "--config", config, "--home", tmp_path / "named")
    for folder in ("configured", "named"):
        assert (tmp_path / folder / DATABASE_FILE).exists()


def test_an_interrupt_is_one_line(run, monkeypatch):
    """Ctrl-C ends a command with the shell's usual exit code."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Market, "open", interrupt)
    assert run("account", "create", "a", code=130).err == "kvmarket: interrupted\n"


def test_a_message_of_several_lines_becomes_one(monkeypatch, run):
    """For any error, stderr gets one line without control characters for a terminal."""

    def fail(*_):
        raise KVMarketError("first\n  second\x1b[31m")

    monkeypatch.setattr(Market, "open", fail)
    assert run("account", "create", "a", code=1).err == "kvmarket: first second\ufffd[31m\n"


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (556_498_944, "556.5 MB"),
        (10**15, "1000.0 TB"),
    ],
)
def test_sizes_are_readable(size, shown):
    """Bytes are shown in the unit that keeps them short."""
    assert output.size(size) == shown


def test_every_command_is_listed_once():
    """commands() has each command once, in the order of the help."""
    names = [command.name for command in cli.commands()]
    assert len(names) == len(set(names))
    assert names[:2] == ["document publish", "document list"]
    assert {"account create", "ledger show", "store check", "env", "demo"} <= set(names)
