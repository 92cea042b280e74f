"""Correctness, then time: the kernels against every alternative, and against the time that bytes and FLOPs must take.

    python -m automix_kernels.benchmark --shapes resnet50 cifar_resnet18 --out DIR

On a GPU each candidate is first compared with float64; only then is it timed, on random inputs in rotating buffers that
together exceed the cache, as a median with its 20 and 80 % quantiles: once as it is launched from Python, once replayed
in a CUDA graph, where launches cost next to nothing. Floors come from a copy and a matrix product measured in the same
run. Without a GPU the checks run at a small batch, and the plain definitions are compared with the published way on the
CPU.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from automix_kernels import api, reference
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOLERANCES = {2: 2e-2, 4: 1e-3}  # of the error's norm, relative, by bytes of the type: rounding or wrong
CPU_BATCH = 4


@dataclass(frozen=True)
class Shape:
    """A feature map of cells x cells x channels, projected to `width`; images are `factor` times as wide."""

    name: str
    batch: int
    cells: int
    channels: int
    width: int
    factor: int

    @property
    def label(self) -> str:
        return f"{self.name}/{self.batch}"

    @property
    def positions(self) -> int:
        return self.cells**2

    @property
    def pixels(self) -> int:
        return (self.cells * self.factor) ** 2


SHAPES = [
    Shape("resnet50", 64, 14, 1024, 512, 16),
    Shape("resnet50", 128, 14, 1024, 512, 16),
    Shape("resnet50", 256, 14, 1024, 512, 16),
    Shape("resnet18", 256, 14, 256, 128, 16),
    Shape("deit_small", 128, 14, 384, 192, 16),  # ConvNeXt-T and Swin-T before its last merging too
    Shape("swin_tiny", 128, 7, 768, 384, 32),
    Shape("cifar_resnet18", 100, 8, 256, 128, 4),
    Shape("cifar_resnet18", 512, 8, 256, 128, 4),
    Shape("cifar_wrn28_8", 100, 16, 256, 128, 2),
    Shape("tiny_resnet18", 100, 16, 256, 128, 4),
    Shape("tiny_resnet18", 512, 16, 256, 128, 4),
]


@dataclass
class Work:
    """What one call must do at least."""

    flops: float
    bytes: float


@dataclass
class Case:
    """One operation at one shape: how to draw inputs, the candidates, the exact result, the least work."""

    operation: str
    shape: Shape
    dtype: torch.dtype
    draw: Callable[[int, int], dict[str, Tensor]]
    leaves: tuple[str, ...]
    oracle: Callable[[dict[str, Tensor]], list[Tensor]]
    candidates: dict[str, Callable[[dict[str, Tensor]], list[Tensor]]]
    forward: Work
    backward: Work


@dataclass
class Row:
    """One line of the table. Times in milliseconds; `note` says why there is none."""

    operation: str
    shape: str
    candidate: str
    direction: str
    ms: float | None = None
    ms_20: float | None = None
    ms_80: float | None = None
    graph_ms: float | None = None
    floor_ms: float | None = None
    peak_mib: float | None = None
    flops: float | None = None
    bytes: float | None = None
    note: str = ""


@dataclass
class Machine:
    """Where it ran, and the two ceilings measured there."""

    device: str
    versions: dict[str, str]
    copy_bytes_per_s: float | None = None
    matmul_flops_per_s: float | None = None
    cache_bytes: int = 0
    rows: list[Row] = field(default_factory=list)


# Attention: the candidates take y, v, partner, lam and the four parameters.


def _offset(inputs: dict[str, Tensor]) -> Tensor:
    return inputs["lam"][:, None, None] * inputs["query_lambda"] + inputs["query_bias"]


def attention_ours(inputs: dict[str, Tensor]) -> list[Tensor]:
    names = ("projection", "value", "partner", "lam", "query_lambda", "query_bias", "value_lambda", "value_bias")
    return [api.mix_attention(*(inputs[name] for name in names))]


def attention_published(inputs: dict[str, Tensor]) -> list[Tensor]:
    """Lambda as a channel of queries, keys and values; scores, softmax and their product in float32."""
    y, v, partner, lam = (inputs[name] for name in ("projection", "value", "partner", "lam"))
    other = (1 - lam)[:, None, None] * inputs["query_lambda"] + inputs["query_bias"]
    queries = (y + _offset(inputs)).to(y.dtype)
    keys = (y[partner] + other).to(y.dtype)
    values = v[partner] + (1 - lam)[:, None] * inputs["value_lambda"] + inputs["value_bias"]
    scores = torch.matmul(queries.float(), keys.float().transpose(1, 2)) / math.sqrt(y.shape[2])
    return [torch.matmul(scores.softmax(dim=-1), values.float().unsqueeze(2)).squeeze(2)]


def attention_eager(inputs: dict[str, Tensor]) -> list[Tensor]:
    """The rearranged algebra, products in the inputs' type, softmax in float32."""
    y, v, partner = (inputs[name] for name in ("projection", "value", "partner"))
    queries = (y + _offset(inputs)).to(y.dtype)
    scores = torch.bmm(queries, y[partner].transpose(1, 2)).float() * (1 / math.sqrt(y.shape[2]))
    weights = scores.softmax(dim=2).to(y.dtype)
    return [_add_constants(torch.bmm(weights, v[partner].unsqueeze(2)).squeeze(2), inputs)]


def _add_constants(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return logits.float() + (1 - inputs["lam"])[:, None] * inputs["value_lambda"] + inputs["value_bias"]


def _as_heads(inputs: dict[str, Tensor], value_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value [B, 1, N, D or value_width] for library attention; the value is padded with zeros."""
    y, v, partner = (inputs[name] for name in ("projection", "value", "partner"))
    queries = (y + _offset(inputs)).to(y.dtype)
    values = F.pad(v[partner].unsqueeze(2), (0, value_width - 1))
    return queries.unsqueeze(1), y[partner].unsqueeze(1), values.unsqueeze(1)


def attention_sdpa(backend: str, value_width: int) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(inputs: dict[str, Tensor]) -> list[Tensor]:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            output = F.scaled_dot_product_attention(*_as_heads(inputs, value_width))
        return [_add_constants(output[:, 0, :, 0], inputs)]

    return call


def attention_flex(width: int) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    # The default tiles of wide heads need more shared memory than a block can have.
    small = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
    options = {**dict.fromkeys(small, 32), "num_stages": 1} if width > 256 else None

    def call(inputs: dict[str, Tensor]) -> list[Tensor]:
        output = compiled(*_as_heads(inputs, 16), kernel_options=options)
        return [_add_constants(output[:, 0, :, 0], inputs)]

    return call


def attention_case(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    def draw(batch: int, seed: int) -> dict[str, Tensor]:
        g = torch.Generator(device).manual_seed(seed)
        leaf = {
            "projection": torch.randn(batch, shape.positions, shape.width, device=device, generator=g).to(dtype),
            "value": torch.randn(batch, shape.positions, device=device, generator=g).to(dtype),
            "query_lambda": torch.randn(shape.width, device=device, generator=g),
            "query_bias": torch.randn(shape.width, device=device, generator=g),
            "value_lambda": torch.randn(1, device=device, generator=g),
            "value_bias": torch.randn(1, device=device, generator=g),
        }
        plain = {
            "partner": torch.randperm(batch, device=device, generator=g),
            "lam": torch.rand(batch, device=device, generator=g),
        }
        return {**{name: tensor.requires_grad_() for name, tensor in leaf.items()}, **plain}

    candidates = {
        "ours": attention_ours,
        "published eager": attention_published,
        "rearranged eager": attention_eager,
    }
    if device == "cuda":
        width = shape.width
        candidates |= {
            "torch.compile": torch.compile(
                attention_eager, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False
            ),
            "SDPA flash": attention_sdpa("FLASH_ATTENTION", width),
            "SDPA cuDNN": attention_sdpa("CUDNN_ATTENTION", width),
            "SDPA efficient": attention_sdpa("EFFICIENT_ATTENTION", 8),
            "SDPA math": attention_sdpa("MATH", 1),
            "FlexAttention": attention_flex(width),
        }
    product = 2 * shape.batch * shape.positions**2 * shape.width
    elements = shape.batch * shape.positions * shape.width * dtype.itemsize
    names = ("projection", "value", "query_lambda", "query_bias", "value_lambda", "value_bias")
    return Case(
        "mix attention", shape, dtype, draw, names, _attention_oracle, candidates,
        forward=Work(product, 2 * elements),  # read as queries and as keys
        backward=Work(3 * product, 4 * elements),  # read as itself, as partner and as partnered; written once
    )  # fmt: skip


def _attention_oracle(inputs: dict[str, Tensor]) -> list[Tensor]:
    names = ("projection", "value", "partner", "lam", "query_lambda", "query_bias", "value_lambda", "value_bias")
    return [reference.mix_attention(*(inputs[name] for name in names))]


# Blend: logits at the map's resolution and uint8 images to mixed images and the mask's two means.


def blend_ours(mode: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    def call(inputs: dict[str, Tensor]) -> list[Tensor]:
        names = ("logits", "images", "partner", "lam", "mean", "std")
        return list(api.mask_blend(*(inputs[name] for name in names), mode, 0.0, dtype))

    return call


def blend_published(mode: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    """Upsample, sigmoid, both masks side by side, and the blend of float32 images."""

    def call(inputs: dict[str, Tensor]) -> list[Tensor]:
        images = ((inputs["images"].permute(0, 3, 1, 2) / 255) - inputs["mean"][:, None, None]) / inputs["std"][
            :, None, None
        ]
        logits = inputs["logits"].unsqueeze(1)
        corners = {} if mode == "nearest" else {"align_corners": False}
        mask = torch.sigmoid(F.interpolate(logits, size=images.shape[2:], mode=mode, **corners))
        both = torch.cat([1 - mask, mask], dim=1)
        mixed = images * both[:, :1] + images[inputs["partner"]] * both[:, 1:]
        mixed = mixed.to(dtype)
        return [mixed, mask.mean(dim=(1, 2, 3)), mask.square().mean(dim=(1, 2, 3))]

    return call


def blend_eager(mode: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    def call(inputs: dict[str, Tensor]) -> list[Tensor]:
        names = ("logits", "images", "partner", "lam", "mean", "std")
        return list(reference.mask_blend(*(inputs[name] for name in names), mode, 0.0, dtype))

    return call


def blend_case(shape: Shape, device: str, dtype: torch.dtype, mode: str) -> Case:
    size = shape.cells * shape.factor

    def draw(batch: int, seed: int) -> dict[str, Tensor]:
        g = torch.Generator(device).manual_seed(seed)
        return {
            "logits": torch.randn(batch, shape.cells, shape.cells, device=device, generator=g).requires_grad_(),
            "images": torch.randint(0, 256, (batch, size, size, 3), device=device, generator=g, dtype=torch.uint8),
            "partner": torch.randperm(batch, device=device, generator=g),
            "lam": torch.rand(batch, device=device, generator=g),
            "mean": torch.tensor(MEAN, device=device),
            "std": torch.tensor(STD, device=device),
        }

    candidates = {
        "ours": blend_ours(mode, dtype),
        "published eager": blend_published(mode, dtype),
        "rearranged eager": blend_eager(mode, dtype),
    }
    if device == "cuda":
        candidates["torch.compile"] = torch.compile(
            blend_eager(mode, dtype), mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False
        )
    elements = 3 * shape.batch * shape.pixels
    moved = Work(0, (2 + dtype.itemsize) * elements)  # both images as bytes, and the mixed one or its gradient
    return Case(
        f"blend {mode}", shape, dtype, draw, ("logits",), blend_eager(mode, torch.float64), candidates, moved, moved
    )  # fmt: skip


# The whole block: features to mixed images, gradients of the Mix Block's weights.


def block_ours(shape: Shape, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    def call(inputs: dict[str, Tensor]) -> list[Tensor]:
        query_weight, value_weight = inputs["query_weight"], inputs["value_weight"]
        projection = F.linear(inputs["features"], query_weight[:, :-1].to(dtype))
        value = F.linear(inputs["features"], value_weight[:, :-1].to(dtype)).squeeze(2)
        logits = api.mix_attention(
            projection, value, inputs["partner"], inputs["lam"],
            query_weight[:, -1], inputs["query_bias"], value_weight[:, -1], inputs["value_bias"],
        ).view(-1, shape.cells, shape.cells)  # fmt: skip
        names = ("images", "partner", "lam", "mean", "std")
        return list(api.mask_blend(logits, *(inputs[name] for name in names), "nearest", 0.0, dtype))

    return call


def block_published(shape: Shape, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    """Gather, a lambda channel appended to both features, three 1 x 1 convolutions, attention and blend in float32."""
    blend = blend_published("nearest", dtype)

    def call(inputs: dict[str, Tensor]) -> list[Tensor]:
        side = (shape.cells, shape.cells)
        features = inputs["features"].transpose(1, 2).unflatten(2, side)
        lam = inputs["lam"][:, None, None, None].to(dtype).expand(-1, 1, *side)
        own = torch.cat([features, lam], dim=1)
        other = torch.cat([features[inputs["partner"]], 1 - lam], dim=1)
        query_weight, value_weight = (
            inputs[name].to(dtype)[:, :, None, None] for name in ("query_weight", "value_weight")
        )
        query_bias, value_bias = (inputs[name].to(dtype) for name in ("query_bias", "value_bias"))
        value = F.conv2d(other, value_weight, value_bias).flatten(2).transpose(1, 2).float()
        queries = F.conv2d(own, query_weight, query_bias).flatten(2).transpose(1, 2).float()
        keys = F.conv2d(other, query_weight, query_bias).flatten(2).float()
        weights = (torch.matmul(queries, keys) / math.sqrt(shape.width)).softmax(dim=-1)
        logits = torch.matmul(weights, value).view(-1, *side)
        return blend({**inputs, "logits": logits})

    return call


def block_case(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    size = shape.cells * shape.factor

    def draw(batch: int, seed: int) -> dict[str, Tensor]:
        g = torch.Generator(device).manual_seed(seed)
        normal = torch.randn
        leaf = {
            "query_weight": normal(shape.width, shape.channels + 1, device=device, generator=g) / shape.channels**0.5,
            "query_bias": normal(shape.width, device=device, generator=g),
            "value_weight": normal(1, shape.channels + 1, device=device, generator=g) / shape.channels**0.5,
            "value_bias": normal(1, device=device, generator=g),
        }
        plain = {
            "features": normal(batch, shape.positions, shape.channels, device=device, generator=g).to(dtype),
            "images": torch.randint(0, 256, (batch, size, size, 3), device=device, generator=g, dtype=torch.uint8),
            "partner": torch.randperm(batch, device=device, generator=g),
            "lam": torch.rand(batch, device=device, generator=g),
            "mean": torch.tensor(MEAN, device=device),
            "std": torch.tensor(STD, device=device),
        }
        return {**{name: tensor.requires_grad_() for name, tensor in leaf.items()}, **plain}

    candidates = {"ours": block_ours(shape, dtype), "published eager": block_published(shape, dtype)}
    if device == "cuda":
        candidates["published torch.compile"] = torch.compile(
            block_published(shape, dtype), mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False
        )
    rows, itemsize = shape.batch * shape.positions, dtype.itemsize
    projection = Work(2 * rows * shape.channels * shape.width, rows * (shape.channels + shape.width) * itemsize)
    attention, blend = attention_case(shape, "cpu", dtype), blend_case(shape, "cpu", dtype, "nearest")

    def total(*parts: Work) -> Work:
        return Work(sum(part.flops for part in parts), sum(part.bytes for part in parts))

    return Case(
        "whole block", shape, dtype, draw, ("query_weight", "query_bias", "value_weight", "value_bias"),
        block_published(shape, torch.float64), candidates,
        forward=total(projection, attention.forward, blend.forward),
        backward=total(projection, attention.backward, blend.backward),
    )  # fmt: skip


# Checking and timing.


def outputs_and_grads(case: Case, function: Callable, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Outputs, then the leaves' gradients of their sum weighted with fixed random numbers."""
    outputs = function(inputs)
    leaves = [inputs[name] for name in case.leaves]
    return [*outputs, *torch.autograd.grad(outputs, leaves, _weights(outputs))]


def _weights(outputs: list[Tensor]) -> list[Tensor]:
    g = torch.Generator(outputs[0].device).manual_seed(1)
    # Numbers that bfloat16 holds, so that every type multiplies by the same.
    return [torch.randn(o.shape, device=o.device, generator=g).bfloat16().to(o.dtype) for o in outputs]


def check(case: Case, function: Callable) -> str:
    """What is wrong with a candidate at a small batch, or nothing."""
    inputs = case.draw(min(case.shape.batch, 8), seed=0)
    exact_inputs = {
        name: (tensor.detach().double() if tensor.is_floating_point() else tensor).requires_grad_(tensor.requires_grad)
        for name, tensor in inputs.items()
    }
    actual = outputs_and_grads(case, function, inputs)
    exact = outputs_and_grads(case, case.oracle, exact_inputs)
    worst = max(
        ((a.double() - e).norm() / e.norm().clamp_min(1e-30)).item() for a, e in zip(actual, exact, strict=True)
    )
    return "" if worst < TOLERANCES[case.dtype.itemsize] else f"wrong: relative error {worst:.1e}"


def prepare(case: Case, function: Callable, inputs: dict[str, Tensor], backward: bool) -> Callable[[], object]:
    """One call to time."""
    if not backward:

        def forward() -> object:
            with torch.no_grad():
                return function(inputs)

        return forward
    leaves = [inputs[name] for name in case.leaves]
    with torch.no_grad():
        weights = _weights(function(inputs))
    return lambda: torch.autograd.grad(function(inputs), leaves, weights)


def buffer_sets(case: Case, machine: Machine) -> list[dict[str, Tensor]]:
    """Enough sets of inputs that a call never finds its own in the cache."""
    first = case.draw(case.shape.batch, seed=0)
    size = sum(tensor.numel() * tensor.element_size() for tensor in first.values())
    count = max(2, min(32, math.ceil(3 * machine.cache_bytes / size))) if machine.cache_bytes else 1
    return [first, *(case.draw(case.shape.batch, seed) for seed in range(1, count))]


def time_launched(calls: list[Callable[[], object]], budget_s: float) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile in milliseconds of calls launched one after another."""
    on_gpu = torch.cuda.is_available()
    for call in calls[:3]:
        call()
    marks = []
    begin = time.perf_counter()
    while len(marks) < 10 or (time.perf_counter() - begin < budget_s and len(marks) < 500):
        call = calls[len(marks) % len(calls)]
        if on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            marks.append((start, end))
        else:
            start_s = time.perf_counter()
            call()
            marks.append(1e3 * (time.perf_counter() - start_s))
    if on_gpu:
        torch.cuda.synchronize()
        marks = [start.elapsed_time(end) for start, end in marks]
    fifths = statistics.quantiles(marks, n=5)
    return statistics.median(marks), fifths[0], fifths[3]


def time_in_graph(calls: list[Callable[[], object]], budget_s: float) -> float:
    """Median milliseconds a call, all calls captured into one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    median, _, _ = time_launched([graph.replay], budget_s)
    return median / len(calls)


def measure(case: Case, name: str, function: Callable, machine: Machine, budget_s: float) -> list[Row]:
    """A candidate's rows, forward and both ways; a refusal or a wrong result takes the place of the numbers."""
    works = {"forward": [case.forward], "both": [case.forward, case.backward]}
    rows = [
        Row(
            case.operation, case.shape.label, name, direction, floor_ms=floor_ms(parts, machine),
            flops=sum(part.flops for part in parts), bytes=sum(part.bytes for part in parts),
        )
        for direction, parts in works.items()
    ]  # fmt: skip
    try:
        problem = check(case, function)
        if problem:
            raise ValueError(problem)
        sets = buffer_sets(case, machine)
        for row in rows:
            calls = [prepare(case, function, inputs, row.direction == "both") for inputs in sets]
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                calls[0]()
                row.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
            row.ms, row.ms_20, row.ms_80 = time_launched(calls, budget_s)
            if torch.cuda.is_available():
                row.graph_ms = time_in_graph(calls, budget_s)
    except Exception as error:  # any library may refuse a shape in its own way; the table says which and why
        for row in rows:
            if row.ms is None:
                row.note = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return rows


def floor_ms(parts: list[Work], machine: Machine) -> float | None:
    """The time that FLOPs or bytes must take, whichever is longer, part by part."""
    if machine.copy_bytes_per_s is None:
        return None
    return 1e3 * sum(
        max(work.flops / machine.matmul_flops_per_s, work.bytes / machine.copy_bytes_per_s) for work in parts
    )


def measure_ceilings(machine: Machine) -> None:
    source = torch.randn(2**28, device="cuda")  # 1 GiB
    target = torch.empty_like(source)
    copy_ms, _, _ = time_launched([lambda: target.copy_(source)], budget_s=0.5)
    machine.copy_bytes_per_s = 2 * source.numel() * source.element_size() / (copy_ms / 1e3)
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_ms, _, _ = time_launched([lambda: left @ right], budget_s=0.5)
    machine.matmul_flops_per_s = 2 * 8192**3 / (product_ms / 1e3)


# The momentum update: no gradients, so it is timed on its own.


def resnet50_sizes() -> list[int]:
    """Elements of each parameter of a ResNet-50 (25.6 million in 161 tensors)."""
    sizes = [64 * 3 * 49, 64, 64]
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            for count, filters in ((inputs * width, width), (9 * width**2, width), (4 * width**2, 4 * width)):
                sizes += [count, filters, filters]
            if block == 0:
                sizes += [4 * inputs * width, 4 * width, 4 * width]
            inputs = 4 * width
    return [*sizes, 2048 * 1000, 1000]


def measure_momentum(machine: Machine, device: str, budget_s: float) -> list[Row]:
    sizes = resnet50_sizes() if device == "cuda" else resnet50_sizes()[:40]
    targets, sources = ([torch.randn(size, device=device) for size in sizes] for _ in range(2))

    def loop() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.mul_(0.999).add_(source, alpha=0.001)

    candidates = {
        "loop over parameters": loop,
        "torch._foreach_lerp_": lambda: api.momentum_update(targets, sources, 0.999, implementation="reference"),
    }
    if device == "cuda":
        candidates["ours"] = lambda: api.momentum_update(targets, sources, 0.999, implementation="triton")
    rows = []
    for name, call in candidates.items():
        before = [target.clone() for target in targets]
        call()
        for target, old, source in zip(targets, before, sources, strict=True):
            torch.testing.assert_close(target, 0.999 * old + 0.001 * source)
        work = Work(0, 12 * sum(sizes))
        row = Row("momentum update", f"{sum(sizes) / 1e6:.1f}M", name, "forward", flops=0, bytes=work.bytes)
        row.floor_ms = floor_ms([work], machine)
        row.ms, row.ms_20, row.ms_80 = time_launched([call], budget_s)
        if device == "cuda":
            row.graph_ms = time_in_graph([call], budget_s)
        rows.append(row)
    return rows


# Tiles: what to put into mix_attention.forward_tile and backward_tile.


def tune(shape: Shape, dtype: torch.dtype, budget_s: float) -> list[str]:
    """Times of candidate tiles of both attention kernels, fastest first, the default marked."""
    from automix_kernels import mix_attention as kernels

    inputs = attention_case(shape, "cuda", dtype).draw(shape.batch, seed=0)
    order = ("projection", "value", "partner", "lam", "query_lambda", "query_bias", "value_lambda", "value_bias")
    arguments = [inputs[name].detach() for name in order]
    logits, _, *saved = kernels.launch_forward(*arguments)
    architecture = kernels._architecture(logits.device)
    passes = {
        "forward": (kernels.forward_tile, lambda tile: kernels.launch_forward(*arguments, tile=tile)),
        "backward": (
            kernels.backward_tile,
            lambda tile: kernels.launch_backward(logits, *arguments[:6], *saved, tile=tile),
        ),
    }
    lines = []
    for direction, (default, launch) in passes.items():
        chosen = default(architecture, dtype.itemsize, shape.positions, shape.width)
        tiles = {chosen} | {
            kernels._fit(kernels.Tile(rows, columns, width, warps, stages), shape.positions, shape.width)
            for rows, warps in ((64, 4), (64, 8), (128, 8))
            for columns in (64, 128, 256)
            for width in (32, 64, 128)
            for stages in (2, 3, 4)
        }
        times = []
        for tile in tiles:
            try:
                times.append((time_in_graph([partial(launch, tile)] * 4, budget_s), tile))
            except Exception as error:  # more shared memory than there is, mostly: such a tile is no candidate
                lines.append(f"{shape.label} {direction} {tuple(tile)}: {type(error).__name__}")
        for ms, tile in sorted(times)[:8]:
            mark = "  <- default" if tile == chosen else ""
            lines.append(f"{shape.label} {direction} {tuple(tile)}: {ms:.4f} ms{mark}")
    return lines


# What a person reads.


def markdown(machine: Machine) -> str:
    lines = [f"{machine.device}; " + ", ".join(f"{k} {v}" for k, v in machine.versions.items())]
    if machine.copy_bytes_per_s:
        lines.append(
            f"Ceilings measured in this run: copy {machine.copy_bytes_per_s / 1e12:.2f} TB/s, "
            f"bfloat16 product {machine.matmul_flops_per_s / 1e12:.0f} TFLOP/s."
        )
    columns = (
        "operation",
        "shape/batch",
        "candidate",
        "direction",
        "ms (20 to 80 %)",
        "in a graph",
        "ours is",
        "floor",
    )
    lines += ["", f"| {' | '.join(columns)} | MiB |", "|---" * (len(columns) + 1) + "|"]
    ours = {(r.operation, r.shape, r.direction): r for r in machine.rows if r.candidate == "ours"}
    for row in machine.rows:
        own = ours.get((row.operation, row.shape, row.direction))
        head = f"| {row.operation} | {row.shape} | {row.candidate} | {row.direction} |"
        if row.ms is None:
            lines.append(f"{head} {row.note} | | | | |")
            continue
        best = row.graph_ms or row.ms
        ratio = "" if own is None or own.ms is None or own is row else f"{best / (own.graph_ms or own.ms):.2f}x faster"
        floor = f"{100 * row.floor_ms / best:.0f} %" if row.floor_ms else ""
        graph = f"{row.graph_ms:.4f}" if row.graph_ms else ""
        memory = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        times = f"{row.ms:.4f} ({row.ms_20:.4f} to {row.ms_80:.4f})"
        lines.append(f"{head} {times} | {graph} | {ratio} | {floor} | {memory} |")
    return "\n".join(lines) + "\n"


def roofline_svg(machine: Machine) -> str:
    """Rate against intensity of our kernels, under the two measured ceilings; both axes logarithmic."""
    width, height, margin = 720, 440, 60
    points = [
        (row.flops / row.bytes, row.flops / (row.graph_ms / 1e3), f"{row.operation} {row.shape} {row.direction}")
        for row in machine.rows
        if row.candidate == "ours" and row.graph_ms and row.flops
    ]
    left, right, bottom, top = 10.0, 1e4, 1e12, 2e15

    def place(intensity: float, rate: float) -> tuple[float, float]:
        x = margin + (width - 2 * margin) * math.log(intensity / left) / math.log(right / left)
        y = height - margin - (height - 2 * margin) * math.log(rate / bottom) / math.log(top / bottom)
        return round(x, 1), round(y, 1)

    ridge = machine.matmul_flops_per_s / machine.copy_bytes_per_s
    roof = [
        place(left, left * machine.copy_bytes_per_s),
        place(ridge, machine.matmul_flops_per_s),
        place(right, machine.matmul_flops_per_s),
    ]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="10">',
        f'<polyline points="{" ".join(f"{x},{y}" for x, y in roof)}" fill="none" stroke="black"/>',
        f'<text x="{margin}" y="{height - 20}">FLOP per byte, {left:g} to {right:g}, logarithmic</text>',
        f'<text x="{margin}" y="20">FLOP/s, {bottom:g} to {top:g}, logarithmic; {machine.device}</text>',
    ]
    for intensity, rate, label in points:
        x, y = place(intensity, rate)
        parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="crimson"><title>{label}</title></circle>')
        parts.append(f'<text x="{x + 5}" y="{y}">{label}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="automix_kernels.benchmark", description=__doc__.splitlines()[0])
    names = sorted({shape.name for shape in SHAPES} | {shape.label for shape in SHAPES})
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help=f"of: {', '.join(names)} (default: all)")
    parser.add_argument(
        "--operations", nargs="+", choices=["attention", "blend", "block", "momentum"],
        default=["attention", "blend", "block", "momentum"],
    )  # fmt: skip
    parser.add_argument("--modes", nargs="+", choices=["nearest", "bilinear"], default=["nearest", "bilinear"])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--seconds", type=float, default=0.3, help="spent on timing each candidate (default: 0.3)")
    parser.add_argument("--tune", action="store_true", help="time the attention kernels' tiles instead (needs a GPU)")
    parser.add_argument("--out", type=Path, help="folder for kernels.json, kernels.md and roofline.svg")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.shapes or ()) - set(names))
    if unknown:
        parser.error(f"unknown shapes {', '.join(unknown)}; choose from {', '.join(names)}")
    return options


def describe_machine() -> Machine:
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if api.HAS_TRITON:
        import triton

        versions["triton"] = triton.__version__
    if not torch.cuda.is_available():
        return Machine(f"CPU ({torch.get_num_threads()} threads)", versions)
    properties = torch.cuda.get_device_properties(0)
    return Machine(properties.name, versions, cache_bytes=properties.L2_cache_size)


def run(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if one of our own results is wrong, else 0."""
    options = parse(argv)
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    dtype = getattr(torch, options.dtype)
    shapes = [s for s in SHAPES if not options.shapes or s.name in options.shapes or s.label in options.shapes]
    machine = describe_machine()
    if options.tune:
        if not on_gpu:
            print("--tune needs a GPU", file=sys.stderr)
            return 2
        for shape in shapes:
            print("\n".join(tune(shape, dtype, options.seconds)), flush=True)
        return 0
    if on_gpu:
        measure_ceilings(machine)
    else:
        print(
            f"No GPU here: no kernel is timed. The definitions ('ours' on a CPU) are checked and compared with the "
            f"published way on the CPU, batch {CPU_BATCH}, float32.\n",
            flush=True,
        )
        torch.set_num_threads(1)  # threads that wait for a busy core would be most of what is measured
        dtype = torch.float32
        shapes = list({s.name: replace(s, batch=CPU_BATCH) for s in shapes}.values())
    for shape in shapes:
        cases = []
        if "attention" in options.operations:
            cases.append(attention_case(shape, device, dtype))
        if "blend" in options.operations:
            cases += [blend_case(shape, device, dtype, mode) for mode in options.modes]
        if "block" in options.operations:
            cases.append(block_case(shape, device, dtype))
        for case in cases:
            torch.compiler.reset()  # each shape is compiled for itself, within the limit on recompilations
            for name, function in case.candidates.items():
                machine.rows += measure(case, name, function, machine, options.seconds)
    if "momentum" in options.operations:
        machine.rows += measure_momentum(machine, device, options.seconds)
    table = markdown(machine)
    print(table)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "kernels.md").write_text(table)
        (options.out / "kernels.json").write_text(json.dumps(asdict(machine), indent=1))
        if on_gpu:
            (options.out / "roofline.svg").write_text(roofline_svg(machine))
    return int(any(row.candidate == "ours" and row.ms is None for row in machine.rows))


if __name__ == "__main__":
    sys.exit(run())
