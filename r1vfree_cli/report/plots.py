"""Pictures with matplotlib: each is drawn once and saved as SVG (for HTML, text in the page's colour) and PNG.

Colours are of middle lightness and PNGs are transparent, so both stand on a light and on a dark page. Lines differ
in dash and dots in shape as well as in colour, for readers who do not tell the colours apart.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain
from typing import Any, Literal

MARK = "r1v report"  # written into every file of a report; how a later report knows its own
SMOOTH_FROM = 20  # logged steps
_INK = "#7d848c"  # contrast above 3.7:1 on white and on #0d1117
_COLOURS = ("#3f84e5", "#e0792b", "#2a9d74", "#a06bd6", "#d6506a", "#8a8d1f")
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1.5)), (0, (8, 3)))
_MARKERS = ("o", "s", "D", "^", "v", "P")


@dataclass(frozen=True)
class Figure:
    """A finished picture. `svg` is one <svg> element to stand inside HTML; `alt` says what it shows."""

    name: str
    svg: str
    png: bytes
    alt: str


@dataclass(frozen=True)
class Series:
    """One line: x and y of equal length; a missing y (None) is a gap. Or, in `dots`, one y a row."""

    label: str
    x: list[float]
    y: list[float | None]
    bounds: list[tuple[float, float] | None] | None = None  # an interval a point
    style: int = 0  # of `curve`: which colour and dash; a run has the same in every picture


def curve(name: str, title: str, unit: str, series: list[Series], *, legend: bool, share: bool = False) -> Figure:
    """A metric over training steps, one line a run; from `SMOOTH_FROM` steps on a running mean before the raw line. A
    share's axis is 0 to 1; other axes span at least a tenth of the values, so that noise does not look like a trend."""
    figure, axes = _axes(3.9, 2.5, title, "step", grid="y")
    for s in series:
        i = s.style
        y = _gaps(s.y)
        style: dict[str, Any] = {"color": _COLOURS[i % 6], "linestyle": _DASHES[i % 6], "linewidth": 1.8}
        if s.bounds and (ends := [(x, *b) for x, b in zip(s.x, s.bounds) if b]):
            axes.fill_between(*zip(*ends), color=_COLOURS[i % 6], alpha=0.15, linewidth=0)
        if len(y) >= SMOOTH_FROM:
            axes.plot(s.x, y, color=_COLOURS[i % 6], linewidth=0.8, alpha=0.35)
            axes.plot(s.x, _running_mean(s.y, max(len(y) // 25, 5)), label=s.label, **style)
        else:
            axes.plot(s.x, y, label=s.label, marker=_MARKERS[i % 6] if len(y) < 15 else None, markersize=4, **style)
    axes.set_ylabel(unit, fontsize=9.5, color=_INK)
    if share:
        axes.set_ylim(-0.03, 1.03)
    elif values := [v for s in series for v in [*s.y, *chain(*filter(None, s.bounds or []))] if v is not None]:
        low, high = min(values), max(values)
        room = max(0.1 * max(abs(low), abs(high)) - (high - low), 0) / 2 + 0.05 * (high - low)
        axes.set_ylim(low - (room or 0.5), high + (room or 0.5))
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    if legend:
        axes.legend(loc="best", fontsize=8.5, frameon=False, labelcolor=_INK)
    parts = []
    for s in series:
        if known := [f"{v:.4g} at step {x:g}" for x, v in zip(s.x, s.y) if v is not None]:
            parts.append(f"{s.label}: {known[0]}, {known[-1]}")
    return _save(figure, name, f"{title} over training steps. " + "; ".join(parts) + ".")


def dots(name: str, title: str, rows: list[str], series: list[Series], marks: Sequence[Series] = ()) -> Figure:
    """Percentages side by side: a row each, one dot a series in each row; `marks` are thin ticks (baselines)."""
    legend_rows = (len(series) + len(marks) + 1) // 2
    figure, axes = _axes(4.8, 0.3 * len(rows) + 0.2 * legend_rows + 0.85, title, "%", grid="x")
    for j, s in enumerate(marks):
        marker, size = ("|", 70) if j % 2 == 0 else ("x", 28)
        axes.scatter(_gaps(s.y), range(len(rows)), marker=marker, s=size, color=_INK, linewidths=1.3, label=s.label)
    for j, s in enumerate(series):
        offset = (j - (len(series) - 1) / 2) * min(0.22, 0.6 / len(series))
        at, look = [i + offset for i in range(len(rows))], {"color": _COLOURS[j % 6], "marker": _MARKERS[j % 6]}
        for i, bound in enumerate(s.bounds or []):
            if bound is not None:
                axes.plot(bound, (at[i], at[i]), color=_COLOURS[j % 6], linewidth=1.4, alpha=0.55)
        axes.scatter(_gaps(s.y), at, s=36, zorder=3, label=s.label, **look)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    figure.legend(loc="outside lower left", ncols=2, fontsize=8.5, frameon=False, labelcolor=_INK)
    told = [(s, [f"{row} {v:.1f}" for row, v in zip(rows, s.y) if v is not None]) for s in [*series, *marks]]
    said = [f"{s.label}: {', '.join(values)}" for s, values in told]
    return _save(figure, name, f"{title}, in percent. " + "; ".join(said) + ".")


def _axes(width: float, height: float, title: str, x: str, *, grid: Literal["x", "y"]):
    from matplotlib.figure import Figure as Canvas  # not pyplot: no global state, no display, Agg or SVG on saving

    figure = Canvas(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    figure.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.set_title(title, loc="left", fontsize=11, color=_INK, pad=8)
    axes.set_xlabel(x, fontsize=9.5, color=_INK)
    axes.grid(axis=grid, color=_INK, alpha=0.25, linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _gaps(y: list[float | None]) -> list[float]:
    """NaN, which matplotlib leaves out, for what is missing."""
    return [math.nan if v is None else v for v in y]


def _running_mean(y: list[float | None], window: int) -> list[float]:
    """Mean of the known values among the last `window`, NaN where there are none."""
    means = []
    for i in range(len(y)):
        known = [v for v in y[max(0, i - window + 1) : i + 1] if v is not None]
        means.append(sum(known) / len(known) if known else math.nan)
    return means


def _save(figure, name: str, alt: str) -> Figure:
    from matplotlib import rc_context

    # No mathtext: labels come from folder names, and a `$` in one must stay a `$`.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}):
        svg, png = io.StringIO(), io.BytesIO()
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # it is laid out now, and saving twice would do it twice more
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=160, metadata={"Software": MARK})
    return Figure(name, _inline(svg.getvalue(), name, alt), png.getvalue(), alt)


def _inline(document: str, name: str, alt: str) -> str:
    """An SVG document as one element of an HTML page: ids made unique, sizes fluid, ink in the page's colour."""
    svg = document[document.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    opening, rest = svg.split(">", 1)
    box = opening.split('viewBox="')[1].split('"')[0]
    return (
        f'<svg role="img" aria-label="{escape(alt)}" viewBox="{box}" xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">{rest}'
    )
