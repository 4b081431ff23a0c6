"""Line charts and histograms as inline SVG: no script, no external asset; colours come from the page's style sheet."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 44, 116, 14, 30

Points = Sequence[tuple[float, float]]


def line_chart(
    series: Mapping[str, Points], *, baselines: Mapping[str, float] | None = None, x_label: str = "step"
) -> str:
    """Lines with their names at the right end; a baseline of the same name is drawn dashed in the line's colour.

    Points that are not finite are left out. Returns "" when there is nothing to draw.
    """
    lines = {
        name: [(float(x), float(y)) for x, y in points if y is not None and math.isfinite(y)]
        for name, points in series.items()
    }
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    baselines = {name: value for name, value in (baselines or {}).items() if name in lines}
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points] + list(baselines.values())
    low, high, y_ticks = _axis(min(0.0, min(ys)), max(ys))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return LEFT + across, HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    out = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_escape(", ".join(lines))}">']
    for y in y_ticks:
        _, py = at(x_low, y)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>')
        out.append(f'<text class="tick" x="{LEFT - 8}" y="{py + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in _axis(x_low, x_high)[2]:
        if x_low <= x <= x_high:
            out.append(
                f'<text class="tick" x="{at(x, low)[0]:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{x:g}</text>'
            )
    out.append(f'<text class="tick" x="{WIDTH - RIGHT + 8}" y="{HEIGHT - 10}">{_escape(x_label)}</text>')
    ends = _spread({name: at(*points[-1])[1] for name, points in lines.items()})
    for index, (name, points) in enumerate(lines.items()):
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(x, y) for x, y in points))
        if name in baselines:
            py = at(x_low, baselines[name])[1]
            out.append(
                f'<line class="s{index % 8} dashed" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}">'
                f"<title>{_escape(name)}: unigram baseline {baselines[name]:.2f}</title></line>"
            )
        last = points[-1][1]
        out.append(
            f'<polyline class="s{index % 8}" points="{path}"><title>{_escape(name)}: {last:.3f}</title></polyline>'
        )
        out.append(
            f'<text class="name s{index % 8}" x="{WIDTH - RIGHT + 8}" y="{ends[name] + 4:.1f}">{_escape(name)} '
            f'<tspan class="tick">{last:.2f}</tspan></text>'
        )
    return "".join([*out, "</svg>"])


def histogram(
    counts: Mapping[str, Sequence[int]], edges: Sequence[float], *, x_label: str, first_colour: int = 0
) -> str:
    """Bars over bins with borders `edges`, one series on top of the other, with the names of several at the right end.

    `first_colour` is that of the first series. Returns "" when there is nothing to draw.
    """
    series = {name: list(values) for name, values in counts.items() if any(values)}
    if not series:
        return ""
    totals = [sum(column) for column in zip(*series.values(), strict=True)]
    last_used = max(index for index, total in enumerate(totals) if total) + 1
    low, high, y_ticks = _axis(0.0, max(totals))
    x_low, x_high = edges[0], edges[last_used]

    def x_at(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y_at(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    out = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_escape(", ".join(series))}">']
    for y in y_ticks:
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at(y):.1f}" y2="{y_at(y):.1f}"/>')
        out.append(f'<text class="tick" x="{LEFT - 8}" y="{y_at(y) + 4:.1f}" text-anchor="end">{_short(y)}</text>')
    below = [0] * len(totals)
    for index, (name, values) in enumerate(series.items()):
        colour = (first_colour + index) % 8
        for place in range(last_used):
            if values[place]:
                left, right = x_at(edges[place]), x_at(edges[place + 1])
                top, bottom = y_at(below[place] + values[place]), y_at(below[place])
                told = f"{_escape(name)}, {edges[place]:g} to {edges[place + 1]:g}: {values[place]:,}"
                out.append(
                    f'<rect class="s{colour}" x="{left + 0.5:.1f}" y="{top:.1f}" '
                    f'width="{max(right - left - 1, 0.5):.1f}" height="{bottom - top:.1f}"><title>{told}</title></rect>'
                )
                below[place] += values[place]
        if len(series) > 1:
            corner = f'x="{WIDTH - RIGHT + 8}" y="{TOP + 12 + 17 * index}"'
            out.append(f'<text class="name s{colour}" {corner}>{_escape(name)}</text>')
    for x in _axis(x_low, x_high)[2]:
        if x_low <= x <= x_high:
            out.append(
                f'<text class="tick" x="{x_at(x):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{_short(x)}</text>'
            )
    out.append(f'<text class="tick" x="{WIDTH - RIGHT + 8}" y="{HEIGHT - 10}">{_escape(x_label)}</text>')
    return "".join([*out, "</svg>"])


def _short(value: float) -> str:
    """`1500` stays, 20000 is `20k`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:g}"


def _axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Round limits around [low, high] and four to eight round ticks between them."""
    span = max(high - low, 1e-9)
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return (
        first * step,
        max(last, first + 1) * step,
        [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)],
    )


def _spread(wanted: Mapping[str, float], distance: float = 15) -> dict[str, float]:
    """Heights near the wanted ones, at least `distance` apart, so that names at line ends can be read."""
    placed: dict[str, float] = {}
    previous = -math.inf
    for name, y in sorted(wanted.items(), key=lambda item: item[1]):
        previous = max(y, previous + distance)
        placed[name] = previous
    excess = previous - (HEIGHT - BOTTOM)
    if excess > 0:
        floor = math.inf
        for name, y in sorted(placed.items(), key=lambda item: -item[1]):
            floor = min(y, HEIGHT - BOTTOM, floor - distance)
            placed[name] = floor
    return placed


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
