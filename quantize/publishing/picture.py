"""Size against KL divergence of a release's variants, as an SVG for light and dark pages.

Written as text, because one scatter plot does not justify a plotting library: the same points give the same bytes,
every point shows its name and figures on hover, and fonts are the reader's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from quantize.publishing.quality import NAMES, Point, pareto_front

FILE = "quality.svg"
FORMER_FILES = ("quality.png",)
"""Pictures that earlier versions wrote into branches; removed when the cards are rendered again."""
INK = "#808693"  # equal contrast to white and to the hub's dark page
COLOURS = {"gptq": "#4a86e8", "awq": "#d9730d", "gguf": "#2f9e63"}
WIDTH, HEIGHT = 800, 450
LEFT, RIGHT, TOP, BOTTOM = 72, 24, 20, 52  # pixels around the plot
FONT, SMALL = 13, 11
CHARACTER = 0.58  # mean width of a character, as a share of the font size


def draw(points: Sequence[Point]) -> bytes | None:
    """The picture; None if there is nothing to show."""
    if not points:
        return None
    return ("\n".join(_Picture(points).lines()) + "\n").encode()


@dataclass(frozen=True)
class Axis:
    """Maps values onto pixels.

    Attributes:
        low, high: the values at ``first`` and ``last``, logarithms on a logarithmic axis.
    """

    low: float
    high: float
    first: float
    last: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        place = math.log10(value) if self.logarithmic else value
        return self.first + (place - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self) -> list[float]:
        """Round values inside the axis, four to ten of them."""
        if not self.logarithmic:
            step = _nice((self.high - self.low) / 6)
            return [step * number for number in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        shares = (1, 2, 5) if self.high - self.low < 3 else (1,)
        values = [share * 10.0**decade for decade in decades for share in shares]
        inside = [value for value in values if self.low <= math.log10(value) <= self.high]
        return inside or [10.0**self.low, 10.0**self.high]


def _axis(values: Sequence[float], first: float, last: float, logarithmic: bool = False) -> Axis:
    places = [math.log10(value) if logarithmic else value for value in values]
    low, high = min(places), max(places)
    room = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    low = max(low - room, 0.0) if not logarithmic else low - room  # neither size nor divergence is negative
    return Axis(low, high + room, first, last, logarithmic)


def _nice(step: float) -> float:
    decade = 10.0 ** math.floor(math.log10(step))
    return next(share * decade for share in (1, 2, 5, 10) if share * decade >= step)


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        return not (
            self.right <= other.left or other.right <= self.left or self.bottom <= other.top or other.bottom <= self.top
        )


class _Picture:
    def __init__(self, points: Sequence[Point]) -> None:
        self.points, self.front = points, pareto_front(points)
        divergences = [point.kl_divergence for point in points]
        self.x = _axis([point.nbytes / 1e9 for point in points], LEFT, WIDTH - RIGHT)
        self.y = _axis(divergences, HEIGHT - BOTTOM, TOP, logarithmic=min(divergences) > 0)

    def lines(self) -> Iterator[str]:
        yield (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            f'font-family="system-ui, sans-serif" font-size="{FONT}" fill="{INK}">'
        )
        yield from self._axes()
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self._place, self.front))
        yield f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-dasharray="5 4"/>'
        for point in self.points:
            yield self._mark(point)
        yield from self._labels()
        yield from self._legend()
        yield "</svg>"

    def _place(self, point: Point) -> tuple[float, float]:
        return self.x(point.nbytes / 1e9), self.y(point.kl_divergence)

    def _axes(self) -> Iterator[str]:
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        for value in self.x.ticks():
            x = self.x(value)
            yield _line(x, TOP, x, bottom, faint=True)
            yield _text(x, bottom + 18, f"{value:.6g}", anchor="middle")
        for value in self.y.ticks():
            y = self.y(value)
            yield _line(LEFT, y, right, y, faint=True)
            yield _text(LEFT - 8, y + 4, f"{value:.4g}", anchor="end")
        yield _line(LEFT, bottom, right, bottom)
        yield _line(LEFT, TOP, LEFT, bottom)
        yield _text((LEFT + right) / 2, HEIGHT - 12, "size of the weights, GB", anchor="middle")
        middle = (TOP + bottom) / 2
        yield (
            f'<text transform="translate(16 {middle:.1f}) rotate(-90)" text-anchor="middle">'
            "KL divergence from the original, nats</text>"
        )

    def _mark(self, point: Point) -> str:
        x, y = self._place(point)
        colour = COLOURS[point.method]
        tooltip = f"{point.title}: {point.nbytes / 1e9:.2f} GB, KL divergence {point.kl_divergence:.4f}"
        shapes = {
            "gptq": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}">',
            "awq": f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" fill="{colour}">',
            "gguf": f'<path d="M{x:.1f} {y - 6:.1f}l5.5 10h-11z" fill="{colour}">',
        }
        shape = shapes[point.method]
        return f"{shape}<title>{escape(tooltip)}</title></{shape[1:].split()[0]}>"

    def _labels(self) -> Iterator[str]:
        """Labels beside their points: first those on the front, then others where there is room."""
        taken = [_Box(x - 6, y - 6, x + 6, y + 6) for x, y in map(self._place, self.points)]
        for point in [*self.front, *(point for point in self.points if point not in self.front)]:
            # every method has a "main"
            name = point.title if point.name == "main" else point.name.removeprefix("gptq-").removeprefix("awq-")
            width = CHARACTER * SMALL * len(name)
            x, y = self._place(point)
            for side, lift in ((1, 14), (1, -6), (-1, 14), (-1, -6), (1, 26), (-1, -18)):
                left = x + 8 if side > 0 else x - 8 - width
                box = _Box(left, y - lift + 2, left + width, y - lift + 2 + SMALL)
                inside = (
                    box.left >= LEFT and box.right <= WIDTH - 4 and box.top >= TOP and box.bottom <= HEIGHT - BOTTOM
                )
                if inside and not any(box.meets(other) for other in taken):
                    taken.append(box)
                    yield _text(left, box.bottom - 2, name, size=SMALL)
                    break

    def _legend(self) -> Iterator[str]:
        methods = [method for method in COLOURS if any(point.method == method for point in self.points)]
        for number, method in enumerate(methods):
            y = TOP + 14 + 20 * number
            yield f'<rect x="{WIDTH - RIGHT - 74}" y="{y - 9}" width="10" height="10" fill="{COLOURS[method]}"/>'
            yield _text(WIDTH - RIGHT - 58, y, NAMES[method])


def _line(x1: float, y1: float, x2: float, y2: float, faint: bool = False) -> str:
    opacity = ' stroke-opacity="0.25"' if faint else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{INK}"{opacity}/>'


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = FONT) -> str:
    extra = (f' text-anchor="{anchor}"' if anchor != "start" else "") + (f' font-size="{size}"' if size != FONT else "")
    return f'<text x="{x:.1f}" y="{y:.1f}"{extra}>{escape(text)}</text>'
