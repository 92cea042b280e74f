"""The parts of FFCV that the loader stands on, imported without what importing FFCV does besides.

It sets torch's thread count to 1, which would starve everything else in the process, and fills one of numba's typed
dictionaries, for which numba compiles for four seconds: no compiled code reads it, so any dict does.
"""

import numba.typed
import torch

_threads, _typed_dict = torch.get_num_threads(), numba.typed.Dict
numba.typed.Dict = dict
from ffcv import libffcv  # noqa: E402
from ffcv.fields.rgb_image import SimpleRGBImageDecoder  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.operation import Operation  # noqa: E402
from ffcv.pipeline.state import State  # noqa: E402

torch.set_num_threads(_threads)
numba.typed.Dict = _typed_dict

__all__ = ["AllocationQuery", "Operation", "SimpleRGBImageDecoder", "State", "libffcv"]
