"""How pictures look here. Needs matplotlib (the extra `plots`), which is imported when the first is drawn.

Colours are Okabe and Ito's, which colour-blind readers can tell apart. In greyscale they are alike, so each series has
a marker and a line of its own, each kind of bar a hatch. Widths fit a column of 3.4 inches.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
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
STYLE: dict[Any, Any] = {
    "font.size": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "savefig.dpi": 200,
}


def check_matplotlib(what: str) -> None:
    """UserError, beginning with `what`, where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise UserError(f"{what} needs matplotlib: pip install matplotlib, or the extra hybrimoe-jax[plots]")


@contextlib.contextmanager
def axes_of(ax: Any = None, height: float = 2.1, width: float = WIDTH) -> Iterator[Any]:
    """The axes to draw into, within the style: `ax`, or those of a new figure (sizes in inches).

    A notebook shows a new figure when its cell ends; `ax.figure.savefig(path)` writes it.
    """
    check_matplotlib("a plot")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")  # its stubs are incomplete
    with pyplot.rc_context(STYLE):
        if ax is None:
            _, ax = pyplot.subplots(figsize=(width, height), dpi=200, layout="constrained")
        yield ax


def line_style(place: int) -> dict[str, Any]:
    """Of the series with this number, for `plot`."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "ls": LINES[place % len(LINES)],
        "ms": 3,
        "lw": 1,
    }


def bar_style(place: int) -> dict[str, Any]:
    """Of the kind of bar with this number, for `bar`."""
    return {"color": COLOURS[place % len(COLOURS)], "hatch": HATCHES[place % len(HATCHES)], "edgecolor": "white"}
