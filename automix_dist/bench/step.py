"""`automix bench step`: one training step, from uint8 images on the device to updated weights: AutoMix against vanilla.

    automix bench step --networks resnet50 --out DIR          on a GPU: the table that counts
    automix bench step --networks cifar_resnet18 --batch-size 8   on a CPU: the ratios show, the speed means little

Ways of a network live in one process and take turns, a few steps each, so that a busy moment of the machine hits all
alike; the median counts. On a GPU there are several such groups: first what decides, then what takes a compiler, then
CUDA graphs, whose memory is set aside for good, one by one, then the rest. Files are written after each group. A ratio
is taken to the fastest vanilla step of the same table, and stands beside the ratio of counted FLOPs, below which it
cannot honestly fall. One device, no engine, random images. `published` is the published implementation's step restated
in plain PyTorch (bench/published.py).
"""

import argparse
import contextlib
import gc
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count, groupby, product
from pathlib import Path
from typing import Any, Literal, NamedTuple
from xml.sax.saxutils import escape

import torch
from automix_kernels import api as kernels
from automix_kernels.benchmark import count_launches
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from automix_dist.automix import lay_out
from automix_dist.backbone import create_backbone, create_timm_model
from automix_dist.bench import Clock, check_counts, describe_machine, replaced, results_folder, write_results
from automix_dist.bench.memory import peak_saved_bytes
from automix_dist.bench.published import PublishedStep
from automix_dist.captured_step import CapturedStep
from automix_dist.classifier import build_model
from automix_dist.config import IMAGENET_MEAN, IMAGENET_STD, POLICIES, Config, ConfigError, from_dict
from automix_dist.convolutions import pad_stems
from automix_dist.draws import draw_step
from automix_dist.momentum import MomentumUpdate
from automix_dist.optimizer import build_optimizer
from automix_dist.policy import needed_feature
from automix_dist.schedules import Schedule

POOL = 4
"""Different batches that the steps take in turn."""

CPU_BATCH = 4
NOT_REACHED = "not reached"
MIN_MOVE = 0.03
"""With --compare, changes smaller than this are not reported, however narrow the spreads are."""

PEAK_FLOPS = {
    "H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "B200": 2250e12, "4090": 165e12,
    "3090": 71e12,
}  # fmt: skip
"""Dense bfloat16 FLOP/s that the makers state, by a part of the device's name; the first match counts."""

TIME_RATIO = "AutoMix over vanilla, time"

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

    @property
    def label(self) -> str:
        return f"{self.name}@{self.size}"

    def config(self, *, policy: str = "automix", engine: dict | None = None, **automix: Any) -> Config:
        sections = {
            "model": {"backbone": self.backbone, "small_stem": self.small_stem},
            "data": {"image_size": self.size},
            "automix": {"feature": self.feature, **automix},
            "policy": {"name": policy},
            "engine": engine or {},
        }
        return from_dict(sections)


NETWORKS = (  # those that targets name come first
    Network("resnet50", "resnet50", -2, 224, 256),
    Network("cifar_resnet18", "resnet18", -2, 32, 512, classes=100, small_stem=True),
    Network("resnet18", "resnet18", -2, 224, 256),
    Network("convnext_tiny", "convnext_tiny", -2, 224, 128),
    Network("deit_small", "deit_small_patch16_224", 5, 224, 128),
    Network("swin_tiny", "swin_tiny_patch4_window7_224", -2, 224, 128),
)


class Case:
    """A network's inputs on the device, shared by all ways of training it."""

    def __init__(self, network: Network, batch: int, device: torch.device, dtype: torch.dtype):
        self.network, self.batch, self.device, self.dtype = network, batch, device, dtype
        self.name = network.label
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
    period: int = 1
    """After so many steps they repeat; what is measured is their mean."""

    def cycle(self, number: int) -> None:
        """The steps of one period."""
        for step in range(number * self.period, (number + 1) * self.period):
            self.step(step)

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
    turn: int = 1
    """Ways of the same turn are measured together; what decides has the first ones."""
    graph: bool = False
    """A CUDA graph, whose memory is set aside once: the peak of a step would say nothing. Measured alone."""


class Vanilla(nn.Module):
    """A timm model with normalisation and loss, called as the models of a run are, so that CapturedStep takes it."""

    class Losses(NamedTuple):
        total: Tensor

    def __init__(self, network: nn.Module, case: Case):
        super().__init__()
        self.network, self.case = network, case

    def forward(self, images: Tensor, labels: Tensor, draws: Any = None, mask_loss_weight: Any = None) -> Losses:
        with self.case.autocast():
            pixels = lay_out(kernels.normalize(images, self.case.mean, self.case.std, self.case.dtype))
            return self.Losses(F.cross_entropy(self.network(pixels).float(), labels))


def vanilla(
    case: Case, *, channels_last: bool = False, compiler: str = "", padded: bool = False, graph: bool = False
) -> Trained:
    """Plain training; `channels_last` is the layout of the weights, `compiler` a mode of torch.compile."""
    network = create_timm_model(case.network.config().model, case.network.size, case.network.classes)
    if padded:
        pad_stems(network)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = Vanilla(network.to(case.device, memory_format=layout), case).train()
    if compiler:
        network.compile(mode=compiler, dynamic=False)
    if graph:
        CapturedStep(model)

    def loss(step: int) -> Tensor:
        return model(case.images[step % POOL], case.labels[step % POOL], ()).total

    return Trained(
        model, loss, torch.optim.SGD(model.parameters(), case.network.config().optimizer.lr, 0.9, fused=True)
    )


def policy(case: Case, name: str = "automix", engine: dict | None = None, **settings: Any) -> Trained:
    """A policy's step as `automix train` makes it, but for the engine; AutoMix unless another one is named."""
    config = case.network.config(policy=name, engine=engine, **settings)
    backbone = create_backbone(config.model, needed_feature(config), case.network.size)
    model = build_model(config, backbone, case.network.classes, case.dtype).to(case.device).train()
    if config.engine.compile:
        model.compile_regions()
    if config.engine.cuda_graph:
        CapturedStep(model)
    update, schedule = MomentumUpdate(model), Schedule(config, steps_per_epoch=1000)
    skipped = torch.zeros((), device=case.device)  # as every engine hands it over

    def loss(step: int) -> Tensor:
        images, labels, values = case.images[step % POOL], case.labels[step % POOL], schedule.at(step)
        draws = model.draw(images, seed=0, step=step, train_generator=values.train_generator)
        return model(images, labels, draws, values.mask_loss_weight).total

    optimizer, period = build_optimizer(model, config.optimizer), config.automix.generator_every
    return Trained(model, loss, optimizer, lambda: update(config.automix.momentum, skipped), period)


def published(case: Case, *, autocast: bool = False) -> Trained:
    config = case.network.config()
    backbone = create_backbone(config.model, config.automix.feature, case.network.size)
    model = PublishedStep(backbone, case.network.classes, config.automix).to(case.device).train()

    def loss(step: int) -> Tensor:
        draws = draw_step(config.automix, case.batch, seed=0, step=step)
        lams, partners = draws.lam[:, 0].tolist(), draws.partner
        images = case.normalized(step, torch.float32).contiguous()
        with case.autocast(autocast):
            return model(images, case.labels[step % POOL], lams, partners)

    optimizer = model.optimizer(config.optimizer.lr)
    return Trained(model, loss, optimizer, lambda: model.update_momentum(config.automix.momentum))


def variant(twin: str, suffix: str, turn: int, build: Callable[[Case], Trained], graph: bool = False) -> Way:
    """The twin's operations, made to run in another manner."""
    return Way(f"{twin}, {suffix}", build, twin, "gpu", turn, graph)


TOGETHER, COMPILED, PADDED = {"immediate_backward": False}, {"compile": True}, {"padded_stem": True}
RECORDED = {"cuda_graph": True}
channels_last, cut = partial(vanilla, channels_last=True), partial(policy, feature_pass="cut")
# Turn 1 decides, eager; 2 decides, compiled; 3 decides, recorded; 4 compiles longest; then the rest likewise.
WAYS = (
    Way("vanilla", vanilla),
    Way("vanilla, channels-last", channels_last, unasked="gpu"),
    variant("vanilla", "channels-last, compiled", 2, partial(channels_last, compiler="default")),
    variant("vanilla", "channels-last, CUDA graph", 3, partial(channels_last, graph=True), graph=True),
    variant(
        "vanilla",
        "channels-last, compiled, CUDA graph",
        3,
        partial(channels_last, compiler="default", graph=True),
        True,
    ),
    # Inductor's own CUDA graphs; as timm's training script with --channels-last and --torchcompile-mode.
    variant("vanilla", "channels-last, max-autotune", 4, partial(channels_last, compiler="max-autotune"), graph=True),
    variant("vanilla", "channels-last, padded stem", 5, partial(channels_last, padded=True)),
    variant("vanilla", "compiled", 6, partial(vanilla, compiler="default")),
    Way("AutoMix", policy),
    Way("AutoMix, one backward", partial(policy, engine=TOGETHER)),
    Way("AutoMix, cut", cut),
    Way("AutoMix, cut, one backward", partial(cut, engine=TOGETHER)),
    variant("AutoMix, cut", "compiled", 2, partial(cut, engine=COMPILED)),
    variant("AutoMix, cut", "compiled, CUDA graph", 3, partial(cut, engine=COMPILED | RECORDED), graph=True),
    variant("AutoMix, cut", "CUDA graph", 3, partial(cut, engine=RECORDED), graph=True),
    Way("AutoMix, cut, joint query", partial(cut, engine={"joint_query": True}), unasked="gpu", turn=5),
    variant("AutoMix, cut", "padded stem", 5, partial(cut, engine=PADDED)),
    variant("AutoMix, cut", "one backward, compiled", 6, partial(cut, engine=COMPILED | TOGETHER)),
    # Not the published method (docs/throughput.md).
    Way("inexact: query's features", partial(policy, feature_source="query"), unasked="never", turn=5),
    Way("inexact: half judged", partial(cut, generator_share=0.5), unasked="never", turn=5),
    Way("inexact: every second step judged", partial(cut, generator_every=2), unasked="never", turn=5),
    Way("inexact: Mix Block at rest", partial(cut, mix_block_until=1e-9), unasked="never", turn=5),  # from step 1 on
    Way("published, float32", published),
    Way("published, autocast", partial(published, autocast=True), unasked="gpu"),
    Way("samix", partial(policy, name="samix", lam_concat=False, upsampling=["bilinear"]), unasked="gpu", turn=5),
    *(
        # AttentiveMix needs a teacher's weights from a file or the network.
        Way(name, partial(policy, name=name), unasked="never" if name == "attentivemix" else "gpu", turn=5)
        for name in POLICIES
        if name not in ("automix", "samix")
    ),
)


@dataclass
class Row:
    """One way's figures. Times in milliseconds; `note` says why there are none, or how few rounds they come from."""

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
    launches: int | None = None
    """Kernels, copies and fills that a step puts on a GPU; None elsewhere, and where the profiler sees none."""
    note: str = NOT_REACHED


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


def attention_flops(projection, value, partner, *args, out_shape=None, **kwargs) -> int:
    """Products of the fused attention: the scores of every pair."""
    _, positions, columns = projection
    width = args[-1] if value is None else columns  # with the value as a column of the projection
    return 2 * math.prod(partner) * positions**2 * width


def attention_backward_flops(grad, *args, out_shape=None, **kwargs) -> int:
    """Scores again, and the gradients of queries and keys."""
    return 3 * attention_flops(*args)


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
        return peak_saved_bytes(lambda: trained.cycle(3), trained.module)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trained.cycle(3)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def groups(ways: list[Way]) -> list[list[Way]]:
    """The ways that are measured together, in the order in which they are; CUDA graphs one by one."""
    found = []
    for _, members in groupby(sorted(ways, key=lambda way: way.turn), key=lambda way: way.turn):
        members = list(members)
        found += [[way for way in members if not way.graph], *([way] for way in members if way.graph)]
    return [group for group in found if group]


def measure(
    case: Case,
    ways: list[Way],
    rounds: int,
    steps: int,
    rows: dict[str, Row] | None = None,
    deadline: float = math.inf,
) -> list[Row]:
    """The rows of these ways, from interleaved turns; what fails says why and leaves the others alone.

    Args:
        rows: by way, to fill; those of other ways may be twins of these.
        deadline: of time.monotonic(); after it no way is begun, and what has been begun gets no second round.
    """
    rows = {way.name: Row(case.name, way.name, case.batch) for way in ways} if rows is None else rows
    ready: dict[str, Trained] = {}
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    for way in ways:
        if time.monotonic() > deadline:
            break
        _tell(f"{case.name}: preparing {way.name}")
        with _noting(rows[way.name]):
            ready[way.name] = _prepare(way, case, rows)
    numbers = count()
    for turn in range(rounds):
        if not ready or (turn and time.monotonic() > deadline):
            break
        _tell(f"{case.name}: round {turn + 1} of {rounds}")
        names = list(ready)
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            with _noting(rows[name]):
                trained, clock = ready[name], Clock(case.device)
                trained.cycle(next(numbers))  # finds the caches as the other ways left them
                clock.mark("start")
                for _ in range(steps):
                    trained.cycle(next(numbers))
                    clock.mark("step")
                times[name] += [ms / trained.period for _, ms in clock.spans()]
            if rows[name].note:
                del ready[name]
    for name in ready:
        _summarize(rows[name], times[name], case.device)
        if len(times[name]) < rounds * steps:
            rows[name].note = f"{len(times[name]) // steps} of {rounds} rounds"
    return [rows[way.name] for way in ways]


def _prepare(way: Way, case: Case, rows: dict[str, Row]) -> Trained:
    torch.manual_seed(0)
    trained = way.build(case)
    row, on_gpu = rows[way.name], case.device.type == "cuda"
    trained.cycle(0)
    if way.twin:
        trained.cycle(1)  # Inductor records its own CUDA graphs in the second step
        twin = rows.get(way.twin)
        row.gflop_per_image = twin and twin.gflop_per_image
    else:
        row.gflop_per_image = counted_flops(lambda: trained.cycle(1)) / trained.period / case.batch / 1e9
    if on_gpu or not way.twin:
        row.host_reads = math.ceil(host_reads(lambda: trained.cycle(2), case.device) / trained.period)
        if not way.graph:
            row.peak_mib = peak_bytes(trained, case.device) / 2**20
    if on_gpu and (launches := count_launches(lambda: trained.cycle(4))):
        row.launches = math.ceil(launches / trained.period)
    return trained


@contextlib.contextmanager
def _noting(row: Row) -> Iterator[None]:
    """A failure inside becomes the row's note."""
    row.note = ""
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

        return replaced(owner, attribute, call)

    for number in range(rounds + 1):
        clock.marks.clear()
        attention, blend = ("projection", "attention"), ("mask loss", "blend")
        with contextlib.ExitStack() as stack:
            for context in (
                marked(model.momentum.backbone, "features", ("normalise", "feature pass")),
                marked(kernels, "mix_attention", attention),
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


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fastest(rows: list[dict], network: str, way: str) -> dict | None:
    """The fastest measured row of a network among the ways whose names begin so."""
    found = [row for row in rows if row["network"] == network and row["way"].startswith(way) and row["ms"]]
    return min(found, key=lambda row: row["ms"], default=None)


def targets(result: dict) -> list[dict]:
    """What was aimed at, and what came of it, each time of the fastest way of its kind; `value` and `met` are None on
    another machine, and where a way has no figures."""
    rows, device = result["rows"], result["machine"]["device"]
    found = []

    def aim(machine: str, network: str, what: str, value: float | None, **bounds: float) -> None:
        value = value if machine in device else None
        met = None if value is None else bounds.get("least", 0) <= value <= bounds.get("most", math.inf)
        found.append({"machine": machine, "network": network, "what": what, **bounds, "value": value, "met": met})

    def speed(network: str, way: str) -> float | None:
        own = fastest(rows, network, way)
        return own and own["images_per_second"]

    def times(network: str, way: str, other: str) -> float | None:
        """The one's speed as a multiple of the other's."""
        own, slower = speed(network, way), speed(network, other)
        return own and slower and own / slower

    r50, cifar, reference = "resnet50@224", "cifar_resnet18@32", "published, float32"
    aim("H200", r50, "vanilla, images/s", speed(r50, "vanilla"), least=5000, stretch=7950)
    aim("H200", r50, "AutoMix, images/s", speed(r50, "AutoMix"), least=1650, stretch=2600)
    # A ratio below 2.9 is no success: fewer FLOPs than that are not in it, so the vanilla step must be slow.
    aim("H200", r50, TIME_RATIO, times(r50, "vanilla", "AutoMix"), least=2.9, most=3.15, stretch=3.05)
    aim("H200", r50, f"AutoMix over {reference}, images/s", times(r50, "AutoMix", reference), least=3)
    aim("H200", cifar, f"AutoMix over {reference}, images/s", times(cifar, "AutoMix", reference), least=4)
    for network in dict.fromkeys(row["network"] for row in rows):
        own = fastest(rows, network, "AutoMix")
        time_ratio, flop_ratio = vanilla_ratios(rows, own) if own else (None, None)
        value = time_ratio / flop_ratio if flop_ratio else None
        aim("CPU", network, f"{TIME_RATIO}, over that of FLOPs", value, least=0.95, most=1.05)
    return found


# What a person reads; all of it from the dictionary that step.json holds.


def markdown(result: dict) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    counted = any(row.get("launches") for row in result["rows"])
    lines = [
        "# One training step", "",
        f"{machine['device']}; {versions}; {result['dtype']}; {machine['date']}, load average at the start "
        f"{machine['load_average']:.2f}. "
        f"Medians (20 to 80 %) of {result['rounds']} interleaved rounds of {result['steps']} steps; one device, no "
        "engine. `published` is the published step restated in plain PyTorch (automix_dist/bench/published.py), not "
        "its authors' code" + (", with TF32 convolutions unless all is float32" if result["gpu"] else "") + ". "
        "The ratio to the fastest vanilla step stands beside the ratio of counted FLOPs. Peak: "
        + ("the allocator's, beyond what it held before the step" if result["gpu"] else
           "what autograd holds for the backward pass, but for the weights")
        + ". Host reads: how often a step waits for results of the device.", "",
        "| network | way | batch | images/s | ms | of vanilla | FLOPs of vanilla's | MFU | peak, MiB | host reads |"
        + " launches |" * counted,
        "|---" * (10 + counted) + "|",
    ]  # fmt: skip
    for row in result["rows"]:
        head = f"| {row['network']} | {row['way']} | {row['batch']} |"
        if row["ms"] is None:
            lines.append(f"{head} {row['note'].replace('|', '/')} |{' |' * (6 + counted)}")
            continue
        ratios = vanilla_ratios(result["rows"], row)
        few = row["note"] and f"; {row['note']}"
        cells = [f"{row['images_per_second']:,.1f}"]
        cells.append(f"{row['ms']:.2f} ({row['ms_20']:.2f} to {row['ms_80']:.2f}{few})")
        cells += ["" if ratio is None else f"{ratio:.2f}x" for ratio in ratios]
        cells.append("not known" if row["mfu"] is None else f"{row['mfu']:.1%}")
        cells.append("" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}")
        cells.append("" if row["host_reads"] is None else str(row["host_reads"]))
        if counted:
            cells.append(f"{launches:,}" if (launches := row.get("launches")) else "")
        lines.append(f"{head} {' | '.join(cells)} |")
    lines += [
        "", "## Targets", "", "Of the fastest way of each kind; where the machine is another or a way has no figures, "
        "not measured. A ratio below its range points to a slow vanilla step.", "",
        "| on | network | what | target | stretch | is | |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [_target_line(target) for target in result["targets"]]
    for network, parts in result["parts"].items():
        total = sum(parts.values())
        lines += ["", f"## Parts of an AutoMix step, {network}", ""]
        lines += ["Immediate backward, full feature pass.", "", "| part | ms | share |", "|---|---|---|"]
        lines += [f"| {name} | {ms:.2f} | {ms / total:.1%} |" for name, ms in parts.items()]
    return "\n".join(lines) + "\n"


def _target_line(target: dict) -> str:
    low, high, stretch, value = (target.get(key) for key in ("least", "most", "stretch", "value"))
    aimed = f"at least {low:,g}" if high is None else f"{low:g} to {high:g}"
    verdict = "not measured" if value is None else "met" if target["met"] else "**missed**"
    if target["met"] and stretch:
        verdict += ", stretch too" if (value >= stretch if high is None else value <= stretch) else ", stretch missed"
    shown = "" if value is None else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
    best = f"{stretch:,}" if stretch else ""
    cells = [target["machine"], target["network"], target["what"], aimed, best, shown, verdict]
    return f"| {' | '.join(cells)} |"


def vanilla_ratios(rows: list[dict], row: dict) -> tuple[float | None, float | None]:
    """A row's time and FLOPs as multiples of those of the network's fastest vanilla step."""
    vanilla = fastest(rows, row["network"], "vanilla")
    if vanilla is None:
        return None, None
    flops = row["gflop_per_image"] and vanilla["gflop_per_image"]
    return row["ms"] / vanilla["ms"], row["gflop_per_image"] / vanilla["gflop_per_image"] if flops else None


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
        return "nothing in common: the same --networks, --batch-size and --ways can be compared", True
    return "\n".join(lines or ["nothing moved beyond the spread"]), slower


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="automix bench step", description=__doc__.splitlines()[0])
    names = [network.name for network in NETWORKS]
    parser.add_argument("--networks", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--ways", nargs="+", choices=[way.name for way in WAYS], metavar="WAY",
        help=f"of {'; '.join(way.name for way in WAYS)} (default: on a GPU most, on a CPU the first)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, help=f"images per step (default: by network; on a CPU {CPU_BATCH})")
    parser.add_argument("--image-size", type=int, help="side of the images (default: the network's)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16; on a CPU float32")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each way (default: 7)")
    parser.add_argument("--steps", type=int, default=3, help="measured steps in a turn (default: 3)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="after which nothing more is begun; a compilation is not cut off",
    )
    parser.add_argument(
        "--compare", type=Path, metavar="STEP_JSON", help="say what moved since; exit code 1 if anything is slower"
    )
    parser.add_argument("--out", type=results_folder, help="folder for step.json, step.md and step.svg")
    options = parser.parse_args(arguments)
    check_counts(parser, options, batch_size=2, image_size=1, rounds=1, steps=1)
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes}: expected a positive number")
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


def run(arguments: list[str]) -> int:
    """Measures and prints; returns 1 if a way failed, or with --compare if one became slower."""
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32"))
    deadline = time.monotonic() + 60 * options.minutes
    if options.ways:
        ways = [way for way in WAYS if way.name in options.ways]
    else:
        ways = [way for way in WAYS if way.unasked == "always" or (on_gpu and way.unasked == "gpu")]
    networks = [
        replace(n, size=options.image_size or n.size, batch=options.batch_size or (n.batch if on_gpu else CPU_BATCH))
        for n in NETWORKS
        if n.name in options.networks
    ]
    rows = {n.label: {way.name: Row(n.label, way.name, n.batch) for way in ways} for n in networks}
    result: dict[str, Any] = {
        "machine": describe_machine(), "gpu": on_gpu, "dtype": str(dtype).removeprefix("torch."),
        "rounds": options.rounds, "steps": options.steps, "parts": {},
    }  # fmt: skip
    if on_gpu:
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = dtype != torch.float32  # as in training
    _finish(result, rows, options.out)  # what a run that ends early leaves: all is not reached
    for group, network in product(groups(ways), networks):  # what decides first, of every network
        torch.compiler.reset()
        case = Case(network, network.batch, device, dtype)
        measure(case, group, options.rounds, options.steps, rows[network.label], deadline)
        gc.collect()  # a model and its recorded step hold each other
        if on_gpu:
            torch.cuda.empty_cache()
        _finish(result, rows, options.out)
    for network in networks if any(way.name.startswith("AutoMix") for way in ways) else ():
        if time.monotonic() < deadline:
            case = Case(network, network.batch, device, dtype)
            result["parts"][case.name] = measure_parts(case, options.rounds)
        gc.collect()
    text = _finish(result, rows, options.out)
    print(text)
    failed = any(row["note"].startswith("failed") for row in result["rows"])
    if options.before:
        moved, slower = compare(result, options.before)
        print(f"Since {options.compare}:\n{moved}")
        failed |= slower
    return int(failed)


def _finish(result: dict[str, Any], rows: dict[str, dict[str, Row]], out: Path | None) -> str:
    """Completes the result with what the rows say so far; its markdown. Writes the files, if there is a folder."""
    result["rows"] = [asdict(row) for own in rows.values() for row in own.values()]
    result["targets"] = targets(result)
    best = fastest(result["rows"], "resnet50@224", "AutoMix")
    if best:  # what `automix bench loader --step-json` reads
        result["images_per_second"] = best["images_per_second"]
        result["device"] = result["machine"]["device"]
    text = markdown(result)
    if out:
        write_results(out, "step", result, text, bars_svg(result))
    return text
