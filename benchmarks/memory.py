"""Bytes of the fullest rank of a published run.

    bytes of stage s = states + dummies + flight (layers kept + embedding) + passing + gathered + moment

`states` are a parameter's bytes under the framework's ZeRO, `kept` is what a layer keeps of one micro-batch (benchmarks.kept),
`flight` the micro-batches in flight in the stage, `passing` what stages keep of what they pass on (`Software.all_buffers`),
`gathered` what FSDP has unsharded (two layers' parameters, one's gradients before and in the reduction, the embedding and head),
`moment` the largest of: a layer's backward pass with what it recomputes; the loss. An allocator that has no room to give back
keeps blocks of both, as their sizes differ (`Software.reserves`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from autoplan.cost.layer import LayerCost
from autoplan.graph import DTYPE_BYTES
from autoplan.schedule import in_flight
from autoplan.units import Bytes
from autoplan.workload import OPTIMIZER_STATES
from benchmarks.kept import Tensors

if TYPE_CHECKING:
    from benchmarks.arrangement import Arranged, Arrangement


@dataclass(frozen=True, slots=True)
class Stage:
    """What one pipeline rank holds. Bytes."""

    states: Bytes
    activations: Bytes
    layer_moment: Bytes
    loss_moment: Bytes

    def total(self, together: bool) -> Bytes:
        moment = self.layer_moment + self.loss_moment if together else max(self.layer_moment, self.loss_moment)
        return self.states + self.activations + moment


def stages(arranged: Arranged, at: Arrangement) -> list[Stage]:
    """Of every pipeline rank. Raises `UsageError` like `Arranged.price`."""
    own, load = arranged.software, arranged.costs.workload
    m = arranged.micro_batches(at)
    counts, virtual = at.dealt, len(at.dealt)
    compute, reduce = DTYPE_BYTES[load.compute_dtype], DTYPE_BYTES[load.reduce_dtype]
    block, embed, head = arranged.parts(at)
    temporary, of_embed, of_head = arranged.temporaries(at)
    kept, moment = _layer(arranged, at, block, temporary)
    first_kept = _first(arranged, at) if at.plain else 0.0
    loss = _loss(arranged, at, head.saved + of_head)
    per_parameter, per_expert = _per_parameter(arranged, at, at.dp), _per_parameter(arranged, at, at.dp * at.tp // at.ep)
    table = compute * numel(embed) if own.local_table else of_embed
    found = []
    for s in range(at.pp):
        mine = [k for k in range(virtual) if k % at.pp == s]
        layers, plain = sum(counts[k] for k in mine), sum(at.plains[k] for k in mine)
        first, last = 0 in mine, virtual - 1 in mine
        held = arranged.held(at, layers, embed if first else None, head if last else None, plain)
        flight = in_flight(at.schedule, s, at.pp, min(m, 4 * at.pp), at.chunks) / at.chunks
        dealt = (layers - plain) * experts(block)
        buffers = own.dummies * (dummies(block) + (numel(head) if last else 0.0))
        states = (held - dealt) * per_parameter + dealt * per_expert + buffers
        if at.zero == 3:
            outer = arranged.held(at, 0, embed if first else None, head if last else None)
            states += 2 * compute * numel(block) + (compute + reduce) * numel(block) + compute * outer
        found.append(
            Stage(
                states,
                flight * ((layers - plain) * kept + plain * first_kept + (embed.saved if first else 0.0))
                + (sum(_passing(arranged, at, k, m, flight) for k in mine) if own.all_buffers and at.pp > 1 else 0.0),
                max(moment, table if first else 0.0),
                loss if last else 0.0,
            )
        )
    return found


def _passing(arranged: Arranged, at: Arrangement, k: int, m: int, flight: float) -> Bytes:
    """What virtual stage `k` receives and returns of all `m` micro-batches. What those in flight received counts as kept."""
    if k == len(at.dealt) - 1:
        logits = _logits(arranged, at) * DTYPE_BYTES[arranged.costs.workload.compute_dtype]
        return (m - flight) * arranged.passed(at) + m * logits
    return ((m - flight if k else 0.0) + 2 * m) * arranged.passed(at)  # activations; gradients and results


def memory(arranged: Arranged, at: Arrangement) -> Bytes:
    """Bytes of the fullest rank."""
    return max(stage.total(arranged.software.reserves) for stage in stages(arranged, at))


def _per_parameter(arranged: Arranged, at: Arrangement, dp: int) -> Bytes:
    own, load = arranged.software, arranged.costs.workload
    dtypes = (2 + OPTIMIZER_STATES[load.optimizer]) * DTYPE_BYTES[load.param_dtype]
    used = DTYPE_BYTES[load.compute_dtype] + DTYPE_BYTES[load.reduce_dtype] if at.zero == 1 else 0
    resident, sharded = (own.resident, own.sharded) if own.resident or own.sharded else (float(used), float(dtypes))
    if at.zero == 3:
        return (resident + sharded) / dp
    return resident + sharded / (dp if at.zero else 1)


def _layer(arranged: Arranged, at: Arrangement, block: LayerCost, temporary: Bytes) -> tuple[Bytes, Bytes]:
    """(bytes that a layer keeps of a micro-batch, bytes besides while its backward pass runs)."""
    own = arranged.software
    tensors = Tensors(arranged.costs.layer_model(0, at.tp, at.samples, ep=at.ep), at.block)
    saved = block.saved - (tensors.fused() if own.fuses else 0.0) - (tensors.halved() if at.float8 else 0.0)
    saved -= arranged.gathered(at) if own.gathers_again and at.tp > 1 else 0.0
    if arranged.recomputed is None:
        return saved, temporary
    kept = min(saved, tensors.kept(arranged.recomputed, at.policy))
    return at.again * kept + (1 - at.again) * saved, temporary + block.saved - kept


def _first(arranged: Arranged, at: Arrangement) -> Bytes:
    """What a layer without experts keeps of a micro-batch."""
    assert arranged.plain is not None
    place = at.without_experts
    return _layer(arranged.plain, place, arranged.plain.parts(place)[0], 0.0)[0]


def _loss(arranged: Arranged, at: Arrangement, unfused: Bytes) -> Bytes:
    """Bytes of the final norm, the head and the loss at their fullest moment: `unfused` where nothing is told of it."""
    own = arranged.software
    per_logit = own.logits_tp if own.logits_tp and at.tp > 1 else own.logits
    if not per_logit:
        return unfused
    return _logits(arranged, at) * per_logit


def _logits(arranged: Arranged, at: Arrangement) -> float:
    """How many a rank has of one micro-batch, cut by tp."""
    body = arranged.costs.graph.outer
    logits = next(body.values[op.inputs[0]] for op in reversed(body.ops) if op.kind == "cross_entropy")
    return logits.bytes_at(at.micro_batch) / DTYPE_BYTES[logits.dtype] / at.tp


@lru_cache(maxsize=4096)
def numel(cost: LayerCost) -> float:
    """Parameters on one rank, cut by tp."""
    return float(sum(p.numel(1) for p in cost.parameters))


@lru_cache(maxsize=4096)
def experts(cost: LayerCost) -> float:
    """Of these, those of experts that are dealt over ep."""
    return float(sum(p.numel(1) for p in cost.parameters if p.dealt))


@lru_cache(maxsize=4096)
def dummies(cost: LayerCost) -> float:
    """Of a layer's parameters, those that need a buffer of their own: experts have one for all, being of one shape."""
    return numel(cost) - sum(p.numel(1) * (1 - 1 / p.shape[0]) for p in cost.parameters if p.dealt)
