"""Launches as operators: called directly in eager training, by way of torch's dispatcher where something listens."""

import pytest
import torch
from automix_kernels.operators import Operator, cdiv, next_power_of_2
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

calls = []


def launch(x: Tensor, y: Tensor | None, factor: float = 3.0) -> tuple[Tensor, Tensor]:
    calls.append(1)
    return x * factor + (0 if y is None else y), x.new_full((2,), factor)


operator = Operator("a_test", launch)
operator.register_kernel("cpu")(launch)
operator.register_fake(lambda x, y, factor=3.0: (torch.empty_like(x), x.new_empty(2)))


def backward_launch(grad: Tensor, factor: float) -> Tensor:
    return grad * factor


backward_operator = Operator("a_test_backward", backward_launch)
backward_operator.register_kernel("cpu")(backward_launch)
backward_operator.register_fake(lambda grad, factor: torch.empty_like(grad))


def save(ctx, inputs, output):
    _, y, ctx.factor = inputs
    ctx.has_y = y is not None
    ctx.mark_non_differentiable(output[1])


def backward(ctx, grad, _):
    return backward_operator(grad, ctx.factor), grad if ctx.has_y else None, None


operator.register_autograd(backward, setup_context=save)


def write(x: Tensor, target: Tensor) -> Tensor:
    target.detach().copy_(x.sum())  # as a kernel does: autograd is not told
    return x + 1


writer = Operator("a_test_that_writes", write, mutates_args=("target",))
writer.register_kernel("cpu")(write)


@pytest.fixture(params=["direct", "dispatched"])
def way(request, monkeypatch):
    if request.param == "direct":
        for each in (operator, backward_operator, writer):
            monkeypatch.setattr(each, "direct_devices", {"cpu"})
    calls.clear()
    return request.param


def arguments(**options) -> tuple[Tensor, Tensor]:
    return torch.arange(3.0, **options), torch.ones(3, **options)


def test_both_ways_give_the_same(way):
    x, y = arguments(requires_grad=True)
    result, constant = operator(x, y)
    assert result.tolist() == [1.0, 4.0, 7.0] and constant.tolist() == [3.0, 3.0]
    assert result.requires_grad and not constant.requires_grad and "automix_a_test" in result.grad_fn.name()
    weights = torch.tensor([1.0, 10.0, 100.0])
    of_x, of_y = torch.autograd.grad(result, [x, y], weights, create_graph=True)
    assert of_x.tolist() == [3.0, 30.0, 300.0] and of_y.tolist() == weights.tolist()
    (alone,) = torch.autograd.grad(operator(x, None, 5.0)[0], x, weights)
    assert alone.tolist() == [5.0, 50.0, 500.0]
    with torch.no_grad():
        assert not operator(x, y)[0].requires_grad
    with torch.inference_mode():
        assert operator(x, y)[0].is_inference()
    assert len(calls) == 4


def test_a_second_derivative_is_refused(way):
    x, y = arguments(requires_grad=True)
    (gradient,) = torch.autograd.grad(operator(x, y)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), x)


def test_autograd_knows_what_was_written_to(way):
    x, target = torch.ones(3), torch.zeros(())
    product = torch.ones((), requires_grad=True) * target
    writer(x, target)
    assert target.item() == 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_modes_and_compilers_see_an_operator(monkeypatch):
    for each in (operator, backward_operator):
        monkeypatch.setattr(each, "direct_devices", {"cpu"})
    seen = []

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.name())
            return function(*args, **(kwargs or {}))

    x, y = arguments(requires_grad=True)
    with Listening():
        operator(x, y)[0].sum().backward()
    assert "automix::a_test" in seen and "automix::a_test_backward" in seen
    with FlopCounterMode(display=False, custom_mapping={torch.ops.automix.a_test: lambda *_, **__: 7}) as counter:
        operator(x, y)
    assert counter.get_total_flops() == 7
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda *a: operator(*a)[0], fullgraph=True, backend=backend)
    assert torch.equal(compiled(x, y), operator(x, y)[0])
    assert "automix.a_test" in graphs[0].code


def test_other_devices_get_what_is_registered_for_them():
    assert operator(*arguments(device="meta"))[0].device.type == "meta"


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 1023, 1024, 1025])
def test_sizes(number):
    triton = pytest.importorskip("triton")
    assert next_power_of_2(number) == triton.next_power_of_2(number)
    assert [cdiv(number, by) for by in (1, 2, 7)] == [triton.cdiv(number, by) for by in (1, 2, 7)]
