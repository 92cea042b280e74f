"""A run at a glance in a terminal, from its metrics.jsonl: for a look over ssh while it trains."""

import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from automix_dist.errors import stop_reason
from automix_dist.metrics_file import (
    METRICS,
    accuracy_name,
    duration,
    last_session,
    percent,
    read_metrics,
    state_of,
    waiting,
)
from automix_dist.recorded_run import check_run_folder

RECENT = 20
"""Training records that the time left is judged by."""
SILENT_SECONDS = 120
CLEAR = "\x1b[H\x1b[2J"


def watch(run: Path, *, once: bool, seconds: float = 2.0, say: Callable[[str], object] = print) -> None:
    """Show the run, and again every so many seconds until it has finished or Ctrl-C.

    Raises ReportError if there is no run in the folder.
    """
    check_run_folder(run)
    while True:
        began = time.monotonic()
        lines, finished = describe(run, datetime.now(UTC))
        clear = CLEAR if sys.stdout.isatty() and not once else ""
        say(clear + "\n".join(lines))
        if once or finished:
            return
        time.sleep(max(seconds, 10 * (time.monotonic() - began)))  # a long run's records take seconds to read


def describe(run: Path, now: datetime) -> tuple[list[str], bool]:
    """What there is to say of a run, line by line, and whether it has finished."""
    # A line that is being written is left out until it is whole.
    records = read_metrics(run)[0] if (run / METRICS).is_file() else []
    if not records:
        return [f"{run}: nothing recorded yet"], False
    session = last_session(records)
    last_of = {record["kind"]: record for record in records}
    state, end = state_of(records)
    finished = state == "finished"
    lines = [
        f"{run}: {_state(state, end or records[-1], now)}",
        _place(session, finished),
        _values("train", last_of.get("train"), lambda key: key.startswith("loss")),
        _values("top-1", last_of.get("eval"), lambda key: accuracy_name(key) == "top-1"),
        _speed(last_of.get("train")),
        _saved(last_of.get("checkpoint"), now),
        *_trouble(records),
    ]
    return [line for line in lines if line], finished


def _state(state: str, last: dict[str, Any], now: datetime) -> str:
    if state == "finished":
        return state
    if state == "stopped":
        return f"stopped by {stop_reason(last.get('signal'))}; continue with --resume"
    if state == "failed":
        return f"failed: {last.get('error')}"
    age = _age(last, now)
    if age is None:
        return "training"
    return f"training, last record {duration(age)} ago" + (" (silent)" if age > SILENT_SECONDS else "")


def _place(session: Sequence[dict[str, Any]], finished: bool) -> str:
    start, step = session[0], session[-1]["step"]
    total, per_epoch = start.get("total_steps", 0), start.get("steps_per_epoch", 0)
    if not (total and per_epoch):
        return f"step {step:,}"
    text = f"step {step:,} of {total:,} ({step / total:.0%})"
    text += f", epoch {max(-(-step // per_epoch), 1)} of {-(-total // per_epoch)}"
    trained = [record for record in session if record["kind"] == "train"]
    recent = [(r["step"], moment) for r in trained[-RECENT:] if (moment := _moment(r)) is not None]
    if finished or len(recent) < 2 or recent[-1][0] == recent[0][0]:
        return text
    per_step = (recent[-1][1] - recent[0][1]).total_seconds() / (recent[-1][0] - recent[0][0])
    return f"{text}, {duration(max(per_step, 0) * (total - step))} left"


def _values(title: str, record: dict[str, Any] | None, wanted: Callable[[str], bool]) -> str:
    """The wanted values of a record in a line; a value that is not finite by its name."""
    if record is None:
        return ""
    nonfinite = record.get("nonfinite") or {}
    shown = []
    for key in filter(wanted, record):
        value = record[key]
        if isinstance(value, int | float):
            name = key.replace("top1_", "")
            shown.append(f"{name} {percent(value) if accuracy_name(key) else f'{value:.4g}'}")
        elif key in nonfinite:
            shown.append(f"{key} {nonfinite[key]}")
    return f"{title:<10} {', '.join(shown)}  (step {record['step']:,})" if shown else ""


def _speed(record: dict[str, Any] | None) -> str:
    if record is None:
        return ""
    parts = []
    if isinstance(record.get("images_per_second"), int | float):
        parts.append(f"{record['images_per_second']:,.0f} images/s{waiting(record)}")
    if isinstance(record.get("memory_gib"), int | float):
        parts.append(f"{record['memory_gib']:.2f} GiB")
    if isinstance(record.get("lr"), int | float):
        parts.append(f"lr {record['lr']:.3g}")
    return f"{'speed':<10} {', '.join(parts)}" if parts else ""


def _saved(record: dict[str, Any] | None, now: datetime) -> str:
    if record is None:
        return f"{'checkpoint':<10} none yet"
    age = _age(record, now)
    ago = "" if age is None else f", {duration(age)} ago"
    return f"{'checkpoint':<10} step {record['step']:,}{ago}"


def _trouble(records: list[dict[str, Any]]) -> list[str]:
    """Skipped steps, replaced images, stragglers: a line for each that there has been."""
    lines = []
    skipped = next((r["skipped_steps"] for r in reversed(records) if r.get("skipped_steps") is not None), 0)
    if skipped:
        lines.append(f"{'skipped':<10} {skipped:,.0f} steps that were not finite, in this session")
    replaced = [r for r in records if r["kind"] == "skipped"]
    if replaced:
        lines.append(f"{'damaged':<10} {replaced[-1].get('images', 0):,} training images replaced")
    stragglers = [r for r in records if r["kind"] == "straggler"]
    if stragglers:
        lines.append(f"{'straggler':<10} {stragglers[-1].get('text', '')}  (step {stragglers[-1]['step']:,})")
    return lines


def _moment(record: dict[str, Any]) -> datetime | None:
    try:
        moment = datetime.fromisoformat(record.get("time", ""))
    except (TypeError, ValueError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _age(record: dict[str, Any], now: datetime) -> float | None:
    moment = _moment(record)
    return None if moment is None else max((now - moment).total_seconds(), 0)
