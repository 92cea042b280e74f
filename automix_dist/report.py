"""The page of a run: one self-contained HTML file.

It asks nothing of any network: style, script, data and pictures are inside it, and its content security policy forbids
the browser every request and every script but its own. Text from a run reaches it escaped, or as data.
"""

import base64
import hashlib
import html
import json
import statistics
import string
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from automix_dist.charts import charts, finite
from automix_dist.config import Config, flatten, to_dict
from automix_dist.metrics_file import accuracy_name, duration, percent, state_of
from automix_dist.page import NOTHING, PNG_SIDE, asset, empty, mask_uri, picture_uri, style_sheet, table
from automix_dist.recorded_run import RecordedRun, read_run
from automix_dist.whole_file import write_whole


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report page of the run in folder `run` to `out` (default: run/report.html); return its path.

    A run that is still going, or stopped halfway, is shown as far as it got, and the page says what is missing.
    Raises ReportError if `run` is not the folder of a run, OSError if the page cannot be written.
    """
    run = Path(run)
    page = _page(read_run(run))
    path = run / "report.html" if out is None else Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)
    return path


def _page(run: RecordedRun) -> str:
    data = {
        "charts": charts(run.records),
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


def _accuracies(run: RecordedRun) -> dict[str, list[tuple[float, int]]]:
    """Each top-1 and top-5 of the evaluations, in order: [(value, step)]."""
    found: dict[str, list[tuple[float, int]]] = {}
    for record in run.of("eval"):
        for key, value in record.items():
            number = finite(value)
            if accuracy_name(key) and number is not None:
                found.setdefault(key, []).append((number, record["step"]))
    return found


def _numbers(run: RecordedRun) -> list[tuple[str, str, str]]:
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
    speeds = [value for r in run.of("train") if (value := finite(r.get("images_per_second"))) is not None]
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


def _status(run: RecordedRun) -> tuple[str, str]:
    """How the run stands: (a word for the style, words for a person)."""
    state, _ = state_of(run.records)
    if state == "finished":
        return state, state
    if state in ("stopped", "failed"):
        return state, f"{state} at step {run.step:,}"
    total = run.started_with("total_steps")
    return state, f"not finished, step {run.step:,}" + (f" of {total:,}" if total else "")


def _number_card(name: str, value: str, remark: str) -> str:
    name, value, remark = html.escape(name), html.escape(value), html.escape(remark)
    return f"<div><dt>{name}</dt><dd>{value}<small>{remark}</small></dd></div>"


def _accuracy_table(run: RecordedRun) -> str:
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


def _events(run: RecordedRun) -> str:
    rows = []
    for record in run.records:
        if record["kind"] not in ("train", "eval"):
            details = {k: v for k, v in record.items() if k not in ("kind", "step", "time", "nonfinite")}
            time = str(record.get("time", "")).replace("T", " ")[:19]
            rows.append(
                (f"{record['step']:,}", record["kind"], time, ", ".join(f"{k} {v}" for k, v in _flatten(details)))
            )
    return table(rows, ("Step", "Event", "Time (UTC)", "Details")) or empty("Nothing has been recorded yet.")


def _most(run: RecordedRun, name: str) -> int:
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


def _gallery(run: RecordedRun) -> dict[str, Any] | None:
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
            "lam": finite(float(lam[i])),
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


def _class_name(run: RecordedRun, label: np.integer) -> str:
    return run.classes[label] if 0 <= label < len(run.classes) else f"class {label}"
