"""PuzzleMix (arXiv 2009.06962): a mask that hides the least saliency, and salient blocks moved to where they show.

Saliency is the norm over colours of the loss's gradient in each pixel, of the clean images in the encoder's evaluation
mode. For blocks of an image the mask minimises

    saliency hidden + smoothness of the mask + jumps of the image at borders between blocks - log of a binomial prior

over `levels` values from 0 to 1; then the blocks of each image are rearranged among their places for the most saliency
shown, less the squared distances moved. The labels' shares follow the mask's mean.

The published code cuts a graph for each image on the host, and its search for places may lose blocks. Here both are
solved for the whole batch on the device, in a fixed number of rounds, to nearly the optimum. The mask's energy is
convex in each value and in each difference of neighbours, so that values in between make it no lower (Murota, Discrete
Convex Analysis, 2003): the best ones are found by the primal-dual iterations of Pock and Chambolle (ICCV 2011), and
rounded. The places are found by Bertsekas' auction (1988). Adversarial noise, an option there, is left out.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from automix_dist import policy
from automix_dist.policy import BetaSettings, Draw, Mix, require

MASK_ROUNDS, MOVE_ROUNDS = 16, 12
"""Iterations for each block along a side: what happens at one side has to reach the other one."""
BIDDERS = 8
"""Blocks of an image that look for another place at once."""
STRIP = 4
"""Most pixels along a side of the squares whose means are compared at borders."""
BID = 0.03
"""Least raise of a bid, summed over an image's blocks: the saliency that an auction's end may be away from the best."""


@dataclass(frozen=True)
class Settings(BetaSettings):
    blocks: tuple[int, ...] = (2, 4, 8, 16)
    """Blocks along a side of the mask, drawn once per micro batch from those that divide the image."""
    levels: int = 3
    """Values that the mask may take."""
    beta: float = 1.2
    """Weight of the mask's smoothness."""
    gamma: float = 0.5
    """Weight of the image's jumps, relative to it."""
    eta: float = 0.2
    """Weight of the prior, a mask whose values are binomial around lambda."""
    move: bool = True
    """Rearrange the blocks of each image."""
    move_cost: float = 0.8
    """Cost of moving a block along a whole side, in shares of the image's saliency."""
    move_pixels: int | None = None
    """Most pixels along a side of the blocks that move; null = 4 in images of up to 64 pixels, else the mask's."""

    def __post_init__(self):
        super().__post_init__()
        require(self.blocks and min(self.blocks) >= 2, "blocks", self.blocks, "one number or more, from 2")
        require(self.levels >= 2, "levels", self.levels, "2 or more")
        require(self.beta >= 0, "beta", self.beta, "0 or more")
        require(0 <= self.gamma <= 1, "gamma", self.gamma, "a number in [0, 1]")
        require(self.eta >= 0, "eta", self.eta, "0 or more")
        require(self.move_cost > 0, "move_cost", self.move_cost, "a positive number")
        require(self.move_pixels is None or self.move_pixels >= 1, "move_pixels", self.move_pixels, "1 or more or null")


class Policy(policy.Policy):
    def draw_extra(self, rng: np.random.Generator, lam: np.ndarray, height: int, width: int) -> dict[str, Any]:
        fitting = [n for n in self.settings.blocks if height % n == 0 and width % n == 0]
        require(bool(fitting), "blocks", self.settings.blocks, f"a divisor of the image's {height} x {width} pixels")
        return {"blocks": fitting[rng.integers(len(fitting))]}

    def prepare(self, encoder: nn.Module, images: Tensor, labels: Tensor | None, draw: Draw) -> Draw:
        pixels, training = images.detach().requires_grad_(), encoder.training
        encoder.eval()
        with torch.enable_grad():
            logits = encoder(pixels.view_as(pixels), "one")  # torch's FLOP counter takes no leaf for a module's input
            labels = logits.argmax(dim=1) if labels is None else labels  # of a gallery, which has none
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), pixels)
        encoder.train(training)
        torch.clear_autocast_cache()  # its casts of the weights hang on the graph that was just freed
        return draw._replace(extra=draw.extra | {"saliency": gradient.float().square().mean(dim=1).sqrt()})

    def mix(self, images: Tensor, draw: Draw) -> Mix:
        blocks, saliency, partner = draw.extra["blocks"], draw.extra["saliency"], images[draw.partner]
        mask = best_mask(*self.energy(images, share_of_blocks(saliency, (blocks, blocks)), draw))
        mask = mask.unsqueeze(1) / (self.settings.levels - 1)
        if self.settings.move:
            most = self.settings.move_pixels or (4 if images.shape[3] <= 64 else images.shape[3])
            grid = tuple(size // _divisor(size // blocks, most) for size in images.shape[2:])
            shown = F.interpolate(mask, size=grid, mode="nearest-exact").squeeze(1)
            shares = share_of_blocks(saliency, grid)
            shares, shown = torch.cat([shares, shares[draw.partner]]), torch.cat([shown < 1, shown > 0])
            places = best_places(shares, shown, self.settings.move_cost)
            images, partner = move_blocks(torch.cat([images, partner]), places, grid).chunk(2)
        mask = F.interpolate(mask, size=images.shape[2:], mode="nearest-exact")
        return Mix(torch.lerp(images, partner, mask), mask.squeeze(1), 1 - mask.flatten(1).mean(dim=1))

    def energy(self, images: Tensor, shares: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """What `best_mask` minimises, for images [B, 3, H, W] whose blocks have these shares of the saliency [B, n, n].

        Returns:
            what each level of the partner's weight costs more than the one below it [levels - 1, B, n, n], and the
            weights of squared differences of the mask between blocks one above the other [B, n - 1, n] and side by side
            [B, n, n - 1]; all times n^2.
        """
        settings, n, pixels = self.settings, shares.shape[1], images * self.std
        smooth = settings.beta / (16 * n)
        cost, weights = shares - shares[draw.partner], []
        below = border_jumps(pixels, draw.partner, n)
        beside = border_jumps(pixels.transpose(2, 3), draw.partner, n).transpose(3, 4)
        for axis, jumps in ((1, below), (2, beside)):
            # What depends on whose image is on each side is a cost of each block's value and one of their difference.
            (own_own, own_partner), (partner_own, partner_partner) = smooth * settings.gamma * jumps
            cost.narrow(axis, 0, n - 1).add_((partner_own + partner_partner - own_own - own_partner) / 2)
            cost.narrow(axis, 1, n - 1).add_((own_partner + partner_partner - own_own - partner_own) / 2)
            weights.append(smooth + (own_partner + partner_own - own_own - partner_partner) / 2)
        level = torch.arange(1, settings.levels, device=images.device).view(-1, 1, 1, 1)
        odds = torch.logit(draw.lam, eps=1e-6).view(-1, 1, 1) - torch.log((settings.levels - level) / level)
        costs = cost / (settings.levels - 1) + settings.eta / n**2 * odds
        return costs * n**2, weights[0] * n**2, weights[1] * n**2


def share_of_blocks(saliency: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, H, W] -> [B, *grid], each block's share of its image's; all 0 where there is none."""
    pooled = F.adaptive_avg_pool2d(saliency.unsqueeze(1), grid).squeeze(1)
    return pooled / pooled.sum(dim=(1, 2), keepdim=True).clamp(min=1e-30)


def border_jumps(pixels: Tensor, partner: Tensor, n: int) -> Tensor:
    """How far colours differ where n x n blocks lie one above the other: [2, 2, B, n - 1, n].

    The first axis says from which image the upper block is, the image [B, 3, H, W] or its partner; the second one the
    lower block.
    """
    strip = [_divisor(size // n, STRIP) for size in pixels.shape[2:]]
    means = F.avg_pool2d(pixels, strip).unflatten(3, (n, -1)).unflatten(2, (n, -1))  # [B, 3, n, rows, n, columns]
    upper, lower = means[:, :, :-1, -1], means[:, :, 1:, 0]
    pairs = [(a - b).abs().mean(dim=(1, 4)) for a in (upper, upper[partner]) for b in (lower, lower[partner])]
    return torch.stack(pairs).unflatten(0, (2, 2))


def best_mask(costs: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Levels x, [B, n, n] whole numbers as float32, with the least energy for each image,

        sum of costs[k] up to level x  +  sum over neighbours of weight (x - x')^2 / (levels - 1)^2

    Args:
        costs: [levels - 1, B, n, n], of each level more than the one below it, not decreasing.
        rows, columns: [B, n - 1, n] and [B, n, n - 1], the weights, not negative.
    """
    top, n = len(costs), costs.shape[2]
    neighbours = torch.full((n,), 2.0, device=costs.device)
    neighbours[0].fill_(1)  # in older torch an assignment of a number waits for the GPU
    neighbours[-1].fill_(1)
    step, dual_step = top / (neighbours.unsqueeze(1) + neighbours), 0.5 / top
    odd = torch.arange(1, 2 * top, 2, device=costs.device).view(-1, 1, 1, 1) / (top**2 * dual_step)
    costs, row_costs, column_costs = costs * step, odd * rows, odd * columns
    x = ahead = torch.full_like(costs[0], top / 2)
    row_duals, column_duals = torch.zeros_like(rows), torch.zeros_like(columns)
    for _ in range(MASK_ROUNDS * n):
        row_duals = _dual(row_duals / dual_step + ahead.diff(dim=1), row_costs) * dual_step
        column_duals = _dual(column_duals / dual_step + ahead.diff(dim=2), column_costs) * dual_step
        slope = F.pad(row_duals, (0, 0, 1, 1)).diff(dim=1) + F.pad(column_duals, (1, 1)).diff(dim=2)
        before, x = x, _settle(x + step * slope, costs)
        ahead = 2 * x - before
    return x.round()


def _settle(x: Tensor, costs: Tensor) -> Tensor:
    """Where (y - x)^2 / 2 plus the costs [top, ...] of raising y from 0, level by level, is least; y is in [0, top]."""
    return sum((x - cost - level).clamp(0, 1) for level, cost in enumerate(costs))


def _dual(x: Tensor, costs: Tensor) -> Tensor:
    """What `_settle` takes off x (Moreau), if raising and lowering cost the same."""
    return x - x.sign() * _settle(x.abs(), costs)


def best_places(shares: Tensor, shown: Tensor, move_cost: float) -> Tensor:
    """A place for each block: the places' numbers [B, h * w], a permutation for each image.

    Blocks with these shares of the saliency [B, h, w] look for places that are shown [B, h, w]. The sum of the shares
    shown, less `move_cost` times the squared distances moved, is as large as an auction of so many rounds makes it; the
    blocks that it leaves homeless get the places left over, and an image that would lose by all this stays as it is.
    """
    height, width = shares.shape[1:]
    count, side = height * width, max(height, width)
    number = torch.arange(count, device=shares.device)
    at = torch.stack([number // width, number % width], dim=1).float() / (side - 1)
    cost = move_cost * (at.unsqueeze(1) - at).square().sum(dim=2)
    shares, shown = shares.flatten(1), shown.flatten(1)
    stays = shown | (shares <= move_cost / (side - 1) ** 2)  # no other place is worth more to these
    owner = torch.where(stays, number, -1)  # of each place, -1 = nobody
    place, price = owner, torch.zeros_like(shares)
    for _ in range(MOVE_ROUNDS * side):
        homeless, block = (place < 0).byte().topk(min(BIDDERS, count), dim=1)
        worth = shares.gather(1, block).unsqueeze(2) * shown.unsqueeze(1) - cost[block]
        best, wanted = (worth - price.unsqueeze(1)).topk(2, dim=2)
        wanted = wanted[:, :, 0]
        bid = price.gather(1, wanted) + best[:, :, 0] - best[:, :, 1] + BID / count
        bid = torch.where(homeless > 0, bid, -1.0)
        highest = torch.full_like(price, -1.0).scatter_reduce(1, wanted, bid, "amax")
        winner = torch.where((homeless > 0) & (bid == highest.gather(1, wanted)), block, -1)
        winner = torch.full_like(owner, -1).scatter_reduce(1, wanted, winner, "amax")
        sold = winner >= 0
        owner, price = torch.where(sold, winner, owner), torch.where(sold, highest, price)
        place = _inverse(owner)
    left = (owner >= 0).byte().argsort(dim=1, stable=True)  # the places without an owner come first
    homeless = place < 0
    place = torch.where(homeless, left.gather(1, (homeless.cumsum(dim=1) - 1).clamp(min=0)), place)
    gain = (shares * (shown.gather(1, place).float() - shown.float()) - cost[number, place]).sum(dim=1, keepdim=True)
    return torch.where(gain > 0, place, number)


def _inverse(owner: Tensor) -> Tensor:
    """The place of each block from the owner of each place, both [B, N]; -1 = none."""
    batch, count = owner.shape
    place = torch.full((batch, count + 1), -1, dtype=owner.dtype, device=owner.device)
    number = torch.arange(count, device=owner.device).expand(batch, -1)
    return place.scatter(1, torch.where(owner < 0, count, owner), number)[:, :count]


def move_blocks(images: Tensor, places: Tensor, grid: tuple[int, int]) -> Tensor:
    """Images [B, C, H, W] whose blocks, grid[0] x grid[1] of them, lie in these places [B, blocks]."""
    height, width = (size // blocks for size, blocks in zip(images.shape[2:], grid, strict=True))
    source = F.interpolate(_inverse(places).view(-1, 1, *grid).double(), images.shape[2:], mode="nearest-exact").long()
    rows, columns = (torch.arange(size, device=images.device) for size in images.shape[2:])
    source = source.squeeze(1)
    rows = source // grid[1] * height + (rows % height).unsqueeze(1)
    columns = source % grid[1] * width + columns % width
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[batch, rows, columns].permute(0, 3, 1, 2)


def _divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most this."""
    return next(each for each in range(min(number, most), 0, -1) if number % each == 0)
