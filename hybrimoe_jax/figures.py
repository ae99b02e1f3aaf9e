"""How pictures look here. Needs matplotlib (the extra `plots`), which is imported when the first is drawn.

Colours are Okabe and Ito's, which colour-blind readers can tell apart. In greyscale they are alike, so each series has
a marker and a line of its own, each kind of bar a hatch. Widths fit a column of 3.4 inches.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any

from hybrimoe_jax.errors import UserError

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
LANE_COLOURS = {"cpu": "#E69F00", "device": "#0072B2", "link": "#009E73"}
LANE_HATCHES = {"cpu": "", "device": "////", "link": "...."}
MARKERS, LINES = "osv^DPX*", ("-", "--", ":", "-.")
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "----", "oo", "++")
SHADES = "Greys"
"""The colour map of heat maps: its order survives any printer."""
WIDTH = 3.4
LETTERS = 40
"""That fit under the axis of such a picture."""
STYLE: dict[Any, Any] = {
    "font.size": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "text.parse_math": False,  # a name with a $ in it is a name
}


def check_matplotlib(what: str) -> None:
    """UserError, beginning with `what`, where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise UserError(f"{what} needs matplotlib: pip install matplotlib, or the extra hybrimoe-jax[plots]")


def check_picture(path: str, what: str) -> None:
    """UserError where matplotlib is missing, or makes no picture of the kind that the name's end tells."""
    check_matplotlib(what)
    known = importlib.import_module("matplotlib.backend_bases").FigureCanvasBase.get_supported_filetypes()
    if picture_kind(path) not in known:
        raise UserError(f"{what} {path}: no picture ends so; end its name in one of .{', .'.join(sorted(known))}")


def picture_kind(path: str | os.PathLike[str]) -> str:
    """What the name's end tells; "png" where it has none."""
    return os.path.splitext(path)[1].lstrip(".").lower() or "png"


def matplotlib_pyplot() -> Any:
    """The module; UserError where matplotlib is missing."""
    check_matplotlib("a plot")
    return _pyplot()


@functools.cache
def _pyplot() -> Any:
    """Its backend starts here.

    In a style's context a notebook's backend would have its own settings undone, and show nothing after the first cell.
    """
    pyplot: Any = importlib.import_module("matplotlib.pyplot")  # its stubs are incomplete
    pyplot.switch_backend(pyplot.get_backend())
    return pyplot


@contextlib.contextmanager
def axes_of(ax: Any = None, height: float = 2.1, width: float = WIDTH) -> Iterator[Any]:
    """The axes to draw into, within the style: `ax`, or those of a new figure (sizes in inches).

    A notebook shows a new figure when its cell ends; `ax.figure.savefig(path)` writes it.
    """
    pyplot = matplotlib_pyplot()
    with pyplot.rc_context(STYLE):
        if ax is None:
            _, ax = pyplot.subplots(figsize=(width, height), dpi=200, layout="constrained")
        yield ax


def panels(titles: Iterable[str], columns: int = 4, height: float = 2.1, width: float = 2.3) -> list[Any]:
    """Axes in one new figure, one for each title, `columns` in a row at most; sizes of one in inches."""
    titles = list(titles)
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    pyplot = matplotlib_pyplot()
    with pyplot.rc_context(STYLE):
        size = (width * columns, height * rows)
        figure, grid = pyplot.subplots(rows, columns, figsize=size, dpi=200, layout="constrained", squeeze=False)
        found = list(grid.flat)
        for axes, title in zip(found, titles):
            axes.set_title(title, fontsize=7)
        for axes in found[len(titles) :]:
            figure.delaxes(axes)
    return found[: len(titles)]


def line_style(place: int) -> dict[str, Any]:
    """Of the series with this number, for `plot`."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "ls": LINES[(place + place // len(COLOURS)) % len(LINES)],  # colours and markers begin anew, lines do not
        "ms": 3,
        "lw": 1,
    }


def bar_style(place: int) -> dict[str, Any]:
    """Of the kind of bar with this number, for `bar`."""
    return {"color": COLOURS[place % len(COLOURS)], "hatch": HATCHES[place % len(HATCHES)], "edgecolor": "white"}


def draw_lines(rows: Any, x: str, y: str, by: str = "", ax: Any = None) -> Any:
    """Column `y` over column `x` of a table, a line for each value of column `by`; returns the axes."""
    with axes_of(ax) as axes:
        for place, (name, points) in enumerate(_series_of(rows, x, y, by).items()):
            axes.plot(list(points), list(points.values()), label=name, **line_style(place))
        _finish(axes, x, y, by)
    return axes


def draw_bars(rows: Any, x: str, y: str, by: str = "", ax: Any = None, stacked: bool = False) -> Any:
    """The same as bars, side by side or on one another; values of `x` need not be numbers."""
    series = _series_of(rows, x, y, by)
    places = list(dict.fromkeys(value for points in series.values() for value in points))
    width = 0.8 if stacked else 0.8 / len(series)
    below = [0.0] * len(places)
    with axes_of(ax) as axes:
        for number, (name, points) in enumerate(series.items()):
            heights = [points.get(value) or 0.0 for value in places]
            shift = 0.0 if stacked else (number - (len(series) - 1) / 2) * width
            at = [place + shift for place in range(len(places))]
            axes.bar(at, heights, width, bottom=below if stacked else None, label=name, **bar_style(number))
            below = [low + height for low, height in zip(below, heights)]
        words = [str(value) for value in places]
        wide = sum(map(len, words)) > LETTERS
        axes.set_xticks(range(len(places)), words, rotation=30 * wide, ha="right" if wide else "center")
        _finish(axes, x, y, by)
    return axes


def _series_of(rows: Any, x: str, y: str, by: str) -> dict[Any, dict[Any, Any]]:
    """{value of `by`: {x: y}}, in the order of the rows; where `y` is None or NaN there is no point."""
    series: dict[Any, dict[Any, Any]] = {}
    names = rows[by] if by else [""] * len(rows)
    for name, at, value in zip(names, rows[x], rows[y], strict=True):
        if value is not None and value == value:
            series.setdefault(name, {})[at] = value
    return series


def _finish(axes: Any, x: str, y: str, by: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if by:
        rows = -(-len(axes.get_legend_handles_labels()[1]) // 3)
        axes.set_title(axes.get_title(), fontsize=7, pad=6 + 10 * rows)  # above the legend
        axes.legend(ncols=3, fontsize=6, loc="lower center", bbox_to_anchor=(0.5, 1.0))
