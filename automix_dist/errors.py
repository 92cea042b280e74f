"""How the command ends: its exit codes, and what those errors have in common that a user can do something about."""

import difflib
from collections.abc import Iterable

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75
"""Stopped by a signal after saving: start again with --resume (EX_TEMPFAIL of sysexits.h)."""


class AutomixError(Exception):
    """A mistake of the user's or a mishap of the machine; the message says what, where and what to do.

    The command shows the message alone; any other exception is a defect of this program and keeps its traceback.
    """


def did_you_mean(name: str, known: Iterable[str], most: int = 1) -> str:
    """The end of a message on a name that is not known: what was meant, perhaps; or nothing."""
    near = difflib.get_close_matches(name, known, n=most)
    return f"; did you mean {' or '.join(near)}?" if near else ""
