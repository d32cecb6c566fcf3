"""The parts of every command: its name, its options, and the market that it opens."""

from __future__ import annotations

import argparse
import getpass
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_kvmarket.core.errors import KVMarketError, NotFoundError

if TYPE_CHECKING:
    from vllm_kvmarket.market.market import Market

DEFAULT_LIMIT = 20
_COUNT = re.compile(r"([0-9]{1,15})([kKMG]?)")
_SUFFIXES = {"": 1, "k": 1_000, "K": 1_000, "M": 1_000_000, "G": 1_000_000_000}
_SPAN = re.compile(r"([0-9]{1,9})([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class UsageError(Exception):
    """Options that do not go together; the command ends with exit code 2."""


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument or option, as argparse takes it; with `choices`, at most one of these instead."""

    names: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    choices: tuple[Argument, ...] = ()


def argument(*names: str, **settings: Any) -> Argument:
    """Describe an argument, with the parameters of argparse's `add_argument`."""
    return Argument(names, settings)


def one_of(*choices: Argument, required: bool = False) -> Argument:
    """Options of which a call may have one; if `required`, it must."""
    return Argument(settings={"required": required}, choices=choices)


@dataclass(frozen=True, slots=True)
class Command:
    """One command: its name ("noun verb", or one word), and `run`, which returns the exit code."""

    name: str
    help: str
    run: Callable[[argparse.Namespace], int | None]
    arguments: tuple[Argument, ...] = ()
    # A change is recorded in the market's admin log before it is made.
    changes: bool = False


def command(
    *arguments: Argument, changes: bool = False
) -> Callable[[Callable[[argparse.Namespace], int | None]], Command]:
    """Make a function a command: its name and its docstring are the command's name and help.

    `key_rotate_operator` becomes `key rotate-operator`. It returns the exit code; None is 0.
    """

    def made(run: Callable[[argparse.Namespace], int | None]) -> Command:
        noun, _, verb = run.__name__.partition("_")
        text = " ".join((run.__doc__ or "").split()).removesuffix(".")
        name = f"{noun} {verb.replace('_', '-')}".strip()
        return Command(name, text[:1].lower() + text[1:], run, arguments, changes)

    return made


def home_of(args: argparse.Namespace) -> Path:
    """The folder that --home and --config name; it may hold no market."""
    from vllm_kvmarket.core import config

    return Path(args.home or config.load(args.config).home).expanduser()


@contextmanager
def open_market(args: argparse.Namespace, *, create: bool = False) -> Iterator[Market]:
    """Open the market that --home and --config name; with `create`, make one where there is none.

    Raises NotFoundError where there is none, so that a mistyped home is not an empty market, and
    KVMarketError when its database cannot be read or written.
    """
    import apsw

    from vllm_kvmarket.core import config
    from vllm_kvmarket.market.market import DATABASE_FILE, Market

    home, chosen = home_of(args), config.load(args.config)
    if not (create or chosen.database_url or (home / DATABASE_FILE).exists()):
        raise NotFoundError(
            f"there is no market at {home}; publish a document or create an account to start one, "
            "or name another with --home"
        )
    try:
        with Market.open(home, chosen) as market:
            if args.command.changes:
                _record(args, market)
            yield market
    except apsw.Error as error:
        raise KVMarketError(
            f"the market's database in {home}: {error}; look at it with `kvmarket store check`"
        ) from error


def _record(args: argparse.Namespace, market: Market) -> None:
    from vllm_kvmarket.auth.admin_log import AdminLog

    # The configuration may hold the secrets of an object store.
    left_out = {"command", "config", "home", "json"}
    given = {
        name: value if isinstance(value, int | float) else str(value)
        for name, value in vars(args).items()
        if name not in left_out and value not in (None, False, [], "")
    }
    AdminLog(market.database).record(f"cli:{getpass.getuser()}", args.command.name, given)


DOCUMENT_ID = argument("document_id", metavar="ID", help="the document's id, kvd_...")


def engine_options(*, model_required: bool = True) -> tuple[Argument, ...]:
    """The options that an engine is started with."""
    return (
        argument("--model", required=model_required, help="model folder or hub name, as for vLLM"),
        argument("--max-model-len", type=count, help="context of the engine, in tokens"),
        argument(
            "--dtype", help="number format of the engine, as for vLLM (float32 suits most CPUs)"
        ),
    )


def limit(things: str) -> Argument:
    """The option that bounds a list."""
    text = f"how many {things} to show, newest first (default: {DEFAULT_LIMIT})"
    return argument("--limit", type=count, default=DEFAULT_LIMIT, help=text)


def amount(text: str) -> int:
    """Read an option's amount in currency units as nano-units."""
    from vllm_kvmarket.core.pricing import parse_nano

    return _option(parse_nano, text)


def share(text: str) -> int:
    """Read an option's share from 0 to 1 as parts per million."""
    from vllm_kvmarket.core.pricing import parse_ppm

    return _option(parse_ppm, text)


def _option(parse: Callable[[str], int], text: str) -> int:
    try:
        return parse(text)
    except ValueError as error:
        # argparse shows the message of this exception only.
        raise argparse.ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    """Read an option's positive number: 3774, 4k, 80M."""
    match = _COUNT.fullmatch(text)
    number = int(match.group(1)) * _SUFFIXES[match.group(2)] if match else 0
    if number < 1:
        raise argparse.ArgumentTypeError(
            f"expected a number above 0 like 3774 or 80M, not {text!r}"
        )
    return number


def span_s(text: str) -> float:
    """Read an option's span of time, in seconds: 90s, 15m, 12h, 7d, 4w."""
    match = _SPAN.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"expected a span like 90s, 15m, 12h, 7d or 4w, not {text!r}"
        )
    return timedelta(**{_UNITS[match.group(2)]: int(match.group(1))}).total_seconds()


def time_s(text: str) -> float:
    """Read an option's time: a day, which begins at midnight UTC, or a moment of ISO 8601."""
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a day like 2026-11-01 or a time like 2026-11-01T12:00:00Z, not {text!r}"
        ) from None
    return (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()
