"""RUN/logs/rank_00003.log: what a rank says, to its last word; rank 0 goes on speaking to the console too."""

import contextlib
import faulthandler
import io
import os
import platform
import sys
from datetime import datetime
from pathlib import Path
from typing import TextIO


class RankLog:
    """The log file of this process, appended to by every session of the run; open for as long as the process lives.

    Rank 0's stdout and stderr are copied into it, except progress bars and what compiled code prints. Another rank's
    go there alone, compiled code's too. Crashes of compiled code (SIGSEGV, SIGABRT, ...) leave their stacks in it.
    Where it cannot be written, one line says so and nothing else changes.
    """

    def __init__(self, run: Path, rank: int):
        self.path = run / "logs" / f"rank_{rank:05d}.log"
        self.console: TextIO = sys.stderr
        """What the person who started the run sees; for the one line that ends it."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            self.file.write(f"--- {now} {platform.node()}, process {os.getpid()}: {' '.join(sys.argv)}\n")
        except OSError as error:
            print(f"warning: cannot write {self.path} ({error.strerror}); going on without", file=sys.stderr)
            self.file = sys.stderr
            return
        if rank == 0:
            sys.stdout, sys.stderr = _Copied(sys.stdout, self.file), _Copied(sys.stderr, self.file)
        else:
            self.console = os.fdopen(os.dup(2), "w", buffering=1)
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(self.file.fileno(), 1)
            os.dup2(self.file.fileno(), 2)
            sys.stdout = sys.stderr = _Copied(None, self.file)
        faulthandler.enable(self.file)

    def speak_on_console(self) -> None:
        """From here on stderr goes to the console too: for the error that ends the process."""
        if isinstance(sys.stderr, _Copied):
            sys.stderr = _Copied(self.console, self.file)

    def say(self, text: str, *, on_console: bool) -> None:
        """One line into the file, and where asked onto the console, whatever else is being written."""
        for stream in {self.file, self.console} if on_console else {self.file}:
            with contextlib.suppress(OSError, ValueError):  # a full disk or closed terminal must not silence the other
                stream.write(f"{text}\n")
                stream.flush()

    def say_stacks(self) -> None:
        """Every thread's Python stack, into the file."""
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(self.file, all_threads=True)


class _Copied(io.TextIOBase):
    """Text to a stream, if there is one, and to the log file; a log that cannot be written stops nobody."""

    def __init__(self, stream: TextIO | None, file: TextIO):
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        if not text.startswith("\r"):  # a progress bar
            with contextlib.suppress(OSError):
                self._file.write(text)
        return len(text) if self._stream is None else self._stream.write(text)

    def flush(self) -> None:
        if self._stream is not None:
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        return (self._stream or self._file).fileno()

    @property
    def encoding(self) -> str:
        return (self._stream or self._file).encoding
