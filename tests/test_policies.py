"""Hand-crafted policies against libraries, published formulas restated in loops, and what must hold for any of them."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run, run_ranks
from safetensors.torch import save_file
from test_training import failing, shards
from tiny import CLASSES, SIZE, TinyBackbone, micro_batch, tiny_config
from torch.nn import functional as F
from torchvision.transforms import v2

from automix_dist import config as config_module
from automix_dist import distributed, policies, policy
from automix_dist.activation_checkpointing import checkpoint_blocks
from automix_dist.backbone import create_backbone, create_timm_model
from automix_dist.batchnorm import RunningStatistics
from automix_dist.checkpoint import Checkpoints
from automix_dist.checkpoint_files import load_module_state, newest, verify
from automix_dist.classifier import Classifier
from automix_dist.cli import main
from automix_dist.config import POLICIES, AutoMixConfig, ConfigError, LossConfig, ModelConfig, PolicyConfig
from automix_dist.config_file import load_config
from automix_dist.draws import Draws, MixDraw, draw_step, seed_torch, shared_rng, step_rng
from automix_dist.engines import build_engine
from automix_dist.loss import class_loss, mixed_loss
from automix_dist.model import build_model
from automix_dist.momentum import MomentumUpdate
from automix_dist.optimizer import Lamb, build_optimizer
from automix_dist.policies import adautomix, alignmix, saliencymix, samix, transmix

LEARNED = {"automix", "samix", "adautomix"}
NETWORK = {"manifoldmix", "alignmix", "attentivemix", "transmix", "puzzlemix"}
MASKED = sorted(set(POLICIES) - LEARNED - NETWORK - {"none", "switch"})
EACH_BATCH = {"seed": 3, "micro_step": 0, "rank": 0}


def make(name: str, **values):
    module, own = policy.load(PolicyConfig(name, values))
    return module.Policy(own, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def draw(made, images, step: int = 0):
    where = EACH_BATCH | {"step": step}
    return made.draw(step_rng(**where), shared_rng(**where), images)


def images_of(size: int, height: int = SIZE, width: int = SIZE) -> torch.Tensor:
    return torch.randn(size, 3, height, width, generator=torch.Generator().manual_seed(size))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """A small network's weights, for AttentiveMix."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    torch.manual_seed(0)
    save_file(create_timm_model(ModelConfig("test_resnet"), 64).state_dict(), path)
    return str(path)


class Fixed:
    """Stands in for a generator: hands out what the library was made to draw."""

    def __init__(self, *numbers: int):
        self.numbers = list(numbers)

    def integers(self, *_):
        return self.numbers.pop(0)


def test_every_file_is_a_policy_with_frozen_settings():
    folder = Path(policy.__file__).parent / "policies"
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(POLICIES)
    for name in POLICIES:
        module, own = policy.load(PolicyConfig(name))
        assert hasattr(module, "Policy") != hasattr(module, "Model")
        assert own.__dataclass_params__.frozen and f"`{name}`" in (folder.parents[1] / "docs/policies.md").read_text()


def test_the_example_of_the_docs_is_all_that_a_policy_needs(tmp_path, monkeypatch):
    text = (Path(policy.__file__).parents[1] / "docs" / "policies.md").read_text()
    (tmp_path / "stripemix.py").write_text(re.search(r"```python\n(.*?)```", text, re.S)[1])
    monkeypatch.setattr(policies, "__path__", [*policies.__path__, str(tmp_path)])
    monkeypatch.setattr(config_module, "POLICIES", [*POLICIES, "stripemix"])
    config = load_config(None, ["policy.name=stripemix", "policy.settings.stripes=4", "data.image_size=16"])
    model = build_model(config, TinyBackbone(), CLASSES, torch.float32)
    images, labels = micro_batch(0, 0, 8)
    this = model.draw(images, seed=0, step=0)
    losses = model(images, labels, this)
    losses.total.backward()
    assert losses.mask_area.item() == pytest.approx(1 - this.lam[0].item(), abs=0.13)
    assert model(images, None, model.gallery_draw(images)).mask.shape == (8, SIZE, SIZE)


@pytest.mark.parametrize(
    "name, values, message",
    [
        ("cutmixx", {}, r"policy.name = 'cutmixx'.*did you mean cutmix"),
        ("cutmix", {"alhpa": 1}, r"policy.settings.alhpa; did you mean policy.settings.alpha"),
        ("cutmix", {"stripes": 1}, r"unknown key policy.settings.stripes \(policy cutmix has alpha\)$"),
        ("none", {"alpha": 1}, r"unknown key policy.settings.alpha \(policy none has no settings of its own\)$"),
        ("automix", {"alpha": 1}, r"did you mean automix.alpha\? \(policy automix has no settings of its own\)$"),
        ("cutmix", {"alpha": "much"}, r"policy.settings.alpha = 'much': expected a number"),
        ("cutmix", {"alpha": 0}, r"policy.settings.alpha = 0.0: expected a positive number"),
        ("resizemix", {"scale": [0.9, 0.1]}, r"policy.settings.scale"),
        ("switch", {"policies": []}, r"policy.settings.policies"),
        ("switch", {"policies": [{"name": "mixup"}], "shares": [1, 2]}, r"policy.settings.shares"),
    ],
)
def test_mistakes_in_a_policy_name_their_key(name, values, message):
    with pytest.raises(ConfigError, match=message):
        policy.load(load_config(None, [f"policy.name={name}", f"policy.settings={json.dumps(values)}"]).policy)


def test_mistakes_that_only_the_backbone_shows():
    resnet = create_backbone(ModelConfig("test_resnet"), None, 32)
    with pytest.raises(ConfigError, match=r"no module 'layer9'; it has conv1"):
        Classifier(resnet, 3, make("manifoldmix", layers=["layer9"]))
    with pytest.raises(ConfigError, match="class token"):
        Classifier(resnet, 3, make("transmix"))
    for name in ("vit_small_patch16_rope_224", "eva02_tiny_patch14_224", "vit_relpos_medium_patch16_cls_224"):
        other = create_backbone(ModelConfig(name, timm_kwargs={"depth": 1}), None, 224)
        with pytest.raises(ConfigError, match="plain attention"):
            Classifier(other, 3, make("transmix"))
    with pytest.raises(ConfigError, match="CNN"):
        Classifier(create_backbone(ModelConfig("test_vit"), None, 160), 3, make("alignmix"))
    with pytest.raises(ConfigError, match="momentum encoder"):
        build_model(tiny_config(policy={"ema_decay": 0.9}), TinyBackbone(), CLASSES, torch.float32)
    with pytest.raises(ConfigError, match=r"engine.joint_query has no meaning for policy mixup: set it to false"):
        build_model(tiny_config(policy={"name": "mixup"}, engine={"joint_query": True}), TinyBackbone(), CLASSES)
    with pytest.raises(ConfigError, match="automix is not a hand-crafted policy"):
        make("switch", policies=[{"name": "automix"}])
    with pytest.raises(ConfigError, match=r"a switch inside a switch: list its policies here, with .*shares"):
        make("switch", policies=[{"name": "mixup"}, {"name": "switch"}])


@pytest.mark.parametrize("layer", ["layer1", "layer2.0"])
def test_manifoldmix_of_blocks_that_are_computed_again(layer):
    """Whole ones have the same gradients as ever; a layer inside one is refused."""
    grads = []
    for again in (False, True):
        own = {"name": "manifoldmix", "settings": {"layers": [layer]}}
        config = tiny_config(policy=own, engine={"activation_checkpointing": again})
        torch.manual_seed(0)
        model = build_model(config, create_backbone(ModelConfig("resnet10t"), None, 64), CLASSES, torch.float32)
        if again:
            checkpoint_blocks(model.query)
        images, labels = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8), torch.arange(4)
        model.train()(images, labels, model.draw(images, seed=0, step=0)).total.backward()
        grads.append([p.grad for p in model.query.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    own["settings"]["layers"] = ["layer1", "layer2.0.bn1"]
    for each in (own, {"name": "switch", "settings": {"policies": [own]}}):
        config = tiny_config(policy=each, engine={"activation_checkpointing": True})
        with pytest.raises(ConfigError, match=r"output of 'layer2.0.bn1', which lies inside a BasicBlock"):
            build_model(config, create_backbone(ModelConfig("resnet10t"), None, 64), CLASSES)


@pytest.mark.parametrize("name", [*MASKED, "switch"])
def test_mixes_are_what_the_mask_says(name):
    made, images = make(name), images_of(6, 24, 32)
    for step in range(20):
        this = draw(made, images, step)
        assert sorted(this.partner.tolist()) == list(range(6))
        mix = made.mix(images, this)
        mask = mix.mask.expand(-1, 24, 32)
        assert mask.min() >= 0 and mask.max() <= 1
        torch.testing.assert_close(mix.lam, 1 - mask.mean(dim=(1, 2)))
        inner = made.policies[this.extra["policy"]] if name == "switch" else made
        expected = images * (1 - mask[:, None]) + inner.partners(images, this) * mask[:, None]
        torch.testing.assert_close(mix.images, expected, atol=1e-6, rtol=1e-5)
        if name not in ("resizemix", "switch"):
            assert torch.equal(inner.partners(images, this), images[this.partner])


@pytest.mark.parametrize("name", [*MASKED, "manifoldmix", "switch"])
def test_draws_are_the_only_randomness(name):
    made, images = make(name, **({"layers": [""]} if name == "manifoldmix" else {})), images_of(8)

    def outputs(step: int, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        np.random.seed(seed)
        return made(lambda x, _: x.flatten(1), images, draw(made, images, step))[0]

    assert torch.equal(outputs(0, 1), outputs(0, 2))
    assert not torch.equal(outputs(0, 1), outputs(1, 1))


def library_mix(transform, lam: float, images, labels, monkeypatch, place=()):
    """torchvision's transform with a given lambda and place."""
    transform._dist = type("Given", (), {"sample": staticmethod(lambda _: torch.tensor(lam, dtype=torch.float64))})
    places = iter(place)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([next(places)]))
    return transform(images, labels)


@pytest.mark.parametrize("lam", [0.0, 0.13, 0.5, 0.77, 1.0])
def test_mixup_and_cutmix_are_torchvision_s(lam, monkeypatch):
    images, labels, logits = images_of(5, 20, 28), torch.tensor([0, 1, 2, 3, 1]), torch.randn(5, CLASSES)
    partner = np.roll(np.arange(5), 1)
    for row, column in [(0, 0), (3, 27), (10, 14), (19, 1)]:
        for name, kind in (("mixup", v2.MixUp), ("cutmix", v2.CutMix)):
            transform = kind(num_classes=CLASSES)
            expected, targets = library_mix(transform, lam, images, labels, monkeypatch, (column, row))
            this = make(name).finish_draw(Fixed(row, column), np.full(5, lam), partner, images)
            mix = make(name).mix(images, this)
            torch.testing.assert_close(mix.images, expected)
            loss = mixed_loss(logits, labels, labels[this.partner], mix.lam, LossConfig())
            torch.testing.assert_close(loss, F.cross_entropy(logits, targets))


def test_lambda_has_its_distribution():
    made, images = make("mixup", alpha=2.0), images_of(2)
    lams = np.array([draw(made, images, step).lam[0] for step in range(4000)])
    assert lams.mean() == pytest.approx(0.5, abs=0.02) and lams.var() == pytest.approx(0.05, abs=0.005)


def test_smoothmix_is_a_gaussian_in_range():
    made, images = make("smoothmix"), images_of(2, 20, 28)
    for step in range(10):
        mask = made.mask(images, draw(made, images, step))[0].double()
        row, column = divmod(int(mask.argmax()), 28)
        near = 1 if column < 27 else -1
        sigma = math.sqrt(-0.5 / math.log(mask[row, column + near]))
        assert 5 <= sigma <= 10.001
        y, x = np.mgrid[0:20, 0:28]
        expected = np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * sigma**2))
        torch.testing.assert_close(mask, torch.from_numpy(expected), atol=1e-5, rtol=1e-5)


def test_resizemix_pastes_the_shrunk_partner():
    made, images = make("resizemix"), images_of(4, 24, 32)
    scales = []
    for step in range(30):
        this = draw(made, images, step)
        mix = made.mix(images, this)
        for i in range(4):
            top, bottom, left, right = this.extra["boxes"][i].tolist()
            expected = images[i].clone()
            if bottom > top and right > left:
                partner = images[this.partner[i]][None]
                small = F.interpolate(partner, size=(bottom - top, right - left), mode="nearest")[0]
                expected[:, top:bottom, left:right] = small
            assert torch.equal(mix.images[i], expected)
        scales.append(math.sqrt(1 - this.lam[0].item()))
    assert 0.1 <= min(scales) < 0.3 and 0.6 < max(scales) <= 0.8


def test_fmix_is_thresholded_noise_with_the_published_spectrum():
    made, images = make("fmix"), images_of(2, 24, 32)
    for step in range(10):
        this = draw(made, images, step)
        noise = this.extra["noise"][0].double().numpy()
        frequency = np.sqrt(np.fft.fftfreq(24)[:, None] ** 2 + np.fft.rfftfreq(32) ** 2)
        spectrum = (noise[..., 0] + 1j * noise[..., 1]) / np.maximum(frequency, 1 / 32) ** 3
        gray = np.fft.irfft2(spectrum, (24, 32)).ravel()
        area = this.extra["own_pixels"][0].item()
        assert area in (math.floor(this.lam[0].item() * 768), math.ceil(this.lam[0].item() * 768))
        own = np.zeros(768)
        own[gray.argsort()[::-1][:area]] = 1
        assert (made.mask(images, this)[0].numpy().ravel() != 1 - own).sum() <= 2  # float32 may swap neighbours in rank


def test_gridmixup_cuts_the_published_holes():
    """The published loops over cells; the crop, which they may place outside of the image, is within it here."""
    made, images = make("gridmixup", hole_aspect=[0.5, 1.5]), images_of(2, 28, 40)
    for step in range(30):
        this = draw(made, images, step)
        generator = step_rng(**EACH_BATCH, step=step)
        lam = generator.beta(0.2, 0.2)
        generator.permutation(2)
        holes, hole_aspect = generator.integers(2, 7), generator.uniform(0.5, 1.5)
        area, aspect = generator.uniform(0.5, 1), generator.uniform(0.5, 2)
        width = min(int(math.sqrt(int(28 * 40 * area) / aspect)), 40)
        height = min(int(width * aspect), 28)
        top, left = int((28 - height) * generator.random()), int((40 - width) * generator.random())
        cell_width = math.ceil(width / holes)
        cell_height = int(cell_width * hole_aspect)
        hole_width = min(max(int(cell_width * math.sqrt(1 - lam)), 1), cell_width - 1)
        hole_height = min(max(int(cell_height * math.sqrt(1 - lam)), 1), cell_height - 1)
        expected = torch.zeros(28, 40)
        for y in range(0, height, cell_height):
            for x in range(0, width, cell_width):
                bottom, right = min(y + hole_height, height), min(x + hole_width, width)
                expected[top + y : top + bottom, left + x : left + right] = 1
        assert torch.equal(made.mask(images, this)[0], expected)


def test_saliency_is_opencv_s():
    """Some values of OpenCV 4.10's map, at the last row and column too, of an image given by a formula. OpenCV rounds
    down at each stage."""
    rows, columns = [4, 12, 20, 28, 36, 44, 47], [4, 12, 20, 28, 36, 44, 52, 60, 63]
    opencv = [
        [189, 184, 8, 199, 220, 60, 110, 160, 149],
        [17, 94, 87, 42, 33, 10, 97, 100, 83],
        [98, 181, 122, 57, 230, 198, 17, 217, 242],
        [67, 148, 232, 115, 68, 156, 108, 5, 28],
        [85, 58, 20, 30, 98, 125, 55, 85, 126],
        [167, 15, 175, 197, 39, 174, 235, 76, 17],
        [227, 50, 152, 216, 91, 114, 213, 104, 55],
    ]
    y, x = np.mgrid[0:48, 0:64]
    channels = (
        127 + 100 * np.sin(x / 7 + y / 11),
        127 + 100 * np.cos(x / 9 - y / 5),
        255 * np.exp(-((x - 40) ** 2 + (y - 15) ** 2) / 60),
    )
    gray = torch.tensor(np.stack(channels, axis=2).round()) @ torch.tensor(saliencymix.LUMINANCE, dtype=torch.float64)
    got = saliencymix.saliency(gray[None])[0] * 255
    assert (got[rows][:, columns] - torch.tensor(opencv)).abs().max() <= 4


def test_saliencymix_boxes_lie_around_their_partners_peaks():
    made, images = make("saliencymix"), images_of(3, 40, 40)
    gray = (images * torch.tensor(saliencymix.LUMINANCE).view(3, 1, 1)).sum(dim=1)
    peaks = [divmod(int(each.argmax()), 40) for each in saliencymix.saliency(gray)]
    this = policy.Draw(torch.full((3,), 0.9), torch.tensor([1, 2, 0]), {})
    mask = made.mask(images, this)
    for i, partner in enumerate([1, 2, 0]):
        rows, columns = mask[i].nonzero().T
        y, x = peaks[partner]
        assert (rows.min(), rows.max()) == (max(y - 6, 0), min(y + 5, 39))
        assert (columns.min(), columns.max()) == (max(x - 6, 0), min(x + 5, 39))


def test_manifold_mixup_mixes_where_it_says():
    model = create_backbone(ModelConfig("test_resnet"), None, 32)
    classifier = Classifier(model, 4, make("manifoldmix", layers=["layer1"])).eval()
    images, net = images_of(5, 32, 32), model.model
    this = classifier.draw(images, seed=0, step=0)
    hidden = net.layer1(net.maxpool(net.act1(net.bn1(net.conv1(images)))))
    lam = this.lam[0]
    mixed = lam * hidden + (1 - lam) * hidden[this.partner]
    expected = classifier.query.head_one(net.layer4(net.layer3(net.layer2(mixed))).mean(dim=(2, 3)))
    logits, share = classifier.policy(classifier.query, images, this)
    torch.testing.assert_close(logits, expected)
    assert torch.equal(share, this.lam)
    assert not net.layer1._forward_hooks

    drawn = {draw(make("manifoldmix"), images, step).extra["layer"] for step in range(50)}
    assert drawn == {"", "layer1", "layer2"}


@pytest.mark.slow
def test_what_looks_inside_a_compiled_network_sees_every_step():
    """Hooks that come and go: torch.compile would keep to those of its first call."""
    inner = [{"name": "cutmix"}, {"name": "manifoldmix", "settings": {"layers": ["layer1", "", "layer2"]}}]
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Classifier(create_backbone(ModelConfig("test_resnet"), None, 32), 4, make("switch", policies=inner))
        if compiled:
            model.compile_regions("eager")
        images, labels = images_of(4, 32, 32), torch.arange(4)
        losses.append([model(images, labels, model.draw(images, seed=0, step=step)).total.item() for step in range(8)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.compiler.reset()


def test_transport_is_optimal_and_balanced():
    from scipy.optimize import linear_sum_assignment  # here, for the tests of this file run on GPUs without it

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 7, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    cost = (a[:, :, None] - b[:, None]).square().sum(dim=3)
    plan = alignmix.transport(a, b, 0.5, 2000)
    torch.testing.assert_close(plan.sum(dim=1), torch.full((3, 7), 1 / 7, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(dim=2), torch.full((3, 7), 1 / 7, dtype=torch.float64), atol=1e-6, rtol=0)
    kernel = torch.exp(-cost / 0.5)
    rows, columns = torch.ones(3, 7, 1, dtype=torch.float64), torch.ones(3, 1, 7, dtype=torch.float64)
    for _ in range(2000):  # Sinkhorn's algorithm without logarithms
        rows = 1 / 7 / (kernel * columns).sum(dim=2, keepdim=True)
        columns = 1 / 7 / (kernel * rows).sum(dim=1, keepdim=True)
    torch.testing.assert_close(plan, rows * kernel * columns)
    hard = alignmix.transport(a, b, 0.01, 5000)
    for i in range(3):
        best = cost[i][linear_sum_assignment(cost[i].numpy())].sum() / 7
        assert (hard[i] * cost[i]).sum() == pytest.approx(best.item(), rel=1e-2)


def test_alignmix_moves_one_map_onto_the_other():
    """Of a pair of maps with the same vectors in other places, each mix is a plain rearrangement."""
    torch.manual_seed(0)
    maps = torch.randn(1, 6, 3, 3) * 5
    order = torch.randperm(9)
    maps = torch.cat([maps, maps.flatten(2)[:, :, order].view(1, 6, 3, 3)])
    encoder = torch.nn.Module()
    encoder.backbone = torch.nn.Module()
    encoder.backbone.last_map, encoder.backbone.pool = lambda images: maps, lambda mixed: mixed.flatten(1)
    encoder.head_one = torch.nn.Identity()
    for partner_moves in (True, False):
        this = policy.Draw(torch.full((2,), 0.3), torch.tensor([1, 0]), {"align": True, "partner_moves": partner_moves})
        mixed, lam = make("alignmix")(encoder, torch.zeros(2, 3, 8, 8), this)
        expected = maps if partner_moves else maps[[1, 0]]
        torch.testing.assert_close(mixed.view_as(maps), expected, atol=1e-3, rtol=1e-3)
        assert torch.equal(lam, this.lam)
    encoder.backbone.last_map = lambda images: images  # or images are mixed as by mixup
    images, this = torch.randn(2, 3, 8, 8), this._replace(extra={"align": False, "partner_moves": False})
    mixed, lam = make("alignmix")(encoder, images, this)
    torch.testing.assert_close(mixed.view_as(images), 0.3 * images + 0.7 * images[[1, 0]])
    assert torch.equal(lam, this.lam)


@pytest.mark.parametrize("cells", [None, 3])
def test_attentivemix_pastes_the_cells_with_most_attention(teacher, cells):
    made = make("attentivemix", teacher="test_resnet", weights=teacher, teacher_size=96, cells=cells).train()
    assert not made.teacher.training
    images = images_of(4, 96, 96)
    this = draw(made, images)
    mask = made.mask(images, this)
    pixels = (images * 0.25 + 0.5 - made.teacher_mean) / made.teacher_std
    attention = made.teacher.model.forward_features(pixels).mean(dim=1)
    wanted = cells or max(1, int((1 - this.lam[0].item()) * 9))
    assert attention.shape[1:] == (3, 3)
    for i in range(4):
        top = attention[this.partner[i]].flatten().topk(wanted).indices
        expected = torch.zeros(9)
        expected[top] = 1
        assert torch.equal(mask[i], expected.view(3, 3).repeat_interleave(32, 0).repeat_interleave(32, 1))


def test_mistakes_in_a_teacher_s_settings_name_them():
    with pytest.raises(ConfigError, match=r"attentivemix: policy.settings.teacher = 'resnet500' is not a timm model"):
        make("attentivemix", teacher="resnet500")
    with pytest.raises(ConfigError, match=r"policy.settings.weights = 'nowhere.safetensors' cannot be read"):
        make("attentivemix", teacher="test_resnet", weights="nowhere.safetensors")


def test_a_teacher_without_weights_and_network_fails_at_once(tmp_path):
    """In a process without a cache that asks a port where nobody listens."""
    code = "from automix_dist.policies.attentivemix import *; Policy(Settings(teacher='test_resnet'))"
    nobody = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", code]
    error = subprocess.run(command, capture_output=True, text=True, env=os.environ | nobody).stderr
    assert re.search(r"attentivemix: policy.settings.weights: no weights for 'test_resnet' in timm's cache", error)
    assert "set policy.settings.weights to a file with a timm state dict" in error and "Retry" not in error


def test_transmix_weighs_labels_by_the_class_token_s_attention():
    torch.manual_seed(0)
    backbone = create_backbone(ModelConfig("test_vit"), None, 160)
    classifier = Classifier(backbone, 4, make("transmix")).eval()
    images = images_of(3, 160, 160)
    this = classifier.draw(images, seed=0, step=1)
    mix = classifier.policy.mix(images, this)
    logits, lam = classifier.policy(classifier.query, images, this)
    torch.testing.assert_close(logits, classifier.query(mix.images, "one"))

    layer, inputs = backbone.model.blocks[-1].attn, []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    backbone(mix.images)
    hook.remove()
    qkv = layer.qkv(inputs[0])
    query, key, _ = qkv.view(3, qkv.shape[1], 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    eye = torch.eye(qkv.shape[1]).expand(3, layer.num_heads, -1, -1)
    attention = F.scaled_dot_product_attention(query, key, eye, scale=layer.scale)[:, :, 0].mean(dim=1)
    torch.testing.assert_close(transmix.class_attention(layer, qkv), attention)
    pasted = F.interpolate(mix.mask[:, None], size=(10, 10), mode="nearest").flatten(1)
    for i in range(3):
        own = sum(a for a, p in zip(attention[i, 1:].tolist(), pasted[i].tolist(), strict=True) if p == 0)
        expected = 0.5 * (1 - mix.mask[i].mean()) + 0.5 * own / attention[i, 1:].sum()
        assert lam[i].item() == pytest.approx(expected.item(), abs=1e-5)


def test_switch_draws_by_share():
    made = make("switch", policies=[{"name": "mixup", "settings": {"alpha": 0.8}}, {"name": "cutmix"}], shares=[3, 1])
    chosen = [draw(made, images_of(2), step).extra["policy"] for step in range(2000)]
    assert np.mean(chosen) == pytest.approx(0.25, abs=0.03)


def test_no_policy_is_plain_training():
    config = tiny_config(policy={"name": "none"})
    torch.manual_seed(0)
    model = build_model(config, TinyBackbone(), CLASSES, torch.float32)
    images, labels = micro_batch(0, 0, 8)
    losses = model(images, labels, model.draw(images, seed=0, step=0))
    pixels = (images.permute(0, 3, 1, 2) / 255 - model.mean[:, None, None]) / model.std[:, None, None]
    logits = model.query(pixels, "one")
    torch.testing.assert_close(losses.total, F.cross_entropy(logits, labels))
    assert losses.mask_area == 0
    assert model(images, None, model.gallery_draw(images)) is None


@pytest.mark.parametrize("loss", [{}, {"label_smoothing": 0.1}, {"name": "binary_cross_entropy"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_policy_trains_as_a_mix_of_nothing(loss, dtype):
    """To the bit; one loss instead of two, and images that the first layer need not cast."""
    config = tiny_config(policy={"name": "none"}, loss=loss)
    torch.manual_seed(0)
    model = build_model(config, TinyBackbone(), CLASSES, dtype)
    images, labels = micro_batch(0, 0, 8)
    gradients, seen = [], []
    model.query.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].dtype))
    for mixes in (False, True):
        model.policy.mixes = mixes
        total = model(images, labels, model.draw(images, seed=0, step=0)).total
        gradients.append([total, *torch.autograd.grad(total, list(model.query.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert seen == [dtype, torch.float32]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_of_mixed_labels(smoothing):
    config = LossConfig("binary_cross_entropy", smoothing)
    logits, labels, lam = torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 3, 1, 0]), torch.rand(6).double()
    targets = lam[:, None] * F.one_hot(labels, 4) + (1 - lam[:, None]) * F.one_hot(labels.roll(1), 4)
    targets = targets * (1 - smoothing) + smoothing / 4
    p = logits.sigmoid()
    expected = -(targets * p.log() + (1 - targets) * (1 - p).log()).sum(dim=1).mean()
    torch.testing.assert_close(mixed_loss(logits, labels, labels.roll(1), lam, config), expected)
    torch.testing.assert_close(class_loss(logits, labels, config), class_loss(logits, labels, config, "none").mean())


@pytest.mark.parametrize("name", sorted(set(POLICIES) - LEARNED))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_policy_trains_a_classifier(name, dtype, teacher):
    own = {"attentivemix": {"teacher": "test_resnet", "weights": teacher, "teacher_size": 64}}.get(name, {})
    backbone, size = ("test_vit", 160) if name == "transmix" else ("test_resnet", 32)
    config = tiny_config(
        model={"backbone": backbone},
        policy={"name": name, "settings": own, "ema_decay": 0.9},
        data={"image_size": size},
    )
    torch.manual_seed(0)
    model = build_model(config, create_backbone(config.model, None, size), CLASSES, dtype).train()
    images = torch.randint(0, 256, (4, size, size, 3), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 3])
    for step in range(3):
        losses = model(images, labels, model.draw(images, seed=0, step=step))
        losses.total.backward()
        assert torch.isfinite(losses.total) and 0 <= losses.mask_area <= 1
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.isfinite().all()}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith("query.")}
    mixes = model.eval()(images, None, model.gallery_draw(images))
    if name not in ("none", "manifoldmix", "alignmix"):
        assert mixes.mask.shape == (4, size, size) and mixes.images.shape == (4, 3, size, size)
        assert mixes.lam.shape == mixes.partner.shape == (4,)
    with torch.no_grad():
        assert [tuple(each.shape) for each in model(images)] == [(4, CLASSES)] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"automix", "attentivemix"}))
def test_no_policy_waits_for_the_gpu(name):
    own = {"samix": {"lam_concat": False}}.get(name, {})
    backbone, size = ("test_vit", 160) if name == "transmix" else ("test_resnet", 64)
    config = tiny_config(model={"backbone": backbone}, policy={"name": name}, automix=own, data={"image_size": size})
    network = create_backbone(config.model, policy.needed_feature(config), size)
    model = build_model(config, network, CLASSES, torch.bfloat16).cuda().train()
    images = torch.randint(0, 256, (4, size, size, 3), dtype=torch.uint8, device="cuda")
    labels = torch.arange(4, device="cuda")
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")  # the first two compile and allocate
        try:
            model(images, labels, model.draw(images, seed=0, step=step), 0.1).total.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_an_average_follows_weights_and_statistics_in_float64():
    config = tiny_config(policy={"name": "mixup", "ema_decay": 0.9})
    model = build_model(config, TinyBackbone(), CLASSES, torch.float32)
    for encoder in (model.query, model.momentum):
        encoder.register_buffer("constant", torch.tensor([0.0, -torch.inf]), persistent=False)
    update, statistics = MomentumUpdate(model), RunningStatistics(model)

    def moving(encoder):
        return {n: t for n, t in encoder.state_dict(keep_vars=True).items() if t.is_floating_point()}

    expected = {n: t.detach().double().clone() for n, t in moving(model.momentum).items()}
    assert sum("running" in name for name in expected) == 4
    for step in range(6):
        statistics.keep()
        images, labels = micro_batch(step, 0, 8)
        model(images, labels, model.draw(images, seed=0, step=step))
        skipped = torch.tensor(float(step == 3))
        if skipped:
            statistics.restore(skipped)
        else:
            with torch.no_grad():
                for p in model.query.parameters():
                    p.add_(torch.randn_like(p))
            for n, t in moving(model.query).items():
                expected[n] = 0.9 * expected[n] + 0.1 * t.detach().double()
        update(0.9, skipped)
    for n, t in moving(model.momentum).items():
        torch.testing.assert_close(t.double(), expected[n], atol=1e-5, rtol=1e-5)
    for (name, ours), theirs in zip(model.momentum.named_buffers(), model.query.buffers(), strict=True):
        assert name in expected or torch.equal(ours, theirs)


def scatter(module: torch.nn.Module, std: float = 0.4) -> None:
    """Weights far from their tiny beginnings, so that a mistake shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)


@pytest.mark.parametrize("k", [None, 0.25, 1.0])
def test_samix_block_is_the_published_attention(k):
    """Its order of operations: scaled features, joined along the channels, one convolution each."""
    torch.manual_seed(0)
    block = samix.SAMixBlock(10, AutoMixConfig(lam_concat=False), samix.Settings(lam_curve=k)).train()
    scatter(block)
    features, draws = (
        torch.randn(6, 10, 4, 5),
        [MixDraw(torch.rand(6), torch.randperm(6), "bilinear") for _ in range(2)],
    )
    both = Draws.of(*draws)
    logits = block(features, both.partner, both.lam)
    assert logits[0].requires_grad and not logits[1].requires_grad
    assert block.hidden_norm.num_batches_tracked == 2
    block.double()
    for got, each in zip(logits, draws, strict=True):
        lam = each.lam.double()
        if k is not None:
            lam = (4 / 3 * lam**3 - 2 * lam**2 + (k + 1) * lam) / (k + 1 - 2 / 3)
        lam = lam[:, None, None, None]
        own = features.double() * (1 + lam)
        partner = features.double()[each.partner] * (1 + (1 - lam))

        def project(x, weight, bias=None):
            return F.conv2d(x, weight[:, :, None, None], bias)

        both = torch.cat([own, partner], dim=1)
        query, key = (
            project(both, block.query_weight, block.query_bias),
            project(both, block.key_weight, block.key_bias),
        )
        hidden = F.batch_norm(project(partner, block.hidden_weight), None, None, *block.hidden_norm.parameters(), True)
        value = project(F.elu(hidden), block.value_weight)
        scores = torch.einsum("bdij,bdkl->bijkl", query, key) / block.width**0.5
        attention = scores.flatten(3).softmax(dim=-1).view(scores.shape)
        expected = torch.einsum("bijkl,bckl->bij", attention, value)
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [None, 0.25, 1.0])
def test_samix_curve_keeps_ends_and_middle(k):
    lam = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(samix.lam_curve(lam, k), lam)


def multi_draw(samples: int, size: int) -> adautomix.MultiDraw:
    lam = torch.rand(samples, 1).expand(samples, size)
    return adautomix.MultiDraw(
        lam / lam.sum(dim=0), torch.stack([torch.randperm(size) for _ in range(samples)]), "nearest"
    )


@pytest.mark.parametrize("samples", [2, 3])
@pytest.mark.parametrize("norm, lam_concat", [("none", False), ("none", True), ("batch", True)])
def test_adaptive_mask_is_the_published_attention(samples, norm, lam_concat):
    torch.manual_seed(0)
    block = adautomix.AdaptiveMask(10, AutoMixConfig(norm=norm, lam_concat=lam_concat)).train()
    scatter(block)
    features, this = torch.randn(6, 10, 4, 5), multi_draw(samples, 6)
    got = block(features, this)
    block.double()
    queries, keys, values = [], [], []
    for lam, members in zip(this.lam.double(), this.members, strict=True):
        x = features.double()[members]
        if lam_concat:
            x = torch.cat([x, lam[:, None, None, None].expand(6, 1, 4, 5)], dim=1)
        norms = (block.query_norm, block.key_norm) if norm == "batch" else (lambda y: y, lambda y: y)
        queries.append(F.relu(norms[0](F.conv2d(x, block.query_weight[:, :, None, None], block.query_bias))))
        keys.append(F.relu(norms[1](F.conv2d(x, block.key_weight[:, :, None, None], block.key_bias))))
        values.append(F.conv2d(x, block.value_weight[:, :, None, None], block.value_bias))
    for i in range(samples):
        others = sum(keys[j] for j in range(samples) if j != i)
        scores = torch.einsum("bdij,bdkl->bijkl", queries[i], others) / block.width**0.5
        attention = scores.flatten(3).softmax(dim=-1).view(scores.shape)
        expected = torch.einsum("bijkl,bckl->bij", attention, values[i])
        torch.testing.assert_close(got[:, i].double(), expected, atol=1e-5, rtol=1e-5)


def ad_model(**own) -> tuple[adautomix.Model, tuple]:
    config = tiny_config(policy={"name": "adautomix", "settings": own}, automix={"lam_margin": 0.03, "alpha": 1.0})
    torch.manual_seed(0)
    model = build_model(config, TinyBackbone(), CLASSES, torch.float32).train()
    scatter(model.mix_block)
    return model, micro_batch(0, 0, 8)


@pytest.mark.parametrize("samples, step", [(2, 0), (2, 1), (3, 0), (3, 1)])
def test_adautomix_step_is_the_published_one(samples, step):
    """Its losses and the Mix Block's gradient, restated with every forward pass that the published code makes."""
    model, (images, labels) = ad_model(samples=samples, adversarial=0.3)
    draws = model.draw(images, seed=0, step=step)
    assert draws.adversarial == (step % 2 == 0) and draws.mix_block.lam.shape == (samples, 8)
    torch.testing.assert_close(draws.mix_block.lam.sum(dim=0), torch.ones(8))
    losses = model(images, labels, draws)
    losses.total.backward()

    again, _ = ad_model(samples=samples, adversarial=0.3)
    x = (images.permute(0, 3, 1, 2) / 255 - again.mean[:, None, None]) / again.std[:, None, None]
    features = again.momentum.backbone.features(x)

    def mix(draw, masks):
        return sum(masks[:, i : i + 1] * x[members] for i, members in enumerate(draw.members))

    def loss(logits, draw):
        each = [F.cross_entropy(logits, labels[members]) for members in draw.members]
        return sum(lam[0] * value for lam, value in zip(draw.lam, each, strict=True))

    def masks(draw):
        return F.interpolate(again.mix_block(features, draw), scale_factor=4, mode="nearest").softmax(dim=1)

    one, two = draws.mix_block, draws.classifier
    judged = again.momentum(mix(one, masks(one)), "mix")
    generator = loss(judged, one)
    cosine = sum(
        lam[0] * F.cosine_similarity(judged, again.momentum(x[members], "mix")).mean()
        for lam, members in zip(one.lam, one.members, strict=True)
    )
    clean = F.cross_entropy(again.query(x, "one"), labels)
    if samples == 3:
        linear = mix(two, two.lam.T[:, :, None, None])
        clean = 0.5 * clean + 0.5 * loss(again.query(linear, "mix"), two)
    mixed = loss(again.query(mix(two, masks(two).detach()), "mix"), two)
    for got, expected in (
        (losses.generator, generator),
        (losses.cosine, cosine),
        (losses.clean, clean),
        (losses.mixed, mixed),
        (losses.mask_area, 1 - masks(one)[:, 0].mean()),
    ):
        torch.testing.assert_close(got, expected.detach(), atol=1e-5, rtol=1e-5)
    objective = -0.3 * generator + 0.7 * cosine if step == 0 else generator
    torch.testing.assert_close(losses.total, objective + clean + mixed, atol=1e-5, rtol=1e-5)
    for p, expected in zip(
        model.mix_block.parameters(), torch.autograd.grad(objective, list(again.mix_block.parameters())), strict=True
    ):
        torch.testing.assert_close(p.grad, expected, atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for p in model.momentum.parameters())


def test_adautomix_without_its_branch_trains_the_classifier_alone():
    model, (images, labels) = ad_model()
    losses = model(images, labels, model.draw(images, seed=0, step=0, train_generator=False))
    losses.total.backward()
    assert losses.generator == losses.cosine == 0
    torch.testing.assert_close(losses.total, losses.clean + losses.mixed)
    assert not any(p.grad.any() for p in model.mix_block.parameters())


def test_adautomix_classifier_sees_plain_mixes_at_the_margin_or_as_published():
    model, (images, _) = ad_model(samples=3)
    x, this = torch.randn(8, 3, SIZE, SIZE), multi_draw(3, 8)
    features = torch.randn(8, 12, 4, 4)
    plain = this.lam.T[:, :, None, None].expand(8, 3, SIZE, SIZE)
    assert not torch.allclose(model._classifier_masks(features, this, x), plain)
    for first in (0.02, 0.98):
        lam = torch.tensor([first, (1 - first) / 2, (1 - first) / 2])[:, None].expand(3, 8)
        expected = lam.T[:, :, None, None].expand(8, 3, SIZE, SIZE)
        assert torch.allclose(model._classifier_masks(features, this._replace(lam=lam), x), expected)
    model.settings = adautomix.Settings(margin_as_published=True)
    assert torch.allclose(model._classifier_masks(features, this, x), plain)
    model.settings = adautomix.Settings(samples=3, random_samples=True)
    assert {len(model.draw(images, seed=0, step=step).mix_block.lam) for step in range(20)} == {2, 3}


def test_adautomix_mixes_different_images_with_no_repeat():
    config = tiny_config(policy={"name": "adautomix", "settings": {"samples": 4}}, automix={"no_repeat": True})
    model, images = build_model(config, TinyBackbone(), CLASSES, torch.float32), torch.zeros(5, SIZE, SIZE, 3)
    seen = set()
    for step in range(40):
        for this in model.draw(images, seed=0, step=step)[:2]:
            assert all(len(set(mix)) == 4 for mix in this.members.T.tolist())
            assert all(sorted(each) == list(range(5)) for each in this.members.tolist())
            seen |= {tuple(mix) for mix in this.members.T.tolist()}
    assert len(seen) > 100  # of 120
    small = model.draw(images[:3], seed=0, step=0).mix_block.members  # three images cannot make mixes of four
    assert all(sorted(each) == [0, 1, 2] for each in small.tolist())


LEARNED_SETTINGS = {
    "samix": ({"lam_curve": 0.25, "value_dropout": 0.1}, {"lam_concat": False, "mask_loss": "l1_variance"}),
    "adautomix": ({}, {}),
}


@pytest.mark.parametrize("name", LEARNED_SETTINGS)
@pytest.mark.parametrize("immediate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learned_policies_train_all_that_should_learn(name, immediate, dtype):
    own, automix = LEARNED_SETTINGS[name]
    config = tiny_config(
        policy={"name": name, "settings": own}, automix=automix, engine={"immediate_backward": immediate}
    )
    torch.manual_seed(0)
    model = build_model(config, TinyBackbone(), CLASSES, dtype).train()
    images, labels = micro_batch(0, 0, 8)
    draws = model.draw(images, seed=0, step=0)
    losses = model(images, labels, draws, 0.1)
    losses.total.backward()
    assert all(torch.isfinite(each) for each in losses)
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.isfinite().all()}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith(("query.", "mix_block."))}
    model(images, labels, model.draw(images, seed=0, step=1, train_generator=False), 0.0).total.backward()
    mixes = model.eval()(images, None, model.gallery_draw(images))
    assert mixes.mask.shape == (8, SIZE, SIZE) and mixes.images.shape == (8, 3, SIZE, SIZE)
    with torch.no_grad():
        assert [tuple(each.shape) for each in model(images)] == [(8, CLASSES)] * 4


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("adautomix", {"samples": 1, "adversarial": 1.1, "interval": 0, "linear_share": -0.1}),
        ("alignmix", {"alpha": 0, "epsilon": 0, "iterations": 0}),
        ("attentivemix", {"teacher_size": 0, "cells": 0}),
        ("fmix", {"decay": -1}),
        ("gridmixup", {"holes": [0, 3], "crop_aspect": [2.0, 1.0], "crop_area": [0.5, 1.1]}),
        ("manifoldmix", {"layers": []}),
        ("puzzlemix", {"blocks": [1], "levels": 1, "beta": -1, "gamma": 1.1, "eta": -1, "move_cost": 0,
                       "move_pixels": 0}),
        ("resizemix", {"scale": [0.1, 1.1]}),
        ("samix", {"lam_curve": -1, "value_dropout": 1.0}),
        ("smoothmix", {"sigma": [0.0, 0.1]}),
        ("switch", {"policies": [], "shares": [1.0]}),
    ],
)  # fmt: skip
def test_settings_of_a_policy_that_cannot_be_used_are_named(name, wrong):
    for key, value in wrong.items():
        with pytest.raises(ConfigError, match=rf"policy\.settings\.{key} = .*: expected"):
            policy.load(PolicyConfig(name, {key: value}))


def test_learned_policies_refuse_settings_that_mean_nothing_to_them():
    with pytest.raises(ConfigError, match=r"automix.lam_concat = True: policy samix needs False"):
        build_model(tiny_config(policy={"name": "samix"}), TinyBackbone(), CLASSES, torch.float32)
    for key, value in (("feature_source", "query"), ("generator_share", 0.5), ("generator_every", 2)):
        with pytest.raises(ConfigError, match=rf"automix\.{key} = .* no meaning for policy adautomix: set it to"):
            build_model(
                tiny_config(policy={"name": "adautomix"}, automix={key: value}), TinyBackbone(), CLASSES, torch.float32
            )


@pytest.mark.parametrize("clipped", [False, True])
def test_lamb_is_timm_s(clipped):
    from timm.optim import Lamb as Theirs

    torch.manual_seed(0)
    tensors = [torch.randn(4, 3), torch.zeros(5, 2), torch.randn(7)]
    sides = [[t.clone().requires_grad_() for t in tensors] for _ in range(2)]
    groups = [[{"params": s[:2], "weight_decay": 0.02}, {"params": s[2:], "weight_decay": 0.0}] for s in sides]
    ours = Lamb(groups[0], lr=0.01)
    theirs = Theirs(groups[1], lr=0.01, max_grad_norm=1.0 if clipped else None)
    for _ in range(5):
        gradients = [torch.randn_like(t) for t in tensors]
        for side in sides:
            for p, g in zip(side, gradients, strict=True):
                p.grad = g.clone()
        norm = torch.stack([g.norm() for g in gradients]).norm()
        ours.grad_scale = norm.clamp(min=1) if clipped else None
        ours.step()
        theirs.step()
    for mine, other in zip(*sides, strict=True):
        torch.testing.assert_close(mine, other)

    kept = [p.detach().clone() for p in sides[0]] + [v.clone() for p in sides[0] for v in ours.state[p].values()]
    sides[0][0].grad[0, 0] = math.nan
    ours.found_inf = torch.tensor(1.0)
    ours.step()
    after = [p.detach() for p in sides[0]] + [v for p in sides[0] for v in ours.state[p].values()]
    assert all(torch.equal(a, b) for a, b in zip(kept, after, strict=True))


def test_lamb_needs_whole_tensors():
    with pytest.raises(ConfigError, match=r"lamb.*zero_stage=0"):
        load_config(None, ["optimizer.name=lamb", "engine.zero_stage=2"])


def classifier_steps(config, folder: Path | None, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """Three steps, with an engine on each of several ranks, or (no folder) of all ranks in one process."""
    torch.manual_seed(0)
    model = build_model(config, TinyBackbone("group"), CLASSES, torch.float32).train()
    optimizer, engine = build_optimizer(model, config.optimizer), None
    if folder:
        process = distributed.start(config.engine)
        engine = build_engine(model, optimizer, config, process)
    update = MomentumUpdate(model)
    for step in range(3):
        optimizer.zero_grad()
        for each in [rank] if engine else range(ranks):
            where = {"seed": 0, "step": step, "rank": each}
            seed_torch(**where)
            images, labels = micro_batch(step, each, 8)
            loss = (engine or model)(images, labels, model.draw(images, **where)).total
            if engine:
                engine.backward(loss)
                engine.step()
            else:
                (loss / ranks).backward()
        if not engine:
            optimizer.step()
        update(0.9)
    if not engine:
        return {n: p.detach() for n, p in model.named_parameters()}
    checkpoints = Checkpoints(folder, config.checkpoint, process, print)
    checkpoints.save(engine, {"step": 1}, {})
    assert checkpoints.wait()
    return load_module_state(verify(folder / "checkpoints" / "step_00000001"), "")


def classifier_on_rank(config, folder: Path) -> dict[str, torch.Tensor]:
    return classifier_steps(config, folder, int(os.environ["RANK"]), 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine, optimizer, name",
    [
        ({"name": "ddp"}, "lamb", "cutmix"),
        ({"zero_stage": 3}, "sgd", "puzzlemix"),
        ({"name": "fsdp2"}, "sgd", "puzzlemix"),
    ],
)
def test_classifiers_train_alike_under_engines(engine, optimizer, name, tmp_path):
    own = {"name": optimizer, "lr": 0.1, **({"mix_momentum": None} if optimizer == "lamb" else {})}
    config = tiny_config(policy={"name": name, "ema_decay": 0.9}, engine=engine, optimizer=own)
    expected = classifier_steps(config, None, 0, 2)
    got = run_ranks(2, classifier_on_rank, config, tmp_path)[0]
    for name, tensor in expected.items():
        assert torch.allclose(got[name], tensor, atol=2e-5, rtol=1e-4), name


def sharded_steps(configs: list) -> int:
    rank, steps = int(os.environ["RANK"]), 0
    process = distributed.start(configs[0].engine)
    for config in configs:
        torch.manual_seed(0)
        network = create_backbone(config.model, policy.needed_feature(config), 64)
        model = build_model(config, network, CLASSES, torch.float32).train()
        engine = build_engine(model, build_optimizer(model, config.optimizer), config, process)
        for step in range(6):
            images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
            draw = model.draw(images, seed=0, step=step, rank=rank)
            engine.backward(engine(images, torch.tensor([0, 1]), draw, 0.1).total)
            engine.step()
            steps += 1
    return steps


@pytest.mark.slow
def test_ranks_with_sharded_weights_run_the_same_modules():
    """Or they would wait for each other: what decides which modules run is drawn alike."""
    shared = {
        "batch_size": 4,
        "model": {"backbone": "test_resnet"},
        "automix": {"switch_off": 0.5},
        "engine": {"zero_stage": 3, "timeout_minutes": 1},
    }
    names = ({"name": "alignmix"}, {"name": "switch"}, {"name": "adautomix", "settings": {"random_samples": True}})
    configs = [tiny_config(**shared, policy=each) for each in names]
    assert run_ranks(2, sharded_steps, configs, timeout=200) == [18, 18]


def test_ranks_agree_on_switching_off():
    config = AutoMixConfig(switch_off=0.5)
    judged = [[draw_step(config, 4, seed=0, step=s, rank=r).train_generator for s in range(50)] for r in range(2)]
    assert judged[0] == judged[1] and 10 < sum(judged[0]) < 40


@pytest.mark.slow
def test_a_hand_made_policy_from_the_command_line(settings, tmp_path, capsys):
    extra = ("policy.name=switch", "policy.ema_decay=0.9", "epochs=2", "checkpoint.every_epochs=1")
    through, broken = tmp_path / "through", tmp_path / "broken"
    run("train", settings, f"output={through}", *extra)
    shutil.copytree(through, broken)
    shutil.rmtree(newest(broken).folder)
    resumed = run("train", settings, f"output={broken}", *extra, "--resume")
    assert "step 15" in resumed.stderr and shards(broken) == shards(through)
    values = json.loads(run("eval", through).stdout)
    assert {"top1_query", "top5_query", "top1_momentum", "loss_query"} <= values.keys()
    assert "top1_query_mix" not in values and len(list((through / "gallery").glob("*.npz"))) == 1
    out = tmp_path / "model.safetensors"
    with pytest.raises(SystemExit, match="0"):
        main(["export", str(through), str(out), "--encoder", "momentum"])
    assert "timm.create_model" in capsys.readouterr().out and out.exists()
    assert "no query encoder with head_mix" in failing(capsys, "export", through, out, "--head", "mix")


EXAMPLES = {
    "add_automix_to_a_loop.py": ("2",),
    "timm_style_train.py": ("test_resnet", "--policy", "samix", "--epochs", "2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_learn(name):
    command = [sys.executable, f"docs/examples/{name}", *EXAMPLES[name]]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=300)
    assert result.returncode == 0, result.stderr
    last = float(re.findall(r"(?:top-1|Acc@1) ([\d.]+)", result.stdout)[-1])
    assert last > 75, result.stdout


def test_settings_are_written_out():
    config = load_config(None, ["policy.name=gridmixup", "policy.settings.alpha=0.5"])
    full = policy.with_policy_settings(config).policy
    assert full.settings["alpha"] == 0.5 and full.settings["holes"] == (2, 6)
    assert policy.with_policy_settings(dataclasses.replace(config, policy=full)).policy == full


def test_samix_drops_values_in_training_only():
    torch.manual_seed(0)
    block = samix.SAMixBlock(8, AutoMixConfig(lam_concat=False), samix.Settings(value_dropout=0.5))
    features, partner, lam = torch.randn(4, 8, 4, 4), torch.tensor([[1, 2, 3, 0]]), torch.full((1, 4), 0.3)
    one, other = (block(features, partner, lam)[0] for _ in range(2))
    assert not torch.equal(one, other)
    block.eval()
    one, other = (block(features, partner, lam)[0] for _ in range(2))
    assert torch.equal(one, other)
