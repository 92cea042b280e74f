"""The settings' tree: what is accepted, and what a mistake is answered with."""

from pathlib import Path

import pytest

from automix_dist.config import Config, ConfigError, from_dict, load_config, to_dict, to_yaml

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


def test_defaults_are_valid_and_survive_yaml(tmp_path):
    config = Config()
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_open_with_their_command(path):
    load_config(path)
    assert "Command:" in path.read_text().split("\n", 3)[1]


def test_overrides_replace_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("epochs: 5\noptimizer:\n  lr: 1e-1\n  weight_decay: 1e-4\n")
    config = load_config(path, ["optimizer.lr=3e-2", "automix.upsampling=[nearest, bilinear]", "optimizer.mix_lr=null"])
    assert (config.epochs, config.optimizer.lr, config.optimizer.weight_decay) == (5, 0.03, 1e-4)
    assert config.automix.upsampling == ("nearest", "bilinear")
    assert config.optimizer.mix_lr is None


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
        ("data=3", ["data", "section"]),
        ("epochs.x=1", ["epochs"]),
        ("optimizer.lr", ["section.key=value"]),
        ("optimizer.lr=[", ["optimizer.lr", "YAML"]),
        ("model.timm_kwargs={num_classes: 3}", ["model.timm_kwargs.num_classes"]),
        ("batch_size=1", ["batch_size", "pairs"]),
    ],
)
def test_a_mistake_names_key_value_and_what_is_valid(override, parts):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    for part in parts:
        assert part in str(caught.value)


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
    for name, text, message in (("list", "- 1\n", "key: value"), ("torn", "a: [1\n", "not valid YAML")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(tmp_path / name)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="not a text file"):
        load_config(tmp_path / "binary")


def test_micro_batches_share_a_batch_evenly():
    config = load_config(None, ["batch_size=96", "engine.accumulation_steps=2"])
    assert config.micro_batch_size(4) == 12
    with pytest.raises(ConfigError, match=r"batch_size = 96.*5 rank.*multiple of 10"):
        config.micro_batch_size(5)
    with pytest.raises(ConfigError, match="at least 2 images"):
        config.micro_batch_size(48)


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_configs_take_two_real_steps(path):
    """The recipe's model and settings, with few images: two optimizer steps change every trained tensor."""
    import dataclasses

    import torch

    from automix_dist.automix import AutoMix
    from automix_dist.backbone import create_backbone
    from automix_dist.draws import draw_step
    from automix_dist.momentum import MomentumUpdate
    from automix_dist.optimizer import build_optimizer, set_learning_rates
    from automix_dist.schedules import Schedule

    config = load_config(path)
    model_config = dataclasses.replace(config.model, pretrained=False)  # weights come from a network
    torch.manual_seed(0)
    size = config.data.image_size
    backbone = create_backbone(model_config, config.automix.feature, size)
    model = AutoMix(backbone, 10, config.automix, mean=config.data.mean, std=config.data.std).train()
    optimizer, update, schedule = build_optimizer(model, config.optimizer), MomentumUpdate(model), Schedule(config, 50)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(2):
        images = torch.randint(0, 256, (4, size, size, 3), dtype=torch.uint8)
        values = schedule.at(step + 100)
        set_learning_rates(optimizer, values)
        optimizer.zero_grad()
        draws = draw_step(config.automix, 4, seed=0, step=step)
        losses = model(images, torch.randint(0, 10, (4,)), draws, values.mask_loss_weight)
        assert torch.isfinite(losses.total)
        losses.total.backward()
        optimizer.step()
        update(values.momentum)
    unchanged = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not [name for name in unchanged if not name.startswith("momentum.")]
