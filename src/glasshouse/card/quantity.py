"""How measured values are written: units, prefixes, rounding. Knows nothing of what was measured."""

import math
from typing import Any

NOT_MEASURED = "not measured"
LONGEST = 500
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


def number_of(value: Any) -> float | None:
    """The value where it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def count(value: Any) -> str:
    """A whole number with separators."""
    number = number_of(value)
    return NOT_MEASURED if number is None else f"{number:,.0f}"


def decimal(value: Any, digits: int = 3, unit: str = "") -> str:
    """A number with a fixed number of decimals."""
    number = number_of(value)
    return NOT_MEASURED if number is None else f"{number:,.{digits}f}{unit}"


def share(part: Any, whole: Any) -> str:
    """A part as a percentage."""
    part, whole = number_of(part), number_of(whole)
    if part is None or not whole:
        return NOT_MEASURED
    return "< 0.1 %" if 0 < part / whole < 0.0005 else f"{100 * part / whole:.1f} %"


def scaled(value: Any, unit: str) -> str:
    """Three digits and a prefix: 405 MB, 51.8 GFLOP."""
    number = number_of(value)
    if number is None:
        return NOT_MEASURED
    power = next(
        (power for power in range(len(PREFIXES)) if abs(number) < 999.5 * 1000**power), len(PREFIXES) - 1
    )
    small = number / 1000**power
    digits = 0 if abs(small) >= 99.95 or power == 0 else 1 if abs(small) >= 9.995 else 2
    return f"{small:,.{digits}f} {PREFIXES[power]}{unit}"


def duration(seconds: Any) -> str:
    """Seconds as a person writes them."""
    number = number_of(seconds)
    if number is None:
        return NOT_MEASURED
    if number < 120:
        return f"{number:.1f} s"
    whole = round(number)
    minutes = f"{whole // 60} min {whole % 60} s"
    return minutes if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def energy(joules: Any) -> str:
    """Joules as watt-hours."""
    number = number_of(joules)
    return (
        NOT_MEASURED
        if number is None
        else scaled(number / 3600, "Wh")
        if number >= 3600e3
        else f"{number / 3600:.3g} Wh"
    )


def ratio(found: Any, guess: Any) -> str:
    """What was found, in units of what was predicted."""
    found, guess = number_of(found), number_of(guess)
    return NOT_MEASURED if found is None or not guess else f"{found / guess:.2f}"


def short(value: Any) -> str:
    """Any value in a few words; of what is inside tables and lists only the first level, of long text the beginning."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_shortest(item)}" for name, item in list(value.items())[:20]) or "none"
    if isinstance(value, list):
        listed = len(value) <= 8 and not any(isinstance(item, dict | list) for item in value)
        return ", ".join(_shortest(item) for item in value) if listed else f"{len(value)} values"
    return _shortest(value)


def _shortest(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, dict | list):
        return f"{len(value)} values"
    if isinstance(value, bool | str):
        text = str(value)
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
