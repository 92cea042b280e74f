"""What the benchmark found: its record, the targets, and what a person reads."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

from automix_kernels.benchmark_cases import Work


@dataclass
class Row:
    """One line of the table. Times in milliseconds; `note` says why one is missing.

    direction: "forward", "both" (forward and backward), "backward" (their difference) or "all".
    graph_ms: replayed in a CUDA graph. floor_ms: what FLOPs and bytes must take, part by part; uncached_floor_ms: the
    same on a machine without a cache, which reads some bytes again; both None where the inputs fit into the cache.
    launches: kernels, copies and fills of one call. failed: wrong, refused or not capturable.
    """

    operation: str
    shape: str
    candidate: str
    direction: str
    ms: float | None = None
    ms_20: float | None = None
    ms_80: float | None = None
    graph_ms: float | None = None
    floor_ms: float | None = None
    uncached_floor_ms: float | None = None
    peak_mib: float | None = None
    flops: float | None = None
    bytes: float | None = None
    bytes_read_again: float | None = None
    launches: int | None = None
    note: str = ""
    failed: bool = False


@dataclass
class Machine:
    """Where it ran, the two ceilings measured there, the product's in `dtype`, and all rows."""

    device: str
    versions: dict[str, str]
    copy_bytes_per_s: float | None = None
    matmul_flops_per_s: float | None = None
    cache_bytes: int = 0
    date: str = ""
    dtype: str = ""
    failed_capture: str = ""
    """What could not be captured: CUDA graphs are not trusted in this process any more."""
    rows: list[Row] = field(default_factory=list)

    def floor_ms(self, parts: list[Work], cached: bool = True) -> float | None:
        """The time that FLOPs or bytes must take, whichever is longer, part by part."""
        if self.copy_bytes_per_s is None:
            return None
        seconds = 0.0
        for part in parts:
            moved = part.bytes if cached else part.bytes + part.bytes_read_again
            seconds += max(part.flops / self.matmul_flops_per_s, moved / self.copy_bytes_per_s)
        return 1e3 * seconds

    def find(self, operation: str, shape: str, candidate: str, direction: str) -> Row | None:
        key = (operation, shape, candidate, direction)
        rows = (r for r in self.rows if (r.operation, r.shape, r.candidate, r.direction) == key)
        return next(rows, None)


@dataclass
class Target:
    """What was aimed at, and what came of it; `met` is None where it was not measured, or meant for another device."""

    operation: str
    shape: str
    wanted: str
    value: float | None
    found: str
    met: bool | None


def targets(machine: Machine) -> list[Target]:
    """All by times in a CUDA graph; floors and bandwidths are those aimed at in bfloat16, milliseconds on an H200."""
    result = []
    in_bfloat16 = machine.dtype == "bfloat16"
    on_h200 = in_bfloat16 and "H200" in machine.device

    def aim(
        operation: str, shape: str, wanted: str, value: float | None, found: str,
        *, at_least: float = 0.0, at_most: float = math.inf, comparable: bool = True,
    ) -> None:  # fmt: skip
        if value is None:
            result.append(Target(operation, shape, wanted, None, "not measured", None))
        else:
            met = at_least <= value <= at_most if comparable else None
            result.append(Target(operation, shape, wanted, value, found.format(value), met))

    def share_of_floor(operation: str, shape: str, direction: str) -> float | None:
        row = machine.find(operation, shape, "ours", direction)
        return row.uncached_floor_ms / row.graph_ms if row and row.graph_ms and row.uncached_floor_ms else None

    def times_faster(operation: str, shape: str, direction: str, *opponents: str) -> tuple[float | None, str]:
        """Than the fastest opponent that was measured, and which that is; without a name any other candidate is one."""
        own = machine.find(operation, shape, "ours", direction)
        others = [
            row
            for row in machine.rows
            if (row.operation, row.shape, row.direction) == (operation, shape, direction)
            and row.candidate != "ours"
            and (not opponents or row.candidate in opponents)
            and row.graph_ms
        ]
        if not (own and own.graph_ms and others):
            return None, ""
        best = min(others, key=lambda row: row.graph_ms)
        found = f"{{:.2f}} times: {best.candidate}, fastest of {len(others)} measured"
        return best.graph_ms / own.graph_ms, found

    def all_reached(operation: str, shape: str) -> bool:
        """Whether no candidate is left out for want of time: a fast one may be among them."""
        rows = (row for row in machine.rows if (row.operation, row.shape) == (operation, shape))
        return not any(row.note == "not reached" for row in rows)

    block = "whole block nearest"
    for shape, limit in (("resnet50/256", 0.45), ("cifar_resnet18/100", 0.025), ("cifar_wrn28_8/100", 0.025)):
        row = machine.find(block, shape, "ours", "both")
        wanted = f"at most {limit:g} ms"
        aim(block, shape, wanted, row and row.graph_ms, "{:.4f} ms", at_most=limit, comparable=on_h200)
    row = machine.find(block, "resnet50/256", "ours", "both")
    aim(block, "resnet50/256", "at most 6 launches", row and row.launches, "{}", at_most=6)

    ratio, found = times_faster("mix attention", "resnet50/256", "both")
    wanted, complete = "3 times as fast as every alternative", all_reached("mix attention", "resnet50/256")
    aim("mix attention", "resnet50/256", wanted, ratio, found, at_least=3, comparable=complete)
    share = share_of_floor("mix attention", "resnet50/256", "both")
    wanted = "at most 1.7 floors, counted without a cache"
    floors = share and 1 / share
    aim("mix attention", "resnet50/256", wanted, floors, "{:.2f} floors", at_most=1.7, comparable=in_bfloat16)
    for mode in ("nearest", "bilinear"):
        for direction in ("forward", "backward"):
            share = share_of_floor(f"blend {mode}", "resnet50/256", direction)
            wanted = "at least 0.85 of the copy bandwidth, counted without a cache"
            operation = f"blend {mode}, {direction}"
            aim(operation, "resnet50/256", wanted, share, "{:.3f}", at_least=0.85, comparable=in_bfloat16)

    for operation in ("batch norm", "batch norm and shortcut"):
        for shape in ("resnet50/256", "cifar_resnet18/100"):
            ratio, found = times_faster(operation, shape, "both")
            complete = all_reached(operation, shape)
            aim(operation, shape, "as fast as every alternative", ratio, found, at_least=1, comparable=complete)

    for opponent in ("definition", "foreach-lerp-without-skip"):
        ratio, found = times_faster("momentum update", "25.6M", "forward", opponent)
        aim("momentum update", "25.6M", f"as fast as {opponent}", ratio, found, at_least=1)
    return result


COLUMNS = (
    "operation", "shape/batch", "candidate", "direction", "ms (20 to 80 %)", "in a graph", "ours is", "of the floor",
    "MiB", "launches", "note",
)  # fmt: skip


TABLE_HEAD = f"| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|"


def table_line(row: Row, own: Row | None) -> str:
    """`own`: ours of the same operation, shape and direction, if it was measured."""
    ratio = "" if own is None or row is own else _ratio(row, own)
    times = "" if row.ms is None else f"{row.ms:.4f}"
    if row.ms_20 is not None:
        times += f" ({row.ms_20:.4f} to {row.ms_80:.4f})"
    graph = "" if row.graph_ms is None else f"{row.graph_ms:.4f}"
    floor, best = "", row.graph_ms or row.ms
    if row.floor_ms and best:
        floor = f"{100 * row.floor_ms / best:.0f} %" + ("" if row.graph_ms else ", launched")
    memory = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
    launches = "" if row.launches is None else str(row.launches)
    cells = (
        row.operation, row.shape, row.candidate, row.direction, times, graph, ratio, floor, memory, launches,
        row.note.replace("|", "/"),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _ratio(row: Row, own: Row) -> str:
    """By the graphs' times where both have one, else as launched: never one against the other."""
    if row.graph_ms and own.graph_ms:
        return f"{row.graph_ms / own.graph_ms:.2f}x as fast"
    if row.ms and own.ms:
        return f"{row.ms / own.ms:.2f}x as fast" + (", launched" if row.graph_ms or own.graph_ms else "")
    return ""


def ceilings(machine: Machine) -> str:
    if machine.copy_bytes_per_s is None:
        return ""
    dtype = "tf32" if machine.dtype == "float32" else machine.dtype
    return (
        f"Ceilings measured in this run: copy {machine.copy_bytes_per_s / 1e12:.2f} TB/s, {dtype} product "
        f"{machine.matmul_flops_per_s / 1e12:.0f} TFLOP/s."
    )


def targets_table(machine: Machine) -> str:
    lines = ["| ours | shape/batch | aimed at | is | |", "|---|---|---|---|---|"]
    for target in targets(machine):
        verdict = {True: "met", False: "**missed**", None: ""}[target.met]
        lines.append(f"| {target.operation} | {target.shape} | {target.wanted} | {target.found} | {verdict} |")
    return "\n".join(lines)


def markdown(machine: Machine) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    # In the order in which the cases came up: their compiled candidates were measured later.
    cases = list(dict.fromkeys((row.shape, row.operation) for row in machine.rows))
    rows = sorted(machine.rows, key=lambda row: cases.index((row.shape, row.operation)))
    ours = {(row.shape, row.operation, row.direction): row for row in rows if row.candidate == "ours"}
    lines = [table_line(row, ours.get((row.shape, row.operation, row.direction))) for row in rows]
    paragraphs = [
        "# Kernels",
        f"{machine.device}; {machine.date}; {machine.dtype}; {versions}.",
        ceilings(machine),
        "The whole block: projection, attention and blend of two draws, forward, and backward of the first. `both`: "
        "forward and backward; `backward`: its time without the forward's. `compiled`: torch.compile in its default "
        "mode. `launched`: compared as launched from Python, as a time in a graph is missing. Launches: of one forward "
        "and backward.",
        machine.failed_capture and f"No CUDA graph after {machine.failed_capture}, which could not be captured.",
        "## Targets",
        "By times in a CUDA graph; the milliseconds are those aimed at on an H200, floors and bandwidths in bfloat16. "
        "Counted without a cache: bytes that are read again count again. In the column `of the floor` they do not.",
        targets_table(machine),
        "## All measurements",
        "\n".join([TABLE_HEAD, *lines]),
    ]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def save(machine: Machine, folder: Path) -> None:
    """kernels.json, kernels.md and, with ceilings, roofline.svg; each is whole at any moment."""
    folder.mkdir(parents=True, exist_ok=True)
    record = asdict(machine) | {"targets": [asdict(target) for target in targets(machine)]}
    texts = {"kernels.json": json.dumps(record, indent=1) + "\n", "kernels.md": markdown(machine)}
    if machine.copy_bytes_per_s:
        texts["roofline.svg"] = roofline_svg(machine)
    for name, text in texts.items():
        unfinished = folder / f"{name}.tmp"
        unfinished.write_text(text)
        unfinished.replace(folder / name)


def roofline_svg(machine: Machine) -> str:
    """Rate against intensity of our kernels, under the two measured ceilings; both axes logarithmic, whole decades."""
    width, height, margin = 720, 440, 60
    peak, bandwidth = machine.matmul_flops_per_s, machine.copy_bytes_per_s
    points = [
        (row.flops / row.bytes, row.flops / (row.graph_ms / 1e3), row)
        for row in machine.rows
        if row.candidate == "ours" and row.graph_ms and row.flops
    ]
    intensities = [peak / bandwidth, *(intensity for intensity, _, _ in points)]
    left, right = _decades(intensities)
    bottom, top = _decades([peak, left * bandwidth, *(rate for _, rate, _ in points)])

    def place(intensity: float, rate: float) -> tuple[float, float]:
        x = margin + (width - 2 * margin) * math.log(intensity / left) / math.log(right / left)
        y = height - margin - (height - 2 * margin) * math.log(rate / bottom) / math.log(top / bottom)
        return round(x, 1), round(y, 1)

    roof = [place(left, left * bandwidth), place(peak / bandwidth, peak), place(right, peak)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="10">',
        f'<polyline points="{" ".join(f"{x},{y}" for x, y in roof)}" fill="none" stroke="black"/>',
        f'<text x="{margin}" y="{height - 20}">FLOP per byte, {left:g} to {right:g}, logarithmic</text>',
        f'<text x="{margin}" y="20">FLOP/s, {bottom:g} to {top:g}, logarithmic; {escape(machine.device)}</text>',
    ]
    named = set()
    for intensity, rate, row in points:
        x, y = place(intensity, rate)
        label = f"{row.operation} {row.shape} {row.direction}"
        parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="crimson"><title>{label}</title></circle>')
        if (row.operation, row.direction) not in named:  # at other shapes it would be written over and over
            parts.append(f'<text x="{x + 5}" y="{y}">{label}</text>')
        named.add((row.operation, row.direction))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _decades(values: list[float]) -> tuple[float, float]:
    """The powers of ten around the values."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return 10.0**low, 10.0 ** max(high, low + 1)
