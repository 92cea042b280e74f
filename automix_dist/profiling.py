"""A recording of some training steps by torch.profiler: a trace for Perfetto or chrome://tracing, and a table."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from automix_dist.config import ProfileConfig

PROFILE = "profile"
ROWS = 50
"""Lines of the table."""


class StepProfile:
    """Records `profile.steps` steps of a session into `folder`; does nothing where that is 0.

    Each part of the model (query encoder, Mix Block, ...) is a named span in the trace, unless it is compiled.
    Evaluations and checkpoints between the steps are recorded too.
    """

    def __init__(self, config: ProfileConfig, folder: Path, model: nn.Module, say: Callable[[str], None]):
        self.config = config
        self.folder = folder
        self.model = model
        self.say = say
        self._first: int | None = None
        self._begun = False
        self._profiler: profile | None = None
        self._hooks: list = []

    def begin_step(self, step: int) -> None:
        """Call before each step with its number."""
        if not self.config.steps:
            return
        if self._first is None:
            self._first = step + self.config.start
        if step == self._first:
            self._begin()
        elif self._profiler is not None and step == self._first + self.config.steps:
            self._end()
        elif self._profiler is not None:
            self._profiler.step()

    def close(self) -> None:
        """At the end of the session: keep what was recorded so far."""
        if self._profiler is not None:
            self._end()
        elif self._first is not None and not self._begun:
            self.say(
                f"profile.start = {self.config.start}: the session ended before step {self._first}, nothing recorded"
            )

    def _begin(self) -> None:
        self._begun = True
        for name, part in self.model.named_children():
            if part._compiled_call_impl is not None:
                continue  # a hook would have it compiled anew; its graphs are named in the trace
            spans: list = []

            def enter(module, arguments, name=name, spans=spans):
                spans.append(record_function(name))
                spans[-1].__enter__()

            def leave(module, arguments, output, spans=spans):
                spans.pop().__exit__(None, None, None)

            self._hooks += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._profiler = profile(activities=activities, record_shapes=True, with_flops=True)
        self._profiler.start()

    def _end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        recorded, self._profiler = self._profiler, None
        trace = self.folder / f"trace_step_{self._first:08d}.json.gz"
        try:
            recorded.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(trace))
            by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = recorded.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=60)
            trace.with_name(trace.name.replace("trace", "table").replace(".json.gz", ".txt")).write_text(table)
        except (OSError, RuntimeError) as error:  # no recording is worth a training
            self.say(f"the profile from step {self._first} could not be written: {error}")
            return
        self.say(f"profile of {self.config.steps} steps from step {self._first}: {trace} (open it in ui.perfetto.dev)")
