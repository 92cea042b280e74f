"""`automix bench memory`: activations that a training step keeps alive, as multiples of a vanilla step's.

Counts the activations that autograd holds for the backward pass at its fullest moment, on the CPU in float32: weights,
gradients and the allocator's slack are left out, so the figures are properties of the method and the network, not of a
machine.
"""

import argparse
import re
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from automix_dist.automix import AutoMix
from automix_dist.backbone import create_backbone
from automix_dist.bench import check_counts, describe_machine, results_folder, write_results
from automix_dist.config_file import from_dict
from automix_dist.draws import draw_step

DEFAULT = [
    "resnet18:-2",
    "resnet50:-2",
    "convnext_tiny:-2",
    "deit_small_patch16_224:5",
    "swin_tiny_patch4_window7_224:-2",
]


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="automix bench memory", description=__doc__)
    parser.add_argument(
        "--networks", nargs="+", default=DEFAULT, metavar="BACKBONE:FEATURE", help="timm models at 224 px"
    )
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--out", type=results_folder, help="folder for memory.json and memory.md")
    options = parser.parse_args(arguments)
    check_counts(parser, options, batch_size=1)
    for network in options.networks:
        if not re.fullmatch(r".+:-?\d+", network):
            parser.error(f"--networks {network}: expected BACKBONE:FEATURE, as resnet50:-2")
    rows = [measure(*network.rsplit(":", 1), options.batch_size) for network in options.networks]
    text = table(rows)
    print(text)
    if options.out:
        machine = describe_machine()
        result = {"machine": machine, "batch_size": options.batch_size, "dtype": "float32", "rows": rows}
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        write_results(options.out, "memory", result, f"{__doc__.strip()}\n\n{versions}; {machine['date']}.\n\n{text}\n")
    return 0


def measure(backbone: str, feature: str, batch_size: int) -> dict:
    """Peak MiB per image of a vanilla step, an AutoMix step, and one with immediate backward."""
    config = from_dict({"model": {"backbone": backbone}, "automix": {"feature": int(feature)}})
    torch.manual_seed(0)
    model = AutoMix(create_backbone(config.model, config.automix.feature, 224), 1000, config.automix)
    images = torch.randint(0, 256, (batch_size, 224, 224, 3), dtype=torch.uint8)
    labels = torch.randint(0, 1000, (batch_size,))
    draws = draw_step(config.automix, batch_size, seed=0, step=0)

    def vanilla() -> None:
        pixels = (images.permute(0, 3, 1, 2) / 255 - 0.5).contiguous()
        F.cross_entropy(model.query(pixels, "one"), labels).backward()

    def automix(immediate: bool) -> None:
        model.immediate_backward = immediate
        model(images, labels, draws, 0.1).total.backward()

    peaks = (peak_saved_bytes(step, model) for step in (vanilla, lambda: automix(False), lambda: automix(True)))
    names = ("vanilla", "together", "immediate")
    return {"backbone": backbone} | {k: peak / batch_size / 2**20 for k, peak in zip(names, peaks, strict=True)}


def table(rows: list[dict]) -> str:
    lines = ["| backbone | vanilla, MiB/image | AutoMix, one backward | immediate backward |", "|---|---|---|---|"]
    for row in rows:
        ratios = " | ".join(f"{row[name] / row['vanilla']:.2f}x" for name in ("together", "immediate"))
        lines.append(f"| {row['backbone']} | {row['vanilla']:.1f} | {ratios} |")
    return "\n".join(lines)


def peak_saved_bytes(step: Callable[[], None], model: nn.Module) -> int:
    """The most bytes, but for the model's parameters, that autograd held for backward at any moment of `step()`; a
    shared storage counts once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    alive: dict[int, list[int]] = {}  # storage address -> [bytes, holders]
    peak = 0

    def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, "_Holder | None"]:
        nonlocal peak
        storage = tensor.untyped_storage()
        if storage.data_ptr() in weights:
            return tensor, None
        box = (tensor, _Holder(alive, storage.data_ptr(), storage.nbytes()))
        peak = max(peak, sum(size for size, _ in alive.values()))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box[0]):
        step()
    return peak


class _Holder:
    """Counts a storage as alive for as long as a graph keeps this object."""

    def __init__(self, alive: dict[int, list[int]], address: int, size: int):
        self.alive, self.address = alive, address
        alive.setdefault(address, [size, 0])[1] += 1

    def __del__(self):
        self.alive[self.address][1] -= 1
        if not self.alive[self.address][1]:
            del self.alive[self.address]
