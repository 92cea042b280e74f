"""The settings' tree: what is accepted, and what a mistake is answered with."""

import pytest

from automix_dist.config import Config, ConfigError, to_dict
from automix_dist.config_file import from_dict, load_config, to_yaml


def test_defaults_are_valid_and_survive_yaml(tmp_path):
    config = Config()
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config
    assert from_dict(to_dict(config)) == config


def test_overrides_replace_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("epochs: 5\noptimizer:\n  lr: 1e-1\n  weight_decay: 1e-4\n")
    config = load_config(path, ["optimizer.lr=3e-2", "automix.upsampling=[nearest, bilinear]", "optimizer.mix_lr=null"])
    assert (config.epochs, config.optimizer.lr, config.optimizer.weight_decay) == (5, 0.03, 1e-4)
    assert config.automix.upsampling == ("nearest", "bilinear")
    assert config.optimizer.mix_lr is None
    # Text is what the user wrote, also where YAML would see a comment.
    assert load_config(path, ["output=runs/exp #2"]).output == "runs/exp #2"
    assert load_config(path, ["output='runs/exp #2'"]).output == "runs/exp #2"
    assert load_config(path, ["output=2024-31-12"]).output == "2024-31-12"  # YAML sees a date with a 31st month
    assert load_config(path, ["output=runs/r\udcfcn"]).output == "runs/r\udcfcn"  # as Python has bytes of a path
    assert load_config(path, ["data.rand_augment=", "optimizer.mix_lr="]) == load_config(path)  # empty is off, or none


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimizer.lrr=1", ["optimizer.lrr", "did you mean optimizer.lr?"]),
        ("optimiser.lr=1", ["optimiser", "did you mean optimizer.lr?"]),
        ("optimizer.lr=fast", ["optimizer.lr", "'fast'", "a number"]),
        ("epochs=1.5", ["epochs", "1.5", "whole number"]),
        ("epochs=true", ["epochs", "True", "whole number"]),
        ("data.flip=1", ["data.flip", "true or false"]),
        ("engine.zero_stage=4", ["engine.zero_stage", "4", "0, 1, 2, 3"]),
        ("engine.zero_stage=true", ["engine.zero_stage", "True"]),
        ("engine.precision=bfloat", ["engine.precision", "did you mean bfloat16?"]),
        ("automix.upsampling=[cubic]", ["automix.upsampling[0]", "cubic", "nearest, bilinear"]),
        ("automix.upsampling=[]", ["automix.upsampling", "at least one"]),
        ("automix.lam_margin=0.5", ["automix.lam_margin", "[0, 0.5)"]),
        ("automix.momentum_end=0.9", ["automix.momentum", "0.9"]),
        ("optimizer.min_lr=1", ["optimizer.min_lr", "0.1"]),
        ("optimizer.warmup_epochs=100", ["optimizer.warmup_epochs", "100"]),
        ("data.mean=[1, 2]", ["data.mean", "3 values"]),
        ("data.std=[0, 1, 1]", ["data.std", "positive"]),
        ("data.std=[58.4, 57.1, 57.4]", ["data.std", "divide", "255"]),
        ("data.mean=[123.7, 116.3, 103.5]", ["data.mean", "divide", "255"]),
        ("model.timm_kwargs={in_chans: 1}", ["model.timm_kwargs.in_chans", "RGB"]),
        ("model.module=my_models.py", ["model.module", "my_models for my_models.py"]),
        ("model.module=a-b", ["model.module", "as `import` takes it"]),
        ("seed=010", ["seed", "whole number", "'010'"]),
        ("epochs=1:30", ["epochs", "whole number", "'1:30'"]),
        ("model.timm_kwargs=&x {a: *x}", ["alias"]),
        ("data=3", ["data", "section"]),
        ("engine.timeout_minutes=.inf", ["engine.timeout_minutes", "finite"]),
        ("epochs.x=1", ["epochs"]),
        ("optimizer.lr", ["section.key=value"]),
        ("optimizer.lr=[", ["optimizer.lr", "YAML"]),
        ("model.timm_kwargs={num_classes: 3}", ["model.timm_kwargs.num_classes"]),
        ("batch_size=1", ["batch_size", "pairs"]),
        (f"optimizer.lr={10**400}", ["optimizer.lr", "finite"]),
    ],
)
def test_a_mistake_names_key_value_and_what_is_valid(override, parts):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    for part in parts:
        assert part in str(caught.value)


def test_a_choice_is_the_choice_itself():
    stage = load_config(None, ["engine.zero_stage=3.0"]).engine.zero_stage
    assert stage == 3 and isinstance(stage, int)


def test_combinations_that_cannot_be():
    with pytest.raises(ConfigError, match=r"mix_momentum.*adamw"):
        load_config(None, ["optimizer.name=adamw", "optimizer.mix_momentum=0.9"])
    with pytest.raises(ConfigError, match=r"kernels.*cpu"):
        load_config(None, ["engine.kernels=triton", "engine.device=cpu"])
    with pytest.raises(ConfigError, match=r"pretrained and model\.weights"):
        load_config(None, ["model.pretrained=true", "model.weights=x.safetensors"])


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "resnet50.yaml").write_text("epochs: 3\n")
    with pytest.raises(ConfigError, match=r"resnet5\.yaml.*did you mean .*resnet50.yaml"):
        load_config(tmp_path / "resnet5.yaml")
    for name, text, message in (
        ("list", "- 1\n", "key: value"),
        ("torn", "a: [1\n", "not valid YAML"),
        ("date", "output: 2024-31-12\n", "month must be in 1..12"),
        ("twice", "data:\n  image_size: 32\ndata:\n  flip: false\n", "key 'data' is here a second time.*\n.*line 3"),
        ("dotted", "data.image_size: 32\n", r"unknown key data.image_size; .* data: \{image_size: \.\.\.\}"),
        ("deep", "a: " + 3000 * "[" + 3000 * "]", "nested too deeply"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(tmp_path / name)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "wide.yaml").write_text("epochs: 3\n", "utf-16")
    for name in ("binary", "wide.yaml"):
        with pytest.raises(ConfigError, match=r"not a text file in UTF-8$"):
            load_config(tmp_path / name)


def test_a_section_without_a_line_in_it_changes_nothing(tmp_path):
    (tmp_path / "base.yaml").write_text("data: {image_size: 32}\n")
    (tmp_path / "top.yaml").write_text("base: base.yaml\ndata:\n  # image_size: 64\noptimizer:\n")
    assert load_config(tmp_path / "top.yaml") == load_config(tmp_path / "base.yaml")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.timm_kwargs.b=2"], {"a": 1, "b": 2}),
        (["model.timm_kwargs={}"], {}),
        (["model.backbone=resnet50"], {}),
        (["model.timm_kwargs.b=2", "model.backbone=resnet50"], {"b": 2}),
        (["model.backbone=resnet10t"], {"a": 1}),
    ],
)
def test_settings_of_a_network_do_not_follow_to_another(overrides, expected, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {backbone: resnet10t, timm_kwargs: {a: 1}}\n")
    assert load_config(path, overrides).model.timm_kwargs == expected


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["model.backbone=resnet50"],
            ["model.timm_kwargs of {} left out, as model.backbone is another one: {{'a': 1}}"],
        ),
        (["policy.name=mixup"], ["policy.settings of {} left out, as policy.name is another one: {{'alpha': 0.2}}"]),
        (["model.timm_kwargs={}", "policy.settings={}", "policy.name=cutmix", "model.backbone=resnet10t"], []),
    ],
)
def test_what_an_override_leaves_out_is_said(overrides, said, tmp_path):
    path, heard = tmp_path / "config.yaml", []
    path.write_text(
        "model: {backbone: resnet10t, timm_kwargs: {a: 1}}\npolicy: {name: cutmix, settings: {alpha: 0.2}}\n"
    )
    load_config(path, overrides, heard.append)
    assert heard == [line.format(path) for line in said]


def test_micro_batches_share_a_batch_evenly():
    config = load_config(None, ["batch_size=96", "engine.accumulation_steps=2"])
    assert config.micro_batch_size(4) == 12
    with pytest.raises(ConfigError, match=r"batch_size = 96.*5 rank.*multiple of 10"):
        config.micro_batch_size(5)
    with pytest.raises(ConfigError, match="at least 2 images"):
        config.micro_batch_size(48)
