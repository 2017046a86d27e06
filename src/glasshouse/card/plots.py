"""Plots as SVG that takes the colours of the page around it. Knows numbers and labels; nothing of runs.

matplotlib draws them, where it is installed; the same numbers give the same bytes.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

INK, SOFT, LINE, ACCENT, OTHER = "#010203", "#010204", "#010205", "#010206", "#010207"
COLOURS = {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    LINE: "var(--line)",
    ACCENT: "var(--accent)",
    OTHER: "var(--other)",
}
"""Colours that matplotlib is told, and those of the page that take their place."""
MOST_POINTS = 600
SETTINGS: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "glasshouse", "font.size": 9, "font.family": "sans-serif",
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "text.color": INK,
    "axes.labelcolor": SOFT, "axes.edgecolor": LINE, "xtick.color": LINE, "ytick.color": LINE,
    "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": LINE, "grid.linewidth": 0.6, "legend.frameon": False,
    "legend.fontsize": 8.5, "axes.formatter.useoffset": False, "path.simplify": False, "text.parse_math": False,
}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One line or set of points of a plot.

    Args:
        label: its name in the legend; empty for none.
        x: places.
        y: values.
        style: "line", "faint" (a thin pale line), "points" (a line with points), "ring" or "cross".
        other: whether it is drawn in the second colour.
    """

    label: str
    x: Sequence[float] = field(repr=False)
    y: Sequence[float] = field(repr=False)
    style: str = "line"
    other: bool = False


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a fortieth of the values, corrected for its start (Kingma and Ba 2015,
    section 3)."""
    smoothed, mean, total, weight = [], 0.0, 0.0, 1 - 1 / max(3, len(values) / 40)
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + 1 - weight
        smoothed.append(mean / total)
    return smoothed


def thin(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """The points of a line, where there are too many only the lowest and the highest of each of some stretches."""
    if len(x) <= most:
        return list(x), list(y)
    stretches, kept = most // 2, []
    for number in range(stretches):
        places = range(number * len(x) // stretches, (number + 1) * len(x) // stretches)
        kept += sorted({min(places, key=y.__getitem__), max(places, key=y.__getitem__)})
    return [x[place] for place in kept], [y[place] for place in kept]


def draw_lines(
    name: str, lines: Sequence[Series], unit: str, across: str = "step", from_zero: bool = True
) -> str:
    """A plot of lines.

    Args:
        name: short name, unique on the page.
        lines: what to draw.
        unit: label of the upright axis.
        across: label of the level axis.
        from_zero: whether the upright axis begins at zero.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.subplots()
        for line in lines:
            _draw(axes, line)
        axes.set(xlabel=across, ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if from_zero:
            axes.set_ylim(0, 1.08 * max([1e-9, *(value for line in lines for value in line.y)]))
        if any(line.label for line in lines):
            axes.legend(loc="best")
        return _write(figure, name)


def _draw(axes: Any, line: Series) -> None:
    colour = OTHER if line.other else ACCENT
    looks: dict[str, dict[str, Any]] = {
        "line": {"linewidth": 1.6},
        "faint": {"linewidth": 0.7, "alpha": 0.4},
        "points": {"linewidth": 1.2, "marker": "o", "markersize": 3.2},
        "ring": {
            "linestyle": "",
            "marker": "o",
            "markersize": 9,
            "fillstyle": "none",
            "markeredgewidth": 1.6,
        },
        "cross": {"linestyle": "", "marker": "x", "markersize": 6, "markeredgewidth": 1.6},
    }
    axes.plot(*thin(line.x, line.y), color=colour, label=line.label or None, **looks[line.style])


def draw_bars(name: str, labels: Sequence[str], values: Sequence[float], ends: Sequence[tuple[float, float] | None],
              unit: str) -> str:  # fmt: skip
    """Level bars with intervals, the first in the first colour.

    Args:
        name: short name, unique on the page.
        labels: name of each bar.
        values: length of each bar.
        ends: the two ends of each interval, or None.
        unit: label of the axis.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.subplots()
        places = list(range(len(values)))[::-1]
        colours = [ACCENT if number == 0 else OTHER for number in range(len(values))]
        axes.barh(places, values, color=colours, height=0.55, alpha=0.75)
        reach = max([*values, *(pair[1] for pair in ends if pair)])
        for place, value, pair in zip(places, values, ends, strict=True):
            if pair:
                axes.plot(pair, [place, place], color=INK, linewidth=1.6, marker="|", markersize=9)
            axes.text(
                max(value, pair[1] if pair else value) + 0.02 * reach, place, f"{value:.3f}", va="center"
            )
        axes.set(xlabel=unit, xlim=(0, 1.18 * reach), ylim=(-0.6, len(values) - 0.4))
        axes.set_yticks(places, labels)
        axes.grid(visible=False, axis="y")
        return _write(figure, name)


def _write(figure: Any, name: str) -> str:
    """The figure as an SVG element without dates, addresses, fixed size or ids that another figure may have."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.S)
    svg = re.sub(r'\s(xmlns(:xlink)?|version)="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*pt"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*pt"', r"\1", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    svg = re.sub(r"font(-family)?: ?([^;\"]*?)'DejaVu Sans'[^;\"]*", _font, svg)
    for drawn, shown in COLOURS.items():
        svg = svg.replace(drawn, shown)
    return svg.replace("<svg", f'<svg role="img" aria-label="{name.replace("-", " ")}"', 1)


def _font(found: re.Match[str]) -> str:
    """The page's font instead of matplotlib's list of them."""
    return (
        f"font-family: inherit; font-size: {size[0]}"
        if (size := re.findall(r"[\d.]+px", found[2]))
        else "font-family: inherit"
    )
