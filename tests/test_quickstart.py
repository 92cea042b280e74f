"""The README's first command, with half the epochs. It takes all cores, so launch/test.sh runs it alone."""

import os
import subprocess
import time

import pytest
from ranks import ROOT, records


@pytest.mark.slow
def test_quickstart_reaches_its_promise(tmp_path):
    """97 % and everything it leaves behind."""
    output = tmp_path / "quickstart"
    began = time.monotonic()
    environment = {k: v for k, v in os.environ.items() if k not in ("DS_ACCELERATOR", "OMP_NUM_THREADS")}
    (ROOT / "data").mkdir(exist_ok=True)
    result = subprocess.run(
        ["bash", "launch/quickstart.sh", "epochs=12"],
        cwd=ROOT,
        env=environment | {"AUTOMIX_RUN": str(output)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    top1 = records(output, "eval")[-1]["top1_query"]
    assert top1 >= 0.97, f"top-1 {top1:.2%} after {time.monotonic() - began:.0f} s"
    for name in ("report.html", "summary.png", "model.safetensors", "config.yaml", "environment.json", "metrics.jsonl"):
        assert (output / name).stat().st_size > 0, name
