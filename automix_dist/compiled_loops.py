"""Loops compiled by numba for FFCV's pipelines, and kept on disk: no process but the first compiles them."""

import contextlib
import ctypes
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import llvmlite.binding
import numba
from llvmlite import ir
from numba import njit, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

SOURCES = ("augment", "compiled_loops", "ffcv_parts", "jpeg", "rand_augment", "random_streams", "resize", "sampling")
"""Files with compiled functions, and files with what these call or read."""


class _Cache(FunctionCache):
    """What numba compiled, kept on disk where that can be: a full or broken disk costs time, and no training.

    numba renames its files without waiting for the disk: a host that loses power may leave empty ones. As what is in
    them is unpickled, any error may come of that; their index is then begun anew.
    """

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except OSError:
            return None
        except Exception:
            self._begin_anew()
            return None

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except OSError:
            pass
        except Exception:
            self._begin_anew()

    def _begin_anew(self):
        with contextlib.suppress(OSError):
            self.flush()


def _cache_folder() -> str:
    """For these sources and this kind of processor alone: numba looks at the file of a function but not at those of
    what it calls and reads, and two processors that write at once would take each other's code."""
    package = Path(__file__).parent
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.binding.get_host_cpu_name()}".encode())
    for name in SOURCES:
        digest.update((package / f"{name}.py").read_bytes())
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    place = package / "__pycache__" if os.access(package, os.W_OK) else Path(home, "automix_dist")
    return str(Path(numba.config.CACHE_DIR or place) / f"numba-{digest.hexdigest()[:16]}")


_CACHE_FOLDER = _cache_folder()


def compiled(*, parallel: bool = False) -> Callable:
    """numba's njit, keeping what it compiled on disk. No fastmath: crops could differ by a pixel between processors."""

    def decorate(function: Callable) -> Callable:
        dispatcher = njit(nogil=True, error_model="numpy", parallel=parallel)(function)
        asked, numba.config.CACHE_DIR = numba.config.CACHE_DIR, _CACHE_FOLDER
        try:
            dispatcher._cache = _Cache(function)
        except RuntimeError:
            pass  # no folder can be written: compile every time
        finally:
            numba.config.CACHE_DIR = asked
        return dispatcher

    return decorate


def c_function(library: ctypes.CDLL, name: str, signature: types.FunctionType) -> types.ExternalFunction:
    """A library's function for compiled code, called by name: code with an address in it cannot be kept on disk."""
    symbol = f"automix_loader_{name}"
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    llvmlite.binding.add_symbol(symbol, address)
    return types.ExternalFunction(symbol, signature)


@intrinsic
def uint64_at(typing_context, address):
    """The uint64 in memory at an address."""

    def codegen(context, builder, signature, arguments):
        return builder.load(builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()))

    return types.uint64(types.uintp), codegen
