"""`automix bench scaling`: what each engine moves in a step, and what that makes of 8 to 4,096 GPUs.

    automix bench scaling --out DIR                                          here: on all GPUs, or two CPU processes
    automix bench scaling --step-ms 98 --link-gbps 400 --latency-us 5 --count-only   a cluster that is not here

Real engines take real steps on the ranks that are here; the bytes of every collective are counted and compared with
the formulas. Timed, they give this machine's latency and bandwidth, and a check of the model against whole steps.
The prediction is the model with the figures of a link that is given, not measured:

    all-reduce of n bytes over N hosts of g GPUs, in seconds (ring within, tree of latencies between):
    start + 2 (g-1)/g n/B_gpu + [N > 1] (17 us + 2 ceil(log2 N) hop + 2 (N-1)/N n/(0.85 B_host))

all-gather and reduce-scatter take half. Its form is that of Thakur, Rabenseifner and Gropp (2005); start = 20 us, and
17 us more for a second host, fit the 46-48 us of small all-reduces on two hosts in NCCL issue 1244. What can hide
behind computing does (a third of a step, with ZeRO 3 0.9 of it, with ZeRO 0 and FSDP2 nothing), the last bucket never,
and hardly any with engine.compile or engine.cuda_graph, which are not predicted; skew adds 50 us times log2 of GPUs.
Such a model gives 0.97 from 64 to 768 GPUs of MLPerf v3.0, where 0.90 was measured: quote efficiencies with at least 3
points of doubt.
"""

import argparse
import gc
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from automix_dist import distributed
from automix_dist.automix import AutoMix
from automix_dist.backbone import create_backbone
from automix_dist.bench import ENGINES, check_counts, describe_machine, results_folder, run_on_ranks, write_results
from automix_dist.config import Config, EngineConfig
from automix_dist.config_file import from_dict
from automix_dist.distributed import Process
from automix_dist.draws import draw_step
from automix_dist.engines import build_engine
from automix_dist.optimizer import build_optimizer

HIDES = {"ddp": 0.33, "zero0": 0.0, "zero1": 0.33, "zero2": 0.33, "zero3": 0.9, "fsdp2": 0.0}
"""The share of a GPU's step behind which collectives hide: the query encoder's gradients are final with a third of the
step to go. ZeRO 3 also prefetches; ZeRO 0 reduces after the backward pass, and FSDP2 gathers the model as one unit."""
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
START_SECONDS, NETWORK_SECONDS, SKEW_SECONDS = 20e-6, 17e-6, 50e-6
"""Of a collective; more of one that leaves the host; of a step, times log2 of the GPUs."""
NETWORK_SHARE = 0.85
"""The share of a host's bandwidth that a ring gets."""
LAST_BUCKET_BYTES = 4e6
"""What is reduced after the backward pass at the most: nothing hides it."""
MESSAGES = [2**exponent for exponent in range(10, 25, 2)]  # bytes
COLLECTIVES = {"allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter"}
COLORS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7")


@dataclass(frozen=True)
class Sizes:
    """Elements of a model."""

    trained: int
    momentum: int
    idle: int
    """Of the momentum encoder: its head for clean images has no part in a training step."""
    optimizer_states: int
    """Tensors of the optimizer per trained parameter: 1 for SGD with momentum, 2 for AdamW."""


@dataclass(frozen=True)
class Link:
    """What joins the GPUs; bytes per second each way."""

    host: float
    hop_seconds: float
    gpu: float
    gpus_per_host: int


def traffic(engine: str, sizes: Sizes) -> dict[str, int]:
    """Bytes of the whole tensors that a step's collectives work on, in float32, for any number of ranks.

    The momentum encoder is updated where it lies and costs nothing but the gathers of what shards it. DeepSpeed's
    stages 1 and 2 all-reduce, as its default is, and gather the parameters after the step; its stage 3 gathers each
    used parameter once as long as the model has fewer than 1e9 of them, FSDP2 the whole model for each pass.
    """
    trained, whole = 4 * sizes.trained, 4 * (sizes.trained + sizes.momentum)
    used = whole - 4 * sizes.idle
    return {
        "ddp": {"all_reduce": trained},
        "zero0": {"all_reduce": trained},
        "zero1": {"all_reduce": trained, "all_gather": trained},
        "zero2": {"all_reduce": trained, "all_gather": trained},
        "zero3": {"reduce_scatter": trained, "all_gather": used},
        "fsdp2": {"reduce_scatter": trained, "all_gather": 2 * whole},
    }[engine]


def sent(moved: dict[str, int], ranks: int) -> float:
    """Bytes that each rank sends, and receives, in rings."""
    return sum((2 if kind == "all_reduce" else 1) * (ranks - 1) / ranks * size for kind, size in moved.items())


def state_bytes(engine: str, sizes: Sizes, ranks: int, bucket: int) -> float:
    """Memory of one rank for weights, gradients, optimizer state and the engine's buffers, without activations."""
    trained, momentum, optimizer = 4 * sizes.trained, 4 * sizes.momentum, 4 * sizes.trained * sizes.optimizer_states
    if engine in ("ddp", "zero0"):
        return trained + momentum + trained + optimizer
    shards = (2 * trained + optimizer) / ranks  # of float32 masters, gradients and optimizer state
    if engine == "fsdp2":
        return (trained + momentum + trained + optimizer) / ranks + trained + momentum  # the model while gathered
    if engine == "zero3":
        return (trained + momentum) / ranks + shards + trained + momentum
    return trained + momentum + shards + (trained if engine == "zero1" else 0) + 2 * 4 * bucket


def collective_seconds(kind: str, size: float, gpus: int, link: Link) -> float:
    """The model of the docstring, for one collective."""
    if gpus == 1:
        return 0.0
    local = min(link.gpus_per_host, gpus)
    hosts = math.ceil(gpus / local)
    seconds = START_SECONDS + 2 * (local - 1) / local * size / link.gpu
    if hosts > 1:
        seconds += NETWORK_SECONDS + 2 * math.ceil(math.log2(hosts)) * link.hop_seconds
        seconds += 2 * (hosts - 1) / hosts * size / (NETWORK_SHARE * link.host)
    return seconds if kind == "all_reduce" else seconds / 2


def exposed_seconds(engine: str, sizes: Sizes, step: float, gpus: int, link: Link, bucket: int, calls: int) -> float:
    """How long a step of `step` seconds waits for collectives; `calls` are what ZeRO 3's gathers come in."""
    moved = traffic(engine, sizes)
    reduction, size = next((kind, moved[kind]) for kind in ("all_reduce", "reduce_scatter") if kind in moved)
    pieces = max(1, math.ceil(size / (4 * bucket)))
    reducing = pieces * collective_seconds(reduction, size / pieces, gpus, link)
    last = collective_seconds(reduction, min(size / pieces, LAST_BUCKET_BYTES), gpus, link)
    gathered = moved.get("all_gather", 0)
    if engine == "zero3":
        both = reducing + calls * collective_seconds("all_gather", gathered / calls, gpus, link)
        return max(last, 0.03 * both, both - HIDES[engine] * step)
    gathering = collective_seconds("all_gather", gathered, gpus, link) if gathered else 0.0
    return max(last, reducing - HIDES[engine] * step) + gathering


def predict(engine: str, sizes: Sizes, step: float, link: Link, bucket: int, calls: int) -> list[dict]:
    """Step time, weak-scaling efficiency and memory per rank for each number of GPUs."""
    rows = []
    for gpus in GPUS:
        waits = exposed_seconds(engine, sizes, step, gpus, link, bucket, calls) + SKEW_SECONDS * math.log2(gpus)
        rows.append(
            {
                "gpus": gpus,
                "step_ms": 1000 * (step + waits),
                "efficiency": step / (step + waits),
                "sent_mb": sent(traffic(engine, sizes), gpus) / 1e6,
                "state_gib": state_bytes(engine, sizes, gpus, bucket) / 2**30,
            }
        )
    return rows


class Counter(TorchDispatchMode):
    """Counts the collectives of torch.distributed within it, and the bytes of the whole tensors they work on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.moved: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::")
            kind = COLLECTIVES.get(name, name)
            whole = arguments[1] if kind == "reduce_scatter" else arguments[0]
            self.calls[kind] = self.calls.get(kind, 0) + 1
            self.moved[kind] = self.moved.get(kind, 0) + _bytes(whole)
        return function(*arguments, **(kwargs or {}))


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


class Work:
    """Steps of one model under one engine, or under none, on random images."""

    def __init__(self, config: Config, process: Process, engine: bool):
        self.config, self.process, self.steps = config, process, 0
        size, self.batch = config.data.image_size, config.micro_batch_size(process.world_size)
        torch.manual_seed(config.seed)
        backbone = create_backbone(config.model, config.automix.feature, size)
        self.model = AutoMix(backbone, 1000, config.automix).to(process.device)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.sizes = Sizes(
            trained=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            momentum=sum(p.numel() for p in self.model.momentum.parameters()),
            idle=sum(p.numel() for p in self.model.momentum.head_one.parameters()),
            optimizer_states=2 if config.optimizer.name == "adamw" else 1,
        )
        self.images = torch.randint(0, 256, (self.batch, size, size, 3), dtype=torch.uint8, device=process.device)
        self.labels = torch.randint(0, 1000, (self.batch,), device=process.device)
        self.engine = build_engine(self.model, self.optimizer, config, process) if engine else None

    def step(self) -> None:
        draws = draw_step(
            self.config.automix, self.batch, seed=0, step=self.steps, rank=self.process.rank, device=self.process.device
        )
        loss = (self.engine or self.model)(self.images, self.labels, draws, 0.1).total
        if self.engine is not None:
            self.engine.backward(loss)
            self.engine.step()
        else:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.steps += 1

    def counted(self) -> Counter:
        """The collectives of a step that is not the first."""
        self.step()
        self.step()
        with Counter() as counter:
            self.step()
        return counter


def seconds_of(action: Callable[[], Any], process: Process, repeats: int) -> float:
    """The median, over some calls that all ranks make together, of the slowest rank's time."""
    times = []
    for _ in range(repeats + 1):
        process.barrier()
        began = time.perf_counter()
        action()
        if process.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(max(process.gather(time.perf_counter() - began)))
    return statistics.median(times[1:])


def fit(sizes: list[float], seconds: list[float]) -> tuple[float, float]:
    """alpha, in seconds, and beta, in seconds per byte, of t = alpha + beta n: least squares of relative errors."""
    from scipy.optimize import nnls

    times = np.array(seconds)
    (alpha, beta), _ = nnls(np.stack([1 / times, np.array(sizes) / times], axis=1), np.ones(len(times)))
    return float(alpha), float(beta)


def measure(options: argparse.Namespace, process: Process) -> dict[str, Any]:
    """Count, and time unless told not to, every engine on the ranks that are here."""
    result: dict[str, Any] = {"ranks": process.world_size, "device": str(process.device.type), "engines": {}}
    alone = Work(settings(options, {"name": "ddp"}, process), process, engine=False)
    result["sizes"] = asdict(alone.sizes)
    timed = not options.count_only
    if timed:
        result["compute"] = seconds_of(alone.step, process, options.rounds)
        share = 2 * (process.world_size - 1) / process.world_size
        buffers = [torch.ones(size // 4, device=process.device) for size in MESSAGES]
        times = [seconds_of(lambda b=b: dist.all_reduce(b), process, 5 * options.rounds) for b in buffers]
        result["alpha"], result["beta"] = fit([share * size for size in MESSAGES], times)
    del alone
    for name, engine in ENGINES.items():
        work = Work(settings(options, engine, process), process, engine=True)
        counter = work.counted()
        row = {"calls": counter.calls, "moved": counter.moved}
        if timed:
            row["seconds"] = seconds_of(work.step, process, options.rounds)
            calls = sum(counter.calls.values())
            row["expected"] = result["compute"] + calls * result["alpha"]
            row["expected"] += sent(counter.moved, process.world_size) * result["beta"]
        result["engines"][name] = row
        if name.startswith("zero"):
            work.engine.deepspeed.destroy()
        del work
        gc.collect()
    return result


def settings(options: argparse.Namespace, engine: dict[str, Any], process: Process) -> Config:
    return from_dict(
        {
            "batch_size": options.batch_size * process.world_size,
            "model": {"backbone": options.backbone},
            "automix": {"feature": options.feature},
            "data": {"image_size": options.image_size},
            "engine": engine,
        }
    )


def markdown(result: dict[str, Any]) -> str:
    """The tables, with what is counted, measured, given and predicted kept apart."""
    here, given, sizes, machine = result["here"], result["given"], Sizes(**result["sizes"]), result["machine"]
    timed = "compute" in here
    lines = [
        f"{result['network']}: {sizes.trained / 1e6:.2f} M trained parameters, {sizes.momentum / 1e6:.2f} M of the "
        f"momentum encoder. PyTorch {machine['versions']['torch']}, {machine['device']}; {machine['date']}.",
        "",
        f"## Counted{' and measured' if timed else ''}: {here['ranks']} {here['device']} ranks",
        "",
        "Bytes of the whole tensors that one step's collectives work on, in MB; beside them the formula's. "
        + ("" if timed else "Times: not measured."),
        "",
    ]
    head = "| engine | all-reduce | reduce-scatter | all-gather | formula | calls |"
    lines += [head + (" step, ms | model's, ms |" if timed else ""), "|---" * (8 if timed else 6) + "|"]
    for name, row in here["engines"].items():
        cells = [f"{row['moved'].get(kind, 0) / 1e6:.2f}" for kind in ("all_reduce", "reduce_scatter", "all_gather")]
        formula = " + ".join(f"{size / 1e6:.2f}" for size in traffic(name, sizes).values())
        cells += [formula, str(sum(row["calls"].values()))]
        cells += [f"{1000 * row['seconds']:.1f}", f"{1000 * row['expected']:.1f}"] if timed else []
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if timed:
        lines += [
            "",
            f"Without an engine a step takes {1000 * here['compute']:.1f} ms. All-reduces of 1 KiB to 16 MiB fit "
            f"{1e6 * here['alpha']:.0f} us + what each rank sends at "
            f"{'no measurable limit' if not here['beta'] else '%.2f GB/s' % (1e-9 / here['beta'])}. The model's step "
            "hides nothing.",
        ]
    origin = "given" if given["step_given"] else f"measured on this machine's {here['device']}"
    lines += [
        "",
        "## Predicted, not measured",
        "",
        f"A step's computation {1000 * given['step']:.1f} ms ({origin}). Given, not measured: "
        f"{given['link_gbps']:g} Gb/s per host, {given['latency_us']:g} us per hop, {given['gpus_per_host']} GPUs per "
        f"host at {given['gpu_gbs']:g} GB/s. The batch per GPU stays. At least 3 points of doubt.",
    ]
    for title, form in (
        ("Step, ms", lambda row: f"{row['step_ms']:.1f}"),
        ("Efficiency", lambda row: f"{row['efficiency']:.3f}"),
        ("Memory of a rank without activations, GiB", lambda row: f"{row['state_gib']:.2f}"),
        ("Sent by each rank in a step, MB", lambda row: f"{row['sent_mb']:.0f}"),
    ):
        lines += ["", f"| {title} | {' | '.join(map(str, GPUS))} |", "|---" * (1 + len(GPUS)) + "|"]
        for name, rows in result["predicted"].items():
            lines.append(f"| {name} | {' | '.join(map(form, rows))} |")
    return "\n".join(lines) + "\n"


def lines_svg(result: dict[str, Any]) -> str:
    """Predicted efficiency over the number of GPUs, a line per engine."""
    left, top, width, height = 60, 50, 560, 300
    lowest = min(row["efficiency"] for rows in result["predicted"].values() for row in rows)
    floor = max(0.0, math.floor(lowest * 20 - 0.01) / 20)

    def point(index: int, efficiency: float) -> tuple[float, float]:
        return left + index * width / (len(GPUS) - 1), top + (1 - efficiency) / (1 - floor) * height

    parts = [f'<text x="{left}" y="24">Predicted weak-scaling efficiency, {result["network"]} (link given)</text>']
    for index, gpus in enumerate(GPUS):
        x, _ = point(index, 1)
        parts.append(f'<text x="{x:.0f}" y="{top + height + 18}" text-anchor="middle">{gpus}</text>')
    for tick in range(6):
        value = floor + (1 - floor) * tick / 5
        _, y = point(0, value)
        parts.append(f'<text x="{left - 8}" y="{y + 4:.0f}" text-anchor="end">{value:.2f}</text>')
        parts.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#ddd"/>')
    for number, (name, rows) in enumerate(result["predicted"].items()):
        path = " ".join("{:.1f},{:.1f}".format(*point(i, row["efficiency"])) for i, row in enumerate(rows))
        dash = f' stroke-dasharray="{4 + 3 * number} {2 * number}"'
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLORS[number]}" stroke-width="2"{dash}/>')
        y = top + 14 + 18 * number
        parts.append(f'<text x="{left + width + 12}" y="{y}" fill="{COLORS[number]}">{name}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 {top + height + 40}" font-family="sans-serif" '
    return "\n".join([f'{head}font-size="12"><rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def parse(arguments: list[str]) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="automix bench scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet50" if on_gpu else "resnet18", help="a timm model")
    parser.add_argument("--feature", type=int, default=-2, help="automix.feature (default: -2)")
    parser.add_argument("--image-size", type=int, default=224 if on_gpu else 64)
    parser.add_argument("--batch-size", type=int, default=256 if on_gpu else 8, help="images per rank")
    parser.add_argument("--ranks", type=int, default=max(2, torch.cuda.device_count()), help="processes to start here")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each engine (default: 7)")
    parser.add_argument("--count-only", action="store_true", help="count bytes, time nothing; needs --step-ms")
    parser.add_argument("--step-ms", type=float, help="computation of a step on the GPU that is meant")
    parser.add_argument("--link-gbps", type=float, default=400, help="network of a host, Gb/s (default: 400)")
    parser.add_argument("--latency-us", type=float, default=5, help="of a hop between hosts (default: 5)")
    parser.add_argument("--gpus-per-host", type=int, default=8)
    parser.add_argument("--gpu-gbs", type=float, default=400, help="GB/s between the GPUs of a host (default: 400)")
    parser.add_argument("--out", type=results_folder, help="folder for scaling.json, scaling.md and scaling.svg")
    options = parser.parse_args(arguments)
    if options.count_only and options.step_ms is None:
        parser.error("--count-only needs --step-ms: there is no step time to predict from")
    check_counts(parser, options, batch_size=2, ranks=2, gpus_per_host=1, rounds=1)
    for name in ("link_gbps", "latency_us", "gpu_gbs"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: expected a positive number")
    return options


def run(arguments: list[str]) -> int:
    options = parse(arguments)
    if "WORLD_SIZE" not in os.environ:
        return run_on_ranks("scaling", arguments, options.ranks)
    process = distributed.start(EngineConfig())
    here = measure(options, process)
    sizes = Sizes(**here.pop("sizes"))
    distributed.finish()
    if not process.is_main:
        return 0
    link = Link(options.link_gbps * 1e9 / 8, options.latency_us * 1e-6, options.gpu_gbs * 1e9, options.gpus_per_host)
    step = options.step_ms / 1000 if options.step_ms else here["compute"]
    gathers = here["engines"]["zero3"]["calls"]["all_gather"]
    result = {
        "network": f"AutoMix, {options.backbone}",
        "machine": describe_machine(),
        "sizes": asdict(sizes),
        "here": here,
        "given": {"step": step, "step_given": bool(options.step_ms)}
        | {key: getattr(options, key) for key in ("link_gbps", "latency_us", "gpus_per_host", "gpu_gbs")},
        "predicted": {name: predict(name, sizes, step, link, EngineConfig().bucket_size, gathers) for name in ENGINES},
    }
    text = markdown(result)
    print(text)
    if options.out:
        text = f"{__doc__.strip()}\n\n{text}\n![Efficiency](scaling.svg)\n"
        write_results(options.out, "scaling", result, text, lines_svg(result))
    return 0
