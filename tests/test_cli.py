"""The command line, with a planner that needs no model: what goes where, and how it ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from autoplan import cli
from autoplan.cli import talk
from autoplan.cli.app import JOURNEY
from autoplan.errors import NothingFits
from tests.report.plans import llama, single


class FakeApi(ModuleType):
    """Stands in for `autoplan.api` and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__("autoplan.api")
        self.asked: dict[str, Any] = {}
        self.error: BaseException | None = None

    def plans(self, model: str, top: int, **wishes: Any) -> Any:
        self.asked.update(model=model, **wishes)
        if self.error is not None:
            raise self.error
        return [llama(), single(), single()][:top]

    def save_plan(self, plan: Any, path: Path) -> None:
        path.write_text("version: 1\n")

    def load_plan(self, path: Path) -> Any:
        return single()

    def plan_json(self, plan: Any) -> str:
        return json.dumps({"model": plan.model})

    def report(self, plan: Any) -> str:
        return "<!doctype html>"

    def export(self, plan: Any, to: str) -> Any:
        from autoplan.export.targets import export

        return export(llama(), to)

    def compare(self, plans: Any) -> str:
        return f"<!doctype html>{len(plans)}"


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


def test_other_plans_and_what_the_chosen_one_costs(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "model.py", "--gpus", "8..64", "--objective", "cost=2.5", "--constraints", "wishes.yaml", "--top", "2"]
    assert cli.main(asked) == 0
    plan, err = llama(), capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["plan-2.yaml", "plan.yaml", "report.html"]
    assert (api.asked["objective"], api.asked["constraints"]) == ("cost", Path("wishes.yaml"))
    hours = plan.mesh.size * plan.prediction.step_time / 3600 / (plan.tokens * plan.workload.global_batch) * 1e6
    assert f"cost: {hours:.4g} GPU-hours a million tokens, {2.5 * hours:.4g} at 2.5 an hour" in err
    assert cli.main([*asked[:-1], "3", "--force"]) == 0
    for wrong in ("money", "speed=2", "cost=free", "cost=0"):
        assert cli.main(["plan", "model.py", "--gpus", "8", "--objective", wrong, "--force"]) == 2
        assert "Write fewest, speed, cost" in capsys.readouterr().err


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
        ["report", "plan.yaml", "-o", "plan.pdf"],
        ["report", "plan.yaml", "--format", "csv", "--open"],
        ["compare", "plan.yaml"],
        ["compare", *["plan.yaml"] * 6],
        ["compare", "plan.yaml", "plan.yaml", "--open"],
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


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("a.html", "<!doctype"),
        ("a.csv", "kind"),
        ("a.json", "{"),
        ("a.trace.json", '{"displayTimeUnit"'),
        ("a.txt", "Train gpt2"),
    ],
)
def test_the_ending_of_a_name_tells_the_format(api: FakeApi, name: str, start: str) -> None:
    assert cli.main(["report", "plan.yaml", "-o", name]) == 0
    assert Path(name).read_text().startswith(start)
    assert cli.main(["report", "plan.yaml", "-o", name]) == 2


@pytest.mark.parametrize("kind", ["csv", "json", "trace", "terminal"])
def test_data_goes_to_stdout(api: FakeApi, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    assert cli.main(["report", "plan.yaml", "--format", kind]) == 0
    out, err = capsys.readouterr()
    assert out
    assert err == ""
    assert list(Path().iterdir()) == []


def test_compare_prints_or_writes(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "a.yaml", "b.yaml"]) == 0
    assert "as fast as b.yaml" in capsys.readouterr().out
    assert cli.main(["compare", "a.yaml", "b.yaml", "c.yaml", "-o", "c.html"]) == 0
    assert Path("c.html").read_text() == "<!doctype html>3"
    assert capsys.readouterr().out == ""
    assert cli.main(["compare", "a.yaml", "b.yaml", "--json"]) == 0
    assert [row["file"] for row in json.loads(capsys.readouterr().out)] == ["a.yaml", "b.yaml"]


def test_export_writes_data_to_stdout_and_talk_to_stderr(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "plan.yaml", "--to", "accelerate"]) == 0
    out, err = capsys.readouterr()
    assert "fsdp_version: 2" in out
    assert "not expressed: the plan recomputes 12 of 32 layers" in err
    assert cli.main(["export", "plan.yaml", "--to", "deepspeed", "-o", "ds.json"]) == 0
    assert json.loads(Path("ds.json").read_text())["train_batch_size"] == 64
    assert capsys.readouterr().out == ""
    assert cli.main(["export", "plan.yaml", "--to", "deepspeed", "-o", "ds.json"]) == 2
    assert cli.main(["export", "plan.yaml", "--to", "megatron", "--json", "-q"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["filename"] == "autoplan-megatron.sh"
    assert told["not_expressed"]
    assert cli.main(["export", "plan.yaml", "--to", "nanotron"]) == 2
    assert "torchtitan, " in capsys.readouterr().err


def test_open_opens_the_page(api: FakeApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: not opened.append(url))
    assert cli.main(["report", "plan.yaml", "--open"]) == 0
    assert cli.main(["plan", "model.py", "--gpus", "8", "--open", "--force"]) == 0
    assert opened == [Path("report.html").resolve().as_uri()] * 2
    monkeypatch.setattr("webbrowser.open", lambda url: False)
    assert cli.main(["report", "plan.yaml", "--open", "--force"]) == 0
    assert "no browser was found" in capsys.readouterr().err


def test_quiet_says_nothing_but_errors(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    for asked in (["-q", "plan", "model.py", "--gpus", "8"], ["plan", "model.py", "--gpus", "8", "--force", "--quiet"]):
        assert cli.main(asked) == 0
        assert capsys.readouterr().err == ""
    assert cli.main(["-q", "plan", "model.py", "--gpus", "8"]) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.main(["plan", "model.py", "--gpus", "8", "--force"]) == 0
    assert "wrote" in capsys.readouterr().err, "the next run is not quiet"


def test_errors_break_between_words_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "no plan fits " + "because of memory " * 12
    talk.fail("error", said)
    assert capsys.readouterr().err == f"error: {said}\n"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    talk.fail("error", said)
    lines = capsys.readouterr().err.splitlines()
    assert max(map(len, lines)) <= 80
    assert " ".join(line.strip() for line in lines) == f"error: {said}".strip()


def test_verbose_says_more(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "model.py", "--gpus", "8", "-v"]) == 0
    assert "took: " in capsys.readouterr().err
    api.error = RuntimeError("oh")
    assert cli.main(["plan", "model.py", "--gpus", "8", "--force", "--verbose"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_a_slip_of_the_finger_gets_a_suggestion(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["hardwar"]) == 2
    assert "Did you mean 'hardware'?" in capsys.readouterr().err
    assert cli.main(["plan", "model.py", "--gpu", "8"]) == 2
    assert "--gpus" in capsys.readouterr().err


def test_doctor_says_what_is_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("autoplan", "python", "torch", "HiGHS solves", "GPUs"))
    assert cli.main(["doctor", "--json"]) == 0
    assert all(check["ok"] for check in json.loads(capsys.readouterr().out))
    monkeypatch.setitem(sys.modules, "highspy", None)
    assert cli.main(["doctor"]) == 1
    assert "pip install 'highspy" in capsys.readouterr().out


def test_colours_are_left_out_when_nobody_wants_them(tmp_path: Path) -> None:
    program = "import sys; from autoplan.cli import main; sys.exit(main(['hardware']))"
    for told in ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, {}):
        asked = {"PATH": os.environ["PATH"], "COLUMNS": "40", **told}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=asked, cwd=tmp_path
        )
        assert done.returncode == 0
        assert "\x1b[3" not in done.stdout
        plain = re.sub("\x1b\\[[0-9;]*m", "", done.stdout)
        assert max(map(len, plain.splitlines())) <= 40


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes(shell: str, tmp_path: Path) -> None:
    words = {"bash": ("autoplan plan m.py --hardware h100", "4"), "zsh": ("autoplan plan m.py --hardware h100", ""),
             "fish": ("autoplan plan m.py --hardware h100", "")}[shell]  # fmt: skip
    env = {
        "PATH": os.environ["PATH"],
        "_AUTOPLAN_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": words[0],
        "COMP_CWORD": words[1],
        "_TYPER_COMPLETE_ARGS": words[0],
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run(
        [sys.executable, "-m", "autoplan"], capture_output=True, text=True, timeout=60, env=env, cwd=tmp_path, check=False
    )
    assert "h100-sxm-8x" in done.stdout, done.stderr


def test_help_and_version_load_neither_torch_nor_the_solver() -> None:
    program = (
        "import sys; from autoplan.cli import main; code = main([sys.argv[1]]);"
        "heavy = {'torch', 'pulp', 'yaml', 'jinja2'} & set(sys.modules); assert not heavy, heavy; sys.exit(code)"
    )
    for flag in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", program, flag], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "autoplan" in done.stdout


def test_help_lists_commands_as_they_are_met_and_flags_without_types(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert tuple(re.findall(r"^. ([a-z]+)  +\S", text, re.MULTILINE)) == JOURNEY
    assert "bool" not in text
    assert cli.main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    assert "bool" not in text
    assert "int range" not in text
    assert max(map(len, text.splitlines())) <= 80
