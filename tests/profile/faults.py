"""What ranks run in tests of a real session, in processes of their own: a short suite, and a rank that dies in it."""

from __future__ import annotations

import atexit
import os
import signal
from pathlib import Path

from autoplan.measurement import Operation
from autoplan.profile import measure
from autoplan.profile.torch_bench import TorchBench

SHORT = [
    *(Operation(kind, 4.0, "float32", (20,)) for kind in ("launch", "dispatch")),
    *(Operation("matmul", 2.0 * n**3, "float32", (n, n, n), layout) for n, layout in ((64, "nn"), (128, "nt"), (160, "tn"))),
    Operation("attention", 4.0 * 2 * 64 * 64**2 / 2, "float32", (2, 64, 64)),
    Operation("attention_backward", 10.0 * 2 * 64 * 64**2 / 2, "float32", (2, 64, 64)),
    *(Operation(kind, 2.0**18, "float32") for kind in ("add", "gelu", "layer_norm", "softmax", "sum", "optimizer")),
    *(
        Operation(kind, size, "float32", (), "", 2)
        for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")
        for size in (4096.0, 65536.0)
    ),
    Operation("arrival", 4096.0, "float32", (2, 64), "", 2),
    *(Operation(kind, 65536.0, "float32", (2, 64), "", 2) for kind in ("products", "reduction", "together")),
]  # fmt: skip


def run(output: str, dies_after: int | None) -> None:
    """A session of SHORT; rank 1 kills itself after so many operations."""
    measure.suite = lambda machine, dtypes: SHORT  # type: ignore[assignment]
    done = 0
    times = TorchBench.times

    def dying(self: TorchBench, operation: Operation, seconds: float) -> object:
        nonlocal done
        if self.rank == 1 and done == dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        return times(self, operation, seconds)

    TorchBench.times = dying  # type: ignore[assignment,method-assign]
    from autoplan.profile import session

    session.NOISY = session.TOO_NOISY = 1e9  # tests run on busy machines
    found = measure.measure(Path(output), 1.0)
    if os.environ["RANK"] == "0":
        Path(output).write_text("\n".join(str(m.operation) for m in found.measurements))
        measure.finished(Path(output))


def aborts_at_exit(folder: str) -> None:
    """The work is done, and an end of the interpreter would abort, as those of C++ threads can."""
    atexit.register(os.abort)
    (Path(folder) / os.environ["RANK"]).write_text(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}\n")
    os.write(1, b"a library's greeting")
    print("done", end="")


def raises() -> None:
    raise RuntimeError("shapes differ\n  here and\nthere")
