"""Captures every model of the zoo in full and checks it in small; writes the table docs/zoo.md.

python -m benchmarks.zoo [NAME ...]     (no name: all of them, and the file is written)
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch
import transformers

from autoplan.capture.fake import build_on_meta
from autoplan.capture.merge import MEETING
from autoplan.capture.model import capture_module
from autoplan.errors import UsageError
from autoplan.graph import Graph
from tests.models import ZOO, Family
from tests.models.oracle import capture_of, check

PAGE = Path(__file__).parents[1] / "docs" / "zoo.md"
HEAD = """# The zoo: every family that capture is checked with

Made by `make zoo` with torch {torch} and transformers {transformers}; capture needs no GPU and allocates no weights.
Bytes and FLOPs are those of one sample with the kernels of a GPU in bfloat16 (a causal mask is not halved).

- **ops**: operations of the user's code, each block counted. **blocks**: layers found, and how many different ones.
- **CPU s**: processor seconds of the capture, without imports and the making of the model on `meta`.
- **check**: of the same family in small, on this machine and with its kernels, against a real training step:
  *FLOPs* against `FlopCounterMode`, *saved* against the storages that `saved_tensors_hooks` sees (relative differences);
  *run* says that the executable FX graph gives the loss and the gradients of eager to the bit and its FLOPs;
  *exact* says that tracing all layers at batch sizes 3 and 5 gives the same graph as tracing two of each kind at 2 and 3.

| model | parameters | tokens | ops | FLOPs forward | FLOPs backward | saved | blocks | CPU s | FLOPs | saved | run | exact |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|---|
"""
NOTES = """
Not counted by torch, and counted here by formula: grouped matrix products (`2 * rows * in * out`, whatever the expert).
Counted `channels` times too high by torch, and here and in the check as often as it is done: the gradient of the weight of
a depthwise convolution (Mamba 2).
CLIP compares all samples with each other, so that its costs are no line over the batch. The graph holds a chord, which is
above the real costs up to a micro-batch of 1024, and equal to them there, where it is checked.
"""


def row(family: Family, size: str) -> tuple[str, Graph | None]:
    """One line of the table, and the graph."""
    name = family.name if size == "full" else f"{family.name} {size}"
    try:
        loaded = family.load(size)
        module = build_on_meta(loaded.build)
        start = time.process_time()
        graph = capture_module(module, loaded.example_inputs, loaded.loss_fn, name=name)
        seconds = time.process_time() - start
        checked = checks(family) if size == "full" else "| | | |"
    except UsageError as error:
        return f"| {name} | not captured: {error.message} {error.hint} |", None
    operations = sum(op.kind not in ("enter", "exit", "call") for _, body in graph.members() for op in body.ops)
    facts = (
        name,
        f"{graph.parameters / 1e9:.3f} B",
        str(graph.tokens) if graph.tokens > 1 else "",
        f"{operations:,}",
        f"{graph.forward_flops:.3e}",
        f"{graph.backward_flops:.3e}",
        f"{graph.saved_bytes / 2**30:.2f} GiB",
        f"{len(graph.blocks)} ({len(graph.bodies)})",
        f"{seconds:.2f}",
    )
    return f"| {' | '.join(facts)} {checked}", graph


def checks(family: Family) -> str:
    loaded = family.load("tiny")
    found = check(loaded, capture_of(loaded), MEETING if family.meets else 4)
    words = [f"{found.flops:+.2%}", f"{found.saved:+.2%}", *("yes" if ok else "NO" for ok in (found.executed, found.exact))]
    return f"| {' | '.join(words)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="families; the page is written when none is named")
    names = parser.parse_args().names
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    head = HEAD.format(torch=torch.__version__, transformers=transformers.__version__)
    lines, said = [], []
    for family in [ZOO[name] for name in names] or ZOO.values():
        for size in [size for size in family.sizes if size != "tiny"]:
            line, graph = row(family, size)
            print(line, flush=True)
            lines.append(line)
            said += [f"- {family.name}: {short(warning)}" for warning in (graph.warnings if graph else ())]
    if not names:
        warned = "\nWarnings that capture gave:\n\n" + "\n".join(dict.fromkeys(said)) + "\n"
        PAGE.write_text(head + "\n".join(lines) + "\n" + NOTES + warned, encoding="utf-8")


def short(warning: str) -> str:
    """A warning without this machine's paths."""
    return " ".join(Path(word).name if word.startswith("/") else word for word in warning.split())


if __name__ == "__main__":
    main()
