"""The command line, with a planner that needs no model: what goes where, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from autoplan import cli
from autoplan.errors import NothingFits
from tests.report.plans import llama, single


class FakeApi(ModuleType):
    """Stands in for `autoplan.api` and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__("autoplan.api")
        self.asked: dict[str, Any] = {}
        self.error: BaseException | None = None

    def plan(self, model: str, **wishes: Any) -> Any:
        self.asked.update(model=model, **wishes)
        if self.error is not None:
            raise self.error
        return llama()

    def save_plan(self, plan: Any, path: Path) -> None:
        path.write_text("version: 1\n")

    def load_plan(self, path: Path) -> Any:
        return single()

    def plan_json(self, plan: Any) -> str:
        return json.dumps({"model": plan.model})

    def report(self, plan: Any) -> str:
        return "<!doctype html>"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeApi:
    import autoplan

    fake = FakeApi()
    monkeypatch.setitem(sys.modules, "autoplan.api", fake)
    monkeypatch.setattr(autoplan, "api", fake, raising=False)
    monkeypatch.chdir(tmp_path)
    return fake


def test_plan_writes_both_files_and_says_it(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(
            ["plan", "model.py", "--gpus", "8", "--tp", "2", "--memory-headroom", "10%", "--set", "size=70B", "--set", "n=4"]
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert "7.92 s a step" in out
    assert "wrote: plan.yaml and report.html" in err
    assert sorted(path.name for path in Path().iterdir()) == ["plan.yaml", "report.html"]
    assert api.asked["fixed"] == {"tp": 2}
    assert api.asked["headroom"] == pytest.approx(0.1)
    assert api.asked["model_kwargs"] == {"size": "70B", "n": 4}
    assert "hardware" not in api.asked


def test_json_alone_is_on_stdout(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "model.py", "--gpus", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": llama().model}


def test_nothing_is_overwritten_and_no_work_is_done(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    Path("report.html").write_text("mine")
    assert cli.main(["plan", "model.py", "--gpus", "8"]) == 2
    assert "--force" in capsys.readouterr().err
    assert api.asked == {}
    assert cli.main(["plan", "model.py", "--gpus", "8", "--force"]) == 0
    assert Path("report.html").read_text() == "<!doctype html>"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (NothingFits("no plan fits.", "Use 16 GPUs."), 1, "error: no plan fits.\nhint: Use 16 GPUs.\n"),
        (KeyboardInterrupt(), 130, ""),
        (RuntimeError("oh"), 3, "internal error: RuntimeError: oh\n"),
    ],
)
def test_a_failure_is_a_sentence_and_a_code(
    api: FakeApi, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    api.error = error
    Path("plan.yaml").write_text("mine")
    assert cli.main(["plan", "model.py", "--gpus", "8", "--force"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(said)
    assert "Traceback" not in err
    assert Path("plan.yaml").read_text() == "mine"
    assert [path.name for path in Path().iterdir()] == ["plan.yaml"]


def test_a_failing_report_leaves_the_old_files(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(plan: Any) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(api, "report", fail, raising=False)
    Path("plan.yaml").write_text("mine")
    assert cli.main(["plan", "model.py", "--gpus", "8", "--force"]) == 3
    assert Path("plan.yaml").read_text() == "mine"
    assert [path.name for path in Path().iterdir()] == ["plan.yaml"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["frob"],
        ["plan", "model.py"],
        ["plan", "model.py", "--gpus", "0"],
        ["plan", "model.py", "--gpus", "8", "--memory-headroom", "lots"],
        ["plan", "model.py", "--gpus", "8", "--set", "size"],
        ["plan", "model.py", "--gpus", "8", "-o", "nowhere/plan.yaml"],
        ["plan", "model.py", "--gpus", "8", "-o", "report.html"],
        ["report", "plan.yaml", "--format", "pdf"],
    ],
)
def test_bad_usage_is_2(api: FakeApi, arguments: list[str]) -> None:
    assert cli.main(arguments) == 2
    assert api.asked == {}


def test_report_writes_a_page_or_prints(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "plan.yaml", "-o", "page.html"]) == 0
    assert Path("page.html").exists()
    assert cli.main(["report", "plan.yaml", "--format", "terminal"]) == 0
    assert "gpt2" in capsys.readouterr().out


def test_help_and_version_load_neither_torch_nor_the_solver() -> None:
    program = (
        "import sys; from autoplan.cli import main; code = main([sys.argv[1]]);"
        "heavy = {'torch', 'pulp', 'yaml', 'jinja2'} & set(sys.modules); assert not heavy, heavy; sys.exit(code)"
    )
    for flag in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", program, flag], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "autoplan" in done.stdout
