"""The gallery of a run: after each evaluation a file of image pairs with their masks and mixes, and its picture."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from automix_dist.whole_file import whole_file

if TYPE_CHECKING:  # the report shows galleries without torch
    from torch import Tensor

    from automix_dist.policy import Mixes

GALLERY = "gallery"
IMAGE_COLOR, PARTNER_COLOR = (0, 114, 178), (230, 159, 0)  # ends of the mask's scale; distinct to colour-blind readers


class Gallery(NamedTuple):
    """P pairs of images with their masks and mixes, and the first pair's masks and mixes for S rising lambdas."""

    images: np.ndarray
    """uint8 [P, H, W, 3]"""
    partners: np.ndarray
    """uint8 [P, H, W, 3]"""
    masks: np.ndarray
    """float16 [P, H, W], the weight of the partner at each pixel."""
    mixed: np.ndarray
    """uint8 [P, H, W, 3]"""
    lam: np.ndarray
    """float32 [P], the weight of the image's label."""
    labels: np.ndarray
    """int64 [P]"""
    partner_labels: np.ndarray
    """int64 [P]"""
    sweep_masks: np.ndarray
    """float16 [S, H, W]"""
    sweep_mixed: np.ndarray
    """uint8 [S, H, W, 3]"""
    sweep_lam: np.ndarray
    """float32 [S]"""


def make_gallery(images: "Tensor", labels: "Tensor", mixes: "Mixes", mean: "Tensor", std: "Tensor") -> Gallery:
    """The gallery of images, uint8 [P, H, W, 3], and their labels, int64 [P].

    Args:
        mixes: of the images, and after them of the first pair's sweep.
        mean, std: [3], the normalisation that their images have.
    """
    pairs = len(images)
    images, labels, partner = (each.cpu().numpy() for each in (images, labels, mixes.partner[:pairs]))
    masks, mixed, lam = (each.cpu().numpy() for each in (mixes.mask, mixes.pixels(mean, std), mixes.lam))
    masks = masks.astype(np.float16)
    return Gallery(
        images=images,
        partners=images[partner],
        masks=masks[:pairs],
        mixed=mixed[:pairs],
        lam=lam[:pairs],
        labels=labels,
        partner_labels=labels[partner],
        sweep_masks=masks[pairs:],
        sweep_mixed=mixed[pairs:],
        sweep_lam=lam[pairs:],
    )


def write_gallery(folder: Path, step: int, gallery: Gallery) -> Path:
    """Write `folder`/gallery/step_XXXXXXXX.npz, whole or not at all, and return its path. Raises OSError."""
    path = folder / GALLERY / f"step_{step:08d}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        np.savez_compressed(file, **gallery._asdict())
    return path


def read_gallery(path: Path, most_pairs: int) -> Gallery:
    """What a gallery file holds, of its pairs the first ones. Raises what numpy does, or ValueError, if it is none."""
    with np.load(path, allow_pickle=False) as stored:
        arrays = {}
        for name in Gallery._fields:
            of_pairs = name.removeprefix("sweep_")
            if name == of_pairs:
                arrays[name] = stored[name][:most_pairs]
            else:  # a run of an earlier version has no sweep
                arrays[name] = stored[name] if name in stored else stored[of_pairs][:0]
    gallery = Gallery(**arrays)
    _check(gallery)
    return gallery


def _check(gallery: Gallery) -> None:
    """Raise ValueError unless the arrays fit each other."""
    pairs, height, width, _ = gallery.images.shape
    (sweep,) = gallery.sweep_lam.shape
    for name, array in gallery._asdict().items():
        count = sweep if name.startswith("sweep_") else pairs
        if name.endswith(("images", "partners", "mixed")):
            fits = array.shape == (count, height, width, 3) and array.dtype == np.uint8
        elif name.endswith("masks"):
            fits = array.shape == (count, height, width)
        else:
            fits = array.shape == (count,)
        if not fits:
            raise ValueError(f"{name} does not fit the other arrays: {array.dtype} {list(array.shape)}")


def mask_colors(masks: np.ndarray) -> np.ndarray:
    """Masks as pictures, the image's colour over white to the partner's: float [...] in [0, 1] -> uint8 [..., 3]."""
    weight = np.clip(np.nan_to_num(np.asarray(masks, np.float32)), 0, 1)[..., None]
    image, white, partner = (np.array(color, np.float32) for color in (IMAGE_COLOR, (255, 255, 255), PARTNER_COLOR))
    toward_image = image + (white - image) * weight * 2
    toward_partner = white + (partner - white) * (weight * 2 - 1)
    return np.where(weight < 0.5, toward_image, toward_partner).round().astype(np.uint8)


def gallery_picture(gallery: Gallery) -> np.ndarray:
    """One picture of a gallery, uint8 [height, width, 3]: a column for each pair; image, partner, mask, mixed below."""
    masks = mask_colors(gallery.masks)
    rows = np.stack([gallery.images, gallery.partners, masks, gallery.mixed])  # [4, P, H, W, 3]
    rows = np.pad(rows, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    kinds, pairs, height, width, channels = rows.shape
    return rows.transpose(0, 2, 1, 3, 4).reshape(kinds * height, pairs * width, channels)


def cut_gallery(run: Path, start_step: int) -> None:
    """Keep the files up to start_step; none of a new training."""
    for path in gallery_files(run):
        if not start_step or gallery_step(path) > start_step:
            path.unlink()


def gallery_files(run: Path) -> list[Path]:
    """The gallery files of a run, by rising step."""
    files = (run / GALLERY).glob("step_*.npz")
    return sorted((path for path in files if path.stem[5:].isdecimal()), key=gallery_step)


def gallery_step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))
