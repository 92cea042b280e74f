"""Schedules and draws against the figures and formulas published with the method (docs/method.md 2.2, 2.7 to 2.9)."""

import math

import numpy as np
import pytest
import torch

from automix_dist.config import AutoMixConfig
from automix_dist.config_file import load_config
from automix_dist.draws import draw_step, gallery_pairs, seed_torch
from automix_dist.schedules import Schedule


def schedule(*overrides: str, epochs: int = 100, steps_per_epoch: int = 100) -> Schedule:
    return Schedule(load_config(None, [f"epochs={epochs}", *overrides]), steps_per_epoch)


def test_momentum_follows_the_published_cosine():
    s = schedule("automix.momentum=0.999", "automix.momentum_end=0.999999", "automix.momentum_start=0.1")
    total = s.total_steps
    assert s.at(0).momentum == s.at(total // 10 - 1).momentum == 0.999
    for share, published in ((0.25, 0.999146), (0.5, 0.9994995), (0.75, 0.999853), (1.0, 0.999999)):
        assert s.at(int(share * total)).momentum == pytest.approx(published, abs=5e-7)


@pytest.mark.parametrize(("start", "published"), [(0.10, 0.999024), (0.25, 0.999145)])
def test_momentum_jumps_where_its_scope_begins(start, published):
    """The cosine is counted from step 0, so it does not begin at the base value."""
    s = schedule("automix.momentum_end=0.99999", f"automix.momentum_start={start}")
    first = int(start * s.total_steps)
    assert s.at(first - 1).momentum == 0.999
    assert s.at(first).momentum == pytest.approx(published, abs=1e-6)


@pytest.mark.parametrize(("total", "half", "hundredth"), [(500_000, 0.012, 0.022), (100_000, 0.020, 0.038)])
def test_compounding_mask_loss_weight_falls_as_published(total, half, hundredth):
    s = schedule("automix.mask_loss_schedule=compound", epochs=100, steps_per_epoch=total // 100)
    weights = np.array([s.at(step).mask_loss_weight for step in range(0, total // 20, total // 2000)])
    shares = np.arange(len(weights)) / 2000
    assert shares[np.argmax(weights < 0.05)] == pytest.approx(half, abs=0.001)
    assert shares[np.argmax(weights < 0.001)] == pytest.approx(hundredth, abs=0.001)
    assert s.at(int(0.45 * total)).mask_loss_weight == 0.0  # underflows


def test_other_mask_loss_weights():
    assert schedule().at(9999).mask_loss_weight == 0.1
    s = schedule("automix.mask_loss_schedule=cosine")
    assert s.at(0).mask_loss_weight == 0.1
    assert s.at(s.total_steps // 2).mask_loss_weight == pytest.approx(0.05)


def test_learning_rate_per_epoch():
    s = schedule("optimizer.lr=0.1", "optimizer.min_lr=0.05", "optimizer.mix_lr=0.1", "optimizer.mix_min_lr=0.001")
    assert s.at(0).lr == s.at(99).lr == 0.1
    expected = 0.05 + 0.05 * (1 + math.cos(math.pi * 0.37)) / 2
    assert s.at(3700).lr == s.at(3799).lr == pytest.approx(expected)
    assert s.at(3700).mix_lr == pytest.approx(0.001 + 0.099 * (1 + math.cos(math.pi * 0.37)) / 2)


def test_learning_rate_per_step_with_warmup():
    """The warm-up multiplies an unshifted cosine; the Mix Block has none."""
    s = schedule(
        "optimizer.lr_update=step", "optimizer.warmup_epochs=5", "optimizer.lr=0.001", "optimizer.mix_lr=0.001"
    )
    for step in (0, 1, 250, 499, 500, 5000):
        base = 0.001 * (1 + math.cos(math.pi * step / 10_000)) / 2
        factor = 1 if step >= 500 else 1 - (1 - step / 500) * (1 - 1e-5)
        assert s.at(step).lr == pytest.approx(base * factor)
        assert s.at(step).mix_lr == pytest.approx(base)


def test_mix_block_follows_the_main_rate_unless_it_has_its_own():
    s = schedule("optimizer.lr_update=step", "optimizer.warmup_epochs=5")
    assert s.at(10).mix_lr == s.at(10).lr
    for own, start, end in (("mix_lr=0.3", 0.3, 0.01), ("mix_min_lr=0.05", 0.2, 0.05)):
        s = schedule("optimizer.lr_update=step", "optimizer.lr=0.2", "optimizer.min_lr=0.01", f"optimizer.{own}")
        assert s.at(0).mix_lr == start
        assert s.at(s.total_steps // 2).mix_lr == pytest.approx((start + end) / 2)


def test_draws_are_a_function_of_seed_step_micro_step_and_rank():
    config = AutoMixConfig(upsampling=("nearest", "bilinear"), mask_adjust=0.5, switch_off=0.5)

    def draw(**where):
        draws = draw_step(config, 16, **({"seed": 1, "step": 2, "micro_step": 0, "rank": 0} | where))
        return [t.tolist() if torch.is_tensor(t) else t for t in (*draws.mix_block, *draws.classifier, *draws[2:])]

    assert draw() == draw()
    different = [draw(seed=2), draw(step=3), draw(micro_step=1), draw(rank=1)]
    partners = {str(each[1]) for each in [draw(), *different]}
    assert len(partners) == 5


def test_draws_never_change():
    """Old runs are resumed by new versions."""
    config = AutoMixConfig(upsampling=("nearest", "bilinear"), mask_adjust=0.5, switch_off=0.8)
    draws = draw_step(config, 5, seed=3, step=5, micro_step=1, rank=2)
    assert draws.lam.shape == (2, 5) and draws.lam[:, 4].tolist() == pytest.approx([0.3938990235, 0.6815586686])
    assert draws.partner.tolist() == [[3, 0, 2, 1, 4], [0, 2, 4, 3, 1]]
    assert draws[2:] == (("bilinear", "bilinear"), True, True)
    seed_torch(seed=3, step=5, micro_step=1, rank=2)
    assert torch.initial_seed() == 7316082550301443845


def test_a_gallery_s_pairs_and_the_sweep_over_its_first():
    lam, partner = gallery_pairs(7, 3)
    assert lam.tolist() == pytest.approx([0.1, 0.1 + 0.8 / 3, 0.9 - 0.8 / 3, 0.9, 0.0, 0.5, 1.0])
    assert partner.tolist() == [1, 2, 3, 0, 1, 1, 1]


def test_draws_have_the_method_s_distribution():
    config = AutoMixConfig(alpha=2.0, upsampling=("nearest", "bilinear"), mask_adjust=0.25, switch_off=0.8)
    draws = [draw_step(config, 4, seed=0, step=step) for step in range(4000)]
    lams = np.array([[d.mix_block.lam[0], d.classifier.lam[0]] for d in draws])
    assert lams.mean() == pytest.approx(0.5, abs=0.02)
    assert lams.var() == pytest.approx(0.05, abs=0.005)  # Beta(2, 2)
    assert abs(np.corrcoef(lams.T)[0, 1]) < 0.05
    assert np.mean([d.adjust_mask for d in draws]) == pytest.approx(0.25, abs=0.03)
    assert np.mean([d.train_generator for d in draws]) == pytest.approx(0.8, abs=0.03)
    assert np.mean([d.mix_block.upsampling == "nearest" for d in draws]) == pytest.approx(0.5, abs=0.04)
    for draw in draws[:100]:
        assert sorted(draw.classifier.partner.tolist()) == [0, 1, 2, 3]
        assert (draw.mix_block.lam == draw.mix_block.lam[0]).all()  # one lambda per micro batch


@pytest.mark.parametrize("size", [2, 3, 16])
def test_no_repeat_pairs_no_image_with_itself(size):
    config = AutoMixConfig(no_repeat=True)
    seen = set()
    for step in range(200):
        partner = draw_step(config, size, seed=0, step=step).mix_block.partner
        assert (partner != torch.arange(size)).all() and len(set(partner.tolist())) == size
        seen.add(tuple(partner.tolist()))
    assert len(seen) == {2: 1, 3: 2}.get(size, len(seen)) and (size < 16 or len(seen) == 200)


def test_torch_randomness_is_a_function_of_the_step():
    numbers = []
    for step in (0, 1, 0):
        seed_torch(seed=5, step=step)
        numbers.append(torch.rand(3).tolist())
    assert numbers[0] == numbers[2] != numbers[1]


def test_a_moving_average_keeps_its_decay():
    s = Schedule(load_config(None, ["epochs=10", "policy.name=mixup", "policy.ema_decay=0.97"]), 10)
    assert {s.at(step).momentum for step in range(100)} == {0.97}


def test_the_cosine_mask_weight_falls_within_an_epoch_too():
    s = Schedule(load_config(None, ["epochs=2", "automix.mask_loss_schedule=cosine"]), 100)
    assert s.at(50).mask_loss_weight == pytest.approx(0.05 * (1 + math.cos(math.pi / 4)))


def test_half_an_epoch_of_warmup():
    s = Schedule(load_config(None, ["epochs=2", "optimizer.warmup_epochs=0.5", "optimizer.lr_update=epoch"]), 100)
    start = 1e-5  # optimizer.warmup_start
    assert s.at(25).lr == pytest.approx(s.at(50).lr * (1 - 0.5 * (1 - start)))
    assert s.at(49).lr < s.at(50).lr == s.at(99).lr
