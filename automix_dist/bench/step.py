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
from typing import Any

import torch
from automix_kernels import api as kernels
from automix_kernels.benchmark import count_launches
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from automix_dist.bench import Clock, check_counts, describe_machine, replaced, results_folder, write_results
from automix_dist.bench.memory import peak_saved_bytes
from automix_dist.bench.step_report import compare, drawing, fastest, markdown, targets
from automix_dist.bench.step_ways import NETWORKS, WAYS, Case, Trained, Way, policy
from automix_dist.config import ConfigError
from automix_dist.errors import first_line

CPU_BATCH = 4
NOT_REACHED = "not reached"
PEAK_FLOPS = {
    "H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "B200": 2250e12, "4090": 165e12,
    "3090": 71e12,
}  # fmt: skip
"""Dense bfloat16 FLOP/s that the makers state, by a part of the device's name; the first match counts."""

# Operators whose result a host has to wait for.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive"}


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
    # Last, as a profiler may slow every launch after it.
    for name in ready if case.device.type == "cuda" else ():
        with contextlib.suppress(RuntimeError):  # the times are there already
            if launches := count_launches(partial(ready[name].cycle, next(numbers))):
                rows[name].launches = math.ceil(launches / ready[name].period)
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
        row.note = f"failed: {type(error).__name__}: {first_line(error)[:160]}"


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
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16; on a CPU float32"
    )
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
        _finish(result, rows, options.out)  # before anything that a broken context would make fail
        gc.collect()  # a model and its recorded step hold each other
        if on_gpu:
            torch.cuda.empty_cache()
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
        write_results(out, "step", result, text, drawing(result))
    return text
