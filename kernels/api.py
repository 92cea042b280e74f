"""The public operations: each checks its arguments once and picks an implementation, but for `upsample_mask`, which is
plain PyTorch everywhere.

    implementation = "auto"       Triton for tensors on a GPU where it can run what is asked, else plain PyTorch
                     "triton"     Triton, or an error that says why it cannot run
                     "reference"  the definitions in reference.py

The Triton kernels are torch operators (automix::split_weights, automix::mix_attention, automix::mask_blend,
automix::normalize, automix::momentum_update, automix::batch_moments, automix::batch_norm_relu and four backward
passes), so that torch.compile keeps them whole. On CPU tensors the same operators compute the definitions; in a process
with TRITON_INTERPRET=1 they run the Triton code in its interpreter, and so does implementation="triton".
"""

import importlib.util

import torch
from automix_kernels import reference
from automix_kernels.reference import upsample_mask
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = False
if HAS_TRITON:
    import triton
    from automix_kernels import batch_norm_relu as triton_batch_norm_relu
    from automix_kernels import mask_blend as triton_mask_blend
    from automix_kernels import mix_attention as triton_mix_attention
    from automix_kernels import momentum as triton_momentum
    from automix_kernels import normalize as triton_normalize
    from automix_kernels import split_weights as triton_split_weights

    INTERPRETED = triton.knobs.runtime.interpret
    for operator, launch, definition in (
        (triton_split_weights.split_weights, triton_split_weights.launch_split, reference.split_weights),
        (
            triton_split_weights.split_weights_backward,
            triton_split_weights.launch_join,
            reference.split_weights_backward,
        ),
        (triton_mix_attention.mix_attention, triton_mix_attention.launch_forward, reference.mix_attention_forward),
        (
            triton_mix_attention.mix_attention_backward,
            triton_mix_attention.launch_backward,
            reference.mix_attention_backward,
        ),
        (triton_mask_blend.mask_blend, triton_mask_blend.launch_forward, reference.mask_blend),
        (triton_mask_blend.mask_blend_backward, triton_mask_blend.launch_backward, reference.mask_blend_backward),
        (triton_normalize.normalize, triton_normalize.launch, reference.normalize),
        (triton_momentum.momentum_update, triton_momentum.launch, reference.momentum_update),
        (triton_batch_norm_relu.batch_moments, triton_batch_norm_relu.launch_moments, reference.batch_moments),
        (triton_batch_norm_relu.batch_norm_relu, triton_batch_norm_relu.launch_apply, reference.batch_norm_relu_apply),
        (
            triton_batch_norm_relu.batch_norm_relu_backward,
            triton_batch_norm_relu.launch_backward,
            reference.batch_norm_relu_backward,
        ),
    ):
        operator.register_kernel("cpu")(launch if INTERPRETED else definition)
        if INTERPRETED:
            operator.direct_devices.add("cpu")

__all__ = [
    "batch_norm_relu",
    "mask_blend",
    "mix_attention",
    "momentum_update",
    "normalize",
    "split_weights",
    "upsample_mask",
]

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def split_weights(
    query_weight: Tensor,
    value_weight: Tensor,
    channels: int,
    dtype: torch.dtype,
    *,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The Mix Block's two weights, cut into what its product reads and what its attention reads. Differentiable.

    Args:
        query_weight: [D, columns] float32 (other types in plain PyTorch).
        value_weight: [1, columns], of the same type.
        channels: C of the features; columns is C, or C + 1 with one for lambda.
        dtype: of the product.

    Returns:
        [D + 1 and zeros up to a multiple of 16, C] in `dtype`, the query weight's rows and below them the value's: the
        features times its transpose are `mix_attention`'s projection with the value inside. Lambda's columns [D] and
        [1] in the weights' type, or None and None.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device.
        RuntimeError: implementation="triton" where Triton cannot run.
    """
    _check("query_weight", query_weight, (None, None))
    columns = query_weight.shape[1]
    if columns - channels not in (0, 1):
        raise ValueError(f"query_weight must have {channels} or {channels + 1} columns, got {columns}")
    _check("value_weight", value_weight, (1, columns), (query_weight.dtype,), query_weight.device)
    obstacle = None if dtype in _KERNEL_DTYPES else f"it cannot write {dtype}"
    if query_weight.dtype != torch.float32:
        obstacle = f"query_weight is {query_weight.dtype}, not torch.float32"
    if _takes_triton(implementation, query_weight.device, obstacle):
        split = triton_split_weights.split_weights
    else:
        split = reference.split_weights
    joined, *of_lambda = split(query_weight, value_weight, channels, dtype)
    return joined, *(of_lambda if columns > channels else (None, None))


def mix_attention(
    projection: Tensor,
    value: Tensor | None,
    partner: Tensor,
    lam: Tensor,
    query_lambda: Tensor | None = None,
    query_bias: Tensor | None = None,
    value_lambda: Tensor | None = None,
    value_bias: Tensor | None = None,
    width: int | None = None,
    *,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Mask logits of each image with its partner: cross-attention with a value of one channel.

    With y = projection, v = value, p = partner[b] and l = lam[b]:

        S[b, i, j]   = (y[b, i] + l * query_lambda + query_bias) . y[p, j] / sqrt(D)
        logits[b, i] = sum_j softmax_j(S[b, i, j]) * v[p, j] + (1 - l) * value_lambda + value_bias

    Differentiable in everything but partner and lam. The same inputs give the same bits every time. R draws of partners
    and lambdas over one projection share their launches, and each has the numbers of a call of its own, up to
    roundings. Only the first has a gradient: for others to have one, call once for each.

    Args:
        projection: [B, N, D] float32, bfloat16 or float16 (float64 in plain PyTorch). A slice of a wider tensor is
            fine; fastest where its row stride is a multiple of 16 elements.
        value: [B, N], any of these dtypes; or None, and the projection is [B, N, more than D]: D columns of queries and
            keys, one of the value, and others that nobody reads and whose gradient is zero.
        partner: [B] or [R, B] int64 in 0..B-1, not checked; repetitions are allowed.
        lam: float32 of partner's shape.
        query_lambda, query_bias: [D] or None; query_lambda may be a column of a matrix.
        value_lambda, value_bias: [1] or None.
        width: D, where `value` is None.
        implementation: "auto", "triton" or "reference".

    Returns:
        [B, N] float32 (float64 for a float64 projection); for [R, B] a tuple of R such tensors, the first with a graph.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; a lam that requires a gradient.
        RuntimeError: implementation="triton" where Triton cannot run.
    """
    _check("projection", projection, (None, None, None))
    batch, positions, columns = projection.shape
    device = projection.device
    if value is not None:
        _check("value", value, (batch, positions), device=device)
    if (value is None) != (width is not None) or (width is not None and not 0 < width < columns):
        raise ValueError(
            f"width must be that of queries and keys, 1..{columns - 1}, where value is None (a column of the "
            f"projection), and else None; got {width}"
        )
    channels = columns if width is None else width
    draws = () if isinstance(partner, Tensor) and partner.dim() == 1 else (None,)
    _check("partner", partner, (*draws, batch), (torch.int64,), device)
    _check("lam", lam, tuple(partner.shape), device=device)
    _check_no_grad("lam", lam)
    for name, tensor, size in (
        ("query_lambda", query_lambda, channels),
        ("query_bias", query_bias, channels),
        ("value_lambda", value_lambda, 1),
        ("value_bias", value_bias, 1),
    ):
        if tensor is not None:
            _check(name, tensor, (size,), device=device)
    obstacle = _dtype_obstacle("projection", projection) or _size_obstacle(partner.numel())
    if value is not None:
        obstacle = obstacle or _dtype_obstacle("value", value)
    if not _takes_triton(implementation, device, obstacle):
        return reference.mix_attention(
            projection, value, partner, lam, query_lambda, query_bias, value_lambda, value_bias, width
        )
    logits, others, *_ = triton_mix_attention.mix_attention(
        projection,
        value,
        partner.contiguous(),
        lam.float().contiguous(),
        query_lambda,
        None if query_bias is None else query_bias.contiguous(),
        value_lambda,
        value_bias,
        width,
    )
    return logits if partner.dim() == 1 else (logits, *others)


def mask_blend(
    logits: Tensor,
    images: Tensor,
    partner: Tensor,
    lam: Tensor,
    mean: Tensor,
    std: Tensor,
    mode: str,
    lam_margin: float | None = None,
    dtype: torch.dtype = torch.float32,
    num_mixed: int | None = None,
    *,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix each image with its partner under the upsampled mask m: n(x) + (n(x[partner]) - n(x)) * m.

    m = sigmoid(upsample(logits)); n() is the normalisation of uint8 pixels. Where lam <= lam_margin or
    lam >= 1 - lam_margin the mask is the constant 1 - lam, without gradient.
    Differentiable in the logits only. The same inputs give the same bits every time.

    Args:
        logits: [B, h, w] float32, bfloat16 or float16 (float64 in plain PyTorch), mask logits of the partner.
        images: [B, H, W, 3] uint8, or [B, 3, H, W] floating point, normalised already, in either memory layout.
            The kernel takes H and W that are whole multiples of h and w.
        partner: [B] int64 in 0..B-1, not checked.
        lam: [B] float32.
        mean, std: [3] float32 on the [0, 1] scale; used for uint8 images.
        mode: "nearest", or "bilinear" (corners not aligned).
        lam_margin: how near to 0 or 1 lambda turns the mix into plain mixup, 0 to 0.5, the margin included; None =
            never.
        dtype: of the mixed images.
        num_mixed: mix only so many images, the first ones, with partners from the whole batch; None = all. The
            means are of all masks.
        implementation: "auto", "triton" or "reference".

    Returns:
        mixed [B or num_mixed, 3, H, W] in channels-last layout, and two [B] float32 means over the pixels, of m and of
        m squared.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or mode; images or lam that require a gradient.
        RuntimeError: implementation="triton" where Triton cannot run.
    """
    _check("logits", logits, (None, None, None))
    batch, h, w = logits.shape
    device = logits.device
    if images.dtype == torch.uint8:
        _check("images", images, (batch, None, None, 3), (torch.uint8,), device)
        height, width = images.shape[1:3]
        _check("mean", mean, (3,), device=device)
        _check("std", std, (3,), device=device)
    else:
        _check("images", images, (batch, 3, None, None), device=device)
        height, width = images.shape[2:]
    _check("partner", partner, (batch,), (torch.int64,), device)
    _check("lam", lam, (batch,), device=device)
    _check_no_grad("images", images)
    _check_no_grad("lam", lam)
    if mode not in ("nearest", "bilinear"):
        raise ValueError(f"mode must be 'nearest' or 'bilinear', got {mode!r}")
    if lam_margin is not None and not 0 <= lam_margin <= 0.5:
        raise ValueError(f"lam_margin must lie in [0, 0.5] or be None, got {lam_margin}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point type, got {dtype}")
    if num_mixed is not None and not 0 <= num_mixed <= batch:
        raise ValueError(f"num_mixed must lie in 0..{batch}, the number of images, got {num_mixed}")
    obstacle = _dtype_obstacle("logits", logits) or _size_obstacle(batch)
    if images.is_floating_point():
        obstacle = obstacle or _dtype_obstacle("images", images)
    if dtype not in _KERNEL_DTYPES:
        obstacle = obstacle or f"it cannot write {dtype}"
    if height % h or width % w:
        obstacle = obstacle or f"images of {height} x {width} are no whole multiple of a {h} x {w} map"
    if not _takes_triton(implementation, device, obstacle):
        return reference.mask_blend(logits, images, partner, lam, mean, std, mode, lam_margin, dtype, num_mixed)
    return triton_mask_blend.mask_blend(
        logits,
        images,
        partner.contiguous(),
        lam.float().contiguous(),
        mean.float().contiguous(),
        std.float().contiguous(),
        mode,
        lam_margin,
        dtype,
        num_mixed,
    )


def normalize(
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    implementation: str = "auto",
) -> Tensor:
    """(x / 255 - mean) / std of uint8 images, in one pass; without a gradient.

    Args:
        images: [B, H, W, 3] uint8; or floating point and normalised already, which come back in `dtype` and in their
            own layout.
        mean, std: [3] float32 on the [0, 1] scale.
        dtype: of the result.
        implementation: "auto", "triton" or "reference".

    Returns:
        [B, 3, H, W], of uint8 images in channels-last layout.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device.
        RuntimeError: implementation="triton" where Triton cannot run.
    """
    if images.is_floating_point():
        return images.to(dtype)
    _check("images", images, (None, None, None, 3), (torch.uint8,))
    _check("mean", mean, (3,), device=images.device)
    _check("std", std, (3,), device=images.device)
    obstacle = None if dtype in _KERNEL_DTYPES else f"it cannot write {dtype}"
    if not _takes_triton(implementation, images.device, obstacle):
        return reference.normalize(images, mean, std, dtype)
    return triton_normalize.normalize(images, mean.float().contiguous(), std.float().contiguous(), dtype)


def momentum_update(
    targets: list[Tensor],
    sources: list[Tensor],
    coefficient: float,
    skip: Tensor | None = None,
    *,
    implementation: str = "auto",
) -> None:
    """target <- coefficient * target + (1 - coefficient) * source, in place, for each pair of tensors.

    "auto" without `skip` is torch._foreach_lerp_ on every device: it moves the same bytes in as few launches, and the
    Triton kernel replaces it when a measurement shows a gain. With `skip` the definition takes three passes over the
    tensors, and "auto" is Triton where it can run.

    Args:
        targets: tensors of a floating-point type; float32 for Triton.
        sources: tensors of the targets' shapes; float32, bfloat16 or float16 for Triton, which takes pairs that are
            both contiguous or both channels-last.
        coefficient: 0 to 1, what is kept of the target.
        skip: float32 scalar on the targets' device; if it is not 0 nothing changes. Nobody waits for its value.
        implementation: "auto", "triton" or "reference".

    Raises:
        ValueError: lists of different lengths, tensors of different shapes, a coefficient outside [0, 1].
        RuntimeError: implementation="triton" where Triton cannot run.
    """
    if len(targets) != len(sources):
        raise ValueError(f"as many sources as targets are needed, got {len(sources)} and {len(targets)}")
    if not 0 <= coefficient <= 1:
        raise ValueError(f"coefficient must lie in [0, 1], got {coefficient}")
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target.shape != source.shape:
            raise ValueError(f"sources[{i}] must have shape {list(target.shape)}, got {list(source.shape)}")
    if not targets:
        return
    if implementation == "auto" and skip is None:
        implementation = "reference"
    if _takes_triton(implementation, targets[0].device, _update_obstacle(targets, sources)):
        triton_momentum.momentum_update(targets, sources, coefficient, skip)
    else:
        reference.momentum_update(targets, sources, coefficient, skip)


def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches: Tensor,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    groups: int = 1,
    *,
    implementation: str = "auto",
) -> Tensor:
    """nn.BatchNorm2d in training with what follows it in a residual block: y = relu(batch_norm(x) + residual).

    Differentiable in x, weight, bias and the residual, once. The same inputs give the same bits every time.

    Args:
        x: [B, C, H, W] float32, bfloat16 or float16 (float64 in plain PyTorch); any layout, fastest in channels-last.
        weight, bias: [C] float32.
        running_mean, running_var: [C] float32 without gaps, moved in place: each <- each + momentum * (this batch's -
            each), the variance being the unbiased one.
        num_batches: int64 scalar, how many batches have moved them; counted up in place.
        momentum: of the running statistics, 0 to 1.
        eps: added to the variance.
        residual: of x's shape and type, added in front of the ReLU, or None.
        groups: x holds so many batches of the same size, one behind the other, each with statistics of its own; the
            running statistics see them in this order.
        implementation: "auto", "triton" or "reference".

    Returns:
        y, of x's shape and type; from the kernels in channels-last layout.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; one number a channel.
        RuntimeError: implementation="triton" where Triton cannot run.
    """
    _check("x", x, (None, None, None, None))
    images, channels, height, width = x.shape
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, tensor in vectors.items():
        _check(name, tensor, (channels,), device=x.device)
    _check("num_batches", num_batches, (), (torch.int64,), x.device)
    if residual is not None:
        _check("residual", residual, tuple(x.shape), (x.dtype,), x.device)
    if groups < 1 or images % groups:
        raise ValueError(f"groups must divide the batch of {images}, got {groups}")
    if images // groups * height * width < 2:
        raise ValueError(f"more than one number a channel is needed for a variance, got x of shape {list(x.shape)}")
    obstacle = _dtype_obstacle("x", x)
    for name, tensor in vectors.items():
        if tensor.dtype != torch.float32:
            obstacle = obstacle or f"{name} is {tensor.dtype}, not torch.float32"
        if not tensor.is_contiguous():
            obstacle = obstacle or f"{name} has gaps"
    if not _takes_triton(implementation, x.device, obstacle):
        return reference.batch_norm_relu(
            x, weight, bias, running_mean, running_var, num_batches, momentum, eps, residual, groups
        )
    moments = triton_batch_norm_relu.batch_moments(
        x.detach(), running_mean, running_var, num_batches, momentum, eps, groups
    )
    return triton_batch_norm_relu.batch_norm_relu(x, *moments, weight, bias, residual)


def _update_obstacle(targets: list[Tensor], sources: list[Tensor]) -> str | None:
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target.dtype != torch.float32:
            return f"targets[{i}] is {target.dtype}, not torch.float32"
        if not _same_dense_layout(target, source):
            return f"targets[{i}] and sources[{i}] are neither both contiguous nor both channels-last"
        if target.device != targets[0].device or source.device != targets[0].device:
            return f"targets[{i}] or sources[{i}] is not on {targets[0].device}"
        if source.dtype not in _KERNEL_DTYPES:
            return _dtype_obstacle(f"sources[{i}]", source)
    return None


def _same_dense_layout(a: Tensor, b: Tensor) -> bool:
    if a.is_contiguous() and b.is_contiguous():
        return True
    layout = torch.channels_last
    return a.dim() == 4 and a.is_contiguous(memory_format=layout) and b.is_contiguous(memory_format=layout)


def _takes_triton(implementation: str, device: torch.device, obstacle: str | None) -> bool:
    """Whether the Triton kernel is to run; `obstacle` says why it cannot take these arguments."""
    if implementation == "reference":
        return False
    if implementation not in ("auto", "triton"):
        raise ValueError(f"implementation must be 'auto', 'triton' or 'reference', got {implementation!r}")
    if not (INTERPRETED and device.type == "cpu" and implementation == "triton"):
        obstacle = device_obstacle(device) or obstacle
    if obstacle is not None and implementation == "triton":
        raise RuntimeError(
            f"the Triton kernel cannot run: {obstacle}. implementation='reference' (engine.kernels=reference in a "
            "config) runs plain PyTorch"
        )
    return obstacle is None


@torch.compiler.assume_constant_result
def device_obstacle(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on a device, in words that follow "because"; None if they can."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    if device.type != "cuda":
        return f"the tensors are on {device}, and it needs a GPU (or TRITON_INTERPRET=1 when the process starts)"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0 or higher, which {torch.cuda.get_device_name(device)} has not"
    return None


def _dtype_obstacle(name: str, tensor: Tensor) -> str | None:
    if tensor.dtype in _KERNEL_DTYPES:
        return None
    return f"{name} is {tensor.dtype}, and it takes float32, bfloat16 and float16"


def _size_obstacle(pairs: int) -> str | None:
    """A grid has one program or more for each pair in its second dimension, which ends at 65,535."""
    return f"it takes at most 65535 pairs of images at once, not {pairs}" if pairs > 65535 else None


def _check(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
) -> None:
    """None in `shape` stands for any size, `dtypes` None for any floating-point type."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if dtypes is None and not tensor.is_floating_point():
        raise TypeError(f"{name} must be of a floating-point type, got {tensor.dtype}")
    if dtypes is not None and tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    fits = tensor.dim() == len(shape) and all(
        want is None or got == want for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the first argument, got {tensor.device}")


def _check_no_grad(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} gets no gradient, so it must not require one: pass {name}.detach()")
