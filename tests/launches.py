"""Launches of kernels for GPUs that are not here: recorded, compiled, and run on the PTX machine."""

from collections import Counter
from dataclasses import dataclass

import torch
import triton
from ptx_machine import Program
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "hip": GPUTarget("hip", "gfx942", 64),
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.uint8: "u8"
}  # fmt: skip


@dataclass
class Recorder:
    """Stands in for a kernel: `kernel[grid](**arguments)` appends the launch to a list."""

    kernel: triton.runtime.JITFunction
    launches: list

    def __getitem__(self, grid):
        return lambda **arguments: self.launches.append((self.kernel, arguments))


def compile_launch(kernel, arguments, architecture):
    """What Triton's launcher would compile for these arguments."""
    options = {key: arguments.pop(key) for key in OPTIONS if key in arguments}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[architecture], options=options)


def launched_with(kernel, arguments) -> list:
    """What Triton's launcher would hand to that code: all but what it was compiled for."""
    values = [arguments[each.name] for each in kernel.params if not each.is_constexpr]
    return [each for each in values if each is not None and not (type(each) is int and each == 1)]


def machine_run(target: str, executed: dict[str, Counter] | None = None):
    """What takes the place of JITFunction.run; `executed` gets the warps' instructions by line, for each kernel."""
    programs = {}

    def run(kernel, *, grid, warmup, **arguments):
        compiled = compile_launch(kernel, dict(arguments), target)
        code = compiled.asm["ptx"]
        if code not in programs:
            programs[code] = Program(code)
        counts = programs[code].run(grid, launched_with(kernel, arguments), compiled.metadata.shared)
        if executed is not None:
            executed[kernel.__name__] = counts

    return run
