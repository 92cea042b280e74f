"""The parts of a run are built with its settings."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_config, tiny_model

from automix_dist import run

PROCESS = SimpleNamespace(rank=1, world_size=2, device=torch.device("cpu"))


@pytest.mark.parametrize("asked", [(), ("compile",), ("activation_checkpointing", "sync_batchnorm")])
def test_the_engine_gets_the_model_that_is_asked_for(asked, monkeypatch):
    config, done = tiny_config(engine={"device": "auto", **dict.fromkeys(asked, True)}), []
    model = tiny_model(tiny_config())
    monkeypatch.setattr(run, "checkpoint_blocks", lambda encoder: done.append("activation_checkpointing"))
    monkeypatch.setattr(run, "synchronize_batchnorm", lambda model: done.append("sync_batchnorm") or model)
    monkeypatch.setattr(model, "compile_regions", lambda: done.append("compile"))
    monkeypatch.setattr(run, "build_engine", lambda model, *_: model)
    assert run._engine_of(model, config, PROCESS) is model
    assert sorted(done) == sorted(asked)


def test_the_loaders_are_those_of_the_run(monkeypatch):
    opened = []

    def loader(path, config, **settings):
        opened.append((path, config, settings))
        return SimpleNamespace(manifest=SimpleNamespace(index_checksum="as checked"))

    monkeypatch.setattr(run, "TrainLoader", loader)
    monkeypatch.setattr(run, "EvalLoader", loader)
    checked = SimpleNamespace(train=SimpleNamespace(index_checksum="as checked"), val=SimpleNamespace())
    checked.val.index_checksum = "as checked"
    config = tiny_config(
        seed=5, batch_size=24, engine={"accumulation_steps": 3}, data={"train": "a.beton", "val": "b.beton"}
    )
    run._open_loaders(config, PROCESS, checked)
    share = {"rank": 1, "world_size": 2, "device": PROCESS.device}
    assert opened == [
        ("a.beton", config.data, {"seed": 5, "batch_size": 24, "accumulation_steps": 3, **share}),
        ("b.beton", config.data, {"batch_size": 4, **share}),
    ]
    run._open_loaders(tiny_config(eval_batch_size=7), PROCESS, checked)
    assert opened[-1][2]["batch_size"] == 7
    checked.val.index_checksum = "of other images"
    with pytest.raises(run.beton.BetonError, match=r"data\.val = .* was replaced while the run was starting"):
        run._open_loaders(config, PROCESS, checked)
