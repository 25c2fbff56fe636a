"""Fits a framework's constants on the fit half of its runs: `python -m benchmarks.fit SOURCE FIELD[=START] ...`.

The loss is the mean absolute log ratio of predicted to measured seconds, each clipped at `CLIP` (runs that a source's network
or host spoiled must not pull), minimised one constant at a time with steps that halve. Held-out groups are told beside,
never used.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import log
from pathlib import Path
from statistics import mean

from benchmarks.pricing import Pricer, frameworks
from benchmarks.runs import Refused, Run, read, run_of
from benchmarks.software import Software

PUBLISHED = Path(__file__).with_name("published")
CLIP = 0.3
"""Errors beyond this count as much as this: what a run went wrong by says nothing of the constants."""
START = {"layer": 1e-3, "layer_tp": 1e-3, "step": 1e-2, "dp_exposed": 0.5, "tp_exposed": 0.9}


def runs_of(source: str) -> Iterator[Run]:
    for path in sorted(PUBLISHED.glob("*.csv")):
        for row in read(path):
            try:
                run = run_of(row)
            except Refused:
                continue
            if run.source == source:
                yield run


def errors(pricer: Pricer, runs: Sequence[Run]) -> list[float]:
    found = []
    for run in runs:
        try:
            found.append(log(pricer.seconds(run) / run.seconds))
        except Refused:
            continue
    return found


def fit(source: str, names: Sequence[str], start: Software, runs: Sequence[Run]) -> Software:
    """The constants `names` that the fit half of `runs` likes best, the others as in `start`."""
    pricer = Pricer({source: start})
    fitted_on = [run for run in runs if not run.held_out]

    def loss(software: Software) -> float:
        pricer.use(source, software)
        return mean(min(abs(e), CLIP) for e in errors(pricer, fitted_on))

    best, least, stride = start, loss(start), 1.5
    for name in names:
        if name in START and getattr(best, name) in (0.0, 1.0):
            best = replace(best, **{name: START[name]})
    least = loss(best)
    while stride > 1.01:
        improved = False
        for name in names:
            for factor in (stride, 1 / stride):
                value = getattr(best, name) * factor
                tried = replace(best, **{name: min(value, 1.0) if name.endswith("exposed") else value})
                now = loss(tried)
                if now < least - 1e-5:
                    best, least, improved = tried, now, True
        if not improved:
            stride = stride**0.5
    return best


def main(source: str, fields: Sequence[str]) -> None:
    runs = list(runs_of(source))
    start = frameworks().get(source, Software())
    for field in fields:
        name, _, value = field.partition("=")
        if value:
            start = replace(start, **{name: float(value.rstrip("!"))})
    names = [field.partition("=")[0] for field in fields if not field.endswith("!")]
    found = fit(source, names, start, runs)
    pricer = Pricer({source: found})
    print(source, {name: float(f"{getattr(found, name):.4g}") for name in names})
    for half in (False, True):
        some = errors(pricer, [run for run in runs if run.held_out == half])
        if some:
            bias, size = mean(some), mean(abs(e) for e in some)
            print(f"  {'held out' if half else 'fitted'}: {len(some)} rows, mean |log| {size:.2%}, mean log {bias:+.2%}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
