"""The gallery of a run: after each evaluation a file of image pairs with their masks and mixes, and its picture."""

from pathlib import Path

import numpy as np

from automix_dist.whole_file import whole_file

GALLERY = "gallery"
IMAGE_COLOR, PARTNER_COLOR = (0, 114, 178), (230, 159, 0)  # ends of the mask's scale; distinct to colour-blind readers
GALLERY_ARRAYS = ("images", "partners", "masks", "mixed", "lam", "labels", "partner_labels")
SWEEP_ARRAYS = ("sweep_masks", "sweep_mixed", "sweep_lam")


def write_gallery(
    folder: Path,
    step: int,
    *,
    images: np.ndarray,
    partners: np.ndarray,
    masks: np.ndarray,
    mixed: np.ndarray,
    lam: np.ndarray,
    labels: np.ndarray,
    partner_labels: np.ndarray,
    sweep_masks: np.ndarray,
    sweep_mixed: np.ndarray,
    sweep_lam: np.ndarray,
) -> Path:
    """Write `folder`/gallery/step_XXXXXXXX.npz, whole or not at all, and return its path.

    images, partners, mixed: uint8 [P, H, W, 3]; masks: float [P, H, W], the weight of the partner at each pixel;
    lam: float [P], the weight of the image's label; labels, partner_labels: int [P]; sweep_*: masks, mixed and lam of
    the first pair for S rising lambdas. Raises OSError.
    """
    path = folder / GALLERY / f"step_{step:08d}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        "images": images,
        "partners": partners,
        "masks": np.asarray(masks, np.float16),
        "mixed": mixed,
        "lam": np.asarray(lam, np.float32),
        "labels": labels,
        "partner_labels": partner_labels,
        "sweep_masks": np.asarray(sweep_masks, np.float16),
        "sweep_mixed": sweep_mixed,
        "sweep_lam": np.asarray(sweep_lam, np.float32),
    }
    with whole_file(path) as file:
        np.savez_compressed(file, **arrays)
    return path


def mask_colors(masks: np.ndarray) -> np.ndarray:
    """Masks as pictures, the image's colour over white to the partner's: float [...] in [0, 1] -> uint8 [..., 3]."""
    weight = np.clip(np.nan_to_num(np.asarray(masks, np.float32)), 0, 1)[..., None]
    image, white, partner = (np.array(color, np.float32) for color in (IMAGE_COLOR, (255, 255, 255), PARTNER_COLOR))
    toward_image = image + (white - image) * weight * 2
    toward_partner = white + (partner - white) * (weight * 2 - 1)
    return np.where(weight < 0.5, toward_image, toward_partner).round().astype(np.uint8)


def gallery_picture(
    images: np.ndarray, partners: np.ndarray, masks: np.ndarray, mixed: np.ndarray, **_: np.ndarray
) -> np.ndarray:
    """One picture of a gallery, uint8 [height, width, 3]: a column for each pair; image, partner, mask, mixed below."""
    rows = np.stack([images, partners, mask_colors(masks), mixed])  # [4, P, H, W, 3]
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
