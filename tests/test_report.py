"""The report page and picture of a run; the page is opened in headless Chromium, driven through chromedriver."""

import base64
import io
import json
import math
import random
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from automix_dist import charts, recorded_run, run_log, summary_picture
from automix_dist.config import Config, OptimizerConfig
from automix_dist.config_file import to_yaml
from automix_dist.gallery import Gallery, write_gallery
from automix_dist.recorded_run import ReportError
from automix_dist.report import write_report
from automix_dist.summary_picture import write_picture

STEPS, STEPS_PER_EPOCH = 120, 20
HOSTILE = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">&amp;'


def random_gallery(share: float, pairs: int = 3, side: int = 16) -> Gallery:
    """Pairs whose masks take `share` of the partner."""
    rng = np.random.default_rng(0)
    images, partners = rng.integers(0, 256, (2, pairs, side, side, 3), dtype=np.uint8)
    masks = np.full((pairs, side, side), share, np.float32)
    mixed = (images * (1 - masks[..., None]) + partners * masks[..., None]).astype(np.uint8)
    labels = np.arange(pairs)
    lam = np.full(pairs, 1 - share, np.float32)
    sweep_lam = np.linspace(0, 1, 5, dtype=np.float32)
    sweep_masks = np.tile(1 - sweep_lam[:, None, None], (1, side, side))
    sweep_mixed = images[0] * (1 - sweep_masks[..., None]) + partners[0] * sweep_masks[..., None]
    return Gallery(
        images=images,
        partners=partners,
        masks=masks.astype(np.float16),
        mixed=mixed,
        lam=lam,
        labels=labels,
        partner_labels=(labels + 1) % pairs,
        sweep_masks=sweep_masks.astype(np.float16),
        sweep_mixed=sweep_mixed.astype(np.uint8),
        sweep_lam=sweep_lam,
    )


def make_run(folder: Path, *, steps: int = STEPS, finished: bool = True, classes: tuple[str, ...] = ("a", "b")) -> Path:
    """A run's folder with the records that a trainer writes, one second a step."""
    folder.mkdir(parents=True)
    start = datetime(2026, 1, 1, tzinfo=UTC)
    records = []

    def record(kind: str, step: int, **values: Any) -> None:
        moment = (start + timedelta(seconds=step)).isoformat().replace("+00:00", "Z")
        records.append({"kind": kind, "step": step, "time": moment, **values})

    record("start", 0, total_steps=steps if finished else 2 * steps, steps_per_epoch=STEPS_PER_EPOCH)
    for step in range(5, steps + 1, 5):
        loss = math.exp(-step / 50)
        losses = {"loss": 3 * loss, "loss_clean": loss, "loss_mixed": loss, "loss_generator": loss, "loss_mask": 0.01}
        rates = {"lr": 0.1 * loss, "mix_lr": 0.2 * loss, "momentum": 0.999, "mask_loss_weight": 0.1, "mask_area": 0.5}
        meters = {"images_per_second": 800.0 + step % 7, "memory_gib": 1.25, "loss_scale": 2.0**16, "a_new_key": 7.0}
        record("train", step, epoch=step // STEPS_PER_EPOCH, top1_train=1 - loss, **losses, **rates, **meters)
        if step % STEPS_PER_EPOCH == 0:
            top = {"top1_query": 1 - loss, "top5_query": 1.0, "top1_momentum": 0.9 - loss, "top5_momentum": 1.0}
            record("eval", step, epoch=step // STEPS_PER_EPOCH, **top, loss_query=loss)
            record("checkpoint", step, seconds=0.125)
            write_gallery(folder, step, random_gallery(step / steps / 2))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text(to_yaml(Config(epochs=6, optimizer=OptimizerConfig(lr=0.5))))
    environment = {"python": "3.11", "versions": {"torch": "2.15.0"}, "gpus": [], "classes": list(classes)}
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "digits")


def data_of(page: Path) -> dict[str, Any]:
    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)[1]
    return json.loads(text, parse_constant=refuse)


class Browser:
    """Chromium without a window, through chromedriver's WebDriver protocol."""

    def __init__(self, profile: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._address = f"http://127.0.0.1:{port}"
        flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"]
        flags += ["disable-background-networking", "disable-component-update", "disable-sync"]
        arguments = [f"--{flag}" for flag in flags] + ["--window-size=1200,1600", f"--user-data-dir={profile}"]
        options = {"goog:chromeOptions": {"args": arguments}}
        options["goog:loggingPrefs"] = {"browser": "ALL", "performance": "ALL"}
        self._wait_for_driver()
        answer = self._call("/session", {"capabilities": {"alwaysMatch": {"browserName": "chrome", **options}}})
        self._address += f"/session/{answer['sessionId']}"

    def _wait_for_driver(self) -> None:
        for _ in range(100):
            try:
                self._call("/status")
                return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError("chromedriver does not answer")

    def _call(self, path: str, body: dict | None = None, method: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._address + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from error

    def view(self, width: int, height: int, *, dark: bool = False) -> None:
        """The size of the window in CSS pixels, and the colour scheme that the person prefers."""
        phone = width < 600
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self._devtools("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._devtools("Emulation.setEmulatedMedia", {"features": [scheme]})

    def _devtools(self, command: str, parameters: dict) -> None:
        self._call("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, page: Path) -> None:
        self.console(), self.requests()
        self._call("/url", {"url": page.resolve().as_uri()})
        # Charts are drawn when the page has been laid out, before the second frame.
        frames = "requestAnimationFrame(() => requestAnimationFrame(() => arguments[0]()))"
        self._call("/execute/async", {"script": frames, "args": []})

    def run(self, script: str) -> Any:
        return self._call("/execute/sync", {"script": script, "args": []})

    def console(self) -> list[str]:
        """What the page wrote to the console since the last call; errors of the browser itself among it."""
        return [entry["message"] for entry in self._call("/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Addresses that the page asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self._call("/se/log", {"type": "performance"})]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def screenshot(self) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(self._call("/screenshot")))).convert("RGB")

    def close(self) -> None:
        self._call("", method="DELETE")
        self._driver.terminate()
        self._driver.wait(10)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (apt-get install chromium chromium-driver)")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def assert_quiet(browser: Browser) -> None:
    assert browser.console() == []
    assert [url for url in browser.requests() if not url.startswith(("file:", "data:"))] == []


def test_page_in_a_browser(run, browser):
    browser.view(1200, 1600)
    browser.open(write_report(run))
    titles = browser.run("return [...document.querySelectorAll('.chart h3')].map((h) => h.firstChild.textContent)")
    assert titles == [
        "Top-1 accuracy",
        "Top-5 accuracy",
        "Losses",
        "Mask area",
        "Learning rate",
        "Momentum",
        "Mask loss weight",
        "Loss scale",
        "Throughput",
        "Peak memory",
        "A new key",
    ]
    curves = browser.run(
        "return [...document.querySelectorAll('.chart')].map((c) => c.querySelectorAll('path:not(.raw)').length)"
    )
    assert curves == [3, 2, 6, 1, 2, 1, 1, 1, 1, 1, 1]
    assert not browser.run("return document.querySelector('.plot').innerHTML.includes('NaN')")
    assert browser.run("return document.querySelector('.numbers').innerText").split("\n")[1].startswith("90.93")
    assert_quiet(browser)


def test_controls_of_the_page(run, browser):
    browser.view(1200, 1600)
    browser.open(write_report(run))
    path = "return document.querySelectorAll('.chart')[2].querySelector('path:not(.raw)').getAttribute('d')"
    smoothed = browser.run(path)
    browser.run("const s = document.querySelector('#smoothing'); s.value = 0; s.dispatchEvent(new Event('input'))")
    assert browser.run(path) != smoothed
    linear = browser.run(path)
    browser.run("document.querySelectorAll('.chart')[2].querySelector('header button').click()")
    assert browser.run(path) != linear

    browser.run("""
        const plot = document.querySelectorAll('.plot')[2], box = plot.getBoundingClientRect();
        plot.dispatchEvent(new PointerEvent('pointermove', {clientX: box.right - 8, clientY: box.top + 50}));
    """)
    tip = browser.run("return document.querySelectorAll('.tip')[2].innerText")
    assert tip.startswith("step 120, epoch 6") and "loss_mask" in tip and "0.01" in tip

    browser.run("document.querySelectorAll('.chart')[2].querySelector('.names button').click()")
    assert browser.run("return document.querySelectorAll('.chart')[2].querySelectorAll('path:not(.raw)').length") == 5

    state = "return [document.querySelector('#frames output').value, ...document.querySelectorAll('.pair')[0].children]"
    state = f"{state}.map((x) => x.innerText ?? x).concat(document.querySelectorAll('#gallery img')[2].src)"
    last = browser.run(state)
    assert last[:5] == ["step 120, epoch 6", "a", "b", "image 50 %", "λ 0.50"]
    browser.run("const s = document.querySelector('#frame'); s.value = 0; s.dispatchEvent(new Event('input'))")
    first = browser.run(state)
    assert first[0] == "step 20, epoch 1" and first[3] == "image 92 %" and first[5] != last[5]
    assert browser.run("return [...document.querySelectorAll('#gallery img')].every((i) => i.naturalWidth === 16)")
    sweep = browser.run("return [...document.querySelectorAll('.sweep figure')].map((x) => x.innerText)")
    assert sweep[:5] == ["image 0 %", "image 25 %", "image 50 %", "image 75 %", "image 100 %"]
    assert sweep[5:] == ["λ 0.00", "λ 0.25", "λ 0.50", "λ 0.75", "λ 1.00"]
    browser.run("document.querySelector('#play').click()")
    time.sleep(0.7)
    assert browser.run(state)[0] != "step 20, epoch 1"
    assert_quiet(browser)


def brightness(picture: Image.Image) -> float:
    return float(np.asarray(picture.convert("L")).mean())


def test_light_and_dark(run, browser):
    page = write_report(run)
    browser.view(1200, 1600)
    browser.open(page)
    light = brightness(browser.screenshot())
    browser.view(1200, 1600, dark=True)
    browser.open(page)
    dark = brightness(browser.screenshot())
    assert light > 220 and dark < 60
    browser.run("document.querySelector('#theme').click()")  # from the system's choice to light
    assert brightness(browser.screenshot()) == pytest.approx(light, abs=3)
    browser.run("document.querySelector('#theme').click()")
    assert brightness(browser.screenshot()) == pytest.approx(dark, abs=3)
    browser.run("document.querySelector('#theme').click()")


def test_a_phone_scrolls_one_way_only(tmp_path, browser):
    run = make_run(tmp_path / ("a_long_name_" * 10), classes=("n" * 80, "m" * 80, "k"))
    config = to_yaml(Config(output="/data/" + "folder/" * 30))
    (run / "config.yaml").write_text(config)
    browser.view(390, 844)
    browser.open(write_report(run))
    assert browser.run("return document.documentElement.scrollWidth") == 390
    assert_quiet(browser)


def test_text_of_a_run_is_never_markup(tmp_path, browser):
    run = make_run(tmp_path / "<b>bold", classes=(HOSTILE,) * 3)
    (run / "config.yaml").write_text(json.dumps({"output": HOSTILE, HOSTILE: {HOSTILE: [HOSTILE]}}))
    environment = {"classes": [HOSTILE] * 3, HOSTILE: HOSTILE, "nested": {HOSTILE: HOSTILE}}
    (run / "environment.json").write_text(json.dumps(environment))
    with (run / "metrics.jsonl").open("a") as file:
        for kind in ("train", "eval", HOSTILE):
            record = {"kind": kind, "step": 120, "time": HOSTILE, HOSTILE: 0.5, f"top1{HOSTILE}": 0.5, "b": HOSTILE}
            file.write(json.dumps(record | {"nonfinite": {HOSTILE: HOSTILE}}) + "\n")
    page = write_report(run)
    browser.view(1200, 1600)
    browser.open(page)
    assert browser.run("return window.hacked === undefined && document.scripts.length === 2")
    assert browser.run("return document.querySelectorAll('img:not(#gallery img), b:not(#theme b)').length") == 0
    assert HOSTILE in browser.run("return document.querySelector('#config').textContent")
    assert HOSTILE in browser.run("return document.querySelector('figcaption').textContent")
    assert_quiet(browser)
    write_picture(run)


def test_the_page_forbids_every_request(run, browser):
    """The content security policy holds even against markup that slips through."""
    page = write_report(run, run / "spoiled.html")
    page.write_text(page.read_text().replace("<main>", '<main><script>window.hacked = 1</script><img src="x.png">'))
    browser.view(1200, 1600)
    browser.open(page)
    assert browser.run("return window.hacked === undefined")
    assert sum("Content Security Policy" in message for message in browser.console()) == 2


def test_the_page_is_self_contained(run):
    text = write_report(run).read_text()
    assert not re.search(r"""\b(src|href)\s*=\s*["'](?!data:|#)""", text)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|sendBeacon|import\(", text)
    assert '<meta name="viewport"' in text


def test_figures_at_the_top(run):
    text = write_report(run).read_text()
    found = dict(re.findall(r"<dt>([^<]+)</dt><dd>([^<]*)<small>", text))
    assert found == {
        "Query top-1": "90.93 %",
        "Momentum top-1": "80.93 %",
        "Best top-1": "90.93 %",
        "Steps": "120",
        "Images per second": "803",
        "Time": "2 min 00 s",
    }
    assert "finished" in text and "of 120" in text
    assert 'class="notes"' not in text
    assert "<div class=changed><dt>lr</dt><dd>0.5</dd></div>" in text and "<div><dt>seed</dt><dd>0</dd></div>" in text


def test_time_does_not_count_pauses(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    later = {"kind": "start", "step": 120, "time": "2026-02-01T00:00:00Z", "total_steps": 200, "steps_per_epoch": 20}
    end = {"kind": "stopped", "step": 130, "time": "2026-02-01T01:00:00Z", "signal": 15}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(later) + "\n" + json.dumps(end) + "\n")
    text = write_report(folder).read_text()
    assert "<dd>1 h 02 min<small>" in text
    assert "stopped at step 130" in text


def test_a_run_that_has_failed(run, tmp_path):
    """By its last session alone: one that was continued is open again."""
    folder = shutil.copytree(run, tmp_path / "run")
    start = {"kind": "start", "step": 120, "total_steps": 240, "steps_per_epoch": 20}
    failure = {"kind": "failed", "step": 140, "error": "rank 1 was lost"}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(start) + "\n" + json.dumps(failure) + "\n")
    text = write_report(folder).read_text()
    assert '<span class="status failed">failed at step 140</span>' in text
    assert "<li>The training failed: rank 1 was lost</li>" in text
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(start) + "\n")
    text = write_report(folder).read_text()
    assert "not finished, step 140 of 240" in text and "The training failed" not in text


def test_a_run_that_has_just_started(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(Config()))
    text = write_report(tmp_path).read_text()
    for missing in ("There is no metrics.jsonl yet", "environment.json is missing", "There is no gallery"):
        assert missing in text
    assert "not finished, step 0" in text
    assert write_picture(tmp_path).stat().st_size > 0


def test_a_run_without_evaluation_is_shown_in_the_browser(tmp_path, browser):
    run = make_run(tmp_path / "run", steps=15, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 20, "time": "2026-01-01T00:00:20Z", "loss": null, "nonfinite"')
    (run / "config.yaml").write_text("a: [")
    (run / "gallery").mkdir()
    (run / "gallery" / "step_00000010.npz").write_bytes(b"PK torn")
    (run / "gallery" / "step_00000011.npz").write_bytes(b"")
    text = write_report(run).read_text()
    assert "not finished, step 15 of 30" in text
    assert "1 line of metrics.jsonl could not be read" in text
    assert "config.yaml could not be read" in text
    assert "gallery/step_00000010.npz could not be read" in text
    assert "gallery/step_00000011.npz could not be read" in text
    assert "No evaluation has been recorded yet" in text
    browser.view(1200, 1600)
    browser.open(run / "report.html")
    assert browser.run("return document.querySelectorAll('.chart').length") == 10
    assert_quiet(browser)


def test_values_that_are_not_finite_are_gaps_with_a_mark(run, tmp_path, browser):
    folder = shutil.copytree(run, tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        if record["kind"] == "train" and record["step"] in (50, 55):
            record |= {"loss": None, "nonfinite": {"loss": "nan"}}
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n")
    page = write_report(folder)
    assert "loss was not a finite number in 2 records, first at step 50." in page.read_text()
    browser.view(1200, 1600)
    browser.open(page)
    assert browser.run("return document.querySelectorAll('.plot .bad').length") == 2
    line = browser.run(
        "return document.querySelectorAll('.chart')[2].querySelector('path:not(.raw)').getAttribute('d')"
    )
    assert line.count("M") == 2  # the pen is lifted once


@pytest.mark.parametrize("name, message", [("nothing", "no such run"), ("empty", "is not the folder of a run")])
def test_what_is_no_run_is_refused(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    for write in (write_report, write_picture):
        with pytest.raises(ReportError, match=message):
            write(tmp_path / name)


def test_long_runs_make_small_pages(tmp_path):
    tmp_path.joinpath("config.yaml").write_text(to_yaml(Config()))
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 20_001):
            file.write(json.dumps({"kind": "train", "step": step, "loss": float(step)}) + "\n")
    for step in range(100):
        write_gallery(tmp_path, step, random_gallery(step / 100, pairs=2, side=8))
    data = data_of(write_report(tmp_path))
    (curve,) = data["charts"][0]["series"]
    assert len(curve["x"]) == len(curve["y"]) <= charts.MAX_POINTS
    assert curve["x"][-1] == 20_000
    assert np.mean(curve["y"]) == pytest.approx(10_000, rel=1e-2)
    steps = [frame["step"] for frame in data["gallery"]["frames"]]
    assert len(steps) == recorded_run.MAX_GALLERIES and steps[0] == 0 and steps[-1] == 99
    assert len(data["gallery"]["pictures"]) <= 4 + 4 * recorded_run.MAX_GALLERIES  # images and partners are stored once


def test_photographs_are_made_small(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    write_gallery(tmp_path, 1, random_gallery(0.5, pairs=2, side=224))
    gallery = data_of(write_report(tmp_path))["gallery"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) for uri in gallery["pictures"]]
    assert {picture.size for picture in pictures} == {(160, 160)}
    # Of the sweep's five mixed samples, three are an image, its partner and the pair's own mixed sample.
    assert sorted(picture.format for picture in pictures) == ["JPEG"] * 8 + ["PNG"] * 5
    assert not gallery["small"]


def test_what_a_training_logs_is_what_the_page_shows(tmp_path):
    log = run_log.RunLog(tmp_path, is_main=True, tensorboard=False, start_step=0, config={})
    log.start(4, 2, 0)
    for step in range(1, 5):
        log.step(step, 8)
        log.train(step, 0, {"loss": 1 / step})
    log.evaluation(4, 2, {"top1_query": 0.75})
    log.gallery(4, random_gallery(0.25))
    log.close()
    page = write_report(tmp_path)
    data = data_of(page)
    losses = next(chart for chart in data["charts"] if chart["title"] == "Losses")
    assert losses["series"][0]["x"] == [1, 2, 3, 4]
    assert losses["series"][0]["y"] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4], rel=1e-5)
    assert data["stepsPerEpoch"] == 2
    assert data["gallery"]["frames"][0]["pairs"][0]["area"] == pytest.approx(0.25)
    assert "75.00 %" in page.read_text() and "finished" in page.read_text()


def test_picture_shows_curves_and_masks(run):
    picture = Image.open(write_picture(run)).convert("RGB")
    elsewhere = run.parent / "elsewhere.png"
    assert write_picture(run, elsewhere) == elsewhere
    assert elsewhere.read_bytes() == (run / "summary.png").read_bytes()
    assert picture.width == 1200
    colors = {color for _, color in picture.getcolors(maxcolors=2**24)}
    for curve in summary_picture.CURVE_COLORS[:5]:
        assert tuple(bytes.fromhex(curve[1:])) in colors
    assert (255, 255, 255) in colors


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
keys = st.sampled_from(["loss", "lr", "top1_query", "epoch", "time", "nonfinite", "total_steps", "images_per_second"])
foreign_records = st.builds(
    lambda kind, step, values: {**values, "kind": kind, "step": step},
    st.sampled_from(["train", "eval", "start", "other"]),
    st.integers(0, 10**6) | json_values,
    st.dictionaries(keys, json_values, max_size=5),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(foreign_records, max_size=5), st.integers(0, 2**32))
def test_any_metrics_file_makes_a_page(tmp_path_factory, records, seed):
    folder = tmp_path_factory.mktemp("run")
    text = "".join(json.dumps(record) + "\n" for record in records)
    cut = random.Random(seed).randint(0, len(text))
    (folder / "metrics.jsonl").write_bytes((text[:cut] + "\n" + text).encode(errors="surrogateescape"))
    assert all(chart["series"] for chart in data_of(write_report(folder))["charts"])  # and all of it is JSON
    with Image.open(write_picture(folder)) as picture:
        picture.verify()
