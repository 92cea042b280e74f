"""A benchmark's bars as an SVG: panels below each other, each with a scale of its own from zero."""

from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, STEP, GAP = 760, 22, 44
"""Of the picture, between the bars of a panel, and between panels, in pixels."""


class Bar(NamedTuple):
    name: str
    ours: bool
    length: float
    text: str
    """The figure behind the bar."""
    span: tuple[float, float] | None = None
    """A line over the bar, from the smallest value to the largest."""
    tick: float | None = None
    """A mark at another value, to compare the length with."""


def bars_svg(title: str, panels: dict[str, list[Bar]], left: int) -> str:
    """The panels by their headings; the names of the bars have `left` pixels."""
    parts, y = [], 46
    for heading, bars in panels.items():
        scale = (WIDTH - left - 90) / max(bar.span[1] if bar.span else bar.length for bar in bars)
        parts.append(f'<text x="10" y="{y}" font-weight="bold">{escape(heading)}</text>')
        for bar in bars:
            y += STEP
            parts += _drawn(bar, left, y, scale)
        y += GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" font-family="sans-serif" font-size="12">'
    background = f'<rect width="{WIDTH}" height="{y}" fill="white"/>'
    return "\n".join([head, background, f'<text x="10" y="20">{escape(title)}</text>', *parts, "</svg>\n"])


def _drawn(bar: Bar, left: int, y: int, scale: float) -> list[str]:
    fill = "#c0392b" if bar.ours else "#7f8c8d"
    parts = [
        f'<text x="{left - 8}" y="{y}" text-anchor="end">{escape(bar.name)}</text>',
        f'<rect x="{left}" y="{y - 11}" width="{bar.length * scale:.1f}" height="14" fill="{fill}"/>',
    ]
    if bar.span:
        low, high = (value * scale for value in bar.span)
        parts.append(f'<path d="M{left + low:.1f} {y - 4}H{left + high:.1f}" stroke="black"/>')
    end = max(bar.length, *(bar.span or ()), bar.tick or 0) * scale
    parts.append(f'<text x="{left + end + 6:.1f}" y="{y}">{bar.text}</text>')
    if bar.tick:
        parts.append(f'<path d="M{left + bar.tick * scale:.1f} {y - 14}v20" stroke="black" stroke-width="2"/>')
    return parts
