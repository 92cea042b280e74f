"""The method against recordings of the published implementation: masks, losses, gradients, whole training steps.

The recordings and their tolerances are described in tests/reference/README.md. Another folder of recordings in the
same format: `pytest tests/test_reference.py --reference DIR`.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from automix_kernels import api as kernels
from torch import nn

from automix_dist.automix import AutoMix
from automix_dist.config import AutoMixConfig
from automix_dist.draws import Draws, MixDraw
from automix_dist.mix_block import MixBlock, mask_loss
from automix_dist.momentum import MomentumUpdate

VALUE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


class TinyBackbone(nn.Module):
    """The recordings' backbone: three stages of conv 3x3 stride 2, BatchNorm, ReLU; features after the second."""

    feature_channels, width = 32, 64

    def __init__(self):
        super().__init__()
        sizes = [3, 16, 32, 64]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in pairwise(sizes)
        )

    def features(self, images, *, full=False):
        features = self.stages[1](self.stages[0](images))
        if full:
            self.stages[2](features)
        return features

    def forward(self, images):
        return self.stages[2](self.features(images)).mean(dim=(2, 3))


def load(path) -> dict[str, torch.Tensor]:
    """The recording's numbers; indices as torch wants them. What is no number is a note for people."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if file[name].dtype.kind in "fiub"}
    return {name: torch.from_numpy(a.astype(np.int64) if a.dtype.kind in "iu" else a) for name, a in arrays.items()}


def ours(name: str) -> str:
    """A state key of the published code -> ours."""
    for theirs, our in (
        ("backbone_q.", "query.backbone."),
        ("backbone_k.", "momentum.backbone."),
        ("head_one_q.fc.", "query.head_one."),
        ("head_mix_q.fc.", "query.head_mix."),
        ("head_one_k.fc.", "momentum.head_one."),
        ("head_mix_k.fc.", "momentum.head_mix."),
        ("query.conv.", "query_"),
        ("query.bn.", "norm."),
        ("query.ln.", "norm."),
        ("value.", "value_"),
    ):
        name = name.replace(theirs, our)
    return name


def under(recording: dict, prefix: str) -> dict[str, torch.Tensor]:
    """The recording's tensors below a prefix, under our names; their aliases of the momentum side are left out."""
    found = {k.removeprefix(prefix): v for k, v in recording.items() if k.startswith(prefix)}
    return {ours(k): v for k, v in found.items() if not k.startswith(("backbone.", "head."))}


def assert_close(name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Largest deviation relative to the expected tensor's norm (values around one: absolute)."""
    expected = expected.reshape(got.shape).to(got.dtype)
    error = (got - expected).norm() / expected.norm().clamp(min=1e-6)
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


def is_nearest(mask: torch.Tensor, scale: int) -> bool:
    """Whether a recorded mask is constant in blocks of scale x scale pixels, but for the last bit of its sigmoid."""
    blocks = mask[..., ::scale, ::scale].repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    return torch.allclose(mask, blocks, rtol=0, atol=1e-6)


def norm_of(weights: dict[str, torch.Tensor], prefix: str = "") -> str:
    if f"{prefix}norm.weight" not in weights:
        return "none"
    return "batch" if f"{prefix}norm.running_mean" in weights else "layer"


def test_mix_block(mix_block_recording):
    recording = load(mix_block_recording)
    features = recording["z"].requires_grad_()
    batch, channels, h, w = features.shape
    scale = int(recording["scale"])
    weights = under(recording, "weight.")
    config = AutoMixConfig(
        reduction=channels // weights["query_weight"].shape[0],
        lam_concat=weights["query_weight"].shape[1] == channels + 1,
        norm=norm_of(weights),
    )
    block = MixBlock(channels, config)
    own = block.state_dict()
    block.load_state_dict({k: v.reshape(own[k].shape) for k, v in weights.items()})

    mode = "nearest" if is_nearest(recording["mask"], scale) else "bilinear"
    lam = recording["lam"].float().expand(batch)
    (logits,) = block(features, recording["index"][None], lam[None])
    mask = kernels.upsample_mask(logits, (h * scale, w * scale), mode)
    both = torch.stack([1 - mask, mask], dim=1)
    assert (both - recording["mask"]).abs().max() <= VALUE_TOLERANCE

    loss = mask_loss("l1", mask.mean(dim=(1, 2)), mask.square().mean(dim=(1, 2)), lam, margin=0.1)
    if "mask_loss" in recording:
        assert (loss - recording["mask_loss"]).abs() <= VALUE_TOLERANCE
    if "upstream" not in recording:
        return
    ((both * recording["upstream"]).sum() + loss).backward()
    assert_close("grad_z", features.grad, recording["grad_z"], GRADIENT_TOLERANCE)
    gradients = under(recording, "grad.")
    assert set(gradients) == {name for name, _ in block.named_parameters()}
    for name, parameter in block.named_parameters():
        assert_close(name, parameter.grad, gradients[name], GRADIENT_TOLERANCE)


def train_step_model(path, recording) -> AutoMix:
    weights = under(recording, "weight0.")
    bilinear = "bilinear" in path.stem
    config = AutoMixConfig(
        reduction=32 // weights["mix_block.query_weight"].shape[0],
        lam_concat=weights["mix_block.query_weight"].shape[1] == 33,
        norm=norm_of(weights, "mix_block."),
        upsampling=("bilinear" if bilinear else "nearest",),
        lam_margin=0.0 if bilinear else 0.08,
        feature_pass="full",
    )
    model = AutoMix(TinyBackbone(), weights["query.head_one.weight"].shape[0], config)
    own = model.state_dict()
    model.load_state_dict({k: v.reshape(own[k].shape) for k, v in weights.items()})
    return model.train()


def recorded_draws(recording: dict, step: int, mode: str) -> Draws:
    lams = recording[f"step{step}.lam_mb_bb"].float()
    batch = recording[f"step{step}.y"].shape[0]
    return Draws.of(
        mix_block=MixDraw(lams[0].expand(batch), recording[f"step{step}.index_mb"], mode),
        classifier=MixDraw(lams[1].expand(batch), recording[f"step{step}.index_bb"], mode),
        adjust_mask=False,
        train_generator=True,
    )


def test_train_steps(train_step_recording):
    recording = load(train_step_recording)
    model = train_step_model(train_step_recording, recording)
    mix, rest = list(model.mix_block.parameters()), list(model.query.parameters())
    optimizer = torch.optim.SGD(
        [{"params": rest}, {"params": mix, "momentum": 0.0}], lr=0.1, momentum=0.9, weight_decay=1e-4
    )
    update_momentum = MomentumUpdate(model)
    steps = sum(name.endswith(".loss") for name in recording)
    assert steps >= 1
    for step in range(steps):
        draws = recorded_draws(recording, step, model.config.upsampling[0])
        optimizer.zero_grad()
        losses = model(recording[f"step{step}.x"], recording[f"step{step}.y"], draws, mask_loss_weight=0.1)
        losses.total.backward()
        assert (losses.total - recording[f"step{step}.loss"]).abs() <= VALUE_TOLERANCE * max(1, losses.total.item())

        gradients = under(recording, f"step{step}.grad.")
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert set(gradients) == set(trained)
        for name, parameter in trained.items():
            assert_close(f"step {step} grad {name}", parameter.grad, gradients[name], GRADIENT_TOLERANCE)

        optimizer.step()
        update_momentum(0.9)
        after, state = under(recording, f"step{step}.after."), model.state_dict()
        assert set(after) == set(state)
        for name, tensor in state.items():
            if tensor.is_floating_point():
                assert_close(f"step {step} after {name}", tensor, after[name], GRADIENT_TOLERANCE)
            else:
                assert torch.equal(tensor, after[name]), name
        # From the recorded state: the last bits of two that drift apart decide sooner or later about a ReLU.
        model.load_state_dict({name: after[name].reshape(tensor.shape) for name, tensor in state.items()})


def test_cut_feature_pass_trains_the_same(train_step_recording):
    """Stopping the feature pass at the Mix Block's feature changes only the momentum encoder's later statistics."""
    recording = load(train_step_recording)
    models = [train_step_model(train_step_recording, recording) for _ in range(2)]
    models[1].config = AutoMixConfig(**{**models[0].config.__dict__, "feature_pass": "cut"})
    draws = recorded_draws(recording, 0, models[0].config.upsampling[0])
    for model in models:
        model(recording["step0.x"], recording["step0.y"], draws, mask_loss_weight=0.1).total.backward()
    for (name, full), (_, cut) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        if full.requires_grad:
            assert torch.equal(full.grad, cut.grad), name
    differing = {
        name
        for (name, full), (_, cut) in zip(models[0].named_buffers(), models[1].named_buffers(), strict=True)
        if not torch.equal(full, cut)
    }
    assert differing and all(name.startswith("momentum.backbone.stages.2.") for name in differing)


def test_recordings_beside_the_checkout_equal_the_copy(request):
    """The copy in tests/ is used where the shared folder is absent; the two must not drift apart."""
    copy, shared = request.path.parent / "reference", request.path.parents[2] / "shared" / "reference"
    if not shared.is_dir():
        pytest.skip("no shared recordings beside the checkout")
    for path in copy.glob("*.npz"):
        original = shared / path.name  # where other recordings lie, these are what is tested
        assert not original.exists() or original.read_bytes() == path.read_bytes(), path.name
