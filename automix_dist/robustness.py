"""What makes images harder to classify: corruptions, occlusion and attacks.

What is random depends on (seed, sample) only: the same for any batch size, number of ranks and device. Strengths of the
corruptions follow ImageNet-C (arXiv 1903.12261) at 224 pixels, and lengths shrink with the image; the pixels are not
those of its published files, which `automix eval --data` reads.
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
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation; images range from 0 to 1
    "shot_noise": (60, 25, 12, 5, 3),  # photons of a white pixel
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),  # share of the values that become 0 or 1
    "gaussian_blur": (1, 2, 3, 4, 6),  # standard deviation in pixels
    "defocus_blur": (3, 4, 6, 8, 10),  # radius of the disk in pixels
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),  # radius and standard deviation in pixels
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # of the distances from the mean that are left
    "saturate": (0.3, 0.1, 2, 5, 20),  # of the distances from grey
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),  # of the side that is left
    "jpeg_compression": (25, 18, 15, 10, 7),  # quality
}
SEVERITIES = (1, 2, 3, 4, 5)
OCCLUSION_GRID = 14
"""Cells along the side of an image that occlusion takes away whole."""


def corrupt(images: Tensor, name: str, severity: int, samples: Tensor, seed: int) -> Tensor:
    """uint8 [B, H, W, 3] -> the same, corrupted; `samples` [B] are the images' numbers in their set."""
    strength = STRENGTHS[name][severity - 1]
    pixels = images.permute(0, 3, 1, 2).float() / 255
    generators = [generator(seed, int(sample), 1 + list(STRENGTHS).index(name), severity) for sample in samples]
    pixels = _CORRUPTIONS[name](pixels, strength, generators)
    return (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)


def occlude(images: Tensor, share: float, samples: Tensor, seed: int, color: tuple[float, ...]) -> Tensor:
    """uint8 [B, H, W, 3] with `share` of its grid's cells, drawn for each sample, in `color` (on the [0, 1] scale)."""
    height, width = images.shape[1:3]
    cells = OCCLUSION_GRID**2
    order = np.stack([generator(seed, int(sample), 0, 0).permutation(cells) for sample in samples])
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
    generators = [generator(seed, int(sample), 100, 0) for sample in samples]
    return (2 * _draw(pixels, generators, "random") - 1) * epsilon


def generator(*key: int) -> np.random.Generator:
    """A generator of its own for each key of four numbers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def _draw(pixels: Tensor, generators: list[np.random.Generator], kind: str) -> Tensor:
    """Numbers for each image from its own generator: "random" or "standard_normal", like `pixels`."""
    drawn = [getattr(g, kind)(pixels.shape[1:], dtype=np.float32) for g in generators]
    return torch.from_numpy(np.stack(drawn)).to(pixels.device)


def _gaussian_noise(pixels: Tensor, strength: float, generators: list) -> Tensor:
    return pixels + strength * _draw(pixels, generators, "standard_normal")


def _shot_noise(pixels: Tensor, strength: float, generators: list) -> Tensor:
    means = (pixels * strength).cpu().numpy()
    counts = np.stack([g.poisson(mean) for g, mean in zip(generators, means, strict=True)])
    return torch.from_numpy(counts).to(pixels) / strength


def _impulse_noise(pixels: Tensor, strength: float, generators: list) -> Tensor:
    drawn = _draw(pixels, generators, "random")
    return torch.where(drawn < strength, (drawn < strength / 2).float(), pixels)


def _gaussian_blur(pixels: Tensor, strength: float, _: list) -> Tensor:
    sigma = strength * pixels.shape[-1] / 224
    offsets = torch.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1.0)
    row = torch.exp(-(offsets**2) / (2 * sigma**2))
    return _filter(pixels, torch.outer(row, row))


def _defocus_blur(pixels: Tensor, strength: float, _: list) -> Tensor:
    radius = strength * pixels.shape[-1] / 224
    offsets = torch.arange(-math.ceil(radius), math.ceil(radius) + 1.0)
    distance = torch.hypot(offsets[:, None], offsets[None, :])
    return _filter(pixels, (radius + 0.5 - distance).clamp(0, 1))  # the rim counts by the share that the disk covers


def _motion_blur(pixels: Tensor, strength: tuple[float, float], generators: list) -> Tensor:
    """A straight way of 2 * radius from each pixel, at the image's own angle between -45 and 45 degrees; what lies far
    along it weighs less."""
    radius, deviation = (each * pixels.shape[-1] / 224 for each in strength)
    size = math.ceil(2 * radius)
    offsets = torch.arange(-size, size + 1.0)
    blurred = []
    for image, g in zip(pixels, generators, strict=True):
        angle = math.radians(g.uniform(-45, 45))
        along = offsets[None, :] * math.cos(angle) + offsets[:, None] * math.sin(angle)
        across = offsets[None, :] * math.sin(angle) - offsets[:, None] * math.cos(angle)
        on_the_way = (
            (1 - across.abs()).clamp(min=0) * (0.5 + along).clamp(0, 1) * (2 * radius + 0.5 - along).clamp(0, 1)
        )
        weights = on_the_way * torch.exp(-(along**2) / (2 * deviation**2))
        blurred.append(_filter(image[None], weights))
    return torch.cat(blurred)


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


def _saturate(pixels: Tensor, strength: float, _: list) -> Tensor:
    grey = (pixels * pixels.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=1, keepdim=True)
    return grey + strength * (pixels - grey)


def _pixelate(pixels: Tensor, strength: float, _: list) -> Tensor:
    small = F.interpolate(pixels, size=[max(round(n * strength), 1) for n in pixels.shape[2:]], mode="area")
    return F.interpolate(small, size=pixels.shape[2:], mode="nearest-exact")


def _jpeg_compression(pixels: Tensor, strength: float, _: list) -> Tensor:
    decoded = []
    for image in (pixels.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy():
        stored = io.BytesIO()
        Image.fromarray(image).save(stored, format="jpeg", quality=strength)
        decoded.append(np.asarray(Image.open(stored)))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).to(pixels) / 255


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
