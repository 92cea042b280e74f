"""Beyond the accuracies of validate.py: how sure a trained model is, what it confuses, and how much is left when images
become harder."""

import math
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from automix_dist import beton, cam, distributed, robustness
from automix_dist.cam import Showcase
from automix_dist.checkpoint_files import Saved
from automix_dist.config import ConfigError
from automix_dist.config_file import from_dict
from automix_dist.data import Batch, EvalLoader
from automix_dist.distributed import Process
from automix_dist.evaluation_page import write_evaluation
from automix_dist.model import restored_model
from automix_dist.precision import autocast_name
from automix_dist.run_folder import on_rank_0
from automix_dist.validate import top_hits

BINS = 15
"""Of confidence, equally wide, as in arXiv 1706.04599."""
MAX_CONFUSION = 100
"""Classes up to which confusions are counted."""
PGD_STEPS = 10


@dataclass(frozen=True)
class Conditions:
    """What to evaluate besides the images as they are. Raises ConfigError for what cannot be."""

    answer: str = "query"
    """Whose calibration and classes are told, and who is attacked: a name of the model's logits, or "ensemble"."""
    attack: str | None = None
    """ "fgsm" or "pgd"."""
    epsilon: float = 8 / 255
    """Of the attack, in each value on the [0, 1] scale."""
    corruptions: tuple[str, ...] = ()
    occlusion: tuple[float, ...] = ()
    """Shares of the image."""
    flip: bool = False
    """Average the probabilities of each image and its mirror image."""
    seed: int = 0

    def __post_init__(self):
        for kind in ("corruptions", "occlusion"):  # each once
            object.__setattr__(self, kind, tuple(dict.fromkeys(getattr(self, kind))))
        unknown = [name for name in self.corruptions if name not in robustness.STRENGTHS]
        if unknown:
            raise ConfigError(f"--corruptions {unknown[0]}: expected some of {', '.join(robustness.STRENGTHS)}, or all")
        if self.attack not in (None, "fgsm", "pgd"):
            raise ConfigError(f"--attack {self.attack}: expected fgsm or pgd")
        if not 0 < self.epsilon <= 1:
            raise ConfigError(f"--epsilon {self.epsilon}: expected a number in (0, 1], such as 8/255")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed}: expected 0 or more")
        if any(not 0 < share < 1 for share in self.occlusion):
            raise ConfigError(f"--occlusion {self.occlusion}: expected shares above 0 and below 1")
        if len(set(self.names())) < len(self.names()):
            raise ConfigError(f"--occlusion {self.occlusion}: expected shares that differ in their first six digits")

    def names(self) -> list[str]:
        """Of all conditions, in the order of evaluation; the first is "clean"."""
        corrupted = [f"{name}_{severity}" for name in self.corruptions for severity in robustness.SEVERITIES]
        occluded = [f"occlusion_{share:g}" for share in self.occlusion]
        return ["clean", *corrupted, *occluded, *([self.attack] if self.attack else [])]


def fraction(text: str) -> float:
    """A number written as 0.03 or 8/255; raises ValueError."""
    try:
        return float(Fraction(text))
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError(text) from error


class Counts:
    """What is counted of one answer, over all images; sums over ranks are exact."""

    def __init__(self, classes: int, confusion: bool, device: torch.device):
        self.right = torch.zeros(2, dtype=torch.float64, device=device)  # first, among the first five
        self.loss = torch.zeros(1, dtype=torch.float64, device=device)
        self.bins = torch.zeros(BINS, 3, dtype=torch.float64, device=device)  # images, confidence, right
        self.classes = torch.zeros(classes, 3, dtype=torch.float64, device=device)  # images, right, guesses
        self.confusion = torch.zeros(classes if confusion else 0, classes, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """[B, classes] and [B]."""
        logits = logits.double()
        self.right += top_hits(logits, labels)
        self.loss += F.cross_entropy(logits, labels, reduction="sum")
        confidence, guess = logits.softmax(dim=1).max(dim=1)
        correct = (guess == labels).double()
        one, zero = torch.ones_like(correct), torch.zeros_like(correct)
        bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
        self.bins.index_add_(0, bins, torch.stack([one, confidence, correct], dim=1))
        self.classes.index_add_(0, labels, torch.stack([one, correct, zero], dim=1))
        self.classes.index_add_(0, guess, torch.stack([zero, zero, one], dim=1))
        if len(self.confusion):
            width = len(self.confusion)
            self.confusion += torch.bincount(labels * width + guess, minlength=width**2).view(width, width)

    def sum(self, process: Process) -> None:
        for each in (self.right, self.loss, self.bins, self.classes, self.confusion):
            if each.numel():
                process.sum(each)

    def calibration_error(self) -> float:
        """The expected calibration error: the bins' mean distance of accuracy from confidence."""
        return float((self.bins[:, 2] - self.bins[:, 1]).abs().sum() / self.bins[:, 0].sum())


def evaluate(
    saved: Saved,
    conditions: Conditions | None = None,
    *,
    data: str | None = None,
    batch_size: int | None = None,
    cam_images: int | None = None,
    out: Path | None = None,
    tell: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint's model, as `automix eval` does; called by all ranks together.

    Args:
        saved: as `checkpoint.find_checkpoint` finds it; rank 0's counts.
        conditions: what to evaluate besides the images as they are, and whose details to tell.
        data: another .beton file than the run's validation set.
        batch_size: images per rank and batch; without it the run's.
        cam_images: show Grad-CAM of so many images on the page in `out`.
        out: a folder, in which rank 0 writes eval.json and eval.html.
        tell: called by rank 0 with the result, before that is written: a full disk must not cost it.

    Returns:
        "run", "step", "data", "images", "options" and what `evaluate_model` returns; on all ranks.

    Raises:
        AutomixError: in whatever form; what can be wrong is found before the evaluation.
        OSError: if the page cannot be written after all.
    """
    conditions = conditions or Conditions()
    config = distributed.for_this_machine(from_dict(saved.manifest["config"]))
    path = Path(data or config.data.val)
    manifest, classes = beton.check(path), saved.manifest["classes"]
    if len(manifest.classes) != len(classes):
        raise beton.BetonError(f"{path} has {len(manifest.classes)} classes, the model {len(classes)}")
    renamed = manifest.classes != classes
    if renamed and sorted(manifest.classes) == sorted(classes):
        raise beton.BetonError(
            f"{path} has the model's classes in another order, so that its labels mean others: write it again with "
            f"automix prepare --overwrite --classes {shlex.quote(config.data.train)}"
        )
    showcase = None if cam_images is None else cam.Showcase(cam_images, len(classes))
    process = distributed.start(config.engine)
    saved = process.broadcast(saved)  # a training may have written another one meanwhile
    process.agree({f"the index of {path}": manifest.index_checksum})
    if out is not None:
        on_rank_0(process, lambda: _why_not_written(out))
    model = restored_model(saved, config, process.device)
    if renamed and process.is_main:
        print(f"warning: {path} has other class names than the run; classes are matched by number", file=sys.stderr)
    ranks = saved.manifest["world_size"] * config.engine.accumulation_steps
    loader = EvalLoader(
        str(path),
        config.data,
        batch_size=batch_size or config.eval_batch_size or max(1, config.batch_size // ranks),
        rank=process.rank,
        world_size=process.world_size,
        device=process.device,
    )
    if showcase is not None:
        cam.check(model, loader.blank(), conditions.answer)
    values = evaluate_model(model, loader, process, conditions, config.data.mean, showcase)
    loader.close()
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(conditions).items()}
    options["precision"] = autocast_name(config, process.device)
    run = saved.folder.parent.parent
    result = {
        "run": str(run),
        "step": saved.step,
        "data": str(path),
        "images": loader.num_samples,
        "options": options,
        **values,
    }
    if renamed:
        result["classes_matched_by"] = "number"
    chosen = None if showcase is None else showcase.gather(process)
    if showcase is not None and chosen is None and process.is_main:
        print("no Grad-CAM: the classes that --cam chose have no images; a larger number chooses more", file=sys.stderr)
    views = None if chosen is None else cam.look(model, chosen, conditions.answer)
    process.barrier()
    if tell is not None and process.is_main:
        tell(result)
    if out is not None and process.is_main:
        title = f"{run.resolve().name}, step {saved.step:,}, {path.name}"
        print(write_evaluation(result, out, title, views), file=sys.stderr)
    distributed.finish()
    return result


def _why_not_written(folder: Path) -> str | None:
    """Make a folder and try it, so that nothing is computed for a page that cannot be kept; a new one goes again, as
    what follows may still be refused."""
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if is_new:
            folder.rmdir()
        return None
    except FileExistsError:
        return f"--out {str(folder)!r} is a file: expected a folder"
    except OSError as error:
        return f"cannot write to --out {str(folder)!r}: {error.strerror}"


@torch.no_grad()
def evaluate_model(
    model: nn.Module,
    loader: EvalLoader,
    process: Process,
    conditions: Conditions,
    color: tuple[float, ...],
    showcase: Showcase | None = None,
) -> dict[str, Any]:
    """Accuracies, calibration and classes over the whole set, and accuracies under each condition.

    Args:
        model: AutoMix or another model of a policy, whole on each rank.
        loader: this rank's share of the set; every image counts once, whatever the number of ranks.
        color: of what occlusion hides, on the [0, 1] scale.
        showcase: what is to keep some of the images.

    Returns:
        top1_*, top5_*, loss_* and ece_* for each of the model's logits and, with a second encoder, for `ensemble`: the
        mean of both encoders' probabilities; "conditions": {name: {top1_*, top5_*}}, and the mean of all corruptions
        as `corruptions_mean`; of the chosen answer "calibration": bins, "classes": a row for each class, and
        "confusion": rows of true, columns of guessed classes.

    Raises ConfigError if the model has no such answer.
    """
    training, trained = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    answers = list(_answers(model, loader.blank(), flip=False))
    if conditions.answer not in answers:
        raise ConfigError(f"the model has no answer {conditions.answer}: expected one of {', '.join(answers)}")
    counts = {name: _counts_of(answers, name, loader, conditions, process) for name in conditions.names()}
    batches = iter(loader)
    try:
        for batch in batches:
            if showcase is not None:
                showcase.add(batch)
            for name, images in _conditions(model, batch, conditions, color):
                for answer, logits in _answers(model, images, conditions.flip).items():
                    counts[name][answer].add(logits, batch.labels)
    finally:
        batches.close()
        model.train(training)
        for parameter in trained:
            parameter.requires_grad_()
    for of_answer in counts.values():
        for each in of_answer.values():
            each.sum(process)
    return _without_nan(_result(counts, conditions, loader))


def _without_nan(value: Any) -> Any:
    """None for numbers that are not finite, as of a diverged model: JSON has none."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _counts_of(
    answers: list[str], name: str, loader: EvalLoader, conditions: Conditions, process: Process
) -> dict[str, Counts]:
    """The empty counts of a condition. Confusions are counted of one answer only: their number is that of the classes
    squared."""
    confusion = name == "clean" and loader.num_classes <= MAX_CONFUSION
    return {a: Counts(loader.num_classes, confusion and a == conditions.answer, process.device) for a in answers}


def _answers(model: nn.Module, images: Tensor, flip: bool) -> dict[str, Tensor]:
    """Logits by name, [B, classes] each; images as the model takes them, its width in dimension 2 if uint8, else 3."""
    answers = model(images)._asdict()
    if flip:
        mirrored = model(images.flip(3 if images.is_floating_point() else 2))._asdict()
        answers = {name: _mean_answer(logits, mirrored[name]) for name, logits in answers.items()}
    if "momentum" in answers:
        answers["ensemble"] = _mean_answer(answers["query"], answers["momentum"])
    return answers


def _mean_answer(first: Tensor, second: Tensor) -> Tensor:
    """The logarithm of the mean of two answers' probabilities."""
    return torch.logaddexp(first.log_softmax(dim=1), second.log_softmax(dim=1)) - math.log(2)


def _conditions(
    model: nn.Module, batch: Batch, conditions: Conditions, color: tuple[float, ...]
) -> Iterator[tuple[str, Tensor]]:
    """A batch's images under each condition, by name: uint8, or normalised after an attack."""
    images, samples, seed = batch.images, batch.indices, conditions.seed
    yield "clean", images
    for name in conditions.corruptions:
        for severity in robustness.SEVERITIES:
            yield f"{name}_{severity}", robustness.corrupt(images, name, severity, samples, seed)
    for share in conditions.occlusion:
        yield f"occlusion_{share:g}", robustness.occlude(images, share, samples, seed, color)
    if conditions.attack:
        yield conditions.attack, _attacked(model, batch, conditions)


def _attacked(model: nn.Module, batch: Batch, conditions: Conditions) -> Tensor:
    """The images as the attack leaves them. Its gradients are float32's: of a confident answer float16's are zero, and
    nothing would be attacked."""
    mean, std = (v[:, None, None] for v in (model.mean, model.std))
    pixels = batch.images.permute(0, 3, 1, 2).float() / 255

    def answer(moved: Tensor) -> Tensor:
        return _answers(model, (moved - mean) / std, conditions.flip)[conditions.answer]

    options: dict[str, Any] = {"steps": 1, "step_size": conditions.epsilon}
    if conditions.attack == "pgd":
        start = robustness.random_start(pixels, batch.indices, conditions.seed, conditions.epsilon)
        options = {"steps": PGD_STEPS, "step_size": 2.5 * conditions.epsilon / PGD_STEPS, "start": start}
    autocast, model.autocast = model.autocast, torch.float32
    try:
        moved = robustness.attack(answer, pixels, batch.labels, epsilon=conditions.epsilon, **options)
    finally:
        model.autocast = autocast
    return (moved - mean) / std


def _result(counts: dict[str, dict[str, Counts]], conditions: Conditions, loader: EvalLoader) -> dict[str, Any]:
    total, classes = loader.num_samples, loader.manifest.classes
    values: dict[str, Any] = {}
    for name, each in counts["clean"].items():
        values |= _accuracies(name, each, total)
        values |= {f"loss_{name}": each.loss.item() / total, f"ece_{name}": each.calibration_error()}
    harder = {
        name: {
            key: value for answer, each in of_answer.items() for key, value in _accuracies(answer, each, total).items()
        }
        for name, of_answer in counts.items()
        if name != "clean"
    }
    corrupted = [harder[name] for name in harder if name.rpartition("_")[0] in conditions.corruptions]
    if corrupted:
        harder["corruptions_mean"] = {key: statistics.fmean(each[key] for each in corrupted) for key in corrupted[0]}
    chosen = counts["clean"][conditions.answer]
    rows = zip(classes, chosen.classes.tolist(), strict=True)
    confused = chosen.confusion.tolist()
    return values | {
        "answer": conditions.answer,
        "conditions": harder,
        "calibration": [
            {"images": int(n), "confidence": c / n if n else None, "accuracy": r / n if n else None}
            for n, c, r in chosen.bins.tolist()
        ],
        "classes": [
            {"name": name, "images": int(n), "recall": r / n if n else None, "precision": r / g if g else None}
            for name, (n, r, g) in rows
        ],
        "confusion": confused or None,
    }


def _accuracies(name: str, counts: Counts, total: int) -> dict[str, float]:
    return {f"top{k}_{name}": value / total for k, value in zip((1, 5), counts.right.tolist(), strict=True)}


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """The part of a result that is short for any number of classes."""
    return {key: value for key, value in result.items() if key not in ("classes", "confusion", "calibration")}
