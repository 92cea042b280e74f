"""Correctness, then time: the kernels against every alternative, and against the time that bytes and FLOPs must take.

    python -m automix_kernels.benchmark --minutes 8 --out DIR

On a GPU each candidate is first compared with float64; only then is it timed, on random inputs in rotating buffers that
together exceed the cache, as a median with its 20 and 80 % quantiles: once as it is launched from Python, once replayed
in a CUDA graph, where launches cost next to nothing. Floors come from a copy and a matrix product measured in the same
run. The shapes that decide come first, and of these our own times; each line is printed and saved at once.
Without a GPU the checks run at a small batch, and the plain definitions are compared with the published way on the CPU.
"""

import argparse
import contextlib
import math
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from automix_kernels import api, benchmark_cases
from automix_kernels import benchmark_report as report
from automix_kernels.benchmark_cases import SHAPES, STAGES, Candidate, Case, Inputs, Shape, Work
from automix_kernels.benchmark_report import Machine, Row
from torch import Tensor

TOLERANCES = {2: 2e-2, 4: 1e-3}  # of the error's norm, relative, by bytes of the type: rounding or wrong
AUTOCAST_TOLERANCE = 0.2  # the published code's scores, constants included, are rounded to 16 bits: up to 0.08
CPU_BATCH = 4
MAX_SETS = 512
FIRST = ("resnet50/256", "cifar_resnet18/100")
OPERATIONS = ("block", "attention", "blend", "normalize", "momentum", "batch-norm")

# Tiles worth a try: (rows, columns, width, warps, stages).
FORWARD_TILES = [
    (128, 256, 64, 8, 2), (128, 256, 64, 8, 4), (128, 256, 32, 8, 4), (128, 256, 128, 8, 2), (128, 128, 64, 8, 3),
    (128, 64, 64, 4, 3), (64, 256, 64, 4, 3), (64, 256, 64, 8, 3), (64, 128, 64, 4, 4),
]  # fmt: skip
BACKWARD_TILES = [
    (128, 256, 32, 8, 2), (128, 256, 32, 8, 4), (128, 256, 64, 8, 2), (128, 128, 64, 8, 3), (128, 128, 32, 8, 3),
    (128, 256, 64, 8, 3), (64, 256, 32, 8, 3), (64, 256, 64, 8, 2), (64, 128, 64, 4, 3),
]  # fmt: skip


# Checking.


def outputs_and_grads(case: Case, function: Candidate, inputs: Inputs) -> list[Tensor]:
    """Outputs, then the leaves' gradients of their sum weighted with fixed random numbers."""
    outputs = function(inputs)
    if not case.leaves:
        return outputs
    leaves = [inputs[name] for name in case.leaves]
    with_graph = [output for output in outputs if output.requires_grad]
    gradients = torch.autograd.grad(with_graph, leaves, _weights(with_graph))
    joined: list[Tensor] = []
    for gradient in gradients:  # a single number may come out near zero by chance: it is judged with the one before
        if gradient.numel() == 1:
            joined[-1] = torch.cat([joined[-1].flatten(), gradient])
        else:
            joined.append(gradient)
    return [output.detach() for output in outputs] + joined


def _weights(outputs: list[Tensor]) -> list[Tensor]:
    """Random gradients in the outputs' types and layouts, the same in every type: numbers that bfloat16 holds."""
    g = torch.Generator(outputs[0].device).manual_seed(1)
    return [torch.empty_like(o).copy_(torch.randn(o.shape, device=o.device, generator=g).bfloat16()) for o in outputs]


def exact_result(case: Case, inputs: Inputs) -> list[Tensor]:
    exact_inputs = {
        name: (tensor.detach().double() if tensor.is_floating_point() else tensor).requires_grad_(tensor.requires_grad)
        for name, tensor in inputs.items()
    }
    return outputs_and_grads(case, case.oracle, exact_inputs)


def check(case: Case, function: Candidate, inputs: Inputs, exact: list[Tensor], tolerance: float | None = None) -> None:
    """Raises ValueError where an output or a gradient is not the exact one but for rounding."""
    tolerance = TOLERANCES[case.dtype.itemsize] if tolerance is None else tolerance
    for index, (actual, wanted) in enumerate(zip(outputs_and_grads(case, function, inputs), exact, strict=True)):
        error = ((actual.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()
        if not error < tolerance:
            raise ValueError(f"wrong: relative error {error:.1e} in result {index} of {len(exact)}")


# Timing.


def buffer_sets(case: Case, cache_bytes: int) -> tuple[list[Inputs], bool]:
    """Sets of inputs, enough of them that a call never finds its own in the cache; and whether they are enough."""
    first = case.draw(0)
    size = sum(tensor.numel() * tensor.element_size() for tensor in first.values())
    count = max(2, min(MAX_SETS, math.ceil(3 * cache_bytes / size))) if cache_bytes else 1
    return [first, *(case.draw(seed) for seed in range(1, count))], count * size >= 2 * cache_bytes


def prepare(case: Case, function: Candidate, sets: list[Inputs], backward: bool) -> list[Callable[[], object]]:
    """A call to time for each set; without `backward` the forward as in training, with what the backward needs."""
    if not backward:
        return [partial(function, inputs) for inputs in sets]
    outputs = [output.detach() for output in function(sets[0]) if output.requires_grad]

    def differentiate(inputs: Inputs, weights: list[Tensor]) -> tuple[Tensor, ...]:
        with_graph = [output for output in function(inputs) if output.requires_grad]
        return torch.autograd.grad(with_graph, [inputs[name] for name in case.leaves], weights)

    return [partial(differentiate, inputs, _weights(outputs)) for inputs in sets]


def time_launched(calls: list[Callable[[], object]], budget_s: float) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile in milliseconds of calls launched one after another."""
    on_gpu = torch.cuda.is_available()
    for call in calls[:3]:
        call()
    _synchronize()
    begin = time.perf_counter()
    calls[0]()
    _synchronize()
    count = min(max(round(budget_s / (time.perf_counter() - begin)), 10), 500)
    marks = []
    for index in range(count):
        call = calls[index % len(calls)]
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


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_in_graph(calls: list[Callable[[], object]], budget_s: float) -> float:
    """Median milliseconds a call, all calls captured into one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    median, _, _ = time_launched([graph.replay], budget_s)
    return median / len(calls)


def add_graph_time(row: Row, calls: list[Callable[[], object]], machine: Machine, budget_s: float) -> None:
    """Fills in graph_ms, or says in the note why not. A failed capture may leave torch's streams and allocator in any
    state: unless a small one works after it, no other is tried in this process."""
    if machine.failed_capture:
        row.note = f"graph not tried after {machine.failed_capture}"
        return
    stream = torch.cuda.current_stream()
    try:
        row.graph_ms = time_in_graph(calls, budget_s)
    except Exception as error:
        # Before PyTorch 2.15 a failed capture leaves its stream current, and the generator at recording.
        torch.cuda.set_stream(stream)
        generator = torch.cuda.default_generators[stream.device_index]
        generator.graphsafe_set_state(generator.clone_state())
        if not captures_again():
            machine.failed_capture = f"{row.operation} {row.shape} {row.candidate}, {row.direction}"
        row.note = f"graph: {brief(error)}"
        row.failed = True


def captures_again() -> bool:
    """Whether a graph of one small kernel can be captured, and computes."""
    try:
        number, graph = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            number += 1
        graph.replay()
        return number.item() == 1
    except Exception:
        return False


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def peak_mib(call: Callable[[], object]) -> float:
    """Of memory allocated by a call, above what was there before."""
    call()  # a compiler's trials are none of it
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def count_launches(call: Callable[[], object]) -> int | None:
    """Kernels, copies and fills that a call puts on the GPU; None where the profiler sees none."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    on_gpu = (event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not event.is_user_annotation for event in on_gpu) or None


def measure_case(case: Case, names: list[str], machine: Machine, budget_s: float, deadline: float) -> Iterator[Row]:
    """Rows of these candidates as they are measured; their launches are counted at the end."""
    blank = Row(case.operation, case.shape.label, ", ".join(names), "all")
    if time.monotonic() > deadline:
        yield replace(blank, note="not reached")
        return
    torch.compiler.reset()  # each shape is compiled for itself, within the limit on recompilations
    try:
        sets, exceed_cache = buffer_sets(case, machine.cache_bytes)
        exact = exact_result(case, sets[0])
    except Exception as error:
        yield replace(blank, note=brief(error), failed=True)
        return
    measured = []
    for name in names:
        if time.monotonic() > deadline:
            yield replace(blank, candidate=name, note="not reached")
            continue
        for row in measure(case, name, sets, exact, machine, budget_s):
            if not exceed_cache:
                row.floor_ms = row.uncached_floor_ms = None
                row.note = row.note or "from the cache"
            if row.direction == "both" and row.ms is not None:
                measured.append(row)
            yield row
    if measured and torch.cuda.is_available():
        for row in measured:
            try:
                row.launches = count_launches(prepare(case, case.candidates[row.candidate], sets[:1], True)[0])
            except Exception as error:
                row.note = row.note or f"launches: {brief(error)}"
        counts = ", ".join(f"{row.candidate} {row.launches}" for row in measured)
        print(f"launches of {case.operation} {case.shape.label}, forward and backward: {counts}", flush=True)


def measure(
    case: Case, name: str, sets: list[Inputs], exact: list[Tensor], machine: Machine, budget_s: float
) -> Iterator[Row]:
    """A candidate's rows: forward, both ways and their difference; a refusal or a wrong result instead of numbers."""
    function = case.candidates[name]
    rows = {
        direction: Row(
            case.operation, case.shape.label, name, direction,
            floor_ms=machine.floor_ms(parts), uncached_floor_ms=machine.floor_ms(parts, cached=False),
            flops=sum(part.flops for part in parts), bytes=sum(part.bytes for part in parts),
            bytes_read_again=sum(part.bytes_read_again for part in parts),
        )
        for direction, parts in (
            ("forward", case.forward), ("both", case.forward + case.backward), ("backward", case.backward)
        )
    }  # fmt: skip
    forward, both, backward = rows.values()
    direction = "all"
    try:
        under_autocast = name.startswith("published") and case.dtype.itemsize == 2
        check(case, function, sets[0], exact, AUTOCAST_TOLERANCE if under_autocast else None)
        for row in (forward, both) if case.leaves else (forward,):
            direction = row.direction
            calls = prepare(case, function, sets, backward=row is both)
            if torch.cuda.is_available():
                row.peak_mib = peak_mib(calls[0])
            row.ms, row.ms_20, row.ms_80 = time_launched(calls, budget_s)
            if torch.cuda.is_available():
                add_graph_time(row, calls, machine, budget_s)
            yield row
    except Exception as error:  # any library may refuse a shape in its own way; the table says which and why
        yield Row(case.operation, case.shape.label, name, direction, note=brief(error), failed=True)
        return
    if not case.leaves:
        return
    for field in ("ms", "graph_ms"):
        if getattr(both, field) and getattr(forward, field):
            difference = getattr(both, field) - getattr(forward, field)
            setattr(backward, field, difference if difference > 0 else None)
    backward.note = "" if backward.ms else "lost in the noise"
    yield backward


def measure_ceilings(machine: Machine, dtype: torch.dtype) -> None:
    """Of a copy, and of a product in `dtype`; for float32 in tf32, of which the kernels' products are made."""
    with contextlib.suppress(Exception):  # what a profiler's first use leaves behind is to slow all candidates alike
        count_launches(lambda: torch.zeros(1, device="cuda"))
    source = torch.randn(2**28, device="cuda")  # 1 GiB
    target = torch.empty_like(source)
    copy_ms, _, _ = time_launched([lambda: target.copy_(source)], budget_s=0.5)
    machine.copy_bytes_per_s = 2 * source.numel() * source.element_size() / (copy_ms / 1e3)
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    product_ms, _, _ = time_launched([lambda: left @ right], budget_s=0.5)
    torch.set_float32_matmul_precision(precision)
    machine.matmul_flops_per_s = 2 * 8192**3 / (product_ms / 1e3)


def measure_momentum(
    wanted: Callable[[str], bool], device: str, machine: Machine, budget_s: float, deadline: float
) -> Iterator[Row]:
    sizes = benchmark_cases.resnet50_sizes() if device == "cuda" else benchmark_cases.resnet50_sizes()[:40]
    work = Work("momentum update", 3 * sum(sizes), 12 * sum(sizes))
    targets, sources = ([torch.randn(size, device=device) for size in sizes] for _ in range(2))
    for name, call in benchmark_cases.momentum_candidates(targets, sources, 0.999).items():
        if not wanted(name):
            continue
        row = Row(
            "momentum update", f"{sum(sizes) / 1e6:.1f}M", name, "forward",
            flops=work.flops, bytes=work.bytes, bytes_read_again=0,
        )  # fmt: skip
        if time.monotonic() > deadline:
            row.note = "not reached"
            yield row
            continue
        try:
            before = [target.clone() for target in targets]
            call()
            for target, old, source in zip(targets, before, sources, strict=True):
                torch.testing.assert_close(target, 0.999 * old + 0.001 * source)
            row.floor_ms = row.uncached_floor_ms = machine.floor_ms([work])
            row.ms, row.ms_20, row.ms_80 = time_launched([call], budget_s)
            if device == "cuda":
                add_graph_time(row, [call], machine, budget_s)
        except Exception as error:
            row.note, row.failed = brief(error), True
        yield row


# Tiles: what to put into mix_attention.forward_tile and backward_tile.


def tune(shape: Shape, dtype: torch.dtype, machine: Machine, budget_s: float, deadline: float) -> None:
    """Prints times of candidate tiles of both attention passes, small kernels included, the default first."""
    from automix_kernels import mix_attention as kernels

    sets, _ = buffer_sets(benchmark_cases.attention_case(shape, "cuda", dtype), machine.cache_bytes)
    arguments = [[inputs[name].detach() for name in benchmark_cases.ATTENTION] for inputs in sets]
    saved = [kernels.launch_forward(*each) for each in arguments]
    architecture = kernels._architecture(arguments[0][0].device)

    def forward(tile: kernels.Tile) -> list[Callable[[], object]]:
        return [partial(kernels.launch_forward, *each, tile=tile) for each in arguments]

    def backward(tile: kernels.Tile) -> list[Callable[[], object]]:
        return [
            partial(kernels.launch_backward, logits, *each[:6], attended, lse, products, tile=tile)
            for each, (logits, *_, attended, lse, products) in zip(arguments, saved, strict=True)
        ]

    trials = []
    with ThreadPoolExecutor() as pool:  # the compiler and its assembler hold no lock of the interpreter's
        for name, calls_of, default, others in (
            ("forward", forward, kernels.forward_tile, FORWARD_TILES),
            ("backward", backward, kernels.backward_tile, BACKWARD_TILES),
        ):
            chosen = default(architecture, dtype.itemsize, shape.positions, shape.width)
            fitted = [kernels._fit(kernels.Tile(*tile), shape.positions, shape.width) for tile in others]
            for tile in dict.fromkeys([chosen, *fitted]):
                label = f"{tuple(tile)}{' (default)' if tile == chosen else ''}"
                row = Row("mix attention", shape.label, label, name)
                trials.append((row, calls_of(tile), pool.submit(calls_of(tile)[0])))
        print(f"{shape.label}: compiling {len(trials)} tiles", flush=True)
    for row, calls, compiled in trials:
        if time.monotonic() > deadline:
            row.note = "not reached"
        elif compiled.exception():  # more shared memory than there is, mostly: such a tile is no candidate
            row.note = brief(compiled.exception())
        else:
            add_graph_time(row, calls, machine, budget_s)
        time_or_note = row.note or f"{row.graph_ms:.4f} ms"
        print(f"{row.shape} {row.direction} {row.candidate}: {time_or_note}", flush=True)


# The command.


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m automix_kernels.benchmark" if argv is None else "automix bench kernels",
        description=__doc__.splitlines()[0],
    )
    candidates = [name for stage in STAGES for name in stage]
    names = sorted({shape.name for shape in SHAPES} | {shape.label for shape in SHAPES} | set(benchmark_cases.ALIASES))
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help=f"of: {', '.join(names)} (default: all)")
    parser.add_argument(
        "--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS,
        help="(default: all; batch-norm for ResNets only)",
    )  # fmt: skip
    parser.add_argument("--modes", nargs="+", choices=["nearest", "bilinear"], default=["nearest", "bilinear"])
    parser.add_argument(
        "--candidates", nargs="+", choices=candidates, metavar="NAME",
        help=f"of: {', '.join(candidates)} (default: all without max-autotune)",
    )  # fmt: skip
    parser.add_argument("--max-autotune", action="store_true", help="compile in this mode too, which takes minutes")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--seconds", type=float, default=0.3, help="spent on one time of a candidate (default: 0.3)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which nothing new is begun")
    parser.add_argument("--tune", action="store_true", help="time the attention kernels' tiles instead (needs a GPU)")
    parser.add_argument("--out", type=Path, help="folder for kernels.json, kernels.md and roofline.svg")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.shapes or ()) - set(names))
    if unknown:
        parser.error(f"unknown shapes {', '.join(unknown)}; choose from {', '.join(names)}")
    options.shapes = [benchmark_cases.ALIASES.get(name, name) for name in options.shapes or names]
    return options


def describe_machine(dtype: str) -> Machine:
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if api.HAS_TRITON:
        import triton

        versions["triton"] = triton.__version__
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    if not torch.cuda.is_available():
        cpuinfo = Path("/proc/cpuinfo")
        model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.is_file() else None
        name = f"CPU, {torch.get_num_threads()} thread(s), {model[1] if model else platform.machine()}"
        return Machine(name, versions, date=date, dtype=dtype)
    properties = torch.cuda.get_device_properties(0)
    return Machine(properties.name, versions, cache_bytes=properties.L2_cache_size, date=date, dtype=dtype)


def plan(
    shapes: list[Shape], device: str, dtype: torch.dtype, options: argparse.Namespace
) -> Iterator[Callable[[Machine, float, float], Iterator[Row]]]:
    """What is measured, in order: FIRST before other shapes, and of each one stage of candidates after the other."""

    def wanted(name: str) -> bool:
        if name.endswith("max-autotune") and options.max_autotune:
            return True
        return name in options.candidates if options.candidates else not name.endswith("max-autotune")

    def cases(shape: Shape) -> Iterator[Case]:
        for mode in options.modes:
            if "block" in options.operations:
                yield benchmark_cases.block_case(shape, device, dtype, mode)
            if "attention" in options.operations and mode == options.modes[0]:
                yield benchmark_cases.attention_case(shape, device, dtype)
            if "blend" in options.operations:
                yield benchmark_cases.blend_case(shape, device, dtype, mode)
        if "normalize" in options.operations:
            yield benchmark_cases.normalize_case(shape, device, dtype)
        if "batch-norm" in options.operations and shape.has_batch_norm:
            for shortcut in (False, True):
                yield benchmark_cases.norm_case(shape, device, dtype, shortcut)

    groups = [[s for s in shapes if s.label in FIRST], [s for s in shapes if s.label not in FIRST]]
    for number, group in enumerate(filter(None, groups)):
        for stage, names in enumerate(STAGES):
            for shape in group:
                for case in cases(shape):
                    chosen = [name for name in names if name in case.candidates and wanted(name)]
                    if chosen:
                        yield partial(measure_case, case, chosen)
            if number == stage == 0 and "momentum" in options.operations:
                yield partial(measure_momentum, wanted, device)


def run(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if one of our own results is wrong or could not be had, else 0."""
    options = parse(argv)
    on_gpu = torch.cuda.is_available()
    dtype = getattr(torch, options.dtype) if on_gpu else torch.float32
    shapes = [s for s in SHAPES if s.name in options.shapes or s.label in options.shapes]
    if not on_gpu:
        torch.set_num_threads(1)  # threads that wait for a busy core would be most of what is measured
    machine = describe_machine(str(dtype).removeprefix("torch."))
    deadline = time.monotonic() + 60 * options.minutes
    if options.tune:
        if not on_gpu:
            print("--tune needs a GPU", file=sys.stderr)
            return 2
        for shape in shapes:
            tune(shape, dtype, machine, options.seconds, deadline)
        return 0
    if on_gpu:
        measure_ceilings(machine, dtype)
        print(report.ceilings(machine), "\n", flush=True)
    else:
        print(
            f"No GPU here: no kernel is timed. The definitions ('ours' on a CPU) are checked and compared with the "
            f"published way on the CPU, batch {CPU_BATCH}, float32.\n",
            flush=True,
        )
        shapes = list({s.name: replace(s, batch=CPU_BATCH) for s in shapes}.values())
    print(report.TABLE_HEAD, flush=True)
    for measurement in plan(shapes, "cuda" if on_gpu else "cpu", dtype, options):
        for row in measurement(machine, options.seconds, deadline):
            machine.rows.append(row)
            own = machine.find(row.operation, row.shape, "ours", row.direction)
            print(report.table_line(row, own), flush=True)
            if options.out:
                report.save(machine, options.out)
    print(f"\n{report.targets_table(machine)}")
    if options.out:
        report.save(machine, options.out)
    return int(any(row.failed and "ours" in row.candidate for row in machine.rows))


if __name__ == "__main__":
    sys.exit(run())
