"""The exam itself: what is refused and why, the split, the figures."""

from dataclasses import replace
from pathlib import Path

import pytest

from autoplan.cost.compute import memory_time
from autoplan.cost.walk import Step, walk
from autoplan.strategy import UNSHARDED
from benchmarks.accuracy import Exam, Scored, figures, main
from benchmarks.asynchronous import pairs
from benchmarks.habits import casts, laid, narrow, sums
from benchmarks.memory import stages
from benchmarks.pricing import Pricer, frameworks
from benchmarks.rows import Refused, Row, read
from benchmarks.runs import Run, run_of

PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "published"
TABLES = ("megatron", "megatron-bridge", "torchtitan", "vtrain", "simumax", "threads")
ROWS = {row.text("id"): row for name in TABLES for row in read(PUBLISHED / f"{name}.csv")}


def everything(step: Step) -> bool:
    return True


def a_run(**changes: object) -> Run:
    return replace(run_of(ROWS["narayanan-t1-39B"]), **changes)  # type: ignore[arg-type]


def test_a_row_becomes_a_run() -> None:
    run = a_run()
    assert (run.layers, run.tp, run.pp, run.dp, run.micro_batch, run.recompute) == (48, 8, 2, 32, 4, "full")
    assert run.shape.unfused
    assert run.dtype == "float16"
    assert run.seconds == pytest.approx(14.4535)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("titan-asynctp-8b-float8-rowwise-async", "fp8 scaled by rows"),
        ("mbridge-26.04-GPT_OSS_120B-H100-BF16-n64-gbs1280-pretrain", "sliding-window"),
        ("mbridge-26.06-LLAMA3_70B-GB200-FP8-n8-gbs32-lora", "adapters"),
        ("megatron-h100-16B", "micro_batch is not told"),
        ("narayanan-t2-174.6B-z3-384", "another framework"),
        ("titan-a100-l2-70b-selective_layer-lb2-OOM", "no measurement"),
    ],
)
def test_what_is_not_modelled_is_refused_with_its_reason(name: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        run_of(ROWS[name])


def test_experts_are_dealt_as_the_row_says() -> None:
    run = run_of(ROWS["simumax-b200-deepseekv2_tp1_ep8_pp1_dp8_l4_mbc4_cef"])
    assert (run.source, run.ep, run.held_out) == ("simumax-moe", 8, True)
    experts = run.shape.experts
    assert experts is not None
    assert (experts.latent, experts.number, experts.chosen, experts.ffn, experts.shared) == (True, 160, 6, 1536, 3072)
    pricer = Pricer(frameworks())
    alone = replace(run, ep=1)
    assert pricer.seconds(alone) != pricer.seconds(run)
    assert pricer.memory(alone) > 1.5 * pricer.memory(run), "each of eight ranks holds all experts then"


def test_a_group_is_never_cut_in_two() -> None:
    halves: dict[str, set[bool]] = {}
    for row in ROWS.values():
        try:
            run = run_of(row)
        except Refused:
            continue
        halves.setdefault(run.group, set()).add(run.held_out)
    assert all(len(half) == 1 for half in halves.values())
    assert {half for some in halves.values() for half in some} == {False, True}


def test_every_source_of_rows_has_its_constants_or_is_neutral() -> None:
    software = frameworks()
    assert {"vtrain", "nanotron", "nanotron-slow", "llm-foundry", "simumax"} <= software.keys()
    assert all(entry.compute > 0.5 for entry in software.values())


def test_figures_of_a_perfect_and_of_an_inverted_prediction() -> None:
    runs = [a_run(seconds=float(t)) for t in range(1, 7)]
    perfect = figures([Scored(run, run.seconds, None) for run in runs])
    assert perfect["mape"] == perfect["regret"] == 0
    assert perfect["spearman"] == perfect["order"] == 1
    inverted = figures([Scored(run, 7 - run.seconds, None) for run in runs])
    assert inverted["spearman"] == -1
    assert inverted["order"] == 0
    assert inverted["regret"] == 5


def test_memory_and_noise() -> None:
    run = a_run(memory=100.0)
    found = figures([Scored(run, run.seconds, 90.0), Scored(replace(run, seconds=run.seconds * 1.1), run.seconds, 110.0)])
    assert found["memory"] == pytest.approx(0.1)
    assert found["memory_under"] == 0.5
    assert found["noise"] == pytest.approx(0.1 / 1.05)
    assert figures([]) == {}


def test_a_single_layer_takes_its_passes_and_no_optimizer() -> None:
    run = run_of(ROWS["korthikanti-t4-22B-layer-sp"])
    pricer = Pricer(frameworks())
    assert run.single_layer
    assert pricer.seconds(run) == pytest.approx(run.seconds, rel=0.1)
    assert pricer.seconds(run) < pricer.price(run).step_time


NOT_READ = "id,gpu,n_gpus,odd\nq\nq,H100\n,H100,eight,1,2,3\nq,Abacus,8\n"


def test_files_that_nobody_has_seen_are_counted_never_stumbled_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd, binary, table = tmp_path / "odd.csv", tmp_path / "binary.csv", tmp_path / "vtrain.csv"
    odd.write_text(NOT_READ, encoding="utf-8-sig")
    binary.write_bytes(bytes(range(256)) * 9)
    table.write_text("".join((PUBLISHED / "vtrain.csv").read_text().splitlines(keepends=True)[:2]), encoding="utf-8-sig")
    exam = Exam([odd, binary, table])
    reasons = exam.refused["odd.csv"]
    assert reasons == {
        "no hardware profile for a GPU that is not told": 1,
        "n_gpus is not told": 1,
        "n_gpus is not a number": 1,
        "no hardware profile for Abacus": 1,
    }
    assert exam.rows["binary.csv"] == exam.refused["binary.csv"].total()
    assert [s.run.source for s in exam.scored] == ["vtrain"]
    assert main([str(tmp_path / "none.csv")]) == 2
    assert "cannot be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("tp", "3.5", "tp is not a whole number"),
        ("micro_batch", "-1", "micro_batch is not a number that can be"),
        ("global_batch", "inf", "global_batch is not a number that can be"),
        ("model_layers", "99999", "layers or stages are beyond all bounds"),
        ("model_heads", "7", "heads that do not share out"),
        ("dp", "5", "not the number of GPUs"),
        ("step_time_s", "soon", "step_time_s is not a number"),
    ],
)
def test_a_slip_of_the_table_is_a_reason(field: str, value: str, reason: str) -> None:
    row = ROWS["narayanan-t1-39B"]
    with pytest.raises(Refused, match=reason):
        run_of(Row({**row.fields, field: value}))


def test_the_sequence_of_a_context_parallel_run_is_cut() -> None:
    pricer = Pricer(frameworks())
    run = run_of(ROWS["simumax-b200-llama3_70b_l12_tp2_cp4_pp1_dp1_seq32768_mbc4_cef"])
    whole = replace(run, cp=1, dp=4, global_batch=run.global_batch * 4)  # the same work a rank, nothing sent round
    assert (run.cp, run.dp) == (4, 1)
    assert pricer.seconds(whole) / 4 < pricer.seconds(run) < pricer.seconds(whole) / 3
    assert pricer.memory(run) < pricer.memory(whole)


def test_what_is_multiplied_in_fp8_takes_less_time_and_room() -> None:
    pricer = Pricer(frameworks())
    run = run_of(ROWS["mbridge-25.11-LLAMA3_8B-H100-FP8CS-n8-gbs128-pretrain"])
    wide = replace(run, float8=False)
    assert run.float8
    assert 0.5 * pricer.seconds(wide) < pricer.seconds(run) < pricer.seconds(wide)
    told = replace(run, recompute="none")
    assert pricer.memory(told) < pricer.memory(replace(told, float8=False))


def test_kept_by_operation_is_between_nothing_and_everything() -> None:
    """torchtitan's policy for one layer of Llama-8B: its input, wq, wv, attention with its statistics, w1 and w2."""
    pricer = Pricer({})
    run = run_of(ROWS["titan-t1-8b-fsdp-n8"])
    sizes = [pricer.memory(replace(run, recompute=how)) for how in ("full", "op", "none")]
    assert sizes == sorted(sizes)
    tokens, hidden, heads = run.micro_batch * 8192, 4096, 32
    kept = tokens * (2 * (4 * hidden + 1024 + 14336) + 4 * heads)
    assert sizes[1] - sizes[0] == pytest.approx(32 * (kept - 2 * tokens * hidden), rel=0.05)


def test_first_layers_without_experts_weigh_and_take_less() -> None:
    run, pricer = run_of(ROWS["simumax-b200-deepseekv3_l4_tp1_ep8_pp1_dp8_mbc4_cef"]), Pricer(frameworks())
    mixed = replace(run, plain=0)
    assert run.plain == 1
    assert pricer.memory(run) < pricer.memory(mixed)
    assert pricer.seconds(run) < pricer.seconds(mixed)


def test_asynchronous_tp_hides_a_collective_under_the_products_beside_it() -> None:
    """Of Llama: attention's input is gathered beside three products, its result reduced beside one, the MLP likewise."""
    run = run_of(ROWS["titan-asynctp-8b-bf16-async"])
    arranged, place = Pricer(frameworks())._placed(run)
    collectives = pairs(arranged, place, everything, 1.0)
    assert [(each.gathers, len(each.beside)) for each in collectives] == [(True, 3), (False, 1), (True, 2), (False, 1)]
    for each in collectives:
        whole, pieces = (sum(getattr(part, name)[0] for part in each.beside) for name in ("whole", "pieces"))
        assert pieces > whole > 0
        hidden, alone = each.adds(lambda cover, sent: max(0.0, sent - cover)), each.adds(lambda cover, sent: sent)
        assert hidden[0] == pytest.approx(pieces - whole + max(0.0, each.sent[0] - pieces))
        assert (hidden[1] == each.sent[1]) == each.gathers, "gradients of what several read are summed up before they are sent"
        assert alone[0] == pytest.approx(pieces - whole + each.sent[0])
        assert each._replace(runs=False).adds(arranged.beside)[0] == 0.0
    assert arranged.price(place).step_time < arranged.price(replace(place, asynchronous=False)).step_time


def test_under_a_pipeline_torchtitan_does_what_its_source_says() -> None:
    """As many micro-batches as stages, two chunks where they are interleaved, and FSDP reduces once a step."""
    found = [run_of(ROWS[name]) for name in ("titan-t6-405b-cp2", "titan-t5-405b-interleaved")]
    assert [(run.micro_batch, run.chunks, run.zero) for run in found] == [(1, 1, 1), (4, 2, 1)]
    told = Row({**ROWS["titan-t6-405b-cp2"].fields, "micro_batch": "2", "vpp": "1"})
    assert run_of(told).micro_batch == 2


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("titan-t6-405b-cp2", 2 * 8, 8 - 1), ("titan-t5-405b-interleaved", 4 * 8 + (8 - 8), 2 * 8 + 2 * (8 - 4.5))],
)
def test_pytorchs_stages_had_buffers_for_all_micro_batches(name: str, first: float, last: float) -> None:
    """In units of what passes: results and gradients of 8 micro-batches of every chunk but the last, activations of those that
    are not in flight of every chunk but the first; of the last, the logits besides."""
    run, own = run_of(ROWS[name]), frameworks()[run_of(ROWS[name]).source]
    found = []
    for software in (own, replace(own, all_buffers=False)):
        arranged, place = Pricer({run.source: software})._placed(run)
        found.append([stage.total(True) for stage in stages(arranged, place)])
    more = [a - b for a, b in zip(*found, strict=True)]
    passed, logits = 32768 / 8 * 16384 * 2, 8 * 32768 / 8 * 128256 * 2
    assert more[0] / passed == pytest.approx(first)
    assert (more[-1] - logits) / passed == pytest.approx(last)


def test_pytorch_recomputes_no_product_that_saves_nothing_after_it() -> None:
    """A layer's last product; Megatron runs it again."""
    run, own = run_of(ROWS["titan-t2-8b-cp2"]), frameworks()
    assert not own["torchtitan-compile"].whole
    assert own["megatron-2022"].whole
    seconds = [Pricer({run.source: replace(own[run.source], whole=whole)}).seconds(run) for whole in (False, True)]
    assert 1.001 < seconds[1] / seconds[0] < 1.1


def test_a_product_in_fp8_reaches_what_one_that_takes_as_long_does() -> None:
    run = run_of(ROWS["titan-h200-8b-f8-4nodes"])
    arranged, place = Pricer(frameworks())._placed(run)
    model, device = arranged.costs.layer_model(0, 1, place.samples), arranged.costs.hardware.device
    gate = next(step for step in walk(model, UNSHARDED) if step.op.module.endswith("gate") and step.op.kind == "linear")
    flops = 2 * run.micro_batch * 8192 * 4096 * 14336
    assert narrow(model, gate)[0] == pytest.approx(flops / (1.979e15 * device.matmul.at(flops * 989 / 1979)), rel=1e-3)
    assert narrow(model, gate)[1] == pytest.approx(2 * narrow(model, gate)[0])
    small = arranged.costs.layer_model(0, 1, 1)
    assert 0.5 < narrow(small, gate)[0] / small.op(gate.index, gate.outcome).forward < 1.0


def test_a_compiled_loss_takes_less_and_holds_less() -> None:
    run, own = run_of(ROWS["titan-h200-8b-f8-4nodes"]), frameworks()
    assert run.source == "torchtitan-2025"
    before = Pricer({run.source: own["torchtitan-compile"]})
    now = Pricer(own)
    logits = run.micro_batch * 8192 * 128256
    assert before.memory(run) - now.memory(run) == pytest.approx(10 * logits)
    device = now._cost_model(run).hardware.device
    assert before.seconds(run) - now.seconds(run) == pytest.approx(memory_time((36 - 8) * logits, device), rel=0.02)


def test_what_asynchronous_tp_received_is_added_up() -> None:
    """Of two reduce-scatters a layer: tokens x hidden of every rank's partial sum are read, an eighth of it is written; a policy
    that keeps what left a module adds nothing up again."""
    run = run_of(ROWS["titan-asynctp-8b-bf16-async"])
    arranged, place = Pricer(frameworks())._placed(run)
    moved = 2 * (1 + 1 / 8) * run.micro_batch * 8192 * 4096 * 2
    assert sums(arranged, place, everything) == pytest.approx(memory_time(moved, arranged.costs.hardware.device))
    assert arranged.recomputed
    assert sums(arranged, place, arranged.recomputed) == 0.0
    assert sums(arranged, replace(place, asynchronous=False), everything) == 0.0


def test_what_tp_moves_along_the_sequence_is_copied() -> None:
    """Two gathers and two scatters of tokens x hidden in either pass, read and written; in fp8 half of a gather."""
    wide = run_of(ROWS["titan-asynctp-8b-bf16-vanilla"])
    stream = wide.micro_batch * 8192 * 4096 * 2
    for run, moved in ((wide, 8 * stream), (replace(wide, float8=True), 6 * stream)):
        arranged, place = Pricer(frameworks())._placed(run)
        assert laid(arranged, place, everything) == pytest.approx((memory_time(moved, arranged.costs.hardware.device),) * 2)
        assert laid(arranged, replace(place, asynchronous=True), everything) == (0.0, 0.0)


def test_operands_of_fp8_are_cast_once() -> None:
    """Llama-8B: attention's input and that of the MLP are of several linears; 5 bytes an element and pass for an input, 6 for a
    gradient; under tp what is gathered is cast by its owner, and turned by everyone in the backward pass."""
    hidden, ffn, tokens = 4096, 14336, 8192
    alone = run_of(ROWS["titan-h200-8b-f8-4nodes"])
    arranged, place = Pricer(frameworks())._placed(alone)
    inputs, results = 3 * hidden + ffn, 3 * hidden + 2 * 1024 + 2 * ffn
    each = alone.micro_batch * tokens
    found = casts(arranged, place, everything)
    device = arranged.costs.hardware.device
    assert found == pytest.approx([memory_time(each * n, device) for n in (5 * inputs, 5 * inputs + 6 * results)])
    assert casts(arranged, replace(place, float8=False), everything) == (0.0, 0.0)

    cut = run_of(ROWS["titan-asynctp-8b-float8-tensorwise-async"])
    arranged, place = Pricer(frameworks())._placed(cut)
    device, each = arranged.costs.hardware.device, cut.micro_batch * tokens
    own, gathered = (hidden + ffn) / 8, 2 * hidden
    backward = 2 * gathered + 5 * own + 6 * (hidden + 2 * 1024 + 2 * ffn) / 8 + (5 / 8 + 2) * gathered
    forward = 5 * own + 5 * gathered / 8
    assert casts(arranged, place, everything) == pytest.approx([memory_time(each * n, device) for n in (forward, backward)])


def test_a_ring_that_is_waited_for_takes_longer() -> None:
    run, own = run_of(ROWS["titan-t2-8b-cp4"]), frameworks()["torchtitan-compile"]
    assert own.ring_waits
    hidden = Pricer({"torchtitan-compile": replace(own, ring_waits=False)})
    assert hidden.seconds(run) < Pricer({"torchtitan-compile": own}).seconds(run)


@pytest.mark.parametrize(("how", "sent"), [("full", 1.0), ("op", 0.0)])
def test_attention_that_runs_again_has_its_ring_again(how: str, sent: float) -> None:
    run = replace(run_of(ROWS["titan-t2-8b-cp4"]), recompute=how)
    arranged, place = Pricer(frameworks())._placed(run)
    assert arranged._again(place, 1.0) - arranged._again(place, 0.0) == pytest.approx(sent)


def test_by_operation_every_second_product_runs_again() -> None:
    """A row that does not tell has what torchtitan's configurations say. A product in fp8 is a product to its list."""
    run, pricer = run_of(ROWS["titan-h200-8b-f8-4nodes"]), Pricer(frameworks())
    assert (run.recompute, run.float8) == ("op", True)
    assert pricer.memory(run) == pricer.memory(replace(run, float8=False))
    again = pricer._placed(run)[0].recomputed
    assert again
    linears = [step for step in walk(pricer._cost_model(run).layer_model(0, 1, 1), UNSHARDED) if step.op.kind == "linear"]
    assert [again(step) for step in linears] == [i % 2 == 1 for i in range(len(linears))]


def test_by_operation_a_product_whose_reduced_sums_are_kept_does_not_run_again() -> None:
    arranged, place = Pricer(frameworks())._placed(run_of(ROWS["titan-asynctp-8b-bf16-async"]))
    again = arranged.recomputed
    assert again
    linears = [step for step in walk(arranged.costs.layer_model(0, 8, 1), place.block) if step.op.kind == "linear"]
    assert [step.op.module.rpartition(".")[2] for step in linears if again(step)] == ["wk", "up"]
