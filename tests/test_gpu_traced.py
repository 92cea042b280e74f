"""A training step on a GPU, without one: traced with tensors that claim to be there and hold nothing.

Such a tensor has no values, so whatever would make the host wait for the GPU (`item`, a boolean index, a branch on a
number) raises, as do mixed devices and dtypes. Losses are not differentiated: autograd asks for a real device. What the
kernels compute is for test_kernels_*.
"""

from types import SimpleNamespace

import pytest
import torch
from automix_kernels import api as kernels
from safetensors.torch import save_file
from tiny import tiny_config
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from automix_dist.backbone import create_backbone, create_timm_model
from automix_dist.batchnorm import RunningStatistics
from automix_dist.config import IMAGENET_MEAN, IMAGENET_STD, POLICIES, AutoMixConfig, Config, ModelConfig
from automix_dist.draws import draw_step
from automix_dist.engines import Engine
from automix_dist.mix_block import MixBlock
from automix_dist.model import build_model
from automix_dist.momentum import MomentumUpdate
from automix_dist.optimizer import build_optimizer
from automix_dist.trainer import Tally

BATCH, SIZE = 8, 64
LEARNED = {
    "automix": {},
    "samix": {"lam_concat": False, "norm": "none"},
    "adautomix": {"lam_concat": False},
}
DIFFERENTIATING = {"adautomix", "puzzlemix"}
"""Policies that differentiate within the forward pass."""


class Operators(TorchDispatchMode):
    """Notes the name, the arguments and the result of each operator."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.ran.append((operator.name(), args, result))
        return result


@pytest.fixture
def gpu(monkeypatch):
    """A mode in which tensors can be on "cuda"."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    return FakeTensorMode(allow_non_fake_inputs=True)


class Plain(Engine):
    """One GPU and no library. What differentiating would leave is given."""

    sharded = False

    def backward(self, loss):
        self._micro_step = 1
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)

    def _gradients(self):
        return [p.grad for p in self.module.parameters() if p.requires_grad]

    def _step(self):
        self.optimizer.step()


def model_of(config: Config, backbone: str) -> torch.nn.Module:
    feature = config.automix.feature if config.policy.name in LEARNED else None
    return build_model(config, create_backbone(ModelConfig(backbone), feature, SIZE), 10, torch.bfloat16)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.empty(BATCH, SIZE, SIZE, 3, dtype=torch.uint8, device="cuda")
    return images, torch.empty(BATCH, dtype=torch.int64, device="cuda")


def trace(gpu: FakeTensorMode, name: str, backbone: str = "resnet18", **sections) -> Operators:
    """A training step and an evaluation of a policy's model; LAMB, as torch cannot trace its own fused optimizers."""
    optimizer = {"name": "lamb", "clip_norm": 1.0, "mix_momentum": None}
    sections = {"policy": {"name": name}, "optimizer": optimizer, "engine": {"immediate_backward": False}} | sections
    config = tiny_config(**sections)
    model = model_of(config, backbone)
    with gpu:
        model.to_empty(device="cuda").train()
        images, labels = inputs()
        statistics, update_momentum = RunningStatistics(model), MomentumUpdate(model)
        process = SimpleNamespace(device=torch.device("cuda"))
        tally = Tally(process, model.Losses._fields)
        engine = Plain(model, build_optimizer(model, config.optimizer), config, process)
        with Operators() as operators:
            statistics.keep()
            losses = model(images, labels, model.draw(images, seed=0, step=0), 0.1)
            engine.backward(losses.total)
            skipped = engine.step()
            statistics.restore(skipped)
            update_momentum(0.99, skipped)
            tally.add(torch.stack([part.detach() for part in losses]), engine.grad_norm, skipped)
            logits = model(images)
    assert all(each.device.type == "cuda" and each.dtype == torch.float32 for each in (*losses, *logits, skipped))
    return operators


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(create_timm_model(ModelConfig("test_resnet"), 64).state_dict(), path)
    return {"teacher": "test_resnet", "weights": str(path), "teacher_size": 64}


def test_a_value_that_the_host_asks_for_is_noticed(gpu):
    with gpu, pytest.raises(DataDependentOutputException):
        torch.ones((), device="cuda").item()


@pytest.mark.parametrize("name", sorted(set(POLICIES) - DIFFERENTIATING))
def test_no_policy_waits_for_the_gpu(name, gpu, teacher):
    """And convolutions get bfloat16; those that read images, channels-last ones, and weights to match."""
    settings = {"attentivemix": teacher, "switch": {"policies": [{"name": "cutmix"}, {"name": "mixup"}]}}.get(name, {})
    backbone = "vit_tiny_patch16_224" if name == "transmix" else "resnet18"
    operators = trace(gpu, name, backbone, policy={"name": name, "settings": settings}, automix=LEARNED.get(name, {}))
    read = [args[:2] for operator, args, _ in operators.ran if operator == "aten::convolution"]
    assert read and all(each.dtype == torch.bfloat16 for pair in read for each in pair)
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in read if images.shape[1] == 3)
    assert all(
        weight.is_contiguous(memory_format=torch.channels_last)
        for images, weight in read
        if images.is_contiguous(memory_format=torch.channels_last)
    )


@pytest.mark.parametrize("name", sorted(set(POLICIES) - DIFFERENTIATING))
def test_forward_passes_copy_nothing_from_the_host(name, gpu, teacher):
    """As a CUDA graph asks: what comes from the host is copied before."""
    settings = {"attentivemix": teacher, "switch": {"policies": [{"name": "cutmix"}, {"name": "mixup"}]}}.get(name, {})
    sections = {"policy": {"name": name, "settings": settings}, "automix": LEARNED.get(name, {})}
    config = tiny_config(engine={"immediate_backward": False}, **sections)
    model = model_of(config, "vit_tiny_patch16_224" if name == "transmix" else "resnet18")
    with gpu:
        model.to_empty(device="cuda").train()
        images, labels = inputs()
        draws, weight = model.draw(images, seed=0, step=0), torch.empty((), device="cuda")
        with Operators() as operators:
            model(images, labels, draws, weight)
    for operator, args, result in operators.ran:
        results = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        assert all(each.device.type == "cuda" for each in results), operator
        tensors = [each for each in tree_leaves(args) if isinstance(each, torch.Tensor)]
        copies = operator in ("aten::copy_", "aten::_to_copy")  # elsewhere a scalar goes along as an argument
        assert all(each.device.type == "cuda" or (each.ndim == 0 and not copies) for each in tensors), operator


@pytest.mark.parametrize(
    "sections",
    [
        {"automix": {"mask_adjust": 1.0, "upsampling": ["bilinear"], "norm": "layer", "mask_loss": "l2_variance"}},
        {"automix": {"feature_source": "query", "generator_share": 0.5, "lam_concat": False, "norm": "batch"}},
        {"automix": {"feature_pass": "cut"}, "loss": {"name": "binary_cross_entropy", "label_smoothing": 0.1}},
    ],
)
def test_no_setting_of_automix_waits_for_the_gpu(sections, gpu):
    trace(gpu, "automix", **sections)


KERNELS = {
    "automix::mix_attention": 2,
    "automix::mix_attention_backward": 2,
    "aten::slice_backward": 2,
    "aten::select_backward": 2,
}
"""Launches of operators that take more than one."""


def launches(operators: Operators) -> int:
    """As a GPU would count them: views and new memory launch nothing."""
    count = 0
    for name, args, result in operators.ran:
        read, written = (
            {each.untyped_storage()._cdata for each in tree_leaves(tensors) if isinstance(each, torch.Tensor)}
            for tensors in (args, result)
        )
        is_view = written <= read and not name.endswith("_")
        if not is_view and "empty" not in name:
            count += KERNELS.get(name, 1)
    return count


def test_the_block_takes_few_launches(monkeypatch):
    """Both draws' masks and mixed images and the gradients, under autocast, with the operators' definitions."""
    pytest.importorskip("triton")
    monkeypatch.setattr(kernels, "_takes_triton", lambda *_: True)
    config, mean, std = AutoMixConfig(), torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    block, draws = MixBlock(16, config), draw_step(config, 4, seed=0, step=0)
    features = torch.randn(4, 16, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last)
    images = torch.randint(0, 256, (4, 6, 6, 3), dtype=torch.uint8)
    grads = [torch.randn(4, 3, 6, 6).bfloat16(), *torch.randn(2, 4)]
    with Operators() as forward, torch.autocast("cpu", torch.bfloat16):
        logits = block(features, draws.partner, draws.lam)
        outputs, _ = (
            kernels.mask_blend(each, images, draw.partner, draw.lam, mean, std, "nearest", None, torch.bfloat16)
            for each, draw in zip(logits, (draws.mix_block, draws.classifier), strict=True)
        )
    with Operators() as backward:
        torch.autograd.grad(outputs, list(block.parameters()), grads)
    # The weights, a product, two of attention, two blends.
    assert launches(forward) <= 6, [name for name, *_ in forward.ran]
    # The blend, two of attention, a product, the weights.
    assert launches(backward) <= 5, [name for name, *_ in backward.ran]


@pytest.mark.parametrize("joint", [False, True])
def test_fused_batchnorms_are_operators_on_the_gpu(gpu, joint):
    """Of every pass in training, in bfloat16: nothing is left of BatchNorm, ReLU and addition."""
    engine = {"immediate_backward": False, "fused_batchnorm": True, "joint_query": joint}
    operators = trace(gpu, "automix", engine=engine)
    ran = [args for name, args, _ in operators.ran if name == "automix::batch_norm_relu"]
    # The momentum encoder on clean and on mixed images, the query encoder, and both for logits: nobody calls `eval`.
    passes = 2 + (1 if joint else 2) + 2
    # Of 20 norms all but those of the three shortcuts with a convolution.
    assert len(ran) == 17 * passes == sum(name == "automix::batch_moments" for name, *_ in operators.ran)
    assert sum(residual is not None for *_, residual in ran) == 8 * passes
    assert {len(mean) for _, mean, *_ in ran} == ({1, 2} if joint else {1})
    assert {x.dtype for x, *_ in ran} == {torch.bfloat16}
    maps = [name for name, _, result in operators.ran if isinstance(result, torch.Tensor) and result.ndim == 4]
    assert not [name for name in maps if "aten" in name and "relu" in name]


def test_automix_runs_its_kernels_on_the_gpu(gpu):
    operators = trace(gpu, "automix")
    ran = [(operator, args, result) for operator, args, result in operators.ran if operator.startswith("automix::")]
    names = [name.removeprefix("automix::") for name, *_ in ran]
    assert names == [
        "normalize", "split_weights", "mix_attention", "mask_blend", "mask_blend", "momentum_update", "normalize"
    ]  # fmt: skip
    clean, projection, mixed = ran[0][2], ran[2][1][0], ran[3][2][0]
    assert clean.dtype == torch.bfloat16 and clean.is_contiguous(memory_format=torch.channels_last)
    assert projection.dtype == torch.bfloat16
    assert mixed.dtype == torch.bfloat16 and mixed.is_contiguous(memory_format=torch.channels_last)
