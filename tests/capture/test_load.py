"""Everything that can be wrong with a user's file is one sentence that names the place."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from autoplan.capture import capture, load_model
from autoplan.errors import UsageError

GOOD = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, width=4, flag=False):
        super().__init__()
        self.flag = flag
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        return self.fc(x)

def build_model(width=4, flag=False):
    return Model(width, flag)

def other(width=6):
    return Model(width)

def example_inputs(batch_size, width=4):
    return {"x": torch.randn(batch_size, width)}

def loss_fn(output, batch):
    return (output - batch["x"]).square().mean()

workload = {"global_batch": 64}
"""


def write(folder: Path, text: str) -> str:
    path = folder / "model.py"
    path.write_text(text)
    return str(path)


def test_a_good_file(tmp_path: Path) -> None:
    loaded = load_model(write(tmp_path, GOOD), {"width": "8", "flag": "true"})
    module = loaded.build()
    assert isinstance(module, nn.Module)
    assert module.flag is True
    assert loaded.example_inputs(3)["x"].shape == (3, 8)
    assert loaded.workload == {"global_batch": 64}
    graph = capture(loaded, compute_dtype="float32")
    assert [op.name for op in graph.outer.ops if op.kind not in ("enter", "exit")] == ["linear", "sub", "square", "mean"]


def test_another_factory(tmp_path: Path) -> None:
    assert load_model(write(tmp_path, GOOD) + ":other").build().fc.in_features == 6


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def build_model(:\n    pass", "model.py:1 is not valid Python"),
        ("import no_such_package_at_all", "no_such_package_at_all"),
        ("x = 1\n1 / 0", "model.py:2"),
        ("import sys\nsys.exit(1)", "SystemExit"),
        ("x = 1", "defines no build_model"),
        ("build_model = 3", "not a function"),
        ("def build_model(): pass", "defines no example_inputs"),
        (GOOD.replace("workload = {", "workload = [").replace("64}", "]").replace('"global_batch": ', ""), "workload"),
        (GOOD + "\nloss_fn = 3", "loss_fn"),
    ],
)
def test_a_bad_file(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        load_model(write(tmp_path, text))
    assert says in str(error.value)
    assert error.value.hint


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("return Model(width, flag)", "return [1][2]", "model.py:15"),
        ("return Model(width, flag)", "return 3", "returns a int"),
        ('return {"x": torch.randn(batch_size, width)}', "return torch.randn(batch_size, width)", "returns a Tensor"),
        ('return {"x": torch.randn(batch_size, width)}', "raise ValueError('no data')", "no data"),
        (
            'return {"x": torch.randn(batch_size, width)}',
            'return {"y": torch.randn(batch_size, width)}',
            "unexpected keyword argument",
        ),
        ("return self.fc(x)", "return self.fc(x) + torch.ones(7)", "model.py:12"),
        ("return (output", "return (outputs", "outputs"),
    ],
)
def test_a_model_that_fails(tmp_path: Path, old: str, new: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        capture(load_model(write(tmp_path, GOOD.replace(old, new))))
    assert says in str(error.value)


def test_missing_files_and_arguments(tmp_path: Path) -> None:
    cases = {
        str(tmp_path / "none.py"): "no file",
        str(tmp_path): "folder",
        write(tmp_path, GOOD) + ":nothing": "defines no nothing",
    }
    (tmp_path / "notes.txt").write_text("")
    cases[str(tmp_path / "notes.txt")] = "no Python file"
    for spec, says in cases.items():
        with pytest.raises(UsageError, match=says):
            load_model(spec)
    with pytest.raises(UsageError, match="takes no argument 'depth'"):
        load_model(write(tmp_path, GOOD), {"depth": "3"})


def test_arguments_are_part_of_the_name(tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.write_text(
        "import torch\nfrom torch import nn\n"
        "def build_model(width=4, name='a'):\n    assert isinstance(width, int)\n    return nn.Linear(width, width)\n"
        "def example_inputs(batch_size):\n    return {'input': torch.zeros(batch_size, 4)}\n"
    )
    loaded = load_model(f"{file}?width=6&name=b")
    assert loaded.build().in_features == 6
    assert loaded.spec == f"{file}?width=6&name=b"
    assert load_model(f"{file}?width=6", {"width": 8}).build().in_features == 8
    assert load_model(str(file), {"width": 8}).spec == f"{file}?width=8"
    assert load_model(load_model(str(file), {"width": "8"}).spec).build().in_features == 8
