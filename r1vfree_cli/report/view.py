"""What both templates print: tables of cells, and how numbers are written."""

from dataclasses import dataclass, field
from typing import Any

from .load import number


@dataclass(frozen=True)
class Cell:
    """One cell: text, a smaller second line, and whether it is the best of its column."""

    text: str
    sub: str = ""
    best: bool = False


@dataclass
class Table:
    """A table with a caption. The first cell of a row is its header; `quiet` are indices of rows set back: baselines."""

    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""
    quiet: list[int] = field(default_factory=list)


NONE = "n/a"


def percent(value: float | None, digits: int = 1) -> str:
    """A value that is in percent already."""
    return NONE if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 1) -> str:
    """With its sign; a true minus."""
    if value is None:
        return NONE
    text = f"{abs(value):.{digits}f}"
    return ("±" if float(text) == 0 else "+" if value > 0 else "−") + text


def p_value(value: float | None) -> str:
    """`p = 0.012`, never `p = 0`: the swap test has as many draws as it has."""
    return "" if value is None else "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def plain(value: Any) -> str:
    """Any value, short: 4 significant digits, thousands apart, lists with commas."""
    if value is None or value == "":
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        found = number(value)
        if found is None:
            return NONE
        return f"{found:,.0f}" if found == int(found) and abs(found) < 1e15 else f"{found:.4g}"
    if isinstance(value, dict):
        value = [f"{k}: {plain(v)}" for k, v in value.items()]
    return (", ".join(map(plain, value)) or NONE) if isinstance(value, list | tuple) else str(value)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def flatten(document: dict, prefix: str = "") -> list[tuple[str, str]]:
    """Nested dicts as `a.b` -> value, in order; an empty one is left out."""
    rows: list[tuple[str, str]] = []
    for key, value in document.items():
        if isinstance(value, dict):
            rows += flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
            rows += flatten(dict(enumerate(value)), f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", str(value) if type(value) is int else plain(value)))
    return rows
