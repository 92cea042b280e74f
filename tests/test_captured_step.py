"""Training steps that are recorded once and replayed: on a CPU by a tape of operators, which as a CUDA graph does keeps
its memory and everything that Python decided; on a GPU by the CUDA graph itself."""

import copy
from unittest import mock

import pytest
import torch
from automix_kernels import api as kernels
from engine_steps import ENGINES, assert_same, engine_steps, start_engine, train_plain, whole_parameters
from ranks import run_ranks
from tiny import CLASSES, SIZE, TinyBackbone, micro_batch, tiny_config, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from automix_dist import captured_step
from automix_dist.batchnorm import RunningStatistics
from automix_dist.captured_step import CudaGraphs, capture_steps
from automix_dist.config import ConfigError
from automix_dist.config_file import from_dict
from automix_dist.draws import seed_torch
from automix_dist.model import build_model
from automix_dist.momentum import MomentumUpdate
from automix_dist.optimizer import build_optimizer


class Tape(TorchDispatchMode):
    """A recording of a function's operators with their arguments: numbers as they were, tensors by their memory."""

    made = 0

    def __init__(self, function):
        super().__init__()
        Tape.made += 1
        function()
        self.calls = []
        with self:
            self.outputs = function()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        assert operator is not torch.ops.aten._local_scalar_dense.default, "the host asks for a value"
        if any(isinstance(each, torch.Tensor) for each in tree_leaves(result)):
            self.calls.append((operator, args, kwargs or {}, result))
        return result

    def replay(self):
        with torch.no_grad():
            for operator, args, kwargs, before in self.calls:
                for old, new in zip(tree_leaves(before), tree_leaves(operator(*args, **kwargs)), strict=True):
                    if old is not None and old.data_ptr() != new.data_ptr():  # neither a view nor in place
                        old.copy_(new)


class Dropping(TinyBackbone):
    """With dropout, whose numbers are torch's own."""

    def features_and_embedding(self, images):
        features = self.stem(images)
        return features, nn.functional.dropout(self.top(features), 0.2, self.training).mean(dim=(2, 3))


POLICIES = {
    "automix": {"automix": {"upsampling": ["nearest", "bilinear"], "mask_adjust": 0.5, "switch_off": 0.5}},
    "one backward": {"engine": {"immediate_backward": False}},
    "operators": {"engine": {"fused_batchnorm": True}},
    "joint query": {"engine": {"fused_batchnorm": True, "joint_query": True}},
    "samix": {"policy": {"name": "samix"}, "automix": {"lam_concat": False}},
    "adautomix": {"policy": {"name": "adautomix", "settings": {"random_samples": True}}},
    "none": {"policy": {"name": "none"}},
    "cutmix": {"policy": {"name": "cutmix", "ema_decay": 0.9}},
    "manifoldmix": {"policy": {"name": "manifoldmix", "settings": {"layers": ["stem", "top"]}}},
    "puzzlemix": {"policy": {"name": "puzzlemix", "settings": {"blocks": [2, 4]}}},
}


def train(config, captured: bool, steps: int = 8) -> tuple[list, dict]:
    """The losses of each step, and the model's state afterwards."""
    torch.manual_seed(0)
    model = build_model(config, Dropping(), CLASSES, torch.float32).train()
    optimizer, statistics = build_optimizer(model, config.optimizer), RunningStatistics(model)
    if captured:
        capture_steps(model, lambda: Tape)
    update, losses = MomentumUpdate(model), []
    for step in range(steps):
        images, labels = micro_batch(step, 0, 8)
        statistics.keep()
        draws = model.draw(images, seed=0, step=step)
        seed_torch(seed=0, step=step)
        losses.append(model(images, labels, draws, 0.1 / (step + 1)))
        optimizer.zero_grad()
        losses[-1].total.backward()
        optimizer.step()
        statistics.restore(torch.tensor(float(step == 3)))
        update(0.9)
    model.eval()
    assert torch.equal(model(images)[0], model(images)[0])  # evaluation is not recorded
    return losses, model.state_dict()


@pytest.mark.parametrize("policy", POLICIES)
def test_replayed_steps_train_as_steps_do(policy, monkeypatch):
    """To the bit, for draws, weights of the mask loss and dropout that change in each step."""
    if policy == "operators":  # those of the kernels, as on a GPU, with their definitions
        pytest.importorskip("triton")
        monkeypatch.setattr(kernels, "_takes_triton", lambda *_: True)
    config, before = tiny_config(**POLICIES[policy]), Tape.made
    expected, state = train(config, captured=False)
    losses, replayed = train(config, captured=True)
    assert 1 <= Tape.made - before < 8, "some steps were replayed"
    for got, wanted in zip(losses, expected, strict=True):
        for name, value in wanted._asdict().items():
            assert torch.equal(getattr(got, name), value), name
    assert state.keys() == replayed.keys()
    for name, value in state.items():
        torch.testing.assert_close(replayed[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_recordings_have_nothing_to_do_with_the_graphs_of_others():
    """What DDP holds of each parameter, and a step that is still alive, belong to other streams."""
    model = tiny_model(tiny_config()).train()
    own = list(model.parameters())
    seen = []

    def record(function):
        seen.append([(a is not b, a.data_ptr() == b.data_ptr()) for a, b in zip(model.parameters(), own, strict=True)])
        return Tape(function)

    capture_steps(model, lambda: record)
    images, labels = micro_batch(0, 0, 8)
    model(images, labels, model.draw(images, seed=0, step=0), 0.1).total.backward()
    assert seen == [[(True, True)] * len(own)]
    assert all(a is b for a, b in zip(model.parameters(), own, strict=True))
    assert all(p.grad is not None for p in own if p.requires_grad)


def test_the_tape_keeps_what_python_decides():
    """As a CUDA graph would: a step that hides a number in Python is found out by the test above."""
    model = tiny_model(tiny_config())
    plain, number = model.forward, iter((1.0, 1.0, 5.0))
    model.forward = lambda *arguments: plain(*arguments)._replace(clean=plain(*arguments).total * next(number))
    capture_steps(model.train(), lambda: Tape)
    images, labels = micro_batch(0, 0, 8)
    draws = model.draw(images, seed=0, step=0)
    first, second = (model(images, labels, draws, 0.1).clean for _ in range(2))
    assert next(number) == 5.0 and torch.equal(first, second)


def test_graphs_of_another_size_make_room_and_too_many_are_refused(monkeypatch):
    config = tiny_config(automix={"upsampling": ["nearest", "bilinear"]})
    model = tiny_model(config).train()
    captured = capture_steps(model, lambda: Tape)
    for step, size in enumerate([SIZE] * 12 + [2 * SIZE]):
        images, labels = torch.zeros(4, size, size, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
        model(images, labels, model.draw(images, seed=0, step=step), 0.1)
        assert len(captured.captured) <= 4
    assert len(captured.captured) == 1
    monkeypatch.setattr(captured_step, "MAX_GRAPHS", 1)
    with pytest.raises(ConfigError, match="differ in more than 1 ways"):
        for step in range(8):
            model(images, labels, model.draw(images, seed=0, step=step), 0.1)


def train_recorded(config, folder):
    """As train_with_engine, recorded: what `automix train` does with engine.cuda_graph, but for the GPU."""
    process, model, engine = start_engine(config)
    capture_steps(model, lambda: Tape)
    engine_steps(config, process, model, engine, 0, 4)
    assert Tape.made > 0
    return whole_parameters(engine, folder, process, config)


@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2", "ddp"])
def test_replayed_steps_train_the_same_under_an_engine(engine, tmp_path):
    config = tiny_config(engine=ENGINES[engine], automix={"switch_off": 0.5})
    ranks = run_ranks(2, train_recorded, config, tmp_path)
    assert_same(ranks[0], train_plain(config, ranks=2, steps=4))


@pytest.mark.slow
def test_a_recording_is_no_reason_to_compile_again():
    """Compiled regions take the parameters of each recording for the model's own."""
    config = tiny_config()
    model = tiny_model(config).train()
    model.compile_regions("aot_eager")
    counters = torch._dynamo.utils.counters
    counters.clear()
    images, labels = micro_batch(0, 0, 8)
    graphs = []
    for _ in range(3):
        with captured_step._aliased_parameters(model):
            losses = model(images, labels, model.draw(images, seed=0, step=0), 0.1)
            torch.autograd.grad(losses.total, [p for p in model.parameters() if p.requires_grad])
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] >= 4 and set(graphs) == {graphs[0]}
    torch.compiler.reset()
    counters.clear()


def test_what_does_not_go_with_a_graph_is_refused():
    for engine in ({"zero_stage": 3}, {"name": "fsdp2"}):
        with pytest.raises(ConfigError, match=r"engine\.cuda_graph needs whole parameters"):
            from_dict({"engine": {"cuda_graph": True, **engine}})
    for key, value in (("device", "cpu"), ("activation_checkpointing", True), ("sync_batchnorm", True)):
        with pytest.raises(ConfigError, match=f"engine.cuda_graph does not go with engine.{key} = {value!r}"):
            from_dict({"engine": {"cuda_graph": True, key: value}})


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_cuda_graph_trains_as_steps_do(compiled):
    config = tiny_config(engine={"device": "cuda"}, automix=POLICIES["automix"]["automix"])
    torch.manual_seed(0)
    plain = build_model(config, Dropping(), CLASSES, torch.bfloat16).cuda().train()
    recorded = copy.deepcopy(plain)
    if compiled:
        plain.compile_regions()
        recorded.compile_regions()
    capture_steps(recorded)
    for step in range(8):
        found = []
        for model in (plain, recorded):
            images, labels = (each.cuda() for each in micro_batch(step, 0, 8))
            seed_torch(seed=0, step=step)
            losses = model(images, labels, model.draw(images, seed=0, step=step), 0.1 / (step + 1))
            model.zero_grad()
            losses.total.backward()
            found.append([losses.total.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-4)
    for (name, got), expected in zip(recorded.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-4, msg=name)


def test_a_recording_that_fails_says_why(monkeypatch):
    """And not what the end of a broken capture raises on top of it."""
    torch = mock.MagicMock()
    torch.cuda.graph.return_value.__exit__.side_effect = RuntimeError("capture invalidated")
    monkeypatch.setattr(captured_step, "torch", torch)
    passes = [None] * captured_step.WARM_UP + [ValueError("not permitted while capturing\nat some place")]
    with pytest.raises(ConfigError, match=r"engine\.cuda_graph.*ValueError: not permitted while capturing\): set"):
        CudaGraphs()(mock.Mock(side_effect=passes))


@pytest.mark.gpu
def test_a_step_that_cannot_be_recorded_leaves_the_gpu_usable():
    stream, number = torch.cuda.current_stream(), torch.ones((), device="cuda")
    with pytest.raises(ConfigError, match=r"engine\.cuda_graph: the step cannot be recorded"):
        CudaGraphs()(lambda: (torch.rand_like(number) * number).item())
    assert torch.cuda.current_stream() == stream
    assert 0 <= torch.rand_like(number).item() <= 1
    recording = CudaGraphs()(lambda: number + torch.rand_like(number))
    recording.replay()
    assert 1 <= recording.outputs.item() <= 2


@pytest.mark.gpu
def test_a_cuda_graph_is_recorded_beside_what_others_hold_of_the_parameters():
    """As DDP and the micro batch before do; and again at another image size."""
    config = tiny_config(engine={"device": "cuda"}, automix={"upsampling": ["nearest", "bilinear"]})
    model = tiny_model(config).cuda().train()
    held = [torch.autograd.graph.get_gradient_edge(p).node for p in model.parameters() if p.requires_grad]
    captured = capture_steps(model)
    losses = []
    for step, size in enumerate([SIZE] * 6 + [2 * SIZE] * 6):
        images = torch.randint(0, 256, (8, size, size, 3), dtype=torch.uint8, device="cuda")
        labels = torch.randint(0, CLASSES, (8,), device="cuda")
        losses.append(model(images, labels, model.draw(images, seed=0, step=step), 0.1))
        losses[-1].total.backward()
    assert len(held) > 0 and 1 < len(captured.captured) <= 4
    assert all(torch.isfinite(each.total) for each in losses)
