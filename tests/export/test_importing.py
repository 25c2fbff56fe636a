"""Configurations of other trainers: an export read back is its plan; what people write is read, or refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autoplan import api, cli
from autoplan.constraints import Constraints, LayerWish
from autoplan.errors import UsageError
from autoplan.export.targets import export
from autoplan.files.plan import load_plan
from autoplan.importing.configuration import Configuration
from autoplan.importing.kinds import read_configuration
from autoplan.plan import Plan
from autoplan.strategy import Mesh
from tests.report.plans import llama, piped, single

ROOT = Path(__file__).parent.parent.parent
PLANS: dict[str, Plan] = {
    "llama": llama(),
    "piped": piped(),
    "interleaved": piped("interleaved-1f1b", chunks=2),
    "gpipe": piped("gpipe", 2, batch=8),
    "zero-bubble": piped("zero-bubble"),
    "single": single(),
    **{path.stem: load_plan(path) for path in sorted((ROOT / "reports").glob("*.yaml"))},
}
FILES = {"torchtitan-toml": "job.toml", "megatron": "arguments.sh", "accelerate": "accelerate.yaml"}
SMALL = f"{ROOT}/examples/gpt.py?size=124M&layers=8&hidden=64&heads=4&vocab=256&seq_len=64"


def expressed(plan: Plan, to: str) -> bool:
    """Whether the target can say the plan's mesh and schedule."""
    if to == "accelerate":
        return plan.mesh.pp == plan.mesh.ep == 1
    return to == "torchtitan-toml" or plan.pipeline is None or plan.pipeline.schedule not in ("gpipe", "zero-bubble")


ROUNDS = [(name, to) for name, plan in PLANS.items() for to in FILES if expressed(plan, to)]


@pytest.mark.parametrize(("name", "to"), ROUNDS)
def test_an_export_read_back_means_the_same(name: str, to: str, tmp_path: Path) -> None:
    plan, path = PLANS[name], tmp_path / FILES[to]
    path.write_text(export(plan, to).text, encoding="utf-8")
    told = read_configuration(path)
    mesh = told.mesh(plan.mesh.size)
    assert (mesh.pp, mesh.dp, mesh.cp, mesh.tp, mesh.ep) == tuple(getattr(plan.mesh, a) for a in ("pp", "dp", "cp", "tp", "ep"))
    if to != "accelerate":  # whose batch is in the script
        assert (told.micro_batch, told.batch(mesh)) == (plan.micro_batch, plan.workload.global_batch)
    if plan.pipeline:
        assert (told.schedule, told.chunks) == (plan.pipeline.schedule, plan.pipeline.chunks)
        assert told.stage_sizes == tuple(map(len, plan.stages))
    recomputed = any(strategy.recompute != "none" for _, strategy in plan.layers())
    assert bool(told.recompute_every or told.recompute_first) == recomputed


def test_there_and_back_costs_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that is alike in all layers, and has no words of its own, loses nothing."""
    monkeypatch.chdir(ROOT)
    wish = Constraints(layers={"*": LayerWish(recompute="full")})
    plan = api.plan("examples/llama.py?size=70B", gpus=64, fixed={"pp": 4, "tp": 8}, constraints=wish)
    for to in ("torchtitan-toml", "megatron"):
        path = tmp_path / FILES[to]
        path.write_text(export(plan, to).text, encoding="utf-8")
        out = tmp_path / "plan.yaml"
        command = ["estimate", "--from", str(path), "--model", plan.model, "--gpus", "64", "-o", str(out), "--force", "--json"]
        assert cli.main(command) == 0
        again = load_plan(out)
        assert json.loads(capsys.readouterr().out)["mesh"]["tp"] == 8
        assert (again.mesh, again.micro_batch, again.stages) == (plan.mesh, plan.micro_batch, plan.stages)
        assert again.prediction.step_time == pytest.approx(plan.prediction.step_time, rel=1e-9)
        assert again.prediction.memory.total == pytest.approx(plan.prediction.memory.total, rel=1e-9)


def written(path: Path, text: str) -> Configuration:
    path.write_text(text, encoding="utf-8")
    return read_configuration(path)


def test_torchtitan_has_its_own_defaults(tmp_path: Path) -> None:
    told = written(
        tmp_path / "j.toml", '[parallelism]\npipeline_parallel_degree = 2\npipeline_parallel_schedule = "Interleaved1F1B"\n'
    )
    assert told.mesh(8) == Mesh(pp=2, dp_shard=4)
    assert (told.micro_batch, told.batch(told.mesh(8)), told.chunks, told.weights) == (1, 32, 2, (1, 1))
    assert told.zero == 1, "in a pipeline parameters stay and gradients are reduced once"
    assert told.recompute_every == 2, "selective recomputation of every second layer"


def test_torchtitans_recomputation_of_operations_is_the_selective_one(tmp_path: Path) -> None:
    told = written(tmp_path / "j.toml", '[activation_checkpoint]\nmode = "selective"\nselective_ac_option = "op"\n')
    assert (told.recompute_every, told.recompute) == (1, "selective")
    assert any("every second product" in sentence for sentence in told.lost)


def test_a_call_of_megatron_is_read_as_it_is_written(tmp_path: Path) -> None:
    text = (
        "torchrun --nproc_per_node 8 --nnodes=4 pretrain_gpt.py \\\n  --tensor-model-parallel-size 4 --sequence-parallel \\\n"
        "  --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2 --num-layers 8 # the model\n"
        "  --micro-batch-size 2 --global-batch-size 64 --use-distributed-optimizer --bf16 --lr 1e-4 --tp-comm-overlap\n"
    )
    told = written(tmp_path / "run.sh", text)
    assert told.mesh(None) == Mesh(pp=2, dp_shard=4, tp=4)
    assert (told.sequence_parallel, told.zero, told.schedule, told.chunks) == (True, 1, "interleaved-1f1b", None)
    assert any("--tp-comm-overlap" in sentence for sentence in told.lost)
    layout = "'Et*3|(tt|)*2t*1L'"
    told = written(tmp_path / "run.sh", f"--pipeline-model-parallel-size 2 --num-layers 8 --micro-batch-size 1 "
                   f"--pipeline-model-parallel-layout {layout}")  # fmt: skip
    assert told.stage_sizes == (3, 2, 2, 1)


def test_accelerate_without_a_parallelism_config(tmp_path: Path) -> None:
    told = written(tmp_path / "a.yaml", "distributed_type: FSDP\nnum_processes: 8\nmixed_precision: bf16\nfsdp_config:\n"
                   "  fsdp_version: 2\n  fsdp_reshard_after_forward: false\n  fsdp_activation_checkpointing: true\n")  # fmt: skip
    assert (told.mesh(None), told.zero, told.recompute_every) == (Mesh(dp_shard=8), 2, 1)
    told = written(tmp_path / "a.yaml", "distributed_type: NO\nmixed_precision: no\n")
    assert (told.mesh(None), told.workload["compute_dtype"]) == (Mesh(), "float32")


def test_zero_bubble_with_several_stages_a_rank_is_priced_as_interleaved(tmp_path: Path) -> None:
    path = tmp_path / "j.toml"
    path.write_text('[parallelism]\npipeline_parallel_degree = 2\npipeline_parallel_schedule = "InterleavedZeroBubble"\n')
    told = read_configuration(path)
    assert (told.schedule, told.chunks) == ("interleaved-1f1b", 2)
    assert any("which waits more" in sentence for sentence in told.lost)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "j.toml",
            "[parallelism]\ntensor_parallel_degree = 'two'\n",
            "'parallelism.tensor_parallel_degree' is 'two', not a whole",
        ),
        ("j.toml", "[parallelism]\npipeline_parallel_degree = 2\npipeline_parallel_schedule = '1F2B'\n", "Did you mean 1f1b?"),
        ("j.toml", "[parallelism\n", "is not valid TOML"),
        ("j.toml", "[tool]\n", "is no job file of torchtitan"),
        ("a.sh", "--micro-batch-size", "does not say --micro-batch-size"),
        ("a.sh", "--micro-batch-size $MBS", "'--micro-batch-size' is the variable $MBS"),
        ("a.sh", "--micro-batch-size 1 --micro-batch-size 2", "given twice"),
        ("a.sh", "--micro-batch-size 'x", "no closing quotation"),
        ("a.sh", "hello", "is no configuration that autoplan reads"),
        ("a.yaml", "distributed_type: DEEPSPEED\n", "DEEPSPEED, which autoplan does not read"),
        ("a.yaml", "hello: 1\n", "is no configuration of accelerate"),
        ("a.yaml", "num_processes: 8\nparallelism_config: 3\n", "'parallelism_config' is 3, not a section"),
        ("j.py", "", "is no configuration that autoplan reads"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(tmp_path: Path, file: str, text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        written(tmp_path / file, text)
    assert message in str(caught.value)
    assert str(tmp_path / file) in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("--micro-batch-size 1 --num-layers 9", ["--gpus", "1"], "a model with 9 layers"),
        ("--micro-batch-size 3 --global-batch-size 8", ["--gpus", "1"], "does not divide into 1 data-parallel groups"),
        ("--micro-batch-size 1 --tensor-model-parallel-size 2", [], "on how many GPUs"),
        ("--micro-batch-size 1 --tensor-model-parallel-size 2", ["--gpus", "5"], "multiples of 2 devices, not 5"),
        ("--micro-batch-size 1 --expert-model-parallel-size 2", ["--gpus", "2"], "experts"),
        ("--micro-batch-size 1 --pipeline-model-parallel-size 16", ["--gpus", "16"], "do not fill pp 16 stages"),
    ],
)
def test_what_the_model_cannot_do_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, options: list[str], message: str
) -> None:
    (tmp_path / "a.args").write_text(text, encoding="utf-8")
    out = tmp_path / "plan.yaml"
    assert cli.main(["estimate", "--from", str(tmp_path / "a.args"), "--model", SMALL, "-o", str(out), *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "a.args" in err
    assert "Traceback" not in err
    assert not out.exists()


def test_what_cannot_be_split_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.args").write_text("--micro-batch-size 1 --tensor-model-parallel-size 3", encoding="utf-8")
    assert cli.main(["estimate", "--from", str(tmp_path / "a.args"), "--model", SMALL, "--gpus", "3"]) == 0
    assert "attn.c_proj.weight of h.0: it is whole" in " ".join(capsys.readouterr().err.split())


def test_what_does_not_fit_is_priced(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    source, out = tmp_path / "a.args", tmp_path / "p.yaml"
    source.write_text("--micro-batch-size 8 --tensor-model-parallel-size 2 --seq-length 4096 --bf16", encoding="utf-8")
    assert cli.main(["estimate", "--from", str(source), "--model", "examples/llama.py", "--gpus", "8", "-o", str(out)]) == 0
    said = capsys.readouterr()
    assert "it does not fit" in said.out
    assert "sequences of 4096 tokens" in " ".join(said.err.split())
    made = load_plan(out)
    assert made.solve.status == "given"
    assert any("4096" in warning for warning in made.warnings)


def test_a_plan_or_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate"]) == 2
    assert cli.main(["estimate", "plan.yaml", "--from", "job.toml"]) == 2
    assert cli.main(["estimate", "--from", "job.toml"]) == 2
    assert "does not say which model" in capsys.readouterr().err
    assert cli.main(["estimate", "plan.yaml", "--gpus", "8"]) == 2
    assert "--gpus goes with --from" in capsys.readouterr().err


def test_what_runs_today_stands_beside_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same price as `estimate --from` of the file, in the plan and on its page; and no slower plan than that."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "today.args").write_text(
        "--bf16 --micro-batch-size 2 --tensor-model-parallel-size 2 --recompute-granularity full --global-batch-size 16",
        encoding="utf-8",
    )
    asked = ["plan", SMALL, "--gpus", "4", "--global-batch", "16"]
    assert cli.main([*asked, "--beside", "today.args"]) == 0
    assert cli.main(["estimate", "--from", "today.args", "--model", SMALL, "--gpus", "4", "-o", "today.yaml"]) == 0
    made, today = load_plan(tmp_path / "plan.yaml"), load_plan(tmp_path / "today.yaml")
    beside = made.baselines[0]
    assert (beside.name, beside.mesh, beside.recompute) == ("Megatron-LM: today.args", today.mesh, "full")
    assert beside.step_time == pytest.approx(today.prediction.step_time)
    assert made.prediction.step_time <= today.prediction.step_time
    assert "Megatron-LM: today.args" in (tmp_path / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert cli.main([*asked, "--force", "--gpus", "4..8", "--beside", "today.args"]) == 2
    assert "for one number of GPUs" in " ".join(capsys.readouterr().err.split())
    assert cli.main([*asked, "--force", "--gpus", "3", "--beside", "today.args"]) == 2
    assert "today.args" in " ".join(capsys.readouterr().err.split())
