"""A number -> text for people, with its unit. What was not measured (None, NaN) is the empty text.

MB is 10^6 bytes. The minus sign is U+2212, so that columns line up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeGuard

_SIZES = (("B", 1.0, 0), ("kB", 1e3, 1), ("MB", 1e6, 1), ("GB", 1e9, 2), ("TB", 1e12, 2))
_SHORT = (("", 1.0, 0), (" k", 1e3, 1), (" M", 1e6, 1), (" B", 1e9, 2))


def known(value: Any) -> TypeGuard[float]:
    """Whether `value` is a number that was measured."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def size(value: Any) -> str:
    """105500000 -> '105.5 MB'."""
    return _scaled(value, _SIZES, " ")


def short(value: Any) -> str:
    """134515008 -> '134.5 M'."""
    return _scaled(value, _SHORT, "")


def count(value: Any) -> str:
    """134515008 -> '134,515,008'."""
    return _minus(f"{value:,.0f}") if known(value) else ""


def percent(value: Any, digits: int = 1, sign: bool = False) -> str:
    """0.036 -> '3.6 %'; with `sign` '+3.6 %'."""
    if not known(value):
        return ""
    text = f"{100 * value + 0.0:{'+' if sign else ''},.{digits}f}"
    if not text.strip("+-0."):
        text = text.lstrip("+-")
    return f"{_minus(text)} %"


def loss(value: Any) -> str:
    """1.84249 -> '1.842': nats a token."""
    return _minus(f"{value:,.3f}") if known(value) else ""


def number(value: Any, digits: int = 3) -> str:
    """`digits` significant digits, never an exponent down to 0.0001: '0.0396', '65.2', '1,024'."""
    if not known(value):
        return ""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if exponent < -4:
        return _minus(f"{value:.{digits - 1}e}")
    return _minus(f"{value:,.{max(0, digits - 1 - exponent)}f}")


def plainest(value: Any) -> str:
    """3.0 -> '3'; 2.5 -> '2.5': for settings rather than measurements."""
    return _minus(f"{value:,.4g}") if known(value) and abs(value) < 1e4 else count(value)


def ms(value: Any) -> str:
    """412.3 -> '412 ms'; 12400 -> '12.4 s'."""
    if not known(value):
        return ""
    return f"{number(value)} ms" if abs(value) < 999.5 else f"{number(value / 1000)} s"


def seconds(value: Any) -> str:
    """48 -> '48 s'; 750 -> '12 min 30 s'; 7500 -> '2 h 05 min'."""
    if not known(value):
        return ""
    if value < 59.5:
        return f"{number(value, 2)} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(whole / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def within(value: Any, low: Any, high: Any, show: Callable[[Any], str]) -> str:
    """'2.914 [2.802, 3.031]', or the value alone where its interval is not known."""
    return " ".join(filter(None, (show(value), ends(low, high, show)))) if known(value) else ""


def ends(low: Any, high: Any, show: Callable[[Any], str]) -> str:
    """'[2.802, 3.031]': an interval alone."""
    return f"[{show(low).removesuffix(' %')}, {show(high).removesuffix(' %')}]" if known(low) and known(high) else ""


def change(value: Any) -> str:
    """-0.31 -> '-31.0 %'."""
    return percent(value, sign=True)


def sample(rows: Any, tokens: Any) -> str:
    """The n of a quality figure: '60 rows (8,245 tokens)'."""
    parts = [f"{count(n)} {noun}{'' if n == 1 else 's'}" for n, noun in ((rows, "row"), (tokens, "token")) if known(n)]
    return aside(parts[0], parts[1]) if len(parts) == 2 else "".join(parts)


def aside(text: str, more: str) -> str:
    """'105.5 MB (predicted: 105.4 MB)'; without either part, the other alone."""
    return f"{text} ({more})" if text and more else text or more


def labelled(label: str, figure: str) -> str:
    """'predicted: 105.4 MB', or nothing where the figure is not known."""
    return figure and label + figure


def suffixed(figure: str, unit: str) -> str:
    """'65.3 tok/s', or nothing where the figure is not known."""
    return figure and f"{figure} {unit}"


def _scaled(value: Any, units: tuple[tuple[str, float, int], ...], gap: str) -> str:
    if not known(value):
        return ""
    for unit, scale, digits in units:
        if abs(round(value / scale, digits)) < 1000 or unit == units[-1][0]:
            return _minus(f"{value / scale:,.{digits}f}{gap}{unit}")
    return ""


def _minus(text: str) -> str:
    return text.replace("-", "\u2212", 1) if text.startswith("-") else text
