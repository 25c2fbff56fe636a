"""How a layer is placed: the mesh, the layouts of tensors over its tensor-parallel axis, and one layer's strategy.

Words. *axis* is of a mesh, *dim* of a tensor. On the `tp` axis every tensor has a `Layout`: the placement of its value
and that of its gradient, which need not be the same. Four pairs occur, and no others:

    REPLICATE    value Replicate, gradient Replicate
    GATHERED     value Replicate, gradient Partial      the input of a column-parallel linear
    PARTIAL      value Partial,   gradient Replicate    the output of a row-parallel linear
    shard(d)     value Shard(d),  gradient Shard(d)

A `Border` redistributes one tensor where it passes a module's border; the collectives that this costs are
(value forward, gradient backward):

    REPLICATE -> GATHERED   -               all_reduce
    REPLICATE -> shard      - (slice)       all_gather
    shard -> REPLICATE      all_gather      - (slice)
    shard -> GATHERED       all_gather      reduce_scatter
    PARTIAL -> REPLICATE    all_reduce      -
    PARTIAL -> GATHERED     all_reduce      all_reduce
    PARTIAL -> shard        reduce_scatter  all_gather

On the `cp` axis nothing is chosen but its kind: activations are cut along the sequence, parameters are whole (`cost.context`).
Attention brings the parts of a sequence together in one of two ways (`CpKind`): "ulysses" exchanges them for heads
(`apply.context_parallel`), "ring" passes keys and values round (`apply.ring`).

`ep` is no axis of its own: it folds into the three that share a batch, `dp_shard x cp x tp = efsdp x ep`. Everywhere else these
axes mean what they mean; the experts of a layer (`Experts`) are dealt over the `ep` innermost of their devices, and FSDP cuts
each of them over the `efsdp` groups that hold the same ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

from autoplan.errors import UsageError

Recompute = Literal["none", "selective", "full"]
Zero = Literal[1, 2, 3]
Kind = Literal["replicate", "gathered", "partial", "shard"]
CpKind = Literal["ulysses", "ring"]

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""The axes of a mesh, outermost first."""

CP_KINDS: tuple[CpKind, ...] = get_args(CpKind)

DEGREES = (*AXES, "ep")
"""What a mesh is told by: the axes, and the one that folds into them."""


class Within(NamedTuple):
    """The axes whose devices share the work of one micro-batch on one stage."""

    tp: int = 1
    cp: int = 1
    ep: int = 1
    """Over how many devices experts are dealt: those of the two, and of dp_shard."""
    cp_kind: CpKind = "ulysses"

    @property
    def size(self) -> int:
        return self.tp * self.cp

    def __str__(self) -> str:
        axes = ((_cp_name(self.cp_kind), self.cp), ("tp", self.tp), ("ep", self.ep))
        return " x ".join(f"{axis} {size}" for axis, size in axes if size > 1) or "1 device"


def _cp_name(kind: CpKind) -> str:
    return "cp" if kind == "ulysses" else f"{kind} cp"


@dataclass(frozen=True, slots=True, order=True)
class Mesh:
    """Devices by axis, outermost first: neighbours in `tp` are neighbours in the machine."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    """Devices over which experts are dealt, of dp_shard x cp x tp."""
    cp_kind: CpKind = "ulysses"
    """How attention brings the parts of a sequence together; "ulysses" where cp is 1."""

    @property
    def dp(self) -> int:
        """Over how many groups of devices the batch is split."""
        return self.dp_replicate * self.dp_shard

    @property
    def within(self) -> Within:
        return Within(self.tp, self.cp, self.ep, self.cp_kind)

    @property
    def shards(self) -> int:
        """Into how many parts FSDP cuts what tp has left: over cp too, for its devices hold the same parameters."""
        return self.dp_shard * self.cp

    @property
    def efsdp(self) -> int:
        """Groups of devices that hold the same experts: into how many parts FSDP cuts each of these."""
        return self.shards * self.tp // self.ep

    @property
    def size(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    def __str__(self) -> str:
        names = {"cp": _cp_name(self.cp_kind)}
        axes = [f"{names.get(axis, axis)} {getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        return (" x ".join(axes) or "1 device") + (f", ep {self.ep}" if self.ep > 1 else "")


def expert_cut(shape: Sequence[int], efsdp: int) -> int:
    """The dim along which FSDP cuts one device's experts, a parameter `[experts, ...]`: the experts where there are enough, else
    the first that divides (FSDP cuts no other dim unevenly)."""
    if shape[0] >= efsdp:
        return 0
    return next((dim for dim, size in enumerate(shape) if dim and size % efsdp == 0), 0)


def key_copies(key_heads: int, cp: int) -> int:
    """How often a head of keys, which several queries share, is sent so that each of `cp` devices gets the one it needs."""
    return cp // key_heads if key_heads and cp % key_heads == 0 else 1


class Layout(NamedTuple):
    """Placement of a tensor's value and gradient over the `tp` axis. See the module's table.

    A tuple rather than a dataclass: the search hashes and compares millions of them.
    """

    kind: Kind
    dim: int = -1
    """The sharded dim (never negative for `shard`)."""
    blocks: int = 1
    """For a packed tensor (q, k and v in one): the dim is `blocks` equal parts, and every device holds its share of each."""

    @property
    def sharded(self) -> bool:
        return self.kind == "shard"

    def __str__(self) -> str:
        if self.kind == "shard":
            return f"Shard({self.dim})" if self.blocks == 1 else f"Shard({self.dim}, blocks={self.blocks})"
        return {"replicate": "Replicate", "gathered": "Replicate|Partial", "partial": "Partial"}[self.kind]


REPLICATE = Layout("replicate")
GATHERED = Layout("gathered")
PARTIAL = Layout("partial")


def shard(dim: int, blocks: int = 1) -> Layout:
    """`Shard(dim)`, of value and gradient."""
    return Layout("shard", dim, blocks)


_SHARD = re.compile(r"^Shard\((\d+)(?:, blocks=(\d+))?\)$")


def parse_layout(text: str) -> Layout:
    """The layout that `str(layout)` wrote. Raises `UsageError` on anything else."""
    for layout in (REPLICATE, GATHERED, PARTIAL):
        if text == str(layout):
            return layout
    match = _SHARD.match(text)
    if match is None:
        raise UsageError(
            f"'{text}' is no layout.", "Write Replicate, Replicate|Partial, Partial, Shard(d) or Shard(d, blocks=k)."
        )
    return shard(int(match.group(1)), int(match.group(2) or 1))


@dataclass(frozen=True, slots=True, order=True)
class Border:
    """A redistribution where one tensor passes the border of `module` (a name relative to the layer; "" is the layer itself)."""

    module: str
    side: Literal["in", "out"]
    leaf: str
    """Which argument or output: "0", "mask", "1.0"; several joined by "," when one tensor is passed several times."""
    source: Layout
    target: Layout


@dataclass(frozen=True, slots=True, order=True)
class Experts:
    """The module of a layer that holds experts in parameters `[experts, ...]` and runs all of them.

    It is called in one of two ways, which its devices' tokens pass through (`apply.expert_parallel`):

        chosen   (rows [tokens, hidden], choice [tokens, k] of experts, weights [tokens, k]) -> [tokens, hidden]
        sorted   (rows [tokens * k, hidden] in the order of their experts, counts [experts]) -> [tokens * k, hidden]
    """

    module: str
    """Relative to the layer."""
    form: Literal["chosen", "sorted"]
    number: int

    def holds(self, name: str) -> bool:
        """Whether it is the module, or the parameter is its."""
        return name == self.module or name.startswith(f"{self.module}.")


@dataclass(frozen=True)
class Sharding:
    """How one layer is spread over the `tp` axis: the layouts of its parameters and its redistributions.

    Parameters that are not named are replicated. GATHERED on a parameter means replicated with a Partial gradient
    that must be all-reduced (a norm's weight under sequence parallelism).
    """

    parameters: tuple[tuple[str, Layout], ...] = ()
    borders: tuple[Border, ...] = ()
    stream: Layout = REPLICATE
    """Layout of the activations that enter and leave the layer's own border: `shard(1)` under sequence parallelism."""
    experts: tuple[Experts, ...] = ()
    """What is dealt over `ep`; nothing where that is 1."""

    def layout(self, parameter: str) -> Layout:
        return self._layouts.get(parameter, REPLICATE)

    @cached_property
    def _layouts(self) -> dict[str, Layout]:
        return dict(self.parameters)

    @cached_property
    def modules(self) -> frozenset[str]:
        """Modules at whose borders something is redistributed."""
        return frozenset(border.module for border in self.borders)


UNSHARDED = Sharding()


@dataclass(frozen=True)
class Strategy:
    """One way to place and run one layer.

    `recompute` says what of a layer runs again in the backward pass, so that its results need not be kept:

        none        nothing
        selective   all but matrix products, attention kernels and collectives, whose results are kept with the layer's inputs
        full        the whole forward pass; the inputs alone are kept

    `zero` says what FSDP keeps whole, and how often it sends; where `dp_shard x cp` is 1 it casts and copies them:

        3   parameters are gathered for the forward pass, freed, and gathered again for the backward pass
        2   ... and stay gathered from the forward pass until the backward pass of the same micro-batch has used them
        1   parameters are gathered once a step and stay; gradients are kept whole and reduced once, in the last micro-batch

    Under 3 and 2 gradients are reduced and scattered in every micro-batch.
    """

    sharding: Sharding = UNSHARDED
    recompute: Recompute = "none"
    zero: Zero = 3
