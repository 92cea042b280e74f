"""The picture of a run: one PNG for a README, of its curves and its last gallery."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from automix_dist.charts import charts
from automix_dist.gallery import Gallery, mask_colors
from automix_dist.page import PNG_SIDE, ticks
from automix_dist.recorded_run import RecordedRun, read_run
from automix_dist.whole_file import whole_file

CURVE_COLORS = ("#0072b2", "#d55e00", "#009e73", "#b5568c", "#52565c", "#56b4e9", "#e69f00")

_SCALE = 2  # drawn at twice the size, then reduced: PIL draws no smooth lines itself
_WIDTH, _MARGIN, _PLOT_HEIGHT, _LEGEND_LINE, _GAP = 1200, 40, 260, 24, 8
_LEGEND_LINES = 3
_LABEL_WIDTH = 72  # of the gallery's row names
_LARGEST_TILE = 140


def write_picture(run: Path, out: Path | None = None) -> Path:
    """Draw the losses, the top-1 accuracy, and the last pairs with their masks and mixed samples to `out` (default:
    run/summary.png); return its path.

    Raises ReportError if `run` is not the folder of a run, OSError if the picture cannot be written.
    """
    run = Path(run)
    picture = _picture(read_run(run))
    path = run / "summary.png" if out is None else Path(out)
    with whole_file(path) as file:
        picture.save(file, format="png", optimize=True)
    return path


def _picture(run: RecordedRun) -> Image.Image:
    """A row of two charts over a row of the last gallery's pairs: image, partner, mask, mixed sample."""
    by_title = {chart["title"]: chart for chart in charts(run.records)}
    step, gallery = max(run.galleries.items(), default=(0, None))
    columns = len(gallery.lam) if gallery else 0
    tile = min(_LARGEST_TILE, (_WIDTH - 2 * _MARGIN - _LABEL_WIDTH) // columns - _GAP) if columns else 0
    charts_height = 36 + _PLOT_HEIGHT + 32 + _LEGEND_LINES * _LEGEND_LINE
    height = 2 * _MARGIN + charts_height + (36 + 4 * (tile + _GAP) if columns else 0)
    picture = Image.new("RGB", (_WIDTH * _SCALE, height * _SCALE), "white")
    draw = ImageDraw.Draw(picture)
    plot_width = (_WIDTH - 3 * _MARGIN) // 2
    for column, title in enumerate(("Losses", "Top-1 accuracy")):
        left = _MARGIN + column * (plot_width + _MARGIN)
        _plot(draw, left, _MARGIN, plot_width, title, by_title.get(title))
    if columns:
        _strip(picture, draw, step, gallery, _MARGIN + charts_height, tile)
    return picture.resize((_WIDTH, height), Image.Resampling.LANCZOS)


def _write(
    draw: ImageDraw.ImageDraw,
    x: float,
    y: float,
    text: str,
    *,
    size: int = 14,
    color: str = "#5d6269",
    anchor: str = "ls",
) -> None:
    """Write a line of text at (x, y), in the picture's final pixels."""
    draw.text((x * _SCALE, y * _SCALE), text, font=ImageFont.load_default(size * _SCALE), fill=color, anchor=anchor)


def _plot(
    draw: ImageDraw.ImageDraw, left: float, top: float, width: float, title: str, chart: dict[str, Any] | None
) -> None:
    """A chart: its title, the curves over _PLOT_HEIGHT pixels, their names below."""
    _write(draw, left, top + 14, title, size=18, color="#1b1d20")
    if chart is None:
        _write(draw, left, top + 60, "nothing recorded yet")
        return
    unit = chart["unit"]
    curves = [[(x, y) for x, y in zip(s["x"], s["y"], strict=True) if y is not None] for s in chart["series"]]
    points = [point for curve in curves for point in curve]
    if not points:
        _write(draw, left, top + 60, "no finite value recorded yet")
        return
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    spare = 0.05 * ((high - low) or abs(high) or 1)
    low = max(low - spare, 0) if low >= 0 else low - spare
    high = min(high + spare, 1) if unit == "percent" and low < 1 else high + spare
    x0, x1, y0, y1 = left + 56, left + width, top + 36, top + 36 + _PLOT_HEIGHT

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / ((last - first) or 1)
        return (x0 + across * (x1 - x0)) * _SCALE, (y0 + (high - y) / (high - low) * (y1 - y0)) * _SCALE

    for value in ticks(low, high):
        y = at(first, value)[1] / _SCALE
        draw.line([(x0 * _SCALE, y * _SCALE), (x1 * _SCALE, y * _SCALE)], fill="#e3e5e8", width=_SCALE)
        _write(draw, x0 - 10, y, f"{value * 100:g} %" if unit == "percent" else f"{value:g}", anchor="rm")
    _write(draw, x0, y1 + 20, f"step {first:,}")
    _write(draw, x1, y1 + 20, f"{last:,}", anchor="rs")
    for i, (series, curve) in enumerate(zip(chart["series"], curves, strict=True)):
        color = CURVE_COLORS[i % len(CURVE_COLORS)]
        if chart["smooth"] and series["kind"] == "train":
            curve = _smooth(curve)
        if len(curve) > 1:
            draw.line([at(x, y) for x, y in curve], fill=color, width=2 * _SCALE, joint="curve")
        for x, y in (at(*point) for point in (curve if len(curve) <= 40 else ())):
            draw.ellipse([x - 3 * _SCALE, y - 3 * _SCALE, x + 3 * _SCALE, y + 3 * _SCALE], fill=color)
    x, y = x0, y1 + 48
    for i, series in enumerate(chart["series"]):
        room = 22 + draw.textlength(series["name"], font=ImageFont.load_default(14 * _SCALE)) / _SCALE
        if x > x0 and x + room > x1:
            x, y = x0, y + _LEGEND_LINE
        color = CURVE_COLORS[i % len(CURVE_COLORS)]
        draw.line([(x * _SCALE, y * _SCALE), ((x + 16) * _SCALE, y * _SCALE)], fill=color, width=3 * _SCALE)
        _write(draw, x + 22, y, series["name"], anchor="lm")
        x += room + 18


def _smooth(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The running mean that the page shows at its default setting."""
    total = weight = 0.0
    smoothed = []
    for x, y in curve:
        total, weight = 0.6 * total + 0.4 * y, 0.6 * weight + 0.4
        smoothed.append((x, total / weight))
    return smoothed


def _strip(picture: Image.Image, draw: ImageDraw.ImageDraw, step: int, gallery: Gallery, top: int, tile: int) -> None:
    """Pairs side by side: image, partner, mask and mixed sample below each other, `tile` pixels wide."""
    _write(draw, _MARGIN, top + 14, f"Masks at step {step:,}", size=18, color="#1b1d20")
    rows = {
        "image": gallery.images,
        "partner": gallery.partners,
        "mask": mask_colors(gallery.masks),
        "mixed": gallery.mixed,
    }
    for row, (name, pixels) in enumerate(rows.items()):
        y = top + 36 + row * (tile + _GAP)
        _write(draw, _MARGIN, y + tile / 2, name, anchor="lm")
        for column in range(len(pixels)):
            image = Image.fromarray(np.ascontiguousarray(pixels[column]))
            # Small images keep their pixels, photographs are reduced smoothly.
            method = Image.Resampling.NEAREST if image.width <= PNG_SIDE else Image.Resampling.LANCZOS
            image = image.resize((tile * _SCALE, tile * _SCALE), method)
            x = _MARGIN + _LABEL_WIDTH + column * (tile + _GAP)
            picture.paste(image, (x * _SCALE, y * _SCALE))
            # A mask that is white all over must not vanish.
            box = [x * _SCALE, y * _SCALE, (x + tile) * _SCALE - 1, (y + tile) * _SCALE - 1]
            draw.rectangle(box, outline="#e3e5e8", width=_SCALE)
