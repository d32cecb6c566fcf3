"""The parser over all commands, and what becomes of their errors."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from vllm_kvmarket.cli import (
    accounts,
    apikeys,
    audit,
    books,
    bundles,
    codecs,
    documents,
    economics,
    environment,
    fsck,
    keep,
    proofs,
    publish,
    statements,
)
from vllm_kvmarket.cli.command import Command, UsageError, count
from vllm_kvmarket.cli.output import complain
from vllm_kvmarket.core.errors import ConfigError, KVMarketError

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def _configure_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="model folder or hub name (default: the demo's own)")
    parser.add_argument("--output", help="folder for result.json (default: .demo)")
    parser.add_argument("--max-model-len", type=count, help="context of the engine, in tokens")


def _run_demo(args: argparse.Namespace) -> int:
    from vllm_kvmarket.cli.demo import run

    return run(args)


DEMO = Command(
    "demo", "publish, reuse and charge for a real document, end to end", _run_demo, _configure_demo
)
COMMANDS: tuple[Command, ...] = (
    *publish.COMMANDS,
    *documents.COMMANDS,
    *audit.COMMANDS,
    *bundles.COMMANDS,
    *accounts.COMMANDS,
    *apikeys.COMMANDS,
    *books.COMMANDS,
    *proofs.COMMANDS,
    *statements.COMMANDS,
    *fsck.COMMANDS,
    *keep.COMMANDS,
    *codecs.COMMANDS,
    *economics.COMMANDS,
    *environment.COMMANDS,
    DEMO,
)
GROUPS = {
    "account": "open accounts and bring money in",
    **bundles.GROUPS,
    **proofs.GROUPS,
    **apikeys.GROUPS,
}


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        complain(f"{message}; see `{self.prog} --help`")
        self.exit(USAGE)


class _Version(argparse.Action):
    """Looks the version up when it is asked for; package metadata takes a while to read."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"kvmarket {version('vllm-kvmarket')}")
        parser.exit()


def commands() -> list[tuple[str, str]]:
    """List every command with its one-line help, in the order of `kvmarket --help`."""
    return [(command.name, command.help) for command in COMMANDS]


def build_parser() -> argparse.ArgumentParser:
    """Build the parser; a parsed command has its Command in `args.command`."""
    parser = _Parser(
        prog="kvmarket",
        description="A market for KV caches inside vLLM: publish documents, sell their reuse.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    rooms = {"": _subcommands(parser)}
    for command in COMMANDS:
        group, _, name = command.name.rpartition(" ")
        if group not in rooms:
            parent = rooms[""].add_parser(
                group, help=GROUPS[group], description=GROUPS[group], allow_abbrev=False
            )
            rooms[group] = _subcommands(parent)
        leaf = rooms[group].add_parser(
            name, help=command.help, description=command.help, allow_abbrev=False
        )
        if command.configure:
            command.configure(leaf)
        _add_common(leaf)
        leaf.set_defaults(command=command)
    return parser


def _subcommands(
    parser: argparse.ArgumentParser,
) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    return parser.add_subparsers(metavar="COMMAND", required=True, title="commands")


def _add_common(parser: argparse.ArgumentParser) -> None:
    common = parser.add_argument_group("on every command")
    common.add_argument("--json", action="store_true", help="print one JSON document")
    common.add_argument("--home", help="folder of the market (default: the configuration's home)")
    common.add_argument(
        "--config", help="a JSON object, or the path of a .json or .toml file (see README)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it worked, 1 when it failed, 2 when it was asked for wrongly."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:
        # argparse has printed what there is to say.
        return int(stop.code or OK)
    try:
        code = int(args.command.run(args))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has enough; the interpreter must not complain on its way out.
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
