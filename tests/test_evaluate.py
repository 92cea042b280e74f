"""Evaluation in detail: against scikit-learn, torchmetrics, timm, plain loops, and itself on two ranks."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import run_ranks
from sklearn.metrics import confusion_matrix, precision_score, recall_score
from timm.utils import accuracy as timm_accuracy
from tiny import CLASSES, SIZE, tiny_config, tiny_model
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from automix_dist import distributed, robustness
from automix_dist.config import ConfigError, EngineConfig
from automix_dist.data import Batch
from automix_dist.evaluate import BINS, Conditions, Counts, evaluate_model, fraction, summary
from automix_dist.evaluation_page import write_evaluation
from automix_dist.validate import validate

IMAGES = 41
COLOR = (0.5, 0.5, 0.5)


class Loader:
    """One rank's share of images in memory, with what EvalLoader has."""

    def __init__(self, rank: int = 0, world_size: int = 1, count: int = IMAGES):
        rng = np.random.default_rng(0)
        images = torch.from_numpy(rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8))
        labels = torch.from_numpy(rng.integers(0, CLASSES - 1, count))  # the last class has no image
        own = torch.arange(rank, count, world_size)
        self.batches = [Batch(images[i], labels[i], i) for i in own.split(8)] if len(own) else []
        self.images, self.labels = images, labels
        self.num_classes, self.num_samples = CLASSES, count
        self.num_batches = -(-count // (8 * world_size))
        self.manifest = SimpleNamespace(classes=[f"<class {i}>" for i in range(CLASSES)])

    def __iter__(self):
        yield from self.batches

    def blank(self):
        return torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8)


class Alone:
    rank, world_size, device = 0, 1, torch.device("cpu")

    def sum(self, tensor):
        return tensor


@pytest.fixture
def model():
    model = tiny_model(tiny_config())
    torch.manual_seed(0)
    for parameter in model.parameters():  # logits far apart, and encoders that differ
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def test_counts_are_what_others_count():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(300, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 7, (300,), generator=generator)
    counts = Counts(7, confusion=True, device=torch.device("cpu"))
    for part in range(0, 300, 64):
        counts.add(logits[part : part + 64], labels[part : part + 64])
    guess = logits.argmax(dim=1)
    assert np.array_equal(counts.confusion, confusion_matrix(labels, guess))
    seen, right, guessed = counts.classes.T
    assert np.allclose(right / seen, recall_score(labels, guess, average=None))
    assert np.allclose(right / guessed, precision_score(labels, guess, average=None))
    as_timm_validates = timm_accuracy(logits, labels, topk=(1, 5))  # in percent
    assert counts.right.tolist() == pytest.approx([float(each) * 3 for each in as_timm_validates])
    of_torchmetrics = multiclass_calibration_error(logits.softmax(dim=1), labels, num_classes=7, n_bins=BINS)
    assert counts.calibration_error() == pytest.approx(float(of_torchmetrics), abs=1e-6)
    for part, among in enumerate((1, 5)):
        right = multiclass_accuracy(logits, labels, num_classes=7, top_k=among, average="micro")
        assert counts.right[part] == pytest.approx(float(right) * 300)
    assert counts.loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item() * 300)


def test_agrees_with_the_evaluation_of_training_and_leaves_the_model_alone(model):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [p.requires_grad for p in model.parameters()]
    values, result = validate(model, Loader(), Alone()), evaluate_model(model, Loader(), Alone(), Conditions(), COLOR)
    for key, value in values.items():
        assert result[key] == pytest.approx(value, abs=1e-6)
    assert model.training and grads == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_an_evaluation_keeps_no_graph(model):
    """It would hold a batch's activations."""
    modes = []
    hook = model.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    evaluate_model(model, Loader(), Alone(), Conditions(), COLOR)
    hook.remove()
    assert modes and not any(modes)


def test_ensemble_and_flip_by_a_plain_loop(model):
    loader = Loader()
    model.eval()
    with torch.no_grad():
        plain = model(loader.images)
        mirrored = model(loader.images.flip(2))
    probabilities = sum(each.double().softmax(dim=1) for each in (*plain[::2], *mirrored[::2])) / 4
    result = evaluate_model(model, loader, Alone(), Conditions(answer="ensemble", flip=True), COLOR)
    assert result["top1_ensemble"] == (probabilities.argmax(dim=1) == loader.labels).double().mean().item()
    loss = -probabilities[torch.arange(IMAGES), loader.labels].log().mean().item()
    assert result["loss_ensemble"] == pytest.approx(loss, rel=1e-5)
    assert sum(map(sum, result["confusion"])) == IMAGES


def test_a_confident_float16_model_is_attacked_too(model):
    """float16's gradients of its loss are all zero; the attack's are float32's."""
    model.query.head_one.weight.data.mul_(300)
    hit = {}
    for dtype in (torch.float32, torch.float16):
        model.autocast = dtype
        asked = Conditions(answer="query", attack="fgsm", epsilon=0.1)
        hit[dtype] = evaluate_model(model, Loader(), Alone(), asked, COLOR)["conditions"]["fgsm"]["top1_query"]
        assert model.autocast == dtype
    assert hit[torch.float16] == pytest.approx(hit[torch.float32], abs=0.1)


def test_a_diverged_model_has_no_numbers_that_json_has_not(model):
    model.query.head_one.weight.data.fill_(torch.nan)
    result = evaluate_model(model, Loader(), Alone(), Conditions(), COLOR)
    assert result["loss_query"] is None and result["ece_query"] is None
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("wrong", [{"attack": "PGD"}, {"attack": "clean"}, {"occlusion": (0.25, 0.25000001)}])
def test_conditions_that_cannot_be(wrong):
    with pytest.raises(ConfigError):
        Conditions(**wrong)


def test_attacks_lower_the_attacked_answer(model):
    clean = evaluate_model(model, Loader(), Alone(), Conditions(answer="momentum"), COLOR)
    hit = {}
    for name in ("fgsm", "pgd"):
        asked = Conditions(answer="momentum", attack=name, epsilon=0.1)
        hit[name] = evaluate_model(model, Loader(), Alone(), asked, COLOR)["conditions"][name]["top1_momentum"]
    assert hit["pgd"] <= hit["fgsm"] < clean["top1_momentum"]


def test_fgsm_by_a_plain_loop(model):
    """Pixels move on the [0, 1] scale, and are normalised before and after."""
    loader, (mean, std) = Loader(), (each[:, None, None] for each in (model.mean, model.std))
    pixels = (loader.images.permute(0, 3, 1, 2) / 255).requires_grad_()
    model.eval()
    answer = model((pixels - mean) / std).momentum
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(answer, loader.labels), pixels)
    moved = (pixels + 0.02 * gradient.sign()).clamp(0, 1)
    right = (model((moved - mean) / std).momentum.argmax(dim=1) == loader.labels).sum().item()
    asked = Conditions(answer="momentum", attack="fgsm", epsilon=0.02)
    result = evaluate_model(model, loader, Alone(), asked, COLOR)["conditions"]["fgsm"]
    assert result["top1_momentum"] * IMAGES == pytest.approx(right, abs=1.01)  # a sign may hang on a rounding


def on_ranks(count: int) -> dict:
    process = distributed.start(EngineConfig(device="cpu"))
    torch.manual_seed(3)
    model = tiny_model(tiny_config())
    asked = Conditions(attack="pgd", corruptions=("shot_noise",), occlusion=(0.5,))
    result = evaluate_model(model, Loader(process.rank, process.world_size, count), process, asked, COLOR)
    distributed.finish()
    return result


@pytest.mark.slow
@pytest.mark.parametrize("count", [IMAGES, 1])  # with 1, a rank has no image
def test_two_ranks_count_what_one_counts(count):
    (one,) = run_ranks(1, on_ranks, count)
    first, second = run_ranks(2, on_ranks, count)
    assert first == second
    for key, value in one.items():
        assert first[key] == (pytest.approx(value, abs=1e-9) if isinstance(value, float) else first[key])
    for key in ("conditions", "classes", "confusion"):
        assert first[key] == one[key]


def test_what_cannot_be_evaluated_is_said(model):
    for options, word in (
        ({"corruptions": ("fog",)}, "gaussian_noise"),
        ({"epsilon": 0.0}, "8/255"),
        ({"seed": -1}, "--seed -1"),
        ({"occlusion": (1.5,)}, "above 0 and below 1"),
        ({"occlusion": (0.0,)}, "above 0 and below 1"),
    ):
        with pytest.raises(ConfigError, match=word):
            Conditions(**options)
    with pytest.raises(ConfigError, match="no answer teacher: expected one of query, query_mix"):
        evaluate_model(model, Loader(), Alone(), Conditions(answer="teacher"), COLOR)
    assert fraction("8/255") == 8 / 255 and fraction("0.03") == 0.03
    for text in ("1/0", "much", "1e400"):
        with pytest.raises(ValueError):
            fraction(text)


def test_the_page_has_every_class_and_no_foreign_html(model, tmp_path):
    asked = Conditions(corruptions=("contrast", "pixelate"), occlusion=(0.25,))
    result = evaluate_model(model, Loader(), Alone(), asked, COLOR)
    assert list(result["conditions"]) == [*asked.names()[1:], "corruptions_mean"]
    mean = np.mean([result["conditions"][name]["top1_query"] for name in asked.names()[1:11]])
    assert result["conditions"]["corruptions_mean"]["top1_query"] == pytest.approx(mean)
    page = write_evaluation(result, tmp_path / "out", "a <run>").read_text()
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == result
    assert "a &lt;run&gt;" in page and "&lt;class 3&gt;" in page and "<class" not in page and "<script" not in page
    assert len(re.findall("<rect", page)) == sum(each["images"] > 0 for each in result["calibration"])
    assert "classes" not in summary(result)


def test_pgd_by_a_plain_loop(model, monkeypatch):
    """Ten steps of 2.5 epsilon / 10 from a random start, within epsilon and [0, 1]."""
    epsilon = 0.02
    loader, (mean, std) = Loader(), (each[:, None, None] for each in (model.mean, model.std))
    pixels = loader.images.permute(0, 3, 1, 2) / 255
    model.eval()
    moved = pixels + robustness.random_start(pixels, torch.arange(IMAGES), 0, epsilon)
    for _ in range(10):
        moved = moved.clamp(pixels - epsilon, pixels + epsilon).clamp(0, 1).detach().requires_grad_()
        loss = F.cross_entropy(model((moved - mean) / std).query, loader.labels)
        moved = moved + 0.25 * epsilon * torch.autograd.grad(loss, moved)[0].sign()
    moved = moved.clamp(pixels - epsilon, pixels + epsilon).clamp(0, 1)
    right = (model((moved - mean) / std).query.argmax(dim=1) == loader.labels).sum().item()
    seen, attack = [], robustness.attack
    monkeypatch.setattr(robustness, "attack", lambda *a, **k: seen.append(attack(*a, **k)) or seen[-1])
    result = evaluate_model(model, loader, Alone(), Conditions(attack="pgd", epsilon=epsilon), COLOR)
    apart = (torch.cat(seen) - moved).abs()
    assert (apart > 1e-5).float().mean() < 0.02  # a sign may hang on a rounding
    assert result["conditions"]["pgd"]["top1_query"] * IMAGES == pytest.approx(right, abs=1.01)


def test_the_mean_of_corruptions_is_theirs_alone_and_flips_hold_for_all_conditions(model):
    loader = Loader()
    asked = Conditions(corruptions=("contrast",), occlusion=(0.9,), attack="fgsm", epsilon=0.5, flip=True)
    result = evaluate_model(model, loader, Alone(), asked, COLOR)["conditions"]
    model.eval()
    samples, shares = torch.arange(IMAGES), []
    for severity in range(1, 6):
        images = robustness.corrupt(loader.images, "contrast", severity, samples, 0)
        with torch.no_grad():
            answer = sum(model(each).query.softmax(dim=1) for each in (images, images.flip(2)))
        shares.append((answer.argmax(dim=1) == loader.labels).double().mean().item())
        assert result[f"contrast_{severity}"]["top1_query"] == pytest.approx(shares[-1])
    assert result["corruptions_mean"]["top1_query"] == pytest.approx(np.mean(shares))


def test_what_hides_images_has_the_color_asked_for(model, monkeypatch):
    seen, occlude = [], robustness.occlude
    monkeypatch.setattr(robustness, "occlude", lambda *arguments: seen.append(occlude(*arguments)) or seen[-1])
    evaluate_model(model, Loader(), Alone(), Conditions(occlusion=(0.5,)), (0.2, 0.4, 0.6))
    images, hidden = Loader().images, torch.cat(seen)
    changed = (images != hidden).any(dim=3)
    assert changed.any() and (hidden[changed] == torch.tensor([51, 102, 153], dtype=torch.uint8)).all()
