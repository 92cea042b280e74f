"""The JPEG decoder of jpeg.c, which is compiled when this package is installed.

It decodes a box of an image: of what lies around it, the transforms are skipped, and the codes too where restart
markers allow that. The pixels are those of the whole image's decoding, which are Pillow's. FFCV's decoder, through
TurboJPEG's interface, decodes whole images only.
"""

import ctypes
import functools
from pathlib import Path

import numpy as np

from automix_dist.errors import AutomixError


class DecoderError(AutomixError, ImportError):
    """The compiled part is missing or does not load; the message says what to do."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled part. Raises DecoderError."""
    try:
        loaded = ctypes.CDLL(str(Path(__file__).with_name("_jpeg.abi3.so")))
    except OSError as error:
        raise DecoderError(
            f"the JPEG decoder does not load ({error}): run launch/install.sh, or install libjpeg-dev and a C compiler "
            "and then this package again"
        ) from error
    loaded.automix_decode_box.argtypes = [
        ctypes.c_char_p, ctypes.c_uint64, *[ctypes.c_uint32] * 6, ctypes.c_void_p
    ]  # fmt: skip
    return loaded


def decodes(jpeg: bytes, height: int, width: int) -> bool:
    """Whether these bytes are a sound JPEG of this size; not if they are CMYK, nor if any part is damaged."""
    pixels = np.empty((height, width, 3), np.uint8)
    arguments = (height, width, 0, 0, height, width, pixels.ctypes.data)
    return library().automix_decode_box(jpeg, len(jpeg), *arguments) == 0


def restart_interval(width: int) -> int:
    """How many groups of 16 x 16 pixels to put between two restart markers of an image of this width: a few that make
    whole rows. Then a box can be decoded without most of the codes around it; the data grows by 1 to 2 %, or
    where no such number divides the row by 4 to 5 %."""
    groups = -(-width // 16)
    return next((count for count in range(3, 9) if groups % count == 0), 1)
