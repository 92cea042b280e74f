"""`automix bench loader`: images per second of CPU time, and in all, from this loader and from its alternatives.

    automix bench loader --images 1024 --rounds 3 --out DIR

Every candidate reads the same generated images of ImageNet's shapes and gives batches of 64 random resized crops of
224 x 224, half of them mirrored, as uint8. Each lives in a process of its own (FFCV's Loader changes a type that all
compiled code of its process shares). A first epoch warms it up; then the candidates take turns, an epoch each, so that
a busy moment of the machine hits all alike, and the median epoch counts.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import platform
import re
import resource
import select
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil

from automix_dist import beton
from automix_dist.bench import check_counts, cpu_name, results_folder, write_results
from automix_dist.bench.loader_candidates import BATCH, CANDIDATES, QUALITY, SIDE, ours
from automix_dist.bench.loader_report import drawing, markdown, targets
from automix_dist.bench.synthetic import synthetic_file
from automix_dist.cores import usable_cores
from automix_dist.prepare import PrepareOptions, prepare
from automix_dist.provenance import installed_version

STORAGES = ("jpg@500", "jpg@400", "raw@256")
SHARDS_PER_WORKER = 2
MEMORY_FACTOR = 4
"""The file of --memory-limit is so many times as large as the limit."""

CONTROL_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
)
"""Where memory is limited in versions 2 and 1 of control groups, by which file, and which one tells the most used."""

ANSWER_SECONDS = 900.0
"""A candidate that is silent for so long is given up."""

SAMPLE_SECONDS = 0.25
MIB = 2**20


def serve(job: dict, answers: io.TextIOBase) -> None:
    """The candidate's process: prepare, then run one epoch for each line that arrives."""
    if job["candidate"] == "memory":
        answers.write(json.dumps(stream_within_limit(job)) + "\n")
        return
    start_epoch = next(each for each in CANDIDATES if each.name == job["candidate"]).epoch_of(job)
    for _ in sys.stdin:
        epoch, images = start_epoch(), 0
        cpu, wall = _cpu_seconds(), time.perf_counter()
        for batch in epoch:
            assert batch.element_size() == 1 and tuple(batch.shape[1:]) in ((SIDE, SIDE, 3), (3, SIDE, SIDE))
            images += len(batch)
        figures = {"images": images, "wall_s": time.perf_counter() - wall, "cpu_s": _cpu_seconds() - cpu}
        answers.write(json.dumps(figures) + "\n")
        answers.flush()


def _cpu_seconds() -> float:
    """CPU time of this process, of its children that live, and of those that have ended."""
    total = time.process_time()
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total += ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            total += times.user + times.system
    return total


def stream_within_limit(job: dict) -> dict:
    """Read a large file twice with a process that may not get `limit_mib` more anonymous memory than it has after its
    first batch; what is more fails. With a control group, the page cache counts too. Returns samples of its memory."""
    start_epoch = ours(job, order="quasi_random")
    next(iter(start_epoch()))
    if job["group"]:
        Path(job["group"], "cgroup.procs").write_text(str(os.getpid()))
    allowed = _status_mib("VmData") * MIB + job["limit_mib"] * MIB
    resource.setrlimit(resource.RLIMIT_DATA, (int(allowed), int(allowed)))
    samples, images, start = [], 0, time.perf_counter()
    for _ in range(2):
        for batch in start_epoch():
            images += len(batch)
            if not samples or time.perf_counter() - start >= SAMPLE_SECONDS * len(samples):
                samples.append({"images": images} | {name: _status_mib(name) for name in ("RssAnon", "RssFile")})
    samples.append({"images": images} | {name: _status_mib(name) for name in ("RssAnon", "RssFile")})
    return {"images": images, "wall_s": time.perf_counter() - start, "samples": samples}


def _status_mib(name: str) -> float:
    return int(re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) / 1024


# The process that asks: data, candidates in turn, figures.


class Contestant:
    """A candidate's process, and what was measured of it."""

    def __init__(self, job: dict):
        self.storage, self.name = job["storage"], job["candidate"]
        self.epochs: list[dict] = []
        self.memory: dict[str, float] = {}
        self.note = ""
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "automix_dist.bench.loader", json.dumps(job)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env={"GOMP_SPINCOUNT": "10000", **os.environ},
        )  # fmt: skip

    def ask(self) -> None:
        """Have the next epoch run."""
        with contextlib.suppress(BrokenPipeError):  # it has ended; the answer says why
            self._process.stdin.write("epoch\n")
            self._process.stdin.flush()

    def answer(self) -> dict | None:
        """The figures asked for, with the memory watched meanwhile; None, with the reason in `note`, from the first
        failure on."""
        if self.note:
            return None
        deadline = time.monotonic() + ANSWER_SECONDS
        while not select.select([self._process.stdout], [], [], SAMPLE_SECONDS)[0]:
            self._sample_memory()
            if time.monotonic() > deadline:
                self.note = f"no answer for {ANSWER_SECONDS:g} s"
                self.close()
                return None
        self._sample_memory()
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        last = ([""] + [text for line in self._errors if (text := line.strip())])[-1]
        self.note = f"failed ({self._process.returncode}): {last[:200]}"
        return None

    def _sample_memory(self) -> None:
        """Keep the largest sums over the process and its workers."""
        sums = {"Rss": 0, "Pss_Anon": 0, "Pss_Shmem": 0}
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self._process.pid)
            for each in (process, *process.children(recursive=True)):
                with contextlib.suppress(OSError):
                    for line in Path(f"/proc/{each.pid}/smaps_rollup").read_text().splitlines():
                        name, _, value = line.partition(":")
                        if name in sums:
                            sums[name] += int(value.split()[0])
        now = {"rss_mib": sums["Rss"] / 1024, "anonymous_mib": (sums["Pss_Anon"] + sums["Pss_Shmem"]) / 1024}
        self.memory = {name: max(mib, self.memory.get(name, 0.0)) for name, mib in now.items()}

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def make_data(folder: Path, storage: str, images: int, workers: int) -> dict:
    """The files that the candidates read; reused if they exist.

    `beton`: ours. For JPEG its restart markers, which slow other decoders down, are left out of what the others read,
    with the same pixels: another .beton file `plain`, a `folder` for each class and tar `shards`.
    """
    kind = storage.partition("@")[0]
    file = folder / f"{storage.replace('@', '')}_{images}.beton"
    plain = file.with_stem(f"{file.stem}_plain") if kind == "jpg" else file
    for path in dict.fromkeys((file, plain)):
        synthetic_file(path, images, storage, quality=QUALITY, restart_markers=path == file)
    data = {"beton": str(file), "plain": str(plain), "bytes": file.stat().st_size}
    if kind == "raw":
        return data
    tree = file.with_suffix("")
    index = beton.read_index(plain)
    stored = np.memmap(plain, np.uint8, "r")
    shards = [tree / f"shard-{i}.tar" for i in range(SHARDS_PER_WORKER * workers)]
    (tree / "classes").mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        tars = [stack.enter_context(tarfile.open(shard, "w")) for shard in shards]
        for i, (record, length) in enumerate(zip(index.records, index.sizes, strict=True)):
            start, label = int(record["image"]["data_ptr"]), int(record["label"])
            jpeg = stored[start : start + int(length)].tobytes()
            path = tree / "classes" / f"{label:04d}" / f"{i:06d}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(jpeg)
            for name, content in ((f"{i:06d}.jpg", jpeg), (f"{i:06d}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tars[i % len(tars)].addfile(member, io.BytesIO(content))
    return data | {"folder": str(tree / "classes"), "shards": [str(shard) for shard in shards]}


def measure_storage(storage: str, data: dict, images: int, repeat: int, workers: int) -> list[dict]:
    """A row for each candidate that could read this storage; `note` says why one has no figures."""
    job = {"storage": storage, "images": images, "workers": workers, **data}
    rows, contestants = [], []
    with contextlib.ExitStack() as stack:
        for candidate in CANDIDATES:
            if storage.partition("@")[0] not in candidate.kinds:
                continue
            row = {"storage": storage, "candidate": candidate.name, "note": "", "epochs": []}
            rows.append(row)
            if candidate.module and not _installed(candidate.module):
                row["note"] = f"not installed (pip install {candidate.package})"
                continue
            contestant = Contestant(job | {"candidate": candidate.name})
            stack.callback(contestant.close)
            contestants.append((contestant, row))
            contestant.ask()
        print(f"{storage}: warming up {len(contestants)} loaders", file=sys.stderr, flush=True)
        for contestant, _ in contestants:
            contestant.answer()
        for turn in range(repeat):
            print(f"{storage}: epoch {turn + 1} of {repeat}", file=sys.stderr, flush=True)
            first = turn % len(contestants)
            for contestant, row in contestants[first:] + contestants[:first]:
                contestant.ask()
                figures = contestant.answer()
                if figures is not None and figures["images"] != images:
                    contestant.note = f"an epoch had {figures['images']} images instead of {images}"
                elif figures is not None:
                    row["epochs"].append(figures)
    for contestant, row in contestants:
        row["note"] = contestant.note
        if not contestant.note:
            row.update(summary(row["epochs"]), **contestant.memory)
    return rows


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing too
        return False


def summary(epochs: list[dict]) -> dict:
    """Median, smallest and largest images per second and per second of CPU time of some epochs."""
    result = {}
    for name, seconds in (("per_second", "wall_s"), ("per_cpu_second", "cpu_s")):
        rates = [epoch["images"] / epoch[seconds] for epoch in epochs]
        result[name] = {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}
    return result


def measure_memory(folder: Path, tree: Path, limit_mib: int, workers: int) -> dict:
    """Stream a raw file MEMORY_FACTOR times as large as the limit through a process that is held to it."""
    sources = sorted(tree.glob("*/*.jpg"))
    links = folder / "memory"
    file = folder / f"memory_{limit_mib}.beton"
    size = MEMORY_FACTOR * limit_mib * MIB
    if not (file.exists() and file.stat().st_size >= size):
        from PIL import Image

        number = 0
        while size > 0:  # the same images again and again: in the file each copy has its own bytes
            source = sources[number % len(sources)]
            path = links / source.parent.name / f"{number:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            os.link(source, path)
            with Image.open(source) as image:
                size -= 3 * image.width * image.height
            number += 1
        print(f"memory: writing {number} raw images", file=sys.stderr, flush=True)
        prepare(str(links), file, PrepareOptions(write_mode="raw"), overwrite=True, progress=False)
    with open(file, "rb") as opened:  # what is in the page cache already would count as somebody else's
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    print("memory: streaming", file=sys.stderr, flush=True)
    with control_group(limit_mib * MIB) as (group, peak):
        job = {
            "storage": "raw", "candidate": "memory", "beton": str(file), "workers": workers, "limit_mib": limit_mib,
            "group": group and str(group),
        }  # fmt: skip
        contestant = Contestant(job)
        try:
            figures = contestant.answer()
        finally:
            contestant.close()
        group_mib = group and int((group / peak).read_text()) / MIB
    return {
        "limit_mib": limit_mib, "file_mib": file.stat().st_size / MIB, "group_mib": group_mib, "note": contestant.note
    } | (figures or {})  # fmt: skip


@contextlib.contextmanager
def control_group(limit: int) -> Iterator[tuple[Path | None, str]]:
    """A new control group whose processes get `limit` bytes, page cache included, and the name of the file that tells
    the most they had; None where this process may not make one."""
    name = f"automix-bench-{os.getpid()}"
    made = ((parent / name, peak) for parent, file, peak in CONTROL_GROUPS if _make_group(parent / name, file, limit))
    group, peak = next(made, (None, ""))
    try:
        yield group, peak
    finally:
        if group:
            group.rmdir()


def _make_group(group: Path, name: str, limit: int) -> bool:
    try:
        group.mkdir()
    except OSError:
        return False
    try:
        with open(group / name, "r+") as file:  # it is there, unless control groups lie elsewhere
            file.write(str(limit))
    except OSError:
        group.rmdir()
        return False
    return True


def read_need(path: Path) -> dict:
    """Images per second that a training step asks for, from a measured benchmark. Raises ValueError or OSError."""
    values = json.loads(path.read_text())
    rate = values.get("images_per_second") if isinstance(values, dict) else None
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 < rate < float("inf"):
        raise ValueError(f'expected {{"images_per_second": a positive number, "device": "..."}}, found {rate!r}')
    return {"images_per_second": float(rate), "device": str(values.get("device", "a device that it does not name"))}


def describe_machine(workers: int) -> dict:
    names = ("torch", "torchvision", "ffcv", "numba", "numpy", "pillow", "webdataset", "nvidia-dali-cuda120")
    versions = {"python": platform.python_version()}
    for name in names:
        if version := installed_version(name):
            versions[name] = version
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "workers": workers,
        "memory_gib": psutil.virtual_memory().total / 2**30,
        "load_average": list(os.getloadavg()),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": versions,
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="automix bench loader", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1024, help=f"a multiple of {BATCH} (default: 1024)")
    parser.add_argument(
        "--sizes", nargs="+", default=list(STORAGES), metavar="KIND@SIZE",
        help=f"jpg or raw, and the longer side in pixels (default: {' '.join(STORAGES)})",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="measured epochs of each loader (default: 3)")
    parser.add_argument("--workers", type=int, default=0, help="of each loader; 0 = the cores it may use (default)")
    parser.add_argument("--data", type=Path, help="folder to keep and reuse the images in (default: a temporary one)")
    parser.add_argument("--out", type=results_folder, help="folder for loader.json, loader.md and loader.svg")
    parser.add_argument(
        "--step-json", type=Path, metavar="FILE",
        help='{"images_per_second": N, "device": NAME} of a measured ResNet-50 AutoMix step, to compare with',
    )  # fmt: skip
    parser.add_argument(
        "--memory-limit", type=int, metavar="MIB",
        help=f"also stream a file {MEMORY_FACTOR} times as large through a process held to so much more memory",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.images < BATCH or options.images % BATCH:
        parser.error(f"--images {options.images}: expected a multiple of {BATCH}, the batch size")
    for storage in options.sizes:
        if not re.fullmatch(r"(jpg|raw)@[1-9]\d{0,3}", storage):
            parser.error(f"--sizes {storage}: expected jpg@SIZE or raw@SIZE, as {' '.join(STORAGES)}")
    check_counts(parser, options, rounds=1, memory_limit=1)
    cores = usable_cores()
    if not 0 <= options.workers <= cores:
        parser.error(f"--workers {options.workers}: expected 0 to {cores}, the cores that this process may use")
    options.need = None
    if options.step_json:
        try:
            options.need = read_need(options.step_json)
        except (OSError, ValueError) as error:
            parser.error(f"--step-json {options.step_json}: {error}")
    return options


def run(arguments: list[str]) -> int:
    """Measures, prints the table, and with --out writes it; returns 1 if one of our own rows has no figures, else 0."""
    options = parse(arguments)
    workers = options.workers or usable_cores()
    result = {
        "machine": describe_machine(workers),
        "options": {"images": options.images, "sizes": options.sizes, "repeat": options.rounds, "batch": BATCH},
        "rows": [],
        "need": options.need,
        "memory": None,
    }
    with contextlib.ExitStack() as stack:
        folder = options.data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="automix-bench-")))
        for storage in dict.fromkeys(options.sizes):
            print(f"{storage}: making {options.images} images", file=sys.stderr, flush=True)
            data = make_data(folder, storage, options.images, workers)
            result["rows"] += measure_storage(storage, data, options.images, options.rounds, workers)
        if options.memory_limit:
            tree = Path(make_data(folder, "jpg@500", options.images, workers)["folder"])
            result["memory"] = measure_memory(folder, tree, options.memory_limit, workers)
    result["targets"] = targets(result["rows"])
    text = markdown(result)
    print(text)
    if options.out:
        write_results(options.out, "loader", result, text, drawing(result))
    failed = any(row["candidate"].startswith("ours") and "per_second" not in row for row in result["rows"])
    return int(failed or bool(result["memory"] and result["memory"]["note"]))


def _child(job: str) -> None:
    """One candidate's process. Answers have a descriptor of their own: libraries print to the usual one."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        serve(json.loads(job), answers)
    except BaseException:  # the last line says what it was
        traceback.print_exc()
        raise SystemExit(1) from None


if __name__ == "__main__":
    _child(sys.argv[1])
