"""The parser over all commands, and the exit codes of their errors."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import NoReturn

from vllm_kvmarket.cli.command import Command, UsageError
from vllm_kvmarket.cli.output import complain
from vllm_kvmarket.core.errors import ConfigError, KVMarketError

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
# The first word of a command, the module with its commands, and a line for `kvmarket --help`. A
# module is imported when its word is used, so that `kvmarket --help` is quick.
NOUNS = (
    ("document", "document_commands", "publish documents and manage what is on offer"),
    ("bundle", "archive_commands", "move documents between markets as signed files"),
    ("account", "ledger_commands", "open accounts and move money in and out"),
    ("ledger", "ledger_commands", "look at the money and check that it adds up"),
    ("receipt", "proof_commands", "show receipts and check signed ones"),
    ("log", "proof_commands", "prove what the ledger's transparency log holds"),
    ("apikey", "key_commands", "let clients in over HTTP"),
    ("key", "key_commands", "the key that this market signs with"),
    ("trust", "key_commands", "whose bundles this market imports"),
    ("store", "store_commands", "check, clean and repair the stored chunks"),
    ("database", "database_commands", "prepare PostgreSQL for a market on several machines"),
    ("backup", "archive_commands", "copy a whole market and bring it back"),
    ("env", "environment", "show versions and paths, and what is wrong with them"),
    ("demo", "demo", "publish, reuse and charge for a real document, end to end"),
)


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        complain(f"{message}; see `{self.prog} --help`")
        self.exit(USAGE)


class _Version(argparse.Action):
    """Reads the version only when it is asked for: package metadata takes a while to read."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"kvmarket {version('vllm-kvmarket')}")
        parser.exit()


def commands_of(noun: str) -> Iterator[Command]:
    """Import a noun's module and go through its commands."""
    (module,) = [module for name, module, _ in NOUNS if name == noun]
    for found in vars(import_module(f"vllm_kvmarket.cli.{module}")).values():
        if isinstance(found, Command) and found.name.partition(" ")[0] == noun:
            yield found


def commands() -> list[Command]:
    """List every command, in the order of `kvmarket --help`; imports all their modules."""
    return [command for noun, _, _ in NOUNS for command in commands_of(noun)]


def build_parser(noun: str | None) -> argparse.ArgumentParser:
    """Build the parser with all nouns, and with the commands of `noun`.

    A parsed command has its Command in `args.command`.
    """
    parser = _Parser(
        prog="kvmarket",
        description="A market for KV caches inside vLLM: publish documents, sell their reuse.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    nouns = _subcommands(parser)
    for name, _, text in NOUNS:
        room = nouns.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name == noun:
            _add_commands(room, noun)
    return parser


def _add_commands(parser: argparse.ArgumentParser, noun: str) -> None:
    verbs = None
    for command in commands_of(noun):
        leaf = parser
        if command.name != noun:
            verbs = verbs or _subcommands(parser)
            leaf = verbs.add_parser(
                command.name.partition(" ")[2],
                help=command.help,
                description=command.help,
                allow_abbrev=False,
            )
        for each in command.arguments:
            if each.choices:
                group = leaf.add_mutually_exclusive_group(**each.settings)
                for choice in each.choices:
                    group.add_argument(*choice.names, **choice.settings)
            else:
                leaf.add_argument(*each.names, **each.settings)
        common = leaf.add_argument_group("on every command")
        common.add_argument("--json", action="store_true", help="print one JSON document")
        common.add_argument("--home", help="folder of the market (default: the configuration's)")
        common.add_argument(
            "--config", help="a JSON object, or the path of a .json or .toml file with one"
        )
        leaf.set_defaults(command=command)


def _subcommands(
    parser: argparse.ArgumentParser,
) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    return parser.add_subparsers(metavar="COMMAND", required=True, title="commands")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0 when it worked, 1 when it failed, 2 for a wrong call."""
    words = sys.argv[1:] if argv is None else argv
    try:
        noun = next((word for word in words if not word.startswith("-")), None)
        args = build_parser(noun).parse_args(words)
    except SystemExit as stop:
        # argparse has printed the help or the error.
        return int(stop.code or OK)
    try:
        code: int = args.command.run(args) or OK
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output stopped early; the interpreter must not complain when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    except (UsageError, ConfigError) as error:
        complain(error)
        code = USAGE
    except (KVMarketError, OSError) as error:
        complain(error)
        code = FAILED
    except KeyboardInterrupt:
        complain("interrupted")
        code = INTERRUPTED
    return code
