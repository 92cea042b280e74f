"""What makes images harder to classify: corruptions, occlusion and attacks.

What is random depends on (seed, sample) only: the same for any batch size, number of ranks and device. The corruptions
follow ImageNet-C (arXiv 1903.12261), at small sizes Tiny ImageNet-C and CIFAR-10-C; the pixels are not those of the
published files, which `automix eval --data` reads.
"""

import io
import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

STRENGTHS = {
    "gaussian_noise": {  # standard deviation; images range from 0 to 1
        224: (0.08, 0.12, 0.18, 0.26, 0.38),
        64: (0.04, 0.08, 0.12, 0.15, 0.18),
        32: (0.04, 0.06, 0.08, 0.09, 0.10),
    },
    "shot_noise": {  # photons of a white pixel
        224: (60, 25, 12, 5, 3),
        64: (250, 100, 50, 30, 15),
        32: (500, 250, 100, 75, 50),
    },
    "impulse_noise": {  # share of the values that become 0 or 1
        224: (0.03, 0.06, 0.09, 0.17, 0.27),
        64: (0.01, 0.02, 0.05, 0.08, 0.14),
        32: (0.01, 0.02, 0.03, 0.05, 0.07),
    },
    "gaussian_blur": {  # standard deviation in pixels
        224: (1, 2, 3, 4, 6),
        64: (0.5, 0.75, 1, 1.25, 1.5),
        32: (0.4, 0.6, 0.7, 0.8, 1),
    },
    "defocus_blur": {  # radius of the disk, and standard deviation of what softens its rim, in pixels
        224: ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        64: ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
        32: ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    },
    "motion_blur": {  # radius and standard deviation in pixels
        224: ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        64: ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
        32: ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    },
    "brightness": {  # added to the value of hue, saturation and value
        224: (0.1, 0.2, 0.3, 0.4, 0.5),
        64: (0.1, 0.2, 0.3, 0.4, 0.5),
        32: (0.05, 0.1, 0.15, 0.2, 0.3),
    },
    "contrast": {  # of the distances from the mean that are left
        224: (0.4, 0.3, 0.2, 0.1, 0.05),
        64: (0.4, 0.3, 0.2, 0.1, 0.05),
        32: (0.75, 0.5, 0.4, 0.3, 0.15),
    },
    "saturate": {  # by what the saturation is multiplied, and what is added to it
        224: ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
        64: ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (30, 0.2)),
        32: ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    },
    "pixelate": {  # of the side that is left
        224: (0.6, 0.5, 0.4, 0.3, 0.25),
        64: (0.9, 0.8, 0.7, 0.6, 0.5),
        32: (0.95, 0.9, 0.85, 0.75, 0.65),
    },
    "jpeg_compression": {  # quality
        224: (25, 18, 15, 10, 7),
        64: (65, 58, 50, 40, 25),
        32: (80, 65, 58, 50, 40),
    },
}
"""Of each severity for images of about 224, 64 and 32 pixels, as in make_imagenet_c.py, make_tinyimagenet_c.py and
make_cifar_c.py of github.com/hendrycks/robustness; lengths grow and shrink with images of sizes in between."""
LENGTHS = {"gaussian_blur", "defocus_blur", "motion_blur"}
"""Whose strengths are lengths in pixels."""
SEVERITIES = (1, 2, 3, 4, 5)
OCCLUSION_GRID = 14
"""Cells along the side of an image that occlusion takes away whole."""


def corrupt(images: Tensor, name: str, severity: int, samples: Tensor, seed: int) -> Tensor:
    """uint8 [B, H, W, 3] -> the same, corrupted; `samples` [B] are the images' numbers in their set."""
    size = published_size(images.shape[2])
    strength = STRENGTHS[name][size][severity - 1]
    pixels = images.permute(0, 3, 1, 2).float() / 255
    rngs = [rng_of(seed, sample, 1 + list(STRENGTHS).index(name), severity) for sample in samples.tolist()]
    if name in LENGTHS:
        strength = np.multiply(strength, images.shape[2] / size)
    pixels = _CORRUPTIONS[name](pixels, strength, rngs)
    return (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)


def published_size(side: int) -> int:
    """The size with published strengths (224, 64 or 32) whose ratio to `side` is nearest to one."""
    return min(STRENGTHS["contrast"], key=lambda size: abs(math.log(side / size)))


def occlude(images: Tensor, share: float, samples: Tensor, seed: int, color: tuple[float, ...]) -> Tensor:
    """uint8 [B, H, W, 3] with `share` of its grid's cells, drawn for each sample, in `color` (on the [0, 1] scale)."""
    height, width = images.shape[1:3]
    cells = OCCLUSION_GRID**2
    order = np.stack([rng_of(seed, sample, 0, 0).permutation(cells) for sample in samples.tolist()])
    hidden = torch.from_numpy(order < round(share * cells)).to(images.device).view(-1, OCCLUSION_GRID, OCCLUSION_GRID)
    rows, columns = (torch.arange(n, device=images.device) * OCCLUSION_GRID // n for n in (height, width))
    fill = (torch.tensor(color, device=images.device) * 255).round().byte()
    return torch.where(hidden[:, rows][:, :, columns, None], fill, images)


def attack(
    answer: Callable[[Tensor], Tensor],
    pixels: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    steps: int,
    step_size: float,
    start: Tensor | None = None,
) -> Tensor:
    """The images within `epsilon` of `pixels` in each value that projected sign-gradient ascent on the loss finds.

    One step of size epsilon is FGSM (arXiv 1412.6572); several from a random start are PGD (arXiv 1706.06083).

    Args:
        answer: differentiable, [B, 3, H, W] in [0, 1] -> [B, classes] logits.
        pixels: [B, 3, H, W] in [0, 1].
        labels: [B] int64.
        start: first displacement, like pixels; 0 if none.
    """
    low, high = (pixels - epsilon).clamp(0, 1), (pixels + epsilon).clamp(0, 1)
    moved = pixels if start is None else (pixels + start).clamp(low, high)
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(answer(moved), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, moved)
        moved = (moved.detach() + step_size * gradient.sign()).clamp(low, high)
    return moved.detach()


def random_start(pixels: Tensor, samples: Tensor, seed: int, epsilon: float) -> Tensor:
    """Uniform displacements in [-epsilon, epsilon], like `pixels`."""
    rngs = [rng_of(seed, sample, 100, 0) for sample in samples.tolist()]
    return (2 * _draw(pixels, rngs, "random") - 1) * epsilon


def rng_of(*key: int) -> np.random.Generator:
    """An independent random generator for each key (seed, sample, kind, severity)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def _draw(pixels: Tensor, rngs: list[np.random.Generator], kind: str) -> Tensor:
    """Numbers for each image from its own generator: "random" or "standard_normal", like `pixels`."""
    drawn = [getattr(g, kind)(pixels.shape[1:], dtype=np.float32) for g in rngs]
    return torch.from_numpy(np.stack(drawn)).to(pixels.device)


def _gaussian_noise(pixels: Tensor, strength: float, rngs: list) -> Tensor:
    return pixels + strength * _draw(pixels, rngs, "standard_normal")


def _shot_noise(pixels: Tensor, strength: float, rngs: list) -> Tensor:
    means = (pixels * strength).cpu().numpy()
    counts = np.stack([g.poisson(mean) for g, mean in zip(rngs, means, strict=True)])
    return torch.from_numpy(counts).to(pixels) / strength


def _impulse_noise(pixels: Tensor, strength: float, rngs: list) -> Tensor:
    drawn = _draw(pixels, rngs, "random")
    return torch.where(drawn < strength, (drawn < strength / 2).float(), pixels)


def _gaussian_blur(pixels: Tensor, deviation: float, _: list) -> Tensor:
    return _filter(pixels, _gaussian(deviation, math.ceil(3 * deviation)))


def _defocus_blur(pixels: Tensor, strength: tuple[float, float], _: list) -> Tensor:
    """The pixels within the radius, and a Gaussian over 3 x 3 of them, above radius 8 over 5 x 5."""
    radius, deviation = strength
    rim = 1 if radius <= 8 else 2
    offsets = torch.arange(-math.floor(radius) - rim, math.floor(radius) + rim + 1.0)
    disk = (offsets[:, None] ** 2 + offsets[None, :] ** 2 <= radius**2).float()
    return _filter(pixels, F.conv2d(disk[None, None], _gaussian(deviation, rim)[None, None], padding=rim)[0, 0])


def _motion_blur(pixels: Tensor, strength: tuple[float, float], rngs: list) -> Tensor:
    """A straight way of 2 * radius from each pixel, at the image's own angle between -45 and 45 degrees; what lies far
    along it weighs less."""
    radius, deviation = strength
    size = math.ceil(2 * radius)
    offsets = torch.arange(-size, size + 1.0)
    blurred = []
    for image, g in zip(pixels, rngs, strict=True):
        angle = math.radians(g.uniform(-45, 45))
        along = offsets[None, :] * math.cos(angle) + offsets[:, None] * math.sin(angle)
        across = offsets[None, :] * math.sin(angle) - offsets[:, None] * math.cos(angle)
        on_the_way = (
            (1 - across.abs()).clamp(min=0) * (0.5 + along).clamp(0, 1) * (2 * radius + 0.5 - along).clamp(0, 1)
        )
        weights = on_the_way * torch.exp(-(along**2) / (2 * deviation**2))
        blurred.append(_filter(image[None], weights))
    return torch.cat(blurred)


def _gaussian(deviation: float, reach: int) -> Tensor:
    """Weights [2 reach + 1, 2 reach + 1]."""
    row = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * deviation**2))
    return torch.outer(row, row)


def _filter(pixels: Tensor, weights: Tensor) -> Tensor:
    """Each channel averaged with `weights` [2 n + 1, 2 n + 1]; the image's edge goes on beyond it."""
    n = len(weights) // 2
    kernel = (weights / weights.sum()).to(pixels).expand(3, 1, -1, -1)
    return F.conv2d(F.pad(pixels, (n, n, n, n), mode="replicate"), kernel, groups=3)


def _brightness(pixels: Tensor, strength: float, _: list) -> Tensor:
    """Adds to the value of hue, saturation and value: all channels grow by the same factor."""
    value = pixels.amax(dim=1, keepdim=True)
    brighter = (value + strength).clamp(max=1)
    return torch.where(value > 0, pixels / value.clamp(min=1e-6) * brighter, brighter)


def _contrast(pixels: Tensor, strength: float, _: list) -> Tensor:
    mean = pixels.mean(dim=(2, 3), keepdim=True)
    return mean + strength * (pixels - mean)


def _saturate(pixels: Tensor, strength: tuple[float, float], _: list) -> Tensor:
    """Multiplies the saturation of hue, saturation and value, and adds to it; the hue of grey counts as red."""
    factor, added = strength
    value, low = pixels.amax(dim=1, keepdim=True), pixels.amin(dim=1, keepdim=True)
    below = (value - pixels) / (value - low).clamp(min=1e-6)  # 0 to 1: how far each channel is on the way to the lowest
    below = torch.where(value > low, below, pixels.new_tensor([0.0, 1.0, 1.0])[:, None, None])
    saturation = (value - low) / value.clamp(min=1e-6)
    return value * (1 - (saturation * factor + added).clamp(0, 1) * below)


def _pixelate(pixels: Tensor, share: float, _: list) -> Tensor:
    width, height = pixels.shape[3], pixels.shape[2]
    few = max(int(width * share), 1), max(int(height * share), 1)
    box = Image.Resampling.BOX
    return _with_pillow(pixels, lambda picture: picture.resize(few, box).resize((width, height), box))


def _jpeg_compression(pixels: Tensor, quality: int, _: list) -> Tensor:
    def stored(picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, format="jpeg", quality=quality)
        return Image.open(file)

    return _with_pillow(pixels, stored)


def _with_pillow(pixels: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    bytes_of_each = (pixels.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
    changed = np.stack([np.asarray(change(Image.fromarray(each))) for each in bytes_of_each])
    return torch.from_numpy(changed).permute(0, 3, 1, 2).to(pixels) / 255


_FUNCTIONS = (
    _gaussian_noise,
    _shot_noise,
    _impulse_noise,
    _gaussian_blur,
    _defocus_blur,
    _motion_blur,
    _brightness,
    _contrast,
    _saturate,
    _pixelate,
    _jpeg_compression,
)
_CORRUPTIONS = dict(zip(STRENGTHS, _FUNCTIONS, strict=True))
