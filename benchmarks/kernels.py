"""The kernel model against published GEMM and attention timings: `python benchmarks/kernels.py kernels.csv`.

The file has a row for every kernel: system, op, key, efficiency, m, n, k, b; attention rows tell their shape in `key`.
Attention there is causal, and its FLOPs are counted in full: half of them are really done. Curves of the A100 profile
are those of the A100-PCIe raised to the level of the SXM module, so the PCIe rows are compared with that taken back.
"""

from __future__ import annotations

import csv
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, median

from autoplan.cost.compute import kernel_time
from autoplan.profile.catalog import find_hardware

PROFILES = {"a100_pcie": ("a100-80g-sxm-8x", 0.803 / 0.869), "b200_bf16_ceperm": ("b200-sxm-8x", 1.0)}
CAUSAL, BACKWARD = 0.5, 2.5


def work(row: dict[str, str]) -> tuple[str, float, float]:
    """(kind, FLOPs as the file counts them, bytes) of one row."""
    if row["op"] == "matmul":
        b, m, n, k = (float(row[name]) for name in "bmnk")
        return "linear", 2 * b * m * n * k, 2 * b * (m * k + k * n + m * n)
    shape = {name: float(value) for name, value in re.findall(r"(\w+)=(\d+)", row["key"])}
    widths = shape["qk_head_dim"] + shape["v_head_dim"]
    tokens = shape["batch"] * shape["seq_len"]
    flops = 2 * tokens * shape["seq_len"] * shape["head_num"] * widths * (BACKWARD if row["op"] == "sdp_bwd" else 1)
    return "attention", flops, 2 * tokens * (shape["head_num"] + shape["kv_head_num"]) * widths


def main(path: Path) -> None:
    errors: dict[tuple[str, str], list[tuple[float, str]]] = defaultdict(list)
    for row in csv.DictReader(path.open()):
        if row["system"] not in PROFILES or row["op"] == "group_matmul":
            continue
        name, level = PROFILES[row["system"]]
        device = find_hardware(name).device
        kind, flops, moved = work(row)
        measured = flops / (float(row["peak_tflops"]) * 1e12 * float(row["efficiency"]))
        done = flops * (CAUSAL if kind == "attention" else 1.0)
        predicted = kernel_time(kind, done, moved, 1, "bfloat16", device) / level
        errors[row["system"], row["op"]].append((predicted / measured - 1, row["key"]))
    print(f"{'system':18s}{'op':10s}{'rows':>5s}{'MAPE':>8s}{'median':>8s}{'bias':>8s}  worst")
    for (system, op), found in errors.items():
        every = [error for error, _ in found]
        worst = max(found, key=lambda item: abs(item[0]))
        absolute = [abs(e) for e in every]
        figures = f"{mean(absolute):8.1%}{median(absolute):8.1%}{mean(every):+8.1%}"
        print(f"{system:18s}{op:10s}{len(found):5d}{figures}  {worst[0]:+.0%} {worst[1][:60]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
