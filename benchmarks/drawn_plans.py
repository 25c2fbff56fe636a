"""Plans drawn from the planner's own space for random small models, each run dry and compared with its own prediction.

python -m benchmarks.drawn_plans [--n 200] [--seed 1]
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from autoplan.capture import LoadedModel, capture, load_model
from autoplan.cost.model import CostModel
from autoplan.plan import Plan
from autoplan.profile.catalog import find_hardware
from autoplan.search.columns import Tables
from autoplan.verify import dry_run
from autoplan.workload import Workload
from tests.test_drawn_plans import draw
from tests.test_parity import EXAMPLES

WORLDS = (2, 4, 8, 16)
A_MODEL = 5
"""Plans that are drawn of one model."""


@dataclass(frozen=True)
class Drawn:
    """A plan of a random model and what its dry run found."""

    title: str
    plan: Plan
    wrong: tuple[str, ...]
    """Differences, or why it could not be run; empty when it is clean."""


def random_model(dice: random.Random) -> LoadedModel:
    """One of the examples in a random small shape."""
    name = dice.choice(("gpt", "llama", "hf_llama", "transformer", "moe"))
    heads = dice.choice((2, 4, 6))
    sizes: dict[str, Any] = {
        "layers": dice.randint(1, 3) if name == "transformer" else dice.randint(2, 7),
        "hidden": heads * dice.choice((8, 12, 16)),
        "heads": heads,
        "ffn": dice.choice((48, 64, 100, 128)),
        "vocab": dice.choice((50, 64, 96)),
        "seq_len": dice.choice((8, 12, 15, 16)),
    }
    if name == "moe":
        # the kernel of grouped products takes rows of whole 16 bytes
        sizes |= {"kv_heads": heads, "experts": dice.choice((2, 4, 8)), "chosen": 2, "ffn": dice.choice((48, 64, 128))}
    elif name.endswith("llama"):
        sizes["kv_heads"] = dice.choice([k for k in (1, 2, 3, heads) if heads % k == 0])
        sizes["size"] = "1B" if name == "hf_llama" else "125M"
    else:
        sizes |= {"size": "124M"} if name == "gpt" else {"dropout": 0.0}
    return load_model(str(EXAMPLES / f"{name}.py"), kwargs=sizes)


def tables(loaded: LoadedModel, dice: random.Random) -> Tables:
    grouped = "moe.py" in loaded.spec  # of grouped products there is no kernel in float32
    compute = "bfloat16" if grouped else dice.choice(("float32", "bfloat16"))
    batch = dice.choice((8, 16, 24))
    load = Workload(global_batch=batch, param_dtype="float32", compute_dtype=compute, reduce_dtype="float32")  # type: ignore
    return Tables(CostModel(capture(loaded, compute_dtype=compute), find_hardware("cpu-gloo"), load))


def drawn(n: int, seed: int) -> Iterator[Drawn]:
    """`n` plans of random models; what falls outside the space is drawn again."""
    dice, made = random.Random(seed), 0
    while made < n:
        loaded = random_model(dice)
        torch.manual_seed(0)
        known = tables(loaded, dice)
        for _ in range(A_MODEL):
            found = draw(known, dice, dice.choice(WORLDS), every_axis=True)
            if found is not None and made < n:
                made += 1
                yield Drawn(f"{loaded.spec} {found[0]}", found[1], checked(found[1], loaded, known))


def checked(plan: Plan, loaded: LoadedModel, known: Tables) -> tuple[str, ...]:
    try:
        found = dry_run(plan, loaded, known.graph)
    except Exception as error:
        return (f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}",)
    return (*found.differences, *found.notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200, help="plans to draw")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    start, results = time.perf_counter(), []
    for each in drawn(arguments.n, arguments.seed):
        results.append(each)
        if each.wrong:
            print(f"{len(results):4} {each.title}", *each.wrong, sep="\n       ", flush=True)
    clean = sum(not each.wrong for each in results)
    kinds = Counter(" x ".join(word.split()[0] for word in str(each.plan.mesh).split(" x ")) for each in results)
    print(", ".join(f"{number} {kind}" for kind, number in kinds.most_common()))
    print(f"{clean} of {len(results)} clean, {time.perf_counter() - start:.0f} s")
    if clean < len(results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
