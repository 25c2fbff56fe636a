"""Processor seconds and memory of capturing the largest models, each in a process of its own.

python -m benchmarks.capture_speed      exit code 1 when one takes over 2 CPU s or 600 MB
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

MODELS = ("llama-3:405B:8192", "deepseek-v3:full:4096", "mixtral:full:4096")
MOST_SECONDS, MOST_BYTES = 2.0, 600e6


def measure(name: str) -> dict[str, float | str]:
    """Captures one model here. Imports and the making of the model on `meta` are not part of the seconds."""
    from autoplan.capture.fake import build_on_meta
    from autoplan.capture.huggingface import example_inputs
    from autoplan.capture.model import capture_module
    from tests.models import ZOO

    family, size, length = name.split(":")
    loaded = ZOO[family].load(size)
    module = build_on_meta(loaded.build)
    config = loaded.build.args[0]  # type: ignore[attr-defined]
    inputs = lambda batch: example_inputs(config, name, int(length), batch)  # noqa: E731
    start = time.process_time()
    graph = capture_module(module, inputs, name=name)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform != "darwin" else 1)
    return {
        "model": name,
        "parameters": graph.parameters / 1e9,
        "blocks": len(graph.blocks),
        "cpu_seconds": round(seconds, 2),
        "peak_mb": round(peak / 1e6),
    }


def main() -> int:
    worst = 0
    for name in MODELS:
        out = subprocess.run([sys.executable, "-m", "benchmarks.capture_speed", name], capture_output=True, text=True, check=True)
        found = json.loads(out.stdout)
        print(json.dumps(found), flush=True)
        if found["cpu_seconds"] > MOST_SECONDS or found["peak_mb"] * 1e6 > MOST_BYTES:
            worst = 1
    return worst


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        sys.exit(main())
