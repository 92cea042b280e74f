"""What can be read of a run's folder while it trains and after: its records, settings and galleries."""

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from automix_dist.errors import AutomixError
from automix_dist.gallery import Gallery, gallery_files, gallery_step, read_gallery
from automix_dist.metrics_file import METRICS, read_metrics, state_of

MAX_GALLERIES = 24  # steps of the page's slider
MAX_PAIRS = 12


class ReportError(AutomixError, ValueError):
    """A folder that a report cannot be made of; the message says why."""


@dataclass
class RecordedRun:
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


def read_run(folder: Path) -> RecordedRun:
    """The run in a folder. Raises ReportError if there is none."""
    check_run_folder(folder)
    run = RecordedRun(folder.resolve().name)
    _load_records(run, folder)
    run.config = _load_text(run, folder / "config.yaml", yaml.safe_load, dict) or {}
    run.environment = _load_text(run, folder / "environment.json", json.loads, dict) or {}
    classes = run.environment.pop("classes", None)
    run.classes = [str(name) for name in classes] if isinstance(classes, list) else []
    _load_gallery(run, folder)
    return run


def _load_records(run: RecordedRun, folder: Path) -> None:
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


def _load_text(run: RecordedRun, path: Path, parse: Any, kind: type) -> Any:
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


def _load_gallery(run: RecordedRun, folder: Path) -> None:
    files = gallery_files(folder)
    if len(files) > MAX_GALLERIES:
        files = [files[round(i * (len(files) - 1) / (MAX_GALLERIES - 1))] for i in range(MAX_GALLERIES)]
    for path in files:
        try:
            run.galleries[gallery_step(path)] = read_gallery(path, MAX_PAIRS)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            run.notes.append(f"gallery/{path.name} could not be read and was left out.")
    if not run.galleries:
        run.notes.append("There is no gallery of image pairs and masks yet.")
