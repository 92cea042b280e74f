"""Every shipped recipe: its head, its base, and two real training steps with its own settings at a small size."""

import dataclasses
import re
from pathlib import Path

import pytest
import timm
import torch
from torchvision.models import ResNet18_Weights, ResNeXt50_32X4D_Weights

from automix_dist import policy
from automix_dist.backbone import create_backbone
from automix_dist.config import Config, ConfigError
from automix_dist.config_file import load_config
from automix_dist.draws import seed_torch
from automix_dist.model import build_model
from automix_dist.momentum import MomentumUpdate
from automix_dist.optimizer import build_optimizer, set_learning_rates
from automix_dist.schedules import Schedule

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs").glob("*/*.yaml"))
SMALL = {
    "resnetv2": {"layers": [1, 1, 1], "channels": [16, 24, 32], "stem_chs": 8},
    "resne": {"layers": [1, 1, 1, 1], "channels": [16, 16, 24, 32]},
    "convnext": {"depths": [1, 1, 1, 1], "dims": [16, 16, 24, 32]},
    "deit": {"depth": 7, "embed_dim": 24, "num_heads": 3},
    "swin": {"depths": [1, 1, 1, 1], "embed_dim": 16, "num_heads": [1, 1, 2, 2]},
    "pvt": {"depths": [1, 1, 1, 1], "embed_dims": [16, 16, 40, 64]},
}
"""Layers to take the place of each family's, by the beginning of its name; the first that fits."""


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def small(config: Config) -> Config:
    kwargs = next(kwargs for start, kwargs in SMALL.items() if config.model.backbone.startswith(start))
    model = dataclasses.replace(config.model, pretrained=False, timm_kwargs=kwargs)
    size = 32 if config.data.image_size == 32 else 64
    data = dataclasses.replace(config.data, image_size=size, resolution_schedule=())
    return dataclasses.replace(config, model=model, data=data)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_takes_two_real_steps(path):
    """Two optimizer steps, at a point where the schedules are under way, change every tensor that should learn."""
    config = small(load_config(path))
    torch.manual_seed(0)
    size = config.data.image_size
    backbone = create_backbone(config.model, policy.needed_feature(config), size)
    model = build_model(config, backbone, 10, torch.float32).train()
    optimizer, update, schedule = build_optimizer(model, config.optimizer), MomentumUpdate(model), Schedule(config, 20)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(2):
        images = torch.randint(0, 256, (4, size, size, 3), dtype=torch.uint8)
        values = schedule.at(schedule.total_steps // 3 + step)
        set_learning_rates(optimizer, values)
        optimizer.zero_grad()
        seed_torch(seed=0, step=step)
        losses = model(images, torch.randint(0, 10, (4,)), model.draw(images, seed=0, step=step), 0.1)
        assert torch.isfinite(losses.total)
        losses.total.backward()
        optimizer.step()
        update(values.momentum)
    unchanged = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not [name for name in unchanged if not name.startswith("momentum.")]


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_opens_with_what_one_wants_to_know(path):
    head = re.match(r"(#.*\n)+", path.read_text())[0]
    assert f" configs/{path.relative_to(ROOT / 'configs')}" in head or path.parent.name == "digits"
    if path.parent.name != "digits":
        for label in ("Command", "Hardware", "Hours", "Published"):
            assert f"\n# {label}:" in head
        gpus = re.search(r"launch/torchrun\.sh --ranks-per-node (\d+) ", head)
        config, ranks = load_config(path), int(gpus[1]) if gpus else 1
        images, parts = config.micro_batch_size(ranks), ranks * config.engine.accumulation_steps
        if config.engine.sync_batchnorm:  # over all ranks: their number alone is part of the recipe
            assert f"{ranks} GPUs with {images} images each" in head and "and no other number" in head
        elif gpus:  # BatchNorm and lambda are each micro batch's own: their number is part of the recipe
            assert f"{images} images each; ranks x engine.accumulation_steps = {parts} trains the same recipe." in head


def test_fine_tuning_starts_from_torchvisions_first_weights():
    models = [load_config(path).model for path in RECIPES]
    fine_tuned = {model.backbone for model in models if model.pretrained}
    theirs = {ResNet18_Weights.IMAGENET1K_V1.url, ResNeXt50_32X4D_Weights.IMAGENET1K_V1.url}
    assert {timm.get_pretrained_cfg(name).url for name in fine_tuned} == theirs


def test_recipes_do_not_share_a_run_s_folder():
    outputs = [load_config(path).output for path in RECIPES]
    assert len(set(outputs)) == len(outputs)


def test_the_index_names_every_recipe():
    index = (ROOT / "configs" / "README.md").read_text()
    linked = {ROOT / "configs" / link for link in re.findall(r"\((\w+/\w+\.yaml)\)", index)}
    assert linked == set(RECIPES)


def test_published_commands_of_baselines_work():
    """Another policy on a command line starts from its own defaults, whatever the file says of its own."""
    path = ROOT / "configs" / "cifar100" / "baseline_deit_small_200ep.yaml"
    for overrides in (
        ["policy.name=cutmix", "policy.settings.alpha=2"],
        ["policy.settings.alpha=2", "policy.name=cutmix"],
    ):
        config = load_config(path, overrides)
        assert (config.policy.name, config.policy.settings) == ("cutmix", {"alpha": 2})
    assert load_config(path, ["policy.settings.shares=[2, 1]"]).policy.settings.keys() == {"policies", "shares"}


def test_a_base_is_below_its_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "bottom.yaml").write_text(
        "epochs: 7\noptimizer: {lr: 0.5, momentum: 0.8}\nmodel: {timm_kwargs: {a: 1}}\n"
    )
    (tmp_path / "middle.yaml").write_text("base: bottom.yaml\npolicy: {name: cutmix, settings: {alpha: 3.0}}\n")
    (tmp_path / "sub" / "top.yaml").write_text("base: ../middle.yaml\noptimizer: {lr: 0.25}\npolicy: {name: fmix}\n")
    config = load_config(tmp_path / "sub" / "top.yaml", ["model.timm_kwargs.b=2"])
    assert (config.epochs, config.optimizer.lr, config.optimizer.momentum) == (7, 0.25, 0.8)
    assert (config.policy.name, config.policy.settings, config.model.timm_kwargs) == ("fmix", {}, {"a": 1, "b": 2})


def test_bases_that_cannot_be(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match=r"a\.yaml has itself as its base, by way of a\.yaml, b\.yaml"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("base: bb.yaml\n")
    with pytest.raises(ConfigError, match=r"bb\.yaml \(the base of .*c\.yaml\).*did you mean .*b\.yaml"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "d.yaml").write_text("epochs: 3\nmodel: 4\n")
    with pytest.raises(ConfigError, match=r"model = 4: expected a section"):
        load_config(tmp_path / "d.yaml")
