"""BatchNorm, the addition of a block's shortcut and the ReLU behind them as one operation (engine.fused_batchnorm).

Layers change their class and keep their parameters, buffers and names: a checkpoint of a network with them is one of a
network without. What is fused is what timm's networks are made of: a ReLU that follows a BatchNorm in a ResNet's stem
and blocks, in a Sequential, or inside timm's own BatchNormAct2d; and the shortcut of a ResNet's block that has neither
attention nor stochastic depth.
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
    """nn.BatchNorm2d with what follows it; in evaluation these are operations of their own."""

    relu = False
    batches = 1
    """How many batches, each with statistics of its own, lie one behind the other in what training hands over."""
    implementation = "auto"

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """[B, C, H, W], and a shortcut of the same shape to add in front of the ReLU."""
        if self.training:
            return kernels.batch_norm(
                x,
                self.weight,
                self.bias,
                self.running_mean,
                self.running_var,
                self.num_batches_tracked,
                self.momentum,
                self.eps,
                shortcut,
                self.relu,
                self.batches,
                implementation=self.implementation,
            )
        y = super().forward(x)
        if shortcut is not None:
            y += shortcut
        return F.relu(y, inplace=True) if self.relu else y


class FusedBasicBlock(BasicBlock):
    """A block whose ReLUs are in its norms: `act1` is an Identity, and `act2` is not called."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.aa(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x), shortcut)


class FusedBottleneck(Bottleneck):
    """As FusedBasicBlock: `act1` and `act2` are Identities, and `act3` is not called."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x))
        x = self.aa(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x), shortcut)


BLOCKS = {BasicBlock: (FusedBasicBlock, 2), Bottleneck: (FusedBottleneck, 3)}
"""timm's blocks, what they become, and how many norms and activations they have."""


def fuse_batchnorms(model: nn.Module, implementation: str = "auto") -> None:
    """Fuse every BatchNorm of a timm model with what follows it, where that is known.

    `implementation` is the kernel's: "auto", "triton" or "reference".

    Raises ConfigError if there is no BatchNorm to fuse.
    """
    norms = [m for m in model.modules() if _can_be_fused(m)]
    if not norms:
        raise ConfigError("engine.fused_batchnorm: no BatchNorm2d in this backbone; set it to false")
    for module in list(model.modules()):
        for norm, activation in _norms_with_activation(module):
            if _can_be_fused(norm) and type(norm) is nn.BatchNorm2d and type(getattr(module, activation)) is nn.ReLU:
                norm.relu = True
                setattr(module, activation, nn.Identity())
    for module in model.modules():
        if type(module) in BLOCKS:
            fused, last = BLOCKS[type(module)]
            if _adds_plainly(module, last):
                module.__class__ = fused
                module.get_submodule(f"bn{last}").relu = True
    for norm in norms:
        if type(norm) is BatchNormAct2d:
            norm.relu = type(norm.act) is nn.ReLU
        norm.__class__ = FusedBatchNorm2d
        norm.implementation = implementation


def _can_be_fused(module: nn.Module) -> bool:
    """Of torch's own kind or timm's, with all that the operation needs and nothing that it does not know."""
    if type(module) is BatchNormAct2d:
        known = isinstance(module.drop, nn.Identity) and type(module.act) in (nn.ReLU, nn.Identity)
    else:
        known = type(module) is nn.BatchNorm2d
    return known and module.affine and module.track_running_stats and module.momentum is not None


def _norms_with_activation(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Norms whose output nothing but an activation of this module reads, and the activation's name."""
    if isinstance(module, nn.Sequential):
        names = list(module._modules)
        yield from ((module.get_submodule(norm), activation) for norm, activation in pairwise(names))
    elif isinstance(module, ResNet):
        yield module.bn1, "act1"
    elif type(module) in BLOCKS and isinstance(module.drop_block, nn.Identity):
        _, last = BLOCKS[type(module)]
        yield from ((module.get_submodule(f"bn{n}"), f"act{n}") for n in range(1, last))


def _adds_plainly(block: nn.Module, last: int) -> bool:
    """Whether a block, whose other norms have been seen to, ends with a norm, its shortcut and a ReLU alone."""
    norm = block.get_submodule(f"bn{last}")
    return (
        block.se is None
        and block.drop_path is None
        and isinstance(block.drop_block, nn.Identity)
        and all(type(block.get_submodule(f"act{n}")) is nn.Identity for n in range(1, last))
        and type(norm) is nn.BatchNorm2d
        and _can_be_fused(norm)
        and type(block.get_submodule(f"act{last}")) is nn.ReLU
    )
