"""timm models as backbones: what is read off them, what is refused, and exports that plain timm loads."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from automix_dist.automix import AutoMix
from automix_dist.backbone import create_backbone
from automix_dist.checkpoint import Saved, verify
from automix_dist.config import ConfigError, from_dict, to_dict
from automix_dist.draws import draw_step
from automix_dist.export import export_encoder

# name, settings, image size, feature -> channels, size of the feature map (AUTOMIX's table of layers and scales)
FEATURES = [
    ("resnet18", {}, 224, -2, 256, 14),
    ("resnet50", {}, 224, -2, 1024, 14),
    ("resnet18", {"small_stem": True}, 32, -2, 256, 8),
    ("resnext50_32x4d", {"small_stem": True}, 64, -2, 1024, 16),
    ("deit_small_patch16_224", {}, 224, 5, 384, 14),
    ("swin_tiny_patch4_window7_224", {}, 224, -2, 384, 14),
    ("convnext_tiny", {}, 224, -2, 384, 14),
    ("convnext_tiny", {"small_stem": True}, 32, -2, 384, 8),
    ("pvt_v2_b0", {}, 224, -2, 160, 14),
]


@pytest.mark.parametrize(("name", "settings", "size", "feature", "channels", "side"), FEATURES)
def test_features_are_read_off_the_model(name, settings, size, feature, channels, side):
    config = from_dict({"model": {"backbone": name, **settings}})
    backbone = create_backbone(config.model, feature, size)
    assert backbone.feature_channels == channels
    assert backbone.feature_size == (side, side)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        backbone.eval()
        assert torch.equal(backbone.features(images), backbone.features(images, full=True))
        assert backbone(images).shape == (2, backbone.width)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "resnet5O"}, r"resnet5O.*did you mean .*resnet50"),
        ({"backbone": "resnet18", "timm_kwargs": {"colour": 1}}, r"resnet18.*colour"),
        ({"backbone": "vgg11", "small_stem": True}, r"vgg11.*small"),
        ({"backbone": "resnet18", "weights": "missing.safetensors"}, r"missing.safetensors"),
    ],
)
def test_models_that_cannot_be_made(settings, message):
    with pytest.raises(ConfigError, match=message):
        create_backbone(from_dict({"model": settings}).model, -2, 64)


@pytest.mark.parametrize(
    ("name", "size", "feature", "message"),
    [
        ("resnet18", 224, 7, "has 5 feature maps, 0 to 4"),
        ("resnet18", 250, -2, "multiple"),
        ("resnet18", 32, -1, "small_stem"),
    ],
)
def test_features_that_cannot_carry_a_mask(name, size, feature, message):
    with pytest.raises(ConfigError, match=message):
        create_backbone(from_dict({"model": {"backbone": name}}).model, feature, size)


def test_other_resolutions_are_tried_before_training():
    assert create_backbone(from_dict({"model": {"backbone": "resnet18"}}).model, -2, 64, [32, 96]).feature_size == (
        4,
        4,
    )
    with pytest.raises(ConfigError, match=r"96 px \(data\.resolution_schedule\)"):
        create_backbone(from_dict({"model": {"backbone": "deit_tiny_patch16_224"}}).model, 5, 64, [96])


def test_starting_weights_from_a_file(tmp_path):
    """A timm state dict with another classifier is taken without it; one that does not fit is refused."""
    torch.manual_seed(1)
    source = timm.create_model("resnet18", num_classes=7)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    config = from_dict({"model": {"backbone": "resnet18", "weights": str(tmp_path / "weights.safetensors")}})
    backbone = create_backbone(config.model, -2, 64)
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ConfigError, match=r"1 unknown or misshapen.*missing"):
        create_backbone(config.model, -2, 64)


def saved_model(config, model, folder) -> Saved:
    """A checkpoint of a plain model: what one rank of stage 0 writes."""
    from types import SimpleNamespace

    from automix_dist.checkpoint import Checkpoints
    from automix_dist.progress import Progress

    engine = SimpleNamespace(
        module=model,
        name="zero0",
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad]),
    )
    process = SimpleNamespace(
        rank=0, world_size=1, is_main=True, device=torch.device("cpu"), broadcast=lambda v: v, gather=lambda v: [v]
    )
    process.channel, process.progress = lambda: process, Progress()
    about = {"config": to_dict(config), "classes": ["a", "b", "c"], "environment": {"commit": None}}
    checkpoints = Checkpoints(folder, config.checkpoint, process, print)
    checkpoints.save(engine, {"step": 1}, about)
    assert checkpoints.settle()
    return verify(folder / "checkpoints" / "step_00000001")


@pytest.mark.parametrize(
    ("name", "settings", "feature"),
    [
        ("resnet18", {}, -2),
        ("resnet18", {"small_stem": True, "timm_kwargs": {"layers": [1, 1, 1, 1]}}, -2),
        ("convnext_atto", {"drop_path": 0.1}, -2),
        ("convnext_atto", {"small_stem": True}, -2),
        ("deit_tiny_patch16_224", {}, 5),
        ("efficientnet_b0", {}, -2),
    ],
)
@pytest.mark.parametrize(("encoder", "head"), [("query", "one"), ("momentum", "mix")])
def test_exports_give_the_same_logits_in_plain_timm(name, settings, feature, encoder, head, tmp_path):
    config = from_dict(
        {"model": {"backbone": name, **settings}, "automix": {"feature": feature}, "data": {"image_size": 64}}
    )
    torch.manual_seed(0)
    model = AutoMix(create_backbone(config.model, feature, 64), 3, config.automix)
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    model.train()(images, labels, draw_step(config.automix, 4, seed=0, step=0), 0.1)  # moves BatchNorm's statistics
    with torch.no_grad():
        for parameter in model.momentum.parameters():
            parameter.mul_(1.01)  # another encoder than the query's
        logits = model.eval()(images)._asdict()[encoder if head == "one" else f"{encoder}_mix"]

    out = tmp_path / "encoder.safetensors"
    code = export_encoder(saved_model(config, model, tmp_path), out, encoder, head)
    scope: dict = {}
    exec(code, scope)  # what the command prints for the user
    with torch.no_grad():
        torch.testing.assert_close(scope["model"].eval()(images), logits, atol=1e-5, rtol=1e-5)
    if not settings.get("small_stem") and not settings.get("timm_kwargs"):
        image_size = {"img_size": 64} if "deit" in name else {}
        timm.create_model(name, num_classes=3, **image_size).load_state_dict(load_file(out))
