"""Every engine against one plain PyTorch process: losses, weights, momentum encoder, checkpoints across engines.

The one process computes the ranks' micro batches one after the other and averages their gradients, which is what data
parallelism means for a network with BatchNorm: statistics are per rank. Only the running statistics differ by rank.
"""

from pathlib import Path
from unittest import mock

import pytest
import torch
from automix_kernels import api as kernels
from engine_steps import (
    ENGINES,
    TOLERANCE,
    assert_same,
    engine_steps,
    plain_steps,
    save_after,
    start_engine,
    train_and_norms,
    train_plain,
    train_with_engine,
    whole_parameters,
)
from ranks import run_ranks
from tiny import CLASSES, TinyBackbone, micro_batch, rank_draws, tiny_config, tiny_model

from automix_dist import automix, convolutions, distributed
from automix_dist.automix import AutoMix
from automix_dist.checkpoint import Checkpoints
from automix_dist.config import ConfigError
from automix_dist.draws import Draws, MixDraw
from automix_dist.engines import build_engine
from automix_dist.fused_batchnorm import fuse_batchnorms
from automix_dist.optimizer import build_optimizer


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_equal_one_process(engine, tmp_path):
    config = tiny_config(engine=ENGINES[engine])
    ranks = run_ranks(2, train_with_engine, config, tmp_path, 5)
    assert_same(ranks[0], train_plain(config, ranks=2, steps=5))
    for name in ranks[0]:
        assert torch.equal(ranks[0][name], ranks[1][name])


def channels_last(images: torch.Tensor) -> torch.Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def train_as_on_a_gpu(config, folder: Path, steps: int) -> dict[str, torch.Tensor]:
    """Channels-last images, weights that are laid out for them, and the kernels' operators, with their definitions; of
    fused BatchNorms too."""
    laid_out = mock.Mock(side_effect=convolutions._LaidOut.apply)
    with (
        mock.patch.object(automix, "lay_out", channels_last),
        mock.patch.object(convolutions, "_reads_channels_last", lambda images: True),
        mock.patch.object(convolutions._LaidOut, "apply", laid_out),
        mock.patch.object(kernels, "_takes_triton", lambda *_: True),
    ):
        process = distributed.start(config.engine)
        model = tiny_model(config)
        convolutions.lay_out_weights(model)
        fuse_batchnorms(model)
        engine = build_engine(model, build_optimizer(model, config.optimizer), config, process)
        engine_steps(config, process, model, engine, 0, steps)
    assert laid_out.call_count >= 2 * 3 * steps  # two convolutions, whole passes of the momentum and query encoders
    return whole_parameters(engine, folder, process, config)


@pytest.mark.parametrize("engine", ["zero0", "zero2", "zero3", "ddp", "fsdp2"])
def test_two_ranks_as_on_a_gpu_equal_one_process(engine, tmp_path):
    pytest.importorskip("triton")
    config = tiny_config(engine={**ENGINES[engine], "immediate_backward": True})
    ranks = run_ranks(2, train_as_on_a_gpu, config, tmp_path, 3)
    assert_same(ranks[0], train_plain(tiny_config(engine=ENGINES[engine]), ranks=2, steps=3))


@pytest.mark.parametrize("engine", ENGINES)
def test_immediate_backward_equals_one_process(engine, tmp_path):
    """Three backward passes within a step: none of their gradients may get lost, and clipping sees their sum."""
    settings = {"engine": {**ENGINES[engine], "accumulation_steps": 2}, "optimizer": {"clip_norm": 0.5}}
    immediate = tiny_config(**{**settings, "engine": {**settings["engine"], "immediate_backward": True}})
    ranks = run_ranks(2, train_with_engine, immediate, tmp_path, 3)
    assert_same(ranks[0], train_plain(tiny_config(**settings), ranks=4, steps=3))


@pytest.mark.parametrize("engine", ENGINES)
def test_accumulation_equals_more_ranks(engine, tmp_path):
    """Two ranks with two micro batches each do what four ranks do; norm and clipping are over all of it."""
    config = tiny_config(engine={**ENGINES[engine], "accumulation_steps": 2}, optimizer={"clip_norm": 0.5})
    ranks = run_ranks(2, train_and_norms, config, tmp_path, 3)
    expected_norms: list[float] = []
    assert_same(ranks[0][0], train_plain(config, ranks=4, steps=3, norms=expected_norms))
    assert ranks[0][1] == ranks[1][1] == pytest.approx(expected_norms, rel=1e-5)
    assert min(expected_norms) > 0.5  # of what is clipped, the norm before


@pytest.mark.parametrize("engine", ENGINES)
def test_adamw_in_one_process(engine, tmp_path):
    optimizer = {"name": "adamw", "lr": 0.01, "mix_momentum": None, "decay_norm_and_bias": False}
    config = tiny_config(engine=ENGINES[engine], optimizer=optimizer)
    (got,) = run_ranks(1, train_with_engine, config, tmp_path, 4)
    assert_same(got, train_plain(config, ranks=1, steps=4), tolerance=1e-4)  # Adam divides by small numbers


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_layers_may_have_learning_rates_of_their_own(engine, tmp_path):
    config = tiny_config(engine=ENGINES[engine], optimizer={"layer_decay": 0.3, "decay_norm_and_bias": False})
    ranks = run_ranks(2, train_with_engine, config, tmp_path, 3)
    assert_same(ranks[0], train_plain(config, ranks=2, steps=3))


@pytest.mark.parametrize("engine", ["zero0", "zero2", "zero3", "ddp", "fsdp2"])
def test_clean_images_for_the_head_alone(engine, tmp_path):
    settings = {"automix": {"clean_images": "head"}}
    config = tiny_config(engine={**ENGINES[engine], "immediate_backward": True}, **settings)
    ranks = run_ranks(2, train_with_engine, config, tmp_path, 3)
    assert_same(ranks[0], train_plain(tiny_config(engine=ENGINES[engine], **settings), ranks=2, steps=3))


def test_two_ranks_equal_one_batch_of_both_without_batchnorm():
    """With GroupNorm and without the mask loss (a function of the batch mean) the loss is a mean over images: then two
    batches of B and one of 2B give the same gradients."""
    config = tiny_config(automix={"mask_loss_weight": 0.0})
    size = 8
    parts = [(*micro_batch(0, rank, size), rank_draws(config, 0, rank, size)) for rank in range(2)]
    apart, together = tiny_model(config, "group"), tiny_model(config, "group")
    for images, labels, draws in parts:
        (apart(images, labels, draws, 0.0).total / 2).backward()

    def joined(which: str) -> MixDraw:
        first, second = (getattr(draws, which) for _, _, draws in parts)
        return MixDraw(torch.cat([first.lam, second.lam]), torch.cat([first.partner, second.partner + size]), "nearest")

    draws = Draws.of(joined("mix_block"), joined("classifier"))
    together(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), draws, 0.0).total.backward()
    assert_same(
        {n: p.grad for n, p in together.named_parameters() if p.requires_grad},
        {n: p.grad for n, p in apart.named_parameters() if p.requires_grad},
    )


def resume_until(config, folder: Path, last: int) -> tuple[dict, dict]:
    process, model, engine = start_engine(config)
    checkpoints = Checkpoints(folder, config.checkpoint, process, print)
    state = checkpoints.load(engine, checkpoints.agree_on_newest())
    engine_steps(config, process, model, engine, state["step"], last)
    buffers = {name: b.clone() for name, b in engine.module.named_buffers()}
    return whole_parameters(engine, folder / "out", process, config), buffers


def train_through(config, folder: Path, steps: int) -> tuple[dict, dict]:
    process, model, engine = start_engine(config)
    engine_steps(config, process, model, engine, 0, steps)
    buffers = {name: b.clone() for name, b in engine.module.named_buffers()}
    return whole_parameters(engine, folder / "out", process, config), buffers


def test_resume_does_not_depend_on_the_groups_of_the_optimizer(tmp_path):
    """Two groups and four, both without decay, are the same training; saved in one form, continued in the other."""
    optimizer = {"name": "adamw", "lr": 0.01, "mix_momentum": None, "weight_decay": 0.0}
    two, four = (
        tiny_config(engine=ENGINES["zero2"], optimizer={**optimizer, "decay_norm_and_bias": each})
        for each in (True, False)
    )
    run_ranks(1, save_after, two, tmp_path, 2)
    ((got, _),) = run_ranks(1, resume_until, four, tmp_path, 4)
    assert_same(got, train_plain(two, ranks=1, steps=4), tolerance=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_resume_is_bit_for_bit(engine, tmp_path):
    config = tiny_config(engine=ENGINES[engine])
    run_ranks(2, save_after, config, tmp_path, 3)
    resumed = run_ranks(2, resume_until, config, tmp_path, 6)
    through = run_ranks(2, train_through, config, tmp_path / "through", 6)
    for (got, got_buffers), (expected, expected_buffers) in zip(resumed, through, strict=True):
        assert got.keys() == expected.keys()
        for name in expected:
            assert torch.equal(got[name], expected[name]), name
        for name in expected_buffers:
            assert torch.equal(got_buffers[name], expected_buffers[name]), name  # each rank's own BatchNorm statistics


class ScaledBackbone(TinyBackbone):
    """With a parameter that has no dimensions, as NFNets have."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))

    def features_and_embedding(self, images):
        features, embedding = super().features_and_embedding(images)
        return features, self.gain * embedding


def train_scaled(config, folder: Path, first: int, last: int) -> dict[str, torch.Tensor]:
    process = distributed.start(config.engine)
    torch.manual_seed(0)
    model = AutoMix(ScaledBackbone(), CLASSES, config.automix)
    engine = build_engine(model, build_optimizer(model, config.optimizer), config, process)
    checkpoints = Checkpoints(folder, config.checkpoint, process, print)
    if first:
        checkpoints.load(engine, checkpoints.agree_on_newest())
    engine_steps(config, process, model, engine, first, last)
    return whole_parameters(engine, folder, process, config)


@pytest.mark.parametrize("optimizer", [{"name": "sgd"}, {"name": "adamw", "lr": 0.01, "mix_momentum": None}])
def test_scalars_have_their_optimizer_state_back(optimizer, tmp_path):
    config = tiny_config(engine=ENGINES["ddp"], optimizer=optimizer)
    run_ranks(2, train_scaled, config, tmp_path, 0, 3)
    resumed, _ = run_ranks(2, train_scaled, config, tmp_path, 3, 6)
    through, _ = run_ranks(2, train_scaled, config, tmp_path / "through", 0, 6)
    assert through["query.backbone.gain"].shape == () and through["query.backbone.gain"] != 1
    assert_same(resumed, through, tolerance=0)


@pytest.mark.parametrize("engine", ["zero0", "zero3", "fsdp2"])
def test_engines_that_take_no_scalars_say_so(engine):
    config = tiny_config(engine=ENGINES[engine])
    model = AutoMix(ScaledBackbone(), CLASSES, config.automix)
    with pytest.raises(ConfigError, match=r"takes no parameters .* as query.backbone.gain is: set it to ddp"):
        build_engine(model, build_optimizer(model, config.optimizer), config, None)


MOVES = [
    ((2, "zero0"), (1, "zero3")),
    ((2, "zero3"), (1, "zero0")),
    ((1, "zero2"), (2, "zero1")),
    ((2, "zero1"), (2, "zero3")),
    ((3, "zero2"), (2, "ddp")),
    ((2, "ddp"), (3, "fsdp2")),
    ((3, "fsdp2"), (2, "zero2")),
    ((2, "offload3"), (4, "fsdp2")),
    ((4, "zero3"), (1, "ddp")),
]
"""Ranks and engine of a run, before and after."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "optimizer"), [(*m, "adamw") for m in MOVES] + [(*m, "sgd") for m in MOVES[::3]]
)
def test_resume_on_another_world_size_and_engine(before, after, optimizer, tmp_path):
    """Saved by N ranks under one engine, resumed by M under another: the same whole tensors go on. The micro batches
    differ after the resume, so the test goes on with the resumed shape in one plain process from the same state."""
    settings = {"batch_size": 24, "optimizer": {"name": optimizer, "lr": 0.02, "mix_momentum": None}}
    (ranks, engine), (new_ranks, new_engine) = before, after
    run_ranks(ranks, save_after, tiny_config(**settings, engine=ENGINES[engine]), tmp_path, 3)
    new_config = tiny_config(**settings, engine=ENGINES[new_engine])
    resumed = run_ranks(new_ranks, resume_until, new_config, tmp_path, 5)
    plain = run_ranks(1, resume_plain, new_config, tmp_path, new_ranks, 5)
    assert_same(resumed[0][0], plain[0], tolerance=1e-4 if optimizer == "adamw" else TOLERANCE)


def resume_plain(config, folder: Path, ranks: int, last: int) -> dict[str, torch.Tensor]:
    """Load the checkpoint's tensors by hand into a model and a torch optimizer, and continue as `ranks` ranks would."""
    from automix_dist.checkpoint_files import ShardReader, newest

    saved = newest(folder)
    reader = ShardReader(saved)
    model = tiny_model(config).train()
    optimizer = build_optimizer(model, config.optimizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.tensor(f"param/{name}"))
            for full in reader.names(f"optimizer/{name}/"):
                optimizer.state[parameter][full.rsplit("/", 1)[1]] = reader.tensor(full)
            if parameter.requires_grad:
                for key, value in saved.manifest["optimizer_scalars"].items():
                    optimizer.state[parameter][key] = torch.tensor(value)
    return plain_steps(config, model, optimizer, ranks, saved.step, last)


def engine_clipping(config) -> float:
    _, _, engine = start_engine(config)
    return engine.deepspeed.gradient_clipping()


def test_deepspeed_itself_never_clips():
    assert run_ranks(1, engine_clipping, tiny_config(optimizer={"clip_norm": 3.0}))[0] == 0.0
