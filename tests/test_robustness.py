"""Corruptions, occlusion and attacks against closed forms, other libraries and invariants."""

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
@pytest.mark.parametrize("name", sorted(set(STRENGTHS) - {"motion_blur", "saturate", "pixelate"}))
def test_a_corruption_grows_with_its_severity(name):
    images = pictures(side=224)
    away = [(corrupt(images, name, s, torch.arange(6), 0).float() - images).square().mean() for s in SEVERITIES]
    assert away == sorted(away) and away[-1] > away[0]


def test_noise_has_the_variance_it_should_have():
    grey = torch.full((4, 64, 64, 3), 128, dtype=torch.uint8)
    for name, variance in (("gaussian_noise", 0.08**2), ("shot_noise", 128 / 255 / 60)):
        measured = (corrupt(grey, name, 1, torch.arange(4), 0).double() / 255).var().item()
        assert measured == pytest.approx(variance, rel=0.05)
    hit = corrupt(grey, "impulse_noise", 5, torch.arange(4), 0)
    assert (hit != 128).double().mean().item() == pytest.approx(0.27, abs=0.01)
    assert set(hit.unique().tolist()) == {0, 128, 255}


def test_motion_blur_drags_a_point_along_a_way_as_long_as_its_severity():
    """Mean and largest distance of what becomes of a bright point: a Gaussian's one side, cut at twice the radius."""
    image = torch.zeros(1, 225, 225, 3, dtype=torch.uint8)
    image[0, 112, 112] = 255
    for severity, (radius, deviation) in zip(SEVERITIES, STRENGTHS["motion_blur"], strict=True):
        generators = [robustness.generator(0, 0, 1, severity)]
        blurred = robustness._motion_blur(image.permute(0, 3, 1, 2).double() / 255, (radius, deviation), generators)[
            0, 0
        ]
        rows, columns = torch.meshgrid(*[torch.arange(225.0) - 112] * 2, indexing="ij")
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


def test_pixelate_is_pillows():
    (image,) = pictures(1)
    picture = Image.fromarray(image.numpy())
    theirs = np.asarray(picture.resize((16, 16), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX))
    ours = corrupt(image[None], "pixelate", 2, torch.zeros(1), 0)[0].numpy()
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_jpeg_has_the_quality_of_its_severity():
    (image,) = pictures(1)
    stored = io.BytesIO()
    Image.fromarray(image.numpy()).save(stored, format="jpeg", quality=18)
    theirs = np.asarray(Image.open(stored)).astype(int)
    ours = corrupt(image[None], "jpeg_compression", 2, torch.zeros(1), 0)[0].numpy()
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
