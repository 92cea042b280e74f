"""Every tensor of training state that a rank holds, as named slices of whole tensors, whatever the engine shards.

This is what makes a checkpoint independent of the world size and of the ZeRO stage: `pieces` lists views into the live
memory, each with the name of its whole tensor and its place in it. Saving writes the views, loading fills them.

    param/NAME          float32 weights of the query encoder, Mix Block (master copies) and momentum encoder
    optimizer/NAME/KEY  optimizer state of the same shape as the parameter
    buffer/NAME         buffers (BatchNorm statistics); each rank has its own
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Piece:
    """A slice of a whole tensor, flattened, that lives on this rank."""

    name: str
    view: Tensor
    """[n], a view into live memory."""
    start: int
    """Where the slice begins in the flattened whole."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    save: bool
    """Whether this rank writes the slice; of copies on several ranks, one writes."""


def pieces(engine: Any, rank: int, world_size: int) -> list[Piece]:
    """All pieces of this rank. Optimizer state appears once it exists (see `create_optimizer_state`)."""
    stage = engine.zero_optimization_stage()
    enumerate_stage = {0: _whole, 1: _stage_1_2, 2: _stage_1_2, 3: _stage_3}[stage]
    found = []
    for index, (name, parameter) in enumerate(engine.module.named_parameters()):
        writes = index % world_size == rank  # whole copies are shared out among the writers
        found += enumerate_stage(engine, name, parameter, writes)
    for name, buffer in persistent_buffers(engine.module):
        found.append(Piece(f"buffer/{name}", buffer.view(-1), 0, tuple(buffer.shape), True))
    return found


def persistent_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers that belong in a checkpoint, by name."""
    kept = module.state_dict(keep_vars=True).keys() - dict(module.named_parameters()).keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in kept]


def optimizer_scalars(engine: Any) -> dict[str, float]:
    """Optimizer state that is one number per parameter group (AdamW's step count), by key."""
    scalars: dict[str, float] = {}
    for state in _base_optimizer(engine).state.values():
        scalars |= {k: float(v) for k, v in state.items() if torch.is_tensor(v) and v.numel() == 1 and v.ndim == 0}
    return scalars


def create_optimizer_state(engine: Any, keys: dict[str, set[str]], scalars: dict[str, float]) -> None:
    """Make the optimizer state that a checkpoint will fill: torch optimizers create theirs in the first step.

    Args:
        keys: for each parameter name, the tensor keys found in the checkpoint, e.g. {"momentum_buffer"}.
        scalars: from `optimizer_scalars` of the saving run.
    """
    optimizer = _base_optimizer(engine)
    for name, parameter in engine.module.named_parameters():
        master = _master(engine, parameter) if parameter.requires_grad else None
        if master is None:
            continue
        state = optimizer.state[master]
        for key in keys.get(name, ()):
            if not torch.is_tensor(state.get(key)):
                state[key] = torch.zeros_like(master)
        for key, value in scalars.items():
            state[key] = torch.tensor(value)


def after_loading(engine: Any) -> None:
    """Bring ZeRO 3's working copies of the weights in line with the master copies that were just filled."""
    if engine.zero_optimization_stage() != 3:
        return
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            master, offset = _stage_3_master(engine, parameter)
            parameter.ds_tensor.data.copy_(master.narrow(0, offset, parameter.partition_numel()))
    persistent = engine.optimizer.persistent_parameters
    if persistent:
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)


def _base_optimizer(engine: Any) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


def _master(engine: Any, parameter: nn.Parameter) -> Tensor | None:
    """The float32 tensor that the optimizer steps for this parameter; None if another rank holds all of it."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return parameter
    if stage == 3:
        return _stage_3_master(engine, parameter)[0]
    mapping = parameter._hp_mapping
    return None if mapping is None else engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]


def _tensor_state(engine: Any, master: Tensor) -> Iterator[tuple[str, Tensor]]:
    for key, value in _base_optimizer(engine).state.get(master, {}).items():
        if torch.is_tensor(value) and value.numel() == master.numel() and value.ndim > 0:
            yield key, value


def _whole(engine: Any, name: str, parameter: nn.Parameter, writes: bool) -> list[Piece]:
    """Nothing is sharded."""
    shape = tuple(parameter.shape)
    found = [Piece(f"param/{name}", parameter.data.view(-1), 0, shape, writes)]
    if parameter.requires_grad:
        for key, value in _tensor_state(engine, parameter):
            found.append(Piece(f"optimizer/{name}/{key}", value.view(-1), 0, shape, writes))
    return found


def _stage_1_2(engine: Any, name: str, parameter: nn.Parameter, writes: bool) -> list[Piece]:
    """Weights are whole on every rank; master copies and optimizer state are one flat partition per group and rank."""
    shape = tuple(parameter.shape)
    whole = Piece(f"param/{name}", parameter.data.view(-1), 0, shape, writes and not parameter.requires_grad)
    mapping = parameter._hp_mapping if parameter.requires_grad else None
    if mapping is None:
        return [whole]
    start, place = mapping.lp_fragment_address.start, mapping.hp_fragment_address
    master = _master(engine, parameter)
    found = [whole, Piece(f"param/{name}", master.data.narrow(0, place.start, place.numel), start, shape, True)]
    for key, value in _tensor_state(engine, master):
        found.append(Piece(f"optimizer/{name}/{key}", value.narrow(0, place.start, place.numel), start, shape, True))
    return found


def _stage_3(engine: Any, name: str, parameter: nn.Parameter, writes: bool) -> list[Piece]:
    """Each rank holds an equal share of every flattened parameter; the last shares may end in padding."""
    del writes  # nothing is held twice
    shape = tuple(parameter.ds_shape)
    share = parameter.partition_numel()
    start = torch.distributed.get_rank() * share
    length = max(0, min(share, math.prod(shape) - start))
    if length == 0:
        return []
    if not parameter.requires_grad:
        return [Piece(f"param/{name}", parameter.ds_tensor.data.narrow(0, 0, length), start, shape, True)]
    master, offset = _stage_3_master(engine, parameter)
    found = [Piece(f"param/{name}", master.data.narrow(0, offset, length), start, shape, True)]
    for key, value in _tensor_state(engine, master):
        found.append(Piece(f"optimizer/{name}/{key}", value.narrow(0, offset, length), start, shape, True))
    return found


def _stage_3_master(engine: Any, parameter: nn.Parameter) -> tuple[Tensor, int]:
    """The flat float32 partition that holds this rank's share of a parameter, and where in it the share begins."""
    optimizer = engine.optimizer
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    return optimizer.fp32_partitioned_groups_flat[group], offset
