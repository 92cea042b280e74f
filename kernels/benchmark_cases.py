"""What the benchmark compares: shapes, operations, every way of computing them, and the least work each must do."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from automix_kernels import api, reference
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAM_MARGIN = 0.08  # the classifier's, in the published recipes

STAGES = (
    ("ours",),
    (
        "published", "definition", "definition-without-cudnn", "rearranged", "sdpa-flash",
        "sdpa-cudnn", "sdpa-efficient", "sdpa-math",
        "ours-without-skip", "foreach-lerp-without-skip", "loop-without-skip",
    ),
    (
        "rearranged-compiled", "flex-attention", "definition-compiled", "published-compiled",
        "rearranged-max-autotune", "definition-max-autotune",
    ),
)  # fmt: skip
"""Names of candidates in the order in which they are measured: ours, what needs no compiler, what is compiled.

published: the published implementation, restated, in 16 bits under autocast. definition: reference.py. rearranged: the
definition with the attention's products in the features' type. compiled: torch.compile in its default mode.
"""

Inputs = dict[str, Tensor]
Candidate = Callable[[Inputs], list[Tensor]]


@dataclass(frozen=True)
class Shape:
    """A feature map of cells x cells x channels, projected to `width`; images are `factor` times as wide."""

    name: str
    batch: int
    cells: int
    channels: int
    width: int
    factor: int

    @property
    def label(self) -> str:
        return f"{self.name}/{self.batch}"

    @property
    def has_batch_norm(self) -> bool:
        return "resnet" in self.name or "wrn" in self.name

    @property
    def positions(self) -> int:
        return self.cells**2

    @property
    def image_size(self) -> int:
        return self.cells * self.factor


SHAPES = [
    Shape("resnet50", 256, 14, 1024, 512, 16),
    Shape("cifar_resnet18", 100, 8, 256, 128, 4),
    Shape("cifar_wrn28_8", 100, 16, 256, 128, 2),
    Shape("resnet50", 64, 14, 1024, 512, 16),
    Shape("resnet50", 128, 14, 1024, 512, 16),
    Shape("resnet18", 256, 14, 256, 128, 16),
    Shape("deit_small", 128, 14, 384, 192, 16),
    Shape("swin_tiny", 128, 7, 768, 384, 32),
    Shape("cifar_resnet18", 512, 8, 256, 128, 4),
    Shape("tiny_resnet18", 100, 16, 256, 128, 4),
    Shape("tiny_resnet18", 512, 16, 256, 128, 4),
]
ALIASES = {"convnext_tiny": "deit_small"}
"""Other networks with the same feature map."""


@dataclass(frozen=True)
class Work:
    """What one kernel-like part must do at least: FLOPs, and bytes between memory and the chip.

    bytes: each input once and each output once. bytes_read_again: what is read a second time, from memory unless a
    cache holds it still; both together are the traffic of a machine without a cache.
    """

    part: str
    flops: float
    bytes: float
    bytes_read_again: float = 0


@dataclass
class Case:
    """One operation at one shape: how to draw inputs, the candidates, the exact result, the least work."""

    operation: str
    shape: Shape
    dtype: torch.dtype
    draw: Callable[[int], Inputs]
    leaves: tuple[str, ...]
    """Inputs that get gradients, if any do; one of a single number stands behind the tensor that it belongs to."""
    oracle: Candidate
    candidates: dict[str, Candidate]
    forward: list[Work]
    backward: list[Work]


def projection_work(shape: Shape, dtype: torch.dtype) -> Work:
    """Features times the weights of projection and value. The weights' gradients are as much work."""
    rows, columns = shape.batch * shape.positions, shape.width + 1
    return Work(
        "projection", 2 * rows * shape.channels * columns, rows * (shape.channels + columns) * dtype.itemsize
    )  # fmt: skip


def attention_work(shape: Shape, dtype: torch.dtype, draws: int) -> Work:
    """The projection is read as queries, and again as keys for each draw."""
    product, size = _attention_sizes(shape, dtype)
    return Work("attention", draws * product, size, bytes_read_again=draws * size)


def attention_backward_work(shape: Shape, dtype: torch.dtype) -> Work:
    """Scores again, and two products with their gradient; the projection read, and its gradient written. The projection
    is read again as the partner's and as that of the image whose partner it is."""
    product, size = _attention_sizes(shape, dtype)
    return Work("attention backward", 3 * product, 2 * size, bytes_read_again=2 * size)


def _attention_sizes(shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    """FLOPs of one product of queries and keys, bytes of the projection."""
    return 2 * shape.batch * shape.positions**2 * shape.width, (
        shape.batch * shape.positions * shape.width * dtype.itemsize
    )


def blend_work(shape: Shape, dtype: torch.dtype, draws: int) -> Work:
    """Images read as bytes, and again as partners for each draw, a mixed image written for each draw. Normalisation and
    the step from one image to the other are about four FLOPs an element."""
    elements = 3 * shape.batch * shape.image_size**2
    return Work(
        "blend", 4 * draws * elements, (1 + draws * dtype.itemsize) * elements, bytes_read_again=draws * elements
    )


def blend_backward_work(shape: Shape, dtype: torch.dtype) -> Work:
    elements = 3 * shape.batch * shape.image_size**2
    return Work("blend backward", 3 * elements, (1 + dtype.itemsize) * elements, bytes_read_again=elements)


def compiled(function: Callable, mode: str | None = None) -> Callable:
    return torch.compile(function, mode=mode, fullgraph=True, dynamic=False)


def max_autotuned(function: Callable) -> Callable:
    return compiled(function, "max-autotune-no-cudagraphs")  # graphs are the benchmark's own, for all alike


def as_trained(function: Callable, device: str, dtype: torch.dtype) -> Callable:
    """For 16 bits under autocast: products are made in `dtype` then, even of what was cast to float32 before."""
    if dtype.itemsize > 2:
        return function

    def call(*arguments):
        with torch.autocast(device, dtype):
            return function(*arguments)

    return call


def takes(function: Callable[..., Tensor | tuple[Tensor, ...]], names: tuple[str, ...]) -> Candidate:
    """A function of tensors as one of named inputs."""

    def call(inputs: Inputs) -> list[Tensor]:
        outputs = function(*(inputs[name] for name in names))
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)

    return call


# Attention.

ATTENTION = ("projection", "value", "partner", "lam", "query_lambda", "query_bias", "value_lambda", "value_bias")


def attention_published(
    y: Tensor, v: Tensor, partner: Tensor, lam: Tensor,
    query_lambda: Tensor, query_bias: Tensor, value_lambda: Tensor, value_bias: Tensor,
) -> Tensor:  # fmt: skip
    """Lambda as a channel of queries, keys and values; scores, softmax and their product of float32 numbers."""
    other = (1 - lam)[:, None, None] * query_lambda + query_bias
    queries = _queries(y, lam, query_lambda, query_bias)
    keys = (y[partner] + other).to(y.dtype)
    values = v[partner] + (1 - lam)[:, None] * value_lambda + value_bias
    scores = torch.matmul(queries.float(), keys.float().transpose(1, 2)) / math.sqrt(y.shape[2])
    return torch.matmul(scores.softmax(dim=-1), values.float().unsqueeze(2)).squeeze(2)


def attention_rearranged(
    y: Tensor, v: Tensor, partner: Tensor, lam: Tensor,
    query_lambda: Tensor, query_bias: Tensor, value_lambda: Tensor, value_bias: Tensor,
) -> Tensor:  # fmt: skip
    """The definition's algebra, products in the inputs' type, softmax in float32."""
    queries = _queries(y, lam, query_lambda, query_bias)
    scores = torch.bmm(queries, y[partner].transpose(1, 2)).float() * (1 / math.sqrt(y.shape[2]))
    weights = scores.softmax(dim=2).to(y.dtype)
    return _add_constants(torch.bmm(weights, v[partner].unsqueeze(2)).squeeze(2), lam, value_lambda, value_bias)


def _queries(y: Tensor, lam: Tensor, query_lambda: Tensor, query_bias: Tensor) -> Tensor:
    return (y + (lam[:, None, None] * query_lambda + query_bias)).to(y.dtype)


def _add_constants(logits: Tensor, lam: Tensor, value_lambda: Tensor, value_bias: Tensor) -> Tensor:
    return logits.float() + (1 - lam)[:, None] * value_lambda + value_bias


def attention_library(attention: Callable[[Tensor, Tensor, Tensor], Tensor], value_width: int) -> Callable:
    """The definition by a library's attention(query, key, value), all [B, 1, N, .]; zeros pad the value's width."""

    def call(y, v, partner, lam, query_lambda, query_bias, value_lambda, value_bias):
        queries = _queries(y, lam, query_lambda, query_bias).unsqueeze(1)
        values = F.pad(v[partner].unsqueeze(2), (0, value_width - 1)).unsqueeze(1)
        output = attention(queries, y[partner].unsqueeze(1), values)
        return _add_constants(output[:, 0, :, 0], lam, value_lambda, value_bias)

    return call


def scaled_dot_product_attention(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(queries, keys, values)

    return call


def flex_attention(width: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # The default tiles of wide heads need more shared memory than a block can have.
    small = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
    options = {**dict.fromkeys(small, 32), "num_stages": 1} if width > 256 else None
    function = torch.compile(flex_attention, dynamic=False)
    return lambda queries, keys, values: function(queries, keys, values, kernel_options=options)


def attention_case(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    def draw(seed: int) -> Inputs:
        g = torch.Generator(device).manual_seed(seed)
        batch = shape.batch
        leaf = {
            "projection": torch.randn(batch, shape.positions, shape.width, device=device, generator=g).to(dtype),
            "value": torch.randn(batch, shape.positions, device=device, generator=g).to(dtype),
            "query_lambda": torch.randn(shape.width, device=device, generator=g),
            "query_bias": torch.randn(shape.width, device=device, generator=g),
            "value_lambda": torch.randn(1, device=device, generator=g),
            "value_bias": torch.randn(1, device=device, generator=g),
        }
        plain = {
            "partner": torch.randperm(batch, device=device, generator=g),
            "lam": torch.rand(batch, device=device, generator=g),
        }
        return {**{name: tensor.requires_grad_() for name, tensor in leaf.items()}, **plain}

    functions = {
        "ours": api.mix_attention,
        "published": as_trained(attention_published, device, dtype),
        "rearranged": attention_rearranged,
    }
    if device == "cuda":
        width = shape.width
        functions |= {
            "definition": reference.mix_attention,
            "sdpa-flash": attention_library(scaled_dot_product_attention("FLASH_ATTENTION"), width),
            "sdpa-cudnn": attention_library(scaled_dot_product_attention("CUDNN_ATTENTION"), width),
            "sdpa-efficient": attention_library(scaled_dot_product_attention("EFFICIENT_ATTENTION"), 8),
            "sdpa-math": attention_library(scaled_dot_product_attention("MATH"), 1),
            "rearranged-compiled": compiled(attention_rearranged),
            "definition-compiled": compiled(reference.mix_attention),
            "flex-attention": attention_library(flex_attention(width), 16),
            "rearranged-max-autotune": max_autotuned(attention_rearranged),
            "definition-max-autotune": max_autotuned(reference.mix_attention),
        }
    return Case(
        "mix attention", shape, dtype, draw,
        ("projection", "query_lambda", "query_bias", "value", "value_lambda", "value_bias"),
        takes(reference.mix_attention, ATTENTION),
        {name: takes(function, ATTENTION) for name, function in functions.items()},
        forward=[attention_work(shape, dtype, draws=1)],
        backward=[attention_backward_work(shape, dtype)],
    )  # fmt: skip


# Normalisation: uint8 images to what the network reads.


def normalize_published(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    return ((images.permute(0, 3, 1, 2) / 255 - mean[:, None, None]) / std[:, None, None]).to(dtype)


def normalize_case(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    def draw(seed: int) -> Inputs:
        return _images(shape, device, torch.Generator(device).manual_seed(seed))

    def bound(function: Callable, dtype: torch.dtype = dtype) -> Candidate:
        return takes(lambda *tensors: function(*tensors, dtype), ("images", "mean", "std"))

    candidates = {"ours": bound(api.normalize), "published": bound(normalize_published)}
    if device == "cuda":
        candidates |= {
            "definition": bound(reference.normalize),
            "definition-compiled": compiled(bound(reference.normalize)),
            "definition-max-autotune": max_autotuned(bound(reference.normalize)),
        }
    elements = 3 * shape.batch * shape.image_size**2
    return Case(
        "normalize", shape, dtype, draw, (), bound(reference.normalize, torch.float64), candidates,
        forward=[Work("normalize", 2 * elements, (1 + dtype.itemsize) * elements)],
        backward=[],
    )  # fmt: skip


def _images(shape: Shape, device: str, g: torch.Generator) -> Inputs:
    size = (shape.batch, shape.image_size, shape.image_size, 3)
    return {
        "images": torch.randint(0, 256, size, device=device, generator=g, dtype=torch.uint8),
        "mean": torch.tensor(MEAN, device=device),
        "std": torch.tensor(STD, device=device),
    }


# Blend: logits at the map's resolution and uint8 images to mixed images and the mask's two means.

BLEND = ("logits", "images", "partner", "lam", "mean", "std")


def blend_published(
    logits: Tensor, images: Tensor, partner: Tensor, lam: Tensor, mean: Tensor, std: Tensor,
    mode: str, lam_margin: float | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Upsample, sigmoid, both masks side by side, and the blend of float32 images."""
    if images.dtype == torch.uint8:
        images = normalize_published(images, mean, std, mean.dtype)
    corners = {} if mode == "nearest" else {"align_corners": False}
    mask = torch.sigmoid(F.interpolate(logits.unsqueeze(1), size=images.shape[2:], mode=mode, **corners).float())
    if lam_margin is not None:
        is_plain = ((lam <= lam_margin) | (lam >= 1 - lam_margin))[:, None, None, None]
        mask = torch.where(is_plain, (1 - lam)[:, None, None, None], mask)
    both = torch.cat([1 - mask, mask], dim=1)
    mixed = images * both[:, :1] + images[partner] * both[:, 1:]
    return mixed.to(dtype), mask.mean(dim=(1, 2, 3)), mask.square().mean(dim=(1, 2, 3))


def blend_case(shape: Shape, device: str, dtype: torch.dtype, mode: str) -> Case:
    def draw(seed: int) -> Inputs:
        g = torch.Generator(device).manual_seed(seed)
        logits = torch.randn(shape.batch, shape.cells, shape.cells, device=device, generator=g)
        return {
            **_images(shape, device, g),
            "logits": logits.requires_grad_(),
            "partner": torch.randperm(shape.batch, device=device, generator=g),
            "lam": torch.rand(shape.batch, device=device, generator=g),
        }

    def bound(function: Callable, dtype: torch.dtype = dtype) -> Candidate:
        return takes(lambda *tensors: function(*tensors, mode, None, dtype), BLEND)

    candidates = {"ours": bound(api.mask_blend), "published": bound(blend_published)}
    if device == "cuda":
        candidates |= {
            "definition": bound(reference.mask_blend),
            "definition-compiled": compiled(bound(reference.mask_blend)),
            "published-compiled": compiled(bound(blend_published)),
            "definition-max-autotune": max_autotuned(bound(reference.mask_blend)),
        }
    return Case(
        f"blend {mode}", shape, dtype, draw, ("logits",), bound(reference.mask_blend, torch.float64), candidates,
        forward=[blend_work(shape, dtype, draws=1)],
        backward=[blend_backward_work(shape, dtype)],
    )  # fmt: skip


# The whole block: features to the mixed images of both draws, gradients of the Mix Block's weights. Only the first
# draw, the Mix Block's own, gets gradients; the second, the classifier's, is plain mixup where lambda is within the
# margin.


def block(
    shape: Shape,
    dtype: torch.dtype,
    mode: str,
    split_weights: Callable,
    attend_both: Callable[..., tuple[Tensor, Tensor]],
    mask_blend: Callable,
) -> Candidate:
    """`attend_both`: two logits from the features, the joined weight, partners and lams [2, B] and the parameters."""

    def call(inputs: Inputs) -> list[Tensor]:
        weight, query_lambda, value_lambda = split_weights(
            inputs["query_weight"], inputs["value_weight"], shape.channels, dtype
        )
        logits = attend_both(
            inputs["features"],
            weight,
            inputs["partners"],
            inputs["lams"],
            query_lambda,
            inputs["query_bias"],
            value_lambda,
            inputs["value_bias"],
        )
        outputs = []
        for draw, lam_margin in enumerate((None, LAM_MARGIN)):
            with torch.set_grad_enabled(draw == 0):
                maps = logits[draw].view(-1, shape.cells, shape.cells)
                plain = (inputs["partners"][draw], inputs["lams"][draw], inputs["mean"], inputs["std"])
                outputs += mask_blend(maps, inputs["images"], *plain, mode, lam_margin, dtype)
        return outputs

    return call


def together(width: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """One product for projection and value, one attention for both draws."""

    def attend_both(features, weight, *arguments) -> tuple[Tensor, Tensor]:
        return api.mix_attention(F.linear(features, weight), None, *arguments, width)

    return attend_both


def one_by_one(attention: Callable[..., Tensor], width: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Projection and value by a product each, which serve both draws; these by an attention of one."""

    def attend_both(features, weight, partners, lams, *parameters) -> tuple[Tensor, Tensor]:
        y = F.linear(features, weight[:width])
        v = F.linear(features, weight[width : width + 1]).squeeze(2)
        first = attention(y, v, partners[0], lams[0], *parameters)
        with torch.no_grad():
            return first, attention(y.detach(), v.detach(), partners[1], lams[1], *parameters)

    return attend_both


def block_published(shape: Shape, dtype: torch.dtype, mode: str) -> Candidate:
    """For each draw: gather, a lambda channel appended to both features, three 1 x 1 convolutions, attention and blend
    of float32 numbers."""

    def logits(inputs: Inputs, partner: Tensor, lam: Tensor) -> Tensor:
        side = (shape.cells, shape.cells)
        features = inputs["features"].transpose(1, 2).unflatten(2, side)
        lam = lam[:, None, None, None].to(dtype).expand(-1, 1, *side)
        own = torch.cat([features, lam], dim=1)
        other = torch.cat([features[partner], 1 - lam], dim=1)
        query_weight, value_weight = (
            inputs[name].to(dtype)[:, :, None, None] for name in ("query_weight", "value_weight")
        )
        query_bias, value_bias = (inputs[name].to(dtype) for name in ("query_bias", "value_bias"))
        value = F.conv2d(other, value_weight, value_bias).flatten(2).transpose(1, 2).float()
        queries = F.conv2d(own, query_weight, query_bias).flatten(2).transpose(1, 2).float()
        keys = F.conv2d(other, query_weight, query_bias).flatten(2).float()
        weights = (torch.matmul(queries, keys) / math.sqrt(shape.width)).softmax(dim=-1)
        return torch.matmul(weights, value).view(-1, *side)

    def call(inputs: Inputs) -> list[Tensor]:
        images = normalize_published(inputs["images"], inputs["mean"], inputs["std"], torch.float32)
        outputs = []
        for draw, lam_margin in enumerate((None, LAM_MARGIN)):
            with torch.set_grad_enabled(draw == 0):
                partner, lam = inputs["partners"][draw], inputs["lams"][draw]
                maps = logits(inputs, partner, lam)
                outputs += blend_published(
                    maps, images, partner, lam, inputs["mean"], inputs["std"], mode, lam_margin, dtype
                )
        return outputs

    return call


def block_case(shape: Shape, device: str, dtype: torch.dtype, mode: str) -> Case:
    def draw(seed: int) -> Inputs:
        g = torch.Generator(device).manual_seed(seed)
        normal, batch = torch.randn, shape.batch
        leaf = {
            "query_weight": normal(shape.width, shape.channels + 1, device=device, generator=g) / shape.channels**0.5,
            "query_bias": normal(shape.width, device=device, generator=g),
            "value_weight": normal(1, shape.channels + 1, device=device, generator=g) / shape.channels**0.5,
            "value_bias": normal(1, device=device, generator=g),
        }
        plain = {
            **_images(shape, device, g),
            "features": normal(batch, shape.positions, shape.channels, device=device, generator=g).to(dtype),
            "partners": torch.stack([torch.randperm(batch, device=device, generator=g) for _ in range(2)]),
            "lams": torch.rand(2, batch, device=device, generator=g),
        }
        return {**{name: tensor.requires_grad_() for name, tensor in leaf.items()}, **plain}

    def plain(attention: Callable, dtype: torch.dtype = dtype) -> Candidate:
        attend_both = one_by_one(attention, shape.width)
        return block(shape, dtype, mode, reference.split_weights, attend_both, reference.mask_blend)

    published = as_trained(block_published(shape, dtype, mode), device, dtype)
    candidates = {
        "ours": block(shape, dtype, mode, api.split_weights, together(shape.width), api.mask_blend),
        "published": published,
        "rearranged": plain(attention_rearranged),
    }
    if device == "cuda":
        candidates |= {
            "definition": plain(reference.mix_attention),
            "rearranged-compiled": compiled(plain(attention_rearranged)),
            "definition-compiled": compiled(plain(reference.mix_attention)),
            "published-compiled": compiled(published),
            "rearranged-max-autotune": max_autotuned(plain(attention_rearranged)),
            "definition-max-autotune": max_autotuned(plain(reference.mix_attention)),
        }
    projection = projection_work(shape, dtype)
    return Case(
        f"whole block {mode}", shape, dtype, draw, ("query_weight", "query_bias", "value_weight", "value_bias"),
        plain(reference.mix_attention, torch.float64), candidates,
        forward=[projection, attention_work(shape, dtype, draws=2), blend_work(shape, dtype, draws=2)],
        backward=[blend_backward_work(shape, dtype), attention_backward_work(shape, dtype), projection],
    )  # fmt: skip


# BatchNorm with ReLU, and perhaps a shortcut, on the network's feature map.

NORM = ("x", "weight", "bias", "running_mean", "running_var", "num_batches")


def norm_case(shape: Shape, device: str, dtype: torch.dtype, shortcut: bool) -> Case:
    leaves = ("x", "weight", "bias", *(("residual",) if shortcut else ()))

    def draw(seed: int) -> Inputs:
        """What enters the ReLU is clear of zero where it is the sum of two: its sign must not hang on a rounding."""
        g = torch.Generator(device).manual_seed(seed)
        size = (shape.batch, shape.channels, shape.cells, shape.cells)

        def uniform(*sizes: int) -> Tensor:
            return torch.rand(sizes, device=device, generator=g)

        def a_map(values: Tensor) -> Tensor:
            return values.to(dtype).contiguous(memory_format=torch.channels_last)

        sign = torch.where(uniform(*size) < 0.5, -1.0, 1.0)
        tensors = {
            "x": a_map(uniform(*size) + 1),
            "weight": 0.9 + 0.1 * uniform(shape.channels),
            "bias": 0.1 * uniform(shape.channels),
            "residual": a_map(sign * (2 + uniform(*size))),  # a uniform number is at most 1.74 deviations from its mean
        }
        running = {
            "running_mean": uniform(shape.channels),
            "running_var": uniform(shape.channels),
            "num_batches": torch.zeros((), dtype=torch.int64, device=device),
        }
        return {**{name: tensors[name].requires_grad_() for name in leaves}, **running}

    def bound(function: Callable) -> Candidate:
        names = NORM + leaves[3:]
        return takes(lambda *tensors: function(*tensors[:6], 0.1, 1e-5, *tensors[6:]), names)

    def without_cudnn(*arguments: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return reference.batch_norm_relu(*arguments)

    candidates = {"ours": bound(api.batch_norm_relu)}
    if device == "cuda":
        candidates |= {
            "definition": bound(reference.batch_norm_relu),
            "definition-without-cudnn": bound(without_cudnn),
            "definition-compiled": compiled(bound(reference.batch_norm_relu)),
            "definition-max-autotune": max_autotuned(bound(reference.batch_norm_relu)),
        }
    elements = shape.batch * shape.positions * shape.channels
    # Maps read and written: x, the shortcut and the result; the gradient, x and its gradient, and with a shortcut the
    # result and the shortcut's gradient. Read again: x behind its moments; behind the sums x and the gradient, or the
    # shortcut's.
    maps, maps_back, size = *((3, 5) if shortcut else (2, 3)), dtype.itemsize * elements
    return Case(
        "batch norm and shortcut" if shortcut else "batch norm", shape, dtype, draw, leaves,
        bound(reference.batch_norm_relu), candidates,
        forward=[Work("batch norm", 8 * elements, maps * size, bytes_read_again=size)],
        backward=[Work("batch norm backward", 12 * elements, maps_back * size, bytes_read_again=2 * size)],
    )  # fmt: skip


# The momentum update.


def resnet50_sizes() -> list[int]:
    """Elements of each parameter of a ResNet-50 (25.6 million in 161 tensors)."""
    sizes = [64 * 3 * 49, 64, 64]
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for index in range(blocks):
            for count, filters in ((inputs * width, width), (9 * width**2, width), (4 * width**2, 4 * width)):
                sizes += [count, filters, filters]
            if index == 0:
                sizes += [4 * inputs * width, 4 * width, 4 * width]
            inputs = 4 * width
    return [*sizes, 2048 * 1000, 1000]


def momentum_candidates(targets: list[Tensor], sources: list[Tensor], coefficient: float) -> dict[str, Callable]:
    """Training always passes `skip`, a flag on the device; what an update without it would take is there to compare."""
    skip = torch.zeros((), device=targets[0].device)

    def loop() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.mul_(coefficient).add_(source, alpha=1 - coefficient)

    def update(implementation: str, skip: Tensor | None) -> Callable[[], None]:
        return lambda: api.momentum_update(targets, sources, coefficient, skip, implementation=implementation)

    candidates = {
        "definition": update("reference", skip),
        "foreach-lerp-without-skip": update("reference", None),
        "loop-without-skip": loop,
    }
    if targets[0].is_cuda:
        ours = {"ours": update("triton", skip), "ours-without-skip": update("triton", None)}
        candidates = ours | candidates
    return candidates
