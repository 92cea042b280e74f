"""Every setting of a run, typed. config_file.py reads them.

The tree is frozen and checked as a whole when it is built, before any process group, folder or file exists.
Section numbers in the docstrings refer to the method's description in docs/method.md.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from automix_dist.errors import AutomixError, did_you_mean

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ConfigError(AutomixError, ValueError):
    """A setting that cannot be used; the message names the key, the value and what would be valid."""


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{key} = {value!r}: expected {expected}")


class RandAugmentPolicy(NamedTuple):
    """Random operations, with timm's defaults."""

    magnitude: float = 10.0
    std: float = 0.0
    """Of a normal distribution around the magnitude; above 100 means uniform from 0 to the magnitude."""
    most: float = 10.0
    """Where magnitudes are cut off."""
    count: float = 2
    """Operations that are drawn for an image."""
    probability: float = 0.5
    """Of each to be applied."""


RAND_AUGMENT_KEYS = {"m": "magnitude", "mstd": "std", "mmax": "most", "n": "count", "p": "probability"}
"""The parts of timm's notation."""


@dataclass(frozen=True)
class DataConfig:
    train: str = ""
    """Path of the training set, a .beton file written by `automix prepare`; relative to the directory that the
    command runs in."""
    val: str = ""
    """Path of the validation set, a .beton file written by `automix prepare`; relative to the directory that the
    command runs in."""
    image_size: int = 224
    """Side in pixels of the square images that the networks see."""
    crop: Literal["resized", "padded", "none"] = "resized"
    """Training crop: random resized crop, random crop after padding, or none (images have image_size already)."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area range of the random resized crop, as a fraction of the image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio range of the random resized crop."""
    resize: Literal["area", "bilinear", "bicubic"] = "area"
    """How crops reach image_size: averaging areas (the fastest), or antialiased interpolation with Pillow's pixels, as
    the published recipes mean it (bicubic)."""
    pad: int = 4
    """Pixels added on each side before the padded crop."""
    pad_mode: Literal["zero", "reflect"] = "zero"
    """What the added pixels hold."""
    flip: bool = True
    """Mirror half of the training images."""
    rand_augment: str = ""
    """RandAugment in timm's notation (ViT recipes: rand-m9-mstd0.5-inc1; docs/data.md); empty = off."""
    color_jitter: float = 0.0
    """Change brightness, contrast and saturation by random factors in 1 -+ this (no recipe sets it; timm's
    ViT scripts name 0.4, which timm ignores beside RandAugment); 0 = off."""
    random_erasing: float = 0.0
    """Probability of erasing a random box of a training image (ImageNet's ViT and ConvNeXt recipes: 0.25)."""
    erasing_mode: Literal["pixel", "mean"] = "pixel"
    """What fills an erased box: normal noise of the given mean and std for each pixel, or the mean."""
    resolution_schedule: tuple[tuple[int, int], ...] = ()
    """Training at other sizes than image_size: [first epoch, size] pairs, the first for epoch 0; evaluation keeps
    image_size. Sizes are multiples of 32, so that every feature map divides the image."""
    order: Literal["random", "quasi_random"] = "random"
    """Order of the training images: any, or shuffled within windows of the file that are read chunk by chunk, for files
    larger than memory."""
    repeats: int = 1
    """How often an epoch shows an image, each time augmented anew; the epoch keeps its length and shows fewer images
    (repeated augmentation; RSB A2: 3)."""
    chunk_size: int = 16
    """Images that the quasi-random order reads together."""
    window_chunks: int = 512
    """Chunks, from anywhere in the file, whose images the quasi-random order mixes."""
    on_corrupt: Literal["error", "skip"] = "error"
    """A damaged training image ends the training, or is replaced by the next one in the file and counted. Evaluation
    never skips."""
    eval_crop_ratio: float = 224 / 256
    """Evaluation takes the centre square of this fraction of the shorter side (224 of 256 is the ImageNet custom)."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Per-channel mean of the normalisation, on the [0, 1] scale; applied on the device, after the transfer."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Per-channel standard deviation of the normalisation, on the [0, 1] scale."""
    workers: int = 0
    """Loader threads per rank; 0 = the cores this process may use, shared between the ranks of the host."""
    batches_ahead: int = 3
    """Batches that the loader prepares in advance."""

    def __post_init__(self):
        _require(self.image_size >= 6, "data.image_size", self.image_size, "6 or more pixels")
        lo, hi = self.crop_scale
        _require(0 < lo <= hi <= 1, "data.crop_scale", self.crop_scale, "0 < low <= high <= 1")
        lo, hi = self.crop_ratio
        _require(0 < lo <= hi, "data.crop_ratio", self.crop_ratio, "0 < low <= high")
        _require(self.pad >= 0, "data.pad", self.pad, "0 or more pixels")
        _require(0 < self.eval_crop_ratio <= 1, "data.eval_crop_ratio", self.eval_crop_ratio, "a fraction in (0, 1]")
        scale = "on the [0, 1] scale: divide those on the 0 to 255 scale by 255"
        _require(all(0 <= m <= 1 for m in self.mean), "data.mean", self.mean, f"three numbers {scale}")
        _require(all(0 < s <= 1 for s in self.std), "data.std", self.std, f"three positive numbers {scale}")
        _require(self.workers >= 0, "data.workers", self.workers, "0 (automatic) or a number of threads")
        _require(self.batches_ahead >= 1, "data.batches_ahead", self.batches_ahead, "1 or more")
        self.rand_augment_policy()  # raises for what cannot be read
        _require(self.color_jitter >= 0, "data.color_jitter", self.color_jitter, "0 (off) or a positive strength")
        _require(0 <= self.random_erasing <= 1, "data.random_erasing", self.random_erasing, "a probability")
        _require(self.repeats >= 1, "data.repeats", self.repeats, "1 (off) or more times")
        _require(self.chunk_size >= 1, "data.chunk_size", self.chunk_size, "1 or more images")
        _require(self.window_chunks >= 1, "data.window_chunks", self.window_chunks, "1 or more chunks")
        starts, sizes = [s for s, _ in self.resolution_schedule], [size for _, size in self.resolution_schedule]
        _require(
            not starts or (starts[0] == 0 and starts == sorted(set(starts))),
            "data.resolution_schedule",
            self.resolution_schedule,
            "[first epoch, size] pairs with rising epochs, the first of them 0",
        )
        _require(
            all(size > 0 and size % 32 == 0 for size in sizes),
            "data.resolution_schedule",
            self.resolution_schedule,
            "sizes that are multiples of 32",
        )
        if starts and self.crop != "resized":
            raise ConfigError(f"data.resolution_schedule needs data.crop=resized, not {self.crop}")

    def rand_augment_policy(self) -> "RandAugmentPolicy | None":
        """What data.rand_augment says; None if it is empty. Raises ConfigError."""
        if not self.rand_augment:
            return None
        expected = "rand- and some of m (magnitude), n (operations), p, mstd, mmax, with inc1: rand-m9-mstd0.5-inc1"
        start, *parts = self.rand_augment.split("-")
        found = [re.fullmatch(r"(m|n|p|mstd|mmax|inc)(\d+(?:\.\d+)?)", part) for part in parts]
        values = {match[1]: float(match[2]) for match in found if match}
        _require(start == "rand" and len(values) == len(parts), "data.rand_augment", self.rand_augment, expected)
        increasing = values.pop("inc", 0)
        _require(increasing == 1, "data.rand_augment", self.rand_augment, "inc1: there are timm's increasing ones only")
        policy = RandAugmentPolicy(**{RAND_AUGMENT_KEYS[key]: value for key, value in values.items()})
        _require(policy.count >= 1 and policy.count % 1 == 0, "data.rand_augment", self.rand_augment, "n of 1 or more")
        _require(policy.most > 0, "data.rand_augment", self.rand_augment, "mmax above 0")
        _require(policy.probability <= 1, "data.rand_augment", self.rand_augment, "a probability p")
        return policy

    def train_size(self, epoch: int) -> int:
        """Side of the training images in an epoch."""
        return next((size for start, size in reversed(self.resolution_schedule) if start <= epoch), self.image_size)


@dataclass(frozen=True)
class ModelConfig:
    backbone: str = "resnet50"
    """Name of a timm model (`timm.list_models()`). Another one than the file's, as on the command line, starts without
    the file's timm_kwargs, and a run says so."""
    module: str = ""
    """Python module that registers a backbone of your own with timm (docs/extending.md), imported wherever the backbone
    is built, in training and later; on PYTHONPATH or in the current directory; empty = none."""
    pretrained: bool = False
    """Start from timm's pretrained weights, from its cache or downloaded; or let `weights` name a file."""
    weights: str = ""
    """Start from this file, a timm state dict of the backbone as .safetensors, or written by torch.save (.pth; also
    inside a checkpoint, of which the moving average is taken, if there is one); its classifier is not used."""
    small_stem: bool = False
    """Stem for small images, for ResNets and ConvNeXts: one 3x3 convolution of stride 1, no max-pooling."""
    drop_path: float = 0.0
    """Stochastic depth rate, for backbones that have it."""
    timm_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments for `timm.create_model`; not checkpoint_path, which is `weights` here."""

    def __post_init__(self):
        _require(bool(self.backbone), "model.backbone", self.backbone, "the name of a timm model")
        importable = not self.module.endswith(".py") and all(part.isidentifier() for part in self.module.split("."))
        _require(
            not self.module or importable,
            "model.module",
            self.module,
            "a module's name as `import` takes it: my_models for my_models.py",
        )
        _require(0 <= self.drop_path < 1, "model.drop_path", self.drop_path, "a rate in [0, 1)")
        if self.pretrained and self.weights:
            raise ConfigError("model.pretrained and model.weights both ask for starting weights: set one of them")
        for key in ("num_classes", "drop_path_rate", "pretrained", "features_only"):
            if key in self.timm_kwargs:
                raise ConfigError(
                    f"model.timm_kwargs.{key} is decided elsewhere (dataset, model.drop_path, model.pretrained, "
                    f"automix.feature): remove it"
                )
        if "checkpoint_path" in self.timm_kwargs:
            raise ConfigError("model.timm_kwargs.checkpoint_path: name the file in model.weights instead")
        if self.timm_kwargs.get("in_chans", 3) != 3:
            raise ConfigError("model.timm_kwargs.in_chans must be 3: images are RGB, gray ones are stored so as well")


POLICIES = sorted(path.stem for path in Path(__file__).with_name("policies").glob("[a-z]*.py"))
"""The names of all mixing policies."""


@dataclass(frozen=True)
class PolicyConfig:
    name: str = "automix"
    """How images are mixed (docs/policies.md). automix, samix and adautomix learn it, and read the section automix too;
    the others train a plain classifier, and that section means nothing to them. Another one than the file's, as on the
    command line, starts without the file's settings, and a run says so."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The policy's own settings."""
    ema_decay: float = 0.0
    """Decay of a moving average of the classifier, evaluated beside it; 0 = none. Learned policies have their own."""

    def __post_init__(self):
        if self.name not in POLICIES:
            hint = did_you_mean(self.name, POLICIES)
            raise ConfigError(f"policy.name = {self.name!r}: expected one of {', '.join(POLICIES)}{hint}")
        _require(0 <= self.ema_decay < 1, "policy.ema_decay", self.ema_decay, "a decay in [0, 1), 0 for no average")


@dataclass(frozen=True)
class LossConfig:
    name: Literal["cross_entropy", "binary_cross_entropy"] = "cross_entropy"
    """Form of all classification losses; the binary one is summed over the classes."""
    label_smoothing: float = 0.0
    """Label smoothing of all classification losses."""

    def __post_init__(self):
        _require(0 <= self.label_smoothing < 1, "loss.label_smoothing", self.label_smoothing, "a value in [0, 1)")


@dataclass(frozen=True)
class AutoMixConfig:
    alpha: float = 2.0
    """Lambda is drawn from Beta(alpha, alpha)."""
    feature: int = -2
    """Which of the backbone's feature maps feeds the Mix Block, counted as timm does (stages of a CNN, blocks of a
    ViT); negative counts from the last. -2 is stage 3 of 4, the paper's l = 3; of a ViT take the middle block, 5 of
    0 to 11."""
    reduction: int = 2
    """Inner width of the Mix Block's attention: feature channels // reduction."""
    lam_concat: bool = True
    """Embed lambda as one more channel of the features (section 1.3); off in the ResNet recipes for CIFAR and
    Tiny-ImageNet."""
    norm: Literal["none", "batch", "layer"] = "none"
    """Norm after the shared query/key projection."""
    upsampling: tuple[Literal["nearest", "bilinear"], ...] = ("nearest",)
    """How a mask is brought to image size; with several, one is drawn per Mix Block call."""
    mask_loss: Literal["l1", "sparsity", "l1_variance", "l2_variance"] = "l1"
    """Form of the mask loss (section 1.4)."""
    mask_loss_weight: float = 0.1
    """Weight of the mask loss at the start."""
    mask_loss_margin: float = 0.1
    """Deviation of the mask's area from lambda that costs nothing."""
    mask_loss_schedule: Literal["constant", "cosine", "compound"] = "constant"
    """How the weight falls: not at all, by a cosine as the paper's recipes mean, or compounding that cosine every step
    as the published code does (section 2.8)."""
    lam_margin: float = 0.08
    """The classifier's draw is plain mixup where lambda is within this distance of 0 or 1."""
    mask_adjust: float = 0.0
    """Probability of rescaling the classifier's masks to the area lambda (section 2.4)."""
    mask_adjust_lam: Literal["classifier", "mix_block"] = "classifier"
    """Whose lambda the rescaling aims at; the published code uses the Mix Block's (a mistake, kept for comparison)."""
    switch_off: float = 0.0
    """Train the Mix Block's mixed branch only in this share of the steps: 0.8 = on in 80 % of them, off in 20 %; 0 = on
    in every step (section 2.3)."""
    no_repeat: bool = False
    """Never pair an image with itself (CUB and Aircraft recipes)."""
    momentum: float = 0.999
    """Coefficient of the momentum encoder at the start."""
    momentum_end: float = 0.99999
    """Coefficient that the momentum encoder's cosine schedule ends at."""
    momentum_start: float = 0.1
    """Share of the training after which the coefficient starts to rise (section 2.7)."""
    feature_pass: Literal["full", "cut"] = "full"
    """Run the momentum encoder's pass over clean images to its end, as the published code does, or stop it at the
    Mix Block's feature. Training is the same; with "cut", the BatchNorm statistics of the momentum encoder's later
    layers see mixed images only, which its evaluation notices."""
    clean_images: Literal["encoder", "head"] = "encoder"
    """Who learns from the clean images: the whole query encoder, or its head for them alone, on features that the mixed
    ones have formed. With "head" the encoder does not learn few images by heart, and a step costs 7 forward passes
    instead of 9; not the published method (docs/throughput.md)."""
    feature_source: Literal["momentum", "query"] = "momentum"
    """Whose features the Mix Block reads. With "query" the feature pass falls away; trains something else than
    the published method (docs/throughput.md)."""
    generator_every: int = 1
    """Train the Mix Block's mixed branch in every so many steps; above 1 not the published method."""
    generator_share: float = 1.0
    """Share of the batch that the momentum encoder judges for the Mix Block; below 1 not the published method."""
    mix_block_until: float = 1.0
    """Share of the training after which the Mix Block stays as it is; below 1 not the published method."""

    def __post_init__(self):
        _require(self.alpha > 0, "automix.alpha", self.alpha, "a positive number")
        _require(self.reduction >= 1, "automix.reduction", self.reduction, "1 or more")
        _require(len(self.upsampling) > 0, "automix.upsampling", self.upsampling, "at least one of nearest, bilinear")
        _require(self.mask_loss_weight >= 0, "automix.mask_loss_weight", self.mask_loss_weight, "0 or more")
        _require(0 <= self.mask_loss_margin < 1, "automix.mask_loss_margin", self.mask_loss_margin, "a value in [0, 1)")
        _require(0 <= self.lam_margin < 0.5, "automix.lam_margin", self.lam_margin, "a value in [0, 0.5)")
        _require(0 <= self.mask_adjust <= 1, "automix.mask_adjust", self.mask_adjust, "a probability")
        _require(0 <= self.switch_off <= 1, "automix.switch_off", self.switch_off, "a probability")
        _require(self.generator_every >= 1, "automix.generator_every", self.generator_every, "1 or more steps")
        _require(0 < self.generator_share <= 1, "automix.generator_share", self.generator_share, "a share in (0, 1]")
        _require(0 < self.mix_block_until <= 1, "automix.mix_block_until", self.mix_block_until, "a share in (0, 1]")
        _require(
            0 < self.momentum <= self.momentum_end <= 1,
            "automix.momentum",
            self.momentum,
            f"0 < momentum <= momentum_end ({self.momentum_end}) <= 1",
        )
        _require(0 <= self.momentum_start < 1, "automix.momentum_start", self.momentum_start, "a share in [0, 1)")


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["sgd", "adamw", "lamb"] = "sgd"
    """Optimizer of the query encoder, its heads and the Mix Block; lamb only where no engine shards tensors."""
    lr: float = 0.1
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate that the cosine ends at."""
    momentum: float = 0.9
    """SGD's momentum."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's and LAMB's betas."""
    weight_decay: float = 1e-4
    """Weight decay."""
    decay_norm_and_bias: bool = True
    """Whether weight decay applies to norms, biases and other vectors, and to what timm's no_weight_decay() names, too
    (off in the ViT, ConvNeXt and RSB recipes)."""
    layer_decay: float = 1.0
    """Factor by which the learning rate falls from each layer of the backbone to the one below it, in timm's order of
    layers, for fine-tuning (ViTs: about 0.65 to 0.85); 1 = one rate for all. Heads and Mix Block keep theirs."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up; a Mix Block with a rate of its own (mix_lr, mix_min_lr) has none (section 2.9)."""
    warmup_start: float = 1e-5
    """Share of the learning rate at which the warm-up starts."""
    lr_update: Literal["epoch", "step"] = "epoch"
    """Whether the cosine advances per epoch (CNN recipes) or per step (ViT recipes)."""
    mix_lr: float | None = None
    """Peak learning rate of the Mix Block; null = lr."""
    mix_min_lr: float | None = None
    """Learning rate that the Mix Block's cosine ends at; null = min_lr."""
    mix_momentum: float | None = None
    """SGD's momentum for the Mix Block; null = momentum."""
    clip_norm: float = 0.0
    """Largest gradient norm, over all trained parameters and ranks; 0 = no clipping."""

    def __post_init__(self):
        _require(self.lr > 0, "optimizer.lr", self.lr, "a positive number")
        _require(0 <= self.min_lr <= self.lr, "optimizer.min_lr", self.min_lr, f"0 <= min_lr <= lr ({self.lr})")
        _require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "a value in [0, 1)")
        _require(all(0 <= b < 1 for b in self.betas), "optimizer.betas", self.betas, "two values in [0, 1)")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        _require(0 < self.layer_decay <= 1, "optimizer.layer_decay", self.layer_decay, "a factor in (0, 1]")
        _require(self.warmup_epochs >= 0, "optimizer.warmup_epochs", self.warmup_epochs, "0 or more")
        _require(0 < self.warmup_start <= 1, "optimizer.warmup_start", self.warmup_start, "a share in (0, 1]")
        _require(self.clip_norm >= 0, "optimizer.clip_norm", self.clip_norm, "0 (off) or a positive norm")
        if self.mix_lr is not None:
            _require(self.mix_lr > 0, "optimizer.mix_lr", self.mix_lr, "a positive number or null")
        if self.mix_momentum is not None:
            _require(
                0 <= self.mix_momentum < 1, "optimizer.mix_momentum", self.mix_momentum, "a value in [0, 1) or null"
            )
            if self.name != "sgd":
                raise ConfigError(
                    f"optimizer.mix_momentum = {self.mix_momentum} has no meaning for optimizer.name = {self.name}"
                )
        if self.mix_lrs is not None:
            first, last = self.mix_lrs
            _require(0 <= last <= first, "optimizer.mix_min_lr", last, f"0 <= mix_min_lr <= mix_lr ({first})")

    @property
    def mix_lrs(self) -> tuple[float, float] | None:
        """The Mix Block's first and last learning rate; None if it follows the main one, warm-up included."""
        if self.mix_lr is None and self.mix_min_lr is None:
            return None
        return (
            self.lr if self.mix_lr is None else self.mix_lr,
            self.min_lr if self.mix_min_lr is None else self.mix_min_lr,
        )


@dataclass(frozen=True)
class EngineConfig:
    name: Literal["deepspeed", "ddp", "fsdp2"] = "deepspeed"
    """What reduces gradients and steps: DeepSpeed, torch's DDP (shards nothing) or FSDP2 (shards everything)."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed shards: nothing (plain data parallel), optimizer, + gradients, + parameters."""
    offload_optimizer: bool = False
    """Keep DeepSpeed's optimizer state in host memory and step there; with zero_stage 1, 2 or 3."""
    deepspeed_json: str = ""
    """A DeepSpeed JSON to merge; a key that contradicts this config is an error."""
    accumulation_steps: int = 1
    """Micro batches per optimizer step."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Autocast of the forward passes over float32 weights; auto = bfloat16 on a GPU that computes with it (compute
    capability 8.0 or higher), float32 elsewhere. Asked for by name, float32 also keeps convolutions from TF32. float16,
    with a loss scale that follows what it can hold, is for older GPUs (T4, RTX 20); on a CPU it is for tests alone."""
    immediate_backward: bool = True
    """Differentiate each of the three losses as soon as it is known: one set of activations lives at a time instead of
    three. The gradients are the same, up to the order in which they are summed."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the backbone's blocks and compute the rest again in the backward pass."""
    sync_batchnorm: bool = False
    """BatchNorm over the micro batches of all ranks, in training; needs GPUs."""
    max_skipped_steps: int = 10
    """A step whose loss or gradients are not finite is skipped; after at least so many in a row the run stops with a
    dump. The device counts them, and is asked every so many steps, or every log.every_steps if that is less."""
    compile: bool = False
    """Compile the encoders and the Mix Block, each as a whole, with torch.compile; the first steps take minutes."""
    cuda_graph: bool = False
    """Record forward and backward passes as CUDA graphs, with one GPU or several: few launches, for small images. Needs
    whole parameters (not zero_stage 3, not fsdp2)."""
    joint_query: bool = False
    """The query encoder reads clean and mixed images in one pass, in which BatchNorm takes them for two batches. The
    same training, but with immediate_backward two sets of activations live at a time. For AutoMix and SAMix."""
    padded_stem: bool = False
    """The first convolution reads a fourth channel of zeros, for GPU kernels that want channels in fours; images are
    copied for it. The weights stay as they are."""
    fused_batchnorm: bool = False
    """BatchNorm, the ReLU behind it and in ResNets the addition of a block's shortcut as one operation, with kernels of
    its own on a GPU (engine.kernels); other BatchNorms stay as they are."""
    deterministic: bool = False
    """Only algorithms whose results repeat to the bit, slower on a GPU; an operation that has none is an error."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """Triton or plain PyTorch for the fused operations: the normalisation of images, the Mix Block, the momentum update
    and fused_batchnorm; auto = Triton on a GPU that can run it (compute capability 8.0 or higher), but for what has
    none: automix.norm, automix.mask_adjust, SAMix and AdAutoMix."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to train; auto = the GPU if there is one; one that torch cannot use is an error."""
    bucket_size: int = 8_000_000
    """Elements per gradient bucket; small enough that reduction overlaps with the backward pass."""
    timeout_minutes: float = 10.0
    """How long a collective may wait for the other ranks."""
    stall_seconds: float = 45.0
    """How long a rank may stand still, or be silent, before the run ends and names it with its host and line of code; a
    step that is slow by nature has five times its usual time. Start-up, an epoch's first step, evaluation and saving
    may stand still for 0.9 timeout_minutes. 0 = for ever, as a debugger needs it."""

    def __post_init__(self):
        _require(self.accumulation_steps >= 1, "engine.accumulation_steps", self.accumulation_steps, "1 or more")
        even = self.bucket_size >= 2 and self.bucket_size % 2 == 0
        _require(even, "engine.bucket_size", self.bucket_size, "an even number of elements")
        _require(
            self.timeout_minutes > 0, "engine.timeout_minutes", self.timeout_minutes, "a positive number of minutes"
        )
        _require(self.stall_seconds >= 0, "engine.stall_seconds", self.stall_seconds, "0 (off) or more seconds")
        _require(self.max_skipped_steps >= 1, "engine.max_skipped_steps", self.max_skipped_steps, "1 or more")
        if self.name != "deepspeed":
            for key in ("zero_stage", "offload_optimizer", "deepspeed_json"):
                if getattr(self, key):
                    raise ConfigError(
                        f"engine.{key} = {getattr(self, key)!r} has no meaning for engine.name = {self.name!r}: "
                        f"remove it, or set engine.name=deepspeed"
                    )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ConfigError("engine.offload_optimizer needs engine.zero_stage 1, 2 or 3, got 0")
        if self.sync_batchnorm and self.device == "cpu":
            raise ConfigError("engine.sync_batchnorm needs GPUs, but engine.device = 'cpu': set it to false")
        if self.fused_batchnorm and self.sync_batchnorm:
            raise ConfigError("engine.fused_batchnorm does not go with engine.sync_batchnorm: set one of them to false")
        for key in ("compile", "cuda_graph"):
            if getattr(self, key) and (self.zero_stage == 3 or self.name == "fsdp2"):
                raise ConfigError(
                    f"engine.{key} needs whole parameters, which engine.zero_stage = 3 and engine.name = 'fsdp2' "
                    f"shard: set engine.zero_stage to 0, 1 or 2, or engine.{key}=false"
                )
        if self.cuda_graph:
            for key, value in (("device", "cpu"), ("activation_checkpointing", True), ("sync_batchnorm", True)):
                if getattr(self, key) == value:
                    raise ConfigError(
                        f"engine.cuda_graph does not go with engine.{key} = {value!r}: change one of them"
                    )
        if self.kernels == "triton" and self.device == "cpu":
            raise ConfigError(
                "engine.kernels = 'triton' needs a GPU, but engine.device = 'cpu': "
                "set engine.kernels=reference or engine.device=cuda"
            )


@dataclass(frozen=True)
class CheckpointConfig:
    every_epochs: int = 1
    """Save a checkpoint after every so many epochs; 0 = do not. One is saved at the end and on a signal anyway."""
    every_steps: int = 0
    """Save a checkpoint after every so many steps too; 0 = do not."""
    keep_last: int = 2
    """How many of the newest checkpoints to keep."""
    keep_every_steps: int = 0
    """Keep every checkpoint whose step is a multiple of this too; 0 = none."""
    keep_best: bool = True
    """Save whenever the validation top-1 is the best so far, and keep that one as well."""
    stop_after_minutes: float = 0.0
    """Save and stop, with exit code 75, when the job has run for so long; 0 = no limit."""

    def __post_init__(self):
        _require(self.stop_after_minutes >= 0, "checkpoint.stop_after_minutes", self.stop_after_minutes, "0 or more")
        _require(self.every_epochs >= 0, "checkpoint.every_epochs", self.every_epochs, "0 or more")
        _require(self.every_steps >= 0, "checkpoint.every_steps", self.every_steps, "0 or more")
        _require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "1 or more")
        _require(self.keep_every_steps >= 0, "checkpoint.keep_every_steps", self.keep_every_steps, "0 or more")


@dataclass(frozen=True)
class LogConfig:
    every_steps: int = 10
    """Steps between two records in metrics.jsonl, TensorBoard and the trackers."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Log to Weights & Biases and MLflow besides, where their packages are installed (docs/evaluation.md)."""
    gallery_pairs: int = 8
    """Image pairs shown with masks and mixed samples after each evaluation; 0 = none."""

    def __post_init__(self):
        _require(self.every_steps >= 1, "log.every_steps", self.every_steps, "1 or more")
        _require(len(set(self.trackers)) == len(self.trackers), "log.trackers", self.trackers, "each once")
        _require(self.gallery_pairs >= 0, "log.gallery_pairs", self.gallery_pairs, "0 or more")


@dataclass(frozen=True)
class ProfileConfig:
    steps: int = 0
    """Steps that the main rank records into OUTPUT/profile, as a trace and a table; 0 = none."""
    start: int = 20
    """Steps of a session that pass before the recording begins."""

    def __post_init__(self):
        _require(self.steps >= 0, "profile.steps", self.steps, "0 (off) or a number of steps")
        _require(self.start >= 0, "profile.start", self.start, "0 or more steps")


@dataclass(frozen=True)
class Config:
    output: str = "runs/automix"
    """Folder of the run: config, logs, checkpoints."""
    seed: int = 0
    """All randomness derives from it."""
    epochs: int = 100
    """Passes over the training set."""
    batch_size: int = 256
    """Images per optimizer step, over all ranks and micro batches; an epoch's incomplete last batch is left out.
    Another one wants other learning rates (section 2.9)."""
    eval_every_epochs: int = 1
    """Evaluate after every so many epochs, and always after the last."""
    eval_batch_size: int = 0
    """Images per rank and evaluation batch; 0 = as in training."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    automix: AutoMixConfig = field(default_factory=AutoMixConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self):
        _require(bool(self.output), "output", self.output, "a folder")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "0 <= seed < 2**63")
        _require(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        _require(self.batch_size >= 2, "batch_size", self.batch_size, "2 or more: mixup needs pairs")
        _require(self.eval_every_epochs >= 1, "eval_every_epochs", self.eval_every_epochs, "1 or more")
        _require(self.eval_batch_size >= 0, "eval_batch_size", self.eval_batch_size, "0 (as in training) or more")
        _require(
            self.optimizer.warmup_epochs < self.epochs,
            "optimizer.warmup_epochs",
            self.optimizer.warmup_epochs,
            f"less than epochs ({self.epochs})",
        )
        if self.optimizer.name == "lamb" and (self.engine.zero_stage or self.engine.name == "fsdp2"):
            raise ConfigError(
                "optimizer.name = 'lamb' steps whole tensors, which this engine shards: set engine.zero_stage=0 or "
                "engine.name=ddp"
            )
        if self.engine.joint_query and self.engine.sync_batchnorm:
            raise ConfigError("engine.joint_query does not go with engine.sync_batchnorm: set one of them to false")
        if self.engine.joint_query and self.automix.feature_source == "query":
            raise ConfigError(
                "engine.joint_query reads clean and mixed images together, but automix.feature_source = 'query' needs "
                "the clean ones first: set one of them back"
            )

    def micro_batch_size(self, world_size: int) -> int:
        """Images per rank and forward pass.

        Raises ConfigError if batch_size cannot be shared evenly, or leaves a rank without a pair to mix.
        """
        parts = world_size * self.engine.accumulation_steps
        size, rest = divmod(self.batch_size, parts)
        if rest or size < 2:
            raise ConfigError(
                f"batch_size = {self.batch_size} cannot be shared by {world_size} rank(s) x "
                f"engine.accumulation_steps = {self.engine.accumulation_steps}: expected a multiple of {parts} that "
                f"leaves at least 2 images each"
            )
        return size


def to_dict(config: Any) -> dict[str, Any]:
    """The tree as plain dicts, lists and scalars, ready for YAML or JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(config))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optimizer": {"lr": 0.1}} -> {"optimizer.lr": 0.1}; an empty dict stays a value."""
    items: dict[str, Any] = {}
    for key, value in tree.items():
        items |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return items
