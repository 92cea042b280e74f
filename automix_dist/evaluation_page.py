"""The files that people read of an evaluation: eval.json and eval.html."""

import html
import json
from pathlib import Path
from typing import Any

import numpy as np

from automix_dist.cam import Views
from automix_dist.gallery import IMAGE_COLOR, PARTNER_COLOR
from automix_dist.page import figures, mask_uri, percent_or_nothing, picture_uri, reliability, table, write_page
from automix_dist.whole_file import write_whole


def write_evaluation(result: dict[str, Any], folder: Path, title: str, views: Views | None = None) -> Path:
    """Write folder/eval.json and folder/eval.html, with Grad-CAM where there are views; returns the page's path.

    Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "eval.json", json.dumps(result, indent=1))
    answer = result["answer"]
    answers = [key.removeprefix("top1_") for key in result if key.startswith("top1_")]
    keys = ("top1", "top5", "ece", "loss")
    rows = [(name, *(_number(key, result[f"{key}_{name}"]) for key in keys)) for name in answers]
    head = ("Answer", "Top-1", "Top-5", "ECE", "Loss")
    options = dict(result.get("options", {}))
    if not options.get("attack"):
        options.pop("epsilon", None)
    given = {k: v for k, v in options.items() if v is not None and v is not False and v != []}
    made = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in given.items())
    sections = {"Accuracy": f'{table(rows, head, "figures")}<p class="hint">{html.escape(made)}</p>'}
    if result["conditions"]:
        top1 = {name: [values[f"top1_{each}"] for each in answers] for name, values in result["conditions"].items()}
        rows = [(name, *map(percent_or_nothing, values)) for name, values in top1.items()]
        sections["Top-1 under harder conditions"] = table(rows, ("Condition", *answers), "figures")
    sections[f"Reliability of {answer}"] = reliability(result["calibration"])
    if views is not None:
        sections |= _cam_sections(views, [row["name"] for row in result["classes"]], answer)
    order = sorted(result["classes"], key=lambda row: -1 if row["recall"] is None else row["recall"])
    rows = [
        (row["name"], f"{row['images']:,}", percent_or_nothing(row["recall"]), percent_or_nothing(row["precision"]))
        for row in order
    ]
    sections[f"Classes of {answer}, the worst first"] = table(
        rows, ("Class", "Images", "Recall", "Precision"), "figures"
    )
    if result["confusion"]:
        names = [row["name"] for row in result["classes"]]
        rows = [(name, *map(str, line)) for name, line in zip(names, result["confusion"], strict=True)]
        sections["Confusions: true classes in rows, guesses in columns"] = table(rows, ("", *names), "figures")
    return write_page(folder / "eval.html", "Evaluation", title, sections)


def _number(key: str, value: float | None) -> str:
    return f"{value:.4f}" if key == "loss" and value is not None else percent_or_nothing(value)


def _cam_sections(views: Views, classes: list[str], answer: str) -> dict[str, str]:
    """Cards of images with what made `answer` say its guess, and of mixes with what speaks for each of two classes."""
    images, labels = views.batch.images.cpu().numpy(), views.batch.labels.tolist()
    of_guess, of_label = (each.cpu().numpy() for each in (views.of_guess, views.of_label))
    cards = []
    for i, guess in enumerate(views.guess.tolist()):
        said = f"guess: {classes[guess]}, {_share(views.confidence[i].item())}"
        card = [(picture_uri(images[i]), classes[labels[i]]), (_overlay(images[i], of_guess[i], PARTNER_COLOR), said)]
        if guess != labels[i]:
            card.append((_overlay(images[i], of_label[i], IMAGE_COLOR), f"true: {classes[labels[i]]}"))
        cards.append(card)
    hint = "Coloured: what speaks for the guess, in orange; where it is wrong, what speaks for the true class, in blue."
    small = images.shape[1]
    sections = {f"Grad-CAM of {answer}": f'<p class="hint">{hint}</p>{figures(cards, small)}'}
    if views.mixes is None:
        return sections
    mixed, masks, of_own, of_partner = (
        each.cpu().numpy() for each in (views.mixed, views.mixes.mask, views.of_own, views.of_partner)
    )
    lam, partner = views.mixes.lam.tolist(), views.mixes.partner.tolist()
    cards = []
    for i, label in enumerate(labels):
        own, other = classes[label], classes[labels[partner[i]]]
        cards.append(
            [
                (picture_uri(mixed[i]), f"{_share(lam[i])} {own}, {_share(1 - lam[i])} {other}"),
                (mask_uri(masks[i]), "mask"),
                (_overlay(mixed[i], of_own[i], IMAGE_COLOR), f"for {own}"),
                (_overlay(mixed[i], of_partner[i], PARTNER_COLOR), f"for {other}"),
            ]
        )
    hint = (
        "A mask is orange where it takes the partner. Coloured: what speaks for each of the two classes, by the head "
        "for mixed images where there is one."
    )
    sections["Grad-CAM of mixed pairs"] = f'<p class="hint">{hint}</p>{figures(cards, small)}'
    return sections


def _share(value: float) -> str:
    return f"{round(100 * value)} %"


def _overlay(image: np.ndarray, weights: np.ndarray, color: tuple[int, int, int]) -> str:
    """The image in grey, uint8 [H, W, 3], under a colour as strong as the weights [H, W] in [0, 1]; as a data URI."""
    strength = 0.8 * np.nan_to_num(weights)[..., None]
    gray = image.mean(axis=2, keepdims=True)
    return picture_uri((gray * (1 - strength) + np.array(color) * strength).round().astype(np.uint8))
