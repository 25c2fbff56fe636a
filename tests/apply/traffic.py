"""Counts the collectives that run. (`CommDebugMode` does too, but its module hooks make views of outputs and lose their way.)"""

from __future__ import annotations

from collections import Counter

from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

COPIES = {"fsdp::split_with_sizes_copy": "unpack", "fsdp::chunk_cat": "pack", "aten::copy_": "copy"}
KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")


class Traffic(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        space, _, name = func._schema.name.partition("::")
        if "c10d" in space:
            for kind in KINDS:
                self.counts[kind] += kind.replace("_", "") in name.replace("_", "")
        return func(*args, **(kwargs or {}))

    @property
    def found(self):
        return dict(+self.counts)


class Copies(TorchDispatchMode):
    """Elements that FSDP copies: of what it has gathered ("unpack"), and into what it reduces ("pack"). On one rank alone it uses
    "copy" for what it would gather and for what it would receive; gloo does too, for other things."""

    def __init__(self):
        super().__init__()
        self.elements = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        kind = COPIES.get(func._schema.name)
        if kind:
            out = (kwargs or {}).get("out", args[0])
            self.elements[kind] += sum(t.numel() for t in (out if isinstance(out, (list, tuple)) else [out]))
        return func(*args, **(kwargs or {}))
