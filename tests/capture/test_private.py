"""Each of PyTorch's private interfaces that capture stands on, alone, so that a new release says which one it breaks."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autoplan.capture import private

aten = torch.ops.aten
CAPTURE = Path(private.__file__).parent


def test_sequence_numbers_grow_with_the_nodes() -> None:
    x = torch.ones(2, requires_grad=True)
    first = private.sequence()
    y = x.exp()
    assert private.sequence_of(y.grad_fn) == first
    assert private.sequence() == first + 1


def test_the_running_node_is_known_in_the_backward_pass() -> None:
    seen: list[int | None] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(private.node_sequence())
            return func(*args, **(kwargs or {}))

    y = torch.ones(2, requires_grad=True).exp()
    with Watch():
        y.sum().backward()
    assert private.sequence_of(y.grad_fn) in seen
    assert private.node_sequence() is None


def test_the_engine_adds_gradients_up_after_the_nodes_hooks() -> None:
    """What `Recorder._meter` tells apart: an add after a node's hook and before the next node is the engine's."""
    log: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            log.append("add" if func in private.ADDS else str(func))
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, requires_grad=True).exp()
    a, b = x.sin(), x.cos()
    for name, node in (("sin", a.grad_fn), ("cos", b.grad_fn)):
        node.register_hook(lambda *_, name=name: log.append(name))  # type: ignore[union-attr]
    with Watch():
        torch.autograd.grad((a + b).sum(), x)
    assert log.index("add") < len(log)
    second = max(log.index("sin"), log.index("cos"))
    assert log[second + 1] == "add"


def test_edges_and_the_shape_of_gradients() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    y = x.double().sum(0)
    ((target, slot),) = private.next_edges(y.grad_fn)
    assert private.gradient_of(target, slot) == ((2, 3), torch.float64)


def test_views_share_a_storage_key() -> None:
    x = torch.ones(4)
    assert private.storage_key(x[1:]) == private.storage_key(x) != private.storage_key(x.clone())


def test_no_torch_function_hides_calls() -> None:
    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError

    with Seen(), private.no_torch_function():
        torch.ones(1).exp()


def test_patches_are_taken_back() -> None:
    class Thing:
        def method(self) -> int:
            return 1

    thing = Thing()
    with private.patched(Thing, "method", lambda self: 2), private.instance_patched(thing, "method", lambda: 3):
        assert (thing.method(), Thing().method()) == (3, 2)
    assert thing.method() == 1
    assert "method" not in vars(thing)


def test_fake_tensors_have_no_values() -> None:
    with private.FakeTensorMode():
        x = torch.ones(3)
        assert isinstance(x, private.FakeTensor)
        with pytest.raises(private.DataDependentOutputException):
            x.sum().item()
        with pytest.raises(private.DynamicOutputShapeException):
            x.nonzero()


def test_fake_tensors_have_no_address() -> None:
    with private.fake_mode():
        tensor = torch.empty(3)
    with pytest.raises(RuntimeError, match="data pointer"):
        tensor.data_ptr()


@pytest.mark.parametrize("shape", [(24,), (2, -1), (3, 2, 2, 2)])
def test_views_are_as_torch_says(shape: tuple[int, ...]) -> None:
    real, mode = torch.empty(3, 8), private.fake_mode()
    with mode:
        fake = private.fake_of(real, mode, real.dtype)
        seen, other = fake.view(shape), fake.t()
    assert isinstance(seen, private.FakeTensor)
    assert (seen.shape, seen.stride()) == (real.view(shape).shape, real.view(shape).stride())
    assert private.storage_key(seen) == private.storage_key(fake)
    with mode, pytest.raises(RuntimeError, match="view"):
        other.view(24)


def test_a_fake_parameter_is_a_parameter() -> None:
    mode = private.fake_mode()
    tensor = private.fake_of(nn.Parameter(torch.empty(2, 3), requires_grad=False), mode, torch.bfloat16)
    assert isinstance(tensor, nn.Parameter)
    assert (tensor.shape, tensor.dtype, tensor.device.type, tensor.requires_grad) == ((2, 3), torch.bfloat16, "cpu", False)
    assert not isinstance(private.fake_of(torch.empty(2), mode, torch.float32), nn.Parameter)


def test_failures_of_fake_tensors_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with private.fake_mode():
        one, other = torch.empty(3), torch.empty(4)
        with private.no_log_of_fakes(), pytest.raises(RuntimeError):
            one + other
    assert not caplog.records


def test_the_place_of_checkpointing() -> None:
    owner, name = private.CHECKPOINT
    assert callable(getattr(owner, name))


def test_modules_are_called_through_one_method() -> None:
    assert private.module_call() is nn.Module.__call__


def test_flops_of_products_convolutions_and_groups() -> None:
    a, b = torch.ones(2, 3), torch.ones(3, 5)
    assert private.flops(aten.mm.default, (a, b), {}, a @ b) == 2 * 2 * 3 * 5
    assert private.flops(aten.exp.default, (a,), {}, a) == 0
    rows, experts = torch.ones(6, 3), torch.ones(2, 3, 5)
    assert private.flops(aten._grouped_mm.default, (rows, experts), {}, torch.ones(6, 5)) == 2 * 6 * 3 * 5
    x, weight, out = torch.ones(1, 8, 10), torch.ones(8, 1, 3), torch.ones(1, 8, 8)
    forward = private.flops(aten.convolution.default, (x, weight, None, [1], [0], [1], False, [0], 8), {}, out)
    args = (out, x, weight, None, [1], [0], [1], False, [0], 8, [True, True, False])
    assert forward == 2 * 8 * 8 * 3
    assert private.flops(aten.convolution_backward.default, args, {}, (x, weight, None)) == 2 * forward


@pytest.mark.parametrize(
    ("kernel", "view"),
    [
        (aten.view.default, True),
        (aten.transpose.int, True),
        (aten.detach.default, True),
        (aten.empty.memory_format, True),
        (aten.clone.default, False),
        (aten.add_.Tensor, False),
        (aten.mm.default, False),
    ],
)
def test_views_launch_no_kernel(kernel: Any, view: bool) -> None:
    assert private.is_view(kernel) is view


def test_private_names_of_torch_are_in_one_file() -> None:
    """`torch._C`, `torch._subclasses`, `tensor._version`... are nowhere else; aten's private operators are no interface."""
    allowed = {"_parameters", "_buffers", "_modules", "_orig_mod", "_fields", "_getframe"}  # nn.Module's own, Python's own
    for file in CAPTURE.glob("*.py"):
        if file.name == "private.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                parts = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
                assert not {part for part in parts if part.startswith("_")} - allowed, (file.name, parts)
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "recorder", "aten", "cls", "ctx")
                assert of_self or node.attr in allowed, (file.name, node.lineno, node.attr)


def test_tensors_of_the_zoo_need_no_memory() -> None:
    with private.FakeTensorMode():
        x: Tensor = torch.empty(10**6, 10**6)
    assert x.shape == (10**6, 10**6)
