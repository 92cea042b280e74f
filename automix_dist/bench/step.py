"""`automix bench step`: one training step, from uint8 images on the device to updated weights: AutoMix against vanilla.

    automix bench step --networks resnet50 --out DIR          on a GPU: the table that counts
    automix bench step --networks cifar_resnet18 --batch 8    on a CPU: the ratios show, the speed means little

All ways of a network live in one process and take turns, a few steps each, so that a busy moment of the machine hits
all alike; the median counts. CUDA graphs, whose memory is set aside for good, come after the others, one by one. A
ratio is taken to the fastest vanilla step of the same table, and stands beside the ratio of counted FLOPs, below which
it cannot honestly fall. One device, no engine, random images. `published` is the published implementation's step
restated in plain PyTorch (bench/published.py).
"""

import argparse
import contextlib
import gc
import json
import math
import os
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import escape

import torch
from automix_kernels import api as kernels
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from automix_dist import provenance
from automix_dist.backbone import create_backbone, create_timm_model
from automix_dist.bench.memory import peak_saved_bytes
from automix_dist.bench.published import PublishedStep
from automix_dist.captured_step import CapturedStep
from automix_dist.classifier import build_model
from automix_dist.config import IMAGENET_MEAN, IMAGENET_STD, POLICIES, Config, ConfigError, from_dict
from automix_dist.draws import draw_step
from automix_dist.momentum import MomentumUpdate
from automix_dist.optimizer import build_optimizer
from automix_dist.policy import needed_feature

POOL = 4
"""Different batches that the steps take in turn."""

CPU_BATCH = 4
MIN_MOVE = 0.03
"""With --compare, changes smaller than this are not reported, however narrow the spreads are."""

PEAK_FLOPS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12,
    "L4": 121e12, "B200": 2250e12, "4090": 165e12, "3090": 71e12,
}  # fmt: skip
"""Dense bfloat16 FLOP/s that the makers state, by a part of the device's name; the first match counts."""

# Operators whose result a host has to wait for.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive"}


@dataclass(frozen=True)
class Network:
    name: str
    backbone: str
    feature: int
    size: int
    batch: int
    """On a GPU."""
    classes: int = 1000
    small_stem: bool = False

    def config(self, *, policy: str = "automix", engine: dict | None = None, **automix: Any) -> Config:
        sections = {
            "model": {"backbone": self.backbone, "small_stem": self.small_stem},
            "data": {"image_size": self.size},
            "automix": {"feature": self.feature, **automix},
            "policy": {"name": policy},
            "engine": engine or {},
        }
        return from_dict(sections)


NETWORKS = (
    Network("resnet18", "resnet18", -2, 224, 256),
    Network("resnet50", "resnet50", -2, 224, 256),
    Network("convnext_tiny", "convnext_tiny", -2, 224, 128),
    Network("deit_small", "deit_small_patch16_224", 5, 224, 128),
    Network("swin_tiny", "swin_tiny_patch4_window7_224", -2, 224, 128),
    Network("cifar_resnet18", "resnet18", -2, 32, 512, classes=100, small_stem=True),
)


class Case:
    """A network's inputs on the device, shared by all ways of training it."""

    def __init__(self, network: Network, batch: int, device: torch.device, dtype: torch.dtype):
        self.network, self.batch, self.device, self.dtype = network, batch, device, dtype
        self.name = f"{network.name}@{network.size}"
        generator = torch.Generator().manual_seed(0)
        shape = (POOL, batch, network.size, network.size, 3)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
        self.labels = torch.randint(0, network.classes, (POOL, batch), generator=generator).to(device)
        self.mean, self.std = (torch.tensor(v, device=device) for v in (IMAGENET_MEAN, IMAGENET_STD))

    def normalized(self, step: int, dtype: torch.dtype) -> Tensor:
        return kernels.normalize(self.images[step % POOL], self.mean, self.std, dtype)

    def autocast(self, enabled: bool = True) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=enabled and self.dtype != torch.float32)


@dataclass
class Trained:
    """A model ready to train: what one step computes and what follows its backward pass."""

    module: nn.Module
    loss: Callable[[int], Tensor]
    """The loss to differentiate, of the step with this number."""
    optimizer: torch.optim.Optimizer
    after: Callable[[], None] = lambda: None

    def step(self, number: int) -> None:
        self.loss(number).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.after()


@dataclass(frozen=True)
class Way:
    """A way to train; `twin` names the one with the same operations, neither compiled, recorded nor padded, whose FLOPs
    are counted for it."""

    name: str
    build: Callable[[Case], Trained]
    twin: str = ""
    unasked: Literal["always", "gpu", "never"] = "always"
    """Where it takes part without being named."""
    graph: bool = False
    """A CUDA graph, whose memory is set aside once: the peak of a step would say nothing."""


def vanilla(case: Case, *, channels_last: bool = False, compiled: bool = False) -> Trained:
    model = create_timm_model(case.network.config().model, case.network.size, case.network.classes)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(case.device, memory_format=layout).train()
    images_layout = torch.channels_last if case.device.type == "cuda" else torch.contiguous_format
    forward = torch.compile(model) if compiled else model

    def loss(step: int) -> Tensor:
        with case.autocast():
            pixels = case.normalized(step, case.dtype).contiguous(memory_format=images_layout)
            return F.cross_entropy(forward(pixels).float(), case.labels[step % POOL])

    return Trained(model, loss, _sgd(model, case))


def policy(case: Case, name: str = "automix", engine: dict | None = None, **settings: Any) -> Trained:
    """A policy's step as `automix train` makes it, but for the engine; AutoMix unless another one is named."""
    config = case.network.config(policy=name, engine=engine, **settings)
    backbone = create_backbone(config.model, needed_feature(config), case.network.size)
    model = build_model(config, backbone, case.network.classes, case.dtype).to(case.device).train()
    if config.engine.compile:
        model.compile_regions()
    if config.engine.cuda_graph:
        CapturedStep(model)
    update = MomentumUpdate(model)

    def loss(step: int) -> Tensor:
        images, labels = case.images[step % POOL], case.labels[step % POOL]
        draws = model.draw(images, seed=0, step=step)
        return model(images, labels, draws, config.automix.mask_loss_weight).total

    return Trained(model, loss, build_optimizer(model, config.optimizer), lambda: update(config.automix.momentum))


def published(case: Case, *, autocast: bool = False) -> Trained:
    config = case.network.config()
    backbone = create_backbone(config.model, config.automix.feature, case.network.size)
    model = PublishedStep(backbone, case.network.classes, config.automix).to(case.device).train()

    def loss(step: int) -> Tensor:
        draws = draw_step(config.automix, case.batch, seed=0, step=step)
        lams = [float(draws.mix_block.lam[0]), float(draws.classifier.lam[0])]
        partners = torch.stack([draws.mix_block.partner, draws.classifier.partner])
        images = case.normalized(step, torch.float32).contiguous()
        with case.autocast(autocast):
            return model(images, case.labels[step % POOL], lams, partners)

    optimizer = model.optimizer(config.optimizer.lr)
    return Trained(model, loss, optimizer, lambda: model.update_momentum(config.automix.momentum))


def _sgd(model: nn.Module, case: Case) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=case.network.config().optimizer.lr, momentum=0.9, fused=True)


TOGETHER, COMPILED, PADDED = {"immediate_backward": False}, {"compile": True}, {"padded_stem": True}
GRAPHS = {"CUDA graph": {"cuda_graph": True}, "compiled, CUDA graph": {"cuda_graph": True, **COMPILED}}
CUT = {"feature_pass": "cut"}
WAYS = (
    Way("vanilla", vanilla),
    Way("vanilla, channels-last", partial(vanilla, channels_last=True), unasked="gpu"),
    Way("vanilla, compiled", partial(vanilla, compiled=True), twin="vanilla", unasked="gpu"),
    *(
        Way(f"vanilla, {name}", partial(policy, name="none", engine=engine), twin="vanilla", unasked="gpu", graph=True)
        for name, engine in GRAPHS.items()
    ),
    Way("vanilla, padded stem", partial(policy, name="none", engine=PADDED), twin="vanilla", unasked="gpu"),
    Way("AutoMix", policy),
    Way("AutoMix, one backward", partial(policy, engine=TOGETHER)),
    Way("AutoMix, cut", partial(policy, **CUT)),
    Way("AutoMix, cut, one backward", partial(policy, engine=TOGETHER, **CUT)),
    Way("AutoMix, cut, joint query", partial(policy, engine={"joint_query": True}, **CUT), unasked="gpu"),
    Way("AutoMix, cut, padded stem", partial(policy, engine=PADDED, **CUT), twin="AutoMix, cut", unasked="gpu"),
    Way("AutoMix, cut, compiled", partial(policy, engine=COMPILED, **CUT), twin="AutoMix, cut", unasked="gpu"),
    Way(
        "AutoMix, cut, one backward, compiled",
        partial(policy, engine=COMPILED | TOGETHER, **CUT),
        twin="AutoMix, cut",
        unasked="gpu",
    ),
    *(
        Way(f"AutoMix, cut, {name}", partial(policy, engine=engine, **CUT), "AutoMix, cut", unasked="gpu", graph=True)
        for name, engine in GRAPHS.items()
    ),
    # Not the published method (docs/throughput.md).
    Way("inexact: query's features", partial(policy, feature_source="query"), unasked="never"),
    Way("inexact: half judged", partial(policy, generator_share=0.5, **CUT), unasked="never"),
    Way("published, float32", published),
    Way("published, autocast", partial(published, autocast=True), unasked="gpu"),
    Way("samix", partial(policy, name="samix", lam_concat=False, upsampling=["bilinear"]), unasked="gpu"),
    *(
        # AttentiveMix needs a teacher's weights from a file or the network.
        Way(name, partial(policy, name=name), unasked="never" if name == "attentivemix" else "gpu")
        for name in POLICIES
        if name not in ("automix", "samix", "none")
    ),
)


@dataclass
class Row:
    """One way's figures. Times in milliseconds; `note` says why there are none."""

    network: str
    way: str
    batch: int
    ms: float | None = None
    ms_20: float | None = None
    ms_80: float | None = None
    images_per_second: float | None = None
    gflop_per_image: float | None = None
    mfu: float | None = None
    """Share of the device's stated bfloat16 peak; None where that is not known."""
    peak_mib: float | None = None
    """On a GPU the most that the allocator held beyond what it held before the step; on a CPU the most that autograd
    held for the backward pass, but for the weights."""
    host_reads: int | None = None
    """How often the host waited for the device's results in one step."""
    note: str = ""


class HostReads(TorchDispatchMode):
    """Counts operators whose result the host has to wait for, by name."""

    def __init__(self):
        super().__init__()
        self.found: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        result = func(*args, **kwargs)
        fetched = name == "_to_copy" and args[0].device.type != "cpu" and result.device.type == "cpu"
        counted = name.startswith("index") and any(
            torch.is_tensor(each) and each.dtype == torch.bool for each in torch.utils._pytree.tree_leaves(args[1])
        )  # a mask as an index: its true elements are counted first
        if name in READS or fetched or counted:
            self.found[name] = self.found.get(name, 0) + 1
        return result


def attention_flops(projection, *args, out_shape=None, **kwargs) -> int:
    """Products of the fused attention: scores."""
    batch, positions, channels = projection
    return 2 * batch * positions**2 * channels


def attention_backward_flops(grad, projection, *args, out_shape=None, **kwargs) -> int:
    """Scores again, and the gradients of queries and keys."""
    return 3 * attention_flops(projection)


def convolution_backward_flops(grad, images, weight, *args, out_shape=None, **kwargs) -> int:
    """Gradients of images and weights, as far as asked for; torch's own count takes grouped convolutions for dense."""
    asked_images, asked_weight, _ = args[-1]
    return 2 * math.prod(grad) * math.prod(weight[1:]) * (asked_images + asked_weight)


def counted_flops(step: Callable[[], None]) -> int:
    mapping = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    if kernels.HAS_TRITON:
        mapping |= {
            torch.ops.automix.mix_attention: attention_flops,
            torch.ops.automix.mix_attention_backward: attention_backward_flops,
        }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        step()
    return counter.get_total_flops()


def host_reads(step: Callable[[], None], device: torch.device) -> int:
    """How often a step makes the host wait: on a GPU as the driver's interface sees it, elsewhere by operators."""
    if device.type != "cuda":
        with HostReads() as reads:
            step()
        return sum(reads.found.values())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(each.message) for each in caught)  # not torch's note on the mode itself


def peak_bytes(trained: Trained, device: torch.device) -> int:
    """Of one step; see Row.peak_mib."""
    if device.type != "cuda":
        return peak_saved_bytes(lambda: trained.step(3), trained.module)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trained.step(3)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Clock:
    """Times between marks on the device's own line of work: events on a GPU, the wall clock on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def spans(self) -> list[tuple[str, float]]:
        """For each mark but the first its name and the milliseconds since the one before."""
        if self.device.type != "cuda":
            return [(name, (end - start) * 1e3) for (_, start), (name, end) in pairwise(self.marks)]
        torch.cuda.synchronize()
        return [(name, start.elapsed_time(end)) for (_, start), (name, end) in pairwise(self.marks)]

    def milliseconds(self) -> dict[str, float]:
        """Sums of the spans by name."""
        sums: dict[str, float] = {}
        for name, ms in self.spans():
            sums[name] = sums.get(name, 0.0) + ms
        return sums


def measure_all(case: Case, ways: list[Way], rounds: int, steps: int) -> list[Row]:
    """A row for each way. Those that set a step's memory aside for good are measured one by one, after the others."""
    groups = [[way for way in ways if not way.graph], *([way] for way in ways if way.graph)]
    rows: list[Row] = []
    for group in filter(None, groups):
        rows += measure(case, group, rounds, steps, before=rows)
        gc.collect()  # a model and its recorded step hold each other
        if case.device.type == "cuda":
            torch.cuda.empty_cache()
    order = [way.name for way in ways]
    return sorted(rows, key=lambda row: order.index(row.way))


def measure(case: Case, ways: list[Way], rounds: int, steps: int, before: Sequence[Row] = ()) -> list[Row]:
    """A row for each way, from interleaved turns; what fails says why and leaves the others alone.

    `before` are rows of other ways of the same case, which may be twins of these.
    """
    rows = {way.name: Row(case.name, way.name, case.batch) for way in ways}
    twins = {row.way: row for row in before} | rows
    ready: dict[str, Trained] = {}
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    for way in ways:
        _tell(f"{case.name}: preparing {way.name}")
        with _noting(rows[way.name]):
            ready[way.name] = _prepare(way, case, twins)
    numbers = count()
    for turn in range(rounds):
        _tell(f"{case.name}: round {turn + 1} of {rounds}")
        names = list(ready)
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            with _noting(rows[name]):
                clock = Clock(case.device)
                ready[name].step(next(numbers))  # finds the caches as the other ways left them
                clock.mark("start")
                for _ in range(steps):
                    ready[name].step(next(numbers))
                    clock.mark("step")
                times[name] += [ms for _, ms in clock.spans()]
            if rows[name].note:
                del ready[name]
    for name in ready:
        _summarize(rows[name], times[name], case.device)
    return list(rows.values())


def _prepare(way: Way, case: Case, rows: dict[str, Row]) -> Trained:
    torch.manual_seed(0)
    trained = way.build(case)
    row = rows[way.name]
    trained.step(0)
    if way.twin:
        twin = rows.get(way.twin)
        row.gflop_per_image = twin and twin.gflop_per_image
    else:
        row.gflop_per_image = counted_flops(lambda: trained.step(1)) / case.batch / 1e9
        row.host_reads = host_reads(lambda: trained.step(2), case.device)
    if not way.graph and (case.device.type == "cuda" or not way.twin):
        row.peak_mib = peak_bytes(trained, case.device) / 2**20
    return trained


@contextlib.contextmanager
def _noting(row: Row) -> Iterator[None]:
    """A failure inside becomes the row's note."""
    try:
        yield
    except ConfigError as error:
        row.note = f"not for this network: {error}"
    except torch.OutOfMemoryError:
        row.note = "failed: out of memory"
    except Exception as error:  # a benchmark of many alternatives: one that fails is a result
        row.note = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def _summarize(row: Row, times: list[float], device: torch.device) -> None:
    row.ms = statistics.median(times)
    deciles = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    row.ms_20, row.ms_80 = deciles[1], deciles[7]
    row.images_per_second = row.batch / row.ms * 1e3
    peak = peak_flops(device)
    if peak and row.gflop_per_image:
        row.mfu = row.gflop_per_image * 1e9 * row.images_per_second / peak


def peak_flops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def measure_parts(case: Case, rounds: int) -> dict[str, float]:
    """Milliseconds of each part of an AutoMix step (medians), in the order of immediate backward, where the three
    branches do not overlap: between two forward passes lies the backward pass of the first."""
    trained = policy(case)
    model, times = trained.module, {}
    clock = Clock(case.device)

    def marked(owner: Any, attribute: str, *names: tuple[str, str]):
        """Puts a mark before and after each call; the n-th pair of names is for the n-th call of a step."""
        function, calls = getattr(owner, attribute), iter(names)

        def call(*args, **kwargs):
            before, name = next(calls)
            clock.mark(before)
            result = function(*args, **kwargs)
            clock.mark(name)
            return result

        return _replaced(owner, attribute, call)

    for number in range(rounds + 1):
        clock.marks.clear()
        attention, blend = ("projection", "attention"), ("mask loss", "blend")
        with contextlib.ExitStack() as stack:
            for context in (
                marked(model.momentum.backbone, "features", ("normalise", "feature pass")),
                marked(kernels, "mix_attention", attention, attention),
                marked(kernels, "mask_blend", blend, blend),
                marked(model.momentum, "forward", ("mask loss", "mixed momentum, forward")),
                marked(
                    model.query,
                    "forward",
                    ("mixed momentum, backward", "clean query, forward"),
                    ("clean query, backward", "mixed query, forward"),
                ),
                marked(trained.optimizer, "step", ("mixed query, backward", "optimizer")),
            ):
                stack.enter_context(context)
            clock.mark("start")
            trained.step(number)
            clock.mark("momentum update")
        if number > 0:
            for name, ms in clock.milliseconds().items():
                times.setdefault(name, []).append(ms)
    return {name: statistics.median(values) for name, values in times.items()}


@contextlib.contextmanager
def _replaced(owner: Any, attribute: str, value: Callable) -> Iterator[None]:
    """Within the block, the owner's attribute is another one."""
    own = vars(owner).get(attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        delattr(owner, attribute) if own is None else setattr(owner, attribute, own)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def describe_machine() -> dict[str, Any]:
    about = provenance.environment()
    if about["gpus"]:
        device = about["gpus"][0]
    else:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        device = f"CPU, {torch.get_num_threads()} threads, {model[1] if model else platform.machine()}"
    return {
        "device": device,
        "versions": {k: about["versions"][k] for k in ("torch", "triton", "timm")} | {"python": about["python"]},
        "commit": about["commit"],
        "load_average": os.getloadavg()[0],
        "date": datetime.now(UTC).date().isoformat(),
    }


# What a person reads; all of it from the dictionary that step.json holds.


def markdown(result: dict) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        "# One training step", "",
        f"{machine['device']}; {versions}; {result['dtype']}; {machine['date']}, load average at the start "
        f"{machine['load_average']:.2f}. "
        f"Medians (20 to 80 %) of {result['rounds']} interleaved rounds of {result['steps']} steps; one device, no "
        "engine. The ratio to the fastest vanilla step stands beside the ratio of counted FLOPs. Peak: "
        + ("the allocator's, beyond what it held before the step" if result["gpu"] else
           "what autograd holds for the backward pass, but for the weights")
        + ". Host reads: how often a step waits for results of the device.", "",
        "| network | way | batch | images/s | ms | of vanilla | FLOPs of vanilla's | MFU | peak, MiB | host reads |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in result["rows"]:
        head = f"| {row['network']} | {row['way']} | {row['batch']} |"
        if row["ms"] is None:
            lines.append(f"{head} {row['note'].replace('|', '/')} | | | | | | |")
            continue
        ratios = vanilla_ratios(result["rows"], row)
        cells = [f"{row['images_per_second']:,.1f}", f"{row['ms']:.2f} ({row['ms_20']:.2f} to {row['ms_80']:.2f})"]
        cells += ["" if ratio is None else f"{ratio:.2f}x" for ratio in ratios]
        cells.append("not known" if row["mfu"] is None else f"{row['mfu']:.1%}")
        cells.append("" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}")
        cells.append("" if row["host_reads"] is None else str(row["host_reads"]))
        lines.append(f"{head} {' | '.join(cells)} |")
    for network, parts in result["parts"].items():
        total = sum(parts.values())
        lines += ["", f"## Parts of an AutoMix step, {network}", ""]
        lines += ["Immediate backward, full feature pass.", "", "| part | ms | share |", "|---|---|---|"]
        lines += [f"| {name} | {ms:.2f} | {ms / total:.1%} |" for name, ms in parts.items()]
    return "\n".join(lines) + "\n"


def vanilla_ratios(rows: list[dict], row: dict) -> tuple[float | None, float | None]:
    """A row's time and FLOPs as multiples of those of the network's fastest vanilla step."""
    own = [r for r in rows if r["network"] == row["network"] and r["way"].startswith("vanilla") and r["ms"]]
    if not own:
        return None, None
    fastest = min(own, key=lambda each: each["ms"])
    flops = row["gflop_per_image"] and fastest["gflop_per_image"]
    return row["ms"] / fastest["ms"], row["gflop_per_image"] / fastest["gflop_per_image"] if flops else None


def bars_svg(result: dict) -> str:
    """Time as a multiple of the fastest vanilla step, a panel per network; a tick where the FLOPs alone would be."""
    left, width, height = 230, 760, 22
    parts, y = [], 46
    for network in dict.fromkeys(row["network"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["network"] == network and row["ms"]]
        panel = [(row, *vanilla_ratios(rows, row)) for row in rows]
        panel = [each for each in panel if each[1]]
        if not panel:
            continue
        scale = (width - left - 90) / max(ratio for _, ratio, _ in panel)
        parts.append(f'<text x="10" y="{y}" font-weight="bold">{escape(network)}</text>')
        for row, ratio, flops in panel:
            y += height
            fill = "#c0392b" if row["way"].startswith("AutoMix") else "#7f8c8d"
            parts += [
                f'<text x="{left - 8}" y="{y}" text-anchor="end">{escape(row["way"])}</text>',
                f'<rect x="{left}" y="{y - 11}" width="{ratio * scale:.1f}" height="14" fill="{fill}"/>',
                f'<text x="{left + max(ratio, flops or 0) * scale + 6:.1f}" y="{y}">{ratio:.2f}</text>',
            ]
            if flops:
                parts.append(f'<path d="M{left + flops * scale:.1f} {y - 14}v20" stroke="black" stroke-width="2"/>')
        y += 44
    title = f"Step time as a multiple of the fastest vanilla step (tick: FLOPs); {result['machine']['device']}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" font-family="sans-serif" font-size="12">'
    background = f'<rect width="{width}" height="{y}" fill="white"/>'
    return "\n".join([head, background, f'<text x="10" y="20">{escape(title)}</text>', *parts, "</svg>\n"])


def compare(result: dict, before: dict) -> tuple[str, bool]:
    """What moved since an earlier result of the same kind of machine, and whether anything became slower, or was not
    compared at all.

    A row has moved when the middle 60 % of its times and those of before do not overlap, and the medians differ by
    more than MIN_MOVE.
    """
    earlier = {(row["network"], row["way"], row["batch"]): row for row in before["rows"] if row["ms"]}
    lines, slower, compared = [], False, 0
    for row in result["rows"]:
        old = earlier.pop((row["network"], row["way"], row["batch"]), None)
        if old is None:
            continue
        compared += 1
        name = f"{row['network']}, {row['way']}"
        if row["ms"] is None:
            lines.append(f"{name}: no figures any more: {row['note']}")
            slower = True
            continue
        change = row["ms"] / old["ms"] - 1
        apart = row["ms_20"] > old["ms_80"] or row["ms_80"] < old["ms_20"]
        if apart and abs(change) > MIN_MOVE:
            lines.append(f"{name}: {old['ms']:.2f} -> {row['ms']:.2f} ms, {'slower' if change > 0 else 'faster'} "
                         f"by {abs(change):.1%}")  # fmt: skip
            slower |= change > 0
    if not compared:
        return "nothing in common: the same --networks, --batch and --ways can be compared", True
    return "\n".join(lines or ["nothing moved beyond the spread"]), slower


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="automix bench step", description=__doc__.splitlines()[0])
    names = [network.name for network in NETWORKS]
    parser.add_argument("--networks", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--ways", nargs="+", choices=[way.name for way in WAYS], metavar="WAY",
        help=f"of {'; '.join(way.name for way in WAYS)} (default: on a GPU most, on a CPU the first)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, help=f"images per step (default: by network; on a CPU {CPU_BATCH})")
    parser.add_argument("--size", type=int, help="side of the images (default: the network's)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16; on a CPU float32")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each way (default: 7)")
    parser.add_argument("--steps", type=int, default=3, help="measured steps in a turn (default: 3)")
    parser.add_argument(
        "--compare", type=Path, metavar="STEP_JSON", help="say what moved since; exit code 1 if anything is slower"
    )
    parser.add_argument("--out", type=Path, help="folder for step.json, step.md and step.svg")
    options = parser.parse_args(argv)
    for name in ("batch", "size", "rounds", "steps"):
        value, least = getattr(options, name), 2 if name == "batch" else 1
        if value is not None and value < least:
            parser.error(f"--{name} {value}: expected {least} or more")
    options.before = None
    if options.compare:
        try:
            options.before = json.loads(options.compare.read_text())
            device, dtype = options.before["machine"]["device"], options.before["dtype"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--compare {options.compare}: expected a step.json of an earlier run ({error})")
        if device != describe_machine()["device"]:
            parser.error(f"--compare {options.compare}: measured on {device}, this is {describe_machine()['device']}")
        if options.dtype not in (None, dtype):
            parser.error(f"--compare {options.compare}: measured in {dtype}, not in {options.dtype}")
        options.dtype = dtype
    return options


def run(argv: list[str]) -> int:
    """Measures and prints; returns 1 if a way failed, or with --compare if one became slower."""
    options = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32"))
    if options.ways:
        ways = [way for way in WAYS if way.name in options.ways]
    else:
        ways = [way for way in WAYS if way.unasked == "always" or (on_gpu and way.unasked == "gpu")]
    result: dict[str, Any] = {
        "machine": describe_machine(), "gpu": on_gpu, "dtype": str(dtype).removeprefix("torch."),
        "rounds": options.rounds, "steps": options.steps, "rows": [], "parts": {},
    }  # fmt: skip
    if on_gpu:
        torch.backends.cudnn.benchmark = True
    for network in NETWORKS:
        if network.name not in options.networks:
            continue
        network = replace(network, size=options.size or network.size)
        torch.compiler.reset()
        case = Case(network, options.batch or (network.batch if on_gpu else CPU_BATCH), device, dtype)
        rows = measure_all(case, ways, options.rounds, options.steps)
        result["rows"] += [asdict(row) for row in rows]
        if any(way.name.startswith("AutoMix") for way in ways):
            result["parts"][case.name] = measure_parts(case, options.rounds)
        gc.collect()
    best = [r for r in result["rows"] if r["network"] == "resnet50@224" and r["way"].startswith("AutoMix") and r["ms"]]
    if best:  # what `automix bench loader --step-json` reads
        result["images_per_second"] = max(row["images_per_second"] for row in best)
        result["device"] = result["machine"]["device"]
    text, failed = markdown(result), any(r["note"].startswith("failed") for r in result["rows"])
    print(text)
    if options.before:
        moved, slower = compare(result, options.before)
        print(f"Since {options.compare}:\n{moved}")
        failed |= slower
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "step.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.out / "step.md").write_text(text)
        (options.out / "step.svg").write_text(bars_svg(result))
    return int(failed)
