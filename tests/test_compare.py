"""Comparisons: their file, their statistics, and real small trainings of two policies over two seeds."""

import html
import json
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ranks import run
from safetensors.torch import save_file
from scipy import stats

from automix_dist import compare as compare_module
from automix_dist.backbone import create_timm_model
from automix_dist.compare import CompareError, _check_models, compare, load_comparison, result, summarize, write_table
from automix_dist.config import POLICIES, ConfigError
from automix_dist.config_file import load_config, to_yaml
from automix_dist.policy import with_policy_settings

ROOT = Path(__file__).parent.parent


def write(path: Path, **changes) -> Path:
    values = {
        "base": str(ROOT / "configs" / "digits" / "automix_resnet10.yaml"),
        "output": str(path / "out"),
        "seeds": [0, 1],
        "policies": {"none": ["policy.name=none"], "automix": []},
    }
    file = path / "compare.yaml"
    file.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return file


def test_statistics_are_the_textbooks():
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.9, 0.01, 5), rng.normal(0.91, 0.01, 5)
    reference, row = summarize({"a": dict(enumerate(first)), "b": dict(enumerate(second))})
    assert (reference["difference"], reference["p"]) == (None, None)
    assert row["mean"] == pytest.approx(second.mean()) and row["standard_deviation"] == pytest.approx(
        second.std(ddof=1)
    )
    t = (second - first).mean() / ((second - first).std(ddof=1) / math.sqrt(5))
    assert row["difference"] == pytest.approx((second - first).mean())
    assert row["p"] == pytest.approx(2 * stats.t.sf(abs(t), df=4))
    assert row["p"] == pytest.approx(stats.ttest_rel(second, first).pvalue)


def test_few_and_unpaired_seeds():
    rows = summarize({"a": {0: 0.5, 1: 0.6}, "b": {1: 0.7, 2: 0.9}, "c": {}, "d": {0: 0.75, 1: 0.85}})
    assert (
        rows[1]["difference"] == pytest.approx(0.1) and rows[1]["p"] is None and rows[1]["mean"] == pytest.approx(0.8)
    )
    assert rows[2]["mean"] is None and rows[2]["standard_deviation"] is None
    assert rows[3]["difference"] == pytest.approx(0.25)
    assert summarize({"a": {0: 0.5, 1: 0.5}, "b": {0: 0.75, 1: 0.75}})[1]["p"] is None  # differences without variance


@pytest.mark.parametrize(("total", "reference", "gain"), [(355, (325, 314), -5), (355, (310, 308, 307), 2)])
def test_differences_that_are_equal_but_for_a_rounding_have_no_p(total, reference, gain):
    """A t-test would take the rounding for a spread, and find p = 1e-15."""
    values = [dict(enumerate((n + more) / total for n in reference)) for more in (0, gain)]
    differences = [values[1][seed] - values[0][seed] for seed in values[0]]
    assert max(differences) > min(differences)
    assert summarize(dict(zip("ab", values, strict=True)))[1]["p"] is None
    assert summarize({"a": values[0], "b": values[1] | {0: values[1][0] + 1 / 50000}})[1]["p"] is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": ""}, "base is missing"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"polices": {}}, "unknown key polices: expected some of base, output"),
        ({"seeds": 3}, r"seeds = 3: expected a list, as \[0, 1\]"),
        ({"policies": {"mixup": "policy.name=mixup"}}, r"policies.mixup = 'policy.name=mixup': expected a list"),
        ({"policies": {"a/b": []}}, "a name of letters"),
        ({"policies": {"none": [], "long": ["epochs=99"]}}, "policies.long has epochs = 99 and none has 24"),
        (
            {"policies": {"none": [], "other": ["data.color_jitter=0.4"]}},
            r"policies.other has data.color_jitter = 0.4 and none has 0.0: not comparable",
        ),
        (
            {"policies": {"none": [], "fine": ["model.pretrained=true"]}},
            "fine has model.pretrained = True and none has F",
        ),
        (
            {"policies": {"none": [], "wide": ["model.timm_kwargs.stem_width=24"]}},
            r"policies.wide has model.timm_kwargs.stem_width = 24 and none has None: not comparable",
        ),
        ({"policies": {"none": ["policy.name=nothing"]}}, "policy.name"),
        ({"seeds": [0, -1]}, "seed = -1"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_comparison(write(tmp_path, **changes))


def test_settings_of_the_command_line_go_over_the_shared_ones(tmp_path):
    path = write(tmp_path, settings=["epochs=6"], policies={"none": ["policy.name=none"], "own": ["optimizer.lr=0.3"]})
    overrides = ["epochs=4", "optimizer.lr=0.2", f"output={tmp_path / 'other'}"]
    comparison = load_comparison(path, overrides)
    assert comparison.run("own", 1) == tmp_path / "other" / "own_seed1"
    none, own = (load_config(comparison.base, comparison.overrides(policy, 1)) for policy in ("none", "own"))
    assert (none.epochs, none.optimizer.lr) == (4, 0.2) and (own.epochs, own.optimizer.lr) == (4, 0.3)
    with pytest.raises(ConfigError, match=r"seed=3: expected a setting of the runs, or output; seeds is set in .*yaml"):
        load_comparison(path, ["seed=3"])
    with pytest.raises(ConfigError, match="output is missing or empty"):
        load_comparison(path, ["output="])
    with pytest.raises(ConfigError, match=r"optimizer.lrr; did you mean optimizer.lr\?"):
        load_comparison(path, ["optimizer.lrr=1"])


def test_regularisation_and_speed_are_a_policys_own(tmp_path):
    load_comparison(write(tmp_path, policies={"a": [], "b": ["model.drop_path=0.1", "data.workers=2"]}))


def test_a_comparison_holds_each_key_once(tmp_path):
    path = write(tmp_path)
    path.write_text(path.read_text() + "seeds: [7]\n")
    with pytest.raises(ConfigError, match=r"cannot read comparison .*: the key 'seeds' is here a second time"):
        load_comparison(path)


@pytest.mark.parametrize(
    ("name", "seeds", "reference"),
    [
        ("digits_compare", 5, "none"),
        ("digits_few_compare", 5, "none"),
        ("digits_speed_compare", 8, "automix"),
        ("cifar10_few_compare", 5, "none"),
    ],
)
def test_the_comparisons_of_the_repository_can_be_run(name, seeds, reference):
    comparison = load_comparison(ROOT / "configs" / f"{name}.yaml")
    assert len(comparison.seeds) == seeds and next(iter(comparison.policies)) == reference
    for policy in comparison.policies:
        assert load_config(comparison.base, comparison.overrides(policy, 0)).policy.name in POLICIES
    _check_models(comparison, Path(name), comparison.policies)


def test_a_policy_that_cannot_be_built_is_named_before_anything_is_trained(tmp_path):
    policies = {"none": ["policy.name=none"], "samix": ["policy.name=samix"]}
    with pytest.raises(ConfigError, match=r"policies.samix: automix.lam_concat = True: policy samix needs False"):
        compare(write(tmp_path, policies=policies), ["false"], print)
    with pytest.raises(ConfigError, match=r"metric = 'top1_momentum': policies.none is evaluated by top1_query, "):
        compare(write(tmp_path, metric="top1_momentum"), ["false"], print)
    with pytest.raises(ConfigError, match=r"metric = 'loss_query': policies.none is evaluated by top1_query, "):
        compare(write(tmp_path, metric="loss_query"), ["false"], print)
    with pytest.raises(CompareError, match="exit code 1"):  # settings for GPUs are no reason to refuse here
        compare(
            write(tmp_path, settings=["engine.kernels=triton", "engine.device=cuda", "automix.norm=none"]),
            ["false"],
            print,
        )
    shutil.rmtree(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stopped_run_stops_the_comparison_and_a_failed_one_is_named(tmp_path):
    # The child signals the comparison, which hands the signal on; unlike `train` it has nothing to save.
    stop = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(30)"
    )
    said = []
    assert compare(write(tmp_path), [sys.executable, "-c", stop], said.append) == 75
    assert said[-1] == "stopped; the same command continues"
    with pytest.raises(CompareError, match="none_seed0: training ended with exit code 1"):
        compare(write(tmp_path), ["false"], said.append)


def test_a_signal_reaches_a_training_once(tmp_path, monkeypatch):
    """A second one would not let it save, however late the comparison sees the first."""
    save = f"""
import os, pathlib, signal, sys, time
came = []
signal.signal(signal.SIGTERM, lambda *_: came.append(1))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(2)
pathlib.Path({str(tmp_path)!r}, "signals").write_text(str(len(came)))
sys.exit(75)
"""
    wait = compare_module._first_to_end

    def busy(*arguments):
        time.sleep(1.5)
        return wait(*arguments)

    monkeypatch.setattr(compare_module, "_first_to_end", busy)
    assert compare(write(tmp_path), [sys.executable, "-c", save], lambda _: None) == 75
    assert (tmp_path / "signals").read_text() == "1"


def test_runs_beside_each_other_have_a_gpu_and_a_share_of_the_cores_each(tmp_path, monkeypatch):
    # Each trains until the other one has begun; then both end without a result, as a failed run would.
    wait = f"""
import json, os, pathlib, sys, time
folder = pathlib.Path({str(tmp_path)!r})
has = [os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "AUTOMIX_CORE_SHARERS")]
(folder / f"{{os.getpid()}}.began").write_text(json.dumps(has))
deadline = time.monotonic() + 60
while len(list(folder.glob("*.began"))) < 2 and time.monotonic() < deadline: time.sleep(0.05)
sys.exit("no such file")
"""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.delenv("AUTOMIX_CORE_SHARERS", raising=False)
    said = []
    with pytest.raises(
        CompareError, match=r"_seed0: training ended with exit code 1 \(.*_seed0.log ends with: no such"
    ):
        compare(write(tmp_path), [sys.executable, "-c", wait], said.append, jobs=2)
    began = [json.loads(file.read_text()) for file in tmp_path.glob("*.began")]
    assert sorted(began) == [["5", "2"], ["7", "2"]]
    assert [line.split(",")[0] for line in said[1:]] == [
        f"training {tmp_path / 'out' / name}" for name in ("none_seed0", "automix_seed0")
    ]


def test_a_failed_run_stops_those_beside_it_after_they_have_saved(tmp_path):
    # The first fails once the second is there; the second saves when it is asked to stop.
    both = f"""
import pathlib, signal, sys, time
folder, deadline = pathlib.Path({str(tmp_path)!r}), time.monotonic() + 60
def save(*_):
    (folder / "saved").touch()
    sys.exit(75)
if any("automix_seed0" in each for each in sys.argv):
    signal.signal(signal.SIGTERM, save)
    (folder / "trains").touch()
while time.monotonic() < deadline:
    if any("none_seed0" in each for each in sys.argv) and (folder / "trains").exists(): sys.exit(3)
    time.sleep(0.05)
"""
    with pytest.raises(CompareError, match="none_seed0: training ended with exit code 3; the same command"):
        compare(write(tmp_path), [sys.executable, "-c", both], lambda _: None, jobs=2)
    assert (tmp_path / "saved").exists()


def test_a_run_of_other_settings_is_not_taken(tmp_path):
    def result_with(*settings):
        comparison = load_comparison(write(tmp_path, policies={"mixup": ["policy.name=mixup", *settings]}))
        run = comparison.run("mixup", 0)
        if not run.exists():
            run.mkdir(parents=True)
            config = with_policy_settings(load_config(comparison.base, comparison.overrides("mixup", 0)))
            (run / "config.yaml").write_text(to_yaml(config))
            (run / "metrics.jsonl").write_text("")
        return result(comparison, "mixup", 0)

    assert result_with() is None and result_with("engine.zero_stage=1", "policy.settings.alpha=1") is None
    with pytest.raises(ConfigError, match=r"trained with policy.settings.alpha = 1.0, the comparison asks for 0.2"):
        result_with("policy.settings.alpha=0.2")
    with pytest.raises(ConfigError, match=r"trained with engine.precision = 'auto', the comparison asks for 'float"):
        result_with("engine.precision=float32")


def finished_run(comparison, policy: str, seed: int, date: str, **environment) -> None:
    run = comparison.run(policy, seed)
    run.mkdir(parents=True)
    config = load_config(comparison.base, comparison.overrides(policy, seed))
    (run / "config.yaml").write_text(to_yaml(with_policy_settings(config)))
    records = [
        {"kind": "start", "step": 0, "total_steps": 9},
        {"kind": "eval", "step": 9, "top1_query": 0.5 + seed / 10},
    ]
    records.append({"kind": "checkpoint", "step": 9})
    (run / "metrics.jsonl").write_text("".join(json.dumps(r | {"time": f"{date}T00:00:00Z"}) + "\n" for r in records))
    made = {"python": "3.1", "versions": {"torch": "2.0.1"}, "commit": None, "gpus": [], "index_checksums": {}}
    (run / "environment.json").write_text(json.dumps(made | environment))


def test_the_table_tells_what_the_runs_were_made_with_and_where_they_differ(tmp_path):
    policies = {"none": ["policy.name=none"], "mixup": ["policy.name=mixup"]}
    comparison = load_comparison(write(tmp_path, policies=policies))
    assert write_table(comparison)[1] == {}
    cpu = {"device": "cpu", "autocast": "float32", "world_size": 1}
    finished_run(comparison, "none", 0, "2020-02-03", gpus=["unused"], **cpu)
    finished_run(comparison, "none", 1, "2020-02-01")  # by an older version
    page, warnings = write_table(comparison)
    assert (
        not warnings and "Python 3.1, torch 2.0.1, CPU, float32, 1 rank; 2020-02-01 to 2020-02-03." in page.read_text()
    )
    gpu = {"device": "cuda", "gpus": ["H9", "H9"], "autocast": "bfloat16", "world_size": 2}
    finished_run(comparison, "mixup", 0, "2020-02-02", **gpu | {"versions": {"torch": "2.0.2"}})
    said = []
    with pytest.raises(CompareError):
        compare(tmp_path / "compare.yaml", ["false"], said.append)
    for text in (
        "device as well as in policy (CPU: 'none_seed0', 'none_seed1'; H9: 'mixup_seed0').",
        "precision as well as in policy (bfloat16: 'mixup_seed0'; float32: 'none_seed0').",
        "number of ranks as well as in policy (1: 'none_seed0'; 2: 'mixup_seed0').",
    ):
        assert f"warning: the runs differ in their {text}" in said
        assert f"Warning: the runs differ in their {text}" in (tmp_path / "out" / "compare.md").read_text()
        assert f"the runs differ in their {text}" in html.unescape(page.read_text())
    assert "torch 2.0.1, 2.0.2, CPU, H9, bfloat16, float32, 1, 2 ranks; 2020-02-01" in page.read_text()
    about = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert about["environment"]["device"] == ["CPU", "H9"] and about["environment"]["commit"] == [None]
    assert about["environment"]["date"] == ["2020-02-01", "2020-02-02", "2020-02-03"] and len(about["warnings"]) == 3


@pytest.mark.slow
def test_trains_what_is_missing_and_nothing_twice(tmp_path, digits, capfd):
    for each in digits.iterdir():
        shutil.copy(each, tmp_path)
    settings = [f"data.train={tmp_path / 'train.beton'}", f"data.val={tmp_path / 'val.beton'}", "epochs=1"]
    settings += ["optimizer.warmup_epochs=0", "batch_size=480", "log.tensorboard=false", "log.gallery_pairs=0"]
    settings += ["model.timm_kwargs={layers: [1, 1, 1, 1], channels: [8, 8, 16, 16], stem_width: 8}"]
    weights = tmp_path / "start.safetensors"
    config = load_config(ROOT / "configs" / "digits" / "automix_resnet10.yaml", settings)
    save_file(create_timm_model(config.model, config.data.image_size).state_dict(), weights)
    settings.append(f"model.weights={weights}")
    file = write(tmp_path, settings=settings)
    shown = run("compare", file, "epochs=1", "--jobs", 2, "optimizer.warmup_epochs=0").stdout
    weights.unlink()  # which finished runs do not need
    out = tmp_path / "out"
    rows = json.loads((out / "compare.json").read_text())["policies"]
    assert [(row["policy"], sorted(row["values"])) for row in rows] == [("none", ["0", "1"]), ("automix", ["0", "1"])]
    for row in rows:
        for seed, value in row["values"].items():
            records = (out / f"{row['policy']}_seed{seed}" / "metrics.jsonl").read_text().splitlines()
            assert value == next(r["top1_query"] for r in map(json.loads, records) if r["kind"] == "eval")
    assert "| none | 2 of 2 |" in (out / "compare.md").read_text()
    assert "CPU, float32, 1 rank; " in (out / "compare.md").read_text() or torch.cuda.is_available()
    page = (out / "compare.html").read_text()
    assert "paired by seed" in page and page.count("<circle") == 4 and page.count("<title>seed 1: ") == 2

    assert shown == (out / "compare.md").read_text()
    assert f"holds a comparison, whose page is {out / 'compare.html'}" in run("report", out, code=1).stderr

    said, again = [], []
    assert compare(file, ["false"], said.append, overrides=["epochs=1"], show=again.append) == 0  # none starts again
    assert again == [shown.rstrip()]
    assert not [line for line in said if line.startswith("training")]
    shutil.rmtree(out / "none_seed1" / "checkpoints")  # to make room
    assert compare(file, ["false"], said.append) == 0
    with pytest.raises(ConfigError, match="was trained with epochs = 1, the comparison asks for 2"):
        compare(write(tmp_path, settings=[*settings, "epochs=2"]), ["false"], said.append)

    write(tmp_path, settings=settings)
    run("prepare", "digits:20", tmp_path / "train.beton", "--write-mode", "raw", "--overwrite")
    with pytest.raises(ConfigError, match=r"none_seed0 was made with other images than data.train"):
        compare(file, ["false"], said.append)

    evaluated = run("eval", out / "automix_seed0", "--attack", "fgsm", "--out", tmp_path / "eval")
    assert json.loads(evaluated.stdout)["conditions"].keys() == {"fgsm"}
    assert (tmp_path / "eval" / "eval.html").exists()
    assert "no answer momentum" in run("eval", out / "none_seed0", "--encoder", "momentum", code=2).stderr
    assert "finished" in run("watch", out / "none_seed0", "--once").stdout
