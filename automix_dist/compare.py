"""Several policies over several seeds with equal budgets: trains what is missing, and writes one table.

A comparison's file:

    base: digits/automix_resnet10.yaml   # relative to the file; the settings that all runs share
    output: runs/digits_compare          # a folder for each run, and the table
    seeds: [0, 1, 2, 3, 4]
    metric: top1_query                   # of the last evaluation, so that nothing is chosen on the validation set
    settings: [epochs=6]                 # over the base's, for all runs
    policies:                            # the first is what the others are tested against
      none: [policy.name=none]           # name: settings over the shared ones
      automix: []
"""

import html
import json
import os
import re
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from scipy import stats

from automix_dist.backbone import pretrained_not_loaded
from automix_dist.beton import read_manifest
from automix_dist.config import Config, ConfigError, flatten, to_dict
from automix_dist.config_file import load_config, parse_yaml
from automix_dist.distributed import for_this_machine
from automix_dist.errors import EXIT_STOPPED, AutomixError, first_line, some
from automix_dist.metrics_file import METRICS, is_finished, read_metrics
from automix_dist.model import new_model, without_weights
from automix_dist.page import percent_or_nothing, table, ticks, write_page
from automix_dist.policy import with_policy_settings
from automix_dist.whole_file import write_whole

BUDGET = {"epochs", "batch_size", "eval_every_epochs", "model", "data"}
"""Settings and sections that are the same in all runs of a fair comparison, all but those of FREE."""
SPEED_ONLY = {"data.workers", "data.batches_ahead", "eval_batch_size"}
FREE = {"model.drop_path", *SPEED_ONLY}
"""Regularisation that a recipe chooses for its policy, and what changes the speed only."""
IRRELEVANT = {"output", "log", "checkpoint", "engine", "profile"}
"""Settings and sections that may differ from those of a finished run without changing its result, as may SPEED_ONLY;
not so those of RELEVANT."""
RELEVANT = {"engine.precision", "engine.sync_batchnorm", "engine.accumulation_steps"}
MUST_AGREE = {"device": "device", "autocast": "precision", "world_size": "number of ranks"}
"""What runs of one comparison share besides their settings, which leave it to the machine; and its name for people."""
HEAD = ("Policy", "Runs", "Mean", "Standard deviation", "Difference", "p")


class CompareError(AutomixError, RuntimeError):
    """A run of a comparison failed; the message says which."""


@dataclass(frozen=True)
class Comparison:
    """Runs that differ in nothing but the policy and the seed."""

    base: Path
    """The config file of all."""
    output: Path
    """The comparison's folder; each run has one in it."""
    seeds: tuple[int, ...]
    metric: str
    """The key of the evaluations that is compared."""
    policies: dict[str, tuple[str, ...]]
    """The settings of each policy, the shared ones included."""

    def run(self, policy: str, seed: int) -> Path:
        return self.output / f"{policy}_seed{seed}"

    def overrides(self, policy: str, seed: int) -> list[str]:
        return [*self.policies[policy], f"seed={seed}", f"output={self.run(policy, seed)}"]


def load_comparison(path: Path, overrides: Sequence[str] = ()) -> Comparison:
    """Read and check a comparison's file. Raises ConfigError, also for settings that give runs unequal budgets.

    `overrides`: section.key=value over the shared settings, and output=FOLDER for the comparison's own folder.
    """
    try:
        values = parse_yaml(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read comparison {path}: {first_line(error)}") from error
    known = {"base": str, "output": str, "seeds": list, "metric": str, "settings": list, "policies": dict}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected the keys {', '.join(known)}")
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key}: expected some of {', '.join(known)} (docs/evaluation.md)")
        if not isinstance(value, known[key]):
            kind = {str: "text", list: "a list, as [0, 1]", dict: "a section of name: [settings]"}[known[key]]
            raise ConfigError(f"{path}: {key} = {value!r}: expected {kind}")
    shared = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "output":
            values["output"] = value
        elif key in (*known, "seed"):
            kept = "seeds" if key == "seed" else key
            raise ConfigError(f"{override}: expected a setting of the runs, or output; {kept} is set in {path}")
        else:
            shared.append(override)
    for key in ("base", "output", "seeds", "policies"):
        if not values.get(key):
            raise ConfigError(f"{path}: {key} is missing or empty")
    if not all(type(seed) is int for seed in values["seeds"]) or len(set(values["seeds"])) < len(values["seeds"]):
        raise ConfigError(f"{path}: seeds = {values['seeds']!r}: expected different whole numbers")
    shared = [*values.get("settings", []), *shared]
    for name, settings in values["policies"].items():
        if not re.fullmatch(r"[\w.-]+", str(name)):
            raise ConfigError(f"{path}: policies.{name}: expected a name of letters, digits, dots and dashes")
        if not isinstance(settings, list | None) or not all(isinstance(s, str) for s in [*(settings or []), *shared]):
            raise ConfigError(f"{path}: policies.{name} = {settings!r}: expected a list, as [policy.name=mixup]")
    policies = {str(name): (*shared, *(settings or [])) for name, settings in values["policies"].items()}
    comparison = Comparison(
        base=path.parent / values["base"],
        output=Path(values["output"]).expanduser(),
        seeds=tuple(values["seeds"]),
        metric=values.get("metric", "top1_query"),
        policies=policies,
    )
    _check_budgets(comparison, path)
    return comparison


def _check_budgets(comparison: Comparison, path: Path) -> None:
    first, *others = comparison.policies
    for seed in comparison.seeds:
        ours = _budget(load_config(comparison.base, comparison.overrides(first, seed)))
        for name in others:
            theirs = _budget(load_config(comparison.base, comparison.overrides(name, seed)))
            for key in sorted(ours.keys() | theirs.keys()):
                if ours.get(key) != theirs.get(key):
                    raise ConfigError(
                        f"{path}: policies.{name} has {key} = {theirs.get(key)!r} and {first} has {ours.get(key)!r}: "
                        f"not comparable; set it for all of them, under settings"
                    )


def _budget(config: Config) -> dict[str, Any]:
    settings = flatten(to_dict(config)).items()
    return {key: value for key, value in settings if key.partition(".")[0] in BUDGET and key not in FREE}


def _check_models(comparison: Comparison, path: Path, to_train: Collection[str]) -> None:
    """Raise ConfigError, before hours of training, for a policy that does not take its settings or this backbone, or
    whose evaluation has no such metric. The starting weights of policies with nothing to train may be gone."""
    for name in comparison.policies:
        config = for_this_machine(load_config(comparison.base, comparison.overrides(name, comparison.seeds[0])))
        if name not in to_train:
            config = without_weights(config)
        try:
            with pretrained_not_loaded():
                model = new_model(config, 2, torch.device("cpu")).eval()
        except ConfigError as error:
            raise ConfigError(f"{path}: policies.{name}: {error}") from error
        size = config.data.image_size
        with torch.no_grad():
            answers = model(torch.zeros(1, size, size, 3, dtype=torch.uint8))._fields
        metrics = [f"{kind}_{answer}" for answer in answers for kind in ("top1", "top5")]
        if comparison.metric not in metrics:
            raise ConfigError(
                f"{path}: metric = {comparison.metric!r}: policies.{name} is evaluated by {', '.join(metrics)}"
            )


def compare(
    path: Path,
    launcher: Sequence[str],
    say: Callable[[str], object],
    jobs: int = 1,
    overrides: Sequence[str] = (),
    show: Callable[[str], object] = print,
) -> int:
    """Train what is missing, `jobs` runs at a time, write the table after each, and show it at the end.

    Finished runs are left alone, interrupted ones continued. Raises ConfigError; CompareError if a run fails, once the
    others under way have saved and stopped.

    Args:
        launcher: the beginning of the command that goes on with `train CONFIG ...`.
        overrides: as `load_comparison` takes them.

    Returns:
        0, or EXIT_STOPPED if a signal stopped a training.
    """
    comparison = load_comparison(path, overrides)
    # Seed by seed: an interrupted comparison has as many runs of each policy.
    every = [(policy, seed) for seed in comparison.seeds for policy in comparison.policies]
    missing = [each for each in every if result(comparison, *each) is None]
    _check_models(comparison, path, {policy for policy, _ in missing})
    told: set[str] = set()

    def update_table() -> Path:
        page, warnings = write_table(comparison)
        for aspect, text in warnings.items():
            if aspect not in told:
                say(f"warning: {text}")
        told.update(warnings)
        return page

    say(f"the table: {update_table()}")
    running: list[_Training] = []
    with _signals_handed_on(running) as signals:
        try:
            while missing or running:
                while missing and len(running) < jobs and not signals.came:
                    running.append(_start(comparison, *missing.pop(0), launcher, running, jobs, say))
                training = _first_to_end(running, signals)
                if signals.came or training.child.returncode == EXIT_STOPPED:
                    say("stopped; the same command continues")
                    return EXIT_STOPPED
                running.remove(training)
                if training.child.returncode:
                    raise CompareError(
                        f"{training.run}: training ended with exit code {training.child.returncode}"
                        f"{training.last_words()}; the same command tries it again"
                    )
                if result(comparison, training.policy, training.seed) is None:
                    raise CompareError(
                        f"{training.run} has finished, but its last evaluation has no {comparison.metric}"
                    )
                update_table()
        finally:
            for training in running:
                if training.child.pid not in signals.handed_to:  # a second signal would not let it save
                    training.child.send_signal(signal.SIGTERM)
            for training in running:
                training.child.wait()
    show((comparison.output / "compare.md").read_text("utf-8").rstrip())
    return 0


@dataclass(frozen=True)
class _Training:
    """A run under way."""

    policy: str
    seed: int
    run: Path
    place: int
    """0 .. jobs - 1, its own among those that train at the same time."""
    child: subprocess.Popen
    log: Path | None
    """Where its output goes; None: to the console."""

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log else []
        return f" ({self.log} ends with: {lines[-1]})" if lines else ""


def _start(
    comparison: Comparison,
    policy: str,
    seed: int,
    launcher: Sequence[str],
    running: list[_Training],
    jobs: int,
    say: Callable[[str], object],
) -> _Training:
    """Train a run beside those running: on a GPU of its own, as long as there are enough, with a share of the cores."""
    run = comparison.run(policy, seed)
    command = [*launcher, "train", str(comparison.base), *comparison.overrides(policy, seed), "--resume"]
    if jobs == 1:
        say(f"training {run}")
        return _Training(policy, seed, run, 0, subprocess.Popen(command), None)
    place = min(set(range(jobs)) - {training.place for training in running})
    sharers = jobs * int(os.environ.get("AUTOMIX_CORE_SHARERS") or 1)
    environment = {**os.environ, "AUTOMIX_CORE_SHARERS": str(sharers)}
    variable = "HIP_VISIBLE_DEVICES" if torch.version.hip else "CUDA_VISIBLE_DEVICES"
    visible = os.environ.get(variable)
    gpus = visible.split(",") if visible else [str(gpu) for gpu in range(torch.cuda.device_count())]
    if gpus:
        environment[variable] = gpus[place % len(gpus)]
    log = run.with_name(f"{run.name}.log")
    say(f"training {run}, its output in {log}")
    with log.open("ab") as file:
        child = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    return _Training(policy, seed, run, place, child, log)


@dataclass
class _Signals:
    came: bool = False
    handed_to: set[int] = field(default_factory=set)
    """Process ids."""


def _first_to_end(running: list[_Training], signals: _Signals) -> _Training | None:
    """Wait for one of the trainings to end; None if a signal came."""
    while not signals.came:
        for training in running:
            if training.child.poll() is not None:
                return training
        time.sleep(0.1)
    return None


@contextmanager
def _signals_handed_on(running: list[_Training]) -> Iterator[_Signals]:
    """Hand signals on to all trainings, which save before they end."""
    signals = _Signals()

    def hand_on(number: int, _: Any) -> None:
        signals.came = True
        for training in running:
            training.child.send_signal(number)
            signals.handed_to.add(training.child.pid)

    before = {each: signal.signal(each, hand_on) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def result(comparison: Comparison, policy: str, seed: int) -> float | None:
    """The metric of a finished run's last step; None if the run is not finished. Raises ConfigError for a run of
    other settings."""
    run = comparison.run(policy, seed)
    if not (run / METRICS).is_file() or not (run / "config.yaml").is_file():
        return None
    wanted = flatten(to_dict(with_policy_settings(load_config(comparison.base, comparison.overrides(policy, seed)))))
    trained = flatten(to_dict(with_policy_settings(load_config(run / "config.yaml"))))
    for key in sorted(wanted.keys() | trained.keys()):
        matters = key in RELEVANT or (key.partition(".")[0] not in IRRELEVANT and key not in SPEED_ONLY)
        if matters and wanted.get(key) != trained.get(key):
            raise ConfigError(
                f"{run} was trained with {key} = {trained.get(key)!r}, the comparison asks for {wanted.get(key)!r}: "
                f"choose another output, or remove the run"
            )
    records, _ = read_metrics(run)
    total = next((r.get("total_steps") for r in reversed(records) if r["kind"] == "start"), None)
    last = next((r for r in reversed(records) if r["kind"] == "eval"), None)
    if last is None or last["step"] != total or not is_finished(records):
        return None
    checksums = json.loads((run / "environment.json").read_text("utf-8"))["index_checksums"]
    for key, checksum in ((f"data.{split}", each) for split, each in checksums.items()):
        if Path(wanted[key]).exists() and read_manifest(Path(wanted[key])).index_checksum != checksum:
            raise ConfigError(
                f"{run} was made with other images than {key} = {wanted[key]!r} has now: choose another output, or "
                f"remove the run"
            )
    return last.get(comparison.metric)


def summarize(values: dict[str, dict[int, float]]) -> list[dict[str, Any]]:
    """A row for each policy of {policy: {seed: value}}; the first policy is the reference of the others.

    mean and standard deviation (of n - 1) over all its seeds; over the seeds that both have, the mean difference from
    the reference and the two-sided p of a t-test paired by seed. None where there are too few seeds, or, for p, all
    differences are equal.
    """
    rows, reference = [], next(iter(values.values()), {})
    for index, (policy, by_seed) in enumerate(values.items()):
        found = list(by_seed.values())
        differences = [by_seed[seed] - reference[seed] for seed in by_seed if seed in reference] if index else []
        # Accuracies are multiples of one image; equal differences of them are equal up to a rounding only.
        varied = len(differences) > 1 and max(differences) - min(differences) > 1e-9
        rows.append(
            {
                "policy": policy,
                "values": {str(seed): value for seed, value in by_seed.items()},
                "mean": statistics.fmean(found) if found else None,
                "standard_deviation": statistics.stdev(found) if len(found) > 1 else None,
                "difference": statistics.fmean(differences) if differences else None,
                "p": float(stats.ttest_1samp(differences, 0).pvalue) if varied else None,
            }
        )
    return rows


def write_table(comparison: Comparison) -> tuple[Path, dict[str, str]]:
    """Write compare.json, compare.md and compare.html into the comparison's folder.

    Returns:
        the page's path, and a warning for each of MUST_AGREE in which the runs differ.
    """
    found = {
        policy: {seed: value for seed in comparison.seeds if (value := result(comparison, policy, seed)) is not None}
        for policy in comparison.policies
    }
    rows = summarize(found)
    comparison.output.mkdir(parents=True, exist_ok=True)
    runs = [comparison.run(policy, seed) for policy in found for seed in found[policy]]
    made = {run.name: _made_with(run) for run in runs}
    differences = {aspect: text for aspect in MUST_AGREE if (text := _difference(aspect, made))}
    about = {"metric": comparison.metric, "seeds": list(comparison.seeds), "reference": next(iter(found))}
    keys = dict.fromkeys(key for each in made.values() for key in each)
    about["environment"] = {key: _distinct(made, key) for key in keys}
    about["warnings"] = list(differences.values())
    write_whole(comparison.output / "compare.json", json.dumps(about | {"policies": rows}, indent=1))
    cells = [_cells(row, len(comparison.seeds)) for row in rows]
    lines = [f"| {' | '.join(line)} |" for line in (HEAD, ["---"] * len(HEAD), *cells)]
    hint = (
        f"{comparison.metric} of the last step. Difference: from {about['reference']}, paired by seed; p: two-sided, "
        f"of the paired t-test, not corrected for the number of policies. {_in_words(about['environment'])}"
    ).strip()
    warnings = [f"Warning: {text}" for text in about["warnings"]]
    paragraphs = [line for text in (hint, *warnings) for line in ("", text)]
    write_whole(comparison.output / "compare.md", "\n".join([*lines, *paragraphs, ""]))
    hints = "".join(f'<p class="hint">{html.escape(text)}</p>' for text in (hint, *warnings))
    sections = {"Policies": f"{table(cells, HEAD, 'figures')}{hints}"}
    if any(found.values()):
        sections["Every run"] = _strip_chart(rows)
    return write_page(comparison.output / "compare.html", "Comparison", comparison.output.name, sections), differences


def _made_with(run: Path) -> dict[str, Any]:
    """What a finished run was made with and when; keys that older runs have not stored are absent."""
    environment = json.loads((run / "environment.json").read_text("utf-8"))
    on_cpu = environment.get("device") == "cpu" or not environment["gpus"]
    made = {"device": "CPU" if on_cpu else ", ".join(sorted(set(environment["gpus"])))}
    kept = ("autocast", "world_size", "python", "commit", "platform", "cuda")
    made |= {key: environment[key] for key in kept if key in environment}
    records, _ = read_metrics(run)
    return made | flatten({"versions": environment["versions"], "date": records[-1]["time"][:10]})


def _distinct(made: dict[str, dict[str, Any]], key: str) -> list[Any]:
    """The values that the runs have, each once and sorted, None first."""
    values = dict.fromkeys(each[key] for each in made.values() if key in each)
    return sorted(values, key=lambda value: (value is not None, value))


def _difference(aspect: str, made: dict[str, dict[str, Any]]) -> str:
    """Which runs have which value of an aspect in which all should agree; empty if they do."""
    values = _distinct(made, aspect)
    if len(values) < 2:
        return ""
    groups = [(value, [run for run, each in made.items() if each.get(aspect) == value]) for value in values]
    listed = "; ".join(f"{value}: {some(runs)}" for value, runs in groups)
    return f"the runs differ in their {MUST_AGREE[aspect]} as well as in policy ({listed})."


def _in_words(environment: dict[str, list[Any]]) -> str:
    """What the runs were made with, for the table's foot."""
    if not environment:
        return ""

    def values(key: str) -> str:
        return ", ".join(map(str, environment.get(key, [])))

    ranks = values("world_size")
    parts = [f"Python {values('python')}", f"torch {values('versions.torch')}", values("device"), values("autocast")]
    parts.append(ranks and f"{ranks} rank{'s' * (ranks != '1')}")
    dates = dict.fromkeys((environment["date"][0], environment["date"][-1]))
    return f"{', '.join(filter(None, parts))}; {' to '.join(dates)}."


def _strip_chart(rows: list[dict[str, Any]]) -> str:
    """A line for each policy, with a dot for each of its runs and a stroke at their mean."""
    every = [value for row in rows for value in row["values"].values()]
    margin = 0.05 * (max(every) - min(every) or 0.01)
    low, high = min(every) - margin, max(every) + margin
    left, width, step = 24 + 8 * max(len(row["policy"]) for row in rows), 560, 26
    bottom = step * len(rows) + 8

    def x(value: float) -> str:
        return f"{left + (value - low) / (high - low) * width:.1f}"

    parts = []
    for value in ticks(low, high):
        parts.append(f'<line class="grid" x1="{x(value)}" x2="{x(value)}" y1="4" y2="{bottom}"/>')
        parts.append(f'<text x="{x(value)}" y="{bottom + 18}" text-anchor="middle">{100 * value:g} %</text>')
    for number, row in enumerate(rows):
        y = step * number + step / 2 + 4
        parts.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{html.escape(row["policy"])}</text>')
        for seed, value in row["values"].items():
            text = f"<title>seed {seed}: {percent_or_nothing(value)}</title>"
            parts.append(f'<circle cx="{x(value)}" cy="{y}" r="4" fill="var(--accent)" opacity="0.6">{text}</circle>')
        if row["mean"] is not None:
            parts.append(f'<path d="M{x(row["mean"])} {y - 9}v18" stroke="var(--ink)" stroke-width="2"/>')
    return (
        f'<p class="hint">A dot for each seed, a stroke at their mean.</p><svg class="card figure" role="img" '
        f'viewBox="0 0 {left + width + 24} {bottom + 28}" width="{left + width + 24}" '
        f'aria-label="The metric of every run, by policy">{"".join(parts)}</svg>'
    )


def _cells(row: dict[str, Any], seeds: int) -> list[str]:
    deviation, difference, p = row["standard_deviation"], row["difference"], row["p"]
    return [
        row["policy"],
        f"{len(row['values'])} of {seeds}",
        percent_or_nothing(row["mean"]),
        percent_or_nothing(deviation),
        percent_or_nothing(None) if difference is None else f"{100 * difference:+.2f} points",
        percent_or_nothing(None) if p is None else f"{p:.3g}",
    ]
