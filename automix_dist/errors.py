"""Exit codes, the base class of errors a user can fix, and phrases for their messages."""

import difflib
import signal
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75
"""Stopped by a signal after saving: start again with --resume (EX_TEMPFAIL of sysexits.h)."""


class AutomixError(Exception):
    """A mistake of the user's or a mishap of the machine; the message says what, where and what to do.

    The command shows the message alone; any other exception is a defect of this program and keeps its traceback.
    """


def did_you_mean(name: str, known: Iterable[str] | Mapping[str, object], most: int = 1) -> str:
    """Suffix for an unknown name: `; did you mean X?`, or an empty string if nothing is close. A mapping's values are
    shown in place of its keys."""
    shown = known if isinstance(known, Mapping) else {each: each for each in known}
    near = [str(shown[each]) for each in difflib.get_close_matches(name, shown, n=most)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def stop_reason(number: Any) -> str:
    """What to call the signal that stopped a training: its name, or "its time limit" for SIGALRM."""
    try:
        return "its time limit" if number == signal.SIGALRM else signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def first_line(error: BaseException) -> str:
    """What an error says first, for a message that quotes it; its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of a list of names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(map(repr, names[:most]))}{more}"
