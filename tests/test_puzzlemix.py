"""PuzzleMix against the published energy in loops, minimum cuts, linear programs, assignments and brute force."""

import itertools

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse.csgraph import maximum_flow
from scipy.stats import binom
from test_policies import draw, images_of, make
from tiny import CLASSES, TinyBackbone, micro_batch, tiny_config
from torch.nn import functional as F

from automix_dist.backbone import create_backbone
from automix_dist.classifier import Classifier
from automix_dist.config import ConfigError, ModelConfig
from automix_dist.model import build_model
from automix_dist.policies import puzzlemix
from automix_dist.policy import Draw


def saliency_of(size: int, side: int, contrast: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * size + side)
    return torch.exp(contrast * torch.randn(size, side, side, generator=generator))


def published_energy(mask: np.ndarray, own: int, images, saliency, partner, lam: float, settings) -> float:
    """The sums of the paper for one image's mask [n, n], the own image's weight in each block, in loops."""
    n, other = len(mask), int(partner[own])
    block = images.shape[2] // n
    beta = settings.beta / n / 16
    pixels = images.double().numpy() * 0.25

    def share(i):
        means = saliency[i].double().numpy().reshape(n, block, n, block).mean(axis=(1, 3))
        return means / means.sum()

    def jump(upper, lower, y, x, down):
        """The border between block (y, x) of one image and its neighbour of another, in squares of 4 pixels."""
        total = 0.0
        for along in range(0, block, 4):
            if down:
                a = pixels[upper, :, (y + 1) * block - 4 : (y + 1) * block, x * block + along : x * block + along + 4]
                b = pixels[lower, :, (y + 1) * block : (y + 1) * block + 4, x * block + along : x * block + along + 4]
            else:
                a = pixels[upper, :, y * block + along : y * block + along + 4, (x + 1) * block - 4 : (x + 1) * block]
                b = pixels[lower, :, y * block + along : y * block + along + 4, (x + 1) * block : (x + 1) * block + 4]
            total += np.abs(a.mean(axis=(1, 2)) - b.mean(axis=(1, 2))).mean()
        return total / (block // 4)

    energy, top = 0.0, settings.levels - 1
    for y, x in itertools.product(range(n), repeat=2):
        z = mask[y, x]
        energy += z * share(other)[y, x] + (1 - z) * share(own)[y, x]
        energy -= settings.eta / n**2 * binom.logpmf(round(z * top), top, lam)
        for down in (True, False):
            if (y if down else x) == n - 1:
                continue
            w = mask[y + 1, x] if down else mask[y, x + 1]
            d = {(a, b): jump(a, b, y, x, down) for a in (own, other) for b in (own, other)}
            mixed = z * (d[own, own] + d[own, other]) / 2 + (1 - z) * (d[other, own] + d[other, other]) / 2
            mixed += w * (d[own, own] + d[other, own]) / 2 + (1 - w) * (d[own, other] + d[other, other]) / 2
            differ = (d[own, other] + d[other, own] - d[own, own] - d[other, other]) / 2
            energy += beta * settings.gamma * mixed + (beta + beta * settings.gamma * differ) * (z - w) ** 2
    return energy


def energy_of(levels: torch.Tensor, costs, rows, columns) -> torch.Tensor:
    """What `best_mask` minimises, in float64, for levels [..., B, n, n]."""
    levels, top = levels.double(), len(costs)
    steps = sum((levels > k) * cost.double() for k, cost in enumerate(costs))
    edges = (rows.double() * levels.diff(dim=-2) ** 2).sum(dim=(-1, -2))
    edges = edges + (columns.double() * levels.diff(dim=-1) ** 2).sum(dim=(-1, -2))
    return steps.sum(dim=(-1, -2)) + edges / top**2


@pytest.mark.parametrize("levels", [2, 3])
def test_the_mask_has_nearly_the_least_published_energy(levels):
    """Of all masks of 3 x 3 blocks: 2^9, or a sample of 3^9 for the loops and all of them for the least one."""
    made = make("puzzlemix", levels=levels, blocks=[3], beta=4.0)
    images, saliency, top = images_of(4, 24, 24), saliency_of(4, 24), levels - 1
    shares = puzzlemix.share_of_blocks(saliency, (3, 3))
    this = Draw(torch.tensor([0.2, 0.5, 0.7, 0.9]), torch.tensor([1, 2, 3, 0]), {})
    terms = made.energy(images, shares, this)
    every = torch.tensor(list(itertools.product(range(levels), repeat=9))).view(-1, 1, 3, 3)
    ours = energy_of(every, *terms)  # [masks, B]
    for i, lam in enumerate(this.lam.tolist()):
        some = torch.linspace(0, len(every) - 1, 25).long()
        masks = 1 - every[some, 0].double().numpy() / top
        published = [published_energy(m, i, images, saliency, this.partner, lam, made.settings) for m in masks]
        gap = 9 * np.array(published) - ours[some, i].numpy()
        np.testing.assert_allclose(gap, gap[0], atol=2e-5)  # equal but for a constant
    best = energy_of(puzzlemix.best_mask(*terms), *terms)
    spread = ours.max(dim=0).values - ours.min(dim=0).values
    assert (best - ours.min(dim=0).values <= 1e-3 * spread).all()


def problem(n: int, levels: int, contrast: float) -> tuple[torch.Tensor, ...]:
    made = make("puzzlemix", levels=levels)
    images, saliency = images_of(6, 64, 64), saliency_of(6, n, contrast)
    this = Draw(torch.linspace(0.1, 0.9, 6), torch.arange(6).roll(1), {})
    return made.energy(images, puzzlemix.share_of_blocks(saliency, (n, n)), this)


def edges_of(n: int) -> tuple[np.ndarray, np.ndarray]:
    number = np.arange(n * n).reshape(n, n)
    first = np.concatenate([number[:-1].ravel(), number[:, :-1].ravel()])
    return first, np.concatenate([number[1:].ravel(), number[:, 1:].ravel()])


def weights_of(rows: torch.Tensor, columns: torch.Tensor, i: int) -> np.ndarray:
    return np.concatenate([rows[i].double().numpy().ravel(), columns[i].double().numpy().ravel()])


def least_cut(costs, rows, columns, i: int) -> float:
    """Two levels: a minimum cut, in whole numbers of 1e-6."""
    n, unit = costs.shape[2], 1e6
    (first, second), source, sink = edges_of(n), n * n, n * n + 1
    unary = (costs[0, i].double().numpy().ravel() * unit).round().astype(np.int64)
    weight = (weights_of(rows, columns, i) * unit).round().astype(np.int64)
    up = np.maximum(unary, 0), np.maximum(-unary, 0)  # cost of level 1, of level 0
    number = np.arange(n * n)
    graph = sparse.csr_matrix(
        (
            np.concatenate([up[0], up[1], weight, weight]).astype(np.int32),
            (
                np.concatenate([number, np.full(n * n, source), first, second]),
                np.concatenate([np.full(n * n, sink), number, second, first]),
            ),
        ),
        shape=(n * n + 2, n * n + 2),
    )
    return (maximum_flow(graph, source, sink).flow_value - up[1].sum()) / unit


def least_sum(costs, rows, columns, i: int) -> float:
    """Any number of levels: a linear program whose corners are whole numbers."""
    top, n = len(costs), costs.shape[2]
    first, second = edges_of(n)
    count = len(first)
    at = np.arange(count)
    difference = sparse.csr_matrix(
        (np.repeat([1.0, -1.0], count), (np.tile(at, 2), np.concatenate([first, second]))), shape=(count, n * n)
    )
    difference = sparse.hstack([difference] * top)
    slack = sparse.hstack([sparse.eye(count)] * top)
    weight = weights_of(rows, columns, i)
    cost = np.concatenate([costs[:, i].double().numpy().ravel(), *((2 * k + 1) / top**2 * weight for k in range(top))])
    limits = sparse.vstack([sparse.hstack([difference, -slack]), sparse.hstack([-difference, -slack])])
    return linprog(cost, A_ub=limits.tocsr(), b_ub=np.zeros(2 * count), bounds=(0, 1)).fun


@pytest.mark.parametrize("n", [2, 4, 8, 16])
@pytest.mark.parametrize("levels", [2, 3, 4])
def test_masks_are_within_half_a_percent_of_the_least_energy(n, levels):
    for contrast in (0.5, 2.0):
        terms = problem(n, levels, contrast)
        mask = puzzlemix.best_mask(*terms)
        assert set(mask.unique().tolist()) <= set(range(levels))
        energy = energy_of(mask, *terms)
        for i in range(6):
            least = (least_cut if levels == 2 else least_sum)(*terms, i)
            scale = terms[0][:, i].abs().sum().item()
            assert least - 1e-3 <= energy[i].item() <= least + 0.005 * scale


@pytest.mark.parametrize("height, width", [(2, 2), (4, 4), (8, 8), (6, 10), (16, 16)])
@pytest.mark.parametrize("move_cost, share", [(0.2, 0.9), (0.8, 0.97)])
def test_places_gain_nearly_what_the_best_assignment_gains(height, width, move_cost, share):
    """Over all images; in a single one an auction may not have ended, and it keeps its blocks where they are."""
    generator, gained, possible = torch.Generator().manual_seed(height), 0.0, 0.0
    at = np.stack(np.divmod(np.arange(height * width), width), axis=1)
    distance = ((at[:, None] - at) ** 2).sum(axis=2) / (max(height, width) - 1) ** 2
    for contrast in (0.5, 1.0, 2.0):
        shares = torch.exp(contrast * torch.randn(16, height, width, generator=generator))
        shares = shares / shares.sum(dim=(1, 2), keepdim=True)
        shown = torch.rand(16, height, width, generator=generator) < torch.linspace(0.1, 0.9, 16).view(-1, 1, 1)
        for i, places in enumerate(puzzlemix.best_places(shares, shown, move_cost).numpy()):
            worth = shares[i].double().numpy().ravel()[:, None] * shown[i].numpy().ravel() - move_cost * distance
            got = worth[np.arange(len(worth)), places].sum() - np.trace(worth)
            best = worth[linear_sum_assignment(worth, maximize=True)].sum() - np.trace(worth)
            assert sorted(places) == list(range(len(worth))) and -1e-6 <= got <= best + 1e-6
            gained, possible = gained + got, possible + best
    assert possible == 0 or gained >= share * possible


def test_blocks_lie_where_they_were_moved_to():
    images = images_of(2, 6, 8)
    places = torch.tensor([[5, 4, 3, 2, 1, 0], [1, 2, 0, 3, 5, 4]])
    moved = puzzlemix.move_blocks(images, places, (3, 2))
    for i in range(2):
        for block, place in enumerate(places[i].tolist()):
            (y, x), (to_y, to_x) = divmod(block, 2), divmod(place, 2)
            got = moved[i, :, 2 * to_y : 2 * to_y + 2, 4 * to_x : 4 * to_x + 4]
            assert torch.equal(got, images[i, :, 2 * y : 2 * y + 2, 4 * x : 4 * x + 4])


def looked(made, images, step: int = 0) -> Draw:
    """A draw with a saliency map, as from an encoder."""
    this = draw(made, images, step)
    return this._replace(extra=this.extra | {"saliency": saliency_of(len(images), images.shape[2], 3.0)})


@pytest.mark.parametrize("move_pixels", [None, 2])
def test_the_mix_shows_moved_blocks_of_both_images(move_pixels):
    made, images = make("puzzlemix", move_pixels=move_pixels, move_cost=0.2), images_of(6, 32, 32)
    plain = make("puzzlemix", move=False)
    seen, moved = set(), 0
    for step in range(12):
        this = looked(made, images, step)
        seen.add(this.extra["blocks"])
        mix, fixed = made.mix(images, this), plain.mix(images, this)
        assert torch.equal(mix.mask, fixed.mask) and set(mix.mask.unique().tolist()) <= {0, 0.5, 1}
        torch.testing.assert_close(mix.lam, 1 - mix.mask.mean(dim=(1, 2)))
        expected = torch.lerp(images, images[this.partner], fixed.mask[:, None])
        torch.testing.assert_close(fixed.images, expected)
        side = min(move_pixels or 4, 32 // this.extra["blocks"])
        for i in range(6):  # wholly shown blocks are blocks of the image that is shown there
            for source, where in ((i, mix.mask[i] == 0), (int(this.partner[i]), mix.mask[i] == 1)):
                tiles = images[source].unfold(1, side, side).unfold(2, side, side).flatten(1, 2)
                tiles = {tuple(tile.flatten().tolist()) for tile in tiles.transpose(0, 1)}
                for y, x in itertools.product(range(0, 32, side), repeat=2):
                    if where[y, x]:
                        tile = mix.images[i, :, y : y + side, x : x + side]
                        assert tuple(tile.flatten().tolist()) in tiles
                        moved += not torch.equal(tile, images[source, :, y : y + side, x : x + side])
    assert seen == {2, 4, 8, 16} and moved > 20


@pytest.mark.parametrize(("size", "side"), [(64, 4), (96, None)])
def test_blocks_that_move_are_four_pixels_wide_or_in_larger_images_the_masks_own(size, side, monkeypatch):
    made, images, grids = make("puzzlemix"), images_of(2, size, size), []
    best_places = puzzlemix.best_places

    def noted(shares, *rest):
        grids.append(tuple(shares.shape[1:]))
        return best_places(shares, *rest)

    monkeypatch.setattr(puzzlemix, "best_places", noted)
    for step in range(6):
        this = looked(made, images, step)
        made.mix(images, this)
        blocks = this.extra["blocks"]
        assert grids[-1] == (size // min(side or size, size // blocks),) * 2


def test_what_stands_out_is_kept():
    """With one salient square in each image, in different places, both show."""
    images, saliency = torch.zeros(2, 3, 32, 32), torch.full((2, 32, 32), 0.01)
    saliency[0, 4:12, 4:12] = saliency[1, 20:28, 20:28] = 1
    this = Draw(torch.tensor([0.5, 0.5]), torch.tensor([1, 0]), {"blocks": 8, "saliency": saliency})
    mask = make("puzzlemix").mix(images, this).mask
    assert (mask[0, 4:12, 4:12] == 0).all() and (mask[0, 20:28, 20:28] == 1).all()
    assert (mask[1, 4:12, 4:12] == 1).all() and (mask[1, 20:28, 20:28] == 0).all()


def test_saliency_is_the_gradient_in_evaluation_mode():
    backbone = create_backbone(ModelConfig("test_resnet"), None, 32)
    classifier = Classifier(backbone, 4, make("puzzlemix")).train()
    with torch.no_grad():
        classifier.query.head_one.weight.normal_()
    images, labels = images_of(3, 32, 32), torch.tensor([2, 0, 3])
    state = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    this = classifier.draw(images, seed=0, step=0)
    got = classifier.policy.prepare(classifier.query, images, labels, this).extra["saliency"]
    assert classifier.training and all(module.training for module in classifier.query.modules())
    assert all(torch.equal(state[name], tensor) for name, tensor in classifier.state_dict().items())
    assert all(p.grad is None for p in classifier.parameters()) and not images.requires_grad
    classifier.eval()
    for i in range(3):
        pixels = images[i : i + 1].clone().requires_grad_()
        F.nll_loss(classifier.query(pixels, "one").log_softmax(dim=1), labels[i : i + 1]).backward()
        torch.testing.assert_close(got[i], (pixels.grad[0] ** 2).mean(dim=0).sqrt(), atol=1e-6, rtol=1e-4)
    answers = classifier.query(images, "one").argmax(dim=1)
    same = classifier.policy.prepare(classifier.query, images, answers, this).extra["saliency"]
    with torch.no_grad():  # as for a gallery
        assert torch.equal(classifier.policy.prepare(classifier.query, images, None, this).extra["saliency"], same)


def test_draws_are_the_only_randomness_and_certainty_is_no_error():
    config = tiny_config(policy={"name": "puzzlemix"})
    model = build_model(config, TinyBackbone("group"), CLASSES, torch.float32).train()
    images, labels = micro_batch(0, 0, 8)
    totals = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        totals.append(model(images, labels, model.draw(images, seed=0, step=0)).total)
    assert torch.equal(*totals)
    with torch.no_grad():  # an encoder so sure of one class that some gradients are exactly 0
        model.query.head_one.bias[0] = 1e4
    for step in range(4):
        losses = model(images, labels, model.draw(images, seed=0, step=step))
        assert torch.isfinite(losses.total) and 0 <= losses.mask_area <= 1


@pytest.mark.parametrize(
    "values, message",
    [
        ({"blocks": [1, 2]}, r"policy.settings.blocks = \(1, 2\)"),
        ({"levels": 1}, r"policy.settings.levels = 1: expected 2 or more"),
        ({"gamma": 1.5}, r"policy.settings.gamma"),
        ({"move_cost": 0}, r"policy.settings.move_cost"),
    ],
)
def test_mistakes_name_their_key(values, message):
    with pytest.raises(ConfigError, match=message):
        make("puzzlemix", **values)


def test_blocks_must_divide_the_image():
    assert {draw(make("puzzlemix"), images_of(2, 28, 28), step).extra["blocks"] for step in range(20)} == {2, 4}
    with pytest.raises(ConfigError, match=r"policy.settings.blocks = \(2, 4, 8, 16\): .* divisor of .* 27 x 27 pixels"):
        draw(make("puzzlemix"), images_of(2, 27, 27))
