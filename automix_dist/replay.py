"""A step that went wrong, kept and looked at again: the weights before it and every rank's micro batches.

RUN/dumps/step_00000012/
    checkpoints/step_00000013/      as any checkpoint, see checkpoint_files.py; the skipped step left its weights alone
    batches_00000.safetensors ...   one per rank: images and labels of each micro batch of step 12
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from automix_dist.checkpoint import Checkpoints
from automix_dist.checkpoint_files import CheckpointError, Saved, find_checkpoint, write_tensors
from automix_dist.config import CheckpointConfig, Config
from automix_dist.draws import seed_torch
from automix_dist.engines import Engine
from automix_dist.precision import BACKOFF, scaled

DUMPS = "dumps"


def write_dump(
    root: Path,
    checkpoints: Checkpoints,
    engine: Engine,
    batches: list[Any],
    state: dict[str, Any],
    about: dict[str, Any],
) -> Path | None:
    """Keep the last step of a run for `replay`; called by all ranks. Returns the dump's folder; None if it could not be
    written, which is said.

    Args:
        state, about: as for `Checkpoints.save`; `about` holds the step's scheduled values as `step_values`.
    """
    folder = root / f"step_{state['step'] - 1:08d}"
    checkpoints.wait()
    if checkpoints.process.is_main:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt at this step
    checkpoints.process.barrier()
    dump = Checkpoints(folder, CheckpointConfig(), checkpoints.process, checkpoints.say)
    dump.save(engine, state, about)
    written = dump.wait()
    tensors, problem = {}, None
    for index, batch in enumerate(batches):
        tensors |= {f"images/{index}": batch.images.cpu(), f"labels/{index}": batch.labels.cpu()}
    try:
        write_tensors(tensors, _batches_file(folder, checkpoints.process.rank))
    except (OSError, SafetensorError) as error:
        problem = f"rank {checkpoints.process.rank}: its batches could not be kept: {error}"
    problems = checkpoints.process.gather(problem)
    for problem in filter(None, problems):
        checkpoints.say(problem)
    return folder if written and not all(problems) else None


def find_dump(folder: Path) -> Saved:
    """The checkpoint of a dump. Raises CheckpointError if the folder is none, or it is damaged."""
    if not any(folder.glob("batches_*.safetensors")):
        near = (sorted(root.glob("step_*/checkpoints")) for root in (folder / DUMPS, folder, folder.parent))
        dumps = [str(each.parent) for each in next(filter(None, near), [])]
        expected = f"one of {', '.join(dumps)}" if dumps else "RUN/dumps/STEP, left by a run that skipped too many"
        raise CheckpointError(f"{folder} is not a dump: expected {expected}")
    return find_checkpoint(folder)


def replay(model: nn.Module, config: Config, saved: Saved, rank: int, say: Callable[[str], None]) -> bool:
    """Compute a rank's part of a dumped step again, forward and backward, and say where numbers stop being finite.

    Args:
        model: with the dump's weights, on the device to use.
        config: the run's.
        saved: the dump's checkpoint.
        rank: whose micro batches.

    Returns:
        whether everything was finite this time.

    Raises CheckpointError if the rank's batches are missing or damaged.
    """
    folder, step = saved.folder.parent.parent, saved.step - 1
    path = _batches_file(folder, rank)
    try:
        tensors = load_file(path, device=str(next(model.parameters()).device))
    except (OSError, SafetensorError) as error:
        kept = sorted(int(each.stem.removeprefix("batches_")) for each in folder.glob("batches_*.safetensors"))
        raise CheckpointError(f"{path} cannot be read ({error}); the dump has batches of ranks {kept}") from error
    model.train()
    if "loss_scale" in saved.manifest["optimizer_scalars"]:  # of after the step, which has lowered it
        scale = saved.manifest["optimizer_scalars"]["loss_scale"] / BACKOFF
        model.loss_scale = torch.tensor(scale, device=tensors["labels/0"].device)
    found: list[str] = []
    handles = [m.register_forward_hook(_report_output(name, found)) for name, m in model.named_modules() if name]
    for micro_step in range(config.engine.accumulation_steps):
        images, labels = tensors[f"images/{micro_step}"], tensors[f"labels/{micro_step}"]
        where = {"seed": config.seed, "step": step, "micro_step": micro_step, "rank": rank}
        draws = model.draw(images, **where, train_generator=saved.manifest["step_values"]["train_generator"])
        seed_torch(**where)
        losses = model(images, labels, draws, saved.manifest["step_values"]["mask_loss_weight"])
        scaled(losses.total, model.loss_scale).backward()
        say(f"step {step}, rank {rank}, micro batch {micro_step}: " + _values(losses._asdict()))
    for handle in handles:
        handle.remove()
    if found:
        say(f"first output that is not finite: {found[0]} ({len(found)} modules in all)")
    wrong = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()}
    if wrong:
        say(f"gradients that are not finite: {len(wrong)} parameters, {', '.join(list(wrong)[:5])}")
    weights = [n for n, p in model.named_parameters() if not p.isfinite().all()]
    if weights:
        say(f"weights that are not finite: {len(weights)} parameters, {', '.join(weights[:5])}")
    return not (found or wrong or weights)


def _batches_file(folder: Path, rank: int) -> Path:
    return folder / f"batches_{rank:05d}.safetensors"


def _report_output(name: str, found: list[str]) -> Callable:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.append(name)

    return hook


def _values(values: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {float(value.detach()):g}" for name, value in values.items())
