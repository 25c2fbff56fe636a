"""The exam of the cost model: `python -m benchmarks.accuracy ROWS.csv ... [--json | --markdown]`.

For every source of rows, of the error e = predicted / measured - 1 of step seconds:

    MAPE mean |e|      median |e|      bias mean e      P95 of |e|
    order     fraction of pairs within (model, GPUs) that are predicted in the measured order; Spearman's rank correlation
    regret    measured seconds of the configuration predicted best in its (model, GPUs), over the measured best, minus 1:
              median over groups, and mean
    noise     mean relative spread of runs of one configuration: what no model can be better than

each for the fit half and for the held-out half, and of peak memory mean |e|, how often it was predicted too small, and how often
by more than the margin that every profile keeps free (`reserved`). Runs that failed are compared with memory too: how many of
them, and of those that ran, are predicted not to fit. A row that cannot be priced is counted with its reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from autoplan.errors import UsageError
from autoplan.profile.catalog import find_hardware
from benchmarks.pricing import Pricer, frameworks
from benchmarks.rows import Refused, Row, read
from benchmarks.runs import Run, run_of

RIVALS = {
    "megatron-2022": "Calculon 3.65 % (2.5 % with a head), SimuMax 4.3 %, llm-analysis 8.4 % tuned (Table 5)",
    "megatron-2021": "Calculon 10.3 %, 3.0 % with one scalar left-one-out; SimuMax 7.3 to 9.7 %; llm-analysis 5.2 % tuned",
    "vtrain": "vTrain 14.7 %; Calculon's terms with a host floor 7.8 % leave-one-size-out",
    "simumax": "SimuMax 5.6 % time, 0.46 % memory (its own set)",
}
TARGETS = {
    "megatron-2022 Table 5": "2.5 %",
    "megatron-2021 Table 1": "3 %, one constant",
    "megatron-bridge, H100": "8 % (bf16; its rows here are in fp8)",
    "vtrain": "7 %",
    "torchtitan, all": "6 %, memory 6 %, by margin 2 %",
    "llm-foundry": "8 %",
    "nanotron": "median 12 %, Spearman 0.95, regret 3 % (mean 6 %), memory 6 %, by margin 2 %",
    "simumax": "time 5 %, memory 2 %",
    "peak memory elsewhere": "memory 6 %, by margin 2 %",
}
PARTS = {
    "megatron-2022 Table 5": lambda run: run.source == "megatron-2022" and not run.single_layer,
    "megatron-2021 Table 1": lambda run: run.id.startswith("narayanan-t1"),
    "megatron-bridge, H100": lambda run: run.source == "megatron-bridge" and run.hardware.startswith("h100"),
    "nanotron, tp <= 8, all": lambda run: run.source.startswith("nanotron"),
    "torchtitan, all": lambda run: run.source.startswith("torchtitan"),
    "torchtitan, bf16": lambda run: run.source.startswith("torchtitan") and not run.float8 and run.cp == 1,
    "torchtitan, fp8": lambda run: run.source.startswith("torchtitan") and run.float8 and run.cp == 1,
    "context parallel": lambda run: run.cp > 1,
    "experts": lambda run: run.shape.experts is not None,
    "experts, bf16": lambda run: run.shape.experts is not None and not run.float8,
    "experts, H100": lambda run: run.shape.experts is not None and run.hardware.startswith("h100"),
    "peak memory elsewhere": lambda run: run.memory and not run.source.startswith(("simumax", "nanotron-slow")),
}
"""Slices that a target names, beside the sources."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A run and what was predicted of it."""

    run: Run
    seconds: float
    memory: float | None
    fits: bool = True

    @property
    def error(self) -> float:
        return self.seconds / self.run.seconds - 1


@dataclass(frozen=True, slots=True)
class Fits:
    """Runs by whether they ran and whether they are predicted to fit into the device."""

    ran: int = 0
    ran_not_fitting: int = 0
    failed: int = 0
    failed_not_fitting: int = 0


class Exam:
    """What was made of the rows of some files."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.pricer = Pricer(frameworks())
        self.scored: list[Scored] = []
        self.rows: dict[str, int] = {}
        self.refused: dict[str, Counter[str]] = defaultdict(Counter)
        self.failures: dict[str, Counter[bool]] = defaultdict(Counter)
        """By source, how many failed runs are predicted to fit (True) or not."""
        for path in paths:
            table = read(path)
            self.rows[path.name] = self.rows.get(path.name, 0) + len(table)
            for row in table:
                self._take(path.name, row)

    def _take(self, name: str, row: Row) -> None:
        try:
            self.scored.append(self._score(row))
        except Refused as reason:
            self.refused[name][str(reason)] += 1
            self._failure(row)
        except Exception as error:  # a table that nobody has seen must not end the exam: the row is counted instead
            self.refused[name][f"the model stops with {type(error).__name__}"] += 1

    def _score(self, row: Row) -> Scored:
        run = run_of(row)
        told = run.memory and run.recompute != "unknown"
        return Scored(run, self.pricer.seconds(run), self.pricer.memory(run) if told else None, self.pricer.fits(run))

    def _failure(self, row: Row) -> None:
        try:
            run = run_of(row, failed=True)
            self.failures[run.source][self.pricer.fits(run)] += 1
        except Refused:
            return

    def fits(self, source: str) -> Fits:
        ran = [s.fits for s in self.scored if s.run.source.removesuffix("-slow") == source]
        failed = self.failures.get(source, Counter())
        return Fits(len(ran), ran.count(False), failed.total(), failed[False])


def figures(scored: Sequence[Scored]) -> dict[str, float]:
    """All figures of some runs; those that need more runs than there are are left out."""
    if not scored:
        return {}
    sizes = sorted(abs(s.error) for s in scored)
    found: dict[str, float] = {
        "rows": len(scored),
        "mape": mean(sizes),
        "median": median(sizes),
        "bias": mean(s.error for s in scored),
        "p95": sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))],
    }
    groups: dict[tuple[str, str, int, int], list[Scored]] = defaultdict(list)
    for s in scored:
        groups[s.run.source.removesuffix("-slow"), s.run.model, s.run.gpus, s.run.global_batch * s.run.shape.seq_len].append(s)
    ranked = [group for group in groups.values() if len(group) >= 5]
    if ranked:
        pairs = [ordered for group in groups.values() for ordered in _pairs(group)]
        found["order"] = mean(pairs) if pairs else 1.0  # all took equally long
        found["spearman"] = median(_spearman(group) for group in ranked)
        regrets = [_regret(group) for group in ranked]
        found["regret"], found["regret_mean"], found["groups"] = median(regrets), mean(regrets), len(ranked)
    spreads = _spreads(scored)
    if spreads:
        found["noise"] = mean(spreads)
    kept = [s.memory / s.run.memory - 1 for s in scored if s.memory and s.run.memory]
    if kept:
        found["memory"], found["memory_under"] = mean(map(abs, kept)), sum(e < 0 for e in kept) / len(kept)
        found["memory_over_margin"] = sum(_beyond_margin(s) for s in scored if s.memory) / len(kept)
        found["memory_rows"] = len(kept)
    return found


def _beyond_margin(s: Scored) -> bool:
    return bool(s.memory and s.run.memory and s.run.memory > s.memory + find_hardware(s.run.hardware).device.reserved)


def _pairs(group: Sequence[Scored]) -> Iterable[bool]:
    for i, a in enumerate(group):
        for b in group[:i]:
            if a.run.seconds != b.run.seconds:
                yield (a.run.seconds < b.run.seconds) == (a.seconds < b.seconds)


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    for rank, i in enumerate(order):
        ranks[i] = rank
    return ranks


def _spearman(group: Sequence[Scored]) -> float:
    a, b = _ranks([s.run.seconds for s in group]), _ranks([s.seconds for s in group])
    n = len(group)
    return 1 - 6 * sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / (n * (n * n - 1))


def _regret(group: Sequence[Scored]) -> float:
    chosen = min(group, key=lambda s: s.seconds)
    return chosen.run.seconds / min(s.run.seconds for s in group) - 1


def _spreads(scored: Sequence[Scored]) -> list[float]:
    repeats: dict[tuple[object, ...], list[float]] = defaultdict(list)
    for s in scored:
        repeats[s.run.configuration].append(s.run.seconds)
    return [(max(times) - min(times)) / mean(times) for times in repeats.values() if len(times) > 1]


def slices(scored: Sequence[Scored]) -> dict[str, list[Scored]]:
    found: dict[str, list[Scored]] = defaultdict(list)
    for s in scored:
        found[s.run.source].append(s)
    for name, belongs in PARTS.items():
        found[name] = [s for s in scored if belongs(s.run)]
    return {name: found[name] for name in sorted(found) if found[name]}


def report(exam: Exam) -> dict[str, object]:
    return {
        "files": {name: {"rows": n, "refused": dict(exam.refused[name])} for name, n in exam.rows.items()},
        "sources": {
            name: {
                "fit": figures([s for s in some if not s.run.held_out]),
                "held out": figures([s for s in some if s.run.held_out]),
                "all": figures(some),
                "rivals": RIVALS.get(name, ""),
                "target": TARGETS.get(name, ""),
            }
            for name, some in slices(exam.scored).items()
        },
        "failures": {name: asdict(exam.fits(name)) for name in sorted(exam.failures)},
        "rows": [
            {
                "id": s.run.id,
                "source": s.run.source,
                "half": "held out" if s.run.held_out else "fit",
                "seconds": s.run.seconds,
                "predicted_seconds": s.seconds,
                "bytes": s.run.memory,
                "predicted_bytes": s.memory,
            }
            for s in exam.scored
        ],
    }


def text(document: dict[str, Any]) -> str:
    lines = []
    for name, file in document["files"].items():
        out = sum(file["refused"].values())
        lines.append(f"{name}: {file['rows']} rows, {file['rows'] - out} predicted, {out} refused")
        lines += [f"    {n:5d}  {reason}" for reason, n in sorted(file["refused"].items(), key=lambda item: -item[1])]
    lines.append(f"\n{'source':24s}{'half':10s}{'rows':>5s}" + "".join(f"{title:>10s}" for title, _ in COLUMNS))
    for name, source in document["sources"].items():
        for half in ("fit", "held out", "all"):
            if source[half]:
                lines.append(f"{name:24s}{half:10s}{source[half]['rows']:5d}{''.join(f'{x:>10s}' for x in cells(source[half]))}")
    lines += [f"\n{line}" for line in failures(document)]
    return "\n".join(lines)


def failures(document: dict[str, Any]) -> list[str]:
    """A sentence for every source that tells of failed runs."""
    return [
        f"{name}: of {found['failed']} failed runs that can be priced, {found['failed_not_fitting']} are predicted not to fit "
        f"into the device; of {found['ran']} that ran, {found['ran_not_fitting']}."
        for name, found in document["failures"].items()
    ]


COLUMNS = (
    ("MAPE", "mape"),
    ("median", "median"),
    ("bias", "bias"),
    ("P95", "p95"),
    ("order", "order"),
    ("Spearman", "spearman"),
    ("regret", "regret"),
    ("(mean)", "regret_mean"),
    ("noise", "noise"),
    ("memory", "memory"),
    ("too small", "memory_under"),
    ("by margin", "memory_over_margin"),
)


def cells(found: dict[str, float]) -> list[str]:
    """The columns of one line, "" where there is nothing to tell."""
    return [_cell(key, found[key]) if key in found else "" for _, key in COLUMNS]


def _cell(key: str, value: float) -> str:
    return f"{value:.3f}" if key == "spearman" else f"{value:+.1%}" if key == "bias" else f"{value:.1%}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description="The exam of the cost model.")
    parser.add_argument("files", nargs="+", type=Path, metavar="ROWS.csv", help="tables in the schema of benchmarks/published")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--json", action="store_true", help="all figures, and every row with its prediction")
    kinds.add_argument("--markdown", action="store_true", help="the page docs/accuracy.md, with its plots beside it")
    options = parser.parse_args(arguments)
    try:
        exam = Exam(options.files)
    except UsageError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    document = report(exam)
    if options.json:
        print(json.dumps(document, indent=1))
    elif options.markdown:
        from benchmarks.accuracy_page import page

        print(page(document, exam.scored))
    else:
        print(text(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
