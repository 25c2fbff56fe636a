"""The command line on a real model: plan, price again, ask why not; and every way a user can get it wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autoplan.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples"
MODEL = f"{EXAMPLES}/gpt.py?size=124M&layers=4&hidden=64&heads=4&vocab=256&seq_len=64"


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    assert main(["plan", MODEL, "--gpus", "8", "-o", str(folder / "plan.yaml"), "--report", str(folder / "report.html")]) == 0
    return folder / "plan.yaml"


def test_plan_leaves_a_plan_and_a_report(planned: Path) -> None:
    assert sorted(path.name for path in planned.parent.iterdir()) == ["plan.yaml", "report.html"]


def test_estimate_says_what_the_plan_says(planned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", str(planned)]) == 0
    assert "as the plan says" in capsys.readouterr().out
    assert main(["estimate", str(planned), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert main(["estimate", str(planned), "--model", MODEL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == again


def test_explain_as_json(planned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(planned), "tp=2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["asked"], told["plan"]["mesh"]["tp"], told["reason"]) == ({"tp": 2}, 2, "")
    assert main(["explain", str(planned), "tp=3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["plan"] is None
    assert told["reason"]


def test_explain_answers_in_numbers_or_with_the_reason(planned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(planned), "tp=2"]) == 0
    assert "% slower" in " ".join(capsys.readouterr().out.split())
    assert main(["explain", str(planned), "pp=2", "schedule=gpipe"]) == 0
    assert "Why not pp=2 schedule=gpipe? Its best plan, pp 2" in " ".join(capsys.readouterr().out.split())
    assert main(["explain", str(planned), "recompute=none"]) == 0
    assert "The plan has it already" in " ".join(capsys.readouterr().out.split())
    assert main(["explain", str(planned), "tp=3"]) == 0
    assert "tp 3 does not divide 8 devices" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["plan", f"{EXAMPLES}/llama.py?size=405B", "--gpus", "1"], 1, "nearest miss"),
        (["plan", "nowhere.py", "--gpus", "8"], 2, "nowhere.py"),
        (["plan", MODEL, "--gpus", "8", "--hardware", "h100"], 2, "Did you mean h100-sxm-8x or h100-hbm2e-500w-8x?"),
        (["plan", MODEL, "--gpus", "8", "--tp", "5"], 2, "tp 5 does not divide 8"),
        (["plan", MODEL + "&depth=3", "--gpus", "8"], 2, "unexpected keyword argument 'depth'"),
        (["estimate", "PLAN", "--model", f"{EXAMPLES}/transformer.py"], 2, "which the model does not have"),
        (["explain", "PLAN", "pp=2"], 0, ""),
        (["explain", "PLAN", "tp=big"], 2, "no size of an axis"),
        (["explain", "PLAN", "tp"], 2, "'tp' is no wish"),
        (["explain", "PLAN", "tp=2", "tp=4"], 2, "tp is asked for twice"),
        (["explain", "PLAN", "schedule=zb"], 2, "none of gpipe, 1f1b, interleaved-1f1b, zero-bubble"),
        (["report", "nowhere.yaml"], 2, "there is no file nowhere.yaml"),
    ],
)
def test_what_goes_wrong_is_one_sentence(
    planned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(planned) if a == "PLAN" else a for a in arguments]) == code
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split())
    assert "Traceback" not in captured.err
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def build_model(:\n", "line"),
        ("raise RuntimeError('broken')\n", "broken"),
        ("import torch\n", "build_model"),
        ("def build_model():\n    raise ValueError('no weights')\ndef example_inputs(n):\n    return {}\n", "no weights"),
    ],
)
def test_a_broken_model_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], body: str, message: str) -> None:
    file = tmp_path / "model.py"
    file.write_text(body)
    output = tmp_path / "plan.yaml"
    assert main(["plan", str(file), "--gpus", "2", "-o", str(output), "--report", str(tmp_path / "report.html")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not output.exists()


def test_a_tampered_plan(planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(planned.read_text().replace("micro_batch:", "micro_bitch:", 1))
    assert main(["report", str(broken), "-o", str(tmp_path / "report.html")]) == 2
    assert "'micro_bitch' is not a known key" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
