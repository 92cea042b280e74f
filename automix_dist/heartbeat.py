"""Names the rank that died, hangs or falls behind, and ends the run instead of letting it wait for a timeout.

A thread of each rank writes a beat into the store of torch.distributed every two seconds: host, process, step, phase,
the line of code where the main thread stands, the last collective. This is no collective, so it works while the main
thread hangs. Rank 0 reads all beats and every rank reads rank 0's. The first to know writes the verdict into the store;
each rank finds it there, says it, leaves its stacks in its log and ends its process.
"""

import json
import os
import queue
import re
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from automix_dist.config import EngineConfig
from automix_dist.distributed import Process
from automix_dist.errors import AutomixError, first_line
from automix_dist.rank_log import RankLog

BEAT_SECONDS = 2.0
MISSED_BEATS = 4
"""So many beats missing are a dead rank once a collective has failed."""
STORE_SECONDS = 5.0
"""How long a question to the store may take."""
PATIENT_SHARE = 0.9
"""The share of the collectives' timeout that a phase of minutes may take: the verdict comes before the timeout."""
USUAL_STEPS = 5
"""A rank may stand still for so many times its usual step."""
STRAGGLER = 1.3
"""A rank whose own work takes so many times the ranks' median falls behind."""
STRAGGLER_SHARE = 0.05
"""The least excess over the median, as a share of the step, that is reported."""
STRAGGLER_STEPS = 10
"""Measured steps that a rank is judged by, at the least."""
REPEAT_WINDOWS = 10
"""A rank that falls behind is reported again after so many times engine.stall_seconds."""
PACKAGE = f"{Path(__file__).parent}{os.sep}"
"""What the paths of our own code begin with."""
LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket", re.IGNORECASE)
"""What RuntimeErrors say whose reason is another rank or the network."""


class PeerError(AutomixError, RuntimeError):
    """A collective failed because of another rank or the network; one message for the user."""


@dataclass
class Beat:
    """What a rank tells of itself."""

    rank: int
    host: str
    process: int
    """Its process id."""
    number: int = 0
    """Beats so far; a rank whose number stays is silent."""
    step: int = 0
    phase: str = ""
    """This and the next as in Progress."""
    advances: int = 0
    """The rank with the fewest holds the others up."""
    still_seconds: float = 0.0
    """How long the main thread has not advanced."""
    stuck: bool = False
    """Whether that is too long for the phase."""
    where: str = ""
    """The line of our code that the main thread is in."""
    collectives: int = 0
    """Collectives that were begun; decides between ranks in the same phase."""
    last_collective: str = ""
    """The newest of them."""
    writing: bool = False
    """See Progress; while all save, who writes holds up who waits."""
    finished: bool = False
    """Whether the rank has left the block, and is missed no more."""
    steps: int = 0
    """Measured steps; the next two are sums over them, see Progress."""
    step_seconds: float = 0.0
    own_seconds: dict[str, float] = field(default_factory=dict)


class Heartbeat:
    """Beats from when it is entered until it is left; entered by all ranks together.

    If the block raises, the other ranks are told. A failed collective becomes a PeerError, unless the heartbeat first
    finds the rank that died and ends the process. A single process, or engine.stall_seconds = 0, has no heartbeat.
    """

    def __init__(self, process: Process, engine: EngineConfig, log: RankLog | None):
        self._process, self._progress, self._log = process, process.progress, log
        self._seconds = engine.stall_seconds
        self._timeout = engine.timeout_minutes * 60
        self._interval = min(BEAT_SECONDS, engine.stall_seconds / 10)
        self._on = process.world_size > 1 and engine.stall_seconds > 0
        self._beat = Beat(process.rank, socket.gethostname(), os.getpid())
        self._main_thread = threading.main_thread().ident
        self._stop = threading.Event()
        self._suspect = False
        self._error: BaseException | None = None
        self._suspended = 0.0
        self._watched = range(process.world_size) if process.is_main else range(1)
        self._beats: dict[int, Beat] = {}
        self._silent = dict.fromkeys(self._watched, 0.0)
        self._window: tuple[float, list[Beat]] = (0.0, [])
        self._windows = 0
        self._noted: dict[int, int] = {}
        self._store: dist.Store | None = None

    def __enter__(self) -> "Heartbeat":
        if self._on:
            self._prefix = self._process.broadcast(uuid.uuid4().hex)
            self._connect()
            if self._store is None:
                raise PeerError(f"{_name(self._beat)} no longer reaches the store of {os.environ['MASTER_ADDR']}")
            if self._process.is_main:
                self._store.multi_set(["verdict", "suspect"], ["", ""])
            self._look_at_main_thread(0.0)
            self._publish(self._store)
            # When all ranks have come here every key exists: a question for one that does not would wait.
            everyone = self._process.gather(self._beat)
            self._beats = {rank: everyone[rank] for rank in self._watched}
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self._thread.start()
            self._before = signal.signal(signal.SIGTERM, self._terminated)
            self._progress.on_failure = self._failed
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._on:
            return
        if error is None:
            self._leave()
            self._process.barrier()  # nobody listens any more, so rank 0 may take the store with it
            if signal.getsignal(signal.SIGTERM) == self._terminated:
                signal.signal(signal.SIGTERM, self._before)
            return
        self._failed(error)
        if not is_lost(self._error):
            return
        # Until it is known who died: then the heartbeat's thread ends this process. Nobody did if it goes on.
        time.sleep((2 * MISSED_BEATS + 2) * self._interval + STORE_SECONDS)
        self._leave()
        why = "though all are alive: a fault of the network? `automix doctor --all-ranks` tests it"
        if self._suspended:
            why = f"after {self._suspension()}"
        reason = (
            f"{_name(self._beat)} lost contact with another rank in {_place(self._beat)}, {why} ({first_line(error)})"
        )
        self._tell_others(reason)
        raise PeerError(reason) from error

    def _failed(self, error: BaseException) -> None:
        """Keep the traceback and tell the other ranks, once. After a failed collective the heartbeat is left to find
        out who died."""
        if self._error is not None:
            return
        self._error = error
        if isinstance(error, Exception) and self._log is not None:
            traceback.print_exception(error, file=self._log.file)
        if is_lost(error):
            self._suspect = self._progress.patient = True
            return
        self._leave()
        self._tell_others(f"{_name(self._beat)} failed in {_place(self._beat)}: {first_line(error)}")

    def _leave(self) -> None:
        """The last beat."""
        self._stop.set()
        self._thread.join()
        self._beat.step, self._beat.phase = self._progress.step, self._progress.phase
        self._beat.where, self._beat.finished = "", True
        self._attempt(self._publish)

    def _terminated(self, number: int, _frame: Any) -> None:
        """SIGTERM ends the process, but not while an error is on its way up: launchers send it to all ranks when one
        has died, and this rank has yet to say which."""
        if sys.exc_info()[1] is None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _tell_others(self, verdict: str) -> None:
        """Leave the reason of this rank's failure."""
        self._agreed(verdict)
        self._say(verdict, on_console=True)
        if self._process.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(2 * self._interval)  # the store ends with this process; let the others read

    def _run(self) -> None:
        try:
            self._watch()
        except Exception:  # a defect here must not look like a dead rank and end a healthy run
            traceback.print_exc()
            self._beat.finished = True
            self._attempt(self._publish)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self._interval):
            now = time.monotonic()
            passed, last = now - last, now
            # A job that was suspended as a whole wakes up to old beats: that time must not count as silence.
            seconds = min(passed, 2 * self._interval)
            if passed > self._timeout:
                self._suspended = passed
                if self._log is not None:
                    self._log.say(f"automix: {self._suspension()}", on_console=self._process.is_main)
            self._look_at_main_thread(seconds)
            if self._store:
                verdict = self._exchange(seconds)
            else:  # asking for it takes its own time
                verdict = self._without_store(min(passed, self._interval + 2 * STORE_SECONDS))
            if verdict:
                self._end(verdict)

    def _suspension(self) -> str:
        return (
            f"the job was suspended for {self._suspended:.0f} s, longer than a collective waits "
            f"(engine.timeout_minutes = {self._timeout / 60:g}): if it ends now, start it again with --resume"
        )

    def _connect(self) -> None:
        """A connection of this thread's own: one that waits must not hold up the collectives' set-up."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        limit = timedelta(seconds=STORE_SECONDS)
        store = _within(STORE_SECONDS, lambda: dist.TCPStore(address, port, is_master=False, timeout=limit))
        self._store = store and dist.PrefixStore(f"heartbeat/{self._prefix}", store)

    def _attempt(self, action: Callable[[dist.Store], Any]) -> Any:
        """The value of an action on the store; None if the store does not answer, and then it is given up."""
        store = self._store
        value = None if store is None else _within(STORE_SECONDS, lambda: (action(store),))
        if value is None:
            self._store = None
            return None
        return value[0]

    def _without_store(self, seconds: float) -> str | None:
        """Connect again; the verdict that the store's process is gone, once that has failed for long enough."""
        self._connect()
        self._silent[0] = 0.0 if self._store else self._silent[0] + seconds
        if self._silent[0] > self._allowed_silence():
            first = self._beats[0]
            return (
                f"{_name(first)} has not answered for {self._silent[0]:.0f} s, nor has the store at "
                f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}; last seen in {_place(first)}"
            )
        return None

    def _look_at_main_thread(self, seconds: float) -> None:
        """Bring this rank's beat up to date; `seconds` have passed since the last time."""
        progress, beat = self._progress, self._beat
        moved = progress.advances != beat.advances
        beat.still_seconds = 0.0 if moved else beat.still_seconds + seconds
        patient = progress.patient or not progress.usual_seconds
        limit = PATIENT_SHARE * self._timeout if patient else max(self._seconds, USUAL_STEPS * progress.usual_seconds)
        beat.stuck = beat.still_seconds > limit
        beat.step, beat.phase, beat.advances = progress.step, progress.phase, progress.advances
        beat.writing = progress.writing and progress.phase == "saving"
        beat.where = _where(self._main_thread)
        beat.steps, beat.step_seconds = progress.measured_steps, progress.measured_seconds
        beat.own_seconds = dict(progress.own_seconds)
        if beat.still_seconds > MISSED_BEATS * self._interval:
            beat.collectives, beat.last_collective = _collectives(self._process.device.type == "cuda")

    def _publish(self, store: dist.Store) -> None:
        self._beat.number += 1
        if self._suspect:
            store.set("suspect", "1")
        store.set(f"beat/{self._beat.rank}", json.dumps(asdict(self._beat)))

    def _exchange(self, seconds: float) -> str | None:
        """One round with the store, `seconds` after the last; the verdict, if there is one."""
        keys = ["verdict", "suspect", *(f"beat/{rank}" for rank in self._watched)]
        values = self._attempt(lambda store: (self._publish(store), store.multi_get(keys))[1])
        if values is None:
            return None
        verdict, suspect, *beats = (value.decode() for value in values)
        if verdict:
            return verdict
        self._suspect = self._suspect or bool(suspect)
        for rank, text in zip(self._watched, beats, strict=True):
            beat = Beat(**json.loads(text))
            unheard = beat.number == self._beats[rank].number
            self._silent[rank] = self._silent[rank] + seconds if unheard else 0.0
            self._beats[rank] = beat
        known = list(self._beats.values())
        verdict = silence(known, self._silent, self._allowed_silence(), self._beat.host)
        if verdict is None and self._process.is_main:
            verdict = standstill(known)
            self._look_for_stragglers(known, seconds)
        return verdict and self._agreed(verdict)

    def _agreed(self, verdict: str) -> str:
        """The first verdict that any rank gave; this one, if it is the first or the store does not answer."""
        first = self._attempt(lambda store: store.compare_set("verdict", "", verdict))
        return first.decode() if first else verdict

    def _allowed_silence(self) -> float:
        return MISSED_BEATS * self._interval if self._suspect else self._seconds

    def _look_for_stragglers(self, beats: list[Beat], seconds: float) -> None:
        """Once in engine.stall_seconds, note ranks that fell behind in that time; the same rank not again for long."""
        age, before = self._window
        self._window = (age + seconds, before)
        if age + seconds < self._seconds and before:
            return
        self._window = (0.0, beats)
        self._windows += 1
        for rank, text in stragglers(before, beats).items():
            if self._windows - self._noted.get(rank, -REPEAT_WINDOWS) >= REPEAT_WINDOWS:
                self._noted[rank] = self._windows
                self._progress.notes.append({"slow_rank": rank, "text": text})

    def _end(self, verdict: str) -> None:
        self._say(verdict, on_console=True)
        if self._log is not None:
            self._log.say_stacks()
        time.sleep(2 * self._interval)  # let every rank read the verdict, rank 0's store may end with it
        os._exit(1)

    def _say(self, verdict: str, on_console: bool) -> None:
        """The line into this rank's log, and on each host's console once."""
        first = self._attempt(lambda store: store.add(f"told/{self._beat.host}", 1)) in (1, None)
        line = f"automix: error: {verdict}"
        if self._log is not None:
            self._log.say(line, on_console=on_console and first)
        elif on_console and first:
            print(line, file=sys.stderr, flush=True)


def is_lost(error: BaseException) -> bool:
    """Whether a collective failed, and so another rank or the network."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and bool(LOST.search(str(error))))


def _within(seconds: float, action: Callable[[], Any]) -> Any:
    """The action's value; None if it raises RuntimeError or takes too long.

    In a thread that can be abandoned: when the store's process is stopped, PyTorch waits beyond its own timeout.
    """
    values: queue.SimpleQueue = queue.SimpleQueue()

    def act() -> None:
        try:
            values.put(action())
        except RuntimeError:
            values.put(None)

    threading.Thread(target=act, name="heartbeat-store", daemon=True).start()
    try:
        return values.get(timeout=seconds)
    except queue.Empty:
        return None


def silence(beats: Sequence[Beat], silent: dict[int, float], allowed: float, host: str) -> str | None:
    """The verdict on ranks whose beats stopped `silent` seconds ago, more than `allowed`; `host` is the observer's.

    Ranks of the same hosts that were quiet for half as long go with them: they die together, but their last beats lie
    apart.
    """
    running = [beat for beat in beats if not beat.finished]
    hosts = {beat.host for beat in running if silent[beat.rank] > allowed}
    quiet = [beat for beat in running if beat.host in hosts and silent[beat.rank] > allowed / 2]
    if not quiet:
        return None
    first = quiet[0]
    states = {state for beat in quiet if beat.host == host and (state := _process_state(beat.process))}
    reason = f" ({', '.join(sorted(states))})" if states else " (is its host down?)" if first.host != host else ""
    seconds = min(silent[beat.rank] for beat in quiet)
    return f"{_names(quiet)} has not responded for {seconds:.0f} s{reason}; last seen in {_place(first)}"


def standstill(beats: Sequence[Beat]) -> str | None:
    """The verdict on ranks whose main thread stands still for too long: of all unfinished ones, the least advanced."""
    running = [beat for beat in beats if not beat.finished]
    order = [(beat.advances, not beat.writing, beat.collectives) for beat in running]
    least = min(order, default=None)
    behind = [beat for beat, place in zip(running, order, strict=True) if place == least]
    stuck = [beat for beat in behind if beat.stuck]
    if not stuck:
        return None
    first = stuck[0]
    text = f"{_names(behind)} stands still for {first.still_seconds:.0f} s in {_place(first)}"
    if first.last_collective:
        text += f", last collective {first.last_collective} (number {first.collectives})"
    if len(behind) == len(beats) and first.writing:
        return f"{text}: all ranks wait for their disks"
    if len(behind) == len(beats):
        return f"{text}: all ranks wait alike; a fault of the network? `automix doctor --all-ranks` tests it"
    return f"{text}; the others wait for it. Stacks: logs/rank_{first.rank:05d}.log in the run's folder"


def stragglers(before: Sequence[Beat], now: Sequence[Beat]) -> dict[int, str]:
    """The ranks whose own work per step, between two sets of beats, is far above the median of all ranks'."""
    work: dict[int, dict[str, float]] = {}
    step_seconds = []
    for old, new in zip(before, now, strict=False):
        steps = new.steps - old.steps
        if steps < STRAGGLER_STEPS:
            return {}
        work[new.rank] = {name: (new.own_seconds[name] - old.own_seconds[name]) / steps for name in new.own_seconds}
        step_seconds.append((new.step_seconds - old.step_seconds) / steps)
    if not work:
        return {}
    totals = {rank: sum(parts.values()) for rank, parts in work.items()}
    median, step = statistics.median_low(totals.values()), statistics.median_low(step_seconds)
    found = {}
    for beat in now:
        own = totals[beat.rank]
        if own > STRAGGLER * median and own - median > STRAGGLER_SHARE * step:
            parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in work[beat.rank].items())
            found[beat.rank] = (
                f"{_name(beat)} falls behind: {own:.3f} s of its own work in a step ({parts}), the median rank's is "
                f"{median:.3f} s; a step takes {step:.3f} s"
            )
    return found


def _name(beat: Beat) -> str:
    return f"rank {beat.rank} on {beat.host} (process {beat.process})"


def _names(beats: Sequence[Beat]) -> str:
    """ "rank 3 on node7 (process 4711)", or "ranks 8, 9 on node2, 12 on node3"."""
    if len(beats) == 1:
        return _name(beats[0])
    by_host: dict[str, list[str]] = defaultdict(list)
    for beat in beats:
        by_host[beat.host].append(str(beat.rank))
    shown = [f"{', '.join(ranks)} on {host}" for host, ranks in list(by_host.items())[:8]]
    return f"each of {len(beats)} ranks ({'; '.join(shown)}{'; ...' if len(by_host) > 8 else ''})"


def _place(beat: Beat) -> str:
    phase = f"{beat.phase}, writing to its disk" if beat.writing else beat.phase
    return f"step {beat.step}, {phase}{f' at {beat.where}' if beat.where else ''}"


def _where(thread: int) -> str:
    """Where a thread stands: the innermost line of this package, and what it called."""
    frame = sys._current_frames().get(thread)
    lines = []
    while frame is not None:
        code = frame.f_code
        line = f"{os.path.basename(code.co_filename)}:{frame.f_lineno} {code.co_name}"
        if code.co_filename.startswith(PACKAGE):
            return f"{line} ({lines[0]})" if lines else line
        lines.append(line)
        frame = frame.f_back
    return lines[0] if lines else ""


def _process_state(process: int) -> str | None:
    """What a process of this host is doing, where that explains its silence."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        state = "Z"
    return {
        "T": "its process is stopped, as by SIGSTOP",
        "t": "its process is held by a debugger",
        "Z": "its process is gone: killed, perhaps for want of memory (see dmesg), or crashed",
        "D": "its process waits for a disk or driver",
    }.get(state)


def _collectives(on_gpu: bool) -> tuple[int, str]:
    """How many collectives this rank has begun and the last one, from PyTorch's flight recorder, where it has one."""
    dump = getattr(torch._C._distributed_c10d, f"_dump_{'nccl' if on_gpu else 'fr'}_trace_json", None)
    if dump is None:
        return 0, ""
    try:
        record = json.loads(dump())
        begun = sum(int(group["last_enqueued_collective"]) for group in record["pg_status"].values())
        return begun, record["entries"][-1]["profiling_name"]
    except (RuntimeError, ValueError, LookupError, TypeError):  # its format is PyTorch's own business
        return 0, ""
