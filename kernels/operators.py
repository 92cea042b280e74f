"""Launches as torch operators, which in eager training are called without torch's dispatcher.

An operator that is written in Python passes the dispatcher once for autograd and once for the device; on the host that
takes longer than all else that a launch needs. Compilers, modes and tensors of other classes get the operator itself.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter


class Operator:
    """A launch, registered as torch.ops.automix.NAME for CUDA devices; `register_fake` and `register_kernel` are those
    of torch.library.custom_op.

    Args:
        name: NAME.
        launch: takes tensors, lists of tensors or None, then numbers; returns new tensors.
        mutates_args: names of arguments that it writes to.
    """

    def __init__(self, name: str, launch: Callable, mutates_args: tuple[str, ...] = ()):
        parameters = inspect.signature(launch).parameters
        self._name, self._launch = name, launch
        self._defaults = [each.default for each in parameters.values()]
        self._mutated = [index for index, each in enumerate(parameters) if each in mutates_args]
        self._differentiable: type[torch.autograd.Function] | None = None
        self._registered = torch.library.custom_op(
            f"automix::{name}", launch, mutates_args=mutates_args, device_types="cuda"
        )
        self.register_fake = self._registered.register_fake
        self.register_kernel = self._registered.register_kernel
        self.direct_devices = {"cuda"}
        """Types of devices on which the launch itself is the kernel."""

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """As of torch.library.custom_op. The gradient cannot be differentiated again."""
        self._registered.register_autograd(backward, setup_context=setup_context)
        launch = self._launch

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = launch(*arguments)
            setup_context(ctx, arguments, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
        self._differentiable = type(f"automix_{self._name}", (torch.autograd.Function,), methods)

    def __call__(self, *arguments: Any) -> Any:
        first = next(each for each in arguments if each is not None)
        if isinstance(first, list):
            first = first[0]
        if (
            torch.compiler.is_compiling()
            or type(first) not in (Tensor, Parameter)
            or first.device.type not in self.direct_devices
            or torch._C._len_torch_dispatch_stack()
        ):
            return self._registered(*arguments)
        if len(arguments) < len(self._defaults):
            arguments += tuple(self._defaults[len(arguments) :])
        if self._differentiable is not None and torch.is_grad_enabled():
            return self._differentiable.apply(*arguments)
        output = self._launch(*arguments)
        for written in (arguments[index] for index in self._mutated):
            torch.autograd.graph.increment_version(written)
        return output


# Triton's own have microseconds of overhead on the host.


def cdiv(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """The least that is not smaller; `number` is at least 1."""
    return 1 << (number - 1).bit_length()
