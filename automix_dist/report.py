"""Pages and pictures of a run: one self-contained HTML file, and one PNG for a README.

The page asks nothing of any network: style, script, data and pictures are inside it, and its content security policy
forbids the browser every request and every script but its own. Text from a run reaches it escaped, or as data.
"""

import base64
import hashlib
import html
import json
import math
import re
import statistics
import string
import zipfile
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFont

from automix_dist.config import Config, flatten, to_dict
from automix_dist.errors import AutomixError
from automix_dist.gallery import Gallery, gallery_files, gallery_step, mask_colors, read_gallery
from automix_dist.metrics_file import METRICS, accuracy_name, duration, percent, read_metrics, state_of
from automix_dist.page import NOTHING, PNG_SIDE, asset, empty, mask_uri, picture_uri, style_sheet, table, ticks
from automix_dist.whole_file import whole_file, write_whole

MAX_POINTS = 1500  # of a curve; more records are averaged in groups, which a screen cannot tell apart
MAX_FRAMES = 24  # steps of the gallery's slider
MAX_PAIRS = 12
CURVE_COLORS = ("#0072b2", "#d55e00", "#009e73", "#b5568c", "#52565c", "#56b4e9", "#e69f00")


class ReportError(AutomixError, ValueError):
    """A folder that a report cannot be made of; the message says why."""


@dataclass
class _Run:
    """What could be read of a run's folder, and what could not."""

    name: str
    records: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    galleries: dict[int, Gallery] = field(default_factory=dict)
    """By rising step."""
    notes: list[str] = field(default_factory=list)
    """One sentence for each thing that is missing or broken."""

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]

    @property
    def step(self) -> int:
        return max((record["step"] for record in self.records), default=0)

    def started_with(self, key: str) -> int:
        """What the last start of the training said of `key`; 0 if nothing."""
        values = [record.get(key) for record in self.of("start")]
        return next((value for value in reversed(values) if isinstance(value, int)), 0)


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report page of the run in folder `run` to `out` (default: run/report.html); return its path.

    A run that is still going, or stopped halfway, is shown as far as it got, and the page says what is missing.
    Raises ReportError if `run` is not the folder of a run, OSError if the page cannot be written.
    """
    run = Path(run)
    page = _page(_load(run))
    path = run / "report.html" if out is None else Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)
    return path


def write_picture(run: Path, out: Path | None = None) -> Path:
    """Draw the losses, the top-1 accuracy, and the last pairs with their masks and mixed samples to `out` (default:
    run/summary.png); return its path.

    Raises ReportError if `run` is not the folder of a run, OSError if the picture cannot be written.
    """
    run = Path(run)
    picture = _picture(_load(run))
    path = run / "summary.png" if out is None else Path(out)
    with whole_file(path) as file:
        picture.save(file, format="png", optimize=True)
    return path


# Reading a run


def check_run_folder(folder: Path) -> None:
    """Raise ReportError if there is no run in the folder."""
    if not folder.is_dir():
        raise ReportError(f"no such run: {folder}")
    if (folder / "compare.html").is_file():
        raise ReportError(
            f"{folder} holds a comparison, whose page is {folder / 'compare.html'}: expected one of its runs"
        )
    if not (folder / METRICS).is_file() and not (folder / "config.yaml").is_file():
        raise ReportError(f"{folder} is not the folder of a run: it has neither {METRICS} nor config.yaml")


def _load(folder: Path) -> _Run:
    check_run_folder(folder)
    run = _Run(folder.resolve().name)
    _load_records(run, folder)
    run.config = _load_text(run, folder / "config.yaml", yaml.safe_load, dict) or {}
    run.environment = _load_text(run, folder / "environment.json", json.loads, dict) or {}
    classes = run.environment.pop("classes", None)
    run.classes = [str(name) for name in classes] if isinstance(classes, list) else []
    _load_gallery(run, folder)
    return run


def _load_records(run: _Run, folder: Path) -> None:
    if not (folder / METRICS).is_file():
        run.notes.append(f"There is no {METRICS} yet, so there are no numbers and no curves.")
        return
    run.records, unreadable = read_metrics(folder)
    if unreadable:
        run.notes.append(f"{_count(unreadable, 'line')} of {METRICS} could not be read; left out.")
    if not run.of("train"):
        run.notes.append("No training step has been recorded yet.")
    if not run.of("eval"):
        run.notes.append("No evaluation has been recorded yet, so there is no validation accuracy.")
    state, record = state_of(run.records)
    if state == "failed":
        run.notes.append(f"The training failed: {record.get('error')}")
    for key, steps in _nonfinite(run.records).items():
        run.notes.append(
            f"{key} was not a finite number in {_count(len(steps), 'record')}, first at step {steps[0]:,}."
        )


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'s' * (number != 1)}"


def _nonfinite(records: list[dict[str, Any]]) -> dict[str, list[int]]:
    steps: dict[str, list[int]] = {}
    for record in records:
        nonfinite = record.get("nonfinite")
        for key in nonfinite if isinstance(nonfinite, dict) else ():
            steps.setdefault(key, []).append(record["step"])
    return steps


def _load_text(run: _Run, path: Path, parse: Any, kind: type) -> Any:
    """A parsed file, or None and a note if it is missing or not what it should be."""
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        run.notes.append(f"{path.name} is missing.")
        return None
    except (OSError, ValueError, yaml.YAMLError):
        value = None
    if not isinstance(value, kind):
        run.notes.append(f"{path.name} could not be read.")
        return None
    return value


def _load_gallery(run: _Run, folder: Path) -> None:
    files = gallery_files(folder)
    if len(files) > MAX_FRAMES:
        files = [files[round(i * (len(files) - 1) / (MAX_FRAMES - 1))] for i in range(MAX_FRAMES)]
    for path in files:
        try:
            run.galleries[gallery_step(path)] = read_gallery(path, MAX_PAIRS)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            run.notes.append(f"gallery/{path.name} could not be read and was left out.")
    if not run.galleries:
        run.notes.append("There is no gallery of image pairs and masks yet.")


# Curves and numbers

_CHARTS = (  # title, unit, whether its training values scatter, which keys; the first that matches takes a key
    ("Top-1 accuracy", "percent", True, lambda key: accuracy_name(key) == "top-1"),
    ("Top-5 accuracy", "percent", True, lambda key: accuracy_name(key) == "top-5"),
    ("Losses", "", True, lambda key: bool(re.search(r"^loss(?!_scale$)|_loss$", key))),
    ("Mask area", "percent", True, lambda key: key.startswith("mask_area")),
    ("Learning rate", "", False, lambda key: bool(re.search(r"(^|_)lr$", key))),
    ("Momentum", "", False, lambda key: key == "momentum"),
    ("Mask loss weight", "", False, lambda key: key == "mask_loss_weight"),
    ("Loss scale", "", False, lambda key: key == "loss_scale"),
    ("Gradient norm", "", True, lambda key: key == "grad_norm"),
    ("Throughput", "images/s", True, lambda key: key == "images_per_second"),
    ("Waiting for the loader", "percent", True, lambda key: key == "loader_wait"),
    ("Peak memory", "GiB", False, lambda key: key == "memory_gib"),
)


def _charts(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Charts of whatever keys the records have: {title, unit, smooth, series: [{name, kind, x, y}]}.

    A key that no chart takes has its own. y is None where the value is not finite. In a chart with `smooth`, series of
    kind "train" are smoothed.
    """
    series: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        if record["kind"] not in ("train", "eval"):
            continue
        nonfinite = record.get("nonfinite")
        for key, value in record.items():
            known_bad = isinstance(nonfinite, dict) and key in nonfinite
            if key in ("kind", "step", "epoch", "time", "nonfinite") or not (known_bad or _is_number(value)):
                continue
            curve = series.setdefault((record["kind"], key), {"name": key, "kind": record["kind"], "x": [], "y": []})
            curve["x"].append(record["step"])
            curve["y"].append(None if known_bad else _finite(value))
    charts: dict[str, dict[str, Any]] = {row[0]: _chart(*row[:3]) for row in _CHARTS}
    # Validation comes first among accuracies, training first elsewhere: the first curves have the clearest colours.
    in_order = sorted(series.items(), key=lambda item: (item[0][0] == "train") == bool(accuracy_name(item[0][1])))
    for (kind, key), curve in in_order:
        if ("eval" if kind == "train" else "train", key) in series:
            curve["name"] = f"{key} ({'training' if kind == 'train' else 'validation'})"
        title = next((title for title, *_, takes in _CHARTS if takes(key)), key.replace("_", " ").capitalize())
        charts.setdefault(title, _chart(title, "", True))["series"].append(_thin(curve))
    return [chart for chart in charts.values() if chart["series"]]


def _chart(title: str, unit: str, smooth: bool) -> dict[str, Any]:
    return {"title": title, "unit": unit, "smooth": smooth, "series": []}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: Any) -> float | None:
    """A number as float; None if it is not a finite one, or no number."""
    try:
        return float(value) if _is_number(value) and math.isfinite(value) else None
    except OverflowError:
        return None


def _thin(curve: dict[str, Any]) -> dict[str, Any]:
    """The curve with at most MAX_POINTS points, each the mean of a group of neighbours."""
    x, y = curve["x"], curve["y"]
    size = -(-len(x) // MAX_POINTS)
    if size > 1:
        groups = [[v for v in y[i : i + size] if v is not None] for i in range(0, len(y), size)]
        curve["y"] = [statistics.fmean(group) if group else None for group in groups]
        curve["x"] = [x[min(i + size, len(x)) - 1] for i in range(0, len(x), size)]
    curve["y"] = [None if v is None else float(f"{v:.6g}") for v in curve["y"]]
    return curve


def _accuracies(run: _Run) -> dict[str, list[tuple[float, int]]]:
    """Each top-1 and top-5 of the evaluations, in order: [(value, step)]."""
    found: dict[str, list[tuple[float, int]]] = {}
    for record in run.of("eval"):
        for key, value in record.items():
            number = _finite(value)
            if accuracy_name(key) and number is not None:
                found.setdefault(key, []).append((number, record["step"]))
    return found


def _numbers(run: _Run) -> list[tuple[str, str, str]]:
    """The figures at the top of the page: (name, value, remark)."""
    top1 = {key: values for key, values in _accuracies(run).items() if accuracy_name(key) == "top-1"}
    momentum = next((key for key in top1 if "momentum" in key), None)
    query = next((key for key in top1 if "momentum" not in key), None)
    numbers = []
    for name, key in (("Query top-1", query), ("Momentum top-1", momentum)):
        if top1 and key is None:  # a plain classifier without a moving average
            continue
        last = (percent(top1[key][-1][0]), f"{key}, last") if key else (NOTHING, "no evaluation yet")
        numbers.append((name, *last))
    fixed = {"top1_query": top1["top1_query"]} if "top1_query" in top1 else top1  # no choosing among heads
    best = max(((value, -step, key) for key, values in fixed.items() for value, step in values), default=None)
    if best:
        numbers.append(("Best top-1", percent(best[0]), f"{best[2]}, step {-best[1]:,}"))
    total = run.started_with("total_steps")
    numbers.append(("Steps", f"{run.step:,}", f"of {total:,}" if total else ""))
    speeds = [value for r in run.of("train") if (value := _finite(r.get("images_per_second"))) is not None]
    speed = f"{statistics.median(speeds):,.0f}" if speeds else NOTHING
    numbers.append(("Images per second", speed, "median while training"))
    seconds = _seconds(run.records)
    numbers.append(("Time", NOTHING if seconds is None else duration(seconds), "evaluations included"))
    return numbers


def _seconds(records: list[dict[str, Any]]) -> float | None:
    """Seconds of work: from each start to the last record of its session, so that pauses do not count."""
    total, start, last = 0.0, None, None
    for record in records:
        try:
            now = datetime.fromisoformat(record.get("time", "")).timestamp()
        except (TypeError, ValueError, OverflowError):
            continue
        if record["kind"] == "start":
            total += 0 if start is None else last - start
            start = now
        start = now if start is None else start
        last = now
    return None if start is None else max(total + last - start, 0)


def _status(run: _Run) -> tuple[str, str]:
    """How the run stands: (a word for the style, words for a person)."""
    state, _ = state_of(run.records)
    if state == "finished":
        return state, state
    if state in ("stopped", "failed"):
        return state, f"{state} at step {run.step:,}"
    total = run.started_with("total_steps")
    return state, f"not finished, step {run.step:,}" + (f" of {total:,}" if total else "")


# The page


def _page(run: _Run) -> str:
    data = {
        "charts": _charts(run.records),
        "stepsPerEpoch": run.started_with("steps_per_epoch"),
        "gallery": _gallery(run),
    }
    state, status = _status(run)
    script = asset("report.js")
    return string.Template(asset("report.html")).substitute(
        policy=_policy(script),
        style=style_sheet(),
        script=script,
        # In JSON a "<" can only stand in a string, so that no text of a run can end the script element.
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        name=html.escape(run.name),
        state=state,
        status=html.escape(status),
        notes=_notes(run.notes),
        numbers="".join(_number_card(*number) for number in _numbers(run)),
        accuracies=_accuracy_table(run),
        pairs="".join(_pair_card(pair) for pair in range(_most(run, "lam"))),
        sweep=_sweep_card(_most(run, "sweep_lam")),
        events=_events(run),
        config=_config(run.config),
        environment=table(_flatten(run.environment)) or empty("There is no environment.json."),
    )


def _policy(script: str) -> str:
    """The page's content security policy: nothing is fetched, and no script runs but the page's own."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _notes(notes: list[str]) -> str:
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return f'<ul class="notes" aria-label="Notes">{items}</ul>' if items else ""


def _number_card(name: str, value: str, remark: str) -> str:
    name, value, remark = html.escape(name), html.escape(value), html.escape(remark)
    return f"<div><dt>{name}</dt><dd>{value}<small>{remark}</small></dd></div>"


def _accuracy_table(run: _Run) -> str:
    """A row for each head of each encoder, named as what its keys have beside "top1" and "top5"."""
    found = _accuracies(run)
    rows = []
    for key, values in found.items():
        if accuracy_name(key) == "top-1":
            best, step = max(values, key=lambda item: (item[0], -item[1]))
            top5 = found.get(key.replace("top1", "top5"))
            name = key.replace("top1", "").strip("_ ") or key
            last5 = percent(top5[-1][0]) if top5 else NOTHING
            rows.append((name, percent(values[-1][0]), percent(best), f"{step:,}", last5))
    return table(rows, ("Head", "Top-1", "Best", "At step", "Top-5"), "figures")


def _flatten(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text)."""
    return [(key, _text(value)) for key, value in flatten(values).items()]


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _config(config: dict[str, Any]) -> str:
    """The settings by section; those that differ from the defaults are marked."""
    if not config:
        return empty("There is no config.yaml.")
    defaults = dict(_flatten(to_dict(Config())))
    sections = {"run": {key: value for key, value in config.items() if not isinstance(value, dict)}}
    sections |= {str(key): value for key, value in config.items() if isinstance(value, dict)}
    cards = []
    for name, values in sections.items():
        rows = "".join(
            f"<div{' class=changed' if defaults.get(key if name == 'run' else f'{name}.{key}') != value else ''}>"
            f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd></div>"
            for key, value in _flatten(values)
        )
        cards.append(f'<section class="card"><h3>{html.escape(name)}</h3><dl class="settings">{rows}</dl></section>')
    return f'<p class="hint">A dot marks what differs from the default.</p><div class="columns">{"".join(cards)}</div>'


def _events(run: _Run) -> str:
    rows = []
    for record in run.records:
        if record["kind"] not in ("train", "eval"):
            details = {k: v for k, v in record.items() if k not in ("kind", "step", "time", "nonfinite")}
            time = str(record.get("time", "")).replace("T", " ")[:19]
            rows.append(
                (f"{record['step']:,}", record["kind"], time, ", ".join(f"{k} {v}" for k, v in _flatten(details)))
            )
    return table(rows, ("Step", "Event", "Time (UTC)", "Details")) or empty("Nothing has been recorded yet.")


def _most(run: _Run, name: str) -> int:
    """The largest number of entries that an array of the gallery has at any step."""
    return max((len(getattr(gallery, name)) for gallery in run.galleries.values()), default=0)


def _pair_card(pair: int) -> str:
    tiles = "".join(_tile("pairs", pair, kind) for kind in ("image", "partner", "mask", "mixed"))
    return f'<div class="card pair">{tiles}</div>'


def _sweep_card(count: int) -> str:
    """The first pair for so many lambdas: masks above, mixed samples below."""
    if not count:
        return ""
    tiles = "".join(_tile("sweep", i, kind) for kind in ("mask", "mixed") for i in range(count))
    grid = f'<div class="sweep" style="--columns: {count}">{tiles}</div>'
    return f'<h3>The first pair, for λ from 0 to 1</h3><div class="card scroll">{grid}</div>'


def _tile(group: str, index: int, kind: str) -> str:
    """A place for a picture of the gallery, which the page's script fills for the chosen step."""
    return (
        f'<figure><img data-group="{group}" data-index="{index}" data-kind="{kind}" alt="{kind} {index + 1}">'
        f"<figcaption></figcaption></figure>"
    )


def _gallery(run: _Run) -> dict[str, Any] | None:
    """The gallery for the page's script: each picture once as a data URI, and for each step what is shown by number."""
    if not run.galleries:
        return None
    pictures: dict[str, int] = {}

    def picture(uri: str) -> int:
        return pictures.setdefault(uri, len(pictures))

    def mix(masks: np.ndarray, mixed: np.ndarray, lam: np.ndarray, i: int) -> dict[str, Any]:
        return {
            "mask": picture(mask_uri(masks[i])),
            "mixed": picture(picture_uri(mixed[i])),
            "lam": _finite(float(lam[i])),
            "area": float(np.mean(np.nan_to_num(masks[i].astype(np.float32)))),
        }

    small = all(gallery.images.shape[1] <= PNG_SIDE for gallery in run.galleries.values())
    frames = []
    for step, gallery in run.galleries.items():
        pairs = [
            {
                "image": picture(picture_uri(gallery.images[p])),
                "partner": picture(picture_uri(gallery.partners[p])),
                "label": _class_name(run, gallery.labels[p]),
                "partnerLabel": _class_name(run, gallery.partner_labels[p]),
                **mix(gallery.masks, gallery.mixed, gallery.lam, p),
            }
            for p in range(len(gallery.lam))
        ]
        sweep = (gallery.sweep_masks, gallery.sweep_mixed, gallery.sweep_lam)
        frames.append({"step": step, "pairs": pairs, "sweep": [mix(*sweep, i) for i in range(len(gallery.sweep_lam))]})
    return {"frames": frames, "pictures": list(pictures), "small": small}


def _class_name(run: _Run, label: np.integer) -> str:
    return run.classes[label] if 0 <= label < len(run.classes) else f"class {label}"


# The picture

_SCALE = 2  # drawn at twice the size, then reduced: PIL draws no smooth lines itself
_WIDTH, _MARGIN, _PLOT_HEIGHT, _LEGEND_LINE, _GAP = 1200, 40, 260, 24, 8
_LEGEND_LINES = 3
_LABEL_WIDTH = 72  # of the gallery's row names
_LARGEST_TILE = 140


def _picture(run: _Run) -> Image.Image:
    """A row of two charts over a row of the last gallery's pairs: image, partner, mask, mixed sample."""
    charts = {chart["title"]: chart for chart in _charts(run.records)}
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
        _plot(draw, left, _MARGIN, plot_width, title, charts.get(title))
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
