"""The engines that reduce gradients over the ranks and step the optimizer: DeepSpeed's ZeRO 0 to 3, DDP, FSDP2.

All step the same torch optimizer, fused, over float32 weights. Clipping and the skipping of non-finite steps happen
inside the optimizer's own kernels (`grad_scale`, `found_inf`), alike under every engine, without waiting for the GPU;
but ZeRO 1 and 2 wait for the last reduction themselves.
"""

import contextlib
import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from automix_kernels.api import device_obstacle
from torch import Tensor, nn

from automix_dist.config import Config, ConfigError
from automix_dist.distributed import Process
from automix_dist.optimizer import state_keys
from automix_dist.precision import INITIAL, LossScale, autocast_dtype, autocast_name, scaled


class Engine:
    """What the trainer drives. `module` is the model; `optimizer` carries the parameter groups.

    Call it for the forward pass; then `backward`, then `step`, once per micro batch.
    """

    name: str
    """zero0 to zero3, ddp or fsdp2."""
    sharded: bool
    """Whether each rank holds a part of the optimizer's state and of the gradients, rather than all of them."""
    module: nn.Module
    optimizer: torch.optim.Optimizer
    """The torch optimizer that steps the tensors of this rank."""
    grad_norm: Tensor
    """After a step: the norm of its gradients over all ranks, before clipping; a float32 scalar on the device."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, config: Config, process: Process):
        self.module = module
        self.optimizer = optimizer
        self.process = process
        self.accumulation_steps = config.engine.accumulation_steps
        self.clip_norm = config.optimizer.clip_norm
        in_float16 = autocast_dtype(config.engine, process.device) == torch.float16
        self.loss_scale = LossScale(process.device) if in_float16 else None
        # The model needs it for what it differentiates itself.
        module.loss_scale = self.loss_scale.value if in_float16 else None
        self._micro_step = 0

    def __call__(self, *arguments: Any) -> Any:
        raise NotImplementedError

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of loss / accumulation_steps; with the last micro batch reduce them over ranks."""
        # A loss that is not finite makes every gradient so, on all ranks, and the step is skipped.
        gate = torch.where(loss.detach().isfinite(), 1.0, math.nan)
        self._micro_step = self._micro_step % self.accumulation_steps + 1
        self._backward(scaled(loss * gate, self.module.loss_scale))

    def step(self) -> Tensor | None:
        """After the last micro batch: clip and step.

        Returns:
            None before the last micro batch; then a float32 scalar on the device, the same on all ranks: 1 if the
            gradients were not finite and the step was skipped, else 0.
        """
        if self._micro_step < self.accumulation_steps:
            self._between()
            return None
        gradients = self._gradients()
        square = torch.stack(torch._foreach_norm(gradients)).square().sum().to(self.process.device)
        if self.sharded:
            self.process.sum(square)
        loss_scale = self.module.loss_scale
        norm = square.sqrt() if loss_scale is None else square.sqrt() / loss_scale
        self.grad_norm = norm
        skipped = (~norm.isfinite()).float()
        divisor = loss_scale
        if self.clip_norm:
            divisor = scaled(((norm + 1e-6) / self.clip_norm).clamp(min=1), loss_scale)
        # Where the optimizer is offloaded, its gradients and its step are on the host.
        self.optimizer.found_inf = skipped.to(gradients[0].device)
        self.optimizer.grad_scale = divisor if divisor is None else divisor.to(gradients[0].device)
        self._step()
        if self.loss_scale:
            self.loss_scale.update(skipped)
        return skipped

    def create_optimizer_state(self, scalars: dict[str, float] | None = None) -> None:
        """Make the optimizer's state, zeros, before its first step: a checkpoint fills it, and torch's fused SGD would
        leave it uninitialised if the first step is skipped.

        Args:
            scalars: state that is one number, from `engine_state.optimizer_scalars` of a saving run; zeros if absent.
        """
        if self.loss_scale:
            self.loss_scale.load(scalars or {})
        tensors, numbers = state_keys(self.optimizer)
        for group, stepped in self._stepped():
            state = self.optimizer.state[stepped]
            for key in tensors if group.get("momentum", 1) else []:
                state.setdefault(key, torch.zeros_like(stepped))
            for key in numbers:
                state[key] = torch.tensor((scalars or {}).get(key, 0.0), device=stepped.device)

    def _stepped(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Every tensor that the optimizer steps on this rank, with its parameter group."""
        for group in self.optimizer.param_groups:
            yield from ((group, tensor) for tensor in group["params"])

    def _backward(self, loss: Tensor) -> None:
        raise NotImplementedError

    def _between(self) -> None:
        """What the engine does after a micro batch that is not the last."""

    def _step(self) -> None:
        raise NotImplementedError

    def _gradients(self) -> list[Tensor]:
        """The reduced gradients that this rank's optimizer will step with."""
        raise NotImplementedError


@contextlib.contextmanager
def _without(package: str) -> Iterator[None]:
    """Within the block the package counts as not installed, unless it is imported already.

    DeepSpeed's autotuner, which is not used, imports MLflow where there is one, and that takes a second.
    """
    hidden = package not in sys.modules
    if hidden:
        sys.modules[package] = None
    try:
        yield
    finally:
        if hidden:
            del sys.modules[package]


class DeepSpeedEngine(Engine):
    """DeepSpeed's ZeRO 0 to 3."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, config: Config, process: Process):
        super().__init__(module, optimizer, config, process)
        with _without("mlflow"):
            import deepspeed

        self.stage = config.engine.zero_stage
        self.offload = config.engine.offload_optimizer
        self.name = f"zero{self.stage}"
        self.sharded = self.stage > 0
        deepspeed.utils.logger.setLevel(logging.ERROR)
        # Used by inference only, but compiled for a minute at the first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.deepspeed, *_ = deepspeed.initialize(
            # Channels-last weights crash DeepSpeed 0.19; convolutions take channels-last images with contiguous ones.
            model=module.to(memory_format=torch.contiguous_format),
            optimizer=optimizer,
            model_parameters=[p for group in optimizer.param_groups for p in group["params"]],
            config=deepspeed_settings(config, process.world_size, process.device),
            dist_init_required=False,
        )

    def __call__(self, *arguments: Any) -> Any:
        return self.deepspeed(*arguments)

    def _backward(self, loss: Tensor) -> None:
        self.deepspeed.backward(loss)

    def _between(self) -> None:
        self.deepspeed.step()

    def _step(self) -> None:
        self.deepspeed.step()

    def _stepped(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        if self.stage < 3:
            yield from super()._stepped()
            return
        zero = self.deepspeed.optimizer  # its sub-groups take their places in the optimizer one after the other
        for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
            yield self.optimizer.param_groups[zero.sub_group_to_group_id[index]], flat

    def _gradients(self) -> list[Tensor]:
        zero = self.deepspeed.optimizer
        if self.stage == 0:
            return [p.grad for p in self.module.parameters() if p.grad is not None]
        if self.offload:
            if self.process.device.type == "cuda":
                torch.cuda.synchronize()  # DeepSpeed's copies to the host
            flat = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
            return [partition.grad for partition in flat]
        return [g for group in zero.averaged_gradients.values() for g in group]


class DDPEngine(Engine):
    """torch's DistributedDataParallel; a lone rank has nobody to reduce with, and does without the buckets' copies."""

    name, sharded = "ddp", False

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, config: Config, process: Process):
        super().__init__(module, optimizer, config, process)
        if config.engine.compile:
            torch._dynamo.config.optimize_ddp = False  # it would split the compiled regions where buckets end
        self.ddp = module
        if process.world_size == 1:
            return
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # the key's new name is too new
            self.ddp = nn.parallel.DistributedDataParallel(
                module,
                device_ids=[process.device] if process.device.type == "cuda" else None,
                broadcast_buffers=False,  # BatchNorm statistics are each rank's own
                gradient_as_bucket_view=True,
                bucket_cap_mb=config.engine.bucket_size * 4 / 2**20,
                # Otherwise the buckets are formed anew after the first step, and a resumed run sums in another order;
                # a sum of two has but one.
                find_unused_parameters=process.world_size > 2,
            )

    def __call__(self, *arguments: Any) -> Any:
        # Whether gradients are reduced is decided here, by the forward pass of the last micro batch.
        last = (self._micro_step + 1) % self.accumulation_steps == 0
        with contextlib.nullcontext() if last or self.ddp is self.module else self.ddp.no_sync():
            return self.ddp(*arguments)

    def _backward(self, loss: Tensor) -> None:
        (loss / self.accumulation_steps).backward()

    def _step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.module.parameters() if p.grad is not None]


class FSDP2Engine(Engine):
    """torch's fully_shard: weights, gradients, optimizer state and momentum encoder are sharded.

    Accelerate's wrapper is not used: it gives a DDP model on a CPU without a word. The optimizer steps plain tensors,
    the local shards, so that its fused kernels apply; the whole model is one unit, gathered for a pass over it.
    """

    name, sharded = "fsdp2", True

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, config: Config, process: Process):
        super().__init__(module, optimizer, config, process)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        names = {p: name for name, p in module.named_parameters()}
        groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        mesh = init_device_mesh(process.device.type, (process.world_size,))
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        self._shards = {n: (p.to_local().detach(), p) for n, p in module.named_parameters() if p.requires_grad}
        for group, members in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = [self._shards[name][0] for name in members]

    def __call__(self, *arguments: Any) -> Any:
        return self.module(*arguments)

    def local(self, name: str) -> Tensor:
        """The plain tensor, this rank's shard of a trained parameter, that the optimizer steps."""
        return self._shards[name][0]

    def _backward(self, loss: Tensor) -> None:
        self.module.set_requires_gradient_sync(self._micro_step == self.accumulation_steps)
        (loss / self.accumulation_steps).backward()

    def _step(self) -> None:
        self.optimizer.step()
        for shard, parameter in self._shards.values():
            shard.grad = parameter.grad = None

    def _gradients(self) -> list[Tensor]:
        for shard, parameter in self._shards.values():
            shard.grad = None if parameter.grad is None else parameter.grad.to_local()
        return [shard.grad for shard, _ in self._shards.values() if shard.grad is not None]


def build_engine(module: nn.Module, optimizer: torch.optim.Optimizer, config: Config, process: Process) -> Engine:
    """The engine that the config names, around a model that is on its device.

    Raises ConfigError for an engine that cannot train this model.
    """
    scalars = [name for name, parameter in module.named_parameters() if parameter.ndim == 0]
    if scalars and config.engine.name != "ddp":
        raise ConfigError(
            f"engine.name = {config.engine.name!r} takes no parameters without dimensions, as {scalars[0]} is: "
            f"set it to ddp"
        )
    kinds = {"deepspeed": DeepSpeedEngine, "ddp": DDPEngine, "fsdp2": FSDP2Engine}
    engine = kinds[config.engine.name](module, optimizer, config, process)
    engine.create_optimizer_state()
    return engine


def deepspeed_settings(config: Config, world_size: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's JSON, derived from the one config, and merged with the user's own (engine.deepspeed_json).

    What DeepSpeed would default silently is written out. Its own bf16 block stays off: it breaks BatchNorm and loses
    the momentum update; the model autocasts itself. It never clips: the optimizer does (`Engine.step`).

    Raises ConfigError for a key of the user's that contradicts the config, or that this program cannot honour.
    """
    engine = config.engine
    settings = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size(world_size),
        "gradient_accumulation_steps": engine.accumulation_steps,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # waits for the GPU twice a step; the trainer has its own clock
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": engine.zero_stage,
            "overlap_comm": device.type == "cuda" and engine.zero_stage > 0,
            "contiguous_gradients": True,
            "reduce_bucket_size": engine.bucket_size,
            "allgather_bucket_size": engine.bucket_size,
            "stage3_prefetch_bucket_size": engine.bucket_size,
            # Norms and biases stay whole: gathering hundreds of tiny tensors per pass costs more than they weigh.
            "stage3_param_persistence_threshold": 10_000,
            "stage3_model_persistence_threshold": 2**62,
            # DeepSpeed's norm waits for the GPU in each step; ours does not. Stage 3 and offload insist on it.
            "compute_grad_norm": engine.zero_stage not in (1, 2) or engine.offload_optimizer,
        },
    }
    if engine.offload_optimizer:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if engine.deepspeed_json:
        _merge(settings, _read_json(engine.deepspeed_json), config, path="")
    return settings


# Where the one config has the say: DeepSpeed's key, and ours that sets it.
DECIDED_BY = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "batch_size and engine.accumulation_steps",
    "gradient_accumulation_steps": "engine.accumulation_steps",
    "gradient_clipping": "optimizer.clip_norm",
    "bf16.enabled": "engine.precision",
    "fp16.enabled": "engine.precision",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.reduce_bucket_size": "engine.bucket_size",
    "zero_optimization.allgather_bucket_size": "engine.bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size": "engine.bucket_size",
    "zero_optimization.compute_grad_norm": "optimizer.clip_norm",
    "zero_optimization.offload_optimizer.device": "engine.offload_optimizer",
    "zero_optimization.contiguous_gradients": "engine.zero_stage",
}
# What may be added: it changes neither the method nor where the state lies. communication_data_type changes results by
# rounding: it is the type in which gradients are reduced.
ADDABLE = {
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler",
    "communication_data_type", "zero_optimization.overlap_comm", "zero_optimization.reduce_scatter",
    "zero_optimization.allgather_partitions", "zero_optimization.use_multi_rank_bucket_allreduce",
    "zero_optimization.stage3_param_persistence_threshold", "zero_optimization.stage3_model_persistence_threshold",
    "zero_optimization.stage3_max_live_parameters", "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.sub_group_size", "zero_optimization.offload_optimizer.pin_memory",
    "zero_optimization.log_trace_cache_warnings", "zero_optimization.memory_efficient_linear",
}  # fmt: skip


def _read_json(path: str) -> dict[str, Any]:
    try:
        values = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"engine.deepspeed_json = {path!r} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"engine.deepspeed_json = {path!r}: expected a JSON object, got {type(values).__name__}")
    return values


def _merge(settings: dict[str, Any], extra: dict[str, Any], config: Config, path: str) -> None:
    """Put the user's keys into the derived settings, in place."""
    for name, value in extra.items():
        key = f"{path}{name}"
        source = f"engine.deepspeed_json = {config.engine.deepspeed_json!r}"
        if isinstance(value, dict) and key in (
            "bf16",
            "fp16",
            "zero_optimization",
            "zero_optimization.offload_optimizer",
        ):
            _merge(settings.setdefault(name, {}), value, config, f"{key}.")
        elif key in DECIDED_BY:
            ours = config.optimizer.clip_norm if key == "gradient_clipping" else settings.get(name)
            if value not in ("auto", ours):
                raise ConfigError(
                    f"{source} sets {key} to {value!r}, but {DECIDED_BY[key]} makes it {ours!r}: remove the key from "
                    f"the JSON, or change {DECIDED_BY[key]}"
                )
        elif key in ADDABLE:
            settings[name] = value
        else:
            raise ConfigError(
                f"{source}: {key} cannot be used here; optimizer, schedule, precision and checkpoints are set in the "
                f"config, and what may be added is {', '.join(sorted(ADDABLE))}"
            )


def summary(config: Config, world_size: int, device: torch.device) -> list[str]:
    """Where and how a run trains, in short: ranks and device, batch, engine, precision, kernels."""
    engine = config.engine
    name = f"DeepSpeed ZeRO {engine.zero_stage}" if engine.name == "deepspeed" else engine.name.upper()
    on_gpu = device.type == "cuda"
    automatic = "triton" if device_obstacle(device) is None else "reference"
    kernels = automatic if engine.kernels == "auto" else engine.kernels
    return [
        f"{world_size} rank(s) on {torch.cuda.get_device_name(device) if on_gpu else 'the CPU'}",
        f"{config.micro_batch_size(world_size)} images x {engine.accumulation_steps} micro batch(es) each",
        name,
        autocast_name(config, device),
        f"kernels {kernels}",
    ]


def describe(config: Config, world_size: int, device: torch.device) -> list[str]:
    """What the engine's settings come to, a line each, for people to check."""
    engine, optimizer = config.engine, config.optimizer
    micro = config.micro_batch_size(world_size)
    lines = [
        f"batch: {micro} images x {world_size} rank(s) x {engine.accumulation_steps} micro batch(es) = "
        f"{config.batch_size} per optimizer step",
        f"clipping: {f'gradient norm over all ranks at {optimizer.clip_norm:g}' if optimizer.clip_norm else 'none'}",
        "precision: weights, BatchNorm statistics, gradients and optimizer state float32; forward passes "
        f"{autocast_name(config, device)}{_loss_scaling(config, device)}",
        f"non-finite steps: skipped and counted; the run stops after at least {engine.max_skipped_steps} in a row",
    ]
    bucket = engine.bucket_size * 4 / 2**20
    if engine.name == "deepspeed":
        settings = deepspeed_settings(config, world_size, device)["zero_optimization"]
        sharded = ["nothing", "optimizer state", "optimizer state and gradients", "everything"][engine.zero_stage]
        overlap = settings["overlap_comm"]
        lines += [
            f"engine: DeepSpeed ZeRO {engine.zero_stage}, sharding {sharded}"
            f"{', optimizer state in host memory' if engine.offload_optimizer else ''}",
            f"reduction: buckets of {bucket:.0f} MiB x {2 if overlap else 1}, "
            f"{_when_reduced(config) if overlap else 'not overlapping with the backward pass'}",
        ]
    elif engine.name == "ddp":
        reduction = f"reduction: buckets of {bucket:.0f} MiB, {_when_reduced(config)}"
        lines += ["engine: DDP, sharding nothing", reduction]
    else:
        lines += ["engine: FSDP2, sharding everything", "reduction: one bucket, after the backward pass"]
    horizon = f"{config.epochs} epochs, cosine per {optimizer.lr_update} from {optimizer.lr:g} to {optimizer.min_lr:g}"
    warmup = f", after {optimizer.warmup_epochs:g} epochs of warm-up" if optimizer.warmup_epochs else ""
    decay = f"; times {optimizer.layer_decay:g} for each layer from the top" if optimizer.layer_decay < 1 else ""
    lines.append(f"learning rate: {horizon}{warmup}{decay}")
    if optimizer.mix_lrs is not None:
        lines.append("learning rate of the Mix Block: from {:g} to {:g}, without warm-up".format(*optimizer.mix_lrs))
    return lines


def _when_reduced(config: Config) -> str:
    """Of buckets that are sent as soon as they are full: a graph hands over all gradients at once, and a compiled
    region its own at its end."""
    if config.engine.cuda_graph:
        return "after the backward pass"
    return f"overlapping with the backward pass{', after each compiled region' if config.engine.compile else ''}"


def _loss_scaling(config: Config, device: torch.device) -> str:
    if autocast_dtype(config.engine, device) != torch.float16:
        return ""
    return f"; losses times a power of two, {INITIAL:.0f} at first, that halves whenever something overflows"
