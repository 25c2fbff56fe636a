"""Files and command lines that someone damaged: autoplan ends with 0, 1 or 2, in a sentence, and writes whole files or none.

python -m benchmarks.fuzz [--files 5000] [--lines 500] [--seed 0] [--only KIND]      exit code 1 when one does not

Half of the files are plans; the others hardware profiles, configurations of other trainers, and models' config.json. Everything
runs in this process, each case for at most LIMIT seconds of the processor. What takes longer is shown, and is no miss: a damaged
number may ask for what takes long.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from autoplan import api, cli
from autoplan.export.targets import TARGETS, export
from autoplan.files.plan import dump_plan
from autoplan.plan import Plan

ROOT = Path(__file__).parent.parent
LIMIT = 20
MEMORY = 12 * 2**30
"""Of address space that a case may ask for."""
TOKENS = (
    *("0", "-1", "1e309", "nan", "null", "[]", "{}", '""', "1", "2", "8", "1000000", "true", '"\\u202e"', "9" * 30),
    *("0 s", "1 GiB", "gpipe", "interleaved-1f1b", "layers.0", "x" * 300),
)
MODEL = f"{ROOT}/examples/gpt.py?size=124M&layers=32&hidden=64&heads=4&vocab=256&seq_len=64"
CONFIGS: tuple[dict[str, Any], ...] = (
    {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
     "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 256,
     "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu"},
    {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64,
     "vocab_size": 256, "activation_function": "gelu_new", "attn_pdrop": 0.0},
    {"architectures": ["BertForMaskedLM"], "model_type": "bert", "hidden_size": 64, "num_attention_heads": 4,
     "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 256, "max_position_embeddings": 64, "type_vocab_size": 2},
)  # fmt: skip
COMMANDS = (
    *("plan", "estimate", "explain", "inspect", "report", "compare", "export", "hardware", "schema", "verify", "apply", "doctor"),
    *("calibrate", "tune"),
)
WORDS = (
    *COMMANDS,
    *("whole.yaml", "nowhere.yaml", "job.toml", "model.py", "--to", "megatron", "--format", "csv", "-o"),
    *("x.html", "--json", "--force", "-q", "-v", "--", "", "-", "--open=1", "\x1b[31m", "h100", "--help", "--gpus", "-1", "8"),
    *("8..64", "--from", "--model", "--set", "a=b", "--hardware", "auto", "tp=2", "--objective", "cost", "--version", "\udc80"),
)


def damaged(text: str, chance: random.Random) -> str:
    """The text with a value replaced, or a line lost or doubled."""
    lines = text.splitlines()
    for _ in range(chance.choice((1, 1, 2, 3))):
        at = chance.randrange(len(lines)) if lines else 0
        kind = chance.random()
        values = list(re.finditer(r"(?<=[:\[{=, ])([\w.\- ]+)(?=[,}\]]|$)", lines[at])) if lines else []
        if kind < 0.6 and values:
            value = chance.choice(values)
            lines[at] = f"{lines[at][: value.start()]} {chance.choice(TOKENS)}{lines[at][value.end() :]}"
        elif kind < 0.8 and lines:
            lines.pop(at)
        elif lines:
            lines.insert(at, lines[at])
    return "\n".join(lines)


@dataclass(frozen=True)
class Kind:
    """Files of one kind: whole ones, and the commands that read one under its name. A command that writes does so to `out.*`."""

    name: str
    file: str
    whole: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]


@dataclass
class Outcome:
    """What came of all cases."""

    codes: Counter[tuple[str, int]] = field(default_factory=Counter)
    slow: list[str] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)

    def run(self, name: str, command: Sequence[str], source: str = "") -> None:
        """One case in the folder that this process is in."""
        for left in Path().glob("out.*"):
            left.unlink()
        said = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said), limited():
            code = cli.main(list(command))
        told = said.getvalue()
        case = f"autoplan {' '.join(map(ascii, command))}\n{told[-600:]}\n{source[:3000]}"
        if "_SlowError" in told or (code == 3 and "MemoryError" in told):
            self.slow.append(case)
            return
        self.codes[name, code] += 1
        problem = complaint(code, told)
        if problem:
            self.misses.append(f"{problem}: {case}")


def complaint(code: int, told: str) -> str:
    """What is wrong with the end of a case; "" when nothing is."""
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if "Traceback" in told:
        return "a traceback"
    if (
        code and not re.search(r"(^|\n)error: [^\n]+\n(hint: [^\n]+\n)?$", told) and "─ Error ─" not in told
    ):  # of the parser of arguments
        return "no sentence"
    if drafts := [path.name for path in Path().iterdir() if path.name.startswith(".")]:
        return f"a draft is left: {drafts[0]}"
    for path in Path().glob("out.*"):
        if code:
            return f"{path} was written by a command that failed"
        if path.suffix == ".html" and not path.read_text(encoding="utf-8").rstrip().endswith("</html>"):
            return f"{path} is not whole"
    return ""


class _SlowError(Exception):
    """A case took longer than LIMIT."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise _SlowError

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def kinds(plans: Sequence[Plan]) -> tuple[Kind, ...]:
    """The four kinds of files, of these plans."""
    texts = tuple(dump_plan(plan) for plan in plans)
    reading = [
        ("report", "p.yaml", "-o", "out.html"),
        ("report", "p.yaml", "--format", "terminal"),
        ("report", "p.yaml", "--format", "csv"),
        ("report", "p.yaml", "--format", "trace"),
        ("compare", "p.yaml", "whole.yaml", "-o", "out.html"),
        ("compare", "whole.yaml", "p.yaml", "--json"),
        ("estimate", "p.yaml", "--model", MODEL, "-o", "out.yaml"),
        *(("export", "p.yaml", "--to", to, "-o", "out.txt") for to in TARGETS),
    ]
    hardware = tuple(path.read_text(encoding="utf-8") for path in sorted((ROOT / "hwprofiles").glob("*.yaml"))[:6])
    machine = [("hardware", "./h.yaml"), ("hardware", "./h.yaml", "--json")]
    planning = ("plan", MODEL, "--gpus", "2", "--hardware", "./h.yaml", "-o", "out.yaml", "--report", "out.html")
    asked = ("--model", MODEL, "--gpus", "8", "--global-batch", "64", "-o", "out.yaml")
    others = {"torchtitan-toml": "job.toml", "megatron": "args.sh", "accelerate": "acc.yaml"}
    return (
        Kind("plan", "p.yaml", texts, tuple(reading)),
        Kind("hardware", "h.yaml", hardware, (*machine * 4, planning)),
        *(
            Kind(to, file, tuple(export(plan, to).text for plan in plans), (("estimate", "--from", file, *asked),))
            for to, file in others.items()
        ),
        Kind("model config", "config.json", tuple(json.dumps(c, indent=1) for c in CONFIGS), (("inspect", "config.json"),)),
    )


LINES = "command line"
SHARES = {"plan": 0.5, "hardware": 0.24, "torchtitan-toml": 0.06, "megatron": 0.06, "accelerate": 0.04, "model config": 0.1}


def fuzz(
    plans: Sequence[Plan],
    files: int,
    lines: int,
    seed: int = 0,
    each: int = 1,
    only: str = "",
    tell: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """So many damaged files, each read by some commands, and command lines, in the folder that this process is in."""
    outcome = Outcome()
    Path("whole.yaml").write_text(dump_plan(plans[0]), encoding="utf-8")
    for kind in kinds(plans):
        if only not in ("", kind.name):
            continue
        chance, started = random.Random(f"{seed} {kind.name}"), time.monotonic()
        for _ in range(round(files * SHARES[kind.name])):
            text = damaged(chance.choice(kind.whole), chance)
            Path(kind.file).write_text(text, encoding="utf-8")
            for command in chance.sample(kind.commands, min(each, len(kind.commands))):
                outcome.run(kind.name, command, text)
        tell(f"{kind.name}: {time.monotonic() - started:.0f} s")
    chance = random.Random(f"{seed} {LINES}")
    for _ in range(lines if only in ("", LINES) else 0):
        first = chance.choice(COMMANDS if chance.random() < 0.8 else WORDS)
        outcome.run(LINES, [first, *(chance.choice(WORDS) for _ in range(chance.randrange(6)))])
    return outcome


@contextlib.contextmanager
def captured_once() -> Iterator[None]:
    """The graph of MODEL is captured once by number format: it is not what is damaged."""
    capture, known = api.inspect, {}

    def inspect(model: Any, *, compute_dtype: str = "bfloat16", **kwargs: Any) -> Any:
        spec = model if isinstance(model, str) else model.spec
        if "gpt.py" not in spec:
            return capture(model, compute_dtype=compute_dtype, **kwargs)
        if compute_dtype not in known:
            known[compute_dtype] = capture(model, compute_dtype=compute_dtype, **kwargs)
        return known[compute_dtype]

    api.inspect = inspect  # type: ignore[assignment]
    try:
        yield
    finally:
        api.inspect = capture


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, number in (("files", 5000), ("lines", 500), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--only", default="", choices=(*SHARES, LINES), metavar="KIND", help=", ".join((*SHARES, LINES)))
    asked = parser.parse_args()
    from tests.report.plans import llama, piped

    plans = [llama(), piped(), piped("interleaved-1f1b", chunks=2), piped("gpipe", 2, batch=8)]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with tempfile.TemporaryDirectory() as folder, captured_once():
        os.chdir(folder)
        outcome = fuzz(plans, asked.files, asked.lines, asked.seed, only=asked.only, tell=partial(print, flush=True))
        os.chdir(ROOT)
    for (name, code), number in sorted(outcome.codes.items()):
        print(f"{name}: {number} ended with {code}")
    print(f"{len(outcome.slow)} took longer than {LIMIT} s or more than {MEMORY / 2**30:.0f} GiB")
    print(f"{len(outcome.misses)} misses in {sum(outcome.codes.values())} cases")
    for case in (*outcome.misses[:10], *outcome.slow[:10]):
        print(f"\n{case}")
    return 1 if outcome.misses else 0


if __name__ == "__main__":
    sys.exit(main())
