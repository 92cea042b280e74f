"""The random numbers of one step, made on the host from (seed, step, micro batch, rank) and passed into the step.

A counter-based generator (Philox) keyed by these four numbers replaces saved generator state: any step of any rank can
be drawn again, alone, on any machine.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from automix_dist.config import AutoMixConfig


class MixDraw(NamedTuple):
    """How one mixed batch is made."""

    lam: Tensor
    """[B] float32, the share of each image in its pair; one value for the whole micro batch, as in the method."""
    partner: Tensor
    """[B] int64, a permutation: the image that each image is mixed with."""
    upsampling: str
    """How the mask is brought to image size."""


class Draws(NamedTuple):
    """All randomness of one forward pass of AutoMix.

    Two mixed batches are drawn, one to train the Mix Block and one to train the query encoder; side by side, as the Mix
    Block makes the masks of both at once.
    """

    lam: Tensor
    """[2, B] float32."""
    partner: Tensor
    """[2, B] int64."""
    upsampling: tuple[str, str]
    """One mode for each."""
    adjust_mask: bool
    """Whether the classifier's masks are rescaled to the area lambda."""
    train_generator: bool
    """Whether the momentum encoder judges the Mix Block's samples in this step."""

    @classmethod
    def of(
        cls, mix_block: MixDraw, classifier: MixDraw, adjust_mask: bool = False, train_generator: bool = True
    ) -> "Draws":
        """Draws from two that were made apart."""
        lam, partner, upsampling = zip(mix_block, classifier, strict=True)
        return cls(torch.stack(lam), torch.stack(partner), upsampling, adjust_mask, train_generator)

    @property
    def mix_block(self) -> MixDraw:
        """The pairs that train the Mix Block."""
        return MixDraw(self.lam[0], self.partner[0], self.upsampling[0])

    @property
    def classifier(self) -> MixDraw:
        """The pairs that train the query encoder."""
        return MixDraw(self.lam[1], self.partner[1], self.upsampling[1])


def draw_step(
    config: AutoMixConfig,
    batch_size: int,
    *,
    seed: int,
    step: int,
    micro_step: int = 0,
    rank: int = 0,
    device: torch.device | str = "cpu",
) -> Draws:
    """The draws of one micro batch: lambdas ~ Beta(alpha, alpha) and a permutation for each of the two mixes.

    Ranks and micro batches draw independently. The copies to a GPU are asynchronous, from pinned memory.
    """
    rng = step_rng(seed=seed, step=step, micro_step=micro_step, rank=rank)
    lams = rng.beta(config.alpha, config.alpha, size=2)
    partners = [pairing(rng, batch_size, config.no_repeat) for _ in range(2)]
    modes = [config.upsampling[i] for i in rng.integers(len(config.upsampling), size=2)]
    adjust = rng.random()
    switch = shared_rng(seed=seed, step=step, micro_step=micro_step).random()
    return Draws(
        lam=on_device(np.repeat(lams[:, None], batch_size, axis=1), device),
        partner=on_device(np.stack(partners), device),
        upsampling=tuple(modes),
        adjust_mask=bool(adjust < config.mask_adjust),
        train_generator=bool(config.switch_off == 0 or switch < config.switch_off),
    )


def step_rng(*, seed: int, step: int, micro_step: int = 0, rank: int = 0) -> np.random.Generator:
    """The random generator of one micro batch's draws."""
    return np.random.Generator(np.random.Philox(key=_key(seed, step, micro_step, rank)))


def shared_rng(*, seed: int, step: int, micro_step: int = 0, rank: int = 0) -> np.random.Generator:
    """The same on every rank, for what decides which modules run: where weights are sharded, all ranks must run the
    same ones or wait for each other for ever."""
    del rank
    return step_rng(seed=seed, step=step, micro_step=micro_step, rank=2**32)


def on_device(array: np.ndarray, device: torch.device | str) -> Tensor:
    """An array as a tensor on a device, float64 as float32; the copy to a GPU is asynchronous, from pinned memory."""
    tensor = torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def seed_torch(*, seed: int, step: int, micro_step: int = 0, rank: int = 0) -> None:
    """Seed torch's own generators, which dropout and stochastic depth draw from, for one micro batch.

    torch.manual_seed formats a stack trace for each kind of device that is not in use, and looks at all its files.
    """
    number = int(_key(seed, step, micro_step, rank)[0] >> np.uint64(1))
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(number)


def gallery_pairs(size: int, sweep: int) -> tuple[np.ndarray, np.ndarray]:
    """Lambdas and partners [size] of a gallery: each image with the next one, for lambda from 0.1 to 0.9; the last
    `sweep` ones, copies of the first, with the second image for lambda from 0 to 1."""
    pairs = size - sweep
    lam = np.concatenate([np.linspace(0.1, 0.9, pairs), np.linspace(0, 1, sweep)])
    return lam, np.concatenate([np.roll(np.arange(pairs), -1), np.ones(sweep, np.int64)])


def _key(seed: int, step: int, micro_step: int, rank: int) -> np.ndarray:
    """A 128-bit Philox key that differs for every (seed, step, micro step, rank)."""
    return np.random.SeedSequence([seed, step, micro_step, rank]).generate_state(2, np.uint64)


def pairing(rng: np.random.Generator, size: int, no_repeat: bool) -> np.ndarray:
    """A random permutation of 0 .. size - 1, [size] int64; with no_repeat one that leaves no image with itself."""
    if not no_repeat:
        return rng.permutation(size)
    # Sattolo's algorithm: a uniformly random single cycle has no fixed point, and needs no retry.
    cycle = np.arange(size)
    for i in range(size - 1, 0, -1):
        j = rng.integers(i)
        cycle[i], cycle[j] = cycle[j], cycle[i]
    return cycle
