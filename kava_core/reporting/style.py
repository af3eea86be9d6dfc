"""One look for all figures, on paper, on a light screen and on a dark one.

A figure is drawn once, in the light colours. In the SVG that goes into the page every colour is
replaced by a CSS variable, and the page defines the variables for light, dark and print; the PNG
beside the page keeps the light colours. Equal figures have equal bytes: nothing in them depends on
the time, the machine's settings or the order of drawing.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Names of CSS variables → (light, dark). Light values are distinct, so that they can be told apart
# in a finished SVG.
COLOURS = {
    "paper": ("#fcfbf9", "#17181b"),
    "panel": ("#f4f2ee", "#1f2125"),
    "ink": ("#1e1e21", "#ececea"),
    "muted": ("#66666d", "#a0a0a8"),
    "rule": ("#dedbd4", "#34363c"),
    "series-1": ("#0b62c1", "#62adff"),
    "series-2": ("#bf560b", "#f59b58"),
    "series-3": ("#0a7f61", "#3fc9a2"),
    "series-4": ("#a7316d", "#f082b6"),
    "series-5": ("#7750b4", "#b796f0"),
    "series-6": ("#8b6c00", "#dcbc42"),
    "series-7": ("#00778e", "#50c6de"),
    "series-8": ("#b22a20", "#ff8d82"),
    "series-9": ("#4b7810", "#a6d35e"),
    "series-10": ("#57575e", "#bdbdc4"),
}
INK, MUTED, RULE = (COLOURS[name][0] for name in ("ink", "muted", "rule"))
SERIES = [light for name, (light, _) in COLOURS.items() if name.startswith("series")]
MARKERS = "osD^vPX*<>"

Dash = Literal["-", "--"]

# The systems that a reader meets in every report look the same in all of them.
KNOWN = {
    "teacher-cot": (INK, "s"),
    "teacher-no-cot": (MUTED, "D"),
    "kava": (SERIES[0], "o"),
    "endpoint": (SERIES[1], "^"),
    "answer-only": (SERIES[2], "v"),
    "no-cot": (SERIES[3], "P"),
    "no-cot-equal-time": (SERIES[4], "X"),
}
TERMS = {
    "answer": SERIES[9],
    "chain": INK,
    "cot": SERIES[8],
    "codi": SERIES[7],
    "kv": SERIES[6],
}

DPI = 144
STYLE: dict[str, Any] = {
    "figure.dpi": 72,  # one unit of length is one CSS pixel of the page
    "savefig.dpi": DPI,
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 12,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "figure.facecolor": "none",
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.hspace": 0.06,
    "text.color": INK,
    "text.parse_math": False,  # names are data: a dollar sign in one is a dollar sign
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "ytick.major.size": 0,
    "lines.linewidth": 2,
    "lines.markersize": 7,
    "legend.frameon": False,
    "legend.fontsize": 12,
    "svg.fonttype": "none",
    "svg.hashsalt": "kava",
}
PAGE_WIDTH = 920


@dataclass(frozen=True)
class Drawing:
    """A finished figure: `svg` to put into a page, `png` bytes, and what it shows in words."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


def finish(name: str, title: str, caption: str, draw: Callable[[], Figure]) -> Drawing:
    """Draw and render a figure, whatever the user's own matplotlib settings are."""
    import matplotlib.style

    svg, png = io.BytesIO(), io.BytesIO()
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = draw()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(svg, format="svg", metadata=nothing)
        figure.set_layout_engine("none")  # laid out once, for both
        light = COLOURS["paper"][0]
        figure.savefig(png, format="png", facecolor=light, metadata={"Software": None})
    return Drawing(
        name, title, caption, _for_page(name, title, svg.getvalue().decode()), png.getvalue()
    )


def canvas(height: int, *, width: int = PAGE_WIDTH) -> Figure:
    """An empty figure, sizes in CSS pixels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), layout="constrained")


def colours_of(systems: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each system; systems without a fixed one share what is left."""
    left = list(zip(SERIES[5:], MARKERS[:5], strict=True))
    others = sorted(set(systems) - KNOWN.keys())
    return {
        **{name: KNOWN[name] for name in systems if name in KNOWN},
        **{name: left[i % len(left)] for i, name in enumerate(others)},
    }


def looks_of(systems: Iterable[str]) -> dict[str, str]:
    """The CSS variable of each system's colour."""
    variables = {light: name for name, (light, _) in COLOURS.items()}
    return {
        name: variables[colour] for name, (colour, _) in colours_of(sorted(set(systems))).items()
    }


def percent_axis(ax: Axes, highest: float) -> None:
    """A y axis in % from 0 to a little above `highest`."""
    ax.set_ylim(0, min(104.0, max(5.0, 1.12 * highest)))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")


def name_beside(
    ax: Axes,
    name: str,
    point: tuple[float, float],
    place: tuple[float, float],
    colour: str,
) -> None:
    """A system's name at `place` with a thin line to its `point`."""
    line = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "alpha": 0.6}
    right = place[0] > point[0]
    line |= {"shrinkA": 2, "shrinkB": 6, "relpos": (0.0 if right else 1.0, 0.5)}
    ax.annotate(
        name,
        point,
        place,
        va="center",
        ha="left" if right else "right",
        color=colour,
        weight="bold",
        arrowprops=line,
    )


def legend(figure: Figure, lines: Mapping[str, tuple[str, Dash]]) -> None:
    """Names of lines above a figure; lines: name → (colour, dash)."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, linestyle=dash, label=name)
        for name, (colour, dash) in lines.items()
    ]
    if handles:
        figure.legend(
            handles=handles, loc="outside upper left", ncols=min(5, len(handles)), handlelength=1.6
        )


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places between `low` and `high`, at least `gap` apart, as near as possible to `wanted`.

    Nearest in least squares; of equal ones the first is placed highest. Pooling adjacent violators:
    with i·gap taken off the i-th lowest, places only have to ascend. Where there is no room for all
    of them they go on above `high`.
    """
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], -i))
    pools: list[tuple[float, int]] = []
    for rank, i in enumerate(order):
        pools.append((wanted[i] - rank * gap, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [((a * n + b * m) / (n + m), n + m)]
    top = high - (len(wanted) - 1) * gap
    places = [max(low, min(mean, top)) for mean, n in pools for _ in range(n)]
    result = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        result[i] = places[rank] + rank * gap
    return result


def _for_page(name: str, title: str, svg: str) -> str:
    """The SVG as an element of the page: its own ids, the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would style the whole page
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"font-family: [^;\"]+; ?", "", svg)
    needed = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))

    def identify(match: re.Match[str]) -> str:
        # matplotlib writes a shape again under the same name; the first is the one referred to
        if match[1] not in needed:
            return ""
        needed.discard(match[1])
        return f' id="{name}-{match[1]}"'

    svg = re.sub(r' id="([^"]+)"', identify, svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    for variable, (light, _) in COLOURS.items():
        svg = re.sub(rf"(fill|stroke): {light}\b", rf"\1: var(--{variable})", svg)
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
