"""Weights laid out for channels-last images: the same results, from fewer copies."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from automix_dist import convolutions
from automix_dist.backbone import create_backbone
from automix_dist.config import ModelConfig
from automix_dist.convolutions import LaidOutConv2d, lay_out_weights, pad_stems

KINDS = {
    "3x3": nn.Conv2d(8, 16, 3, padding=1),
    "1x1": nn.Conv2d(8, 16, 1, bias=False),
    "strided": nn.Conv2d(8, 16, 3, stride=2, bias=False),
    "depthwise": nn.Conv2d(8, 8, 7, padding=3, groups=8),
    "reflecting": nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"),
}


class Copies(TorchDispatchMode):
    """Counts the operators that copy a weight or a gradient of a weight's shape."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        copies = operator.name() in ("aten::_to_copy", "aten::copy_", "aten::clone")
        self.count += copies and result.shape == self.shape
        return result


@pytest.fixture
def on_any_device(monkeypatch):
    """On a CPU too, where weights are otherwise read as they are."""
    monkeypatch.setattr(
        convolutions, "_reads_channels_last", lambda images: images.is_contiguous(memory_format=torch.channels_last)
    )


def images(dtype: torch.dtype, size: int = 9) -> torch.Tensor:
    made = torch.randn(2, 8, size, size, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return made.contiguous(memory_format=torch.channels_last).requires_grad_()


def results(conv: nn.Conv2d, read: torch.Tensor) -> list[torch.Tensor]:
    output = conv(read)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output, *torch.autograd.grad(output, [read, *conv.parameters()], weights)]


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_plain_one_does(kind, on_any_device):
    plain = copy.deepcopy(KINDS[kind]).double()
    laid_out = copy.deepcopy(plain)
    lay_out_weights(laid_out)
    assert type(laid_out) is LaidOutConv2d and list(laid_out.state_dict()) == list(plain.state_dict())
    for got, expected in zip(
        results(laid_out, images(torch.float64)), results(plain, images(torch.float64)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(laid_out, images(torch.float64, size=7), fast_mode=True)
    assert torch.autograd.gradgradcheck(laid_out, images(torch.float64, size=7), fast_mode=True)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"reflecting"}))
def test_a_gradient_is_as_its_weight_is(kind, on_any_device):
    conv = copy.deepcopy(KINDS[kind])
    lay_out_weights(conv)
    with torch.autocast("cpu", torch.bfloat16):
        output, _, grad, *_ = results(conv, images(torch.float32))
    assert output.dtype == torch.bfloat16
    assert grad.dtype == torch.float32 and grad.stride() == conv.weight.stride()


def test_one_copy_of_the_weight_and_one_of_its_gradient(on_any_device):
    conv = copy.deepcopy(KINDS["3x3"])
    lay_out_weights(conv)
    read = images(torch.float32)
    with Copies(conv.weight.shape) as forward, torch.autocast("cpu", torch.bfloat16):
        output = conv(read)
    with Copies(conv.weight.shape) as backward:
        output.float().sum().backward()
    assert (forward.count, backward.count) == (1, 1)
    assert conv.weight.grad.is_contiguous()


def copies_of_the_weight(kind: str) -> int:
    conv = copy.deepcopy(KINDS[kind])
    lay_out_weights(conv)
    read = images(torch.float32)
    with Copies(conv.weight.shape) as copies:
        conv(read)
    return copies.count


def test_other_layouts_and_devices_are_left_alone():
    assert copies_of_the_weight("3x3") == 0


def test_so_are_paddings_that_make_an_image_of_their_own(on_any_device):
    """On a GPU a reflected border comes in a contiguous image, whatever the layout of the one inside."""
    assert copies_of_the_weight("reflecting") == 0


def test_a_copied_model_reads_its_own_weights(on_any_device):
    """As the momentum encoder is made; with a padded stem."""
    model = create_backbone(ModelConfig("resnet10t"), -2, 64)
    pad_stems(model)
    lay_out_weights(model)
    assert all(isinstance(module, LaidOutConv2d) for module in model.modules() if isinstance(module, nn.Conv2d))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    read = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    assert copied(read).abs().sum() > 0 and model(read).abs().sum() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"reflecting"}))  # whose padding's gradient is summed by atomics
def test_the_same_bits_on_a_gpu(kind, dtype):
    plain = copy.deepcopy(KINDS[kind]).cuda()
    laid_out = copy.deepcopy(plain)
    lay_out_weights(laid_out)
    read = images(torch.float32).detach().cuda().requires_grad_()
    with (
        torch.backends.cudnn.flags(enabled=True, deterministic=True),
        torch.autocast("cuda", dtype, enabled=dtype != torch.float32),
    ):
        for got, expected in zip(results(laid_out, read), results(plain, read), strict=True):
            assert torch.equal(got, expected)
