"""Self-contained pages: their frame and style, and tables, diagrams and pictures as HTML.

A page asks nothing of any network: style and pictures are inside it. Texts are escaped here.
"""

import base64
import html
import io
import math
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from automix_dist.gallery import IMAGE_COLOR, PARTNER_COLOR, mask_colors
from automix_dist.metrics_file import percent
from automix_dist.whole_file import write_whole

MAX_SIDE = 160  # pixels of a picture in a page; larger ones are scaled down
PNG_SIDE = 64  # pictures up to this side are kept exact, larger ones become JPEG
NOTHING = "\N{EN DASH}"


def write_page(path: Path, overline: str, title: str, sections: dict[str, str]) -> Path:
    """Write a page of tables in the style of all pages: a section of HTML under each heading. Raises OSError."""
    body = "".join(f"<section><h2>{html.escape(heading)}</h2>{text}</section>" for heading, text in sections.items())
    page = string.Template(_PLAIN_PAGE).substitute(
        style=style_sheet(), overline=html.escape(overline), title=html.escape(title), body=body
    )
    write_whole(path, page)
    return path


_PLAIN_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$title · $overline</title>
<style>$style</style>
</head>
<body><main><p class="overline">$overline</p><h1>$title</h1>$body</main></body>
</html>
"""


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = (), style: str = "texts") -> str:
    """An HTML table; the first cell of each row is its heading. Empty if there are no rows.

    In the style "texts" the last column wraps; in "figures" none does.
    """
    body = "".join(
        f'<tr><th scope="row">{html.escape(first)}</th>'
        + "".join(f"<td>{html.escape(c)}</td>" for c in cells)
        + "</tr>"
        for first, *cells in rows
    )
    if not body:
        return ""
    heads = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    head_row = f"<thead><tr>{heads}</tr></thead>" if head else ""
    return f'<div class="scroll {style}"><table>{head_row}<tbody>{body}</tbody></table></div>'


def figures(cards: Iterable[Sequence[tuple[str, str]]], side: int) -> str:
    """Cards of pictures in a row, each a data URI and the words below it; `side` is of the pictures, in pixels."""
    shown = "".join(
        '<div class="card row">'
        + "".join(
            f'<figure><img src="{uri}" alt="{html.escape(text)}"><figcaption>{html.escape(text)}</figcaption></figure>'
            for uri, text in card
        )
        + "</div>"
        for card in cards
    )
    return f'<div class="rows{" small" if side <= PNG_SIDE else ""}">{shown}</div>'


def reliability(bins: list[dict[str, Any]]) -> str:
    """A diagram of accuracy over confidence: a bar for each bin, the more opaque the more images it has."""
    total, side, left, bottom = sum(each["images"] for each in bins), 320, 44, 40
    width = side / len(bins)
    parts = []
    for at in range(0, 101, 25):
        x, y = left + side * at / 100, side - side * at / 100 + 8
        parts.append(f'<line class="grid" x1="{left}" x2="{left + side}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{at} %</text>')
        parts.append(f'<text x="{x}" y="{side + 24}" text-anchor="middle">{at} %</text>')
    for i, each in enumerate(bins):
        if each["images"] and each["accuracy"] is not None:
            height = each["accuracy"] * side
            text = (
                f"{each['images']:,} images, confidence {percent_or_nothing(each['confidence'])}, "
                f"accuracy {percent_or_nothing(each['accuracy'])}"
            )
            opacity = 0.3 + 0.7 * each["images"] / total
            parts.append(
                f'<rect x="{left + i * width:.1f}" y="{side - height + 8:.1f}" width="{width - 1:.1f}" '
                f'height="{height:.1f}" fill="var(--accent)" opacity="{opacity:.2f}"><title>{text}</title></rect>'
            )
    parts.append(f'<line class="even" x1="{left}" y1="{side + 8}" x2="{left + side}" y2="8"/>')
    parts.append(f'<text x="{left + side / 2}" y="{side + bottom + 2}" text-anchor="middle">confidence</text>')
    hint = "Accuracy over confidence: on the dashed line accuracy equals confidence."
    return (
        f'<p class="hint">{hint}</p><svg class="card figure" viewBox="0 0 {left + side + 24} {side + bottom + 8}" '
        f'width="{left + side + 24}" role="img" aria-label="Reliability diagram">{"".join(parts)}</svg>'
    )


def percent_or_nothing(fraction: float | None) -> str:
    return NOTHING if fraction is None else percent(fraction)


def empty(text: str) -> str:
    return f'<p class="empty">{html.escape(text)}</p>'


def ticks(low: float, high: float) -> list[float]:
    """About five round values between low and high."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def picture_uri(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3] as a data URI: PNG if small, else JPEG."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return _encode(image, "png") if max(pixels.shape[:2]) <= PNG_SIDE else _encode(image, "jpeg", quality=90)


def mask_uri(mask: np.ndarray) -> str:
    """Float [H, W] in [0, 1] as a data URI: a PNG with a palette of 256 shades."""
    levels = np.clip(np.nan_to_num(mask.astype(np.float32)) * 255, 0, 255).round().astype(np.uint8)
    image = Image.fromarray(levels)
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BOX)
    image.putpalette(mask_colors(np.arange(256) / 255).tobytes())
    return _encode(image, "png")


def _encode(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, optimize=True, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def asset(name: str) -> str:
    """The text of a file of the page that lies beside this one."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def style_sheet() -> str:
    """The style sheet that all pages share."""
    colors = {"IMAGE_COLOR": IMAGE_COLOR, "PARTNER_COLOR": PARTNER_COLOR}
    text = asset("page.css")
    for name, color in colors.items():
        text = text.replace(name, " ".join(map(str, color)))
    return text
