"""The collective model against published sweeps: `python benchmarks/collectives.py collectives.csv`.

The file has a row for every message size: gpu, n_gpus, nodes, op, bytes, and time_us or busbw_gbs. Rows that a profile's
curve was fitted to are marked "fitted", others "held out".
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, median

from autoplan.cost.collectives import collective_time
from autoplan.profile.catalog import find_hardware

# networks of other kinds (V100, Omni-Path) have no profile here
PROFILES = (
    ("A100-SXM4 (8x", "a100-80g-sxm-8x", "fitted"),
    ("H100-SXM5", "h100-sxm-8x", "fitted"),
    ("H200", "h200-sxm-8x", "held out"),
    ("B200", "b200-sxm-8x", "fitted"),
)


def main(path: Path) -> None:
    errors: dict[tuple[str, str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for row in csv.DictReader(path.open()):
        match = next((p for p in PROFILES if row["gpu"].startswith(p[0])), None)
        busbw = float(row["busbw_gbs"] or 0)
        if match is None or not (row["time_us"] or busbw > 0):
            continue
        size, group = float(row["bytes"]), int(row["n_gpus"])
        measured = float(row["time_us"]) / 1e6 if row["time_us"] else 2 * (group - 1) / group * size / (busbw * 1e9)
        predicted = collective_time(row["op"], size, group, 1, find_hardware(match[1]))
        errors[match[1], f"{group} on {row['nodes']}", row["op"], match[2]].append((size, predicted / measured - 1))
    print(f"{'profile':18s}{'ranks':10s}{'op':12s}{'rows':>5s}{'MAPE':>8s}{'median':>8s}{'>=8MiB':>8s}  worst (bytes)")
    for (profile, ranks, op, note), found in errors.items():
        large = [abs(e) for size, e in found if size >= 8 * 2**20]
        worst = ", ".join(f"{e:+.0%} ({size:.3g})" for size, e in sorted(found, key=lambda item: -abs(item[1]))[:3])
        every = [abs(e) for _, e in found]
        figures = "".join(f"{figure:8.1%}" for figure in (mean(every), median(every), mean(large)))
        print(f"{profile:18s}{ranks:10s}{op:12s}{len(found):5d}{figures}  {worst}  {note}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
