"""What keeps a model from being captured, in one sentence: the module, the operation, the line, and what to do about it."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from autoplan.capture.private import DynamicOutputShapeException
from autoplan.errors import UsageError

AS_IT_IS = "Run one training step of it on the CPU to see the same; capture runs it with the example inputs."

IN_A_LIBRARY = "Correct the configuration; if the model takes other inputs, give a model.py with build_model and example_inputs."

_REMEDIES = {
    r"\.numpy\(\) is not supported": "NumPy needs values, and capture has shapes only: compute it with torch.",
    r"UnsupportedOperator|no fake impl|fake impl registered|register_fake": (
        "Say what the operator returns with torch.library.register_fake, and its gradient with register_autograd."
    ),
    r"no autograd formula": "Give the operator its gradient with torch.library.register_autograd.",
    r"data pointer|data_ptr": (
        "A kernel of its own reads memory, and capture has none: wrap it with torch.library.custom_op and register_fake."
    ),
    r"BatchedTensor|GradTrackingTensor|FunctionalTensorWrapper|torch\.func|functorch": (
        "Capture can't look into torch.func and torch.vmap: write it with operations on whole batches."
    ),
    r"SparseTensorImpl|[Ss]parse": "Sparse tensors can't be planned: make it dense, as with nn.Embedding(sparse=False).",
    r"FlexAttention": "Use torch.nn.functional.scaled_dot_product_attention, or a config with attn_implementation='sdpa'.",
    r"expected scalar type|must have the same dtype": (
        "Parameters and inputs are of the compute dtype: cast what meets them, or set compute_dtype to 'float32' in workload."
    ),
    r"heads in key and value must divide": "Make the number of attention heads a multiple of the number of key-value heads.",
    r"TorchScript": "Give the Python function or module, without torch.jit.",
    r"[Pp]rocess group": "Give the model as it is on one device, without torch.distributed: autoplan spreads it.",
    r"CUDA|NVIDIA|cuda": "Planning needs no GPU: leave the line out, or run it only if torch.cuda.is_available().",
}
"""What an error says -> what to do about it; the first one that matches."""

_NO_SHAPE = "Capture knows shapes only: use a form of fixed size, such as masking instead of selecting."


class NoBlockError(Exception):
    """What looked like layers are none: `names` run twice or never, or pass tensors past their results."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        super().__init__(", ".join(sorted(self.names)))


class TwinsDifferError(Exception):
    """Layers that look equal ran differently: `names` must be traced one by one."""

    def __init__(self, names: Iterable[str], warning: str = "") -> None:
        self.names = frozenset(names)
        self.warning = warning
        super().__init__(warning)


def remedy(error: BaseException, default: str) -> str:
    """What the user can do about an error of the model's own code."""
    text = f"{type(error).__name__}: {error}"
    return next((hint for pattern, hint in _REMEDIES.items() if re.search(pattern, text)), default)


def said(error: BaseException) -> str:
    """An error in words, on one line."""
    text = " ".join(str(error).split()).rstrip(".")
    text = text if len(text) <= 300 else f"{text[:300].rstrip()} …"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def stopped(title: str, where: str, error: BaseException) -> UsageError:
    """The sentence for an error that the model raised at `where`, "" for nowhere known."""
    at = f" {where}" if where else ""
    if isinstance(error, DynamicOutputShapeException):
        size = "makes a tensor whose size depends on the values of another"
        return UsageError(f"{title} {size}{f' in{at}' if at else ''} [{error.func}]{line_of(error)}.", _NO_SHAPE)
    line = line_of(error)
    default = IN_A_LIBRARY if "site-packages" in line else AS_IT_IS
    return UsageError(f"{title} raised while it ran{at}: {said(error)}{line}.", remedy(error, default))


def refuse(module: nn.Module, title: str) -> None:
    """Raises `UsageError` for modules that could never be captured, before an obscure error says so."""
    for name, part in module.named_modules():
        where = f"module '{name}' ({type(part).__name__})" if name else f"it ({type(part).__name__})"
        if isinstance(part, torch.jit.ScriptModule):
            raise UsageError(
                f"{title} can't be captured: {where} is compiled by TorchScript.", "Give the Python module, without torch.jit."
            )
        if type(part).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
            raise UsageError(
                f"{title} can't be trained: {where} has quantised weights.", "Give the model before it is quantised."
            )
        if any(is_lazy(tensor) for tensor in (*part._parameters.values(), *part._buffers.values())):
            raise UsageError(
                f"{title} can't be captured: {where} has a parameter without a shape.",
                "Give its size, or run the model once in build_model.",
            )


def line_of(error: BaseException, path: Path | None = None) -> str:
    """ " (file:line)": the innermost line of the user's own code in the traceback of `error`, else of a library of models."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if path is not None and Path(f.filename).resolve() == path.resolve()]
    other = [f for f in frames if "site-packages" in f.filename or not f.filename.startswith(_LIBRARY)]
    other = [f for f in other if not f.filename.startswith(_NOBODYS)]
    found = own or [f for f in other if "site-packages" not in f.filename] or other
    return f" ({found[-1].filename}:{found[-1].lineno})" if found else ""


_LIBRARY = str(Path(traceback.__file__).parent)
_NOBODYS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), "<")
"""Where no line is the user's: Python's own library, and autoplan and torch."""
