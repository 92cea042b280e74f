"""`automix bench throughput CONFIG`: a whole job, .beton file to checkpoint, and what holds it up.

    automix bench throughput configs/imagenet/automix_resnet50_100ep.yaml --steps 200 --out DIR
    torchrun --nproc-per-node=8 -m automix_dist bench throughput CONFIG --data /local/bench ...

Runs `automix train` on generated images of ImageNet's shapes, or with --real on the config's own files: reading,
augmentation, transfer, step, log, a checkpoint half-way and one at the end, an evaluation. Then the loader alone. Says
what share of the time the device waited for data, and from that how long the config's full recipe would take here. Of
a data.resolution_schedule the job trains at the largest size only.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from automix_dist import beton, data, policy, trainer
from automix_dist.bench import Clock, check_counts, describe_machine, replaced, results_folder, write_results
from automix_dist.bench.synthetic import synthetic_file
from automix_dist.checkpoint import Checkpoints
from automix_dist.config import Config
from automix_dist.config_file import load_config
from automix_dist.distributed import launched_ranks
from automix_dist.metrics_file import WAITING
from automix_dist.run import train

IMAGENET = (1_281_167, 50_000)
"""Training and validation images that a recipe is extrapolated to where the config's files are not there."""


class Recorder:
    """What a training does with its time, taken down around the parts it is made of."""

    def __init__(self, warmup: int, micro_batches: int):
        self.warmup, self.micro_batches = warmup, micro_batches
        self.clock: Clock | None = None
        self.steps = 0
        self.began = self.ended = 0.0
        self._joules_before: float | str = ""
        self.joules: float | str = "the measured steps have not ended"
        """Used in the measured steps; or why that is not known."""
        self.saving: list[float] = []
        self.evaluating: list[tuple[float, int]] = []
        """Seconds and images of each evaluation."""

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block, trainings are recorded."""
        with contextlib.ExitStack() as stack:
            for owner, name, watch in (
                (data.TrainLoader, "epoch", self._epoch),
                (Checkpoints, "save", self._save),
                (trainer, "validate", self._validate),
            ):
                stack.enter_context(replaced(owner, name, watch(getattr(owner, name))))
            yield

    def _epoch(self, epoch: Callable) -> Callable:
        def recorded(loader: data.TrainLoader, number: int, start_step: int = 0) -> Iterator[data.Batch]:
            batches = epoch(loader, number, start_step)
            try:
                for index, batch in enumerate(batches):
                    device = batch.images.device
                    self.clock = self.clock or Clock(device)
                    if self.steps == self.warmup and not self.began:
                        self._begin()
                    elif self.began:
                        # An epoch's first batch waits for the loader to fill; it is told apart.
                        self.clock.mark("filling" if index == 0 else "waiting")
                    try:
                        yield batch
                    finally:  # the epoch's last batch is followed by close()
                        self.steps += (index + 1) % self.micro_batches == 0
                        if self.began:
                            self.clock.mark("working")
            finally:
                batches.close()

        return recorded

    def _begin(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.clock.mark("start")
        self._joules_before = _joules()
        self.began = time.perf_counter()

    def end(self) -> None:
        """The training is over; what follows, an evaluation and the last checkpoint, counts for itself."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ended = time.perf_counter()
        before, after = self._joules_before, _joules()
        reasons = [each for each in (before, after) if isinstance(each, str)]
        self.joules = reasons[0] if reasons else after - before

    def _save(self, save: Callable) -> Callable:
        def recorded(*args, **kwargs):
            began = time.perf_counter()
            result = save(*args, **kwargs)
            self.saving.append(time.perf_counter() - began)
            return result

        return recorded

    def _validate(self, validate: Callable) -> Callable:
        def recorded(model, loader, process, *args, **kwargs):
            self.end()
            began = time.perf_counter()
            result = validate(model, loader, process, *args, **kwargs)
            self.evaluating.append((time.perf_counter() - began, loader.num_samples))
            return result

        return recorded


def figures(recorder: Recorder, config: Config, world_size: int) -> dict[str, Any]:
    """What the record comes to; seconds, images, shares of the time."""
    spans = recorder.clock.milliseconds()
    works = [ms for name, ms in recorder.clock.spans() if name == "working"]
    steps = recorder.steps - recorder.warmup
    waiting, total = spans.get("waiting", 0.0), sum(spans.values())
    seconds = recorder.ended - recorder.began
    unknown = recorder.joules if isinstance(recorder.joules, str) else ""
    return {
        "steps": steps,
        "images_per_second": steps * config.batch_size / seconds,
        "step_ms": statistics.median(works) * recorder.micro_batches,
        "waiting_share": waiting / total,
        "filling_share": spans.get("filling", 0.0) / total,
        "saving_share": sum(recorder.saving[:-1]) / seconds,  # the last one comes after the last step
        "saving_seconds": statistics.mean(recorder.saving) if recorder.saving else 0.0,
        "evaluated_per_second": sum(n for _, n in recorder.evaluating) / sum(s for s, _ in recorder.evaluating),
        "joules_per_image": None if unknown else recorder.joules * world_size / (steps * config.batch_size),
        "joules_unknown": unknown,
        "world_size": world_size,
    }  # fmt: skip


def _joules() -> float | str:
    """Energy that this process's GPU has used since its driver was loaded, as NVML tells it; or why that is not known.

    NVML is asked through ctypes: its library comes with the driver, its Python packages with nothing.
    """
    if not torch.cuda.is_available():
        return "no GPU"
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        return str(error)
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    for name, *arguments in (
        ("nvmlInit_v2",),
        ("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(handle)),
        ("nvmlDeviceGetTotalEnergyConsumption", handle, ctypes.byref(millijoules)),
    ):
        if code := getattr(nvml, name)(*arguments):
            return f"{name} failed with NVML's error {code}"
    return millijoules.value / 1e3


def extrapolate(measured: dict[str, Any], recipe: Config, images: tuple[int, int]) -> dict[str, float]:
    """Hours of a recipe's training steps, evaluations and checkpoints, and the GPU-hours of all of them."""
    steps = recipe.epochs * (images[0] // recipe.batch_size)
    evaluations = math.ceil(recipe.epochs / recipe.eval_every_epochs)
    saves = recipe.epochs // recipe.checkpoint.every_epochs if recipe.checkpoint.every_epochs else 1
    rate = measured["images_per_second"] / (1 - measured["filling_share"])  # a real epoch has thousands of steps
    training = steps * recipe.batch_size / rate / 3600
    evaluating = evaluations * images[1] / measured["evaluated_per_second"] / 3600
    saving = saves * measured["saving_seconds"] / 3600
    hours = training + evaluating + saving
    return {"training": training, "evaluating": evaluating, "saving": saving, "hours": hours,
            "device_hours": hours * measured["world_size"]}  # fmt: skip


def loader_alone(config: Config, rank: int, world_size: int, device: torch.device, seconds: float) -> float:
    """Images per second over all ranks that the loader delivers with nobody at work on them."""
    loader = data.TrainLoader(
        config.data.train, config.data, seed=config.seed, batch_size=config.batch_size, rank=rank,
        world_size=world_size, accumulation_steps=config.engine.accumulation_steps, device=device,
    )  # fmt: skip
    images, began, epoch = 0, 0.0, 0
    try:
        while not began or time.perf_counter() - began < seconds:
            for batch in loader.epoch(epoch):
                if not began:  # the first batch compiles
                    began = time.perf_counter()
                    continue
                images += len(batch.images)
            epoch += 1
        return images / (time.perf_counter() - began) * world_size
    finally:
        loader.close()


def job(recipe: Config, folder: Path, files: tuple[str, str], steps: int, warmup: int) -> Config:
    """The recipe's config, changed to `warmup` + `steps` steps on these files: its last epoch may have more.

    Of several training sizes the largest one is kept.
    """
    count = beton.check(Path(files[0])).count
    data.check_batch_size(recipe.batch_size, count, files[0])
    epochs = math.ceil((warmup + steps) / (count // recipe.batch_size))
    schedule = ((0, max(training_sizes(recipe))),) if recipe.data.resolution_schedule else ()
    return dataclasses.replace(
        recipe,
        output=str(folder / "run"),
        epochs=epochs,
        eval_every_epochs=epochs,
        data=dataclasses.replace(recipe.data, train=files[0], val=files[1], resolution_schedule=schedule),
        optimizer=dataclasses.replace(recipe.optimizer, warmup_epochs=0.0),
        checkpoint=dataclasses.replace(
            recipe.checkpoint, every_epochs=0, every_steps=warmup + max(steps // 2, 1), keep_best=False
        ),
        log=dataclasses.replace(recipe.log, gallery_pairs=0),
    )


def training_sizes(recipe: Config) -> list[int]:
    """Sides of the recipe's training images, each once, in the order of the epochs."""
    return list(dict.fromkeys(recipe.data.train_size(epoch) for epoch in range(recipe.epochs)))


def generated(folder: Path, images: int, storage: str, batch_size: int) -> tuple[str, str]:
    """A training and a validation file of images of ImageNet's shapes; made by the first process that needs them."""
    files = []
    for split, count in (("train", max(images, batch_size)), ("val", max(images // 8, 8))):
        file = folder / f"{split}_{storage.replace('@', '')}_{count}.beton"
        synthetic_file(file, count, storage, split=split)
        files.append(str(file))
    return files[0], files[1]


# What a person reads; all of it from the dictionary that throughput.json holds.


def markdown(result: dict[str, Any]) -> str:
    measured, hours, machine = result["measured"], result["recipe"], result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rate, alone = measured["images_per_second"], result["loader_alone"]
    held = "the loader holds the job up" if measured["waiting_share"] > WAITING else "the step is what takes the time"
    sizes, energy = result["training_sizes"], measured["joules_per_image"]
    trained = f"{max(sizes)} px"
    if len(sizes) > 1:
        trained += f", the largest of the recipe's {', '.join(map(str, sizes))}: its hours are an upper bound"
    rows = [
        ("images/s, all included", f"{rate:,.1f} on {measured['world_size']} device(s)"),
        ("training images", trained),
        ("one step", f"{measured['step_ms']:.1f} ms of work (median)"),
        ("device waiting for data", f"{measured['waiting_share']:.1%}: {held}"),
        ("first batches of epochs", f"{measured['filling_share']:.1%} of the time; left out of the recipe's hours"),
        ("checkpoints", f"{measured['saving_share']:.1%} of the time, {measured['saving_seconds']:.2f} s each"),
        ("loader alone", f"{alone:,.0f} images/s, {alone / rate:.1f} times what the job took"),
        ("evaluation", f"{measured['evaluated_per_second']:,.1f} images/s"),
        ("energy", f"not known: {measured['joules_unknown']}" if energy is None else f"{energy:.2f} J/image"),
        (
            "the full recipe",
            f"{hours['hours']:,.1f} hours here ({hours['training']:,.1f} training, {hours['evaluating']:,.1f} "
            f"evaluating, {hours['saving']:,.2f} saving), {hours['device_hours']:,.1f} device-hours; extrapolated to "
            f"{result['epochs']} epochs of {result['images'][0]:,} images",
        ),
    ]
    lines = [
        "# A whole training job", "",
        f"{' '.join([result['config'], *result['overrides']])}; {machine['device']}; {versions}; load average at "
        f"the start {machine['load_average']:.2f}. {result['data']}; {measured['steps']} measured steps of "
        f"{result['batch_size']} images.", "",
        "| what | |", "|---|---|",
    ]  # fmt: skip
    return "\n".join(lines + [f"| {name} | {text} |" for name, text in rows]) + "\n"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="automix bench throughput", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that replace the file's"
    )
    parser.add_argument("--steps", type=int, default=60, help="measured steps (default: 60)")
    parser.add_argument("--warmup", type=int, default=10, help="steps before them (default: 10)")
    parser.add_argument("--images", type=int, default=2048, help="generated training images (default: 2048)")
    parser.add_argument("--storage", default="jpg@500", metavar="KIND@SIZE", help="jpg or raw (default: jpg@500)")
    parser.add_argument("--real", action="store_true", help="read the config's own files instead")
    parser.add_argument("--data", type=Path, help="folder to keep and reuse them in (default: a temporary one)")
    parser.add_argument("--out", type=results_folder, help="folder for throughput.json and throughput.md")
    options = parser.parse_intermixed_args(arguments)
    check_counts(parser, options, steps=2, warmup=1, images=16)
    if launched_ranks() > 1 and options.data is None:
        parser.error("--data FOLDER is needed under a launcher: all ranks share it")
    if options.storage.partition("@")[0] not in ("jpg", "raw") or not options.storage.partition("@")[2].isdigit():
        parser.error(f"--storage {options.storage}: expected jpg@SIZE or raw@SIZE, as jpg@500")
    return options


def run(arguments: list[str]) -> int:
    """Runs the job, measures and prints; returns the job's exit code."""
    options = parse(arguments)
    recipe = policy.with_policy_settings(load_config(options.config, options.overrides))
    world_size, rank = launched_ranks(), int(os.environ.get("RANK", 0))
    with contextlib.ExitStack() as stack:
        folder = options.data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="automix-bench-")))
        files, read = (recipe.data.train, recipe.data.val), "the config's own files"
        if not options.real:
            files = generated(folder, options.images, options.storage, recipe.batch_size)
            read = f"{beton.check(Path(files[0])).count} generated images, {options.storage}"
        own = (Path(recipe.data.train), Path(recipe.data.val))  # also where generated images stand in for them
        known = all(file.is_file() for file in own)
        images = tuple(beton.check(file).count for file in own) if known else IMAGENET
        config = job(recipe, folder, files, options.steps, options.warmup)
        machine, recorder = describe_machine(), Recorder(options.warmup, config.engine.accumulation_steps)
        with recorder.watching():
            if code := train(config, overwrite=True):
                return code
        measured = figures(recorder, config, world_size)
        alone = loader_alone(config, rank, world_size, recorder.clock.device, seconds=2.0)
    result = {
        "config": options.config, "overrides": options.overrides, "machine": machine, "data": read,
        "batch_size": recipe.batch_size, "epochs": recipe.epochs, "images": images, "measured": measured,
        "training_sizes": training_sizes(recipe), "loader_alone": alone,
        "recipe": extrapolate(measured, recipe, images),
    }  # fmt: skip
    if rank == 0:
        print(markdown(result))
        if options.out:
            write_results(options.out, "throughput", result, markdown(result))
    return 0
