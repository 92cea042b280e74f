"""What torch asks of an operator (schema, autograd, shapes without data, tracing), of the definitions on the CPU and of
the Triton code: on a GPU, and in Triton's interpreter, in which test_kernels_interpreter.py runs this file.
"""

import pytest
import torch
from test_kernels_api import attention_arguments, blend_arguments, norm_arguments

pytest.importorskip("triton")
from automix_kernels import batch_norm_relu, mix_attention, normalize, reference, split_weights
from torch.library import opcheck

operators = torch.ops.automix
pytestmark = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def on(device, values):
    return [each.to(device) if isinstance(each, torch.Tensor) else each for each in values]


@pytest.mark.parametrize("columns", [5, 6])
def test_split(columns, device):
    weights = on(device, [torch.randn(3, columns), torch.randn(1, columns)])
    opcheck(operators.split_weights.default, (*(each.requires_grad_() for each in weights), 5, torch.bfloat16))
    parts = split_weights.split_weights(*(each.detach() for each in weights), 5, torch.bfloat16)
    opcheck(operators.split_weights_backward.default, (*parts, 3))


@pytest.mark.parametrize("with_offset", [True, False])
def test_attention(with_offset, device):
    arguments = on(device, attention_arguments(batch=2).values())
    if not with_offset:
        arguments[4:] = [None, None, None, arguments[7]]
    leaves = [a.requires_grad_() if i in (0, 1, 4, 5, 6, 7) and a is not None else a for i, a in enumerate(arguments)]
    opcheck(operators.mix_attention.default, leaves)
    detached = [None if a is None else a.detach() for a in leaves]
    logits, _, *saved = mix_attention.mix_attention(*detached)
    opcheck(operators.mix_attention_backward.default, (logits, *detached[:6], *saved))
    leaves[2:4] = torch.stack([leaves[2], leaves[2].roll(1)]), torch.rand(2, 2, device=device)
    opcheck(operators.mix_attention.default, leaves)
    joined = torch.randn(2, 6, 16, device=device)
    opcheck(operators.mix_attention_backward.default, (logits, joined, None, *detached[2:6], *saved, 8))
    opcheck(operators.mix_attention.default, (joined.requires_grad_(), None, *leaves[2:], 8))


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_blend(mode, device):
    logits, *rest = on(device, blend_arguments(2, mode, 1, 2).values())
    opcheck(operators.mask_blend.default, (logits.requires_grad_(), *rest, 0.1, torch.bfloat16))
    opcheck(operators.mask_blend.default, (logits, *rest, 0.1, torch.bfloat16, 1))
    images, partner, lam, _, std, mode = rest
    for grads in (
        (torch.randn(2, 3, 2, 8), torch.randn(2), torch.randn(2)), (None, torch.ones(()).expand(2), None),
        (torch.randn(1, 3, 2, 8), None, None)
    ):  # fmt: skip
        arguments = (*on(device, grads), logits.detach(), images, partner, lam, std, mode, 0.1)
        opcheck(operators.mask_blend_backward.default, arguments)


def test_normalize(device):
    images, _, _, mean, std = on(device, list(blend_arguments(2, "nearest", 1, 2).values())[1:6])
    for each in (images, images.transpose(1, 2)):
        opcheck(operators.normalize.default, (each, mean, std, torch.bfloat16))
    compiled = torch.compile(normalize.normalize, fullgraph=True, backend="aot_eager")
    expected = reference.normalize(images, mean, std, torch.float16)
    torch.testing.assert_close(compiled(images, mean, std, torch.float16), expected)


def test_momentum(device):
    targets = on(device, [torch.randn(3), torch.randn(4)])
    sources = on(device, [torch.randn(3), torch.randn(4).bfloat16()])
    opcheck(operators.momentum_update.default, (targets, sources, 0.9))
    opcheck(operators.momentum_update.default, (targets, sources, 0.9, torch.tensor(1.0, device=device)))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("with_residual", [False, True])
def test_batch_norm_relu(groups, with_residual, device):
    x, weight, bias, *running, residual = on(device, norm_arguments().values())
    opcheck(operators.batch_moments.default, (x, *running, 0.1, 1e-5, groups))
    moments = batch_norm_relu.batch_moments(x, *running, 0.1, 1e-5, groups)
    residual = residual.requires_grad_() if with_residual else None
    leaves = (x.requires_grad_(), *moments, weight.requires_grad_(), bias.requires_grad_(), residual)
    opcheck(operators.batch_norm_relu.default, leaves)
    inputs = [each.detach() for each in leaves[:5]]
    y = batch_norm_relu.batch_norm_relu(*inputs, residual).detach() if with_residual else None
    opcheck(operators.batch_norm_relu_backward.default, (torch.randn_like(inputs[0]), *inputs, y))
