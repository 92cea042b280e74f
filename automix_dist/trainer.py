"""The training loop, top to bottom. It receives finished parts, and says when they evaluate, save, show and log."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from automix_dist.batchnorm import RunningStatistics
from automix_dist.checkpoint import Checkpoints
from automix_dist.classifier import Classifier
from automix_dist.config import Config, ProfileConfig
from automix_dist.data import Batch, EvalLoader, TrainLoader
from automix_dist.distributed import Process, StopRequest
from automix_dist.draws import seed_torch
from automix_dist.engines import Engine
from automix_dist.errors import AutomixError, first_line
from automix_dist.gallery import make_gallery
from automix_dist.heartbeat import is_lost
from automix_dist.momentum import MomentumUpdate
from automix_dist.optimizer import set_learning_rates
from automix_dist.profiling import PROFILE, StepProfile
from automix_dist.replay import DUMPS, write_dump
from automix_dist.run_log import RunLog
from automix_dist.schedules import Schedule, StepValues
from automix_dist.validate import validate

BEST = "top1_query"
"""What the best checkpoint is best at: one fixed head, so that no choice is made on the validation set."""


SWEEP = 11
"""Lambdas from 0 to 1 for which the gallery shows its first pair."""


COMPILING_STEPS = 100
"""For this many steps after a start torch.compile may still compile, so they may be slow."""


class TrainingError(AutomixError, RuntimeError):
    """Training cannot go on; the message says at which step and why."""


class Stopped(Exception):
    """All ranks agreed to stop; carries the signal's number."""


@dataclass
class Position:
    """Where a run stands: all that a resumed run needs besides the engine's tensors."""

    step: int = 0
    """Optimizer steps done; the epoch and the loader's place follow from it."""
    evaluated_step: int = 0
    best_step: int | None = None
    best_top1: float = -1.0


JUDGED = ("generator", "cosine")
"""Losses that there are only where the momentum encoder judges the Mix Block's samples; else they are 0."""


class Tally:
    """Losses, gradient norms and skipped steps, summed on the device and read now and then."""

    def __init__(self, process: Process, fields: tuple[str, ...]):
        self._process = process
        self.fields = fields
        # Then the norms, and how many steps were applied, and were judged.
        self._sums = torch.zeros(len(fields) + 3, device=process.device)
        self._in_a_row = torch.zeros((), device=process.device)
        self._skipped = torch.zeros((), device=process.device)
        self.last = torch.zeros(len(fields), device=process.device)

    def add(self, losses: Tensor, grad_norm: Tensor, skipped: Tensor, judged: float = 1.0) -> None:
        """The losses [fields] and the gradients' norm of one step, and 1 if it was skipped, which leaves them out;
        `judged`: the share of its micro batches with the losses of JUDGED."""
        self.last = losses
        one = torch.ones_like(losses[:1])
        counted = torch.cat([losses, grad_norm[None], one, one * judged])
        self._sums += torch.where(skipped.bool(), 0.0, counted)
        self._in_a_row = (self._in_a_row + 1) * skipped
        self._skipped += skipped

    def read(self) -> tuple[dict[str, float], float, int]:
        """Mean losses over ranks and applied steps since the last call, those of JUDGED over the steps that have them,
        if any; the mean of the gradients' norms (NaN if there were no steps); and how many steps were skipped in this
        session so far."""
        *sums, norms, count, judged = self._process.sum(self._sums.clone()).tolist()
        self._sums.zero_()
        means = {}
        for name, total in zip(self.fields, sums, strict=True):
            among = judged if name in JUDGED else count
            if among or name not in JUDGED:
                means[name] = total / among if among else math.nan
        return means, norms / count if count else math.nan, int(self._skipped)

    def skipped_in_a_row(self) -> int:
        """Up to the last step; the same on all ranks."""
        return int(self._in_a_row)


class Trainer:
    """Drives one run: steps, evaluations, checkpoints, log. Every method is called by all ranks together.

    Args:
        engine: around a policy's model.
        train_loader, val_loader: this rank's shares.
        log: writes on the main rank only.
        stop: by which the ranks agree on when to stop.
        about: goes into every checkpoint's manifest.
    """

    def __init__(
        self,
        config: Config,
        process: Process,
        engine: Engine,
        train_loader: TrainLoader,
        val_loader: EvalLoader,
        checkpoints: Checkpoints,
        log: RunLog,
        stop: StopRequest,
        about: dict[str, Any],
    ):
        self.config = config
        self.process = process
        self.engine = engine
        self.model = model = engine.module
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.checkpoints = checkpoints
        self.log = log
        self.stop = stop
        self.about = about
        self.schedule = Schedule(config, train_loader.steps_per_epoch)
        self.update_momentum = MomentumUpdate(model, config.engine.kernels)
        self.statistics = RunningStatistics(model)
        self.position = Position()
        self._last_saved = asdict(self.position)
        """The position that the newest checkpoint holds: a step may be saved, then evaluated, then saved again."""
        self._written_step = 0
        """The step of the newest checkpoint on disk."""
        self._first_step = 0
        self.progress = process.progress
        self.last_batches: list[Batch] = []
        self._tally = Tally(process, model.Losses._fields)
        self._replaced_images = 0
        self.skipped_steps = 0
        """Of this session, up to the last record."""

    def train(self, position: Position) -> int:
        """Train from a position to the end; returns 0, or the number of the signal that stopped it after saving.

        Raises TrainingError if too many steps in a row were not finite, or if the last checkpoint cannot be written.
        """
        self.position, self._last_saved = position, asdict(position)
        self._first_step = self._written_step = position.step
        recorded = self.config.profile if self.process.is_main else ProfileConfig()
        self.profile = StepProfile(recorded, Path(self.config.output) / PROFILE, self.model, self.log.message)
        self.log.start(self.schedule.total_steps, self.schedule.steps_per_epoch, position.step)
        try:
            while position.step < self.schedule.total_steps:
                self._between_epochs()
                self._train_epoch()
            self._between_epochs()
            self._settle()
            return 0
        except Stopped as stopped:
            self.progress.enter("saving", patient=True)
            if not self.checkpoints.wait() or asdict(position) != self._last_saved:
                self._save()
            self._settle()
            self.stop.nothing_to_lose()
            self.log.event("stopped", position.step, signal=stopped.args[0])
            return stopped.args[0]
        except BaseException as error:
            if not is_lost(error):  # all ranks are alive, and the save under way is as good as any
                self.progress.patient = True
                self.checkpoints.let_finish(30 * self.config.engine.timeout_minutes)
            self.progress.on_failure(error)
            self.log.event("failed", position.step, error=first_line(error))
            self.log.close(failed=True)  # trackers may take a minute
            raise
        finally:
            self.stop.close()
            try:
                self.profile.close()
            finally:
                self.log.close()

    def _train_epoch(self) -> None:
        """From the current position to the end of its epoch."""
        epoch, first = divmod(self.position.step, self.schedule.steps_per_epoch)
        self.model.train()
        batches = self.train_loader.epoch(epoch, start_step=first)
        try:
            for index in range(first, self.schedule.steps_per_epoch):
                self._check_stop()
                compiling = self.config.engine.compile and self.position.step < self._first_step + COMPILING_STEPS
                self.progress.patient = True  # a recording that ends here is written
                self.profile.begin_step(self.position.step)
                self.progress.begin_step(self.position.step, patient=compiling or index == first)
                values = self.schedule.at(self.position.step)
                self._train_step(batches, values)
                self.position.step += 1
                self.log.step(self.position.step, self.config.batch_size)
                if self.position.step % min(self.config.log.every_steps, self.config.engine.max_skipped_steps) == 0:
                    self._check_skipped()
                last = self.position.step == self.schedule.total_steps
                if last or self.position.step % self.config.log.every_steps == 0:
                    self._log_training(epoch, values)
                self.progress.end_step()
                every = self.config.checkpoint.every_steps
                if every and self.position.step % every == 0 and index + 1 < self.schedule.steps_per_epoch:
                    self._save()  # at an epoch's end after the evaluation, whose result belongs to it
        finally:
            batches.close()
        self._report_replaced()

    def _report_replaced(self) -> None:
        """Tell of damaged images that the loaders of all ranks replaced, when there are new ones."""
        total = int(self.process.sum(torch.tensor(self.train_loader.skipped, device=self.process.device)))
        if total > self._replaced_images:
            self._replaced_images = total
            self.log.event("skipped", self.position.step, images=total)
            self.log.message(f"{total} damaged training images replaced since the start (data.on_corrupt=skip)")

    def _train_step(self, batches: Iterator[Batch], values: StepValues) -> None:
        """One optimizer step over its micro batches, then the momentum encoder."""
        set_learning_rates(self.engine.optimizer, values)
        self.statistics.keep()
        self.last_batches = []
        losses_of_step, judged = [], 0
        for micro_step in range(self.config.engine.accumulation_steps):
            self.progress.enter("loading")
            batch = next(batches)
            self.progress.enter("drawing")
            self.last_batches.append(batch)
            where = {
                "seed": self.config.seed,
                "step": self.position.step,
                "micro_step": micro_step,
                "rank": self.process.rank,
            }
            draws = self.model.draw(batch.images, **where, train_generator=values.train_generator)
            judged += getattr(draws, "train_generator", True)
            seed_torch(**where)  # for dropout and stochastic depth
            self.progress.enter("forward")
            losses = self.engine(batch.images, batch.labels, draws, values.mask_loss_weight)
            self.progress.enter("backward")
            self.engine.backward(losses.total)
            skipped = self.engine.step()
            losses_of_step.append(torch.stack([part.detach().float() for part in losses]))
            del losses  # and with them what their graph has kept, before the next forward pass
        # Nobody waits for the verdict: what a skipped step did is undone on the device.
        self.statistics.restore(skipped)
        self.update_momentum(values.momentum, skipped)
        judged /= self.config.engine.accumulation_steps
        self._tally.add(torch.stack(losses_of_step).mean(dim=0), self.engine.grad_norm, skipped, judged)

    def _between_epochs(self) -> None:
        """What is due at the end of an epoch, unless a resumed run did it already."""
        position = self.position
        epoch, first = divmod(position.step, self.schedule.steps_per_epoch)
        if first or not epoch:
            return
        last, settings = epoch == self.config.epochs, self.config.checkpoint
        if position.evaluated_step != position.step and (last or epoch % self.config.eval_every_epochs == 0):
            self._evaluate(epoch)
        due = [
            last,
            settings.keep_best and position.best_step == position.step,
            settings.every_epochs and epoch % settings.every_epochs == 0,
            settings.every_steps and position.step % settings.every_steps == 0,
            self._last_saved["step"] == position.step,  # by a signal, before it was evaluated
        ]
        if asdict(position) != self._last_saved and any(due):
            self._save()

    def _evaluate(self, epoch: int) -> None:
        self.progress.enter("evaluation", patient=True)
        values = validate(self.model, self.val_loader, self.process, self._check_stop, forward=self.engine)
        position = self.position
        position.evaluated_step = position.step
        if values[BEST] > position.best_top1:
            position.best_top1, position.best_step = values[BEST], position.step
        self.log.evaluation(position.step, epoch, values)
        if self.config.log.gallery_pairs:
            self._show_gallery()

    def _save(self) -> None:
        self.progress.enter("saving", patient=True)
        self._last_saved = asdict(self.position)
        self.checkpoints.save(self.engine, self._last_saved, self.about)

    def _settle(self) -> None:
        """Wait for the save that is being written. Raises TrainingError if it fails."""
        if not self.checkpoints.wait():
            raise TrainingError(f"the last checkpoint, of step {self._last_saved['step']}, could not be written")
        self._report_saves()

    def _report_saves(self) -> None:
        for result in self.checkpoints.finished():
            if result.written:
                self._written_step = result.step
                self.log.event("checkpoint", **result._asdict())

    def _log_training(self, epoch: int, values: StepValues) -> None:
        """A record of the mean losses since the last: here, and in `_check_skipped`, training waits for the device."""
        self.progress.enter("logging")
        self._report_saves()
        while self.progress.notes:
            note = self.progress.notes.popleft()
            self.log.event("straggler", self.position.step, **note)
            self.log.message(note["text"])
        losses, grad_norm, skipped = self._tally.read()
        self.skipped_steps = skipped
        names = {"total": "loss", "mask_area": "mask_area", "accuracy": "top1_train"}
        named = {names.get(k, f"loss_{k}"): v for k, v in losses.items()}
        scheduled = {"lr": values.lr}
        if not isinstance(self.model, Classifier):
            scheduled = {k: v for k, v in values._asdict().items() if k != "train_generator"}
        if self.engine.loss_scale:
            scheduled["loss_scale"] = float(self.engine.loss_scale.value)
        others = {"grad_norm": grad_norm, "skipped_steps": skipped, "loader_wait": self.progress.loading_share()}
        self.log.train(self.position.step, epoch, named | scheduled | others)

    def _check_skipped(self) -> None:
        """Raise TrainingError, and leave a dump, when too many steps in a row were skipped."""
        in_a_row = self._tally.skipped_in_a_row()
        if in_a_row < self.config.engine.max_skipped_steps:
            return
        self.progress.enter("writing a dump", patient=True)
        step = self.position.step
        last = self.process.gather(dict(zip(self._tally.fields, self._tally.last.tolist(), strict=True)))
        bad = [
            f"{name} on rank {rank}"
            for rank, losses in enumerate(last)
            for name, v in losses.items()
            if not math.isfinite(v)
        ]
        about = self.about | {"step_values": self.schedule.at(step - 1)._asdict()}
        root = self.checkpoints.run / DUMPS
        dump = write_dump(root, self.checkpoints, self.engine, self.last_batches, asdict(self.position), about)
        self._report_saves()
        look = f"Look into it with `automix replay {dump}`" if dump else "Its dump could not be written"
        saved = f"the last checkpoint is of step {self._written_step}" if self._written_step else "no checkpoint exists"
        raise TrainingError(
            f"{in_a_row} steps in a row were not finite and skipped; in the last one, step {step - 1}, "
            f"{', '.join(bad) if bad else 'all losses were finite, but gradients'} were not. {look}; {saved}. "
            f"A lower optimizer.lr, a warm-up, optimizer.clip_norm or engine.precision=float32 may help"
        )

    def _check_stop(self) -> None:
        self.progress.advance()
        number = self.stop.agreed()
        if number:
            raise Stopped(number)

    @torch.no_grad()
    def _show_gallery(self) -> None:
        """What the policy makes of some of the first validation images, if it mixes images: `draws.gallery_pairs`."""
        batches = iter(self.val_loader)
        batch = next(batches, None)
        batches.close()
        if batch is not None:  # spread over the batch: files often hold one class after the other
            count = min(self.config.log.gallery_pairs, len(batch.images))
            batch = Batch(*(each[torch.linspace(0, len(each) - 1, count).long()] for each in batch))
        images = self.val_loader.blank() if batch is None else batch.images
        sweep = SWEEP if len(images) > 1 else 0
        images = torch.cat([images, images[:1].expand(sweep, *images.shape[1:])])
        self.model.eval()
        mixes = self.engine(images, None, self.model.gallery_draw(images, sweep))
        self.model.train()
        if not self.process.is_main or batch is None or mixes is None:
            return
        gallery = make_gallery(batch.images, batch.labels, mixes, self.model.mean, self.model.std)
        self.log.gallery(self.position.step, gallery)
