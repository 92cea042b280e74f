"""One function for many items, by threads, with the results in the order of the items."""

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any


@contextmanager
def in_order(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Iterator[Any]]:
    """The function of each item, computed by threads, of which a few results at most wait in memory.

    Within the block Ctrl-C is raised between two results, and anywhere when it comes twice.
    """
    with _ctrl_c_held() as stop_if_asked, closing(_results(function, items, workers, stop_if_asked)) as results:
        yield results


def _results(
    function: Callable[[Any], Any], items: Iterable[Any], workers: int, stop_if_asked: Callable[[], None]
) -> Iterator[Any]:
    pool = ThreadPoolExecutor(workers)
    pending: deque = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= 4 * workers:
                stop_if_asked()
                yield pending.popleft().result()
        while pending:
            stop_if_asked()
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ctrl_c_held() -> Iterator[Callable[[], None]]:
    """Ctrl-C interrupts only the function that is yielded: elsewhere it may leave a lock taken that threads need."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    came = []

    def note(*_: Any) -> None:
        if came:  # twice: whatever it leaves behind
            raise KeyboardInterrupt
        came.append(True)

    def stop_if_asked() -> None:
        if came:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield stop_if_asked
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
