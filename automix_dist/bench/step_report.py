"""What a person reads of `automix bench step`, all of it from the dictionary that step.json holds: the table, the
targets met or missed, the bars, and what moved since an earlier result."""

import math

from automix_dist.bench.bars import Bar, bars_svg

MIN_MOVE = 0.03
"""With --compare, changes smaller than this are not reported, however narrow the spreads are."""

TIME_RATIO = "AutoMix over vanilla, time"


def measured(rows: list[dict], network: str, way: str) -> list[dict]:
    """The measured rows of a network among the ways whose names begin so."""
    return [row for row in rows if row["network"] == network and row["way"].startswith(way) and row["ms"]]


def fastest(rows: list[dict], network: str, way: str) -> dict | None:
    return min(measured(rows, network, way), key=lambda row: row["ms"], default=None)


def kind(row: dict) -> tuple[bool, bool]:
    """How a way is run: compiled or not, recorded or not."""
    return "compiled" in row["way"] or "max-autotune" in row["way"], "CUDA graph" in row["way"]


def of_common_kinds(rows: list[dict], network: str) -> list[dict]:
    """The measured rows of vanilla and AutoMix, of kinds that both have: what one has not reached yet must not be what
    the other is compared with."""
    ways = [measured(rows, network, way) for way in ("vanilla", "AutoMix")]
    common = {kind(row) for row in ways[0]} & {kind(row) for row in ways[1]}
    return [row for each in ways for row in each if kind(row) in common]


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
    alike = of_common_kinds(rows, r50)
    best, automix = fastest(alike, r50, "vanilla"), fastest(alike, r50, "AutoMix")
    ratio = best and automix and automix["ms"] / best["ms"]
    aim("H200", r50, TIME_RATIO, ratio, least=2.9, most=3.15, stretch=3.05)
    aim("H200", r50, f"AutoMix over {reference}, images/s", times(r50, "AutoMix", reference), least=3)
    aim("H200", cifar, f"AutoMix over {reference}, images/s", times(cifar, "AutoMix", reference), least=4)
    for network in dict.fromkeys(row["network"] for row in rows):
        own = fastest(rows, network, "AutoMix")
        time_ratio, flop_ratio = vanilla_ratios(rows, own) if own else (None, None)
        value = time_ratio / flop_ratio if flop_ratio else None
        aim("CPU", network, f"{TIME_RATIO}, over that of FLOPs", value, least=0.95, most=1.05)
    return found


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
        "", "## Targets", "",
        "Of the fastest way of each; the ratio of AutoMix and vanilla is of ways run alike (eager, compiled, "
        "recorded), the fastest that both have. Where the machine is another or a way has no figures, not measured. "
        "A ratio below its range points to a slow vanilla step.", "",
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
    # All vanilla steps have the same operations; of a fast one they are counted only if its twin was asked for.
    counted = (each["gflop_per_image"] for each in measured(rows, row["network"], "vanilla"))
    flops = next(filter(None, counted), None) if row["gflop_per_image"] else None
    return row["ms"] / vanilla["ms"], row["gflop_per_image"] / flops if flops else None


def drawing(result: dict) -> str:
    """Time as a multiple of the fastest vanilla step, a panel per network; a tick where the FLOPs alone would be."""
    panels: dict[str, list[Bar]] = {}
    for network in dict.fromkeys(row["network"] for row in result["rows"]):
        rows = measured(result["rows"], network, "")
        for row in rows:
            ratio, flops = vanilla_ratios(rows, row)
            if ratio:
                bar = Bar(row["way"], row["way"].startswith("AutoMix"), ratio, f"{ratio:.2f}", tick=flops)
                panels.setdefault(network, []).append(bar)
    title = f"Step time as a multiple of the fastest vanilla step (tick: FLOPs); {result['machine']['device']}"
    return bars_svg(title, panels, left=230)


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
