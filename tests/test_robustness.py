"""Corruptions, occlusion and attacks against closed forms, other libraries and invariants."""

import colorsys
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from automix_dist import robustness
from automix_dist.robustness import OCCLUSION_GRID, SEVERITIES, STRENGTHS, attack, corrupt, occlude


def pictures(count: int = 6, side: int = 32) -> torch.Tensor:
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.random((count, side, side, 3)), (0, 2, 2, 0))
    return torch.from_numpy(((smooth - smooth.min()) / np.ptp(smooth) * 255).astype(np.uint8))


@pytest.mark.parametrize("name", STRENGTHS)
def test_a_corruption_depends_on_seed_and_sample_only(name):
    images, samples = pictures(), torch.tensor([5, 0, 9, 3, 2, 7])
    together = corrupt(images, name, 3, samples, seed=1)
    assert together.dtype == torch.uint8 and together.shape == images.shape and not torch.equal(together, images)
    alone = torch.cat([corrupt(images[i : i + 1], name, 3, samples[i : i + 1], seed=1) for i in range(6)])
    assert (together.int() - alone.int()).abs().max() <= 1  # a convolution's last bit may depend on the batch
    if "noise" in name or name == "motion_blur":
        assert not torch.equal(together, corrupt(images, name, 3, samples, seed=2))


# Severities of motion_blur differ in angles, saturate's change sides, and pixelate halves the side exactly at one.
@pytest.mark.parametrize("side", [32, 64, 224])
@pytest.mark.parametrize("name", sorted(set(STRENGTHS) - {"motion_blur", "saturate", "pixelate"}))
def test_a_corruption_grows_with_its_severity(name, side):
    images = pictures(side=side)
    away = [(corrupt(images, name, s, torch.arange(6), 0).float() - images).square().mean() for s in SEVERITIES]
    assert away == sorted(away) and away[-1] > away[0]


@pytest.mark.parametrize(("side", "deviation", "photons", "share"), [(224, 0.08, 60, 0.27), (32, 0.04, 500, 0.07)])
def test_noise_has_the_variance_it_should_have(side, deviation, photons, share):
    grey = torch.full((8, side, side, 3), 128, dtype=torch.uint8)
    rounding = 1 / 12 / 255**2
    for name, variance in (("gaussian_noise", deviation**2), ("shot_noise", 128 / 255 / photons)):
        measured = (corrupt(grey, name, 1, torch.arange(8), 0).double() / 255).var().item()
        assert measured == pytest.approx(variance + rounding, rel=0.05)
    hit = corrupt(grey, "impulse_noise", 5, torch.arange(8), 0)
    assert (hit != 128).double().mean().item() == pytest.approx(share, abs=0.01)
    assert set(hit.unique().tolist()) == {0, 128, 255}


def test_strengths_are_those_of_the_nearest_size_and_lengths_those_of_the_image():
    images = pictures(1, side=160)
    assert [robustness.published_size(side) for side in (8, 28, 44, 46, 64, 119, 120, 160, 299)] == [
        *(32, 32, 32, 64, 64, 64, 224, 224, 224)
    ]
    ours = corrupt(images, "gaussian_blur", 3, torch.arange(1), 0).numpy()
    deviation = 3 * 160 / 224
    theirs = ndimage.gaussian_filter(images.numpy().astype(float), (0, deviation, deviation, 0), mode="nearest")
    assert np.abs(ours - theirs).max() <= 1.5  # theirs reaches 4 deviations, ours 3


def test_motion_blur_drags_a_point_along_a_way_as_long_as_its_severity():
    """Mean and largest distance of what becomes of a bright point: a Gaussian's one side, cut at twice the radius."""
    image = torch.zeros(1, 97, 97, 3, dtype=torch.uint8)
    image[0, 48, 48] = 255
    for severity, (radius, deviation) in zip(SEVERITIES, STRENGTHS["motion_blur"][224], strict=True):
        generators = [robustness.rng_of(0, 0, 1, severity)]
        blurred = robustness._motion_blur(image.permute(0, 3, 1, 2).double() / 255, (radius, deviation), generators)[
            0, 0
        ]
        rows, columns = torch.meshgrid(*[torch.arange(97.0) - 48] * 2, indexing="ij")
        distance = (rows**2 + columns**2).sqrt()
        cut = 2 * radius / (deviation * math.sqrt(2))
        expected = deviation * math.sqrt(2 / math.pi) * (1 - math.exp(-(cut**2))) / math.erf(cut)
        assert blurred.sum() == pytest.approx(1)
        mean = (blurred * distance).sum().item()
        assert mean == pytest.approx(expected, rel=0.1)
        assert distance[blurred > 0].max() <= 2 * radius + 2


def test_gaussian_blur_is_scipys():
    images = pictures(2, 224)
    ours = corrupt(images, "gaussian_blur", 3, torch.arange(2), 0).numpy()
    theirs = ndimage.gaussian_filter(images.numpy().astype(float), (0, 3, 3, 0), mode="nearest", truncate=3)
    assert np.abs(ours - theirs).max() <= 0.51


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("side", [32, 224])
def test_defocus_blur_is_opencvs(side, severity):
    """ImageNet-C's disk, softened by OpenCV, by whose filter the images are convolved."""
    cv2 = pytest.importorskip("cv2")
    radius, deviation = STRENGTHS["defocus_blur"][side][severity - 1]
    grid = np.arange(-12, 13)
    disk = (grid[:, None] ** 2 + grid[None, :] ** 2 <= radius**2).astype(np.float32)
    kernel = cv2.GaussianBlur(disk / disk.sum(), (3, 3) if radius <= 8 else (5, 5), sigmaX=deviation)
    images = pictures(2, side)
    ours = corrupt(images, "defocus_blur", severity, torch.arange(2), 0).numpy()
    theirs = [
        cv2.filter2D(image.astype(np.float32), -1, kernel, borderType=cv2.BORDER_REPLICATE) for image in images.numpy()
    ]
    assert np.abs(ours - np.stack(theirs)).max() <= 0.51


@pytest.mark.parametrize("severity", SEVERITIES)
def test_saturate_is_the_standard_librarys_hsv(severity):
    images = torch.randint(0, 256, (2, 224, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = torch.cat([images, images[..., :1].expand(-1, -1, -1, 3)], dim=1).transpose(1, 2)  # greys too
    images[0, 0, 0] = 0
    factor, added = STRENGTHS["saturate"][224][severity - 1]
    ours = corrupt(images, "saturate", severity, torch.arange(2), 0).view(-1, 3).numpy()
    for got, pixel in zip(ours, images.reshape(-1, 3).double() / 255, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel.tolist())
        expected = colorsys.hsv_to_rgb(hue, min(saturation * factor + added, 1), value)
        assert np.abs(got - 255 * np.array(expected)).max() <= 0.51


def test_pixelate_is_pillows():
    (image,) = pictures(1)
    picture = Image.fromarray(image.numpy())
    theirs = np.asarray(picture.resize((28, 28), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX))
    ours = corrupt(image[None], "pixelate", 2, torch.tensor([0]), 0)[0].numpy()
    assert np.array_equal(ours, theirs)


def test_jpeg_has_the_quality_of_its_severity():
    (image,) = pictures(1)
    stored = io.BytesIO()
    Image.fromarray(image.numpy()).save(stored, format="jpeg", quality=65)
    theirs = np.asarray(Image.open(stored)).astype(int)
    ours = corrupt(image[None], "jpeg_compression", 2, torch.tensor([0]), 0)[0].numpy()
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("side", [14, 32, 224])
def test_occlusion_hides_whole_cells_and_nothing_else(side):
    images = torch.full((3, side, side, 3), 200, dtype=torch.uint8)
    hidden = occlude(images, 0.25, torch.arange(3), 0, (0.0, 0.2, 1.0))
    gone = (hidden != 200).any(dim=3)
    assert torch.equal(hidden[gone].unique(dim=0), torch.tensor([[0, 51, 255]], dtype=torch.uint8))
    cell = torch.arange(side) * OCCLUSION_GRID // side
    cells = {(i, *c) for i in range(3) for c in zip(*(cell[n].tolist() for n in gone[i].nonzero().T), strict=True)}
    assert len(cells) == 3 * 49  # a quarter of 196
    whole = torch.tensor([[[(i, r.item(), c.item()) in cells for c in cell] for r in cell] for i in range(3)])
    assert torch.equal(whole, gone)
    assert not torch.equal(gone[0], gone[1])
    assert torch.equal(occlude(images[1:], 0.25, torch.arange(1, 3), 0, (0.0, 0.2, 1.0)), hidden[1:])


def linear(seed: int = 0):
    """Two classes by a hyperplane, in float64: the worst displacement is known."""
    weights = torch.randn(2, 3 * 8 * 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    pixels = 0.2 + 0.6 * torch.rand(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return weights, pixels, torch.tensor([0, 1, 0, 1, 1])


def test_fgsm_and_pgd_on_a_linear_model_are_the_closed_form():
    weights, pixels, labels = linear()
    direction = (weights[1 - labels] - weights[labels]).sign().view_as(pixels)
    worst = pixels + 0.05 * direction

    def answer(x):
        return x.flatten(1) @ weights.T

    fgsm = attack(answer, pixels, labels, epsilon=0.05, steps=1, step_size=0.05)
    assert torch.allclose(fgsm, worst, rtol=0, atol=1e-15)
    start = robustness.random_start(pixels.float(), torch.arange(5), 0, 0.05).double()
    assert 0.049 < start.abs().max() <= 0.05 and start.mean().abs() < 0.005
    pgd = attack(answer, pixels, labels, epsilon=0.05, steps=10, step_size=0.0125, start=start)
    assert torch.allclose(pgd, worst, rtol=0, atol=1e-15)
    margin = answer(pgd).gather(1, labels[:, None]) - answer(pgd).gather(1, 1 - labels[:, None])
    before = answer(pixels).gather(1, labels[:, None]) - answer(pixels).gather(1, 1 - labels[:, None])
    lost = 0.05 * (weights[0] - weights[1]).abs().sum()
    assert torch.allclose(before - margin, lost.expand(5, 1))


def test_pgd_stays_in_the_ball_and_the_range_and_raises_the_loss():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(288, 4))
    pixels, labels = torch.rand(6, 3, 8, 8), torch.randint(0, 4, (6,))
    loss = torch.nn.functional.cross_entropy
    with torch.no_grad():
        moved = attack(model, pixels, labels, epsilon=0.1, steps=10, step_size=0.025)
        assert (moved - pixels).abs().max() <= 0.1 + 1e-6 and moved.min() >= 0 and moved.max() <= 1
        assert loss(model(moved), labels) > loss(model(pixels), labels)
    by_hand = pixels.clone()
    for _ in range(10):
        by_hand.requires_grad_()
        loss(model(by_hand), labels, reduction="sum").backward()
        step = by_hand.detach() + 0.025 * by_hand.grad.sign()
        by_hand = torch.min(torch.max(step, pixels - 0.1), pixels + 0.1).clamp(0, 1)
    assert torch.allclose(moved, by_hand, atol=1e-6)
    assert math.isfinite(moved.sum())


def test_brightness_is_the_standard_librarys_hsv_and_contrast_is_of_each_channel():
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[..., 0] //= 2  # channels of different means
    samples = torch.arange(2)
    brighter = corrupt(images, "brightness", 5, samples, 0)
    added = STRENGTHS["brightness"][32][4]
    for y in range(0, 32, 5):
        hue, saturation, value = colorsys.rgb_to_hsv(*(images[0, y, y].double() / 255).tolist())
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + added, 1))
        assert brighter[0, y, y].tolist() == pytest.approx([255 * each for each in expected], abs=1)
    share = STRENGTHS["contrast"][32][4]
    pixels = images.double()
    mean = pixels.mean(dim=(1, 2), keepdim=True)
    expected = (mean + share * (pixels - mean)).clamp(0, 255)
    assert (corrupt(images, "contrast", 5, samples, 0).double() - expected).abs().max() <= 1


def test_corruptions_severities_and_samples_draw_apart(monkeypatch):
    """No two of them have the same random numbers, nor has what is hidden or an attack's start."""
    keys, rng_of = [], robustness.rng_of
    monkeypatch.setattr(robustness, "rng_of", lambda *key: keys.append(key) or rng_of(*key))
    images, samples = torch.full((2, 32, 32, 3), 128, dtype=torch.uint8), torch.tensor([3, 4])
    for name in STRENGTHS:
        for severity in SEVERITIES:
            corrupt(images, name, severity, samples, 7)
    occlude(images, 0.5, samples, 7, (0.5, 0.5, 0.5))
    robustness.random_start(images.permute(0, 3, 1, 2) / 255, samples, 7, 0.1)
    assert len(keys) == len(set(keys)) == 2 * (len(STRENGTHS) * len(SEVERITIES) + 2)
    drawn = [rng_of(*key).random() for key in keys]
    assert len(set(drawn)) == len(drawn)
