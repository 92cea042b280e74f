"""The method's parts against independent formulas in float64, and the separation of its gradients."""

import gc
import weakref

import pytest
import torch
from tiny import CLASSES, TinyBackbone, micro_batch, rank_draws, tiny_config, tiny_model
from torch import nn

from automix_dist.automix import AutoMix, Losses, adjust_mask
from automix_dist.backbone import create_backbone
from automix_dist.bench.memory import peak_saved_bytes
from automix_dist.config import AutoMixConfig, ConfigError
from automix_dist.draws import Draws, MixDraw
from automix_dist.mix_block import ChannelNorm, MixBlock, mask_loss
from automix_dist.model import build_model
from automix_dist.momentum import MomentumUpdate
from automix_dist.policy import Mixes


def step(model: AutoMix, config, mask_loss_weight: float = 0.1, size: int = 16) -> Losses:
    return model(*micro_batch(0, 0, size), rank_draws(config, 0, 0, size), mask_loss_weight)


def mask_by_definition(block: MixBlock, features, draw: MixDraw):
    """The published order of operations: lambda as a last channel, one convolution per sample of the pair."""
    lam = draw.lam.double()[:, None, None, None]
    own, partner = features, features[draw.partner]
    if block.lam_concat:
        own = torch.cat([own, lam.expand_as(own[:, :1])], dim=1)
        partner = torch.cat([partner, (1 - lam).expand_as(partner[:, :1])], dim=1)

    def project(x, weight, bias):
        return nn.functional.conv2d(x, weight.double()[:, :, None, None], bias if bias is None else bias.double())

    query, key = (project(x, block.query_weight, block.query_bias) for x in (own, partner))
    if block.norm is not None:
        norm = block.norm.double()
        query, key = norm(query), norm(key)
    value = project(partner, block.value_weight, block.value_bias)
    scores = torch.einsum("bdij,bdkl->bijkl", query, key) / block.width**0.5
    batch, h, w = scores.shape[:3]
    attention = scores.flatten(3).softmax(dim=-1).view(batch, h, w, h, w)
    return torch.einsum("bijkl,bckl->bij", attention, value)


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize("lam_concat", [True, False])
def test_mix_block_is_the_published_attention(norm, lam_concat):
    torch.manual_seed(0)
    block = MixBlock(10, AutoMixConfig(norm=norm, lam_concat=lam_concat))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.4)
    features = torch.randn(6, 10, 4, 5)
    draws = [MixDraw(torch.rand(6), torch.randperm(6), "nearest") for _ in range(2)]
    both = Draws.of(*draws)
    logits = block(features, both.partner, both.lam)
    assert logits[0].requires_grad and not logits[1].requires_grad
    for got, draw in zip(logits, draws, strict=True):
        expected = mask_by_definition(block, features.double(), draw)
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
        block.float()


def test_a_new_mix_block_mixes_evenly():
    torch.manual_seed(0)
    block = MixBlock(64, AutoMixConfig())
    partner, lam = torch.tensor([[1, 0, 3, 2]]), torch.full((1, 4), 0.3)
    masks = torch.sigmoid(block(torch.randn(4, 64, 7, 7), partner, lam)[0])
    assert (masks - 0.5).abs().max() < 0.05
    assert sum(p.numel() for p in MixBlock(256, AutoMixConfig()).parameters()) == 33_282
    assert sum(p.numel() for p in MixBlock(1024, AutoMixConfig()).parameters()) == 526_338


@pytest.mark.parametrize("form", ["l1", "sparsity", "l1_variance", "l2_variance"])
@pytest.mark.parametrize("margin", [0.0, 0.1, 0.6])
def test_mask_losses(form, margin):
    mask = torch.rand(5, 8, 8, dtype=torch.float64)
    lam = torch.full((5,), 0.8, dtype=torch.float64)
    area, variance = mask.mean(), (mask - mask.mean()).square().mean()
    off = (1 - area - 0.8).abs()
    expected = {
        "l1": max(off - margin, 0),
        "sparsity": max((mask * (mask - 1)).abs().mean() - margin, 0),
        "l1_variance": max(off - margin, 0) - 2 * variance,
        "l2_variance": max(off**2 - margin**2, 0) - 2 * variance,
    }[form]
    got = mask_loss(form, mask.mean(dim=(1, 2)), mask.square().mean(dim=(1, 2)), lam, margin)
    assert got.item() == pytest.approx(float(expected), abs=1e-12)


def test_another_mask_loss_is_refused():
    with pytest.raises(ValueError, match="form = 'l1variance': expected l1, sparsity"):
        mask_loss("l1variance", torch.ones(2), torch.ones(2), torch.ones(2), 0.1)


def test_query_and_mix_block_learn_from_their_own_losses_only():
    """Another query encoder leaves the Mix Block's gradients as they are; without the Mix Block's losses the query
    encoder's are the same; the momentum encoder has none."""
    config = tiny_config()
    whole, other_query, no_block_losses = (tiny_model(config) for _ in range(3))
    with torch.no_grad():
        for parameter in other_query.query.parameters():
            parameter.mul_(1.5)
    step(whole, config).total.backward()
    step(other_query, config).total.backward()
    draws = rank_draws(config, 0, 0, 16)._replace(train_generator=False)
    no_block_losses(*micro_batch(0, 0, 16), draws, 0.0).total.backward()

    def gradients(model: AutoMix, part: str) -> list[torch.Tensor]:
        return [p.grad for p in getattr(model, part).parameters()]

    for one, other in zip(gradients(whole, "mix_block"), gradients(other_query, "mix_block"), strict=True):
        assert one.any() and torch.equal(one, other)
    for one, other in zip(gradients(whole, "query"), gradients(no_block_losses, "query"), strict=True):
        assert one.any() and torch.equal(one, other)
    assert not any(p.grad.any() for p in no_block_losses.mix_block.parameters())
    assert all(p.grad is None and not p.requires_grad for p in whole.momentum.parameters())


def test_total_is_the_sum_of_its_parts():
    config = tiny_config()
    losses = step(tiny_model(config), config, 0.3)
    parts = losses.clean + losses.mixed + losses.generator + 0.3 * losses.mask
    torch.testing.assert_close(losses.total, parts)


def test_switched_off_branch_still_trains_the_mix_block_on_its_masks():
    config = tiny_config(automix={"mask_loss_margin": 0.0})
    model = tiny_model(config)
    draws = rank_draws(config, 0, 0, 16)._replace(train_generator=False)
    losses = model(*micro_batch(0, 0, 16), draws, 0.1)
    losses.total.backward()
    assert losses.generator == 0
    assert model.mix_block.value_bias.grad.abs() > 0


@pytest.mark.parametrize(("share", "judged", "mixed"), [(1.0, True, 16), (0.3, True, 5), (1.0, False, 0)])
def test_only_what_is_judged_is_mixed(share, judged, mixed):
    """The mask loss is that of the whole batch."""
    config = tiny_config(automix={"generator_share": share, "mask_loss_margin": 0.0})
    model, whole = tiny_model(config), tiny_model(tiny_config(automix={"mask_loss_margin": 0.0}))
    sizes, blend = [], model._blend
    model._blend = lambda *arguments, **options: note(sizes, blend(*arguments, **options))
    draws = rank_draws(config, 0, 0, 16)._replace(train_generator=judged)
    losses = model(*micro_batch(0, 0, 16), draws, 0.1)
    assert sizes == [mixed, 16]
    expected = step(whole, config)
    assert torch.equal(losses.mask, expected.mask) and torch.equal(losses.mask_area, expected.mask_area)


def note(sizes: list[int], num_mixed: tuple) -> tuple:
    sizes.append(len(num_mixed[0]))
    return num_mixed


def test_mixed_loss_uses_the_drawn_lambda_and_both_labels():
    config = tiny_config(loss={"label_smoothing": 0.1})
    model = tiny_model(config)
    logits, labels = torch.randn(6, CLASSES, dtype=torch.float64), torch.randint(0, CLASSES, (6,))
    draw = MixDraw(torch.full((6,), 0.3), torch.randperm(6), "nearest")
    smooth = 0.9 * nn.functional.one_hot(labels, CLASSES) + 0.1 / CLASSES
    target = 0.3 * smooth + 0.7 * smooth[draw.partner]
    expected = -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(model._mixed_loss(logits, labels, draw).double(), expected, atol=1e-7, rtol=1e-6)


def test_adjusted_masks_have_the_area_lambda():
    own = torch.rand(8, 6, 6, dtype=torch.float64)
    lam = torch.linspace(0.05, 0.95, 8, dtype=torch.float64)
    adjusted = adjust_mask(own, lam)
    torch.testing.assert_close(adjusted.mean(dim=(1, 2)), lam)
    assert adjusted.min() >= 0 and adjusted.max() <= 1
    area = own.mean(dim=(1, 2))
    for i in range(8):  # shrinks the larger of the two, by a factor
        part, whole = (adjusted[i], own[i]) if area[i] > lam[i] else (1 - adjusted[i], 1 - own[i])
        torch.testing.assert_close(part / whole, torch.full_like(whole, (part / whole).mean()))


@pytest.mark.parametrize("whose", ["classifier", "mix_block"])
def test_mask_adjustment_aims_at_the_lambda_it_is_told(whose):
    config = AutoMixConfig(mask_adjust=1.0, mask_adjust_lam=whose, lam_margin=0.0)
    model = tiny_model(tiny_config())
    model.config = config
    draws = rank_draws(tiny_config(), 0, 0, 4)
    draws = Draws.of(
        mix_block=draws.mix_block._replace(lam=torch.full((4,), 0.9)),
        classifier=MixDraw(torch.full((4,), 0.2), torch.tensor([1, 0, 3, 2]), "nearest"),
    )
    images = torch.stack([torch.full((3, 16, 16), float(i)) for i in range(4)])
    mixed = model._blend_adjusted(torch.randn(4, 4, 4), images, draws)
    share = {"classifier": 0.2, "mix_block": 0.9}[whose]
    expected = share * images[:, 0].mean(dim=(1, 2)) + (1 - share) * images[[1, 0, 3, 2], 0].mean(dim=(1, 2))
    torch.testing.assert_close(mixed[:, 0].mean(dim=(1, 2)), expected)


def test_lambda_near_its_ends_is_plain_mixup_for_the_classifier():
    config = tiny_config()
    model = tiny_model(config)
    images = torch.randn(4, 3, 16, 16)
    draw = MixDraw(torch.tensor([0.05, 0.08, 0.5, 0.95]), torch.tensor([1, 2, 3, 0]), "nearest")
    mixed, _, _ = model._blend(torch.randn(4, 4, 4) * 5, images, draw, lam_margin=0.08)
    lam = draw.lam[:, None, None, None]
    plain = lam * images + (1 - lam) * images[draw.partner]
    for i, is_plain in enumerate([True, True, False, True]):
        assert torch.allclose(mixed[i], plain[i], atol=1e-6) == is_plain


def test_batchnorm_statistics_are_updated_in_the_published_order():
    """Query: clean, then mixed. Momentum: clean (the feature pass), then mixed. Two updates each."""
    config = tiny_config()
    model = tiny_model(config)
    step(model, config)
    for encoder in (model.query, model.momentum):
        assert encoder.backbone.stem[1].num_batches_tracked == 2
        assert encoder.backbone.top[1].num_batches_tracked == 2


def test_two_hundred_momentum_updates_against_float64():
    config = tiny_config()
    model = tiny_model(config)
    update = MomentumUpdate(model)
    expected = {n: p.detach().double().clone() for n, p in model.momentum.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for i in range(200):
        coefficient = 0.99 + 0.00999 * i / 200
        with torch.no_grad():
            for p in model.query.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        query = dict(model.query.named_parameters())
        for name in expected:
            expected[name] = coefficient * expected[name] + (1 - coefficient) * query[name].detach().double()
        update(coefficient)
    for name, parameter in model.momentum.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], atol=1e-6, rtol=1e-5)


def test_evaluation_changes_nothing_and_answers_with_all_heads():
    config = tiny_config()
    model = tiny_model(config).eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    images, _ = micro_batch(0, 0, 8)
    with torch.no_grad():
        logits = model(images)
        mask, mixed, *_ = model(images, None, rank_draws(config, 0, 0, 8))
    assert [tuple(each.shape) for each in logits] == [(8, CLASSES)] * 4
    assert mask.shape == (8, 16, 16) and mixed.shape == (8, 3, 16, 16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(before[name], tensor), name


def test_uint8_and_normalised_float_images_train_alike():
    config = tiny_config()
    images, labels = micro_batch(0, 0, 16)
    models = [tiny_model(config) for _ in range(2)]
    mean, std = (v[:, None, None] for v in (models[0].mean, models[0].std))
    floats = (images.permute(0, 3, 1, 2) / 255 - mean) / std
    totals = [
        m(x, labels, rank_draws(config, 0, 0, 16), 0.1).total for m, x in zip(models, (images, floats), strict=True)
    ]
    torch.testing.assert_close(*totals, atol=1e-5, rtol=1e-5)


def test_draws_list_every_source_of_randomness():
    """Two forwards with the same draws give the same losses, whatever the state of the global generators."""
    config = tiny_config(automix={"upsampling": ["nearest", "bilinear"]})
    totals = []
    for seed in (1, 2):
        model = tiny_model(config)
        torch.manual_seed(seed)
        totals.append(step(model, config).total)
    assert torch.equal(*totals)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_immediate_backward_gives_the_same_gradients(dtype):
    config = tiny_config(automix={"norm": "batch"})
    gradients = []
    for immediate in (False, True):
        model = tiny_model(config)
        model.autocast, model.immediate_backward = dtype, immediate
        (step(model, config).total / 4).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        # Under autocast one backward pass sums the two uses of a weight in bfloat16, two passes in float32.
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert (gradients[1][name] - gradient).norm() <= tolerance * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("policy", ["automix", "mixup", "none"])
def test_the_autocast_around_a_call_holds_unless_another_is_set(policy):
    config = tiny_config(policy={"name": policy}, automix={"mask_adjust": 1.0})
    images, labels = micro_batch(0, 0, 16)
    results = []
    for own, outer in ((None, True), (torch.bfloat16, False), (None, False), (torch.float32, True)):
        torch.manual_seed(0)
        model = build_model(config, TinyBackbone(), CLASSES, own)
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            results.append(model(images, labels, model.draw(images, seed=0, step=0), 0.1).total)
    assert torch.equal(results[0], results[1]) and torch.equal(results[2], results[3])
    assert not torch.equal(results[0], results[2])


def test_gradients_of_early_losses_are_freed_as_they_are_handed_out():
    model = tiny_model(tiny_config())
    model.immediate_backward = True
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    losses = model.train()(images, labels, model.draw(images, seed=0, step=0), 0.1)
    nodes, held = [losses.total.grad_fn], []
    while nodes:
        node = nodes.pop()
        held += [weakref.ref(each) for each in getattr(node, "gradients", None) or ()]
        nodes += [each for each, _ in node.next_functions if each is not None]
    assert len(held) > 10 and all(each() is not None for each in held)
    losses.total.backward(retain_graph=True)
    gc.collect()
    assert all(each() is None for each in held)
    with pytest.raises(RuntimeError, match="call backward once"):
        losses.total.backward()


def test_immediate_backward_holds_one_set_of_activations():
    """Against vanilla training of the same ResNet on the same batch: about one set instead of about three."""
    config = tiny_config(
        model={"backbone": "resnet18", "small_stem": True, "timm_kwargs": {"channels": [8, 16, 24, 32]}}
    )
    torch.manual_seed(0)
    model = AutoMix(create_backbone(config.model, -2, 32), CLASSES, config.automix)
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    labels, draws = torch.randint(0, CLASSES, (8,)), rank_draws(config, 0, 0, 8)

    def vanilla():
        floats = (images.permute(0, 3, 1, 2) / 255 - 0.5).contiguous()
        nn.functional.cross_entropy(model.query(floats, "one"), labels).backward()

    def automix(immediate: bool):
        model.immediate_backward = immediate
        model(images, labels, draws, 0.1).total.backward()

    one, together, immediate = (
        peak_saved_bytes(run, model) for run in (vanilla, lambda: automix(False), lambda: automix(True))
    )
    print(f"of vanilla's activations: together {together / one:.2f}, immediate {immediate / one:.2f}")
    assert together > 2.3 * one
    assert immediate < 1.4 * one


def test_heads_begin_small():
    """As the published ones: normal with a standard deviation of 0.01, and biases of zero."""
    model = AutoMix(TinyBackbone(), 1000)
    for head in (model.query.head_one, model.query.head_mix, model.momentum.head_one, model.momentum.head_mix):
        assert head.weight.std().item() == pytest.approx(0.01, rel=0.05) and abs(head.weight.mean()) < 1e-3
        assert not head.bias.any()


@pytest.mark.parametrize("clean_images", ["encoder", "head"])
def test_no_graph_is_made_where_none_is_wanted(clean_images):
    model = tiny_model(tiny_config(automix={"clean_images": clean_images}))
    images, _ = micro_batch(0, 0, 4)
    for mode in (True, False):
        with torch.no_grad():
            assert not any(each.requires_grad for each in model.train(mode)(images))
    assert model(images).query.requires_grad


def test_mixes_become_pixels_again():
    images, _ = micro_batch(0, 0, 4)
    model = tiny_model(tiny_config())
    normalized = (images.permute(0, 3, 1, 2) / 255 - model.mean[:, None, None]) / model.std[:, None, None]
    nothing = torch.zeros(4)
    assert torch.equal(Mixes(nothing, normalized, nothing, nothing).pixels(model.mean, model.std), images)


@pytest.mark.parametrize("key", ["automix.norm", "automix.mask_adjust", "policy.name"])
def test_kernels_that_cannot_do_it_all_are_refused_where_they_are_asked_for(key):
    settings = {
        "automix.norm": [{"automix": {"norm": "layer"}}],
        "automix.mask_adjust": [{"automix": {"mask_adjust": 0.5}}],
        "policy.name": [
            {"policy": {"name": name}, "automix": {"lam_concat": False}} for name in ("samix", "adautomix")
        ],
    }
    for each in settings[key]:
        build_model(tiny_config(**each), TinyBackbone(), CLASSES)
        with pytest.raises(ConfigError, match=rf"engine.kernels = 'triton', but with {key} = .* in plain PyTorch"):
            build_model(tiny_config(**each, engine={"kernels": "triton", "device": "auto"}), TinyBackbone(), CLASSES)


def test_what_is_logged_of_a_step_is_what_it_says():
    """A Mix Block that always takes the partner; a clean head that always says 2 and a mixed one that says 3."""
    model = tiny_model(tiny_config())
    with torch.no_grad():
        model.mix_block.value_bias.fill_(20.0)
        model.query.head_one.bias[2] = model.query.head_mix.bias[3] = 50.0
    images, labels = micro_batch(0, 0, 16)
    losses = model(images, labels, rank_draws(tiny_config(), 0, 0, 16), 0.1)
    assert losses.mask_area.item() == pytest.approx(1.0, abs=1e-6)
    assert losses.accuracy.item() == pytest.approx((labels == 2).float().mean().item())
    assert (labels == 2).sum() != (labels == 3).sum()


@pytest.mark.parametrize("source", ["momentum", "query"])
def test_a_gallery_shows_the_mix_of_the_encoder_that_feeds_the_mix_block(source):
    config = tiny_config(automix={"feature_source": source})
    model = tiny_model(config).eval()
    with torch.no_grad():
        for parameter in [*model.momentum.parameters(), *model.mix_block.parameters()]:
            parameter.add_(0.3 * torch.randn_like(parameter))
    images, _ = micro_batch(0, 0, 4)
    draws = rank_draws(config, 0, 0, 4)
    with torch.no_grad():
        mask, mixed, *_ = model(images, None, draws)
        clean = model._normalized(images)
        logits, _ = model.mix_block(getattr(model, source).backbone.features(clean), draws.partner, draws.lam)
    expected = torch.sigmoid(logits.repeat_interleave(4, 1).repeat_interleave(4, 2))
    torch.testing.assert_close(mask, expected)
    partner = clean[draws.mix_block.partner]
    torch.testing.assert_close(mixed, clean * (1 - mask[:, None]) + partner * mask[:, None])


def test_a_step_without_judgement_is_drawn_so():
    model, (images, _) = tiny_model(tiny_config()), micro_batch(0, 0, 4)
    for judged in (True, False):
        assert model.draw(images, seed=0, step=0, train_generator=judged).train_generator is judged


def test_adjusted_masks_are_plain_mixup_near_both_ends_of_lambda():
    model = tiny_model(tiny_config(automix={"mask_adjust": 1.0, "lam_margin": 0.1}))
    images = torch.randn(3, 3, 16, 16)
    draw = MixDraw(torch.tensor([0.05, 0.95, 0.5]), torch.tensor([1, 2, 0]), "nearest")
    mixed = model._blend_adjusted(3 * torch.randn(3, 4, 4), images, Draws.of(draw, draw))
    lam = draw.lam[:, None, None, None]
    plain = lam * images + (1 - lam) * images[draw.partner]
    assert [torch.allclose(a, b, atol=1e-5) for a, b in zip(mixed, plain, strict=True)] == [True, True, False]


def test_a_mix_block_begins_as_published():
    """Normal with a standard deviation of 0.01; LayerNorm's eps is 1e-6."""
    torch.manual_seed(0)
    block = MixBlock(256, AutoMixConfig())
    assert block.query_weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not block.query_bias.any() and not block.value_bias.any()
    maps = 1e-3 * torch.randn(2, 8, 3, 3)
    tokens = maps.permute(0, 2, 3, 1).double()
    centred = tokens - tokens.mean(dim=3, keepdim=True)
    expected = centred / (centred.square().mean(dim=3, keepdim=True) + 1e-6).sqrt()
    got = ChannelNorm(8)(maps).permute(0, 2, 3, 1).double()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
