"""Where the main thread of this rank stands: plain numbers, cheap to write in a step, read by heartbeat.py's thread."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch


class Progress:
    """The step and phase of the main thread, and how long its own work takes, apart from waiting for other ranks."""

    def __init__(self, on_gpu: bool = False):
        self.step = 0
        self.phase = "starting"
        self.patient = True
        """Whether the phase may take minutes: start-up, an epoch's first step, evaluation, saving."""
        self.advances = 0
        """Grows with every phase and batch, by the same on all ranks: the least advanced rank holds the others up."""
        self.usual_seconds = 0.0
        """The slowest recent step; forgotten by 2 % a step."""
        self.measured_steps = 0
        self.measured_seconds = 0.0
        self.own_seconds = {"loading": 0.0, "forward": 0.0}
        """Sums over the measured steps of what needs no other rank (below ZeRO 3): the straggler has more of it."""
        self._share_began = self._step_seconds = self._waited = 0.0  # since the last look at the share
        self.notes: deque[dict[str, Any]] = deque()
        """What the heartbeat found out about slow ranks, for the run's log."""
        self.writing = False
        """Whether the checkpoint's thread is busy with a disk; else it waits for other ranks, or does nothing."""
        self.on_failure: Callable[[BaseException], None] = lambda error: None
        """The heartbeat's, to be called with an error before anything that takes its time."""
        self._on_gpu = on_gpu
        self._began: torch.cuda.Event | None = None
        """On the GPU's clock, the phase that is timed."""
        self._events: deque[tuple[str, bool, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._since = self._step_began = time.perf_counter()

    def begin_step(self, step: int, patient: bool) -> None:
        self.step, self.patient = step, patient
        self._step_began = self._share_began = time.perf_counter()

    def enter(self, phase: str, patient: bool | None = None) -> None:
        """The main thread begins another phase; `patient` stays as it is unless given."""
        now = time.perf_counter()
        if self.phase in self.own_seconds:
            self._leave(self.phase, now - self._since)
        if self._on_gpu and phase in self.own_seconds:
            self._began = _event()
        self.phase, self._since = phase, now
        self.patient = self.patient if patient is None else patient
        self.advances += 1

    def advance(self) -> None:
        """One more batch within a phase."""
        self.advances += 1

    def end_step(self) -> None:
        now = time.perf_counter()
        self._step_seconds += now - self._share_began
        if not self.patient:
            seconds = now - self._step_began
            self.usual_seconds = max(seconds, 0.98 * self.usual_seconds)
            self.measured_seconds += seconds
            self.measured_steps += 1

    def loading_share(self) -> float:
        """The share of the steps' time, since the last call, in which the device had nothing to do but wait for the
        next batch. For the middle of a step, when the host has just waited for the device."""
        self._read_events()
        now = time.perf_counter()
        seconds = self._step_seconds + now - self._share_began
        share = min(self._waited / seconds, 1.0) if seconds else 0.0
        self._step_seconds = self._waited = 0.0
        self._share_began = now
        return share

    def _leave(self, phase: str, seconds: float) -> None:
        """Count what the phase took. The host only enqueues what a GPU does, and may be far ahead of it: the GPU's own
        clock times its forward pass and its waiting, read later and without waiting."""
        if (phase == "loading" or not self._on_gpu) and not self.patient:
            self.own_seconds[phase] += seconds
        if self._on_gpu:
            self._events.append((phase, self.patient, self._began, _event()))
            self._read_events()
        elif phase == "loading":
            self._waited += seconds

    def _read_events(self) -> None:
        while self._events and self._events[0][-1].query():
            phase, patient, start, end = self._events.popleft()
            seconds = start.elapsed_time(end) / 1000
            if phase == "loading":
                self._waited += seconds
            elif not patient:
                self.own_seconds[phase] += seconds


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
