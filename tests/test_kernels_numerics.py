"""The Triton kernels against float64, compiled on a GPU or in Triton's interpreter on the CPU.

The rule: inputs are drawn in the type under test and promoted for the oracle; a kernel's largest error may not exceed
that of the same formula in plain PyTorch in that type by more than one rounding of its result (`assert_within_budget`
names the exceptions). Every output buffer holds NaN before a kernel writes it.

The interpreter has to be chosen when the process starts: test_kernels_interpreter.py runs this file so.
"""

import weakref

import numpy as np
import pytest
import torch
from automix_kernels import api, reference

DEVICE = "cpu" if api.INTERPRETED else "cuda"
if not api.HAS_TRITON or not (api.INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or the interpreter (test_kernels_interpreter.py)", allow_module_level=True)

from automix_kernels import batch_norm_relu, momentum  # noqa: E402

pytestmark = [] if api.INTERPRETED else pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MEAN, STD = torch.tensor([0.485, 0.456, 0.406], device=DEVICE), torch.tensor([0.229, 0.224, 0.225], device=DEVICE)


@pytest.fixture(autouse=True)
def interpreter_that_computes_as_a_gpu(monkeypatch):
    """Where Triton's interpreter (3.6 to 3.9) does not.

    A matrix unit gives the same bits for a product and its transpose, as the backward pass needs for scores of 1e4. The
    interpreter's product is NumPy's, which does so on some processors only; here it is rounded once, from float64.
    bfloat16 is held as 16 bits of an integer, which the interpreter multiplies as if they were the number, and to which
    it cuts float32 where a GPU rounds to the nearest.
    """
    if not api.INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_cast = InterpreterBuilder.cast_impl

    def widened(operand):
        data = operand.data
        if operand.dtype.scalar == tl.bfloat16:
            data = (data.astype(np.uint32) << 16).view(np.float32)
        return data.astype(np.float64)

    def create_dot(self, a, b, accumulator, *_):
        product = np.matmul(widened(a), widened(b)).astype(accumulator.data.dtype)
        return TensorHandle(product + accumulator.data, accumulator.dtype.scalar)

    def cast_impl(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return TensorHandle(torch.tensor(source.data).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)
        return plain_cast(self, source, target)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """New memory holds NaN, so that an element no kernel writes cannot pass for a right one."""

    def poison(function):
        def wrapper(*args, **kwargs):
            tensor = function(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapper

    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


def generator(seed=0):
    """Of the CPU: a GPU's draws other numbers, and what was tried in the interpreter would say nothing about them."""
    return torch.Generator().manual_seed(seed)


def assert_same_sums(ours, theirs, dtype=torch.float32):
    """Equal but for a few roundings: for other strides or another number of draws a kernel is compiled anew, and then
    the compiler lays out sums and fuses multiplications with additions as it likes. `dtype`: what goes into the sums.
    """
    rounding = max(torch.finfo(each).eps for each in (ours.dtype, dtype)) + 16 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding * theirs.abs().max().item())


def assert_within_budget(
    actual, eager, exact, name, summands=0.0, by_chance=False, product=False, sigmoid=False, sharp=True
):
    """actual may err as much as eager does, plus one rounding at the size of the largest exact value.

    In float32 both are the same sums in another order, and which of them comes nearer is chance: there it is twice as
    much, plus four roundings. `by_chance`: so too where another type's errors are those of float32 sums. `product`:
    eight times all that in float32, of which a matrix unit's three tf32 products leave out the last three bits.
    `summands`: the norm of what one number is the sum of, where its parts cancel. `sigmoid`: four roundings more, as a
    GPU's powers of two and quotients have up to two each, all in one direction perhaps. A result of zeros must be
    outside the budget, unless it is right, or the sums cancel, or not `sharp`.
    """
    assert actual.isfinite().all(), name
    error = (actual.double() - exact).abs().max()
    eager_error = (eager.double() - exact).abs().max()
    rounding = torch.finfo(actual.dtype).eps / 2 * max(exact.abs().max(), summands)
    share, roundings = (2, 4) if by_chance or eager.dtype == torch.float32 else (1, 1)
    if product and eager.dtype == torch.float32:
        share, roundings = 8 * share, 8 * roundings
    roundings += 4 * sigmoid
    budget = share * eager_error + roundings * rounding
    largest = exact.abs().max()
    assert summands or not sharp or largest < 1e-40 or budget < largest / 2, f"{name}: a budget that zeros meet"
    assert error <= budget, f"{name}: {error:.3g} > {share} * {eager_error:.3g} + {roundings} * {rounding:.3g}"


def eager_attention(projection, value, partner, lam, query_lambda, query_bias, value_lambda, value_bias):
    """The definition in the inputs' own type."""
    dtype = projection.dtype
    queries = projection
    if query_lambda is not None:
        queries = queries + (lam[:, None, None] * query_lambda).to(dtype)
    if query_bias is not None:
        queries = queries + query_bias.to(dtype)
    scores = torch.bmm(queries * projection.shape[2] ** -0.5, projection[partner].transpose(1, 2))
    logits = torch.bmm(scores.softmax(dim=2), value[partner].unsqueeze(2)).squeeze(2)
    if value_lambda is not None:
        logits = logits + ((1 - lam)[:, None] * value_lambda).to(dtype)
    if value_bias is not None:
        logits = logits + value_bias.to(dtype)
    return logits


def run(function, tensors, grad):
    """Output and gradients of every floating-point leaf that requires one."""
    output = function(*tensors)
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))], output


def copies(tensors, dtype=None):
    """Fresh leaves; `dtype` replaces every floating-point type."""
    return [
        None if t is None else t.detach().to(dtype if dtype and t.is_floating_point() else t.dtype)
        .requires_grad_(t.requires_grad)
        for t in tensors
    ]  # fmt: skip


def check_attention(tensors, seed=1, by_chance=False, saturated=False):
    """All of forward and backward within the budget, by way of the Triton operator; returns our results. `saturated`:
    softmax leaves one position, and the projection's gradient is what is left of large sums that cancel."""
    batch, positions, _ = tensors[0].shape
    grad = torch.randn(batch, positions, generator=generator(seed)).to(DEVICE)
    actual, output = run(lambda *a: api.mix_attention(*a, implementation="triton"), tensors, grad)
    assert "automix_mix_attention" in output.grad_fn.name()
    eager, _ = run(eager_attention, copies(tensors), grad)
    exact, _ = run(reference.mix_attention, copies(tensors, torch.float64), grad.double())
    names = ["logits"] + [
        name
        for name, t in zip(
            ("projection", "value", "", "", "query_lambda", "query_bias", "value_lambda", "value_bias"),
            tensors, strict=True,
        ) if t is not None and t.requires_grad
    ]  # fmt: skip
    for name, ours, theirs, truth in zip(names, actual, eager, exact, strict=True):
        summands = grad.norm() if name in ("value_lambda", "value_bias") else 0.0
        if saturated and name == "projection":
            projection, value = (each.detach().abs().max().double() for each in tensors[:2])
            summands = grad.norm() * value * projection * tensors[0].shape[2] ** -0.5
        sharp = not saturated or name not in ("projection", "query_lambda", "query_bias")
        assert_within_budget(ours, theirs, truth, name, summands, by_chance, product=True, sharp=sharp)
    return actual


def attention_tensors(batch, positions, channels, dtype, partner=None, lam=None, parameters=(1, 1, 1, 1), scale=1.0):
    g = generator()
    if partner is None:  # another image: of large equal ones the gradient is nearly zero, whatever a kernel does
        partner = torch.arange(batch).roll(1)
    sizes = (channels, channels, 1, 1)
    return [
        (scale * torch.randn(batch, positions, channels, generator=g).to(DEVICE)).to(dtype).requires_grad_(),
        torch.randn(batch, positions, generator=g).to(DEVICE).to(dtype).requires_grad_(),
        torch.as_tensor(partner, device=DEVICE),
        torch.rand(batch, generator=g).to(DEVICE) if lam is None else torch.tensor(lam, device=DEVICE),
        *(
            torch.randn(size, generator=g).to(DEVICE).requires_grad_() if wanted else None
            for size, wanted in zip(sizes, parameters, strict=True)
        ),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "positions", "channels"),
    [(3, 49, 128), (2, 196, 192), (2, 64, 200), (3, 60, 16), (2, 37, 512), (2, 13, 17), (2, 289, 32), (1, 1, 16)],
)
def test_attention_shapes(batch, positions, channels, dtype):
    check_attention(attention_tensors(batch, positions, channels, dtype))


@pytest.mark.parametrize(("positions", "channels"), [(784, 16), (10, 1024)])
def test_attention_of_the_largest_map_and_the_widest_projection(positions, channels):
    check_attention(attention_tensors(2, positions, channels, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("partner", [[1, 1, 1, 1], [2, 0, 2, 0], [0, 1, 2, 3]])
def test_attention_partners_may_repeat(partner, dtype):
    check_attention(attention_tensors(4, 20, 32, dtype, partner))


def test_attention_duplicates_beyond_one_block_of_columns():
    check_attention(attention_tensors(3, 289, 16, torch.float16, [1, 1, 0]))


@pytest.mark.parametrize("parameters", [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 1, 0), (0, 0, 0, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_optional_parameters(parameters, dtype):
    check_attention(attention_tensors(2, 33, 24, dtype, parameters=parameters))


@pytest.mark.parametrize("lam", [[0.0, 1.0], [1.0, 1.0]])
def test_attention_lambda_at_its_ends(lam):
    check_attention(attention_tensors(2, 21, 16, torch.float32, lam=lam))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_extreme_scores(dtype):
    """Scores of about +-1e4 leave one position with all the weight; nothing overflows.

    float32 holds such a score to 1e-3 only, and with it the probability that the backward computes from it anew: more
    than float16's own rounding.
    """
    tensors = attention_tensors(2, 30, 64, dtype, [1, 1], scale=50.0)
    own = tensors[0].detach()[1].float()
    assert (own @ own.T / 8).abs().max() > 1e4
    check_attention(tensors, by_chance=dtype == torch.float16, saturated=True)


def test_attention_extreme_values():
    tensors = attention_tensors(2, 30, 32, torch.float16)
    tensors[1] = (1e4 * tensors[1].detach().sign()).requires_grad_()
    check_attention(tensors)


def test_attention_float16_keeps_tiny_gradients():
    """Gradients that float16 cannot hold, of a loss averaged over a large batch, survive inside the kernel."""
    tensors = attention_tensors(2, 40, 32, torch.float16)
    grad = 1e-8 * torch.randn(2, 40, generator=generator(3)).to(DEVICE)
    (actual,) = torch.autograd.grad(api.mix_attention(*tensors, implementation="triton"), tensors[4], grad)
    exact_tensors = copies(tensors, torch.float64)
    (exact,) = torch.autograd.grad(reference.mix_attention(*exact_tensors), exact_tensors[4], grad.double())
    assert (actual - exact).norm() <= 2e-3 * exact.norm()


@pytest.mark.parametrize("size", [1e-39, 1e-41, 0.0])
def test_attention_float16_bears_gradients_below_normal_numbers(size):
    """Of one pair; the other's are as ever. The values are as far apart as float16 has them."""
    projection, value, *rest = attention_tensors(2, 40, 32, torch.float16, [1, 0])
    for reach in (1.0, 65504.0):
        value = (reach * value.detach().sign()).requires_grad_()
        tensors = [projection, value, *rest]
        leaves = [t for t in tensors if t.requires_grad]
        grad = torch.randn(2, 40, generator=generator(3)).to(DEVICE)
        grad[1] = size
        together = torch.autograd.grad(api.mix_attention(*tensors, implementation="triton"), leaves, grad)
        grad[1] = 0.0
        alone = torch.autograd.grad(api.mix_attention(*tensors, implementation="triton"), leaves, grad)
        for ours, expected in zip(together, alone, strict=True):
            assert ours.isfinite().all()
            assert_same_sums(ours, expected)


def test_attention_float16_of_equal_values():
    """Their attention's gradient is nothing but rounding, by which nothing may be divided."""
    tensors = attention_tensors(2, 40, 32, torch.float16)
    tensors[1] = torch.full_like(tensors[1], 1000.1).requires_grad_()
    leaves = [t for t in tensors if t.requires_grad]
    grad = 100 * torch.randn(2, 40, generator=generator(3)).to(DEVICE)
    grads = torch.autograd.grad(api.mix_attention(*tensors, implementation="triton"), leaves, grad)
    assert all(each.isfinite().all() for each in grads) and grads[0].abs().max() < 0.1


def test_attention_reads_slices_in_place():
    """A projection and a value that are columns of one wider product, and a weight that is a column of a matrix."""
    tensors = attention_tensors(3, 20, 24, torch.float32)
    dense = check_attention(tensors)
    wide = torch.randn(3, 20, 32, generator=generator(5)).to(DEVICE)
    wide[:, :, :24], wide[:, :, 24] = tensors[0].detach(), tensors[1].detach()
    weight = torch.randn(24, 5, generator=generator(6)).to(DEVICE)
    weight[:, -1] = tensors[4].detach()
    sliced = [wide[:, :, :24].requires_grad_(), wide[:, :, 24].requires_grad_(), *tensors[2:]]
    sliced[4] = weight[:, -1].requires_grad_()
    assert not any(sliced[i].is_contiguous() for i in (0, 1, 4))
    for ours, expected in zip(check_attention(sliced), dense, strict=True):
        assert_same_sums(ours, expected)
    transposed = [tensors[0].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(), *tensors[1:]]
    for ours, expected in zip(check_attention(transposed), dense, strict=True):
        assert_same_sums(ours, expected)


@pytest.mark.parametrize("columns", [25, 32])
@pytest.mark.parametrize(("positions", "dtype"), [(20, torch.float32), (40, torch.bfloat16), (289, torch.float16)])
def test_attention_with_the_value_inside_the_projection(positions, dtype, columns):
    """The numbers of a value apart; columns beyond it are read by nobody, and their gradient is zero."""
    projection, value, *rest = attention_tensors(2, positions, 24, dtype, [1, 1])
    wide = torch.full((2, positions, columns), torch.nan, dtype=dtype, device=DEVICE)
    wide[:, :, :24], wide[:, :, 24] = projection.detach(), value.detach()
    grad = torch.randn(2, positions, generator=generator(3)).to(DEVICE)
    leaves, logits, grads = {}, {}, {}
    for name, tensors in (("apart", [projection, value, *rest]), ("inside", [wide.requires_grad_(), None, *rest, 24])):
        leaves[name] = [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]
        logits[name] = api.mix_attention(*tensors, implementation="triton")
        grads[name] = torch.autograd.grad(logits[name], leaves[name], grad)
    assert_same_sums(logits["inside"], logits["apart"])
    grad_wide, *parameters = grads["inside"]
    assert not grad_wide[:, :, 25:].any()
    for ours, expected in zip((grad_wide[:, :, :24], grad_wide[:, :, 24], *parameters), grads["apart"], strict=True):
        assert_same_sums(ours, expected, dtype)


@pytest.mark.parametrize("parameters", [(1, 1, 1, 1), (0, 0, 0, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_draws_side_by_side_are_draws_apart(dtype, parameters):
    """But for rounding; only the first one has a gradient."""
    tensors = attention_tensors(4, 70, 24, dtype, parameters=parameters)
    partner = torch.tensor([[1, 0, 3, 2], [1, 1, 0, 2], [0, 1, 2, 3]], device=DEVICE)
    lam = torch.rand(3, 4, generator=generator(4)).to(DEVICE)
    grad = torch.randn(4, 70, generator=generator(3)).to(DEVICE)
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    together = api.mix_attention(*tensors[:2], partner, lam, *tensors[4:], implementation="triton")
    gradients = torch.autograd.grad(together[0], leaves, grad)
    assert [each.requires_grad for each in together] == [True, False, False]
    for i, (each, *draw) in enumerate(zip(together, partner, lam, strict=True)):
        apart = api.mix_attention(*tensors[:2], *draw, *tensors[4:], implementation="triton")
        assert_same_sums(each, apart)
        if i == 0:
            for ours, expected in zip(gradients, torch.autograd.grad(apart, leaves, grad), strict=True):
                assert_same_sums(ours, expected, dtype)


@pytest.mark.skipif(api.INTERPRETED, reason="the interpreter has one order of doing things")
def test_attention_gives_the_same_bits_twice():
    for dtype in DTYPES:
        tensors = attention_tensors(4, 50, 48, dtype, [1, 1, 0, 2])
        for first, second in zip(check_attention(tensors), check_attention(tensors), strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "channels"), [(3, 5), (16, 1024), (1, 2050)])
@pytest.mark.parametrize("with_lambda", [True, False])
def test_split_weights(width, channels, with_lambda, dtype):
    """To the bit what slices and casts give, and their gradients; of a weight that is no dense matrix, too."""
    columns = channels + with_lambda
    query = torch.randn(columns, width, generator=generator()).to(DEVICE).T
    leaves = [query.requires_grad_(), torch.randn(1, columns, generator=generator(1)).to(DEVICE).requires_grad_()]
    joined, query_lambda, value_lambda = api.split_weights(*leaves, channels, dtype, implementation="triton")
    assert joined.is_contiguous() and len(joined) % 16 == 0 and not joined[width + 1 :].any()
    assert torch.equal(joined[: width + 1], torch.cat(leaves)[:, :channels].to(dtype))
    parts, grads = [joined], [torch.randn(joined.shape, device=DEVICE).to(dtype)]
    expected = [grads[0][:width].float(), grads[0][width : width + 1].float()]
    if with_lambda:
        assert torch.equal(query_lambda, leaves[0][:, -1]) and torch.equal(value_lambda, leaves[1][:, -1])
        parts += [query_lambda, value_lambda]
        grads += [torch.randn(part.shape, device=DEVICE) for part in parts[1:]]
        expected = [torch.cat([grad, grads[i + 1][:, None]], dim=1) for i, grad in enumerate(expected)]
    else:
        assert query_lambda is value_lambda is None
    for ours, theirs in zip(torch.autograd.grad(parts, leaves, grads), expected, strict=True):
        assert torch.equal(ours, theirs)


def blend_inputs(batch, cells, factors, kind, dtype=torch.float32, seed=0):
    g = generator(seed)
    size = tuple(n * f for n, f in zip(cells, factors, strict=True))
    logits = (3 * torch.randn(batch, *cells, generator=g).to(DEVICE)).to(dtype).requires_grad_()
    if kind == "uint8":
        images = torch.randint(0, 256, (batch, *size, 3), generator=g, dtype=torch.uint8).to(DEVICE)
    else:
        images = torch.randn(batch, 3, *size, generator=g).to(DEVICE).to(dtype)
        if kind == "channels_last":
            images = images.contiguous(memory_format=torch.channels_last)
        if kind == "strided":
            images = images.flip(3).transpose(2, 3).contiguous().transpose(2, 3)
    partner = torch.randperm(batch, generator=g).roll(1).to(DEVICE)
    return logits, images, partner, torch.rand(batch, generator=g).to(DEVICE)


def eager_blend(logits, images, partner, lam, mode, lam_margin, dtype):
    """The definition with the pixels in `dtype`."""
    normalized = reference.normalize(images, MEAN, STD, dtype)
    mask = reference._mask(logits, lam, tuple(normalized.shape[2:]), mode, lam_margin)
    mixed = torch.lerp(normalized, normalized[partner], mask.unsqueeze(1).to(dtype))
    return mixed, mask.mean(dim=(1, 2)), mask.square().mean(dim=(1, 2))


def check_blend(logits, images, partner, lam, mode, lam_margin=None, dtype=torch.float32, wanted=(1, 1, 1)):
    def grads_of(outputs, leaf):
        used = [(o, g.to(o.dtype)) for o, g, want in zip(outputs, grads, wanted, strict=True) if want]
        return torch.autograd.grad([o for o, _ in used], leaf, [g for _, g in used])[0]

    actual = api.mask_blend(logits, images, partner, lam, MEAN, STD, mode, lam_margin, dtype, implementation="triton")
    assert "automix_mask_blend" in actual[0].grad_fn.name()
    assert actual[0].is_contiguous(memory_format=torch.channels_last) and actual[0].dtype == dtype
    assert actual[1].dtype == actual[2].dtype == torch.float32
    grads = [torch.randn(o.shape, generator=generator(7)).to(DEVICE) for o in actual]
    logits_eager, logits_exact = logits.detach().requires_grad_(), logits.detach().double().requires_grad_()
    eager = eager_blend(logits_eager, images, partner, lam, mode, lam_margin, dtype)
    exact_images = images if images.dtype == torch.uint8 else images.double()
    # The comparison with the margin is one of float32 numbers.
    exact_lam = lam.double()
    if lam_margin is not None:
        exact_lam = exact_lam.masked_fill(reference.is_plain(lam, lam_margin), -1.0)
    exact = list(eager_exact(logits_exact, exact_images, partner, lam, exact_lam, mode))
    for name, ours, theirs, truth in zip(("mixed", "mean", "square mean"), actual, eager, exact, strict=True):
        assert_within_budget(ours, theirs, truth, name, sigmoid=True)
    ours = grads_of(actual, logits)
    assert_within_budget(ours, grads_of(eager, logits_eager), grads_of(exact, logits_exact), "logits", sigmoid=True)
    return [*(output.detach() for output in actual), ours]


def eager_exact(logits, images, partner, lam, marked_lam, mode):
    """float64; images marked by a lambda of -1 have the constant mask."""
    mean, std = MEAN.double(), STD.double()
    normalized = reference.normalize(images, mean, std, torch.float64)
    mask = reference.upsample_mask(logits, tuple(normalized.shape[2:]), mode)
    mask = torch.where((marked_lam < 0)[:, None, None], (1 - lam.double())[:, None, None], mask)
    mixed = torch.lerp(normalized, normalized[partner], mask.unsqueeze(1))
    return mixed, mask.mean(dim=(1, 2)), mask.square().mean(dim=(1, 2))


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("kind", ["uint8", "channels_last", "planar", "strided"])
@pytest.mark.parametrize(
    ("cells", "factors"),
    [((4, 4), (4, 4)), ((3, 5), (5, 3)), ((2, 7), (16, 2)), ((3, 3), (1, 1)), ((1, 2), (7, 33))],
)
def test_blend_shapes(cells, factors, kind, mode):
    check_blend(*blend_inputs(2, cells, factors, kind), mode)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_blend_with_a_map_of_28_x_28(mode):
    check_blend(*blend_inputs(1, (28, 28), (2, 2), "uint8"), mode, dtype=torch.bfloat16)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_blend_low_precision_output(dtype, mode):
    check_blend(*blend_inputs(3, (3, 2), (4, 6), "uint8"), mode, dtype=dtype)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_blend_low_precision_inputs(dtype, mode):
    check_blend(*blend_inputs(2, (3, 2), (4, 6), "planar", dtype), mode, dtype=dtype)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_blend_gradient_of_each_output(wanted, mode):
    check_blend(*blend_inputs(2, (3, 4), (4, 4), "uint8"), mode, wanted=wanted)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_blend_margin(mode):
    """0.08 itself is inside the margin, its neighbour is not; samples inside have no gradient. Nor have lambda 0 and 1
    with a margin of 0, as in the published code."""
    logits, images, partner, _ = blend_inputs(6, (1, 2), (4, 4), "uint8")
    lam = torch.tensor([0.08, 0.0, 0.92, 1.0, 0.0801, 0.5], device=DEVICE)
    *_, grad = check_blend(logits, images, partner, lam, mode, 0.08)
    assert not grad[:4].any() and grad[4:].any(dim=(1, 2)).all()
    *_, grad = check_blend(logits, images, partner, lam, mode, 0.0)
    assert grad.any(dim=(1, 2)).tolist() == [True, False, True, False, True, True]
    *_, grad = check_blend(logits, images, partner, lam, mode, None)
    assert grad.any(dim=(1, 2)).all()


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("num_mixed", [0, 2])
def test_blend_of_the_first_images_is_that_of_all(mode, num_mixed):
    """And the gradient of a mean over the batch, which is one number for all images, is read in place."""
    logits, images, partner, lam = blend_inputs(4, (3, 2), (4, 5), "uint8")
    arguments = (logits, images, partner, lam, MEAN, STD, mode, None, torch.float32)
    mixed, *means = api.mask_blend(*arguments, num_mixed, implementation="triton")
    whole, *expected_means = api.mask_blend(*arguments, implementation="triton")
    assert mixed.isfinite().all() and torch.equal(mixed, whole[:num_mixed])
    assert all(map(torch.equal, means, expected_means))
    grad = torch.randn(mixed.shape, generator=generator(3)).to(DEVICE)
    (ours,) = torch.autograd.grad([mixed, *(each.mean() for each in means)], logits, [grad, None, None])
    padded = torch.cat([grad, torch.zeros_like(whole[num_mixed:])])
    quarter = torch.full((4,), 0.25, device=DEVICE)
    (expected,) = torch.autograd.grad([whole, *expected_means], logits, [padded, quarter, quarter])
    assert_same_sums(ours, expected)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_blend_extreme_logits(mode):
    logits, *rest = blend_inputs(2, (3, 3), (4, 4), "uint8")
    check_blend((1e4 * logits.detach().sign()).requires_grad_(), *rest, mode)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_blend_of_one_image_with_itself(mode):
    logits, images, partner, lam = blend_inputs(1, (3, 3), (4, 4), "uint8")
    mixed, *_ = check_blend(logits, images, partner, lam, mode)
    torch.testing.assert_close(mixed, reference.normalize(images, MEAN, STD), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(api.INTERPRETED, reason="the interpreter has one order of doing things")
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_blend_gives_the_same_bits_twice(mode):
    inputs = blend_inputs(3, (3, 5), (5, 3), "uint8")
    for first, second in zip(check_blend(*inputs, mode), check_blend(*inputs, mode), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 3, 1, 2), (0, 2, 3, 1)])
def test_blend_of_views(order):
    """uint8 images whose memory is in another order, one of which torch would call channels-last."""
    logits, images, partner, lam = blend_inputs(2, (3, 2), (4, 4), "uint8")
    inverse = [order.index(i) for i in range(4)]
    view = images.permute(order).contiguous().permute(inverse)
    assert not view.is_contiguous()
    for ours, expected in zip(
        check_blend(logits, view, partner, lam, "nearest"),
        check_blend(logits, images, partner, lam, "nearest"),
        strict=True,
    ):
        assert torch.equal(ours, expected)


def test_a_gradient_in_another_layout():
    """The mixed images' gradient may arrive planar."""
    logits, images, partner, lam = blend_inputs(2, (3, 3), (4, 4), "uint8")
    mixed, *_ = api.mask_blend(logits, images, partner, lam, MEAN, STD, "nearest", implementation="triton")
    grad = torch.randn(mixed.shape, generator=generator(2)).to(DEVICE)
    (planar,) = torch.autograd.grad(mixed, logits, grad.contiguous(), retain_graph=True)
    (channels_last,) = torch.autograd.grad(mixed, logits, grad.contiguous(memory_format=torch.channels_last))
    assert torch.equal(planar, channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 1, 1), (3, 5, 7), (2, 64, 96), (1, 13, 157)])
def test_normalize(batch, height, width, dtype):
    shape = (batch, height, width, 3)
    images = torch.randint(0, 256, shape, generator=generator(), dtype=torch.uint8).to(DEVICE)
    exact = (images.double() / 255 - MEAN.double()) / STD.double()
    for each in (images, images.transpose(1, 2).contiguous().transpose(1, 2)):
        ours = api.normalize(each, MEAN, STD, dtype, implementation="triton")
        assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
        eager = reference.normalize(each, MEAN, STD, dtype)
        assert_within_budget(ours, eager, exact.permute(0, 3, 1, 2), "normalised")


@pytest.mark.parametrize("skip", [None, 0.0])
@pytest.mark.parametrize("coefficient", [0.999, 0.3, 0.0, 1.0])
def test_momentum(coefficient, skip):
    skip = skip if skip is None else torch.tensor(skip, device=DEVICE)
    g = generator()
    sizes = [(1,), (7,), (3, 5, 2), (9001,), (0,), (2, 8192)]
    types = [torch.float32, torch.bfloat16, torch.float16, torch.bfloat16, torch.float32, torch.float32]
    targets = [torch.randn(size, generator=g).to(DEVICE) for size in sizes]
    sources = [torch.randn(size, generator=g).to(DEVICE).to(t) for size, t in zip(sizes, types, strict=True)]
    unaligned = torch.randn(101, generator=g).to(DEVICE)
    targets, sources = [*targets, unaligned[1:51].clone()], [*sources, unaligned[51:]]
    for side in (targets, sources):  # weights of a convolution on a GPU
        weights = torch.randn(4, 3, 5, 5, generator=g).to(DEVICE)
        side.append(weights.contiguous(memory_format=torch.channels_last))
    expected = [t.double().lerp(s.double(), 1 - coefficient) for t, s in zip(targets, sources, strict=True)]
    eager = [t.lerp(s.float(), 1 - coefficient) for t, s in zip(targets, sources, strict=True)]
    for _ in range(2):  # the second time over the kept table
        updated = targets
        before = [t.clone() for t in targets]
        api.momentum_update(updated, sources, coefficient, skip, implementation="triton")
        for ours, theirs, exact in zip(updated, eager, expected, strict=True):
            if ours.numel():
                assert_within_budget(ours, theirs, exact, "target")
        for target, old in zip(targets, before, strict=True):
            target.copy_(old)


def test_momentum_skips():
    """A skipped step leaves the target's bits alone, whatever the source holds."""
    targets, sources = [torch.randn(9001, generator=generator()).to(DEVICE)], [torch.full((9001,), torch.nan)]
    sources = [sources[0].to(DEVICE)]
    before = targets[0].clone()
    api.momentum_update(targets, sources, 0.5, torch.ones((), device=DEVICE), implementation="triton")
    assert torch.equal(targets[0], before)


@pytest.mark.parametrize("capturing", [False, True])
def test_momentum_keeps_the_tables_that_a_cuda_graph_reads(capturing, monkeypatch):
    """However many other pointers come after them; of those without a graph the last few are kept."""
    tables = []

    def send(*arguments, send=momentum._send):
        tables.append(weakref.ref(table := send(*arguments)))
        return table

    monkeypatch.setattr(momentum, "_send", send)
    monkeypatch.setattr(momentum, "_captured", set())
    momentum._pointers.cache_clear()
    momentum._chunks.cache_clear()

    def update(count):
        targets, sources = ([torch.zeros(count, device=DEVICE)] for _ in range(2))
        api.momentum_update(targets, sources, 0.5, implementation="triton")

    with monkeypatch.context() as patch:
        patch.setattr(momentum, "_is_capturing", lambda device: capturing)
        update(101)
    for count in range(1, 10):
        update(count)
    assert len(tables) == 20 and tables[-1]() is not None
    assert [table() is not None for table in tables[:2]] == [capturing] * 2


def norm_tensors(shape, dtype, with_residual, offset=3.0, seed=0):
    """x, weight, bias and perhaps a residual, which have gradients, and the running statistics."""
    g, channels = generator(seed), shape[1]
    x = (torch.randn(shape, generator=g).to(DEVICE) * 2 + offset).to(dtype)
    weight, bias, mean = (torch.randn(channels, generator=g).to(DEVICE) for _ in range(3))
    residual = torch.randn(shape, generator=g).to(DEVICE).to(dtype) if with_residual else None
    leaves = [x.contiguous(memory_format=torch.channels_last), weight, bias, residual]
    running = [mean, torch.rand(channels, generator=g).to(DEVICE), torch.tensor(5, device=DEVICE)]
    return [each if each is None else each.requires_grad_() for each in leaves], running


def run_norm(function, leaves, running, grad, groups=1, dtype=None, **keywords):
    """The result, the gradients of all that has one, and the running statistics; `dtype` replaces every type."""
    x, weight, bias, residual = copies(leaves, dtype)
    running = [each.to(dtype) if dtype and each.is_floating_point() else each.clone() for each in running]
    y = function(x, weight, bias, *running, 0.1, 1e-5, residual, groups, **keywords)
    leaves = [each for each in (x, weight, bias, residual) if each is not None]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype)), *running]


NORM_NAMES = ["y", "x", "weight", "bias", "residual", "running mean", "running variance"]


def check_norm(leaves, running, groups=1, seed=1):
    """All of forward and backward within the budget; gradients flow where the ReLU's input is clear of zero."""
    x, weight, bias, residual = (each if each is None else each.detach() for each in leaves)
    dtype = x.dtype
    moments = [torch.var_mean(batch.double(), dim=(0, 2, 3), correction=0, keepdim=True) for batch in x.chunk(groups)]
    normal = torch.cat(
        [(b - mean) / (var + 1e-5).sqrt() for b, (var, mean) in zip(x.chunk(groups), moments, strict=True)]
    )
    input_of_relu = normal * weight[:, None, None] + bias[:, None, None]
    if residual is not None:
        input_of_relu += residual
    grad = torch.randn(x.shape, generator=generator(seed)).to(DEVICE).to(dtype)
    grad = grad.masked_fill(input_of_relu.abs() < (1e-3 if residual is None else 0.1), 0)
    arguments = leaves, running, grad, groups
    actual = run_norm(api.batch_norm_relu, *arguments, implementation="triton")
    eager = run_norm(reference.batch_norm_relu, *arguments)
    exact = run_norm(reference.batch_norm_relu, *arguments, torch.float64)
    assert actual[0].dtype == dtype and actual[0].is_contiguous(memory_format=torch.channels_last)
    *actual, count = actual
    assert count == eager.pop() == exact.pop() == 5 + groups
    names = [name for name in NORM_NAMES if residual is not None or name != "residual"]
    summed = grad.double().abs().sum(dim=(0, 2, 3)).max()
    for name, ours, theirs, truth in zip(names, actual, eager, exact, strict=True):
        summands = summed if name in ("weight", "bias") else 0.0
        by_chance = name not in ("y", "x", "residual")  # float32 in any case
        assert_within_budget(ours, theirs, truth, name, summands, by_chance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 3), (4, 5, 3, 3), (2, 130, 5, 9)], ids=str)
def test_batch_norm_relu(shape, with_residual, groups, dtype):
    check_norm(*norm_tensors(shape, dtype, with_residual), groups)


@pytest.mark.parametrize("with_residual", [False, True])
def test_batch_norm_relu_of_more_tiles_than_parts(with_residual, monkeypatch):
    monkeypatch.setattr(batch_norm_relu, "PROGRAMS", 7)
    check_norm(*norm_tensors((2, 130, 19, 17), torch.float32, with_residual))


def test_batch_norm_relu_keeps_its_digits_far_from_zero(monkeypatch):
    """A mean of a thousand deviations costs a sum of squares all its digits, and distances none: the variance has but
    the roundings of its sums, whatever torch's own is like."""
    monkeypatch.setattr(batch_norm_relu, "PROGRAMS", 4)
    monkeypatch.setattr(batch_norm_relu, "FORWARD_TILE", 512)
    leaves, running = norm_tensors((4, 8, 16, 16), torch.float32, False, offset=2000.0)
    before = running[1].double()
    batch_norm_relu.batch_moments(leaves[0].detach(), *running, 0.1, 1e-5, 1)
    exact = 0.9 * before + 0.1 * leaves[0].double().var(dim=(0, 2, 3))
    assert ((running[1] - exact) / exact).abs().max() < 8 * torch.finfo(torch.float32).eps / 2


def test_batch_norm_relu_of_constant_channels():
    (x, *others), running = norm_tensors((4, 8, 3, 3), torch.float32, False)
    x = torch.full_like(x, 7.0).requires_grad_()
    y, grad_x, *_, variance, _ = run_norm(
        api.batch_norm_relu, [x, *others], running, torch.ones_like(x), implementation="triton"
    )
    assert torch.equal(y, others[1].detach().relu()[:, None, None].expand_as(y)) and grad_x.isfinite().all()
    torch.testing.assert_close(variance, 0.9 * running[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_batch_norm_relu_hides_no_number_that_is_not_finite(bad):
    """Steps are skipped by it; max(NaN, 0) of a GPU would be 0."""
    (x, *others), running = norm_tensors((4, 8, 3, 3), torch.float32, True)
    with torch.no_grad():
        x[2, 5, 1, 1] = bad
    y, *grads, mean, variance, _ = run_norm(
        api.batch_norm_relu, [x, *others], running, torch.ones_like(x), implementation="triton"
    )
    expected = torch.arange(8, device=DEVICE) == 5
    for each in (y, grads[0]):
        assert torch.equal(~each.isfinite().all(dim=(0, 2, 3)), expected)
    for each in (grads[1], mean, variance):
        assert torch.equal(~each.isfinite(), expected)


def test_batch_norm_relu_of_other_layouts():
    """Planar and strided maps, and a gradient that one number stands for, have the bits of channels-last ones."""
    leaves, running = norm_tensors((4, 6, 5, 7), torch.float32, True)
    grad = torch.full_like(leaves[0], 0.5)
    keywords = {"implementation": "triton"}
    expected = run_norm(api.batch_norm_relu, leaves, running, grad, **keywords)
    x, residual = leaves[0].detach(), leaves[3].detach()
    planar = [x.contiguous(), residual.mT.contiguous().mT]
    half = torch.full((), 0.5, device=DEVICE).expand(x.shape)
    tensors = [planar[0].requires_grad_(), *leaves[1:3], planar[1].requires_grad_()]
    for ours, theirs in zip(run_norm(api.batch_norm_relu, tensors, running, half, **keywords), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(api.INTERPRETED, reason="the interpreter is no GPU")
@pytest.mark.parametrize("with_residual", [False, True])
def test_batch_norm_relu_gives_the_same_bits_twice_and_in_a_cuda_graph(with_residual):
    leaves, running = norm_tensors((64, 256, 14, 14), torch.bfloat16, with_residual)
    grad = torch.randn_like(leaves[0])
    known = [each for each in leaves if each is not None]

    def step():
        y = api.batch_norm_relu(*leaves[:3], *running, 0.1, 1e-5, leaves[3], implementation="triton")
        return [y.detach(), *torch.autograd.grad(y, known, grad), *running]

    before = [each.clone() for each in running]

    def again():
        for each, value in zip(running, before, strict=True):
            each.copy_(value)
        return [each.clone() for each in step()]

    first = again()
    assert all(map(torch.equal, again(), first))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        replayed = step()
    for each, value in zip(running, before, strict=True):
        each.copy_(value)
    graph.replay()
    assert all(map(torch.equal, replayed, first))


@pytest.mark.skipif(api.INTERPRETED, reason="the interpreter is no GPU")
def test_capture_in_a_cuda_graph():
    """Forward of two draws and backward of the block, replayed on new inputs, without a wait for the host."""
    _, _, partner, lam, *parameters = attention_tensors(4, 49, 64, torch.bfloat16)
    projection = torch.randn(4, 49, 80, device=DEVICE).bfloat16().requires_grad_()
    partner, lam = torch.stack([partner, partner.roll(1)]), torch.stack([lam, 1 - lam])
    _, images, _, _ = blend_inputs(4, (7, 7), (4, 4), "uint8")
    leaves = [projection, *parameters]

    def step():
        logits, other = api.mix_attention(projection, None, partner, lam, *parameters, 64, implementation="triton")
        mixed, mean, _ = api.mask_blend(
            logits.view(4, 7, 7), images, partner[0], lam[0], MEAN, STD, "nearest", 0.08, torch.bfloat16, 3,
            implementation="triton",
        )  # fmt: skip
        clean = api.normalize(images, MEAN, STD, torch.bfloat16, implementation="triton")
        return [clean, other, mixed, *torch.autograd.grad(mixed.float().square().mean() + mean.sum(), leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    with torch.no_grad():
        projection.copy_(torch.randn_like(projection))
        partner.copy_(partner.roll(1, dims=1))
    graph.replay()
    for ours, expected in zip(replayed, step(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.skipif(api.INTERPRETED, reason="inductor compiles for a GPU here")
def test_inductor_keeps_the_operators_whole():
    tensors = attention_tensors(4, 49, 64, torch.bfloat16)
    compiled = torch.compile(api.mix_attention, fullgraph=True)
    assert torch.equal(compiled(*tensors), api.mix_attention(*tensors))
    leaves, running = norm_tensors((4, 16, 7, 7), torch.bfloat16, True)
    arguments = leaves, running, torch.randn_like(leaves[0])
    expected = run_norm(api.batch_norm_relu, *arguments)
    compiled = torch.compile(api.batch_norm_relu, fullgraph=True)
    assert all(map(torch.equal, run_norm(compiled, *arguments), expected))
