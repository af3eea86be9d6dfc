"""The picture of the README, from the first table of docs/results.md: `python docs/picture.py`.

Accuracy against forward passes, one SVG for light and one for dark pages.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

from kava_core.reporting.style import COLOURS

DOCS = Path(__file__).parent
WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 40, 56
MOST_PASSES = 40
LINE = 17  # least distance of two labels


@dataclass(frozen=True)
class System:
    """A row of the table: exact match in per cent, the mean over seeds, with the lowest and highest
    of them; forward passes."""

    name: str
    accuracy: float
    low: float
    high: float
    passes: float

    @property
    def colour(self) -> str:
        """Its kind's name in COLOURS."""
        if self.name.startswith("teacher"):
            return "ink"
        return "series-2" if self.name.startswith("No-CoT") else "series-1"


def read_systems(page: str) -> list[System]:
    """The rows of the first table of docs/results.md: name, mean (low–high), …, forward passes."""
    first = page.partition("\n|")[2].partition("\n\n")[0]
    rows = re.findall(
        r"^\|? ?(.+?) \| ([\d.]+) \(([\d.]+)–([\d.]+)\) .*\| ([\d.]+) \|$", first, re.M
    )
    return [System(name, *(float(number) for number in numbers)) for name, *numbers in rows]


def draw(systems: list[System], theme: int) -> str:
    """The SVG; theme: 0 light, 1 dark."""
    colours = {name: both[theme] for name, both in COLOURS.items()}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{colours["paper"]}"/>',
    ]
    for accuracy in range(0, 101, 20):
        y = _y(accuracy)
        parts += [
            f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{colours["rule"]}"/>',
            _text(LEFT - 8, y + 4, f"{accuracy}", colours["muted"], "end"),
        ]
    for passes in range(0, MOST_PASSES + 1, 10):
        parts.append(
            _text(_x(passes), HEIGHT - BOTTOM + 20, f"{passes}", colours["muted"], "middle")
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts += [
        _text(middle, HEIGHT - 14, "forward passes per problem", colours["muted"], "middle"),
        f'<g transform="translate(16 {_y(50):.1f}) rotate(-90)">'
        + _text(0, 0, "exact match, %", colours["muted"], "middle")
        + "</g>",
    ]
    heights = _heights(systems)
    for system in sorted(systems, key=lambda system: system.accuracy):
        x, y, colour = _x(system.passes), _y(system.accuracy), colours[system.colour]
        label = heights[system.name]
        left = x > WIDTH / 2  # where there is room for words
        to = -1 if left else 1
        parts += [
            f'<path d="M{x:.1f} {_y(system.high):.1f}V{_y(system.low):.1f}" stroke="{colour}"/>',
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>',
        ]
        if abs(y - label) > 2:
            line = f"M{x + 7 * to:.1f} {y:.1f}L{x + 15 * to:.1f} {label:.1f}"
            parts.append(f'<path d="{line}" stroke="{colour}"/>')
        words = f"{system.name}: {system.accuracy:.1f}"
        parts.append(_text(x + 18 * to, label + 4, words, colour, "end" if left else "start"))
    return "\n".join([*parts, "</svg>\n"])


def _heights(systems: list[System]) -> dict[str, float]:
    """Where the label of each stands: beside its point, or as near to it as leaves room for the
    others. Those of the upper half make way downwards, the shortest first, and so do those with the
    fewest passes, under whose points are none; the others upwards."""
    found: dict[str, float] = {}
    few = min(system.passes for system in systems)
    kinds = {
        "upper": [s for s in systems if s.accuracy >= 50 and _x(s.passes) <= WIDTH / 2],
        "few": [s for s in systems if s.accuracy < 50 and s.passes == few],
    }
    kinds["lower"] = [s for s in systems if not any(s in kind for kind in kinds.values())]
    last: float = -LINE
    for system in sorted(kinds["upper"], key=lambda system: len(system.name)):
        found[system.name] = last = max(_y(system.accuracy), last + LINE)
    last = _y(0) - 2 * LINE
    for system in sorted(kinds["few"], key=lambda system: -system.accuracy):
        found[system.name] = last = last + LINE
    last = HEIGHT
    for system in sorted(kinds["lower"], key=lambda system: system.accuracy):
        alone = _x(system.passes) > WIDTH / 2 or system.colour == "ink"
        found[system.name] = _y(system.accuracy) if alone else min(_y(system.accuracy), last - LINE)
        last = last if alone else found[system.name]
    return found


def _x(passes: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * passes / MOST_PASSES


def _y(accuracy: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * accuracy / 100


def _text(x: float, y: float, text: str, colour: str, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )


def files() -> dict[Path, str]:
    """Path → content of both pictures, as docs/results.md has them."""
    systems = read_systems((DOCS / "results.md").read_text(encoding="utf-8"))
    return {
        DOCS / "images" / f"accuracy-{name}.svg": draw(systems, theme)
        for theme, name in enumerate(("light", "dark"))
    }


if __name__ == "__main__":
    (DOCS / "images").mkdir(exist_ok=True)
    for path, content in files().items():
        path.write_text(content, encoding="utf-8")
        print(path)
