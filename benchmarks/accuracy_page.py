"""The page docs/accuracy.md: figures beside targets and rivals, what was fitted on what, the worst rows with likely reasons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks import plots
from benchmarks.accuracy import COLUMNS, Scored, cells, failures, slices
from benchmarks.accuracy_words import HEAD, LEVEL, MISSES, TERMS
from benchmarks.software import FRAMEWORKS

DOCS = Path(__file__).parents[1] / "docs"
PLOTS = "accuracy"
"""Folder of the plots, in `DOCS`."""


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
    if document["failures"]:
        lines += ["", "Failed runs, whose cause is not published, beside what is predicted not to fit:", ""]
        lines += [f"- {line}" for line in failures(document)]
    lines += ["", *_plots(scored), "", "## What was fitted", "", *_fitted(), "", TERMS, MISSES.format(**_facts(sources)), LEVEL]
    lines += ["## The worst ten of every source", ""]
    lines += _worst(scored)
    return "\n".join(lines)


def _plots(scored: Sequence[Scored]) -> Iterator[str]:
    """Writes the plots and yields the lines that show them."""
    yield "## Predicted against measured"
    yield ""
    yield "Held-out rows are blue dots, fitted ones grey rings; the band is 20 % to either side. Large sources are thinned out."
    folder = DOCS / PLOTS
    folder.mkdir(exist_ok=True)
    sources: dict[str, list[Scored]] = {}
    for s in scored:
        name = s.run.source if s.run.source == "nanotron-slow" else s.run.source.split("-compile")[0].split("-a100")[0]
        sources.setdefault(name, []).append(s)
    for name, some in sorted(sources.items()):
        seconds = [plots.Point(s.run.seconds, s.seconds, s.run.held_out) for s in some]
        kept = [(s.run.memory, s.memory, s.run.held_out) for s in some]
        gibibytes = [plots.Point(a / 2**30, b / 2**30, half) for a, b, half in kept if a and b]
        path = plots.write(folder, name, seconds, gibibytes)
        yield ""
        yield f"![{name}: predicted against measured]({PLOTS}/{path.name})"


def _fitted() -> list[str]:
    lines = ["| framework | constants | on what |", "|---|---|---|"]
    for name, entry in yaml.safe_load(FRAMEWORKS.read_text(encoding="utf-8")).items():
        constants = ", ".join(f"{key} {value:g}" for key, value in entry.items() if key != "why")
        lines.append(f"| {name} | {constants} | {entry['why']} |")
    lines.append("| hardware: H100, H200 | GEMM level / 1.32 | fit halves of LLM-Foundry and nanotron |")
    lines.append("| hardware: GB300 | GEMM level of a B200 times 1.2 | fit half of Megatron-Bridge, 8 rows |")
    return lines


def _facts(sources: dict[str, Any]) -> dict[str, str]:
    def of(name: str, half: str, key: str) -> str:
        value = sources.get(name, {}).get(half, {}).get(key)
        return "none" if value is None else f"{value:.3f}" if key == "spearman" else f"{value:.1%}"

    return {
        "vtrain": of("vtrain", "held out", "mape"),
        "vtrain_rank": of("vtrain", "held out", "spearman"),
        "vtrain_regret": of("vtrain", "held out", "regret"),
        "titan": of("torchtitan, bf16", "held out", "mape"),
        "titan_all": of("torchtitan, all", "held out", "mape"),
        "titan_memory": of("torchtitan, all", "held out", "memory"),
        "titan_margin": of("torchtitan, all", "held out", "memory_over_margin"),
        "memory": of("peak memory elsewhere", "held out", "memory"),
        "margin": of("peak memory elsewhere", "held out", "memory_over_margin"),
        "titan_fp8": of("torchtitan, fp8", "held out", "mape"),
        "trl": of("trl", "held out", "mape"),
        "nano_rank": of("nanotron", "held out", "spearman"),
        "nano_median": of("nanotron", "held out", "median"),
        "nano_regret": of("nanotron", "held out", "regret"),
        "nano_regret_mean": of("nanotron", "held out", "regret_mean"),
        "nano_memory": of("nanotron", "held out", "memory"),
        "nano_margin": of("nanotron", "held out", "memory_over_margin"),
        "moe": of("experts", "held out", "mape"),
        "moe_h100": of("experts, H100", "held out", "mape"),
        "llmq": of("llmq", "held out", "mape"),
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
    if run.shape.experts is not None:
        return "nothing fitted on experts; what the recipe hides or fuses is not told"
    if run.cp > 1:
        return "attention over cp takes longer than is modelled" if s.error < 0 else "unknown"
    if run.source == "megatron-bridge" and not run.hardware.startswith("h100"):
        return "nothing fitted on this device"
    if run.float8 and run.source in ("llm-foundry", "llmq"):
        return "casts to fp8 of this framework"
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
            return "nothing fitted here; network taken from the framework's script"
        if run.asynchronous:
            return "asynchronous tp gains less than is priced" if s.error < 0 else "unknown"
        return "2D run, tp collectives" if run.tp > 1 else "nothing fitted here; clocks assumed"
    if run.source.startswith("megatron") and run.pp == 1:
        return "time outside the layers (head, optimizer, data)"
    return "unknown"
