"""Every tensor of training state that a rank holds, as named slices of whole tensors, whatever the engine shards.

This is what makes a checkpoint independent of the world size and of the engine: `pieces` lists views into the live
memory, each with the name of its whole tensor and its place in it. Saving writes the views, loading fills them.

    param/NAME          float32 weights of the query encoder, Mix Block (master copies) and momentum encoder
    optimizer/NAME/KEY  optimizer state of the same shape as the parameter
    buffer/NAME         buffers (BatchNorm statistics); each rank has its own
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from automix_dist.engines import Engine


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


def pieces(engine: Engine, rank: int, world_size: int) -> list[Piece]:
    """All pieces of this rank."""
    pieces_of = {"zero1": _stage_1_2, "zero2": _stage_1_2, "zero3": _stage_3, "fsdp2": _fsdp2}.get(engine.name, _whole)
    found = []
    for index, (name, parameter) in enumerate(engine.module.named_parameters()):
        writes = index % world_size == rank  # whole copies are shared out among the writers
        found += pieces_of(engine, name, parameter, writes)
    for name, buffer in persistent_buffers(engine.module):
        found.append(Piece(f"buffer/{name}", buffer.view(-1), 0, tuple(buffer.shape), True))
    return found


def persistent_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers that belong in a checkpoint, by name."""
    kept = module.state_dict(keep_vars=True).keys() - dict(module.named_parameters()).keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in kept]


def optimizer_scalars(engine: Engine) -> dict[str, float]:
    """State of the optimizer that is one number for all parameters, by key: AdamW's step count, the loss scale."""
    steps = [float(state["step"]) for state in engine.optimizer.state.values() if torch.is_tensor(state.get("step"))]
    scale = engine.loss_scale.state() if engine.loss_scale else {}
    return {"step": steps[-1], **scale} if steps else scale


def after_loading(engine: Engine) -> None:
    """Bring ZeRO 3's working copies of the weights in line with the master copies that were just filled."""
    if engine.name != "zero3":
        return
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            master, offset = _stage_3_master(engine, parameter)
            parameter.ds_tensor.data.copy_(master.narrow(0, offset, parameter.partition_numel()))
    persistent = engine.deepspeed.optimizer.persistent_parameters
    if persistent:
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)


def _tensor_state(engine: Engine, master: Tensor) -> Iterator[tuple[str, Tensor]]:
    for key, value in engine.optimizer.state.get(master, {}).items():
        if torch.is_tensor(value) and key != "step":
            yield key, value


def _with_state(
    engine: Engine, name: str, held: Tensor, place: slice, start: int, shape: tuple[int, ...], save: bool
) -> list[Piece]:
    """Part of a tensor that the optimizer steps, or of a weight that it does not, and of its state."""
    tensors = {f"param/{name}": held.data}
    tensors |= {f"optimizer/{name}/{key}": value for key, value in _tensor_state(engine, held)}
    return [Piece(each, tensor.view(-1)[place], start, shape, save) for each, tensor in tensors.items()]


def _whole(engine: Engine, name: str, parameter: nn.Parameter, writes: bool) -> list[Piece]:
    """Nothing is sharded."""
    return _with_state(engine, name, parameter, slice(None), 0, tuple(parameter.shape), writes)


def _stage_1_2(engine: Engine, name: str, parameter: nn.Parameter, writes: bool) -> list[Piece]:
    """Weights are whole on every rank; master copies and optimizer state are one flat partition per group and rank."""
    shape = tuple(parameter.shape)
    whole = Piece(f"param/{name}", parameter.data.view(-1), 0, shape, writes and not parameter.requires_grad)
    mapping = parameter._hp_mapping if parameter.requires_grad else None
    if mapping is None:
        return [whole]
    start, place = mapping.lp_fragment_address.start, mapping.hp_fragment_address
    master = engine.deepspeed.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    part = slice(place.start, place.start + place.numel)
    return [whole, *_with_state(engine, name, master, part, start, shape, True)]


def _stage_3(engine: Engine, name: str, parameter: nn.Parameter, writes: bool) -> list[Piece]:
    """Each rank holds an equal share of every flattened parameter; the last shares may end in padding."""
    del writes  # nothing is held twice
    shape = tuple(parameter.ds_shape)
    share = parameter.partition_numel()
    start = engine.process.rank * share
    length = max(0, min(share, math.prod(shape) - start))
    if length == 0:
        return []
    held, offset = _stage_3_master(engine, parameter) if parameter.requires_grad else (parameter.ds_tensor, 0)
    return _with_state(engine, name, held, slice(offset, offset + length), start, shape, True)


def _stage_3_master(engine: Engine, parameter: nn.Parameter) -> tuple[Tensor, int]:
    """The flat float32 partition that holds this rank's share of a parameter, and where in it the share begins."""
    optimizer = engine.deepspeed.optimizer
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    return optimizer.fp32_partitioned_groups_flat[group], offset


def _fsdp2(engine: Engine, name: str, parameter: nn.Parameter, writes: bool) -> list[Piece]:
    """Each rank holds some whole rows (dimension 0) of every parameter."""
    del writes  # nothing is held twice
    shape = tuple(parameter.shape)
    local = parameter.to_local().detach()
    if local.numel() == 0:
        return []
    rows = -(-shape[0] // parameter.device_mesh.size())  # as torch.chunk divides
    start = parameter.device_mesh.get_local_rank() * rows * math.prod(shape[1:])
    held = engine.local(name) if parameter.requires_grad else local
    return _with_state(engine, name, held, slice(None), start, shape, True)
