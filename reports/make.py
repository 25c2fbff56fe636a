"""The sample reports of this folder: `make reports` plans them anew, and refreshes what the documents show of real runs.

Run from the root of the repository, so that the plans name their models as a reader would.
"""

from __future__ import annotations

import contextlib
import csv
import io
import sys
import tempfile
from pathlib import Path

from autoplan import cli
from autoplan.report import sure

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
ACCURACY = HERE.parent / "docs" / "accuracy.md"
PLAN_FILE = HERE.parent / "docs" / "plan-file.md"

CASES = {
    "transformer-4": ["examples/transformer.py", "--gpus", "4"],
    "llama-8b-8": ["examples/llama.py", "--gpus", "8", "--beside", "reports/torchtitan-8b.toml"],
    "llama-70b-64": ["examples/llama.py", "--set", "size=70B", "--gpus", "64"],
    "llama-70b-64-pipeline": ["examples/llama.py", "--set", "size=70B", "--gpus", "64", "--pp", "4", "--tp", "8"],
    "moe-8x7b-16": ["examples/moe.py", "--gpus", "16"],
    "llama-405b-1024": ["examples/llama.py", "--set", "size=405B", "--gpus", "1024", "--global-batch", "1024"],
}
"""Name of the report -> what `autoplan plan` is asked."""

ANNOTATED = ["examples/gpt.py", "--set", "size=350M", "--gpus", "8", "--tp", "2"]
"""The plan that docs/plan-file.md explains."""

NOTES = {
    "model:": "the file, with its arguments",
    "graph:": "fingerprint of the captured graph",
    "hardware_fingerprint:": "of every number of the profile",
    "  global_batch:": "samples of one optimizer step",
    "tokens:": "of one sample",
    "mesh:": "4 x 2 = 8 devices",
    "micro_batch:": "samples that one data-parallel group runs at a time",
    "outer:": "the strategy of everything outside the layers",
    "- h.": "24 layers, one strategy",
    "    zero: 2": "ZeRO-2: gathered parameters stay until the backward pass",
    "      attn.c_attn.weight:": "q, k and v in one: a share of each",
    "      attn.c_attn.bias:": "whole; its gradient is summed over tp",
    "      attn.c_proj.weight:": "row parallel",
    "      mlp.c_fc.weight:": "column parallel",
    "    - 'attn.c_attn in 0:": "backward: all-reduce",
    "    - 'attn.c_proj out 0:": "forward: all-reduce",
    "tied:": "names of one parameter",
    "memory_limit:": "of one device",
    "  simulated:": "the same layers as events on every device's streams",
    "  units:": "what was simulated: seconds on each stream",
    "  hidden_communication:": "runs under computation: no part of step_time",
    "  time:": "adds up to step_time",
    "  memory:": "adds up to the peak of the fullest device",
    "    awaited:": "gradients that come when the peak is over",
    "  status: optimal": "proven within the gap that was asked for",
    "  bound: true": "a proven lower bound, not a prediction",
}
"""Start of a line -> what docs/plan-file.md says of it, where it first occurs."""

PUBLISHED = {
    "nanotron": ("h100 h200", "dense", "Llama, 1B to 70B, on 8 to 512 H100, with nanotron, above 10 % MFU"),
    "llm-foundry": ("h100 h200", "dense", "MPT, 125M to 70B, on 8 to 512 H100, with LLM Foundry"),
    "torchtitan, bf16": ("h100 h200", "dense", "Llama 3.1 on H100 and A100, with torchtitan"),
    "megatron-2021": ("a100", "dense", "GPT on A100, with Megatron-LM in 2021"),
    "megatron-2022": ("a100", "dense", "GPT on A100, with Megatron-LM in 2022"),
    "vtrain": ("a100", "dense", "GPT on 64 to 512 A100, with Megatron-DeepSpeed"),
    "torchtitan-a100": ("a100", "dense", "Llama on A100, with torchtitan"),
    "megatron-2020-v100": ("v100", "dense", "GPT on V100, with Megatron-LM in 2020"),
    "simumax": ("b200 b300 gb200 gb300", "dense", "short models on one node of B200, with Megatron-LM (SimuMax)"),
    "megatron-bridge": ("b200 b300 gb200 gb300", "dense", "Blackwell and Hopper, most in 8 bits, with Megatron-Bridge"),
    "llmq": ("4090 5090 6000 l40s", "dense", "cards for workstations, with llm.q"),
    "experts, H100": ("h100 h200", "experts", "mixtures of experts on H100, with Megatron-Bridge"),
    "experts, bf16": ("b200 b300 gb200 gb300", "experts", "mixtures of experts in bfloat16, on Blackwell"),
}
"""Source in docs/accuracy.md -> devices of profiles that it is near to, kind of model, what was run."""

SHOWN = "Against plans written by hand"
"""The README shows the output up to this section."""


def make(asked: list[str], plan: Path, page: Path) -> str:
    """Run `autoplan plan`; what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = cli.main(["plan", *asked, "--output", str(plan), "--report", str(page), "--force"])
    if code:
        sys.exit(code)
    return printed.getvalue()


def excerpt(printed: str) -> str:
    """The part of the output that the README shows, without trailing blanks."""
    return "\n".join(line.rstrip() for line in printed.partition(SHOWN)[0].strip().splitlines())


def annotated(plan: str) -> str:
    """A plan with comments, of its candidates only the first and the last."""
    head, _, tail = plan.partition("\ncandidates:\n- ")
    candidates = tail.rstrip().split("\n- ")
    lines = f"{head}\ncandidates:\n- {candidates[0]}\n- {candidates[-1]}".splitlines()
    for start, note in NOTES.items():
        number = next((n for n, line in enumerate(lines) if line.startswith(start)), None)
        if number is not None:
            lines[number] = f"{lines[number]}  # {note}"
    return "\n".join(lines)


def shown(text: str, after: str, fence: str) -> tuple[int, int]:
    """Where in a document the first block behind `after` that is fenced with ```fence begins and ends."""
    start = text.index(f"```{fence}\n", text.index(after)) + len(f"```{fence}\n")
    return start, text.index("\n```", start)


def refresh(document: Path, after: str, fence: str, content: str) -> None:
    """Put `content` into that block."""
    text = document.read_text(encoding="utf-8")
    start, end = shown(text, after, fence)
    document.write_text(text[:start] + content + text[end:], encoding="utf-8")


def errors(accuracy: str) -> str:
    """The table that the page shows of how far predictions are off: the held-out rows of docs/accuracy.md."""
    table = accuracy[accuracy.index("| source | half |") :].partition("\n\n")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    titles = lines[0]
    held_out = {cells[0]: dict(zip(titles, cells, strict=True)) for cells in lines if cells[1] == "held out"}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("devices", "model", "runs", "number", "half", "most", "memory"))
    for source, (devices, model, runs) in PUBLISHED.items():
        row = held_out[source]
        numbers = (row[title].rstrip("%") for title in ("rows", "median", "P95", "memory"))
        writer.writerow((devices, model, runs, *numbers))
    return out.getvalue()


def main() -> None:
    """Make the table of errors, every report, the README's output, and the annotated plan."""
    sure.ERRORS.write_text(errors(ACCURACY.read_text(encoding="utf-8")), encoding="utf-8")
    for name, asked in CASES.items():
        printed = make(asked, HERE / f"{name}.yaml", HERE / f"{name}.html")
        if name == "llama-8b-8":
            refresh(README, "autoplan plan examples/llama.py --gpus 8", "text", excerpt(printed))
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan.yaml"
        make(ANNOTATED, plan, Path(folder) / "report.html")
        refresh(PLAN_FILE, "autoplan plan examples/gpt.py", "yaml", annotated(plan.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
