"""What `automix bench step` measures: the networks, and the ways to train them, each as one function of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from automix_kernels import api as kernels
from torch import Tensor, nn
from torch.nn import functional as F

from automix_dist.backbone import create_backbone, create_timm_model
from automix_dist.bench.published import PublishedStep
from automix_dist.captured_step import capture_steps
from automix_dist.config import IMAGENET_MEAN, IMAGENET_STD, POLICIES, Config
from automix_dist.config_file import from_dict
from automix_dist.convolutions import lay_out, pad_stems
from automix_dist.draws import draw_step
from automix_dist.fused_batchnorm import fuse_batchnorms
from automix_dist.model import build_model
from automix_dist.momentum import MomentumUpdate
from automix_dist.optimizer import build_optimizer
from automix_dist.policy import needed_feature
from automix_dist.schedules import Schedule

POOL = 4
"""Different batches that the steps take in turn."""


@dataclass(frozen=True)
class Network:
    name: str
    backbone: str
    feature: int
    size: int
    batch: int
    """On a GPU."""
    classes: int = 1000
    small_stem: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}@{self.size}"

    def config(self, *, policy: str = "automix", engine: dict | None = None, **automix: Any) -> Config:
        sections = {
            "model": {"backbone": self.backbone, "small_stem": self.small_stem},
            "data": {"image_size": self.size},
            "automix": {"feature": self.feature, **automix},
            "policy": {"name": policy},
            "engine": engine or {},
        }
        return from_dict(sections)


NETWORKS = (  # those that targets name come first
    Network("resnet50", "resnet50", -2, 224, 256),
    Network("cifar_resnet18", "resnet18", -2, 32, 100, classes=100, small_stem=True),
    Network("resnet18", "resnet18", -2, 224, 256),
    Network("convnext_tiny", "convnext_tiny", -2, 224, 128),
    Network("deit_small", "deit_small_patch16_224", 5, 224, 128),
    Network("swin_tiny", "swin_tiny_patch4_window7_224", -2, 224, 128),
)


class Case:
    """A network's inputs on the device, shared by all ways of training it."""

    def __init__(self, network: Network, batch: int, device: torch.device, dtype: torch.dtype):
        self.network, self.batch, self.device, self.dtype = network, batch, device, dtype
        self.name = network.label
        generator = torch.Generator().manual_seed(0)
        shape = (POOL, batch, network.size, network.size, 3)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
        self.labels = torch.randint(0, network.classes, (POOL, batch), generator=generator).to(device)
        self.mean, self.std = (torch.tensor(v, device=device) for v in (IMAGENET_MEAN, IMAGENET_STD))

    def normalized(self, step: int, dtype: torch.dtype) -> Tensor:
        return kernels.normalize(self.images[step % POOL], self.mean, self.std, dtype)

    def autocast(self, enabled: bool = True) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=enabled and self.dtype != torch.float32)


@dataclass
class Trained:
    """A model ready to train: what one step computes and what follows its backward pass."""

    module: nn.Module
    loss: Callable[[int], Tensor]
    """The loss to differentiate, of the step with this number."""
    optimizer: torch.optim.Optimizer
    after: Callable[[], None] = lambda: None
    period: int = 1
    """After so many steps they repeat; what is measured is their mean."""

    def cycle(self, number: int) -> None:
        """The steps of one period."""
        for step in range(number * self.period, (number + 1) * self.period):
            self.step(step)

    def step(self, number: int) -> None:
        self.loss(number).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.after()


@dataclass(frozen=True)
class Way:
    """A way to train; `twin` names the one with the same operations, neither compiled, recorded nor padded, whose FLOPs
    are counted for it."""

    name: str
    build: Callable[[Case], Trained]
    twin: str = ""
    unasked: Literal["always", "gpu", "never"] = "always"
    """Where it takes part without being named."""
    turn: int = 1
    """Ways of the same turn are measured together; what decides has the first ones."""
    graph: bool = False
    """A CUDA graph, whose memory is set aside once: the peak of a step would say nothing. Measured alone."""


class Vanilla(nn.Module):
    """A timm model with normalisation and loss, called as the models of a run are, so that CapturedStep takes it."""

    class Losses(NamedTuple):
        total: Tensor

    loss_scale = None

    def __init__(self, network: nn.Module, case: Case):
        super().__init__()
        self.network, self.case = network, case

    def forward(self, images: Tensor, labels: Tensor, draws: Any = None, mask_loss_weight: Any = None) -> Losses:
        with self.case.autocast():
            pixels = lay_out(kernels.normalize(images, self.case.mean, self.case.std, self.case.dtype))
            return self.Losses(F.cross_entropy(self.network(pixels).float(), labels))


def vanilla(
    case: Case,
    *,
    channels_last: bool = False,
    compiler: str = "",
    padded: bool = False,
    fused: bool = False,
    graph: bool = False,
) -> Trained:
    """Plain training; `channels_last` is the layout of the weights, `compiler` a mode of torch.compile."""
    network = create_timm_model(case.network.config().model, case.network.size, case.network.classes)
    if padded:
        pad_stems(network)
    if fused:
        fuse_batchnorms(network)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = Vanilla(network.to(case.device, memory_format=layout), case).train()
    if compiler:
        network.compile(mode=compiler, dynamic=False)
    if graph:
        capture_steps(model)

    def loss(step: int) -> Tensor:
        return model(case.images[step % POOL], case.labels[step % POOL], ()).total

    return Trained(
        model, loss, torch.optim.SGD(model.parameters(), case.network.config().optimizer.lr, 0.9, fused=True)
    )


def policy(case: Case, name: str = "automix", engine: dict | None = None, **settings: Any) -> Trained:
    """A policy's step as `automix train` makes it, but for the engine; AutoMix unless another one is named."""
    config = case.network.config(policy=name, engine=engine, **settings)
    backbone = create_backbone(config.model, needed_feature(config), case.network.size)
    model = build_model(config, backbone, case.network.classes, case.dtype).to(case.device).train()
    if config.engine.compile:
        model.compile_regions()
    if config.engine.cuda_graph:
        capture_steps(model)
    update, schedule = MomentumUpdate(model), Schedule(config, steps_per_epoch=1000)
    skipped = torch.zeros((), device=case.device)  # as every engine hands it over

    def loss(step: int) -> Tensor:
        images, labels, values = case.images[step % POOL], case.labels[step % POOL], schedule.at(step)
        draws = model.draw(images, seed=0, step=step, train_generator=values.train_generator)
        return model(images, labels, draws, values.mask_loss_weight).total

    optimizer, period = build_optimizer(model, config.optimizer), config.automix.generator_every
    return Trained(model, loss, optimizer, lambda: update(config.automix.momentum, skipped), period)


def published(case: Case, *, autocast: bool = False) -> Trained:
    config = case.network.config()
    backbone = create_backbone(config.model, config.automix.feature, case.network.size)
    model = PublishedStep(backbone, case.network.classes, config.automix).to(case.device).train()

    def loss(step: int) -> Tensor:
        draws = draw_step(config.automix, case.batch, seed=0, step=step)
        lams, partners = draws.lam[:, 0].tolist(), draws.partner
        images = case.normalized(step, torch.float32).contiguous()
        with case.autocast(autocast):
            return model(images, case.labels[step % POOL], lams, partners)

    optimizer = model.optimizer(config.optimizer.lr)
    return Trained(model, loss, optimizer, lambda: model.update_momentum(config.automix.momentum))


def variant(twin: str, suffix: str, turn: int, build: Callable[[Case], Trained], graph: bool = False) -> Way:
    """The twin's operations, made to run in another manner."""
    return Way(f"{twin}, {suffix}", build, twin, "gpu", turn, graph)


TOGETHER, COMPILED, PADDED = {"immediate_backward": False}, {"compile": True}, {"padded_stem": True}
RECORDED, FUSED, JOINT = {"cuda_graph": True}, {"fused_batchnorm": True}, {"joint_query": True}
channels_last, cut = partial(vanilla, channels_last=True), partial(policy, feature_pass="cut")
# What decides comes first, and of that what needs no compiler: turn 1 eager, 2 with fused BatchNorm, 3 recorded; 4
# compiled, 5 compiled and recorded; then the rest, and last what compiles for many minutes.
WAYS = (
    Way("vanilla", vanilla),
    Way("vanilla, channels-last", channels_last, unasked="gpu"),
    variant("vanilla", "channels-last, fused BatchNorm", 2, partial(channels_last, fused=True)),
    variant("vanilla", "channels-last, compiled", 4, partial(channels_last, compiler="default")),
    variant("vanilla", "channels-last, CUDA graph", 3, partial(channels_last, graph=True), graph=True),
    variant(
        "vanilla",
        "channels-last, fused BatchNorm, CUDA graph",
        3,
        partial(channels_last, fused=True, graph=True),
        True,
    ),
    variant(
        "vanilla",
        "channels-last, compiled, CUDA graph",
        5,
        partial(channels_last, compiler="default", graph=True),
        True,
    ),
    # Inductor's own CUDA graphs; as timm's training script with --channels-last and --torchcompile-mode. The last turn:
    # its compilation takes many minutes, and none is cut off.
    variant("vanilla", "channels-last, max-autotune", 8, partial(channels_last, compiler="max-autotune"), graph=True),
    variant("vanilla", "channels-last, padded stem", 6, partial(channels_last, padded=True)),
    variant("vanilla", "compiled", 7, partial(vanilla, compiler="default")),
    variant(
        "vanilla",
        "channels-last, fused BatchNorm, compiled",
        7,
        partial(channels_last, fused=True, compiler="default"),
    ),
    Way("AutoMix", policy),
    Way("AutoMix, one backward", partial(policy, engine=TOGETHER)),
    Way("AutoMix, cut", cut),
    Way("AutoMix, cut, one backward", partial(cut, engine=TOGETHER)),
    variant("AutoMix, cut", "fused BatchNorm", 2, partial(cut, engine=FUSED)),
    variant("AutoMix, cut", "compiled", 4, partial(cut, engine=COMPILED)),
    variant("AutoMix, cut", "compiled, CUDA graph", 5, partial(cut, engine=COMPILED | RECORDED), graph=True),
    variant("AutoMix, cut", "CUDA graph", 3, partial(cut, engine=RECORDED), graph=True),
    variant("AutoMix, cut", "fused BatchNorm, CUDA graph", 3, partial(cut, engine=FUSED | RECORDED), graph=True),
    variant(
        "AutoMix, cut",
        "fused BatchNorm, joint query, CUDA graph",
        3,
        partial(cut, engine=FUSED | JOINT | RECORDED),
        True,
    ),
    variant("AutoMix, cut", "fused BatchNorm, compiled", 7, partial(cut, engine=FUSED | COMPILED)),
    variant("AutoMix, cut", "fused BatchNorm, joint query", 6, partial(cut, engine=FUSED | JOINT)),
    Way("AutoMix, cut, joint query", partial(cut, engine=JOINT), unasked="gpu", turn=6),
    variant("AutoMix, cut", "padded stem", 6, partial(cut, engine=PADDED)),
    variant("AutoMix, cut", "one backward, compiled", 7, partial(cut, engine=COMPILED | TOGETHER)),
    # Not the published method (docs/throughput.md).
    Way("inexact: query's features", partial(policy, feature_source="query"), unasked="never", turn=6),
    Way("inexact: clean images for the head", partial(cut, clean_images="head"), unasked="never", turn=6),
    Way("inexact: half judged", partial(cut, generator_share=0.5), unasked="never", turn=6),
    Way("inexact: every second step judged", partial(cut, generator_every=2), unasked="never", turn=6),
    Way("inexact: Mix Block at rest", partial(cut, mix_block_until=1e-9), unasked="never", turn=6),  # from step 1 on
    Way("published, float32", published),
    Way("published, autocast", partial(published, autocast=True), unasked="gpu"),
    Way("samix", partial(policy, name="samix", lam_concat=False, upsampling=["bilinear"]), unasked="gpu", turn=6),
    *(
        # AttentiveMix needs a teacher's weights from a file or the network.
        Way(name, partial(policy, name=name), unasked="never" if name == "attentivemix" else "gpu", turn=6)
        for name in POLICIES
        if name not in ("automix", "samix")
    ),
)
