"""What a person reads of `automix bench loader`, all of it from what loader.json holds: table, targets, bars."""

from automix_dist.bench.bars import Bar, bars_svg
from automix_dist.bench.loader_candidates import BATCH, QUALITY, SIDE

NEED_FACTOR = 1.2
"""A loader shall deliver so many times what a training step asks for."""


def targets(rows: list[dict]) -> list[dict]:
    """What was aimed at, and what came of it; `ratio` is None where one of the two was not measured."""
    found = {(row["storage"], row["candidate"]): row for row in rows if "per_second" in row}
    jpegs = sorted({row["storage"] for row in rows if row["storage"] in ("jpg@400", "jpg@500")}, reverse=True)
    result = []

    def aim(storage: str, opponent: str, other_storage: str, least: float, by: str) -> None:
        own, other = found.get((storage, "ours")), found.get((other_storage, opponent))
        ratio = own[by]["median"] / other[by]["median"] if own and other else None
        result.append(
            {"storage": storage, "opponent": opponent, "opponent_storage": other_storage, "by": by, "least": least,
             "ratio": ratio, "met": None if ratio is None else ratio >= least}
        )  # fmt: skip

    for storage in dict.fromkeys(row["storage"] for row in rows):
        for by in ("per_cpu_second", "per_second"):
            aim(storage, "FFCV's Loader", storage, 0.97, by)
    for storage in jpegs:
        aim(storage, "DataLoader + PIL", storage, 3.0, "per_cpu_second")
        aim(storage, "DataLoader + decode_jpeg", storage, 1.5, "per_cpu_second")
    if any(row["storage"] == "raw@256" for row in rows):
        for storage in jpegs:
            aim("raw@256", "DataLoader + PIL", storage, 10.0, "per_cpu_second")
    return result


def markdown(result: dict) -> str:
    machine, options = result["machine"], result["options"]
    lines = [
        "# Loaders on the CPU", "",
        f"{machine['cores']}-core CPU machine, {machine['cpu']}, {machine['memory_gib']:.0f} GiB; {machine['date']}; "
        f"load average at the start {machine['load_average'][0]:.2f}; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items()) + ".", "",
        f"{options['images']} generated images of ImageNet's shapes, in the page cache; random resized crop "
        f"{SIDE} and flip, uint8, batches of {BATCH}; {machine['workers']} worker(s) each. Median of "
        f"{options['repeat']} epochs after a first one that does not count (smallest to largest). `jpg@500`: longer "
        f"side 500, JPEG quality {QUALITY}; every candidate reads the same coefficients, and ours the restart markers "
        "that `automix prepare` adds, except for `plain JPEG`. CPU time is that of the process and its workers. DALI "
        "prepares batches across epochs; it is measured over as many images of its endless "
        "stream. Resize: ours and FFCV average areas; `ours, bicubic`, PIL, torchvision and DALI interpolate "
        "with antialiasing (all but the first of these bilinearly). RSS is summed over a process and its workers, "
        "pages that they share, and those of a mapped file, count in each; anonymous memory counts once and cannot be "
        "dropped by the kernel.", "",
        "| storage | loader | images/s per CPU-second | images/s in all | peak RSS, MiB | of it anonymous | ours is |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    own = {row["storage"]: row for row in result["rows"] if row["candidate"] == "ours" and "per_second" in row}
    for row in result["rows"]:
        head = f"| {row['storage']} | {row['candidate']} |"
        if "per_second" not in row:
            lines.append(f"{head} {row['note'].replace('|', '/')} | | | | |")
            continue
        rates = " | ".join(
            f"{rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f})"
            for rate in (row["per_cpu_second"], row["per_second"])
        )
        base = own.get(row["storage"])
        ratio = f"{base['per_cpu_second']['median'] / row['per_cpu_second']['median']:.2f}x" if base else ""
        ratio = "" if row is base else ratio
        lines.append(f"{head} {rates} | {row['rss_mib']:,.0f} | {row['anonymous_mib']:,.0f} | {ratio} |")
    lines += ["", "## Targets", "", "| ours | against | by | at least | is | |", "|---|---|---|---|---|---|"]
    for target in result["targets"]:
        by = {"per_cpu_second": "CPU-second", "per_second": "wall"}[target["by"]]
        verdict = {True: "met", False: "**missed**", None: ""}[target["met"]]
        ratio = "not measured" if target["ratio"] is None else f"{target['ratio']:.2f}x"
        lines.append(
            f"| {target['storage']} | {target['opponent']}, {target['opponent_storage']} | {by} | "
            f"{target['least']:g}x | {ratio} | {verdict} |"
        )
    lines += ["", "## Need and supply", "", need_text(result)]
    if result["memory"]:
        lines += ["", "## Memory", "", memory_text(result["memory"])]
    return "\n".join(lines) + "\n"


def need_text(result: dict) -> str:
    """How many images a ResNet-50 AutoMix step asks for, and which storage delivers that here."""
    need = result["need"]
    if need is None:
        return "Images/s that a ResNet-50 AutoMix step asks for: not measured."
    rate = need["images_per_second"]
    lines = [f"A ResNet-50 AutoMix step on {need['device']} asks for {rate:,.0f} images/s."]
    for row in result["rows"]:
        if row["candidate"] == "ours" and "per_second" in row:
            supply, each = row["per_second"]["median"], row["per_cpu_second"]["median"]
            verdict = "enough" if supply >= NEED_FACTOR * rate else "not enough"
            lines.append(
                f"{row['storage']}: this machine delivers {supply / rate:.2f} times that, {verdict} "
                f"({NEED_FACTOR:g} is wanted); it takes {NEED_FACTOR * rate / each:.1f} of its cores to deliver "
                f"{NEED_FACTOR:g} times."
            )
    return "\n".join(f"- {line}" for line in lines)


def memory_text(memory: dict) -> str:
    """What --memory-limit measured, and what it did not."""
    if memory["note"]:
        return f"Streaming {memory['file_mib']:,.0f} MiB within {memory['limit_mib']} MiB: {memory['note']}."
    anonymous = [sample["RssAnon"] for sample in memory["samples"]]
    mapped = [sample["RssFile"] for sample in memory["samples"]]
    group = (
        "The page cache itself was not limited, which needs a control group: what dropping pages costs in speed is not "
        "measured here."
    )
    if memory["group_mib"] is not None:
        group = (
            f"A control group held all memory that it got from then on, page cache included, to {memory['limit_mib']} "
            f"MiB; it used {memory['group_mib']:,.0f} MiB of them at most."
        )
    return (
        f"A raw file of {memory['file_mib']:,.0f} MiB was read twice in quasi-random order ({memory['images']:,} "
        f"images, {memory['images'] / memory['wall_s']:,.0f} images/s) by a process that the kernel (RLIMIT_DATA) held "
        f"to {memory['limit_mib']} MiB of private writable memory beyond what it had after its first batch; more would "
        f"have ended it. {group} Its anonymous memory was {anonymous[0]:,.0f} MiB at the start, "
        f"{max(anonymous):,.0f} MiB at most and {anonymous[-1]:,.0f} MiB at the end. Its pages of files, which are the "
        f"page cache's and which the kernel drops when it needs memory, rose from {mapped[0]:,.0f} to at most "
        f"{max(mapped):,.0f} MiB."
    )


def drawing(result: dict) -> str:
    """Images per second of CPU time, a panel per storage."""
    panels: dict[str, list[Bar]] = {}
    for row in result["rows"]:
        if "per_second" in row:
            name, rate = row["candidate"], row["per_cpu_second"]
            span = (rate["min"], rate["max"])
            bar = Bar(name, name.startswith("ours"), rate["median"], f"{rate['median']:,.0f}", span)
            panels.setdefault(row["storage"], []).append(bar)
    machine = result["machine"]
    title = f"Images per CPU-second, median and range; {machine['cores']}-core CPU machine, {machine['cpu']}"
    return bars_svg(title, panels, left=190)
