"""Losses differentiated as soon as they are known, so that one set of activations lives at a time (immediate_backward).

The engine then has one loss to differentiate, as it wants: its backward pass hands out the gradients that are there.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from automix_dist.precision import scaled


class Differentiated(NamedTuple):
    """A loss whose backward pass has been done."""

    loss: Tensor
    gradients: list[Tensor]
    parameters: list[nn.Parameter]
    nodes: list[Any]
    scale: Tensor | None
    """What the gradients have been multiplied by; None = nothing."""


def differentiate(loss: Tensor, part: nn.Module, scale: Tensor | None) -> Tensor | Differentiated:
    """The loss's value, with the gradients of the parameters of `part` instead of a graph; a loss without one as it is.

    Args:
        scale: by which the loss is multiplied for it, for float16; None = not at all.
    """
    if not loss.requires_grad:
        return loss
    parameters = [p for p in part.parameters() if p.requires_grad]
    with torch.autocast(loss.device.type, enabled=False):  # as in a backward pass outside of the model
        gradients = torch.autograd.grad(scaled(loss, scale), parameters, allow_unused=True)
    torch.clear_autocast_cache()  # its casts of the weights hang on the graph that was just freed
    # Without those that the loss does not reach: ZeRO 3 has not gathered them, and autograd notes an empty shape.
    reached = [(g, p) for g, p in zip(gradients, parameters, strict=True) if g is not None]
    gradients, parameters = [g for g, _ in reached], [p for _, p in reached]
    # Holding these graph nodes keeps the shapes of the gathered weights.
    nodes = [torch.autograd.graph.get_gradient_edge(p).node for p in parameters]
    return Differentiated(loss.detach(), gradients, parameters, nodes, scale)


def sum_losses(early: list[Tensor | Differentiated], last: Tensor) -> Tensor:
    """Losses from `differentiate`, and the one whose graph is the last, as one to differentiate.

    Gradients that are there already go first in its backward pass; then each one is whole as soon as the last graph
    delivers its part, and the engine's reduction overlaps with the rest of that graph.
    """
    for each in early:
        if isinstance(each, Differentiated):
            each = HeldGradients.apply(each.loss, each.gradients, each.scale, *each.parameters)
        last = last + each
    return last


class HeldGradients(torch.autograd.Function):
    """A loss value whose backward pass returns gradients computed earlier, of the loss times `scale`, if there is one:
    times the incoming gradient, over that scale. It can run once, as they are freed then."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: list[Tensor], scale: Tensor | None, *parameters: Tensor) -> Tensor:
        ctx.gradients, ctx.scale, ctx.parameters = gradients, scale, parameters
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, incoming: Tensor):
        # ZeRO 3 has released the gathered weights, and autograd gives a gradient its weight's shape of this moment.
        sharded = [p for p in ctx.parameters if hasattr(p, "ds_status") and p.ds_status.name == "NOT_AVAILABLE"]
        if sharded:
            sharded[0].all_gather(sharded)
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were handed out already: call backward once a forward pass")
        factor = incoming if ctx.scale is None else incoming / ctx.scale
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, None, *torch._foreach_mul(gradients, factor)
