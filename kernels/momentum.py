"""The momentum encoder's update in one launch per source dtype: a Triton kernel over a table of pointers.

    target <- target + (1 - coefficient) * (source - target)        float32, in place; nothing where `skip` is not 0

Every program takes one chunk of one tensor and finds both by reading tables, which stay on the device from one step to
the next. Where pointers change, as those of what ZeRO 3 gathers do, theirs is sent again, without waiting. A CUDA graph
must be captured after the first call; the tables that it reads are kept for good.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from automix_kernels.operators import Operator
from torch import Tensor

CHUNK = 8192
_TABLES_KEPT = 8
_captured: set[Tensor] = set()
"""Tables whose addresses a CUDA graph holds: replayed, it reads them, whatever pointers were here in between."""


@triton.jit
def _move(target_ptr, source_ptr, indices, mask, weight):
    target = tl.load(target_ptr + indices, mask=mask)
    source = tl.load(source_ptr + indices, mask=mask).to(tl.float32)
    # From the nearer end, so that weights 0 and 1 are exact.
    from_target = target + weight * (source - target)
    from_source = source - (1 - weight) * (source - target)
    tl.store(target_ptr + indices, tl.where(weight < 0.5, from_target, from_source), mask=mask)


@triton.jit
def _lerp_kernel(
    tensors_ptr,
    chunks_ptr,
    weight,
    skip_ptr,
    HAS_SKIP: tl.constexpr,
    SOURCE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid: (chunks,). tensors[i] = (target pointer, source pointer, elements), chunks[c] = (i, first element)."""
    if HAS_SKIP:  # noqa: SIM102 - decided when the kernel is compiled
        if tl.load(skip_ptr) != 0:
            return
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + 2 * chunk)
    start = tl.load(chunks_ptr + 2 * chunk + 1)
    target_ptr = tl.load(tensors_ptr + 3 * tensor).to(tl.pointer_type(tl.float32))
    source_ptr = tl.load(tensors_ptr + 3 * tensor + 1).to(tl.pointer_type(SOURCE))
    elements = tl.load(tensors_ptr + 3 * tensor + 2)
    whole = elements
    if ALIGNED:
        target_ptr = tl.multiple_of(target_ptr, 16)
        source_ptr = tl.multiple_of(source_ptr, 16)
        start = tl.multiple_of(start, 16)
        whole = tl.multiple_of(elements // 4 * 4, 4)  # a mask that may end within four would forbid vector loads
    for offset in range(0, CHUNK, BLOCK):
        indices = start + offset + tl.arange(0, BLOCK)
        _move(target_ptr, source_ptr, indices, indices < whole, weight)
    if ALIGNED:  # noqa: SIM102
        if start + CHUNK >= elements:
            indices = whole + tl.arange(0, 4)
            _move(target_ptr, source_ptr, indices, indices < elements, weight)


def launch(targets: list[Tensor], sources: list[Tensor], coefficient: float, skip: Tensor | None = None) -> None:
    """Update float32 targets without gaps from sources of the same sizes and strides."""
    for dtype in dict.fromkeys(source.dtype for source in sources):
        pairs = [(t, s) for t, s in zip(targets, sources, strict=True) if s.dtype == dtype and t.numel()]
        if not pairs:
            continue
        device = pairs[0][0].device
        tensors = _pointers(device, tuple((t.data_ptr(), s.data_ptr(), t.numel()) for t, s in pairs))
        chunks = _chunks(device, tuple(t.numel() for t, _ in pairs))
        with torch.cuda.device_of(pairs[0][0]):
            if _is_capturing(device):
                _captured.update((tensors, chunks))
            _lerp_kernel[(len(chunks),)](
                tensors_ptr=tensors,
                chunks_ptr=chunks,
                weight=1 - coefficient,
                skip_ptr=skip,
                HAS_SKIP=skip is not None,
                SOURCE={torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype],
                ALIGNED=all(tensor.data_ptr() % 16 == 0 for pair in pairs for tensor in pair),
                BLOCK=1024,
                CHUNK=CHUNK,
                num_warps=4,
                enable_fp_fusion=True,
            )


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@lru_cache(_TABLES_KEPT)
def _pointers(device: torch.device, rows: tuple[tuple[int, int, int], ...]) -> Tensor:
    """tensors [n, 3] on the device."""
    return _send(rows, device)


@lru_cache(_TABLES_KEPT)
def _chunks(device: torch.device, sizes: tuple[int, ...]) -> Tensor:
    """chunks [c, 2] on the device."""
    return _send([(i, start) for i, elements in enumerate(sizes) for start in range(0, elements, CHUNK)], device)


def _send(table: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """int64 on the device, by way of pinned memory, which torch does not use anew before the copy is done."""
    pinned = torch.tensor(table, dtype=torch.int64, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


momentum_update = Operator("momentum_update", launch, ("targets",))


@momentum_update.register_fake
def _(targets, sources, coefficient, skip=None):
    return None
