"""The exam of the cost model: `python -m benchmarks.accuracy ROWS.csv ... [--json | --markdown]`.

For every source of rows, of the error e = predicted / measured - 1 of step seconds:

    MAPE mean |e|      median |e|      bias mean e      P95 of |e|
    order     fraction of pairs within (model, GPUs) that are predicted in the measured order; Spearman's rank correlation
    regret    measured seconds of the configuration predicted best in its (model, GPUs), over the measured best, minus 1
    noise     mean relative spread of runs of one configuration: what no model can be better than

each for the fit half and for the held-out half, and of peak memory mean |e| and how often it was predicted too small.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from benchmarks.pricing import Pricer, frameworks
from benchmarks.runs import Refused, Run, read, run_of

RIVALS = {
    "megatron-2022": "Calculon 3.65 % (2.5 % with a head), SimuMax 4.3 %, llm-analysis 8.4 % tuned (Table 5)",
    "megatron-2021": "Calculon 10.3 %, 3.0 % with one scalar left-one-out; SimuMax 7.3 to 9.7 %; llm-analysis 5.2 % tuned",
    "vtrain": "vTrain 14.7 %; Calculon's terms with a host floor 7.8 % leave-one-size-out",
    "simumax": "SimuMax 5.6 % time, 0.46 % memory (its own set)",
}
TARGETS = {
    "megatron-2022 Table 5": "2.5 %",
    "megatron-2021 Table 1": "3 %, one constant",
    "vtrain": "7 %",
    "torchtitan, all": "6 %",
    "llm-foundry": "8 %",
    "nanotron": "median 12 %, Spearman 0.95, median regret 3 %",
    "simumax": "time 5 %, memory 2 %",
}
PARTS = {
    "megatron-2022 Table 5": lambda run: run.source == "megatron-2022" and not run.single_layer,
    "megatron-2021 Table 1": lambda run: run.id.startswith("narayanan-t1"),
    "nanotron, tp <= 8, all": lambda run: run.source.startswith("nanotron"),
    "torchtitan, all": lambda run: run.source.startswith("torchtitan"),
}
"""Slices that a target names, beside the sources."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A run and what was predicted of it."""

    run: Run
    seconds: float
    memory: float | None

    @property
    def error(self) -> float:
        return self.seconds / self.run.seconds - 1


def score(paths: Iterable[Path]) -> tuple[list[Scored], dict[str, Counter[str]], dict[str, int]]:
    """(priced runs, refusals by file and reason, rows by file)."""
    pricer, scored = Pricer(frameworks()), []
    refused: dict[str, Counter[str]] = defaultdict(Counter)
    rows: dict[str, int] = {}
    for path in paths:
        table = read(path)
        rows[path.name] = len(table)
        for row in table:
            try:
                run = run_of(row)
                seconds = pricer.seconds(run)
                scored.append(Scored(run, seconds, pricer.memory(run) if run.memory else None))
            except Refused as reason:
                refused[path.name][str(reason)] += 1
    return scored, refused, rows


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
        found["order"] = mean(pairs)
        found["spearman"] = median(_spearman(group) for group in ranked)
        regrets = [_regret(group) for group in ranked]
        found["regret"], found["groups"] = median(regrets), len(ranked)
    spreads = _spreads(scored)
    if spreads:
        found["noise"] = mean(spreads)
    kept = [s.memory / s.run.memory - 1 for s in scored if s.memory and s.run.memory]
    if kept:
        found["memory"], found["memory_under"] = mean(map(abs, kept)), sum(e < 0 for e in kept) / len(kept)
        found["memory_rows"] = len(kept)
    return found


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


def report(scored: Sequence[Scored], refused: dict[str, Counter[str]], rows: dict[str, int]) -> dict[str, object]:
    return {
        "files": {name: {"rows": n, "refused": dict(refused[name])} for name, n in rows.items()},
        "sources": {
            name: {
                "fit": figures([s for s in some if not s.run.held_out]),
                "held out": figures([s for s in some if s.run.held_out]),
                "all": figures(some),
                "rivals": RIVALS.get(name, ""),
                "target": TARGETS.get(name, ""),
            }
            for name, some in slices(scored).items()
        },
    }


def text(document: dict[str, object]) -> str:
    lines = []
    for name, file in document["files"].items():  # type: ignore[attr-defined]
        out = sum(file["refused"].values())
        lines.append(f"{name}: {file['rows']} rows, {file['rows'] - out} predicted, {out} refused")
        lines += [f"    {n:5d}  {reason}" for reason, n in sorted(file["refused"].items(), key=lambda item: -item[1])]
    lines.append(f"\n{'source':24s}{'half':10s}{'rows':>5s}" + "".join(f"{title:>9s}" for title, _ in COLUMNS))
    for name, source in document["sources"].items():  # type: ignore[attr-defined]
        for half in ("fit", "held out", "all"):
            if source[half]:
                lines.append(f"{name:24s}{half:10s}{source[half]['rows']:5d}{''.join(f'{x:>9s}' for x in cells(source[half]))}")
    return "\n".join(lines)


COLUMNS = (
    ("MAPE", "mape"),
    ("median", "median"),
    ("bias", "bias"),
    ("P95", "p95"),
    ("order", "order"),
    ("Spearman", "spearman"),
    ("regret", "regret"),
    ("noise", "noise"),
    ("memory", "memory"),
    ("too small", "memory_under"),
)


def cells(found: dict[str, float]) -> list[str]:
    """The columns of one line, "" where there is nothing to tell."""
    return [_cell(key, found[key]) if key in found else "" for _, key in COLUMNS]


def _cell(key: str, value: float) -> str:
    return f"{value:.3f}" if key == "spearman" else f"{value:+.1%}" if key == "bias" else f"{value:.1%}"


def main(arguments: Sequence[str]) -> None:
    paths = [Path(a) for a in arguments if not a.startswith("--")]
    scored, refused, rows = score(paths)
    document = report(scored, refused, rows)
    if "--json" in arguments:
        print(json.dumps(document, indent=1))
    elif "--markdown" in arguments:
        from benchmarks.accuracy_page import page

        print(page(document, scored))
    else:
        print(text(document))


if __name__ == "__main__":
    main(sys.argv[1:])
