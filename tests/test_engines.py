"""Settings of the engines: DeepSpeed's JSON, what contradicts it, the description, activation checkpoints, SyncBN."""

import json
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import timm
import torch
from automix_kernels import api
from engine_steps import ENGINES, STEPS_PER_EPOCH, engine_steps, start_engine
from ranks import run_ranks
from tiny import micro_batch, rank_draws, tiny_config, tiny_model

from automix_dist import distributed, engines, precision
from automix_dist.activation_checkpointing import checkpoint_blocks
from automix_dist.backbone import create_backbone, synchronize_batchnorm
from automix_dist.config import ConfigError, ModelConfig
from automix_dist.engines import deepspeed_settings, describe
from automix_dist.optimizer import build_optimizer, set_learning_rates
from automix_dist.schedules import Schedule

CPU = torch.device("cpu")


def with_json(tmp_path, values, **engine):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(values))
    return tiny_config(engine={"deepspeed_json": str(path), **engine}, optimizer={"clip_norm": 2.0})


def test_a_users_json_is_merged(tmp_path):
    added = {
        "wall_clock_breakdown": True,
        "zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_scatter": False},
    }
    same = {"train_batch_size": "auto", "gradient_clipping": 2.0, "bf16": {"enabled": False}}
    settings = deepspeed_settings(with_json(tmp_path, {**added, **same}, zero_stage=2), 2, CPU)
    assert settings["wall_clock_breakdown"] and not settings["zero_optimization"]["reduce_scatter"]
    assert settings["train_batch_size"] == 16 and settings["zero_optimization"]["stage"] == 2
    assert settings["gradient_clipping"] == 0.0  # the fused optimizer clips


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gradient_clipping": 1.0}, r"gradient_clipping to 1.0, but optimizer.clip_norm makes it 2.0"),
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization.stage to 3, but engine.zero_stage makes it 0"),
        ({"train_batch_size": 64}, r"train_batch_size to 64, but batch_size makes it 16"),
        ({"bf16": {"enabled": True}}, r"bf16.enabled to True, but engine.precision makes it False"),
        ({"optimizer": {"type": "Adam"}}, r"optimizer cannot be used here"),
        ({"elasticity": {"enabled": True}}, r"elasticity cannot be used here"),
        ({"zero_optimization": {"zero_hpz_partition_size": 2}}, r"zero_hpz_partition_size cannot be used here"),
        ([], r"expected a JSON object"),
    ],
)
def test_contradictions_name_both_values(tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        deepspeed_settings(with_json(tmp_path, values), 2, CPU)


def test_a_json_that_is_missing_or_torn_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.json.*No such file"):
        deepspeed_settings(tiny_config(engine={"deepspeed_json": "nowhere.json"}), 1, CPU)
    (tmp_path / "torn.json").write_text('{"zero_opt')
    with pytest.raises(ConfigError, match=r"torn.json.*cannot be read"):
        deepspeed_settings(tiny_config(engine={"deepspeed_json": str(tmp_path / "torn.json")}), 1, CPU)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"name": "ddp", "zero_stage": 2}, "engine.zero_stage = 2 has no meaning for engine.name = 'ddp'"),
        ({"name": "fsdp2", "offload_optimizer": True}, "engine.offload_optimizer"),
        ({"offload_optimizer": True}, "needs engine.zero_stage 1, 2 or 3"),
        ({"sync_batchnorm": True}, "needs GPUs"),
        ({"max_skipped_steps": 0}, "engine.max_skipped_steps"),
    ],
)
def test_impossible_engines_are_refused(engine, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(engine=engine)


def test_the_description_says_what_the_settings_come_to():
    config = tiny_config(batch_size=64, engine={"zero_stage": 2, "accumulation_steps": 2}, optimizer={"clip_norm": 5.0})
    text = "\n".join(describe(config, 4, CPU))
    assert "8 images x 4 rank(s) x 2 micro batch(es) = 64" in text and "at 5" in text and "ZeRO 2" in text
    assert "clipping: none" in "\n".join(describe(tiny_config(engine={"name": "ddp"}), 1, CPU))
    assert "of the Mix Block" not in text
    config = tiny_config(optimizer={"lr": 0.001, "mix_lr": 0.01, "mix_min_lr": 0.0005})
    assert "learning rate of the Mix Block: from 0.01 to 0.0005, without warm-up" in describe(config, 1, CPU)


@pytest.mark.parametrize(("major", "expected"), [(7, torch.float32), (8, torch.bfloat16), (9, torch.bfloat16)])
def test_automatic_precision_is_what_the_gpu_computes_with(major, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.version, "hip", None)
    auto = tiny_config(engine={"device": "auto"}).engine
    assert precision.autocast_dtype(auto, torch.device("cuda")) is expected
    assert precision.autocast_dtype(auto, CPU) is torch.float32


def test_kernels_run_where_the_gpu_and_the_packages_let_them(monkeypatch):
    """A GPU of an older generation, one that will do, and one without the package triton."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(torch.version, "hip", None)
    auto, asked = (tiny_config(engine={"device": "auto", "kernels": kind}) for kind in ("auto", "triton"))
    monkeypatch.setattr(engines, "autocast_name", lambda *_: "float32")
    for capability, installed, kernels, refused in (
        ((7, 5), True, "reference", "compute capability 8.0 or higher, which a GPU has not"),
        ((8, 0), False, "reference", "the package triton is not installed"),
        ((8, 0), True, "triton", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        monkeypatch.setattr(api, "HAS_TRITON", installed)
        assert engines.summary(auto, 1, torch.device("cuda"))[-1] == f"kernels {kernels}"
        if refused is None:
            assert distributed.resolve_device(asked.engine) == "cuda"
        else:
            with pytest.raises(ConfigError, match=f"engine.kernels = 'triton' cannot run: .*{refused}"):
                distributed.resolve_device(asked.engine)


def test_a_gpu_that_torch_cannot_use_is_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed, "NVIDIA_DEVICES", f"{tmp_path}/nvidia[0-9]*")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    auto = tiny_config(engine={"device": "auto"}).engine
    (tmp_path / "nvidiactl").touch()
    assert distributed.resolve_device(auto) == "cpu"
    (tmp_path / "nvidia3").touch()  # of a container that was given one of several
    with pytest.raises(ConfigError, match=r"torch (is a CPU build|was built for CUDA).*engine\.device=cpu"):
        distributed.resolve_device(auto)
    assert distributed.resolve_device(tiny_config(engine={"device": "cpu"}).engine) == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert distributed.resolve_device(auto) == "cpu"


@pytest.mark.parametrize("engine", [{"name": "ddp"}, {"zero_stage": 2}])
def test_the_description_says_when_gradients_are_reduced(engine):
    def reduction(**settings):
        config = tiny_config(engine={"device": "cuda", "precision": "bfloat16", **engine, **settings})
        return next(line for line in describe(config, 4, torch.device("cuda")) if line.startswith("reduction:"))

    assert reduction().endswith("overlapping with the backward pass")
    assert reduction(compile=True).endswith("overlapping with the backward pass, after each compiled region")
    assert reduction(compile=True, cuda_graph=True).endswith(", after the backward pass")


def effective_deepspeed(config):
    """What DeepSpeed itself says that it does."""
    engine = start_engine(config)[2].deepspeed
    return (
        engine.gradient_clipping(),
        engine.train_batch_size(),
        engine.zero_optimization_stage(),
        engine.zero_reduce_bucket_size(),
    )


def waits(config) -> int:
    """How often DeepSpeed has its accelerator wait in some steps; it does so by default for its own clock."""
    from deepspeed.accelerator import get_accelerator

    process, model, engine = start_engine(config)
    with mock.patch.object(type(get_accelerator()), "synchronize") as synchronize:
        engine_steps(config, process, model, engine, 0, 4)
    return synchronize.call_count


def test_no_step_waits_for_deepspeeds_clock():
    assert run_ranks(1, waits, tiny_config(engine={"zero_stage": 0})) == [0]


def test_what_the_description_says_is_what_deepspeed_does():
    config = tiny_config(engine={"zero_stage": 2, "bucket_size": 12346}, optimizer={"clip_norm": 5.0})
    assert run_ranks(1, effective_deepspeed, config) == [(0.0, 16, 2, 12346)]


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_activation_checkpointing_changes_nothing_but_memory(name):
    """Gradients and BatchNorm's running statistics: a block that is computed twice must not count its batch twice."""
    kwargs = {"img_size": 32, "depth": 3} if name.startswith("vit") else {}
    results = []
    for again in (False, True):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=7, **kwargs).train()
        calls = []
        if again:
            assert checkpoint_blocks(model) >= 3
            first = next(m for m in model.modules() if type(m).__name__.endswith("Block"))
            next(first.children()).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        assert len(calls) == (2 if again else 0)
        results.append(({n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())))
    for plain, again in zip(*results, strict=True):
        assert plain.keys() == again.keys()
        for key in plain:
            assert torch.equal(plain[key], again[key]), key


def test_activation_checkpointing_needs_blocks():
    with pytest.raises(ConfigError, match="finds no blocks"):
        checkpoint_blocks(torch.nn.Sequential(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_synchronized_batchnorm_keeps_weights_and_activations(name):
    """timm's BatchNorm layers may hold the activation; evaluation, which synchronises nothing, must not change."""
    backbone = create_backbone(ModelConfig(backbone=name), -2, 32).eval()
    images = torch.randn(2, 3, 32, 32)
    expected, names = backbone(images), list(backbone.state_dict())
    converted = synchronize_batchnorm(backbone)
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in converted.modules())
    assert not any(type(m) is torch.nn.BatchNorm2d for m in converted.modules())
    assert list(converted.state_dict()) == names
    torch.testing.assert_close(converted(images), expected)


def momentum_after(config, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's shards of the momentum encoder after so many steps, and what float64 makes of the query encoder's."""
    process, model, engine = start_engine(config)
    pairs = list(zip(model.momentum.parameters(), model.query.parameters(), strict=True))
    truth = [shard(k).double() for k, _ in pairs]
    for step in range(steps):
        engine_steps(config, process, model, engine, step, step + 1)
        coefficient = Schedule(config, STEPS_PER_EPOCH).at(step).momentum
        truth = [coefficient * k + (1 - coefficient) * shard(q) for k, (_, q) in zip(truth, pairs, strict=True)]
    return [(shard(k).clone(), expected) for (k, _), expected in zip(pairs, truth, strict=True)]


def shard(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it. DeepSpeed's shards are all of one size; what fills the last one up was never set."""
    if hasattr(parameter, "to_local"):
        return parameter.to_local().detach()
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    part = parameter.ds_tensor.detach()
    return part[: max(parameter.ds_numel - int(os.environ["RANK"]) * part.numel(), 0)]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_the_momentum_encoder_follows_a_float64_restatement(engine):
    steps = 60 if engine in ("zero3", "offload3") else 120  # stage 3 gathers every weight in every pass: slow on gloo
    config = tiny_config(epochs=100, engine=ENGINES[engine], automix={"momentum": 0.99, "momentum_end": 0.999})
    for parameters in run_ranks(2, momentum_after, config, steps):
        assert sum(got.numel() for got, _ in parameters) > 1000
        for got, expected in parameters:
            torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_four_ranks_agree_with_one_process(engine, tmp_path):
    from engine_steps import assert_same, train_plain, train_with_engine

    config = tiny_config(engine={**ENGINES[engine], "accumulation_steps": 1}, optimizer={"clip_norm": 0.5})
    ranks = run_ranks(4, train_with_engine, config, tmp_path, 4)
    assert_same(ranks[0], train_plain(config, ranks=4, steps=4))
    assert all(torch.equal(ranks[0][n], r[n]) for r in ranks[1:] for n in r)


def test_a_fused_optimizer_is_torchs_plain_one():
    """The same weights after a few steps as torch's unfused optimizers on the same gradients."""
    for name, extra in (("sgd", {}), ("adamw", {"mix_momentum": None, "lr": 0.01})):
        config = tiny_config(optimizer={"name": name, **extra})
        models = [tiny_model(config) for _ in range(2)]
        ours = build_optimizer(models[0], config.optimizer)
        plain = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
        groups = [{**g, "fused": False} for g in build_optimizer(models[1], config.optimizer).param_groups]
        optimizers = [ours, plain(groups, lr=0.1)]
        for step in range(3):
            for model, optimizer in zip(models, optimizers, strict=True):
                set_learning_rates(optimizer, Schedule(config, 4).at(step))
                optimizer.zero_grad()
                model(*micro_batch(step, 0, 8), rank_draws(config, step, 0, 8), 0.1).total.backward()
                optimizer.step()
        for (key, got), expected in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "1"}, 1),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}, 2),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE = 2, but not MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two': expected a whole number"),
        (
            {"WORLD_SIZE": "2", "RANK": "-1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"},
            "RANK = '-1': expected a whole",
        ),
    ],
)
def test_half_of_a_launcher_s_environment_is_told(environment, ranks, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(ranks, int):
        assert distributed.launched_ranks() == ranks
    else:
        with pytest.raises(ConfigError, match=ranks):
            distributed.launched_ranks()


def statistics_after(config, steps: int) -> dict[str, torch.Tensor]:
    process, model, engine = start_engine(config)
    model.train()
    for step in range(steps):
        size = config.batch_size // 2
        engine(*micro_batch(step, process.rank, size), rank_draws(config, step, process.rank, size), 0.1)
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}


@pytest.mark.parametrize("engine", ["zero0", "zero3", "ddp", "fsdp2"])
def test_batchnorm_statistics_are_each_rank_s_own(engine):
    """Of forward passes alone: the weights stay the same, and each rank's statistics are those of its images."""
    config = tiny_config(engine=ENGINES[engine])
    for rank, got in enumerate(run_ranks(2, statistics_after, config, 3)):
        model = tiny_model(config).train()
        for step in range(3):
            size = config.batch_size // 2
            with torch.no_grad():
                model(*micro_batch(step, rank, size), rank_draws(config, step, rank, size), 0.1)
        for name, buffer in got.items():
            torch.testing.assert_close(buffer, model.get_buffer(name), rtol=1e-5, atol=1e-6, msg=name)
