"""RandAugment: timm's pixels and timm's distribution, and draws that depend on (seed, epoch, sample) alone."""

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment

from automix_dist import rand_augment
from automix_dist.augment import AugmentKey
from automix_dist.config import ConfigError, DataConfig, RandAugmentPolicy
from automix_dist.rand_augment import OPERATIONS, RandAugment
from automix_dist.random_streams import POLICY, stream_key

FILL = (124, 116, 104)
ARGUMENTS = {
    "AutoContrast": [0], "Equalize": [0], "Invert": [0],
    "Rotate": [-30, -7.3, 0, 0.01, 12.5, 30, 44.9],
    "PosterizeIncreasing": [1, 2, 3, 4], "SolarizeIncreasing": [0, 26, 128, 256], "SolarizeAdd": [0, 57, 110],
    "ColorIncreasing": [0.1, 0.7, 1, 1.9], "ContrastIncreasing": [0.1, 0.7, 1, 1.9],
    "BrightnessIncreasing": [0.1, 0.7, 1, 1.9], "SharpnessIncreasing": [0.1, 0.7, 1, 1.9],
    "ShearX": [-0.3, -0.017, 0, 0.21, 0.3], "ShearY": [-0.3, -0.017, 0, 0.21, 0.3],
    "TranslateXRel": [-0.45, -0.013, 0, 0.25, 0.45], "TranslateYRel": [-0.45, -0.013, 0, 0.25, 0.45],
}  # fmt: skip


def images() -> list[np.ndarray]:
    """Noise, a smooth picture of few values, one with an empty channel, and one of a single colour."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (61, 47, 3), np.uint8)
    grid = Image.fromarray(random.integers(40, 180, (5, 6, 3), np.uint8))
    smooth = np.asarray(grid.resize((64, 64), Image.Resampling.BICUBIC))
    return [noise, smooth, noise * np.array([1, 0, 1], np.uint8), np.full((9, 14, 3), 77, np.uint8)]


def timms(image: np.ndarray, name: str, argument: float) -> np.ndarray:
    arguments = (int(argument) if name.startswith(("Posterize", "Solarize")) else argument,)
    if name in OPERATIONS[:3]:  # these take none
        arguments = ()
    options = {"fillcolor": FILL, "resample": Image.Resampling.BICUBIC}
    return np.asarray(auto_augment.NAME_TO_OP[name](Image.fromarray(image), *arguments, **options))


@pytest.mark.parametrize("name", OPERATIONS)
def test_pixels_are_timms(name):
    for image in images():
        for argument in ARGUMENTS[name]:
            ours = image.copy()
            rand_augment.apply_operation(ours, OPERATIONS.index(name), float(argument), np.array(FILL, np.uint8))
            assert np.array_equal(ours, timms(image, name, argument)), argument


def test_no_bits_are_black():
    """At magnitude 10 timm keeps 0 bits, which Pillow takes as black or, since version 13, refuses."""
    image = images()[0]
    rand_augment.apply_operation(image, OPERATIONS.index("PosterizeIncreasing"), 0.0, np.array(FILL, np.uint8))
    assert not image.any()


def test_operations_are_timms_increasing_ones():
    assert list(OPERATIONS) == auto_augment._RAND_INCREASING_TRANSFORMS


def steps(policy: RandAugmentPolicy, count: int, number: int = 0) -> list[tuple[int, float]]:
    values = tuple(map(float, (policy.magnitude, policy.std, policy.most, policy.probability)))
    keys = [np.uint64(stream_key(7, 0, i, POLICY)) for i in range(count)]
    return [rand_augment.policy_step(number, values, key) for key in keys]


@pytest.mark.parametrize(
    "text", ["rand-m9-mstd0.5-inc1", "rand-m7-mstd0.5-inc1", "rand-m6-n3-mstd101-p0.8-inc1", "rand-m12-mmax20-inc1"]
)
def test_draws_are_distributed_as_timms(text, monkeypatch):
    """Each operation as often, and its arguments by a Kolmogorov-Smirnov test, against timm's own transform."""
    count, called = 6000, []
    operations = {
        name: lambda image, *arguments, name=name, **_: (called.append((name, *arguments)), image)[1]
        for name in OPERATIONS
    }
    monkeypatch.setattr(auto_augment, "NAME_TO_OP", operations)
    transform = auto_augment.rand_augment_transform(text, {"interpolation": Image.Resampling.BICUBIC})
    auto_augment.random.seed(0)
    np.random.seed(0)
    for _ in range(count):
        transform(None)
    policy = DataConfig(rand_augment=text).rand_augment_policy()
    ours = [step for number in range(int(policy.count)) for step in steps(policy, count, number) if step[0] >= 0]
    assert abs(len(ours) - len(called)) < 4 * np.sqrt(len(called))
    for number, name in enumerate(OPERATIONS):
        a = np.sort([argument for operation, argument in ours if operation == number])
        b = np.sort([(*arguments, 0.0)[0] for operation, *arguments in called if operation == name])
        assert abs(len(a) - len(b)) < 4.5 * np.sqrt(len(a) + len(b))
        points = np.union1d(a, b)
        distance = np.searchsorted(a, points, "right") / len(a) - np.searchsorted(b, points, "right") / len(b)
        assert np.abs(distance).max() < 2.2 * np.sqrt(1 / len(a) + 1 / len(b)), name  # 0.01 % for each


def test_steps_of_an_image_are_independent():
    first, second = (np.array([s[0] for s in steps(RandAugmentPolicy(probability=1.0), 4000, k)]) for k in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


def test_an_image_takes_its_steps():
    policy = RandAugmentPolicy(9.0, 0.5, count=3, probability=0.8)
    batch = np.stack([images()[1]] * 12)
    numbers = np.arange(40, 52)
    key = AugmentKey(7)
    operation = RandAugment(key, policy, (0.485, 0.456, 0.406))
    assert operation.fill.tolist() == list(FILL)
    augmented = operation.generate_code()(batch.copy(), None, numbers)
    values = (9.0, 0.5, 10.0, 0.8)
    for i, number in enumerate(numbers):
        expected = batch[i]
        for step in range(3):
            stream = np.uint64(stream_key(7, 0, number, POLICY))
            kind, argument = rand_augment.policy_step(step, values, stream)
            expected = timms(expected, OPERATIONS[kind], argument) if kind >= 0 else expected
        assert np.array_equal(augmented[i], expected)
    key.set_epoch(1)
    assert not np.array_equal(augmented, operation.generate_code()(batch.copy(), None, numbers))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("m9", r"data\.rand_augment = 'm9': expected rand-"),
        ("rand-m9-x3-inc1", "expected rand-"),
        ("rand-m9-m8-inc1", "expected rand-"),
        ("rand-m-inc1", "expected rand-"),
        ("augmix-m3-inc1", "expected rand-"),
        ("rand-m9", "inc1: there are"),
        ("rand-m9-inc0", "inc1: there are"),
        ("rand-n0-inc1", "n of 1 or more"),
        ("rand-n1.5-inc1", "n of 1 or more"),
        ("rand-p1.5-inc1", "a probability p"),
        ("rand-mmax0-inc1", "mmax above 0"),
    ],
)
def test_notation_that_cannot_be_read(text, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(rand_augment=text)


def test_notation():
    assert DataConfig().rand_augment_policy() is None
    assert DataConfig(rand_augment="rand-inc1").rand_augment_policy() == RandAugmentPolicy()
    policy = DataConfig(rand_augment="rand-m9-n3-p0.7-mstd0.5-mmax12-inc1").rand_augment_policy()
    assert policy == RandAugmentPolicy(9, 0.5, 12, 3, 0.7)
