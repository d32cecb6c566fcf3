"""Numbers, amounts and times as people read them."""

from __future__ import annotations

from datetime import UTC, datetime

from vllm_kvmarket.core.pricing import format_nano

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def count(number: int) -> str:
    """A whole number with its thousands apart."""
    return f"{number:,}"


def exactly(nano: int) -> str:
    """An amount to the nano-unit, in currency units."""
    whole, _, rest = format_nano(nano).partition(".")
    return f"{int(whole):,}.{rest}" if whole != "-0" else format_nano(nano)


def money(nano: int) -> str:
    """An amount in currency units, to four significant digits or more."""
    sign, size = "-" if nano < 0 else "", abs(nano)
    if size >= 1_000_000_000:
        return f"{sign}{size / 1e9:,.2f}"
    text = f"{size / 1e9:.9f}"
    digits = len(text.split(".")[1]) - len(text.split(".")[1].lstrip("0"))
    kept = text[: 2 + max(2, digits + 4)].rstrip("0")
    return sign + kept.ljust(4, "0")


def bytes_of(number: int | None) -> str:
    """A size, in powers of 1024."""
    if number is None:
        return "unlimited"
    size = float(number)
    for unit in _BYTE_UNITS:
        if size < 1024 or unit == _BYTE_UNITS[-1]:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def when(at_s: float) -> str:
    """A moment of the epoch, to the minute, UTC."""
    return _moment(at_s).strftime("%Y-%m-%d %H:%M UTC")


def day(at_s: float) -> str:
    """A day of the epoch, UTC."""
    return _moment(at_s).strftime("%Y-%m-%d")


def iso(at_s: float) -> str:
    """A moment as ISO 8601 has it."""
    return _moment(at_s).isoformat(timespec="seconds")


def seconds(duration_s: float | None) -> str:
    """A duration, to three significant digits."""
    if duration_s is None:
        return "-"
    if duration_s < 1:
        return f"{duration_s * 1000:.3g} ms"
    return f"{duration_s:.3g} s"


def share(part: float | None) -> str:
    """A share of one, in percent."""
    return "-" if part is None else f"{part * 100:.1f}%"


def _moment(at_s: float) -> datetime:
    return datetime.fromtimestamp(min(max(at_s, 0.0), 1e11), UTC)
