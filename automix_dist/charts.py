"""The curves of a run's records, grouped into charts, of no more points than a screen can show."""

import math
import re
import statistics
from typing import Any

from automix_dist.metrics_file import accuracy_name

MAX_POINTS = 1500  # of a curve; more records are averaged in groups, which a screen cannot tell apart

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


def charts(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
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
            curve["y"].append(None if known_bad else finite(value))
    by_title: dict[str, dict[str, Any]] = {row[0]: _chart(*row[:3]) for row in _CHARTS}
    # Validation comes first among accuracies, training first elsewhere: the first curves have the clearest colours.
    in_order = sorted(series.items(), key=lambda item: (item[0][0] == "train") == bool(accuracy_name(item[0][1])))
    for (kind, key), curve in in_order:
        if ("eval" if kind == "train" else "train", key) in series:
            curve["name"] = f"{key} ({'training' if kind == 'train' else 'validation'})"
        title = next((title for title, *_, takes in _CHARTS if takes(key)), key.replace("_", " ").capitalize())
        by_title.setdefault(title, _chart(title, "", True))["series"].append(_thin(curve))
    return [chart for chart in by_title.values() if chart["series"]]


def _chart(title: str, unit: str, smooth: bool) -> dict[str, Any]:
    return {"title": title, "unit": unit, "smooth": smooth, "series": []}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def finite(value: Any) -> float | None:
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
