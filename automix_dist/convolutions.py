"""In which layout convolutions read images and weights, and in a stem with a channel of zeros if wanted.

Weights are contiguous: DeepSpeed flattens them, and a checkpoint's slices are views into them. With channels-last
images cuDNN reads channels-last weights, so that torch copies a weight twice in a forward pass, for its type and for
its layout, once more for the layout in the backward pass, and its gradient twice. Here one copy does for both passes,
and one for the gradient, which then has the weight's own strides, as DDP's buckets ask.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from automix_dist.config import ConfigError
from automix_dist.precision import surrounding_autocast


class LaidOutConv2d(nn.Conv2d):
    """nn.Conv2d, whose product reads the same numbers in the same layout, with fewer copies of its weight."""

    def _conv_forward(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Other paddings than zeros hand the product an image of a layout of their own.
        if self.padding_mode == "zeros" and _reads_channels_last(images):
            weight = _LaidOut.apply(weight, surrounding_autocast(weight.device, weight.dtype))
        return super()._conv_forward(images, weight, bias)


class _LaidOut(torch.autograd.Function):
    """A weight in the type and the layout that a convolution reads, and its gradient in those of the weight."""

    @staticmethod
    def forward(ctx, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = weight.dtype
        return torch.empty_like(weight, dtype=dtype, memory_format=torch.channels_last).copy_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype, memory_format=torch.contiguous_format), None


def _reads_channels_last(images: Tensor) -> bool:
    return images.is_cuda and images.is_contiguous(memory_format=torch.channels_last)


def lay_out(images: Tensor) -> Tensor:
    """The layout in which convolutions are fast: channels-last on a GPU; on a CPU the weights' own, contiguous one."""
    return images.contiguous(memory_format=torch.channels_last if images.is_cuda else torch.contiguous_format)


def lay_out_weights(model: nn.Module) -> None:
    """Have the convolutions of torch's own kind copy their weights once where they would be copied twice."""
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = LaidOutConv2d


class PaddedConv2d(LaidOutConv2d):
    """A convolution of three channels, computed with a fourth channel of zeros in images and weights."""

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> what nn.Conv2d gives, up to the order of sums."""
        images, weight = (F.pad(each, (0, 0, 0, 0, 0, 1)) for each in (images, self.weight))
        return self._conv_forward(images, weight, self.bias)


def pad_stems(model: nn.Module) -> None:
    """Let every convolution over an image's three channels read four (engine.padded_stem).

    Raises ConfigError if there is none of torch's own kind.
    """
    found = {
        name: m for name, m in model.named_modules() if type(m) is nn.Conv2d and (m.in_channels, m.groups) == (3, 1)
    }
    if not found:
        raise ConfigError(
            "engine.padded_stem: no plain convolution of three channels in this backbone; set it to false"
        )
    for name, conv in found.items():
        geometry = conv.kernel_size, conv.stride, conv.padding, conv.dilation
        padded = PaddedConv2d(3, conv.out_channels, *geometry, padding_mode=conv.padding_mode, device="meta")
        padded.weight, padded.bias = conv.weight, conv.bias
        model.set_submodule(name, padded)
