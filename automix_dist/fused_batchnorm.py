"""BatchNorm, the addition of a block's shortcut and the ReLU behind them as one operation (engine.fused_batchnorm).

Layers change their class and keep their parameters, buffers and names: a checkpoint of a network with them is one of a
network without. What is fused is what timm's networks are made of: a BatchNorm and the ReLU that follows it, in a
ResNet's stem and blocks, in a Sequential, or inside timm's own BatchNormAct2d; with a shortcut in between in a ResNet's
block that has neither attention nor stochastic depth. Any other BatchNorm stays as it is.
"""

from collections.abc import Iterator
from itertools import pairwise

from automix_kernels import api as kernels
from timm.layers import BatchNormAct2d
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from automix_dist.config import ConfigError


class FusedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d and the ReLU behind it; in evaluation these are operations of their own."""

    batches = 1
    """How many batches, each with statistics of its own, lie one behind the other in what training hands over."""
    implementation = "auto"
    """Of the kernel: "auto", "triton" or "reference"."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """[B, C, H, W], and a shortcut of the same shape to add in front of the ReLU."""
        if self.training:
            return kernels.batch_norm_relu(
                x,
                self.weight,
                self.bias,
                self.running_mean,
                self.running_var,
                self.num_batches_tracked,
                self.momentum,
                self.eps,
                shortcut,
                self.batches,
                implementation=self.implementation,
            )
        y = super().forward(x)
        return F.relu(y if shortcut is None else y + shortcut, inplace=True)


class FusedBasicBlock(BasicBlock):
    """A block whose ReLUs are in its norms, and whose activations are Identities."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.aa(self.act1(self.bn1(self.conv1(x))))
        return self.act2(self.bn2(self.conv2(x), shortcut))


class FusedBottleneck(Bottleneck):
    """As FusedBasicBlock."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.aa(self.act2(self.bn2(self.conv2(x))))
        return self.act3(self.bn3(self.conv3(x), shortcut))


BLOCKS = {BasicBlock: (FusedBasicBlock, 2), Bottleneck: (FusedBottleneck, 3)}
"""timm's blocks, what they become, and how many norms and activations they have."""


def fuse_batchnorms(model: nn.Module, implementation: str = "auto") -> None:
    """Fuse the BatchNorms of a timm model with the ReLUs that follow them, where that is known.

    `implementation` is the kernel's: "auto", "triton" or "reference".

    Raises ConfigError if there is none to fuse.
    """
    for module in list(model.modules()):
        for norm, activation in _norms_with_activation(module):
            if type(norm) is nn.BatchNorm2d and _is_known(norm) and type(getattr(module, activation)) is nn.ReLU:
                norm.__class__ = FusedBatchNorm2d
                setattr(module, activation, nn.Identity())
    for module in list(model.modules()):
        if type(module) is BatchNormAct2d and _is_known(module) and isinstance(module.drop, nn.Identity):
            if type(module.act) is nn.ReLU:
                module.__class__ = FusedBatchNorm2d
        elif type(module) in BLOCKS:
            _fuse_shortcut(module)
    fused = [module for module in model.modules() if isinstance(module, FusedBatchNorm2d)]
    if not fused:
        raise ConfigError(
            "engine.fused_batchnorm finds no BatchNorm2d with a ReLU behind it in this backbone: set it to false"
        )
    for norm in fused:
        norm.implementation = implementation


def describe_fused(model: nn.Module) -> str:
    """How many of a model's BatchNorms are fused, for people to read; empty if none is."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    fused = sum(isinstance(norm, FusedBatchNorm2d) for norm in norms)
    return f"{fused} of {len(norms)} BatchNorms fused with the ReLU behind them" if fused else ""


def _is_known(norm: nn.Module) -> bool:
    """Whether a norm has all that the operation needs, and nothing that it does not know."""
    return norm.affine and norm.track_running_stats and norm.momentum is not None


def _norms_with_activation(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules whose output nothing but an activation of this module reads, and the activation's name."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        names = list(module._modules)
        yield from ((module.get_submodule(norm), activation) for norm, activation in pairwise(names))
    elif isinstance(module, ResNet):
        yield module.bn1, "act1"
    elif type(module) in BLOCKS and isinstance(module.drop_block, nn.Identity):
        _, last = BLOCKS[type(module)]
        yield from ((module.get_submodule(f"bn{n}"), f"act{n}") for n in range(1, last))


def _fuse_shortcut(block: nn.Module) -> None:
    """Fuse the end of a block, whose other norms have been seen to, if it is a norm, its shortcut and a ReLU alone."""
    fused, last = BLOCKS[type(block)]
    norm, activation = block.get_submodule(f"bn{last}"), f"act{last}"
    if (
        block.se is None
        and block.drop_path is None
        and isinstance(block.drop_block, nn.Identity)
        and all(isinstance(block.get_submodule(f"bn{n}"), FusedBatchNorm2d) for n in range(1, last))
        and type(norm) is nn.BatchNorm2d
        and _is_known(norm)
        and type(block.get_submodule(activation)) is nn.ReLU
    ):
        norm.__class__ = FusedBatchNorm2d
        setattr(block, activation, nn.Identity())
        block.__class__ = fused
