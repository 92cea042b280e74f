"""metrics.jsonl, what a run records: its lines, what they tell of the run, and how its values are said to a person.

It holds one JSON object a line. Every record has "kind", "step" and "time" (UTC, ISO 8601); kinds "train" and "eval"
have "epoch" and the values they were given, every other kind is an event ("start", "checkpoint", ...).
A number that is not finite is null, and the record's "nonfinite" says what it was: {"loss": "nan"}.
Accuracies are fractions in [0, 1] and have "top1" or "top5" in their name.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from automix_dist.gallery import GALLERY
from automix_dist.whole_file import whole_file

METRICS = "metrics.jsonl"
WAITING = 0.05
"""From this share of the time on that the device waits for data, the loader counts as what holds training up."""


def read_metrics(run: Path) -> tuple[list[dict[str, Any]], int]:
    """The records in a run's metrics.jsonl, in order, and how many lines could not be read.

    A line that a kill tore, or that is no record, is left out. Raises OSError if the file cannot be read.
    """
    records, unreadable = [], 0
    with (run / METRICS).open("rb") as file:
        for line in file:
            record = _parse(line)
            if record is not None:
                records.append(record)
            elif line.strip():
                unreadable += 1
    return records, unreadable


def cut_metrics(path: Path, start_step: int) -> None:
    """Keep the records up to start_step (none of a new training) and drop torn lines, in one rename."""
    if not path.exists():
        return
    with whole_file(path) as new, path.open("rb") as old:
        for line in old:
            record = _parse(line)
            if start_step and record is not None and record["step"] <= start_step:
                new.write(line.rstrip(b"\n") + b"\n")


def set_aside(run: Path) -> str:
    """Rename what a run has logged whose checkpoints are all lost: a new training would delete it.

    Returns what the new names begin with. Raises OSError.
    """
    lost = f"lost_{datetime.now():%Y%m%d_%H%M%S}"
    for name in (METRICS, GALLERY):
        if (run / name).exists():
            (run / name).rename(run / f"{lost}_{name}")
    return lost


def has_saved(run: Path) -> bool:
    """Whether a run has ever had a checkpoint, by its own account."""
    return (run / METRICS).is_file() and any(record["kind"] == "checkpoint" for record in read_metrics(run)[0])


def kinds_at(run: Path, step: int) -> set[str]:
    """The kinds of records that a run has of a step: a crash may have cost the last ones. Raises OSError."""
    if not (run / METRICS).is_file():
        return set()
    return {record["kind"] for record in read_metrics(run)[0] if record["step"] == step}


def is_foreign(run: Path) -> bool:
    """Whether the folder's metrics.jsonl is another program's. Raises OSError."""
    if not (run / METRICS).is_file():
        return False
    whole_lines = False  # of a new run's first one a kill may have left a part
    with (run / METRICS).open("rb") as file:
        for line in file:
            if _parse(line) is not None:
                return False
            whole_lines |= line.endswith(b"\n")
    return whole_lines


def is_finished(records: Sequence[dict[str, Any]]) -> bool:
    """Whether a run has come to its end: its last checkpoint is on disk."""
    total = next((r.get("total_steps") for r in reversed(records) if r["kind"] == "start"), None)
    return bool(total) and any(r["kind"] == "checkpoint" and r["step"] >= total for r in records)


def last_session(records: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The records from a run's last start on."""
    return records[max((i for i, record in enumerate(records) if record["kind"] == "start"), default=0) :]


def state_of(records: Sequence[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """How a run stands: "finished"; "stopped" or "failed", with the record of it; "open" if it trains or was killed."""
    if is_finished(records):
        return "finished", {}
    ends = [record for record in last_session(records) if record["kind"] in ("stopped", "failed")]
    return (ends[-1]["kind"], ends[-1]) if ends else ("open", {})


def accuracy_name(key: str) -> str:
    """Which accuracy a metric's key stands for, "top-1" or "top-5"; empty if for none."""
    if "top5" in key:
        return "top-5"
    return "top-1" if "top1" in key or "accuracy" in key else ""


def percent(fraction: float) -> str:
    return f"{fraction:.2%}".replace("%", " %")


def waiting(values: dict[str, Any]) -> str:
    """How much of its time a training waits for the loader, for the end of a line; nothing below WAITING."""
    share = values.get("loader_wait")
    return f" (waits for the loader {share:.0%})" if isinstance(share, int | float) and share >= WAITING else ""


def duration(seconds: float) -> str:
    """For a person, in two units."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    if hours:
        return f"{h} h {m:02d} min"
    return f"{m} min {s:02d} s" if m else f"{s} s"


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl as a record; None if it is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    step = record.get("step")
    return record if type(step) is int and 0 <= step < 2**53 else None
