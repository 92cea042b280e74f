"""Models are built as the config says: each setting arrives at the part that it is for."""

import pytest
import torch
from tiny import CLASSES, TinyBackbone, micro_batch, tiny_config
from torch.nn import functional as F

from automix_dist.config_file import from_dict
from automix_dist.convolutions import PaddedConv2d
from automix_dist.fused_batchnorm import FusedBatchNorm2d
from automix_dist.model import build_model, new_model

UNUSUAL = {"mean": [0.1, 0.5, 0.9], "std": [0.2, 0.3, 0.4]}


def by_hand(images):
    mean, std = (torch.tensor(UNUSUAL[key])[:, None, None] for key in ("mean", "std"))
    return (images.permute(0, 3, 1, 2) / 255 - mean) / std


@pytest.mark.parametrize("policy", ["automix", "samix", "none"])
@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
def test_a_built_model_has_the_config_s_loss_and_normalisation(policy, loss):
    config = tiny_config(
        policy={"name": policy}, data=UNUSUAL, loss={"name": loss, "label_smoothing": 0.2},
        automix={"lam_concat": False}, engine={"immediate_backward": False},
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_model(config, TinyBackbone(), CLASSES, torch.float32).train()
    images, labels = micro_batch(0, 0, 8)
    got = model(images, labels, model.draw(images, seed=0, step=0), 0.0)
    logits = model.query(by_hand(images), "one")
    smooth = 0.8 * F.one_hot(labels, CLASSES) + 0.2 / CLASSES
    if loss == "cross_entropy":
        expected = -(smooth * logits.log_softmax(dim=1)).sum(dim=1).mean()
    else:
        expected = -(smooth * F.logsigmoid(logits) + (1 - smooth) * F.logsigmoid(-logits)).sum(dim=1).mean()
    torch.testing.assert_close((got.total if policy == "none" else got.clean).detach(), expected.detach())


def test_a_policy_knows_the_normalisation():
    for policy in ("mixup", "switch"):
        model = build_model(tiny_config(policy={"name": policy}, data=UNUSUAL), TinyBackbone(), CLASSES)
        for each in [model.policy, *getattr(model.policy, "policies", [])]:
            assert each.mean.flatten().tolist() == pytest.approx(UNUSUAL["mean"])
            assert each.std.flatten().tolist() == pytest.approx(UNUSUAL["std"])


def test_a_classifier_s_average_answers_for_itself():
    config = tiny_config(policy={"name": "none", "ema_decay": 0.9}, data=UNUSUAL)
    model = build_model(config, TinyBackbone(), CLASSES, torch.float32).eval()
    with torch.no_grad():
        for parameter in model.momentum.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        images, _ = micro_batch(0, 0, 8)
        answers = model(images)
        torch.testing.assert_close(answers.query, model.query(by_hand(images), "one"))
        torch.testing.assert_close(answers.momentum, model.momentum(by_hand(images), "one"))
    assert not torch.allclose(answers.query, answers.momentum)


def resnet(seed: int = 0, **engine):
    model = {"backbone": "resnet18", "small_stem": True, "timm_kwargs": {"channels": [8, 16, 24, 32]}}
    config = from_dict(
        {"seed": seed, "model": model, "data": {"image_size": 32}, "engine": {"device": "cpu", **engine}}
    )
    return new_model(config, 5, torch.device("cpu"))


def test_initial_weights_depend_on_the_seed_and_on_nothing_else():
    first, again, other = resnet(1), resnet(1), resnet(2)
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        if a.ndim > 1:
            assert not torch.equal(a, c), name


def test_engine_options_reach_the_model():
    plain = resnet(immediate_backward=False)
    assert not plain.joint_query and not plain.immediate_backward
    assert not any(isinstance(m, PaddedConv2d | FusedBatchNorm2d) for m in plain.modules())
    model = resnet(joint_query=True, padded_stem=True, fused_batchnorm=True, immediate_backward=True)
    assert model.joint_query and model.immediate_backward
    for encoder in (model.query, model.momentum):
        assert isinstance(encoder.backbone.model.conv1, PaddedConv2d)
        assert isinstance(encoder.backbone.model.bn1, FusedBatchNorm2d)
