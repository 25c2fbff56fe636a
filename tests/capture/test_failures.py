"""Models that can't be captured end in one sentence that names module, operation, line and remedy; near misses are captured."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from autoplan import cli
from autoplan.capture import capture, load_model
from autoplan.capture.failures import remedy
from autoplan.errors import UsageError
from autoplan.graph import Graph

MODEL = """
import ctypes, threading
import torch
from torch import nn
import torch.nn.functional as F

# before

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        ... # init

    def forward(self, x):
        pass # forward
        return x + self.down(F.gelu(self.up(x)))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 50)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

def build_model():
    return Model()

def example_inputs(batch_size):
    ids = torch.randint(0, 50, (batch_size, 4))
    return {"input_ids": ids, "labels": ids}
"""


def write(folder: Path, **changes: str) -> str:
    """The model with other code in places: `forward`, `init`, `before`, or text of it."""
    text = MODEL
    for place, code in changes.items():
        for old in (f"pass # {place}", f"... # {place}", f"# {place}"):
            if old in text:
                text = text.replace(old, code)
                break
    path = folder / "model.py"
    path.write_text(text)
    return str(path)


def captured(spec: str) -> Graph:
    return capture(load_model(spec))


CUSTOM = """
class Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        out = torch.empty_like(x)
        ctypes.memmove(out.data_ptr(), x.data_ptr(), 16)
        return out
    @staticmethod
    def backward(ctx, grad):
        return grad
"""
OPERATOR = """
@torch.library.custom_op("autoplan_tests::{name}", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2
"""
FAKE = "\n@twice.register_fake\ndef _(x):\n    return torch.empty_like(x)\n"
SIX_AND_FOUR = """F.scaled_dot_product_attention(
            *(x[:, None].expand(-1, heads, -1, -1) for heads in (6, 4, 4)), enable_gqa=True)[:, 0]"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("changes", "says", "remedy"),
    [
        (
            {"forward": "x = x * float(x.detach().float().numpy().mean())"},
            "layers.0 (numpy): RuntimeError",
            "compute it with torch",
        ),
        ({"forward": "x = x[x > 0]"}, "in layers.0 (getitem) [aten.nonzero.default]", "masking"),
        ({"forward": "x = Copy.apply(x)", "before": CUSTOM}, "layers.0 (Copy): RuntimeError", "custom_op"),
        ({"forward": "x = twice(x)", "before": OPERATOR.format(name="bare")}, "layers.0 (bare.default)", "register_fake"),
        ({"forward": "x = twice(x)", "before": OPERATOR.format(name="half") + FAKE}, "its backward pass", "register_autograd"),
        ({"forward": "x = torch.vmap(self.up)(x)"}, "while it ran layers.0", "whole batches"),
        ({"forward": f"x = {SIX_AND_FOUR}"}, "layers.0 (scaled_dot_product_attention)", "multiple of the number"),
        ({"forward": "torch.distributed.all_reduce(x)"}, "layers.0 (all_reduce)", "autoplan spreads it"),
        ({"forward": "raise SystemExit(3)"}, "layers.0: SystemExit: 3", "one training step"),
        ({"forward": "assert x.shape[0] == 1"}, "layers.0: AssertionError (", "one training step"),
        ({"init": "self.more = torch.jit.script(nn.Linear(2, 2))"}, "module 'layers.0.more' (Rec", "without torch.jit"),
        ({"init": "self.more = nn.LazyLinear(2)"}, "module 'layers.0.more' (LazyLinear)", "Give its size"),
    ],
)
def test_one_sentence(tmp_path: Path, changes: dict[str, str], says: str, remedy: str) -> None:
    spec = write(tmp_path, **changes)
    with pytest.raises(UsageError) as error:
        captured(spec)
    assert says in error.value.message
    assert remedy in str(error.value.hint)
    assert "\n" not in error.value.message
    if "forward" in changes and "backward" not in says:
        assert "model.py:" in error.value.message


@pytest.mark.parametrize(
    ("old", "new", "says", "remedy"),
    [
        ("nn.Embedding(50, 8)", "nn.Embedding(50, 8, sparse=True)", "Sparse", "sparse=False"),
        (
            'return {"input_ids": ids, "labels": ids}',
            'return {"input_ids": ids.numpy(), "labels": ids}',
            "NumPy array",
            "from_numpy",
        ),
        (
            'return {"input_ids": ids, "labels": ids}',
            'return {"input_ids": ids.to_sparse(), "labels": ids}',
            "sparse tensor",
            "dense",
        ),
        ('return {"input_ids": ids, "labels": ids}', 'return {0: ids, "labels": ids}', "names an argument 0", "Names are text"),
        ("(batch_size, 4)", "(6, 4)", "as large for 2 samples as for 3", "batch_size"),
        ("return Model()", "torch.randn(1000, 1000).max().item(); return Model()", "values of a big tensor", "small tensor"),
        ("return Model()", "torch.randn(1000, 1000).numpy(); return Model()", "values of a big tensor", "small tensor"),
        ("def build_model", "def loss_fn(output, batch): pass\ndef build_model", "loss_fn of", "scalar"),
        ("return Model()", "torch.distributed.barrier(); return Model()", "process group", "autoplan spreads it"),
    ],
)
def test_one_sentence_about_the_file(tmp_path: Path, old: str, new: str, says: str, remedy: str) -> None:
    assert old in MODEL
    path = tmp_path / "model.py"
    path.write_text(MODEL.replace(old, new))
    with pytest.raises(UsageError) as error:
        captured(str(path))
    assert says in error.value.message
    assert remedy in str(error.value.hint)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "changes",
    [
        {"forward": "x = double(x)", "before": "@torch.compile\ndef double(x):\n    return x * 2"},
        {"forward": "x = self.more(x)", "init": "self.more = torch.compile(nn.Linear(8, 8))"},
        {"forward": "print(x.sum(), f'{x.mean():.3f}')"},
        {"init": "self.lock, self.numbers = threading.Lock(), (i for i in range(3))"},
        {"forward": "x = x * self.scale", "init": "self.scale = nn.Parameter(torch.ones(8, dtype=torch.cfloat).real)"},
        {"forward": "x = self.rnn(x)[0]", "init": "self.rnn = nn.LSTM(8, 8, batch_first=True)"},
        {"forward": "x = x * 2 if x.mean().item() > 0 else x"},
        {"forward": "self.mean = self.mean + x.detach().mean((0, 1))", "init": "self.register_buffer('mean', torch.zeros(8))"},
        {"forward": "if self.first: x, self.first = x * 2, False", "init": "self.first = True"},
    ],
)
def test_no_reason_to_fail(tmp_path: Path, changes: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    graph = captured(write(tmp_path, **changes))
    assert len(graph.blocks) == 3
    assert capsys.readouterr().out == ""  # what a model prints is no part of autoplan's output


@pytest.mark.parametrize(
    "move", [".cuda()", ".to('cuda')", ".to('cpu')", ".to(device=torch.device('cuda', 0))", ".half().cuda()"]
)
def test_a_model_may_be_moved(tmp_path: Path, move: str) -> None:
    path = tmp_path / "model.py"
    path.write_text(MODEL.replace("return Model()", f"return Model(){move}"))
    assert captured(str(path)).parameters == captured(write(tmp_path)).parameters


def test_an_error_that_the_model_catches(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(
        MODEL.replace(
            "            x = layer(x)\n",
            "            try:\n                x = layer.up(x, 3)\n            except TypeError:\n                x = layer(x)\n",
        )
    )
    graph, plain = captured(str(path)), captured(write(tmp_path))
    assert graph.backward_flops == plain.backward_flops
    assert {op.module for op in graph.bodies[0].ops} == {op.module for op in plain.bodies[0].ops}


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write(tmp_path, forward="x = x * float(x.detach().float().numpy().mean())")
    assert cli.main(["plan", spec, "--gpus", "8", "-o", str(tmp_path / "p.yaml"), "--report", str(tmp_path / "r.html")]) == 2
    said = capsys.readouterr().err
    assert "layers.0 (numpy)" in said
    assert "Traceback" not in said


def test_a_remedy_for_dtypes_that_differ() -> None:
    assert "compute_dtype" in remedy(RuntimeError("expected scalar type torch.float32 but found torch.bfloat16"), "")
    assert remedy(ValueError("what"), "else") == "else"


def test_fake_tensors_do_not_log_the_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UsageError, match=r"layers\.0 \(add\)"):
        captured(write(tmp_path, forward="x = x + torch.ones(7)"))
    assert not caplog.records


def test_a_step_is_one_after_the_first(tmp_path: Path) -> None:
    plain = captured(write(tmp_path))
    assert captured(write(tmp_path, forward="if self.first: x, self.first = x * 2, False", init="self.first = True")) == plain


def test_what_cannot_be_copied_is_shared(tmp_path: Path) -> None:
    module = load_model(write(tmp_path, init="self.lock = threading.Lock()")).build()
    assert isinstance(module.layers[0].lock, type(threading.Lock()))
