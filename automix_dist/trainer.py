"""The training loop, top to bottom. It receives finished parts and knows neither files nor the command line."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from automix_dist.automix import AutoMix, Losses
from automix_dist.checkpoint import Checkpoints
from automix_dist.config import Config
from automix_dist.data import Batch, EvalLoader, TrainLoader
from automix_dist.distributed import Process, StopRequest
from automix_dist.draws import Draws, MixDraw, draw_step, seed_torch
from automix_dist.evaluate import evaluate
from automix_dist.momentum import MomentumUpdate
from automix_dist.optimizer import set_learning_rates
from automix_dist.run_log import RunLog
from automix_dist.schedules import Schedule, StepValues

BEST = "top1_query"
"""What the best checkpoint is best at: one fixed head, so that no choice is made on the validation set."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and why."""


class Stopped(Exception):
    """All ranks agreed to stop; carries the signal's number."""


@dataclass
class Position:
    """Where a run stands: all that a resumed run needs besides the engine's tensors."""

    step: int = 0
    """Optimizer steps done; the epoch and the loader's place follow from it."""
    evaluated_step: int = 0
    saved_step: int = 0
    best_step: int | None = None
    best_top1: float = -1.0


class Trainer:
    def __init__(
        self,
        config: Config,
        process: Process,
        model: AutoMix,
        engine: Any,
        train_loader: TrainLoader,
        val_loader: EvalLoader,
        checkpoints: Checkpoints,
        log: RunLog,
        about: dict[str, Any],
    ):
        """`engine` wraps `model`; `about` goes into every checkpoint's manifest."""
        self.config = config
        self.process = process
        self.model = model
        self.engine = engine
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.checkpoints = checkpoints
        self.log = log
        self.about = about
        self.schedule = Schedule(config, train_loader.steps_per_epoch)
        self.update_momentum = MomentumUpdate(model, config.engine.kernels)
        self.micro_batch_size = config.micro_batch_size(process.world_size)
        self.position = Position()
        self._loss_sums = torch.zeros(len(Losses._fields), device=process.device)
        self._loss_count = 0
        self._skipped = 0

    def train(self, position: Position) -> int:
        """Train from a position to the end; returns 0, or the number of the signal that stopped it after saving.

        Raises TrainingError if the loss is no longer finite, or if the last checkpoint cannot be written.
        """
        self.position = position
        self.log.start(self.schedule.total_steps, self.schedule.steps_per_epoch, position.step)
        self.stop = StopRequest(self.process, self.log.message)
        try:
            while position.step < self.schedule.total_steps:
                self._between_epochs()
                self._train_epoch()
            self._between_epochs()
            return 0
        except Stopped as stopped:
            if position.saved_step != position.step:
                self._save(must=True)
            self.log.event("stopped", position.step, signal=stopped.args[0])
            return stopped.args[0]
        finally:
            self.stop.close()
            self.log.close()

    def _train_epoch(self) -> None:
        """From the current position to the end of its epoch."""
        epoch, first = divmod(self.position.step, self.schedule.steps_per_epoch)
        self.engine.train()
        batches = self.train_loader.epoch(epoch, start_step=first)
        try:
            for _ in range(first, self.schedule.steps_per_epoch):
                self._check_stop()
                values = self.schedule.at(self.position.step)
                self._train_step(batches, values)
                self.position.step += 1
                self.log.step(self.position.step, self.config.batch_size)
                if self.position.step % self.config.log.every_steps == 0:
                    self._log_training(epoch, values)
                every = self.config.checkpoint.every_steps
                if every and self.position.step % every == 0:
                    self._save()
        finally:
            batches.close()
        self._report_skipped()

    def _report_skipped(self) -> None:
        """Tell of damaged images that the loaders of all ranks replaced, when there are new ones."""
        total = int(self.process.sum(torch.tensor(self.train_loader.skipped, device=self.process.device)))
        if total > self._skipped:
            self._skipped = total
            self.log.event("skipped", self.position.step, images=total)
            self.log.message(f"{total} damaged training images replaced since the start (data.on_corrupt=skip)")

    def _train_step(self, batches: Iterator[Batch], values: StepValues) -> None:
        """One optimizer step over its micro batches, then the momentum encoder."""
        set_learning_rates(self.engine.optimizer, values)
        for micro_step in range(self.config.engine.accumulation_steps):
            batch = next(batches)
            where = {
                "seed": self.config.seed,
                "step": self.position.step,
                "micro_step": micro_step,
                "rank": self.process.rank,
            }
            draws = draw_step(self.config.automix, self.micro_batch_size, **where, device=self.process.device)
            seed_torch(**where)  # for dropout and stochastic depth
            losses = self.engine(batch.images, batch.labels, draws, values.mask_loss_weight)
            self.engine.backward(losses.total)
            self.engine.step()
            self._loss_sums += torch.stack([part.detach().float() for part in losses])
            self._loss_count += 1
        if self.engine.was_step_applied():
            self.update_momentum(values.momentum)

    def _between_epochs(self) -> None:
        """What is due at the end of an epoch, unless a resumed run did it already."""
        position = self.position
        epoch, first = divmod(position.step, self.schedule.steps_per_epoch)
        if first or not epoch:
            return
        last = epoch == self.config.epochs
        if position.evaluated_step != position.step and (last or epoch % self.config.eval_every_epochs == 0):
            self._evaluate(epoch)
        every = self.config.checkpoint.every_epochs
        new_best = self.config.checkpoint.keep_best and position.best_step == position.step
        if position.saved_step != position.step and (last or new_best or (every and epoch % every == 0)):
            self._save(must=last)

    def _evaluate(self, epoch: int) -> None:
        values = evaluate(self.engine, self.val_loader, self.process, self._check_stop)
        position = self.position
        position.evaluated_step = position.step
        if values[BEST] > position.best_top1:
            position.best_top1, position.best_step = values[BEST], position.step
        self.log.evaluation(position.step, epoch, values)
        if self.config.log.gallery_pairs:
            self._show_gallery()

    def _save(self, must: bool = False) -> None:
        self._finite_losses()  # weights behind a non-finite loss are not worth keeping
        position = self.position
        saved_before, position.saved_step = position.saved_step, position.step
        seconds = self.checkpoints.save(self.engine, asdict(position), self.about)
        if seconds is None:
            position.saved_step = saved_before
            if must:
                raise TrainingError(f"the last checkpoint, of step {position.step}, could not be written")
            return
        self.log.event("checkpoint", position.step, seconds=seconds)
        self.checkpoints.prune(position.best_step)

    def _log_training(self, epoch: int, values: StepValues) -> None:
        losses = self._finite_losses()
        self._loss_sums.zero_()
        self._loss_count = 0
        names = {"total": "loss", "mask_area": "mask_area", "accuracy": "top1_train"}
        named = {names.get(k, f"loss_{k}"): v for k, v in losses.items()}
        self.log.train(self.position.step, epoch, named | values._asdict())

    def _finite_losses(self) -> dict[str, float]:
        """Mean losses since the last record, over steps and ranks; the only place where training waits for them."""
        count = max(self._loss_count, 1) * self.process.world_size
        means = (self.process.sum(self._loss_sums.clone()) / count).tolist()
        losses = dict(zip(Losses._fields, means, strict=True))
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"loss no longer finite ({', '.join(bad)}) by step {self.position.step}; the last checkpoint is of "
                f"step {self.position.saved_step}. A lower optimizer.lr, a warm-up or engine.precision=float32 may help"
            )
        return losses

    def _check_stop(self) -> None:
        number = self.stop.agreed()
        if number:
            raise Stopped(number)

    @torch.no_grad()
    def _show_gallery(self) -> None:
        """What the Mix Block makes of the first validation images, for lambda from 0.1 to 0.9."""
        batches = iter(self.val_loader)
        batch = next(batches, None)
        batches.close()
        images = self.val_loader.blank() if batch is None else batch.images[: self.config.log.gallery_pairs]
        size, device = len(images), images.device
        draw = MixDraw(
            lam=torch.linspace(0.1, 0.9, size, device=device),
            partner=torch.arange(size, device=device).roll(-1),
            upsampling=self.config.automix.upsampling[0],
        )
        self.engine.eval()
        mask, mixed = self.engine(images, None, Draws(draw, draw, False, True))
        self.engine.train()
        if not self.process.is_main or batch is None:
            return
        mean, std = (v[:, None, None] for v in (self.model.mean, self.model.std))
        pixels = ((mixed * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
        labels = batch.labels[:size]
        self.log.gallery(
            self.position.step,
            images=images.cpu().numpy(),
            partners=images[draw.partner].cpu().numpy(),
            masks=mask.cpu().numpy().astype(np.float16),
            mixed=pixels.cpu().numpy(),
            lam=draw.lam.cpu().numpy(),
            labels=labels.cpu().numpy(),
            partner_labels=labels[draw.partner].cpu().numpy(),
        )
