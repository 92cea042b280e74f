"""What all tests share: options, and skipping GPU tests with a reason."""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import yaml

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: see automix_dist/cli.py

import torch
from ranks import ROOT, run

import automix_dist  # noqa: F401 - in a checkout that is not installed it makes automix_kernels known

TESTS = Path(__file__).parent

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's children ignore it, and so would the runs that it is sent to


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    for source, split in (("digits:48", "train"), ("digits", "val")):
        run("prepare", source, folder / f"{split}.beton", "--split", split, "--write-mode", "raw")
    return folder


@pytest.fixture
def settings(digits, tmp_path) -> Path:
    """A config file for four epochs of 15 steps of a small network."""
    values = yaml.safe_load((ROOT / "configs" / "digits" / "automix_resnet10.yaml").read_text())
    values |= {"output": str(tmp_path / "run"), "epochs": 4, "batch_size": 32, "eval_every_epochs": 2}
    values["data"] |= {"train": str(digits / "train.beton"), "val": str(digits / "val.beton")}
    values["model"]["timm_kwargs"] = {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32], "stem_width": 8}
    values["checkpoint"] = {"every_epochs": 3, "keep_last": 10}
    values["engine"] = {"device": "cpu"}  # where results repeat to the bit, and two ranks need no two GPUs
    values["log"] = {"every_steps": 5}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def pytest_addoption(parser):
    parser.addoption("--reference", type=Path, help="folder of recordings of the published implementation (*.npz)")


def reference_folder(config) -> Path:
    """The folder given by --reference, else the one shared beside the checkout, else the copy in tests/."""
    shared = TESTS.parent.parent / "shared" / "reference"
    return config.getoption("--reference") or (shared if shared.is_dir() else TESTS / "reference")


def pytest_generate_tests(metafunc):
    kinds = {"mix_block_recording": "mix_block_*.npz", "train_step_recording": "train_step_*.npz"}
    for fixture in kinds.keys() & set(metafunc.fixturenames):
        folder = reference_folder(metafunc.config)
        recordings = {each: sorted(folder.glob(pattern)) for each, pattern in kinds.items()}
        if not any(recordings.values()):
            wanted = " and no ".join(kinds.values())
            raise pytest.UsageError(f"no {wanted} in {folder}: give a folder of recordings with --reference")
        metafunc.parametrize(fixture, recordings[fixture], ids=lambda path: path.stem)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """With -m gpu, files of tests that want packages which are not here are left out: a node may have few of them."""
    report = yield
    if report.failed and collector.config.option.markexpr == "gpu":
        missing = report.call.excinfo.value.__cause__
        if isinstance(missing, ImportError) and not (missing.name or "").startswith("automix"):
            report.outcome, report.longrepr = "skipped", (str(collector.path), 0, str(missing))
    return report


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    left_out = {each.nodeid: each.longrepr[2] for each in skipped if isinstance(each, pytest.CollectReport)}
    for reason, files in Counter(left_out.values()).items():
        terminalreporter.write_line(f"left out {files} file(s) of tests: {reason}")


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr == "gpu":  # time on a GPU is dear: first what decides, last what takes minutes
        items.sort(key=lambda item: ("sanitizer" in item.path.name, "kernels" not in item.path.name))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no GPU on this machine")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
