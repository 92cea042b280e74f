"""The definitions themselves: gradients, the written-out backward passes, and the properties the algebra rests on."""

import pytest
import torch
import torch.nn.functional as F
from automix_kernels import reference

IDENTITY_MEAN, IDENTITY_STD = torch.zeros(3), torch.ones(3)


def attention_inputs(batch, positions, channels, partner, offsets=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = [normal(batch, positions, channels), normal(batch, positions)]
    parameters = [normal(channels), normal(channels), normal(1), normal(1)] if offsets else [None] * 4
    return *tensors, torch.tensor(partner), torch.rand(batch, generator=generator, dtype=torch.float64), *parameters


def require_grads(tensors):
    return [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize("partner", [[2, 0, 1], [1, 1, 0], [0, 1, 2]])
@pytest.mark.parametrize("offsets", [True, False])
def test_gradcheck_of_attention(partner, offsets):
    projection, value, partner, lam, *parameters = attention_inputs(3, 5, 4, partner, offsets)
    leaves = [t for t in require_grads([projection, value, *parameters]) if t is not None]
    assert torch.autograd.gradcheck(
        lambda *_: reference.mix_attention(projection, value, partner, lam, *parameters), leaves
    )


@pytest.mark.parametrize("columns", [4, 5])
def test_weights_are_cut_and_their_gradients_put_together(columns):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, columns, generator=generator, dtype=torch.float64, requires_grad=True) for n in (3, 1)]
    assert torch.autograd.gradcheck(lambda *pair: reference.split_weights(*pair, 4, torch.float64), weights)
    parts = reference.split_weights(*weights, 4, torch.bfloat16)
    assert [part.dtype for part in parts] == [torch.bfloat16] + [torch.float64] * 2
    assert torch.equal(parts[0][:4], torch.cat(weights)[:, :4].bfloat16()) and not parts[0][4:].any()
    grads = [torch.randn(part.shape, generator=generator).to(part.dtype) for part in parts]
    expected = torch.autograd.grad(parts, weights, grads)
    actual = reference.split_weights_backward(*grads, 3)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, check_dtype=False)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("with_residual", [False, True])
def test_batch_norm_relu_in_parts_is_that_of_layers(with_residual, groups):
    """The definition, and what the kernels divide it into: moments, the map, and the written-out backward pass."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weight, bias, grad = normal(4, 3, 2, 5) * 2 + 1, normal(3), normal(3), normal(4, 3, 2, 5)
    residual = normal(4, 3, 2, 5).requires_grad_() if with_residual else None
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()] + [residual] * with_residual
    running = [normal(3), normal(3).abs(), torch.tensor(7)]
    layer = torch.nn.BatchNorm2d(3).double()
    layer.weight, layer.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    layer.running_mean, layer.running_var, layer.num_batches_tracked = (each.clone() for each in running)
    expected = torch.cat([layer(batch) for batch in x.chunk(groups)])
    expected = (expected if residual is None else expected + residual).relu()
    moved = [layer.running_mean, layer.running_var, layer.num_batches_tracked]

    whole = [each.clone() for each in running]
    y = reference.batch_norm_relu(x, weight, bias, *whole, 0.1, 1e-5, residual, groups)
    parts = [each.clone() for each in running]
    moments = reference.batch_moments(x.detach(), *parts, 0.1, 1e-5, groups)
    applied = reference.batch_norm_relu_apply(x, *moments, weight, bias, residual)
    for result, state in ((y, whole), (applied, parts)):
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(state, moved)

    by_autograd = torch.autograd.grad(y, leaves, grad)
    of_layer = torch.autograd.grad(expected, [x, layer.weight, layer.bias] + [residual] * with_residual, grad)
    detached = [each.detach() for each in (x, *moments, weight, bias)]
    found = reference.batch_norm_relu_backward(grad, *detached, applied.detach() if with_residual else None)
    torch.testing.assert_close(list(by_autograd), list(of_layer))
    torch.testing.assert_close(list(found[: len(leaves)]), list(of_layer))
    assert with_residual or not found[3].numel()


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_gradcheck_of_blend(mode, kind):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    lam = torch.tensor([0.3, 0.02, 0.9], dtype=torch.float64)
    if kind == "uint8":
        images = torch.randint(0, 256, (3, 6, 6, 3), generator=generator, dtype=torch.uint8)
    else:
        images = torch.randn(3, 3, 6, 6, generator=generator, dtype=torch.float64)
    mean, std = torch.rand(2, 3, generator=generator, dtype=torch.float64) + 0.1
    assert torch.autograd.gradcheck(
        lambda x: reference.mask_blend(x, images, torch.tensor([1, 2, 2]), lam, mean, std, mode, 0.05, torch.float64),
        [logits],
    )


@pytest.mark.parametrize("width", [1, 4])
def test_rows_of_the_product_begin_at_multiples_of_16(width):
    """One product is both: the features times the joined weight are projection and value, and zeros."""
    weights = torch.randn(width, 6), torch.randn(1, 6)
    features = torch.randn(2, 3, 5)
    joined, query_lambda, value_lambda = reference.split_weights(*weights, 5, torch.float32)
    assert joined.shape == (16, 5) and reference.joined_rows(15) == 16 and reference.joined_rows(16) == 32
    projection, value = reference.split_projection(F.linear(features, joined), None, width)
    torch.testing.assert_close(projection, features @ weights[0][:, :5].T)
    torch.testing.assert_close(value, (features @ weights[1][:, :5].T).squeeze(2))
    assert torch.equal(query_lambda, weights[0][:, 5]) and torch.equal(value_lambda, weights[1][:, 5])


@pytest.mark.parametrize("columns", [5, 8])
def test_attention_with_the_value_inside_the_projection(columns):
    """As with the value apart, in the definition and as written out; columns beyond it have no part in anything."""
    projection, value, partner, lam, *parameters = attention_inputs(3, 5, 4, [1, 1, 0])
    wide = torch.full((3, 5, columns), 7.0, dtype=torch.float64)
    wide[:, :, :4], wide[:, :, 4] = projection, value
    for draws in ((partner, lam), (torch.stack([partner, partner.flip(0)]), torch.stack([lam, 1 - lam]))):
        apart = reference.mix_attention(projection, value, *draws, *parameters)
        inside = reference.mix_attention(wide, None, *draws, *parameters, 4)
        torch.testing.assert_close(inside, apart, rtol=0, atol=0)
    forward = reference.mix_attention_forward(wide, None, partner, lam, *parameters, 4)
    grad_logits = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    saved = parameters[:2] + list(forward[2:])
    grad_wide, empty, *grads = reference.mix_attention_backward(grad_logits, wide, None, partner, lam, *saved, 4)
    expected = reference.mix_attention_backward(grad_logits, projection, value, partner, lam, *saved)
    assert empty.shape == (0,) and not grad_wide[:, :, 5:].any()
    for ours, theirs in zip((grad_wide[:, :, :4], grad_wide[:, :, 4], *grads), expected, strict=True):
        assert torch.equal(ours, theirs)
    inside = reference.mix_attention(wide.requires_grad_(), None, partner, lam, *parameters, 4)
    torch.testing.assert_close(torch.autograd.grad(inside, wide, grad_logits)[0], grad_wide, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("partner", [[2, 0, 1, 3], [1, 1, 1, 0]])
@pytest.mark.parametrize("offsets", [True, False])
def test_attention_backward_as_written_out(partner, offsets):
    projection, value, partner, lam, *parameters = attention_inputs(4, 7, 6, partner, offsets)
    logits, _, *saved = reference.mix_attention_forward(projection, value, partner, lam, *parameters)
    grad_logits = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = reference.mix_attention_backward(grad_logits, projection, value, partner, lam, *parameters[:2], *saved)
    leaves = [t for t in require_grads([projection, value, *parameters]) if t is not None]
    expected_logits = reference.mix_attention(projection, value, partner, lam, *parameters)
    expected = torch.autograd.grad(expected_logits, leaves, grad_logits)
    torch.testing.assert_close(logits, expected_logits.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads[:2], expected[:2], rtol=1e-12, atol=1e-12)
    if offsets:
        torch.testing.assert_close(grads[2], torch.stack(expected[2:4]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grads[3], torch.cat(expected[4:6]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("num_mixed", [0, 2])
def test_a_blend_of_the_first_images_is_that_of_all_cut_off(mode, num_mixed):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    images = torch.randint(0, 256, (4, 6, 8, 3), generator=generator, dtype=torch.uint8)
    partner, lam = torch.tensor([3, 2, 0, 1]), torch.full((4,), 0.5)
    arguments = (logits, images, partner, lam, torch.zeros(3), torch.ones(3), mode, None, torch.float64)
    mixed, *means = reference.mask_blend(*arguments, num_mixed)
    whole, *expected_means = reference.mask_blend(*arguments)
    assert torch.equal(mixed, whole[:num_mixed]) and all(map(torch.equal, means, expected_means))
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in (mixed, *means)]
    (expected,) = torch.autograd.grad([whole[:num_mixed], *expected_means], logits, grads)
    (actual,) = torch.autograd.grad([mixed, *means], logits, grads)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    written_out = reference.mask_blend_backward(
        *grads, logits.detach(), images, partner, lam, torch.ones(3), mode, None
    )  # fmt: skip
    torch.testing.assert_close(written_out, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("wanted", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_blend_backward_as_written_out(mode, wanted):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    images = torch.randint(0, 256, (4, 6, 8, 3), generator=generator, dtype=torch.uint8)
    partner, lam = torch.tensor([1, 0, 0, 3]), torch.tensor([0.2, 0.08, 0.92, 0.5], dtype=torch.float64)
    mean, std = torch.rand(2, 3, generator=generator, dtype=torch.float64) + 0.1
    arguments = (images, partner, lam, mean, std, mode, 0.1, torch.float64)
    outputs = reference.mask_blend(logits, *arguments)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64) if w else None
             for o, w in zip(outputs, wanted, strict=True)]  # fmt: skip
    used = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    (expected,) = torch.autograd.grad([o for o, _ in used], logits, [g for _, g in used])
    actual = reference.mask_blend_backward(*grads, logits.detach(), images, partner, lam, std, mode, 0.1)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    assert not actual[1].any() and not actual[2].any()  # within the margin: no gradient


def test_key_side_lambda_and_bias_cancel():
    """Lambda and bias on the keys add a constant to each softmax row: the published form gives the same logits."""
    projection, value, partner, lam, *parameters = attention_inputs(3, 6, 8, [1, 2, 0])
    query_lambda, query_bias, value_lambda, value_bias = parameters
    queries = projection + lam[:, None, None] * query_lambda + query_bias
    keys = projection[partner] + (1 - lam)[:, None, None] * query_lambda + query_bias
    values = value[partner] + (1 - lam)[:, None] * value_lambda + value_bias
    weights = (queries @ keys.transpose(1, 2) / 8**0.5).softmax(dim=2)
    expected = (weights @ values.unsqueeze(2)).squeeze(2)
    actual = reference.mix_attention(projection, value, partner, lam, *parameters)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("offsets", [True, False])
def test_draws_side_by_side_are_draws_apart(offsets):
    """Only the first has a gradient; and so in what the kernels compute."""
    projection, value, _, _, *parameters = attention_inputs(3, 5, 4, [0, 1, 2], offsets)
    partner, lam = torch.tensor([[1, 2, 0], [1, 1, 0], [0, 2, 1]]), torch.rand(3, 3, dtype=torch.float64)
    leaves = [t for t in require_grads([projection, value, *parameters]) if t is not None]
    together = reference.mix_attention(projection, value, partner, lam, *parameters)
    apart = [reference.mix_attention(projection, value, *draw, *parameters) for draw in zip(partner, lam, strict=True)]
    assert [each.requires_grad for each in together] == [True, False, False]
    for ours, expected in zip(together, apart, strict=True):
        assert torch.equal(ours, expected)
    grads = [torch.autograd.grad(each.square().sum(), leaves) for each in (together[0], apart[0])]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    first, others, *saved = reference.mix_attention_forward(projection, value, partner, lam, *parameters)
    torch.testing.assert_close([first, *others], apart, rtol=1e-12, atol=1e-12)
    alone = reference.mix_attention_forward(projection, value, partner[0], lam[0], *parameters)
    assert alone[1].shape == (0, 3, 5)
    for ours, expected in zip(saved, alone[2:], strict=True):
        assert torch.equal(ours, expected)


def test_attention_ignores_autocast():
    projection, value, partner, lam, *_ = attention_inputs(2, 5, 4, [1, 0], offsets=False)
    arguments = (projection.float(), value.float(), partner, lam.float())
    with torch.autocast("cpu", torch.bfloat16):
        inside = reference.mix_attention(*arguments)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, reference.mix_attention(*arguments))


@pytest.mark.parametrize("factor", [1, 3, 16, 41, 47])
def test_nearest_upsampling_repeats_cells(factor):
    logits = torch.randn(2, 5, 3)
    mask = reference.upsample_mask(logits, (5 * factor, 3 * factor), "nearest")
    expected = logits.repeat_interleave(factor, 1).repeat_interleave(factor, 2).sigmoid()
    torch.testing.assert_close(mask, expected, rtol=1e-6, atol=0)


def test_bilinear_upsampling_comes_before_the_sigmoid():
    logits = 10 * torch.randn(1, 4, 4)
    mask = reference.upsample_mask(logits, (16, 16), "bilinear")
    expected = F.interpolate(logits[None], size=(16, 16), mode="bilinear", align_corners=False)[0].sigmoid()
    assert torch.equal(mask, expected)


def test_another_upsampling_is_refused():
    with pytest.raises(ValueError, match="mode must be 'nearest' or 'bilinear', got 'bicubic'"):
        reference.upsample_mask(torch.randn(1, 4, 4), (16, 16), "bicubic")


def test_normalisation_matches_its_formula():
    images = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    normalized = reference.normalize(images, mean, std)
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(normalized.double(), expected, rtol=1e-6, atol=1e-6)


def test_lambda_at_the_margin_is_plain_mixup():
    images = torch.rand(3, 3, 4, 4)
    partner, lam = torch.tensor([1, 2, 0]), torch.tensor([0.08, 0.92, 0.5])
    mixed, mean, square_mean = reference.mask_blend(
        torch.randn(3, 2, 2), images, partner, lam, IDENTITY_MEAN, IDENTITY_STD, "nearest", 0.08
    )
    weight = (1 - lam)[:2, None, None, None]
    torch.testing.assert_close(mixed[:2], (1 - weight) * images[:2] + weight * images[partner[:2]])
    torch.testing.assert_close(mean[:2], 1 - lam[:2])
    torch.testing.assert_close(square_mean[:2], (1 - lam[:2]) ** 2)


@pytest.mark.parametrize(("margin", "plain"), [(0.0, [True, True, False]), (None, [False, False, False])])
def test_lambda_at_its_ends_is_plain_mixup_unless_there_is_no_margin(margin, plain):
    """As in the published code, which compares margin >= lambda and margin >= 1 - lambda."""
    lam, logits = torch.tensor([0.0, 1.0, 1e-6]), torch.zeros(3, 2, 2)
    arguments = (torch.rand(3, 3, 4, 4), torch.tensor([1, 2, 0]), lam, IDENTITY_MEAN, IDENTITY_STD, "nearest", margin)
    _, mean, _ = reference.mask_blend(logits, *arguments)
    expected = torch.where(torch.tensor(plain), 1 - lam, 0.5)
    torch.testing.assert_close(mean, expected)


def test_momentum_update_moves_by_its_share():
    targets = [torch.full((3,), 2.0), torch.zeros(2, 2)]
    sources = [torch.ones(3), torch.ones(2, 2, dtype=torch.bfloat16)]
    reference.momentum_update(targets, sources, 0.75)
    assert torch.equal(targets[0], torch.full((3,), 1.75)) and torch.equal(targets[1], torch.full((2, 2), 0.25))


@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_momentum_update_with_a_verdict_on_the_device(skip):
    targets, source = [torch.randn(50, generator=torch.Generator().manual_seed(0))], torch.ones(50)
    expected = targets[0].double() if skip else targets[0].double() * 0.99 + 0.01
    reference.momentum_update(targets, [source], 0.99, torch.tensor(skip))
    torch.testing.assert_close(targets[0].double(), expected, rtol=1e-6, atol=1e-7)
