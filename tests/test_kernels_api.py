"""The public operations: what they refuse, which implementation they pick, and the torch operators behind them.

Without a GPU the operators compute the definitions, which is what is compared here.
"""

from unittest import mock

import pytest
import torch
from automix_kernels import api, reference

pytest.importorskip("triton")
from automix_kernels import mask_blend, mix_attention

pytestmark = pytest.mark.skipif(api.INTERPRETED, reason="in the interpreter these operators run the Triton code")

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def attention_arguments(batch=3, positions=6, channels=8):
    generator = torch.Generator().manual_seed(0)
    return {
        "projection": torch.randn(batch, positions, channels, generator=generator),
        "value": torch.randn(batch, positions, generator=generator),
        "partner": torch.randperm(batch, generator=generator),
        "lam": torch.rand(batch, generator=generator),
        "query_lambda": torch.randn(channels, generator=generator),
        "query_bias": torch.randn(channels, generator=generator),
        "value_lambda": torch.randn(1, generator=generator),
        "value_bias": torch.randn(1, generator=generator),
    }


def blend_arguments(batch=3, mode="nearest", h=3, w=2):
    generator = torch.Generator().manual_seed(0)
    return {
        "logits": torch.randn(batch, h, w, generator=generator),
        "images": torch.randint(0, 256, (batch, 2 * h, 4 * w, 3), generator=generator, dtype=torch.uint8),
        "partner": torch.randperm(batch, generator=generator),
        "lam": torch.rand(batch, generator=generator),
        "mean": MEAN,
        "std": STD,
        "mode": mode,
    }


def norm_arguments(shape=(4, 3, 2, 5)):
    generator, channels = torch.Generator().manual_seed(0), shape[1]
    return {
        "x": torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last),
        "weight": torch.randn(channels, generator=generator),
        "bias": torch.randn(channels, generator=generator),
        "running_mean": torch.randn(channels, generator=generator),
        "running_var": torch.rand(channels, generator=generator),
        "num_batches": torch.tensor(3),
        "residual": torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last),
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 3)}, ValueError, r"x must have shape \[any, any, any, any\], got \[4, 3\]"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight must have shape \[3\], got \[4\]"),
        ({"running_var": torch.zeros(3, device="meta")}, ValueError, "running_var must be on cpu"),
        ({"num_batches": torch.tensor(3.0)}, TypeError, "num_batches must be torch.int64, got torch.float32"),
        ({"residual": torch.zeros(4, 3, 2, 5).half()}, TypeError, "residual must be torch.float32, got torch.float16"),
        ({"groups": 3}, ValueError, "groups must divide the batch of 4, got 3"),
        (
            {"x": torch.zeros(4, 3, 1, 1), "residual": None, "groups": 4}, ValueError,
            r"more than one number a channel .* got x of shape \[4, 3, 1, 1\]",
        ),
        ({"implementation": "triton"}, RuntimeError, "tensors are on cpu.*engine.kernels=reference"),
    ],
)  # fmt: skip
def test_batch_norm_relu_refuses(change, error, message):
    with pytest.raises(error, match=message):
        api.batch_norm_relu(**{**norm_arguments(), **change})


@pytest.mark.parametrize("name", ["weight", "running_mean", "running_var"])
def test_vectors_with_gaps_or_of_other_types_are_not_for_the_kernel(name):
    """Which would read beside them, and write."""
    for vector, message in ((torch.rand(6)[::2], "has gaps"), (torch.rand(3).half(), "is torch.float16")):
        arguments = {**norm_arguments(), name: vector, "implementation": "triton"}
        with mock.patch.object(api, "device_obstacle", lambda _: None), pytest.raises(RuntimeError, match=message):
            api.batch_norm_relu(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"projection": torch.zeros(3, 6)}, ValueError, r"projection must have shape \[any, any, any\], got \[3, 6\]"),
        ({"value": torch.zeros(3, 5)}, ValueError, r"value must have shape \[3, 6\], got \[3, 5\]"),
        ({"value": None}, ValueError, r"width must be that of queries and keys, 1..7, .* got None"),
        ({"value": None, "width": 8}, ValueError, r"width must be that of queries and keys, 1..7, .* got 8"),
        ({"width": 5}, ValueError, r"and else None; got 5"),
        ({"partner": torch.zeros(3, dtype=torch.int32)}, TypeError, "partner must be torch.int64, got torch.int32"),
        ({"lam": torch.zeros(2)}, ValueError, r"lam must have shape \[3\], got \[2\]"),
        ({"lam": 0.5}, TypeError, "lam must be a tensor, got float"),
        ({"lam": torch.zeros(3, requires_grad=True)}, ValueError, "lam gets no gradient"),
        ({"query_bias": torch.zeros(9)}, ValueError, r"query_bias must have shape \[8\], got \[9\]"),
        ({"value_bias": torch.zeros(1, dtype=torch.int64)}, TypeError, "value_bias must be of a floating-point type"),
        ({"value": torch.zeros(3, 6, device="meta")}, ValueError, "value must be on cpu like the first argument"),
        ({"implementation": "cuda"}, ValueError, "implementation must be 'auto', 'triton' or 'reference'"),
        ({"implementation": "triton"}, RuntimeError, "tensors are on cpu.*engine.kernels=reference"),
    ],
)
def test_mix_attention_refuses(change, error, message):
    with pytest.raises(error, match=message):
        api.mix_attention(**{**attention_arguments(), **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query_weight": torch.zeros(8)}, ValueError, r"query_weight must have shape \[any, any\], got \[8\]"),
        ({"channels": 3}, ValueError, "query_weight must have 3 or 4 columns, got 6"),
        ({"value_weight": torch.zeros(1, 5)}, ValueError, r"value_weight must have shape \[1, 6\], got \[1, 5\]"),
        ({"value_weight": torch.zeros(1, 6).half()}, TypeError, "must be torch.float32, got torch.float16"),
        ({"implementation": "triton"}, RuntimeError, "tensors are on cpu.*engine.kernels=reference"),
    ],
)
def test_split_weights_refuses(change, error, message):
    arguments = {
        "query_weight": torch.zeros(8, 6), "value_weight": torch.zeros(1, 6), "channels": 5, "dtype": torch.float32
    }  # fmt: skip
    with pytest.raises(error, match=message):
        api.split_weights(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(3, 6)}, ValueError, "logits must have shape"),
        ({"images": torch.zeros(3, 3, 6, 8, dtype=torch.uint8)}, ValueError, r"\[3, any, any, 3\], got \[3, 3, 6, 8\]"),
        ({"images": torch.zeros(2, 3, 6, 8)}, ValueError, r"images must have shape \[3, 3, any, any\]"),
        ({"images": torch.zeros(3, 3, 6, 8, requires_grad=True)}, ValueError, "images gets no gradient"),
        ({"mode": "bicubic"}, ValueError, "mode must be 'nearest' or 'bilinear', got 'bicubic'"),
        ({"lam_margin": 0.6}, ValueError, r"lam_margin must lie in \[0, 0.5\] or be None, got 0.6"),
        ({"dtype": torch.uint8}, TypeError, "dtype must be a floating-point type"),
        ({"num_mixed": 4}, ValueError, r"num_mixed must lie in 0..3, the number of images, got 4"),
        ({"std": torch.ones(1)}, ValueError, r"std must have shape \[3\]"),
        ({"implementation": "triton"}, RuntimeError, "tensors are on cpu"),
    ],
)
def test_mask_blend_refuses(change, error, message):
    with pytest.raises(error, match=message):
        api.mask_blend(**{**blend_arguments(), **change})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([torch.zeros(2)], [], 0.9), ValueError, "as many sources as targets"),
        (([torch.zeros(2)], [torch.zeros(3)], 0.9), ValueError, r"sources\[0\] must have shape \[2\], got \[3\]"),
        (([torch.zeros(2)], [torch.zeros(2)], 1.5), ValueError, r"coefficient must lie in \[0, 1\], got 1.5"),
    ],
)
def test_momentum_update_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        api.momentum_update(*arguments)
    with pytest.raises(RuntimeError, match="tensors are on cpu"):
        api.momentum_update([torch.zeros(2)], [torch.zeros(2)], 0.9, implementation="triton")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(2, 3, 6, 8, dtype=torch.uint8)}, ValueError, r"images must have shape .*, 3\]"),
        ({"images": torch.zeros(2, 6, 8, 3, dtype=torch.int64)}, TypeError, "images must be torch.uint8"),
        ({"mean": torch.zeros(1)}, ValueError, r"mean must have shape \[3\]"),
        ({"implementation": "triton"}, RuntimeError, "tensors are on cpu"),
    ],
)
def test_normalize_refuses(change, error, message):
    arguments = {"images": blend_arguments()["images"], "mean": MEAN, "std": STD}
    with pytest.raises(error, match=message):
        api.normalize(**{**arguments, **change})


def test_momentum_update_of_two_layouts_is_not_for_the_kernel():
    weights = torch.zeros(4, 3, 5, 5)
    turned = weights.to(memory_format=torch.channels_last)
    assert api._update_obstacle([weights, turned], [weights, turned]) is None
    assert "neither both contiguous nor both channels-last" in api._update_obstacle([weights], [turned])


def test_more_pairs_than_a_grid_has_are_not_for_the_kernels():
    """A grid's second dimension ends at 65,535."""
    with pytest.raises(RuntimeError, match="at most 65535 pairs of images at once, not 80000"):
        many = torch.zeros(40000, 1, 1), torch.zeros(40000, 1), *torch.zeros(2, 2, 40000, dtype=torch.int64)
        with mock.patch.object(api, "device_obstacle", lambda device: None):
            api.mix_attention(*many[:2], many[2], many[3].float(), implementation="triton")
    assert api._size_obstacle(65535) is None


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_cpu_tensors_take_the_definitions(implementation):
    arguments = attention_arguments()
    actual = api.mix_attention(**arguments, implementation=implementation)
    assert torch.equal(actual, reference.mix_attention(**arguments))
    arguments = blend_arguments()
    for ours, theirs in zip(
        api.mask_blend(**arguments, implementation=implementation), reference.mask_blend(**arguments), strict=True
    ):
        assert torch.equal(ours, theirs)
    targets, sources = [torch.ones(3)], [torch.zeros(3)]
    api.momentum_update(targets, sources, 0.9, implementation=implementation)
    torch.testing.assert_close(targets[0], torch.full((3,), 0.9))
    api.momentum_update([], [], 0.9, implementation=implementation)


def test_float64_stays_in_plain_pytorch():
    arguments = {k: v.double() if v.is_floating_point() else v for k, v in attention_arguments().items()}
    assert api.mix_attention(**arguments).dtype == torch.float64


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("draws", [1, 3])
def test_the_operator_of_several_draws_differentiates_in_the_first(draws, compiled):
    arguments = attention_arguments()
    names = ("projection", "value", "query_bias", "value_lambda", "value_bias")
    projection, value, *rest = leaves = [arguments[name].requires_grad_() for name in names]
    weight = torch.randn(8, 9, requires_grad=True)
    partner, lam = torch.stack([torch.randperm(3) for _ in range(draws)]), torch.rand(draws, 3)
    first, *others = api.mix_attention(projection, value, partner, lam, weight[:, -1], *rest)
    expected = torch.autograd.grad(first.square().sum(), [*leaves, weight])

    def block():
        logits, others, *_ = mix_attention.mix_attention(projection, value, partner, lam, weight[:, -1], *rest)
        return logits.square().sum() + others.square().sum(), others

    total, found = torch.compile(block, fullgraph=True, backend="aot_eager")() if compiled else block()
    torch.testing.assert_close(list(found), others)
    torch.testing.assert_close(torch.autograd.grad(total, [*leaves, weight]), expected, rtol=1e-4, atol=1e-5)


def block(operators, projection, value, partner, lam, parameters, images):
    """Attention, blend and a loss, over the operators or over the definitions."""
    attention, blend = operators
    logits = attention(projection, value, partner, lam, *parameters)
    logits = logits[0] if isinstance(logits, tuple) else logits
    outputs = blend(logits.view(3, 3, 2), images, partner, lam, MEAN, STD, "bilinear", 0.0, torch.float32)
    return sum(output.square().sum() for output in outputs)


OPERATORS = (mix_attention.mix_attention, mask_blend.mask_blend)
PUBLIC = (api.mix_attention, api.mask_blend)


@pytest.mark.parametrize("operators", [OPERATORS, PUBLIC], ids=["operators", "public"])
def test_compiles_into_one_graph(operators):
    projection, value, partner, lam, *parameters = attention_arguments().values()
    images = blend_arguments()["images"]
    leaves = [projection, value, *parameters]
    for leaf in leaves:
        leaf.requires_grad_()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(block(PUBLIC, projection, value, partner, lam, parameters, images), leaves)
    actual = torch.autograd.grad(compiled(operators, projection, value, partner, lam, parameters, images), leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
