"""The speed options: those that are said to train the same do, and those that do not do what they say."""

import copy
import dataclasses

import pytest
import torch
from automix_kernels import api as kernels
from engine_steps import assert_same, train_plain, train_with_engine
from ranks import run_ranks
from tiny import CLASSES, TinyBackbone, micro_batch, rank_draws, tiny_config, tiny_model
from torch import nn

from automix_dist import automix as automix_module
from automix_dist.activation_checkpointing import checkpoint_blocks
from automix_dist.automix import AutoMix
from automix_dist.backbone import create_backbone
from automix_dist.batchnorm import RunningStatistics
from automix_dist.bench import step_ways
from automix_dist.bench.step import counted_flops
from automix_dist.config import ConfigError
from automix_dist.config_file import from_dict
from automix_dist.convolutions import PaddedConv2d, pad_stems
from automix_dist.draws import draw_step
from automix_dist.fused_batchnorm import FusedBatchNorm2d, describe_fused, fuse_batchnorms
from automix_dist.loss import class_loss
from automix_dist.model import build_model
from automix_dist.schedules import Schedule


def gradients(model: AutoMix, config) -> list[torch.Tensor]:
    images, labels = micro_batch(0, 0, 8)
    losses = model(images, labels, rank_draws(config, 0, 0, 8), 0.1)
    losses.total.backward()
    return [losses.total.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("immediate", "backend", "fused"),
    [(False, "aot_eager", False), (True, "inductor", False), (True, "inductor", True)],
)
def test_compiled_regions_compute_the_same(immediate, backend, fused, monkeypatch):
    """`fused`: BatchNorms as on a GPU, operators that move statistics which are views of one tensor."""
    config = tiny_config(engine={"immediate_backward": immediate})
    plain, compiled = tiny_model(config), tiny_model(config)
    names = list(compiled.state_dict())
    if fused:
        pytest.importorskip("triton")
        monkeypatch.setattr(kernels, "_takes_triton", lambda *_: True)
        fuse_batchnorms(compiled)
        RunningStatistics(compiled)
    compiled.compile_regions(backend)
    assert list(compiled.state_dict()) == names, "a checkpoint of one fits the other"
    for got, expected in zip(gradients(compiled, config), gradients(plain, config), strict=True):
        assert (got - expected).norm() / expected.norm().clamp(min=1e-3) < 1e-4
    for name, expected in plain.named_buffers():
        torch.testing.assert_close(compiled.get_buffer(name), expected, rtol=1e-4, atol=1e-6, msg=name)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 4 and not counters["graph_break"]
    torch.compiler.reset()
    counters.clear()


@pytest.mark.parametrize(
    ("source", "flags"),
    [("momentum", {}), ("momentum", {"immediate_backward": True}), ("momentum", {"joint_query": True}), ("query", {})],
)
def test_all_convolutions_of_a_step_are_compiled(source, flags):
    """Those of calls, too, that do not go through an encoder's forward."""
    config = tiny_config(automix={"feature_source": source})
    eager, compiled = (AutoMix(TinyBackbone(), CLASSES, config.automix, **flags) for _ in range(2))
    executed = {"eager": 0, "compiled": 0}

    def count(kind: str, number: int = 1) -> None:
        executed[kind] += number

    def backend(graph, _):
        convolutions = sum("conv2d" in str(node.target) for node in graph.graph.nodes)
        return lambda *inputs: (count("compiled", convolutions), graph(*inputs))[1]

    for module in eager.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_: count("eager"))
    compiled.compile_regions(backend)
    for model in (eager, compiled):
        gradients(model, config)
    assert executed["compiled"] == executed["eager"] > 5
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


def train_compiled(config, folder, backend):
    """As train_with_engine, compiled: what `automix train` does with engine.compile."""
    import test_data_parallel

    make = test_data_parallel.tiny_model

    def compiled(settings):
        model = make(settings)
        model.compile_regions(backend)
        return model

    test_data_parallel.tiny_model = compiled
    return train_with_engine(config, folder, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "ranks", "backend"),
    [
        ({"zero_stage": 1}, 1, "aot_eager"),
        # With DDP's own buckets, of a few parameters each, torch.compile would split the regions if it may.
        ({"name": "ddp", "bucket_size": 1000}, 2, "eager"),
    ],
)
def test_compiled_regions_train_the_same_under_an_engine(engine, ranks, backend, tmp_path):
    config = tiny_config(engine={"compile": True, "immediate_backward": True, **engine})
    trained = run_ranks(ranks, train_compiled, config, tmp_path, backend)
    assert_same(trained[0], train_plain(tiny_config(), ranks=ranks, steps=2), tolerance=1e-3)


@pytest.mark.parametrize("immediate", [False, True])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_joint_pass_of_the_query_encoder_computes_the_same(norm, immediate):
    """Gradients, and the running statistics of clean before mixed images."""
    config, models = tiny_config(), []
    for joint in (False, True):
        torch.manual_seed(0)
        options = {"joint_query": joint, "immediate_backward": joint and immediate}
        models.append(AutoMix(TinyBackbone(norm), CLASSES, config.automix, **options))
    for got, expected in zip(*(gradients(model, config) for model in models[::-1]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    for name, buffer in models[0].named_buffers():
        torch.testing.assert_close(models[1].get_buffer(name), buffer, msg=name)
    images = torch.rand(3, 3, 16, 16)  # an odd batch, in evaluation
    for got, expected in zip(*(model.eval()(images) for model in models), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_joint_pass_is_refused_where_it_would_differ():
    with pytest.raises(ConfigError, match="sync_batchnorm"):
        from_dict({"engine": {"joint_query": True, "sync_batchnorm": True}})
    with pytest.raises(ConfigError, match="feature_source"):
        from_dict({"engine": {"joint_query": True}, "automix": {"feature_source": "query"}})
    for engine in ({"zero_stage": 3}, {"name": "fsdp2"}):
        with pytest.raises(ConfigError, match=r"engine\.compile"):
            from_dict({"engine": {"compile": True, **engine}})


@pytest.mark.parametrize("name", ["resnet10t", "resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_a_padded_stem_computes_the_same_with_the_same_weights(name):
    """In float64, with gradients down to the image: the mixed images of AutoMix have one."""
    config = from_dict({"model": {"backbone": name}})
    plain = create_backbone(config.model, 5 if "vit" in name else -2, 64).double()
    padded = copy.deepcopy(plain)
    pad_stems(padded)
    assert sum(isinstance(module, PaddedConv2d) for module in padded.modules()) == 1
    assert list(padded.state_dict()) == list(plain.state_dict()), "a checkpoint of one fits the other"
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    results = []
    for backbone in (plain, padded):
        embedding = backbone(images)
        wanted = [images, *backbone.parameters()]
        found = torch.autograd.grad(embedding.square().sum(), wanted, allow_unused=True)
        results.append([embedding, *(grad for grad in found if grad is not None)])
    for got, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    with pytest.raises(ConfigError, match=r"engine\.padded_stem"):
        pad_stems(torch.nn.Linear(3, 3))


NETWORKS_WITH_BATCHNORM = {  # norms with a ReLU, of them with a shortcut
    "resnet10t": (11, 4),  # a deep stem, and blocks with a pooled shortcut
    "resnet26": (25, 8),
    "seresnet18": (9, 0),
    "resnetv2_18": (17, 0),
    "regnety_002": (27, 0),
}


@pytest.mark.parametrize("name", NETWORKS_WITH_BATCHNORM)
def test_fused_batchnorms_compute_the_same_with_the_same_weights(name, monkeypatch):
    """To the bit on the CPU: embeddings, gradients down to the image, running statistics, and in evaluation."""
    config = from_dict({"model": {"backbone": name}})
    plain = create_backbone(config.model, -2, 64).train()
    fused = copy.deepcopy(plain)
    fuse_batchnorms(fused)
    assert list(fused.state_dict()) == list(plain.state_dict()), "a checkpoint of one fits the other"
    calls, batch_norm_relu = [], kernels.batch_norm_relu

    def counted(*arguments, **keywords):
        calls.append(arguments)
        return batch_norm_relu(*arguments, **keywords)

    monkeypatch.setattr(kernels, "batch_norm_relu", counted)
    torch.manual_seed(0)
    images = torch.randn(3, 3, 64, 64, requires_grad=True)
    results = []
    for backbone in (plain, fused):
        embedding = backbone(images)
        wanted = [images, *backbone.parameters()]
        found = torch.autograd.grad(embedding.square().sum(), wanted)
        with torch.no_grad():
            features = backbone.features(images)
        results.append([embedding, *found, features, *backbone.buffers(), backbone.eval()(images)])
    passes = [call for call in calls if call[0].requires_grad]
    assert (len(passes), sum(call[8] is not None for call in passes)) == NETWORKS_WITH_BATCHNORM[name]
    assert describe_fused(fused).startswith(f"{len(passes)} of ") and not describe_fused(plain)
    for got, expected in zip(*results[::-1], strict=True):
        assert torch.equal(got, expected)


def test_what_follows_a_batchnorm_is_left_alone_where_it_is_something_else():
    """Other activations, dropped paths, and norms without weights or running statistics."""
    for settings in (
        {"backbone": "resnet18", "drop_path": 0.2},
        {"backbone": "resnet18", "timm_kwargs": {"block_args": {"attn_layer": "eca"}}},
        {"backbone": "mobilenetv3_small_050"},
    ):
        config = from_dict({"model": settings})
        plain = create_backbone(config.model, -2, 64).train()
        fused = copy.deepcopy(plain)
        fuse_batchnorms(fused)
        images = torch.randn(3, 3, 64, 64)
        results = []
        for backbone in (plain, fused):
            torch.manual_seed(0)  # of what is dropped
            results.append(backbone(images))
        assert torch.equal(*results), settings
    norms = [nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3), nn.BatchNorm2d(3)]
    others = nn.Sequential(*(layer for norm in norms for layer in (norm, nn.ReLU())))
    others[-1] = nn.SiLU()
    fuse_batchnorms(others)
    assert [type(each) for each in norms] == [nn.BatchNorm2d, nn.BatchNorm2d, FusedBatchNorm2d, nn.BatchNorm2d]
    for settings in ({"backbone": "convnext_atto"}, {"backbone": "resnet10t", "timm_kwargs": {"act_layer": "silu"}}):
        with pytest.raises(ConfigError, match=r"engine\.fused_batchnorm"):
            fuse_batchnorms(create_backbone(from_dict({"model": settings}).model, -2, 64))
    with pytest.raises(ConfigError, match="sync_batchnorm"):
        from_dict({"engine": {"fused_batchnorm": True, "sync_batchnorm": True}})


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("operators", [False, True])
def test_a_step_with_fused_batchnorms_is_the_same_step(joint, checkpointing, operators, monkeypatch):
    """AutoMix as `automix train` builds it, all options that touch a BatchNorm together; `operators`: fused ones are
    those of a GPU, which tell autograd that they have written to statistics, beside norms that are not fused."""
    if operators:
        pytest.importorskip("triton")
        monkeypatch.setattr(kernels, "_takes_triton", lambda *_: True)
    results = []
    for fused in (False, True):
        engine = {"joint_query": joint, "fused_batchnorm": fused, "immediate_backward": not checkpointing}
        config = from_dict({"model": {"backbone": "resnet10t"}, "data": {"image_size": 64}, "engine": engine})
        torch.manual_seed(0)
        model = build_model(config, create_backbone(config.model, -2, 64), 10).train()
        RunningStatistics(model)
        if checkpointing:
            checkpoint_blocks(model)
        images, labels = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8), torch.arange(4)
        losses = model(images, labels, draw_step(config.automix, 4, seed=0, step=0), 0.1)
        losses.total.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([*losses, *grads, *(b.clone() for b in model.buffers())])
    for got, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 if operators else 1e-7)


def small_resnet(modes: dict | None = None, **automix) -> tuple[AutoMix, dict]:
    config = from_dict({"model": {"backbone": "resnet10t"}, "automix": automix})
    torch.manual_seed(0)
    return AutoMix(create_backbone(config.model, -2, 64), 10, config.automix, **(modes or {})).train(), config


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_features_and_embedding_are_those_of_two_passes(name):
    config = from_dict({"model": {"backbone": name}})
    size = 224 if "swin" in name else 64
    backbone = create_backbone(config.model, 5 if "vit" in name else -2, size).eval()
    images = torch.randn(2, 3, size, size)
    features, embedding = backbone.features_and_embedding(images)
    torch.testing.assert_close(features, backbone.features(images))
    torch.testing.assert_close(embedding, backbone(images))


def step_flops(model: AutoMix, config, judged: bool = True) -> float:
    images, labels = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8), torch.randint(0, 10, (4,))
    draws = draw_step(config.automix, 4, seed=0, step=0)._replace(train_generator=judged)
    return counted_flops(lambda: model(images, labels, draws, 0.1).total.backward()) / 4


def test_what_the_inexact_options_save():
    """In forward passes F: 9 in all, 1 for the features, 2 for the judgement; docs/throughput.md."""
    model, config = small_resnet()
    with torch.no_grad():
        forward = counted_flops(lambda: model.query(torch.randn(4, 3, 64, 64), "one")) / 4
    whole = step_flops(model, config)

    def saved(model: AutoMix, config, judged: bool = True) -> float:
        return (whole - step_flops(model, config, judged)) / forward

    assert saved(*small_resnet(feature_source="query")) == pytest.approx(1, abs=0.05)
    assert saved(*small_resnet(generator_share=0.5)) == pytest.approx(1, abs=0.05)
    assert saved(*small_resnet(clean_images="head")) == pytest.approx(2, abs=0.05)
    assert saved(*small_resnet(), judged=False) == pytest.approx(2, abs=0.05)


def test_query_features_train_the_query_encoder_as_before():
    """Only the Mix Block's input changes; with equal encoders not even that, but for BatchNorm's statistics."""
    (ours, config), (other, _) = small_resnet(feature_source="query"), small_resnet()
    images, labels = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8), torch.randint(0, 10, (4,))
    draws = draw_step(config.automix, 4, seed=0, step=0)
    for model in (ours, other):
        model(images, labels, draws, 0.1).total.backward()
    for (name, a), b in zip(ours.named_parameters(), other.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("modes", "feature_source"),
    [({}, "momentum"), ({"immediate_backward": True}, "momentum"), ({"joint_query": True}, "momentum"), ({}, "query")],
)
def test_clean_images_for_the_head_alone(modes, feature_source, monkeypatch):
    """Its gradient is the usual one; all others are those without a loss on clean images; evaluation is as usual."""
    images, labels = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8), torch.randint(0, 10, (4,))

    def trained(factor: float = 1.0, **automix) -> AutoMix:
        model, config = small_resnet(modes, feature_source=feature_source, **automix)
        monkeypatch.setattr(automix_module, "class_loss", lambda *arguments: factor * class_loss(*arguments))
        model(images, labels, draw_step(config.automix, 4, seed=0, step=0), 0.1).total.backward()
        return model

    ours, usual, without = trained(clean_images="head"), trained(), trained(factor=0.0)
    for (name, parameter), a, b in zip(ours.named_parameters(), usual.parameters(), without.parameters(), strict=True):
        if parameter.requires_grad:
            expected = a if "head_one" in name else b
            torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, usual.get_buffer(name)), name
    leaf = torch.randn(2, 3, 64, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(ours.eval().query(leaf, "one").sum(), leaf)
    assert gradient.any()


def test_the_judgement_of_a_part_is_the_mean_over_it():
    model, config = small_resnet(generator_share=0.6)
    images, labels = torch.randint(0, 256, (5, 64, 64, 3), dtype=torch.uint8), torch.randint(0, 10, (5,))
    draws = draw_step(config.automix, 5, seed=0, step=0)
    seen = []
    model.momentum.register_forward_hook(lambda module, arguments, logits: seen.append(logits))
    losses = model(images, labels, draws, 0.1)
    (logits,) = seen
    lam, partner = draws.mix_block.lam[0], draws.mix_block.partner[:3]
    entropy = torch.nn.functional.cross_entropy
    expected = lam * entropy(logits, labels[:3]) + (1 - lam) * entropy(logits, labels[partner])
    torch.testing.assert_close(losses.generator, expected)


def test_the_schedule_of_the_mix_block():
    config = tiny_config(epochs=4, automix={"generator_every": 2, "mix_block_until": 0.5})
    schedule = Schedule(config, 5)
    values = [schedule.at(step) for step in range(20)]
    assert [v.train_generator for v in values] == [True, False] * 5 + [False] * 10
    assert all(v.mix_lr == v.mask_loss_weight == 0 for v in values[10:]) and all(v.mix_lr > 0 for v in values[:10])
    usual = Schedule(dataclasses.replace(config, automix=dataclasses.replace(
        config.automix, generator_every=1, mix_block_until=1.0)), 5)  # fmt: skip
    assert all(usual.at(step).train_generator for step in range(20))
    assert [usual.at(step).lr for step in range(20)] == [v.lr for v in values]


def gpu_step(engine: dict, steps: int = 2, network: str = "resnet18", dtype=torch.bfloat16) -> list[torch.Tensor]:
    (network,) = (each for each in step_ways.NETWORKS if each.name == network)
    case = step_ways.Case(network, 8, torch.device("cuda"), dtype)
    torch.manual_seed(0)
    trained = step_ways.policy(case, engine=engine)
    for number in range(steps):
        trained.step(number)
    return [p.detach().clone() for p in trained.module.parameters()]


@pytest.mark.gpu
def test_compiled_regions_train_the_same_on_a_gpu():
    """After one step the weights have moved by the same, but for roundings as far as bfloat16's are from float32."""
    plain, compiled, float32 = (
        gpu_step({"compile": compile}, 1, "cifar_resnet18", dtype)
        for compile, dtype in ((False, torch.bfloat16), (True, torch.bfloat16), (False, torch.float32))
    )

    def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
        return float(sum((a - b).norm() ** 2 for a, b in zip(one, other, strict=True)) ** 0.5)

    assert distance(compiled, plain) < 2 * distance(plain, float32)


@pytest.mark.gpu
def test_deterministic_steps_repeat_to_the_bit_on_a_gpu(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        for one, other in zip(gpu_step({}), gpu_step({}), strict=True):
            assert torch.equal(one, other)
    finally:
        torch.use_deterministic_algorithms(False)


def train_deterministic(config, folder):
    result = train_with_engine(config, folder, 2)  # which asks for them itself, but for a warning only
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    return result


def test_deterministic_algorithms_are_all_that_a_step_needs(tmp_path):
    config = tiny_config(engine={"deterministic": True}, automix={"upsampling": ["nearest", "bilinear"]})
    (trained,) = run_ranks(1, train_deterministic, config, tmp_path)
    usual = tiny_config(automix={"upsampling": ["nearest", "bilinear"]})
    assert_same(trained, train_plain(usual, ranks=1, steps=2))
