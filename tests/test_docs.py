"""The documents: their links, the settings and names they quote, the code they show, and the site made of them."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run
from torch import nn

from automix_dist import prepare, sources
from automix_dist.automix import AutoMix, Losses
from automix_dist.backbone import create_backbone
from automix_dist.config import Config, ModelConfig, to_dict
from automix_dist.draws import MixDraw
from automix_dist.momentum import MomentumUpdate
from automix_dist.policy import Mixes
from automix_dist.schedules import StepValues

ROOT = Path(__file__).parent.parent
DEFAULTS = to_dict(Config())
KEYS = [key for key, value in DEFAULTS.items() if not isinstance(value, dict)]
KEYS += [f"{section}.{key}" for section, values in DEFAULTS.items() if isinstance(values, dict) for key in values]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").rglob("*.md")])
ids = {"argvalues": PAGES, "ids": [str(page.relative_to(ROOT)) for page in PAGES]}


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"(?ms)^```.*?^```$|^    .*?$", "", page.read_text())


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub and MkDocs name them."""
    headings = re.findall(r"(?m)^#+ (.*)$", prose(page))
    return {re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", **ids)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target} is not there"
        assert not anchor or anchor in anchors(found), f"{page.name}: {found.name} has no heading #{anchor}"


@pytest.mark.parametrize("page", **ids)
def test_settings_exist(page):
    """`section.key` in code quotes, or with a value, is a setting of that section."""
    sections = "|".join(key for key, value in DEFAULTS.items() if isinstance(value, dict))
    for key in re.findall(rf"(?<![\w/.])((?:{sections})\.\w+)(?:=|`|: )", page.read_text()):
        assert key in KEYS or key.endswith((".py", ".safetensors")), f"{page.name} names {key}"


def load_generator():
    specification = importlib.util.spec_from_file_location("configuration", ROOT / "docs" / "configuration.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_configuration_reference_is_up_to_date():
    generator = load_generator()
    assert generator.PAGE.read_text() == generator.page(), "run: python docs/configuration.py"


def test_configuration_reference_lists_every_setting():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert re.findall(r"(?m)^\| `([\w.]+)` \|", page)[: len(KEYS)] == KEYS
    assert not re.search(r"(?m)\| +\|$", page.replace("| default | |", "")), "a setting without a docstring"


def block(word: str) -> str:
    """The Python of docs/extending.md that has this word."""
    (code,) = [
        c for c in re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / "docs/extending.md").read_text()) if word in c
    ]
    return code


def two_layers() -> nn.Module:
    names = {"nn": nn}
    exec(block("TwoLayers"), names)
    return names["TwoLayers"]()


def test_a_backbone_can_be_registered_as_shown(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(block("my_net"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    backbone = create_backbone(ModelConfig("my_net", module="my_models"), feature=-2, image_size=64)
    assert (backbone.feature_channels, backbone.feature_size, backbone.width) == (256, (4, 4), 512)


@pytest.mark.slow
def test_a_backbone_of_ones_own_is_found_by_what_follows_the_training(settings, tmp_path):
    (tmp_path / "my_models.py").write_text(block("my_net"))
    model = "model={backbone: my_net, module: my_models, timm_kwargs: {channels: [8, 8, 16, 16]}}"
    run("train", settings, model, "epochs=1", "optimizer.warmup_epochs=0", folder=tmp_path)
    assert json.loads(run("eval", tmp_path / "run", folder=tmp_path).stdout)["images"] == 355
    code = run("export", tmp_path / "run", tmp_path / "my_net.safetensors", folder=tmp_path).stdout
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    message = run("eval", tmp_path / "run", code=2).stderr  # in another folder
    assert "model.module = 'my_models' cannot be imported" in message and "must be on PYTHONPATH or" in message


def test_the_backbone_shown_can_be_trained():
    model = AutoMix(two_layers(), num_classes=10)
    images, labels = torch.rand(4, 3, 32, 32), torch.arange(4)
    model(images, labels, model.draw(images, seed=0, step=0), 0.1).total.backward()
    assert model.query.backbone.early[0].weight.grad.abs().sum() > 0
    MomentumUpdate(model)(0.9)


def test_the_dataset_shown_can_be_written(tmp_path):
    try:
        exec(block("Checkers"), {"np": np, "Image": Image, "Source": sources.Source})
        options = prepare.PrepareOptions(write_mode="raw")
        manifest = prepare.prepare("checkers:10", tmp_path / "checkers.beton", options, workers=1)
    finally:
        sources.SOURCES.pop("checkers", None)
    assert (manifest.count, manifest.classes) == (10, ["fine", "coarse"])


def test_names_in_the_method_exist():
    """The second column of the table of symbols."""
    model = AutoMix(create_backbone(ModelConfig("resnet18"), feature=-2, image_size=64), num_classes=10)
    real = {"AutoMix": model, "MixBlock": model.mix_block, "Backbone": model.query.backbone}
    real |= {"MomentumUpdate": MomentumUpdate(model), "MixDraw": MixDraw, "Mixes": Mixes, "Losses": Losses}
    real |= {"StepValues": StepValues}
    rows = re.findall(r"(?m)^\| [^|]+\| ([^|]*) \| [^|]*\| [^|]* \|$", (ROOT / "docs" / "method.md").read_text())
    quoted = [each for row in rows for each in re.findall(r"`(\w+)\.(\w+)`", row)]
    assert len(quoted) > 15
    for owner, name in quoted:
        assert hasattr(real[owner], name), f"{owner} has no {name}"


@pytest.mark.slow
def test_the_site_can_be_built(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "MomentumUpdate" in (tmp_path / "api" / "index.html").read_text()
    assert "engine.zero_stage" in (tmp_path / "configuration" / "index.html").read_text()
