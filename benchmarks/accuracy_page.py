"""The page docs/accuracy.md: figures beside targets and rivals, what was fitted on what, the worst rows with likely reasons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from benchmarks.accuracy import COLUMNS, Scored, cells, slices
from benchmarks.software import FRAMEWORKS

HEAD = """# How accurate the cost model is

Made by `python -m benchmarks.accuracy benchmarks/published/*.csv --markdown > docs/accuracy.md`. Every row of the published
tables in `benchmarks/published/` is priced with the planner's own functions (`LayerModel`, `layer_cost`, `CostModel`, and
`benchmarks.arrangement` for stages) on the captured graph of the run's shape, or refused with a reason that is counted below.

- **error** = predicted / measured - 1 of the seconds of a step. **MAPE** mean of its size, **median** of its size, **bias** its
  mean, **P95** of its size.
- **order**: pairs of configurations of the same (model, GPUs) predicted in the measured order; **Spearman**: median rank
  correlation within groups of at least five; **regret**: how much slower than the measured best the configuration predicted
  best is, median over those groups.
- **noise**: spread of runs of one configuration, where a source repeats any. **memory**: mean size of the error of the peak;
  **too small**: how often it was predicted below the measured one.
- **held out**: the split is by group, a hash of (model, GPUs, tp, pp); constants were fitted on the other half alone. Held-out
  figures were looked at while terms were added to the model (nanotron's floor for pipelines over nodes, the adding up of
  gradients, the optimizer's bytes), so they are a fair test of the constants and a milder one of the terms. The hash was changed
  once, before any constant that is kept was fitted: it had the source's name in it. The level of the H100 curves was found
  under the first hash and confirmed, not changed, under this one (last section but one).
"""

UNUSED = """Two more files of the same collection are not in this repository's copy because every one of their rows would be
refused: `megatron-bridge` (222 rows: recomputation, CUDA graphs and overlap live in recipes, not in the table; most are fp8
or mixtures of experts) and `llmq` (95 rows: a CUDA/C++ program on consumer and workstation GPUs without profiles)."""

MISSES = """## Where it misses its targets, and why

- **megatron Table 5, held out {t5}, target 2.5 %** (all eight rows {t5_all}): the 22B model with selective recomputation is
  6 % too fast. Its layers are within 2 % (Table 4 rows), so 50 to 90 ms a step outside the layers are missing; the larger
  models, where they weigh less, are within 3 %. One constant is fitted (and the optimizer's bytes are counted).
- **vtrain, held out {vtrain}, target 7 %**: the fit leans on a per-step time in proportion to the parameters of a GPU, equal to
  50 optimizer steps, which is no physics that we can name; runs with tp 2 and 4 are up to 40 % slower than their tp 8 siblings
  for a reason that the source does not tell (the excess does not grow with the number of micro-batches). Order within the
  held-out groups is poor (Spearman {vtrain_rank}), and in the one held-out group large enough the configuration predicted best
  takes {vtrain_regret} longer than the best.
- **torchtitan, all {titan}, target 6 %**: the hash put all of its groups into the held-out half, so nothing was fitted on it.
  The 500 W H100 is the 700 W one with clocks of (500 / 700)^(1/3), an assumption chosen among three that were looked at; eager
  kernels are as slow as found on LLM-Foundry. Worst is the plain 2D run: its asynchronous sibling is 9 % faster as measured,
  and the model knows no difference. Whether "selective" was per operation or every second layer is not printed.
- **nanotron: Spearman {nano_rank} held out, target 0.95** (median error {nano_median} and median regret {nano_regret} meet
  theirs): under tp, runs whose pipeline spans nodes never take less than 8 (tp 2), 12 (tp 4) or 21 ms (tp 8) for a layer
  and micro-batch, however small; a constant for that is fitted, its cause is unknown. Some runs at dp 128 and some at tp 4
  with pp 2 are two to three times slower than their siblings. Runs below 10 % MFU, which the source calls pathological,
  are 70 % off in the median: the model prices what a machine can do, not what went wrong.
- **simumax: memory {simumax_memory}, target 2 %** (time meets its target): too large by 5 to 6 % at tp 8, too small by 5 % for
  the pipeline of the 405B-shaped model; what TransformerEngine keeps is not modelled kernel by kernel.
- **torchtitan's memory is 16 to 24 % too small** and nanotron's 10 % off either way: the first would fit if every second layer
  were recomputed (see above); GB or GiB is not stated in the second.

## From too high an MFU to a believable one

For Llama-8B under FSDP on 8 H100 (700 W, micro-batch 2, nothing recomputed) the model priced 10,540 tokens/s a GPU, 65 % MFU
with attention counted in full; it now says 8,270, 51 %. torchtitan's table has 5,762 eager and 6,667 compiled (36 and 41 % on
that scale) on H100s of 500 W with slower memory and selective recomputation: priced as such, its 8-GPU rows come out 5.5 and
1.3 % too fast. So half of the gap was an optimistic profile, and the rest is another machine, recomputation and eager kernels.

GEMM and attention curves of the H100 profile came from kernels timed alone on an A100 and a B200. On 700 W H100s the fit half of
nanotron asked for 1.32 times that time, and LLM-Foundry's for 1.41 with elementwise kernels free. The curves were divided by
1.32; asked again on the fit halves of the final split, with that factor free, nanotron wants 0.98 and LLM-Foundry 0.99 of the
new level. Two unlike frameworks agree within 2 %, so the level is taken to be the machine's (sustained clocks are an
explanation, not a measurement) and lives in `hwprofiles/`. What eager PyTorch adds (1.85 times for elementwise kernels), host
time and slow networks stay with the framework's constants: `torch.compile` or another framework does not have them, and the
planner assumes none of them.
"""


def page(document: dict[str, Any], scored: Sequence[Scored]) -> str:
    sources = document["sources"]
    titles = [title for title, _ in COLUMNS]
    lines = [HEAD, "## Time and memory, by source", "", f"| source | half | rows | {' | '.join(titles)} | target |"]
    lines.append("|---|---|--:|" + "--:|" * len(titles) + "---|")
    for name, source in sources.items():
        for half in ("fit", "held out"):
            found = source[half]
            if found:
                target = source["target"] if half == "held out" else ""
                lines.append(f"| {name} | {half} | {found['rows']} | {' | '.join(cells(found))} | {target} |")
    lines += ["", "Rivals on the same rows, in-sample unless told:", ""]
    lines += [f"- {name}: {source['rivals']}" for name, source in sources.items() if source["rivals"]]
    lines += ["", "## Rows that were not priced", "", "| file | rows | priced | reason | rows refused |", "|---|--:|--:|---|--:|"]
    for name, file in document["files"].items():
        out = sum(file["refused"].values())
        reasons = sorted(file["refused"].items(), key=lambda item: -item[1]) or [("", 0)]
        for i, (reason, n) in enumerate(reasons):
            first = f"{name} | {file['rows']} | {file['rows'] - out}" if i == 0 else " | | "
            lines.append(f"| {first} | {reason} | {n or ''} |")
    lines += [
        "",
        "## What was fitted",
        "",
        *_fitted(),
        "",
        MISSES.format(**_facts(sources)),
        "## The worst ten of every source",
        "",
    ]
    lines += _worst(scored)
    return "\n".join(lines)


def _fitted() -> list[str]:
    lines = ["| framework | constants | on what |", "|---|---|---|"]
    for name, entry in yaml.safe_load(FRAMEWORKS.read_text(encoding="utf-8")).items():
        constants = ", ".join(f"{key} {value:g}" for key, value in entry.items() if key != "why")
        lines.append(f"| {name} | {constants} | {entry['why']} |")
    lines.append("| hardware: H100, H200 | GEMM and attention level / 1.32 | fit halves of LLM-Foundry and nanotron |")
    return lines


def _facts(sources: dict[str, Any]) -> dict[str, str]:
    def of(name: str, half: str, key: str) -> str:
        value = sources.get(name, {}).get(half, {}).get(key)
        return "none" if value is None else f"{value:.3f}" if key == "spearman" else f"{value:.1%}"

    return {
        "t5": of("megatron-2022 Table 5", "held out", "mape"),
        "t5_all": of("megatron-2022 Table 5", "all", "mape"),
        "vtrain": of("vtrain", "held out", "mape"),
        "vtrain_rank": of("vtrain", "held out", "spearman"),
        "vtrain_regret": of("vtrain", "held out", "regret"),
        "titan": of("torchtitan, all", "all", "mape"),
        "nano_rank": of("nanotron", "held out", "spearman"),
        "nano_median": of("nanotron", "held out", "median"),
        "nano_regret": of("nanotron", "held out", "regret"),
        "simumax_memory": of("simumax", "held out", "memory"),
    }


def _worst(scored: Sequence[Scored]) -> list[str]:
    lines = []
    for name, some in slices(scored).items():
        if "," in name or "Table" in name:
            continue
        lines += [
            f"### {name}",
            "",
            "| row | half | measured s | predicted s | error | likely reason |",
            "|---|---|--:|--:|--:|---|",
        ]
        for s in sorted(some, key=lambda s: -abs(s.error))[:10]:
            half = "held out" if s.run.held_out else "fit"
            lines.append(f"| {s.run.id} | {half} | {s.run.seconds:.4g} | {s.seconds:.4g} | {s.error:+.1%} | {reason(s)} |")
        lines.append("")
    return lines


def reason(s: Scored) -> str:
    """A likely reason for an error, by rule; "unknown" where no rule speaks."""
    run = s.run
    batches = run.global_batch // (run.dp * run.micro_batch)
    if abs(s.error) < 0.05:
        return "within 5 %"
    if run.source == "nanotron-slow":
        return "pathological by its source (MFU under 10 %)"
    if run.source == "nanotron":
        if run.dp >= 32 and batches <= 4:
            return (
                "gradient reduction over the network weighs most" if s.error < 0 else "network faster here than the fitted mean"
            )
        if run.pp > 1 and s.error > 0.3:
            return "the floor of pipelines over nodes does not hold here, cause unknown"
        if run.pp > 1 and s.error < -0.3:
            return "two to three times slower than its siblings"
        if run.tp > 1 and run.micro_batch <= 4:
            return "bound by host time a layer"
        return "unknown"
    if run.source == "vtrain":
        if run.tp in (2, 4):
            return "tp 2 and 4 are slow in this source, cause not told"
        return "tp over two nodes" if run.tp > 8 else "unknown"
    if run.source == "llm-foundry":
        if run.recompute == "full" and s.error > 0:
            return "one elementwise factor with and without recomputation"
        if run.shape.seq_len >= 8192:
            return "attention of long sequences: one constant for all lengths"
        return "host time of small layers" if run.shape.hidden <= 2048 else "unknown"
    if run.source.startswith("torchtitan"):
        if run.hardware.startswith("a100"):
            return "nothing fitted here; network not told"
        return "2D run, tp collectives" if run.tp > 1 else "nothing fitted here; clocks and eager kernels assumed"
    if run.source.startswith("megatron") and run.pp == 1:
        return "time outside the layers (head, optimizer, data)"
    return "unknown"
