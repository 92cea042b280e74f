"""Grad-CAM: against derivatives by hand, a plain loop over places, and itself on other numbers of ranks."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch.nn import functional as F

from automix_dist import distributed
from automix_dist.backbone import create_backbone
from automix_dist.cam import MAX_IMAGES, Showcase, grad_cam, look
from automix_dist.config import ConfigError, EngineConfig, ModelConfig
from automix_dist.config_file import from_dict
from automix_dist.data import Batch
from automix_dist.encoder import Encoder
from automix_dist.evaluation_page import write_evaluation
from automix_dist.model import build_model

CLASSES = 6


def encoder(name: str, size: int, **kwargs) -> Encoder:
    torch.manual_seed(1)
    backbone = create_backbone(ModelConfig(backbone=name, timm_kwargs=kwargs), None, size)
    made = Encoder(backbone, CLASSES).double().eval().requires_grad_(False)
    made.head_one.weight.normal_()
    return made


RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}


def test_where_features_are_averaged_it_is_the_weighted_sum_of_cam():
    """Through a mean and a linear head the gradient of a class is its row of weights over the number of places."""
    model = encoder("resnet18", 128, **RESNET)
    images = torch.randn(3, 3, 128, 128, dtype=torch.float64)
    classes = [torch.arange(3), torch.arange(3) + 3]
    features = model.backbone.model.forward_features(images)
    for found, of in zip(grad_cam(model, "one", images, classes), classes, strict=True):
        expected = torch.einsum("bchw,bc->bhw", features, model.head_one.weight[of]).relu() / 16
        assert expected.shape == (3, 4, 4) and expected.max() > 0
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def by_finite_differences(model: Encoder, module: torch.nn.Module, images, of: int, prefix: int) -> np.ndarray:
    """The definition for one image, each derivative a central difference of the logit, by a hook that adds to it."""
    kept, step = [], 1e-5

    def logit(change) -> float:
        hook = module.register_forward_hook(lambda _m, _i, output: kept.append(output) or output + change)
        try:
            return model(images, "one").double()[0, of].item()
        finally:
            hook.remove()

    logit(0)
    features = kept[0][0]  # [N, C]
    gradient = np.zeros(features.shape)
    for place in np.ndindex(*features.shape):
        change = torch.zeros_like(features)
        change[place] = step
        gradient[place] = (logit(change) - logit(-change)) / (2 * step)
    weights = gradient[prefix:].mean(axis=0)
    return np.maximum((features[prefix:].numpy() * weights).sum(axis=1), 0)


def test_of_a_class_token_it_is_what_the_last_attention_reads():
    model = encoder("vit_tiny_patch16_224", 64, embed_dim=12, depth=2, num_heads=2)
    model.float = model.double  # `Encoder` answers in float32, too coarse for differences
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    (found,) = grad_cam(model, "one", images, [torch.tensor([3])])
    model_logits = model.head_one

    class Exact(torch.nn.Module):
        def __call__(self, images, head):
            return model_logits(model.backbone(images))

    expected = by_finite_differences(Exact(), model.backbone.model.blocks[-1].norm1, images, 3, prefix=1)
    assert expected.max() > 0
    np.testing.assert_allclose(found.numpy().ravel(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 12, "depths": [1, 1, 1], "num_heads": [1, 2, 2], "window_size": 4},
        ),
        ("vit_tiny_patch16_224", {"embed_dim": 12, "depth": 1, "num_heads": 2, "global_pool": "avg", "fc_norm": False}),
    ],
)
def test_of_tokens_that_are_averaged_it_is_cam(name, kwargs):
    model = encoder(name, 64, **kwargs)
    images, of = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.tensor([1, 4])
    last = model.backbone.model.forward_features(images)
    tokens = last[:, 1:] if last.ndim == 3 else last.flatten(1, 2)
    expected = torch.einsum("bnc,bc->bn", tokens, model.head_one.weight[of]).relu() / 16
    (found,) = grad_cam(model, "one", images, [of])
    assert found.shape == (2, 4, 4) and expected.max() > 0
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-10, atol=1e-12)


def test_small_images_are_seen_in_an_earlier_map():
    model = encoder("resnet18", 32, **RESNET)
    images, of = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 4])
    assert model.backbone.last_map(images).shape[2:] == (1, 1)
    (found,) = grad_cam(model, "one", images, [of])
    timm_model = model.backbone.model
    features = timm_model.forward_intermediates(images, indices=[2], intermediates_only=True)[0].requires_grad_()
    logits = model.head_one(timm_model.layer4(timm_model.layer3(features)).mean(dim=(2, 3)))
    (gradient,) = torch.autograd.grad(logits[0, 1] + logits[1, 4], features)
    expected = torch.einsum("bchw,bc->bhw", features, gradient.mean(dim=(2, 3))).relu()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("xcit_nano_12_p16_224", 64, "xcit_nano_12_p16_224 has features of shape"),
        ("mixer_s32_224", 64, "no feature map of 4 x 4 places"),
    ],
)
def test_what_has_no_map_is_refused(name, size, message):
    with pytest.raises(ConfigError, match=message):
        grad_cam(encoder(name, size), "one", torch.zeros(1, 3, size, size).double(), [torch.tensor([0])])


def batches(rank: int = 0, ranks: int = 1, count: int = 50) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES - 1, (count,), generator=generator)  # the last class has no image
    return [Batch(images[i], labels[i], i) for i in torch.arange(rank, count, ranks).split(4)]


def shown(rank_count: int, number: int) -> Batch:
    process = distributed.start(EngineConfig(device="cpu"))
    showcase = Showcase(number, CLASSES)
    for batch in batches(process.rank, rank_count):
        showcase.add(batch)
    chosen = showcase.gather(process)
    distributed.finish()
    return chosen


@pytest.mark.slow
def test_the_same_images_are_chosen_on_any_number_of_ranks():
    ((one,), two) = run_ranks(1, shown, 1, 8), run_ranks(2, shown, 2, 8)
    (all_of_them,) = batches()[0:0] or [Batch(*(torch.cat(each) for each in zip(*batches(), strict=True)))]
    for chosen in two:
        assert all(torch.equal(a, b) for a, b in zip(one, chosen, strict=True))
    # Eight images of six classes: two of the first and the fourth; the sixth has none.
    assert one.labels.tolist() == [0, 0, 1, 2, 3, 3, 4]
    for label in set(one.labels.tolist()):
        first = (all_of_them.labels == label).nonzero().flatten()
        assert one.indices[one.labels == label].tolist() == first[: (one.labels == label).sum()].tolist()
    assert torch.equal(one.images, all_of_them.images[one.indices])
    for number in (0, MAX_IMAGES + 1):
        with pytest.raises(ConfigError, match=f"--cam {number}"):
            Showcase(number, CLASSES)


@pytest.mark.parametrize("policy", ["automix", "cutmix", "manifoldmix"])
def test_views_of_a_policy_and_their_page(policy, tmp_path):
    config = from_dict({"policy": {"name": policy}, "data": {"image_size": 32}, "automix": {"feature": 2}})
    torch.manual_seed(0)
    backbone = create_backbone(ModelConfig(backbone="resnet18", timm_kwargs=RESNET), 2, 32)
    model = build_model(config, backbone, CLASSES, torch.float32)
    batch = batches()[0]
    views = look(model, batch, "query")
    logits = model(batch.images)
    assert torch.equal(views.guess, logits.query.argmax(dim=1))
    torch.testing.assert_close(views.confidence, logits.query.softmax(dim=1).amax(dim=1))
    for each in (views.of_guess, views.of_label):
        assert each.shape == (4, 32, 32) and each.min() >= 0 and each.max() <= 1
    result = {"answer": "query", "conditions": {}, "confusion": None, "calibration": [{"images": 0}] * 3}
    result |= {f"{key}_query": 0.5 for key in ("top1", "top5", "ece", "loss")}
    result["classes"] = [{"name": f"<{i}>", "images": 1, "recall": 0.5, "precision": None} for i in range(CLASSES)]
    page = write_evaluation(result, tmp_path, "run", views).read_text()
    wrong = int((views.guess != batch.labels).sum())
    assert "guess: &lt;" in page and "<0>" not in page
    if policy == "manifoldmix":
        assert views.mixes is None and page.count("<img") == 8 + wrong
    else:
        assert page.count("<img") == 8 + wrong + 16
        assert F.l1_loss(views.mixed.float(), batch.images.float()) > 1
    with pytest.raises(ConfigError, match="ensemble"):
        look(model, batch, "ensemble")
