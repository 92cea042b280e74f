"""A training step's forward and backward passes as one CUDA graph: the host launches it instead of a thousand kernels.

It is for steps that the GPU finishes before the host has launched the next kernels, as with small images. A graph is
what was recorded: memory at fixed places, and whatever the host decided frozen. So the step's tensors are copied to
fixed places first, and each combination of what the host decides (upsampling modes, which branches run) and of shapes
has a graph of its own. The gradients end in fixed places too, and are handed to the engine in its one backward pass, as
those of `engine.immediate_backward` are: reduction, clipping and the optimizer are the engine's, with a few launches.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from automix_dist.config import ConfigError
from automix_dist.errors import first_line
from automix_dist.immediate_backward import HeldGradients
from automix_dist.precision import scaled

WARM_UP = 3
"""Passes before the recording: libraries choose their algorithms, and Triton and Inductor compile."""
MAX_GRAPHS = 16


class Recording(Protocol):
    """A recorded computation that is replayed without Python, on the same memory and with the same host's decisions."""

    @property
    def outputs(self) -> Any:
        """The function's results, which each replay overwrites."""

    def replay(self) -> None: ...


class CudaGraphs:
    """Records on the GPU, all in one pool of memory: no two recordings run at the same time, and what one of them
    leaves is used before the next."""

    def __init__(self):
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Any]) -> Recording:
        """Raises ConfigError if the function cannot be recorded, though it runs."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP):
                function()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        reason = None
        try:
            # The loader's and the collectives' threads go on allocating and asking for events.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                try:
                    outputs = function()
                except Exception as error:  # the end of a broken capture raises an error of its own
                    reason = error
                    raise
        except Exception as error:
            reason = reason or error
            # Before PyTorch 2.15 a failed capture leaves its stream current, and the generator at recording.
            torch.cuda.set_stream(current)
            generator = torch.cuda.default_generators[current.device_index]
            generator.graphsafe_set_state(generator.clone_state())
            why = f"{type(reason).__name__}: {first_line(reason)}"
            raise ConfigError(
                f"engine.cuda_graph: the step cannot be recorded ({why}): set engine.cuda_graph=false"
            ) from reason
        return _Recorded(outputs, graph.replay)


class _Recorded(NamedTuple):
    outputs: Any
    replay: Callable[[], None]


class _Captured(NamedTuple):
    recording: Recording
    inputs: list[Tensor]
    parameters: list[nn.Parameter]
    """Those that the losses reach."""


class CapturedStep:
    """Takes the place of a model's `forward`: training steps come from graphs, all else from the forward itself.

    The model's parameters and buffers must stay where they are in memory. Autocast, dropout and stochastic depth work
    as without; BatchNorm's statistics advance once per step.
    """

    def __init__(self, model: nn.Module, recorder: Callable[[], Callable[[Callable], Recording]] = CudaGraphs):
        """`recorder` makes what records functions; anew when all recordings are dropped."""
        self.model = model
        self.plain = model.forward
        self.recorder = recorder
        self.record = recorder()
        self.captured: dict[Any, _Captured] = {}
        self._image_shape = torch.Size()

    def __call__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        draws: Any = None,
        mask_loss_weight: float = 0.0,
    ) -> Any:
        """The arguments and results of the model's own forward.

        Raises ConfigError if a policy decides so many things on the host that graphs are of no use, or if a step
        cannot be recorded.
        """
        if labels is None or draws is None or not self.model.training:
            return self.plain(images, labels, draws, mask_loss_weight)
        leaves, tree = pytree.tree_flatten(draws)
        tensors = [images, labels, *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
        decided = tuple(Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        key = (decided, tree, *((tensor.shape, tensor.dtype) for tensor in tensors))
        if key not in self.captured:
            self._make_room(images)
            self.captured[key] = self._capture(tensors, decided, tree)
        recording, inputs, parameters = self.captured[key]
        *places, weight = inputs
        torch._foreach_copy_(places, tensors)
        weight.fill_(mask_loss_weight)
        recording.replay()
        losses, gradients = recording.outputs
        total, *parts = losses.clone().unbind()
        return self.model.Losses(HeldGradients.apply(total, gradients, self.model.loss_scale, *parameters), *parts)

    def _capture(self, tensors: Sequence[Tensor], decided: tuple, tree: pytree.TreeSpec) -> _Captured:
        inputs = [*(tensor.clone() for tensor in tensors), tensors[0].new_zeros((), dtype=torch.float32)]
        images, labels, *drawn, weight = inputs
        of_draws = iter(drawn)
        draws = pytree.tree_unflatten([next(of_draws) if each is Tensor else each for each in decided], tree)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        reached: list[nn.Parameter] = []

        def step() -> tuple[Tensor, list[Tensor]]:
            losses = self.plain(images, labels, draws, weight)
            aliases = [p for p in self.model.parameters() if p.requires_grad]
            total = scaled(losses.total, self.model.loss_scale)
            gradients = torch.autograd.grad(total, aliases, allow_unused=True)
            reached[:] = [p for p, g in zip(trained, gradients, strict=True) if g is not None]
            return torch.stack([each.detach().float() for each in losses]), [g for g in gradients if g is not None]

        buffers = list(self.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        devices = [images.device] if images.is_cuda else []
        # What the passes before the recording do to the model and to the random numbers is undone.
        with torch.random.fork_rng(devices), _aliased_parameters(self.model):
            recording = self.record(step)
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        return _Captured(recording, inputs, reached)

    def _make_room(self, images: Tensor) -> None:
        """Drop the graphs of another image size, whose time is over; refuse too many."""
        if self.captured and images.shape != self._image_shape:
            self.captured.clear()
            self.record = self.recorder()
        self._image_shape = images.shape
        if len(self.captured) == MAX_GRAPHS:
            raise ConfigError(
                f"engine.cuda_graph: the steps of this policy differ in more than {MAX_GRAPHS} ways that are decided "
                f"on the host, each of which needs a graph: set engine.cuda_graph=false"
            )


def capture_steps(
    model: nn.Module, recorder: Callable[[], Callable[[Callable], Recording]] = CudaGraphs
) -> CapturedStep:
    """Have the model's training steps recorded and replayed from now on; what does so is its `forward` then."""
    model.forward = CapturedStep(model, recorder)
    return model.forward


@contextlib.contextmanager
def _aliased_parameters(model: nn.Module) -> Iterator[None]:
    """Within the block the model has other parameters, in the same memory.

    Autograd keeps a node for each parameter that others hold, as DDP does, or the graph of a micro batch that is still
    alive. Such a node belongs to the stream that it was made on, and a capture that meets it fails.
    """
    places = [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if p is not None]
    aliases = {parameter: nn.Parameter(parameter.detach(), parameter.requires_grad) for _, _, parameter in places}
    for module, name, parameter in places:
        module._parameters[name] = aliases[parameter]
    try:
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter
