"""timm models as backbones: what is read off them, what is refused, and exports that plain timm loads."""

import json
from argparse import Namespace

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from automix_dist.automix import AutoMix
from automix_dist.backbone import classifier_names, create_backbone, foreign_normalisation
from automix_dist.checkpoint_files import CheckpointError, Saved, verify
from automix_dist.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    AutoMixConfig,
    ConfigError,
    DataConfig,
    ModelConfig,
    to_dict,
)
from automix_dist.config_file import from_dict
from automix_dist.data import EvalLoader
from automix_dist.draws import draw_step
from automix_dist.export import export_encoder, foreseen_refusal, transform_code
from automix_dist.prepare import PrepareOptions, open_source, prepare

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


def test_the_second_to_last_block_of_a_vit_is_remarked_upon():
    described = [
        create_backbone(from_dict({"model": {"backbone": name}}).model, feature, 64).describe_feature()
        for name, feature in (("resnet18", -2), ("deit_tiny_patch16_224", 5), ("deit_tiny_patch16_224", -2))
    ]
    assert described[0] == "layer3 (automix.feature 3 of 0 to 4), 256 x 4 x 4"
    assert described[1] == "blocks.5 (automix.feature 5 of 0 to 11), 192 x 4 x 4"
    assert described[2].startswith("blocks.10 (") and described[2].endswith("take the middle, automix.feature=5")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "resnet5O"}, r"resnet5O.*did you mean .*resnet50"),
        ({"backbone": "resnet18", "timm_kwargs": {"colour": 1}}, r"resnet18.*colour"),
        ({"backbone": "resnet18", "timm_kwargs": {"output_stride": 7}}, r"model.timm_kwargs.*: AssertionError$"),
        ({"backbone": "resnet18", "timm_kwargs": {"act_layer": "foo"}}, r"model.timm_kwargs.*: KeyError: 'foo'"),
        ({"backbone": "resnet18", "timm_kwargs": {"drop_rate": 3}}, r"model.timm_kwargs.*: ValueError: dropout prob"),
        ({"backbone": "resnet18", "timm_kwargs": {"layers": 3}, "pretrained": True}, r"model.timm_kwargs.*: TypeError"),
        ({"backbone": "resnet18", "timm_kwargs": {"checkpoint_path": "x.pth"}}, r"name the file in model.weights"),
        ({"backbone": "resnet18", "timm_kwargs": {"features_only": True}}, r"features_only is decided elsewhere"),
        (
            {"backbone": "resnet18", "timm_kwargs": {"global_pool": ""}},
            r"width\].*got shape \[2, 512, 2, 2\]: .*global_",
        ),
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


def test_starting_weights_of_a_distilled_model_leave_both_classifiers_out(tmp_path):
    config = {"backbone": "deit_tiny_distilled_patch16_224", "timm_kwargs": {"depth": 2}}
    source = timm.create_model(config["backbone"], img_size=64, depth=2, num_classes=7)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    config["weights"] = str(tmp_path / "weights.safetensors")
    loaded = create_backbone(from_dict({"model": config}).model, 0, 64).model.state_dict()
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in loaded.items())


def test_starting_weights_leave_out_the_norm_that_belongs_to_a_classifier(tmp_path):
    """As timm does where it loads pretrained weights for another number of classes."""
    source = timm.create_model("repvit_m0_9", num_classes=7)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    config = {"backbone": "repvit_m0_9", "weights": str(tmp_path / "weights.safetensors")}
    loaded = create_backbone(from_dict({"model": config}).model, -2, 64).model.state_dict()
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in loaded.items())


def test_starting_weights_of_other_programs(tmp_path):
    """A checkpoint of torch.save, from data parallel training at another image size, as timm itself loads it."""
    torch.manual_seed(1)
    source = timm.create_model("deit_tiny_patch16_224", img_size=96, depth=2, num_classes=7)
    wrapped = {
        "epoch": 3,
        "args": Namespace(lr=0.1),
        "state_dict": {f"module.{k}": v for k, v in source.state_dict().items()},
    }
    torch.save(wrapped, tmp_path / "checkpoint.pth")
    settings = {"timm_kwargs": {"depth": 2}, "weights": str(tmp_path / "checkpoint.pth")}
    config = from_dict({"model": {"backbone": "deit_tiny_patch16_224", **settings}})
    loaded = create_backbone(config.model, 0, 64).model
    torch.save(source.state_dict(), tmp_path / "plain.pth")
    expected = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=2, num_classes=0)
    convert = timm.models.vision_transformer.checkpoint_filter_fn
    timm.models.load_checkpoint(expected, str(tmp_path / "plain.pth"), strict=False, filter_fn=convert)
    assert loaded.pos_embed.shape != source.pos_embed.shape
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_of_a_checkpoint_with_a_moving_average_that_one_is_taken(tmp_path):
    """As timm does; torch.compile's prefix is none of the names'."""
    present, average = timm.create_model("resnet18"), timm.create_model("resnet18")
    states = [{f"_orig_mod.{k}": v for k, v in each.state_dict().items()} for each in (present, average)]
    for keys in (("state_dict", "state_dict_ema"), ("model", "model_ema")):
        torch.save(dict(zip(keys, states, strict=True)), tmp_path / "checkpoint.pth")
        config = ModelConfig("resnet18", weights=str(tmp_path / "checkpoint.pth"))
        loaded = create_backbone(config, -2, 64).model.state_dict()
        assert all(torch.equal(tensor, average.state_dict()[name]) for name, tensor in loaded.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"query.backbone.model.conv1.weight": torch.zeros(3)}, r"1 unknown .*; `automix export` writes what fits"),
        ({"optimizer": {"lr": 0.1}}, r"expected a state dict.*\['optimizer'\]"),
        ([1, 2], r"expected a state dict.*list"),
        (None, r"cannot be read as tensors of torch\.save"),
        ({"model": {"conv1.weight": torch.zeros(3)}}, r"1 unknown or misshapen.*missing"),
    ],
)
def test_starting_weights_that_cannot_be_used(content, message, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_text("nonsense") if content is None else torch.save(content, path)
    with pytest.raises(ConfigError, match=message):
        create_backbone(from_dict({"model": {"backbone": "resnet18", "weights": str(path)}}).model, -2, 64)


def test_pretrained_weights_that_do_not_fit_are_no_failed_download(tmp_path):
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "published.safetensors")
    kwargs = {"pretrained_cfg_overlay": {"file": str(tmp_path / "published.safetensors")}}
    config = {"backbone": "resnet18", "pretrained": True, "timm_kwargs": kwargs}
    create_backbone(from_dict({"model": config}).model, -2, 64)
    kwargs["channels"] = [32, 64, 128, 256]
    with pytest.raises(
        ConfigError, match=r"no weights that fit 'resnet18' with model.timm_kwargs.*RuntimeError: Error"
    ):
        create_backbone(from_dict({"model": config}).model, -2, 64)


def test_a_normalisation_that_pretrained_weights_do_not_expect():
    named = {"resnet18": None, "vit_tiny_patch16_224": "set 'data.mean=[0.5, 0.5, 0.5]' 'data.std=[0.5, 0.5, 0.5]'"}
    for name, advice in named.items():
        model, data = timm.create_model(name), from_dict({}).data
        assert foreign_normalisation(model, ModelConfig(), data) is None
        note = foreign_normalisation(model, ModelConfig(pretrained=True), data)
        assert note is None if advice is None else note.endswith(advice)
        note = foreign_normalisation(model, ModelConfig(weights="published.pth"), data)
        assert note is None if advice is None else note.endswith(f"{advice}, if these are they")


def saved_model(config, model, folder) -> Saved:
    """A checkpoint of a plain model: what one rank of stage 0 writes."""
    from types import SimpleNamespace

    from automix_dist.checkpoint import Checkpoints
    from automix_dist.progress import Progress

    engine = SimpleNamespace(
        module=model,
        name="zero0",
        loss_scale=None,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad]),
    )
    process = SimpleNamespace(
        rank=0, world_size=1, is_main=True, device=torch.device("cpu"), broadcast=lambda v: v, gather=lambda v: [v]
    )
    process.channel, process.progress = lambda: process, Progress()
    about = {"config": to_dict(config), "classes": ["a", "b", "c"], "environment": {"commit": None}}
    checkpoints = Checkpoints(folder, config.checkpoint, process, print)
    checkpoints.save(engine, {"step": 1}, about)
    assert checkpoints.wait()
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
        ("deit_tiny_distilled_patch16_224", {}, 5),
        ("resnetv2_18", {}, -2),  # a convolution is its classifier
        ("repvit_m0_9", {}, -2),  # two classifiers, a BatchNorm before each
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
    assert foreseen_refusal(config, model) is None
    code = export_encoder(saved_model(config, model, tmp_path), out, encoder, head)
    scope: dict = {}
    exec(code, scope)  # what the command prints for the user
    with torch.no_grad():
        torch.testing.assert_close(scope["model"](images), logits, atol=1e-5, rtol=1e-5)
    assert scope["classes"] == ["a", "b", "c"]
    with safe_open(out, "pt") as file:
        about = file.metadata()
    assert json.loads(about["mean"]) == list(IMAGENET_MEAN) and json.loads(about["std"]) == list(IMAGENET_STD)
    assert (about["step"], about["encoder"], about["head"]) == ("1", encoder, head)
    if not settings.get("small_stem") and not settings.get("timm_kwargs"):
        image_size = {"img_size": 64} if "deit" in name else {}
        timm.create_model(name, num_classes=3, **image_size).load_state_dict(load_file(out))


def test_a_module_that_timm_has_not_built_has_no_classifier_by_name():
    """One of the user's own that is registered as it is; nothing is known of it, and nothing fails for that."""
    model = AutoMix(create_backbone(ModelConfig("test_resnet"), -2, 64), 3, AutoMixConfig())
    del model.query.backbone.model.pretrained_cfg
    config = from_dict({"model": {"backbone": "test_resnet", "weights": "own.pth"}})
    assert foreign_normalisation(model.query.backbone.model, config.model, config.data) is None
    assert classifier_names(model.query.backbone.model) == ()


@pytest.mark.parametrize(
    ("name", "message", "is_foreseen"),
    [
        ("caformer_s18", "is not linear in .*tensors beside it: 'head.fc.fc1.bias'", True),
        ("efficientvim_m1", "not linear in", False),
    ],
)
def test_a_head_that_cannot_take_the_classifier_s_place_is_not_exported(name, message, is_foreseen, tmp_path):
    config = from_dict({"model": {"backbone": name}, "data": {"image_size": 64}})
    model = AutoMix(create_backbone(config.model, -2, 64), 3, config.automix)
    note = foreseen_refusal(config, model)
    assert (note is not None and "caformer_s18 cannot be exported" in note) == is_foreseen
    with pytest.raises(CheckpointError, match=message):
        export_encoder(saved_model(config, model, tmp_path), tmp_path / "encoder.safetensors", "query", "one")
    assert not (tmp_path / "encoder.safetensors").exists()


@pytest.mark.parametrize(
    ("resize", "size", "ratio"),
    [("bicubic", 56, 0.949), ("bilinear", 40, 0.875), ("bilinear", 42, 0.875), ("area", 40, 0.875), ("area", 64, 1.0)],
)
def test_the_transform_of_an_export_is_that_of_evaluation(resize, size, ratio, tmp_path):
    prepare("synthetic:6@3", tmp_path / "x.beton", PrepareOptions(write_mode="raw"), progress=False)
    data = DataConfig(image_size=size, eval_crop_ratio=ratio, resize=resize, mean=(0.5, 0.4, 0.3))
    loader = EvalLoader(tmp_path / "x.beton", data, batch_size=6, rank=0, world_size=1, device=torch.device("cpu"))
    ((pixels, *_),) = loader
    loader.close()
    scope = {"timm": timm}
    exec("\n".join(transform_code(data)), scope)
    source = open_source("synthetic:6@3", "train")
    theirs = torch.stack([scope["transform"](source.load(i)) for i in range(6)])
    mean, std = (torch.tensor(each)[:, None, None] for each in (data.mean, data.std))
    levels = (theirs - (pixels.permute(0, 3, 1, 2) / 255 - mean) / std).abs() * std * 255
    if resize == "area":
        assert levels.mean() < 6  # on noise; between smooth areas there is no difference
    else:
        assert levels.max() < 0.01
