"""What a training framework adds to or takes from a machine: the constants of frameworks.yaml, all that is ever fitted.

Their neutral values are what the planner assumes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from autoplan.units import Bytes, Seconds

FRAMEWORKS = Path(__file__).with_name("frameworks.yaml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """A framework's own numbers, beside the machine's."""

    compute: float = 1.0
    """All kernels take so many times longer."""
    attention: float = 1.0
    """Attention kernels besides."""
    elementwise: float = 1.0
    """All other kernels but matrix products besides: below 1 where they are fused."""
    norm: float = 1.0
    """Norms besides: above 1 where they are not one kernel."""
    float8: float = 1.0
    """Products in fp8 reach so much of the fp8 peak, casts counted unless `casts`, for what those in bf16 that take as long reach
    of theirs."""
    float8_backward: float = 1.0
    """Those of the backward pass take so many times longer besides: they add up in float32 more often."""
    tp_exposed: float = 1.0
    """Fraction of the tp collectives that computation does not hide."""
    pieces: bool = False
    """Asynchronous tp hides a collective under the products next to it, each cut into one for each rank's rows
    (benchmarks.asynchronous), and adds up what the ranks sent in a kernel of its own; else under all products of the pass."""
    copies: bool = False
    """FSDP puts gathered parameters where they belong, and gradients into what is reduced, in kernels beside the products;
    so does DTensor with activations that tp gathers or scatters along another dim than the first."""
    casts: bool = False
    """Operands of products in fp8 are scaled tensor by tensor, in kernels beside the products; what tp gathers is sent in fp8."""
    ring_waits: bool = False
    """Context parallelism sends keys and values of every head, their gradients in float32, and waits for them (compiled)."""
    dp_exposed: float = 0.0
    """Fraction of gradient reductions (and ZeRO's gathers) that even a long backward pass does not hide."""
    hop_exposed: float = 0.0
    """Fraction of passing activations on for which both stages wait, rather than compute on."""
    network: float = 1.0
    """Collectives that leave the node take so many times longer."""
    piped_reduction: float = 1.0
    """All-reduces of gradients that leave the node take so many times longer besides, where there is a pipeline."""
    one_adapter: float = 0.0
    """A reduction of several, not all, ranks of a node leaves it through one adapter for all of them and takes so many times what
    that needs; 0: through each rank's own. (A guess at the cause: NCCL's rings come in and go out by the same adapter, which is
    beside one of the ranks only; since 2.12 it goes there over NVLink.)"""
    gradients: Bytes = 0.0
    """Bytes of a parameter's gradient as it is added up and reduced; 0: of the workload's reduce dtype."""
    layer: Seconds = 0.0
    """Least time of the host for one layer and micro-batch, forward and backward; a third of it is the forward pass's."""
    layer_tp: Seconds = 0.0
    """Further host time of a layer under tp."""
    layer_hop: Seconds = 0.0
    """Least time of a layer under tp when the stages lie on several nodes, and `layer_hop_tp` more for every tp rank."""
    layer_hop_tp: Seconds = 0.0
    optimizer: float = 1.0
    """The optimizer moves so many times the bytes: copies and checks of mixed precision."""
    step: Seconds = 0.0
    """Host time of every step."""
    zero_rank: Seconds = 0.0
    """Host time of every step for each other rank that holds a part of the states (nanotron packs and unpacks rank by rank)."""
    whole: bool = False
    """A recomputed layer runs its whole forward again (PyTorch's checkpoint stops at the last operation that saves something)."""
    gathers_again: bool = False
    """Under sequence parallelism the backward pass gathers a linear's input again instead of keeping it (Megatron)."""
    resident: Bytes = 0.0
    """Bytes kept for a parameter on every rank that holds it, and `sharded` ones cut by dp; 0 and 0: `Workload`'s dtypes,
    all of them cut, and under ZeRO-1 what FSDP has gathered and not reduced yet on every rank."""
    sharded: Bytes = 0.0
    local_table: bool = False
    """The gradient of an embedding that tp cuts is made of the rank's own part (DTensor makes the whole table's)."""
    fuses: bool = False
    """A pointwise result that only other pointwise operations' backward passes read is made again in their kernel."""
    dummies: Bytes = 0.0
    """Bytes for every parameter of one layer and of the head in buffers that stand for their gradients (TransformerEngine)."""
    all_buffers: bool = False
    """A pipeline's stage has buffers for what it receives of every micro-batch, and keeps every output until the step is over
    (`torch.distributed.pipelining` in 2024)."""
    compiled_loss: bool = False
    """The loss is compiled: one kernel each way."""
    logits: Bytes = 0.0
    """Most bytes that the loss holds for a logit; 0: what PyTorch's cross entropy does."""
    logits_tp: Bytes = 0.0
    """The same where tp cuts them; 0: as many."""
    reserves: bool = False
    """The published peak is what the allocator has reserved: blocks that a layer's moment left do not fit the loss's."""
    allocations: bool = False
    """The published peak is what rank 0's allocator has reserved, counted allocation by allocation (benchmarks.nanotron)."""
    room: float = 0.0
    """GiB of the device that PyTorch's allocator gets beside contexts and NCCL's buffers; 0: all but the profile's `reserved`."""
    ahead: float = 0.0
    """Where allocations are counted, the layers (forward and backward) that the host launches before it waits for the device."""
    two_ahead: float = 0.0
    """The same where there are two stages."""
    two_stages: float = 0.0
    """What part of a layer's least time is the host's there."""


NEUTRAL = Software()


def frameworks(path: Path = FRAMEWORKS) -> dict[str, Software]:
    """The constants of every framework; keys that are no constants ("why") are for the reader."""
    names = Software.__dataclass_fields__
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    found = {name: Software(**{k: float(v) for k, v in entry.items() if k in names}) for name, entry in document.items()}
    return {**found, "nanotron-slow": found["nanotron"]}
