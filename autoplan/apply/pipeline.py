"""A step of a pipeline, on the schedules of `torch.distributed.pipelining`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import ScheduleInterleaved1F1B

from autoplan.apply import stages, zero
from autoplan.apply._torch import Any1F1B, AnyGPipe, AnyZeroBubble, LeanStage, end_step, gathered_ids
from autoplan.apply.local_ops import local_ops
from autoplan.apply.outside import Finished
from autoplan.apply.program import Program
from autoplan.apply.runner import Doubles, Runner, arrive, leave, pass_on
from autoplan.apply.split import Later, Product, splitting
from autoplan.apply.stages import Unseen
from autoplan.errors import UsageError
from autoplan.plan import Plan

Trace = Callable[[dict[str, Any]], Program]
LossOf = Callable[[dict[str, Any], dict[str, Any]], torch.Tensor]


class Chunk(nn.Module):
    """A virtual stage as the schedule sees it: local tensors in, local tensors out, one micro-batch after another."""

    def __init__(self, pipeline: Pipeline, number: int) -> None:
        super().__init__()
        self.number = number
        self._pipeline = pipeline
        self._next = 0

    def start(self) -> None:
        self._next = 0

    def forward(self, *received: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self._next += 1
        return self._pipeline.forward(self.number, self._next - 1, received)

    @contextmanager
    def backward_pass(self, micro_batch: int) -> Iterator[None]:
        """Around the backward pass of a micro-batch, of which `weights` are a part of their own if the schedule says so."""
        self._pipeline.before_backward(self.number, micro_batch)
        with self._pipeline.later or nullcontext():
            yield

    def weights(self) -> Callable[[], None]:
        """What is left to do of the backward pass that has just run, whose turn comes in the same order."""
        later, self._pipeline.later = self._pipeline.later, Later()
        assert later is not None
        return lambda: self._pipeline.weights(self.number, later.products)


class Pipeline:
    """One rank's part of a pipeline."""

    def __init__(
        self, plan: Plan, mesh: DeviceMesh, spread: DeviceMesh | None, device: torch.device, trace: Trace, example: dict[str, Any]
    ) -> None:
        assert plan.pipeline is not None
        self.plan = plan
        self.device = device
        self.group = mesh.get_group("pp")
        self.rank: int = mesh.get_local_rank("pp")
        self.tp = spread
        self._trace = trace
        self.program = trace(example)
        self._programs = {(_shapes(example), True): self.program}
        """By the shapes of a batch, and whether it is for training."""
        self._schedules: dict[tuple[Program, int], tuple[Any, list[Chunk]]] = {}
        self._loss_of: LossOf
        self.root: stages.Rank
        self._units: dict[int, list[zero.Unit]]
        self._doubles: Doubles
        self._micro_batches: list[dict[str, Any]] = []
        self._losses: list[torch.Tensor] = []
        self._error: BaseException | None = None
        self._left = 0
        self.later = Later() if plan.pipeline.schedule == "zero-bubble" else None
        """What gradients of weights are left for."""
        self._reduced: set[int] = set()

    def attach(self, root: stages.Rank, units: dict[int, list[zero.Unit]], doubles: Doubles, loss_of: LossOf) -> None:
        """What runs the stages; `root` is built with `self.run`."""
        self.root, self._units, self._doubles, self._loss_of = root, units, doubles, loss_of

    @property
    def units(self) -> list[zero.Unit]:
        return [unit for units in self._units.values() for unit in units] + [(self.root, 3)]  # type: ignore[list-item]

    def step(self, micro_batches: list[dict[str, Any]]) -> torch.Tensor:
        """All micro-batches forward and backward; returns their mean loss on the last stage, zero on the others."""
        self.program = self._program_of(micro_batches[0])
        schedule, chunks = self._schedule(self.program, len(micro_batches))
        self._micro_batches, self._losses, self._error = micro_batches, [], None
        self._left = len(micro_batches) * len(chunks)
        self._reduced.clear()
        for chunk in chunks:
            chunk.start()
        options = {"target": torch.zeros(len(micro_batches))} if chunks[-1].number == len(self.plan.stages) - 1 else {}
        if "return_outputs" in inspect.signature(schedule.step).parameters:
            options["return_outputs"] = False  # type: ignore[assignment]
        try:
            schedule.step(**options)
        except Exception:
            if self._error is not None:
                raise self._error from None  # the schedule wraps it into one that shows all inputs
            raise
        finally:
            # a layer that raised in a checkpoint leaves, before 2.13, its hooks behind for as long as its error is known
            self._micro_batches, self._error = [], None
        if self._losses:
            return torch.stack(self._losses).sum()
        return torch.zeros((), dtype=self.program.loss, device=self.device)

    @torch.no_grad()
    def evaluate(self, micro_batches: list[dict[str, Any]]) -> torch.Tensor:
        """Their mean loss, by forward passes alone; as `step`.

        A micro-batch goes through all stages of this rank before the next one: so no two ranks wait for each other, whatever
        a backend does with what nobody has asked for yet. With chunks that is slower than their schedule would be.
        """
        self.program = self._program_of(micro_batches[0], training=False)
        self._micro_batches, self._losses = micro_batches, []
        sending: list[Any] = []
        pp, last = self.plan.mesh.pp, len(self.plan.stages) - 1
        for index in range(len(micro_batches)):
            for number in stages.numbers(self.plan, self.rank):
                wires = self.program.incoming(number)
                received = tuple(torch.empty_like(wire.empty(), device=self.device, requires_grad=False) for wire in wires)
                for tensor in received:
                    dist.recv(tensor, group=self.group, group_src=(number - 1) % pp)
                made = self.forward(number, index, received)
                if number < last:
                    sending += [(dist.isend(tensor, group=self.group, group_dst=(number + 1) % pp), tensor) for tensor in made]
        for work, _ in sending:
            work.wait()
        self._micro_batches = []
        return self._total()

    def _total(self) -> torch.Tensor:
        if self._losses:
            return torch.stack(self._losses).sum()
        return torch.zeros((), dtype=self.program.loss, device=self.device)

    def forward(self, number: int, index: int, received: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        batch = self._micro_batches[index]
        try:
            output: tuple[torch.Tensor, ...] = self.root(number, received, batch, Unseen(batch))
        except Exception as error:
            self._error = error
            raise
        return output

    def before_backward(self, number: int, index: int) -> None:
        root: FSDPModule = self.root  # type: ignore[assignment]
        if self.later is not None:
            root.set_is_last_backward(False)
            zero.before_inputs(self.units)
            return
        self._left -= 1
        root.set_is_last_backward(self._left == 0)
        for other, units in self._units.items():
            if other != number:
                zero.spare(units)
        last = index == len(self._micro_batches) - 1
        zero.before_backward(self._units[number], last)
        outer = [(root, self.plan.outer_strategy.zero)]
        zero.before_backward(outer, self._left == 0)

    def weights(self, number: int, products: list[Product]) -> None:
        """Gradients of weights, each layer's reduced while those of the layer before it are computed."""
        self._left -= 1
        last, root = self._left == 0, cast(FSDPModule, self.root)
        root.set_is_last_backward(last)
        *layers, _ = units = self._units[number]
        owner = {of: i for i, (module, _) in enumerate(layers) for of in gathered_ids(module)}
        owners = [owner.get(id(product.weight), len(layers)) for product in products]
        ends = {i: position for position, i in enumerate(owners)}
        for position, i in enumerate(owners):
            products.pop(0).add()
            if ends[i] == position and i < len(layers):
                zero.after_weights([layers[i]], last, self._reduced)
        outer = (root, self.plan.outer_strategy.zero)
        rest = [unit for i, unit in enumerate(units) if i not in ends or i == len(layers)]
        zero.after_weights([*rest, outer], last, self._reduced)
        if last:
            end_step(root)

    def run(
        self, number: int, received: tuple[torch.Tensor, ...], inputs: dict[str, Any], batch: dict[str, Any]
    ) -> tuple[torch.Tensor, ...]:
        """One virtual stage's forward pass, inside those of FSDP."""
        program = self.program
        wires = program.incoming(number)
        passing = {wire.site: local for wire, local in zip(wires, received, strict=True)}
        kept = [local for wire, local in zip(wires, received, strict=True) if wire.last > number]
        versions = [local._version for local in kept]
        tensors = {wire.site: arrive(passing[wire.site], wire, self.tp) for wire in wires}
        runner = Runner(program, number, tensors, self.device, self._doubles)
        loss = None
        with splitting(self.later is not None), local_ops(self.tp), suppress(Finished), runner:
            loss = self._loss_of(inputs, batch)
        if number == len(self.plan.stages) - 1:
            assert loss is not None
            loss = loss / len(self._micro_batches)
            self._losses.append(loss.detach())
            return (torch.stack([loss]),)
        if versions != [local._version for local in kept]:
            raise UsageError(
                f"stage {number} writes into a tensor that it received and passes on.",
                "Write out of place: x = x * y, not x *= y.",
            )
        made = runner.collected
        missing = [wire for wire in program.outgoing(number) if wire.site not in made and wire.site not in passing]
        if missing:
            raise UsageError(f"the forward pass did not make a tensor {list(missing[0].shape)} that it made before.")
        return tuple(
            leave(made[wire.site], wire) if wire.site in made else pass_on(passing[wire.site])
            for wire in program.outgoing(number)
        )

    def _program_of(self, batch: dict[str, Any], training: bool = True) -> Program:
        """The program for micro-batches of this shape."""
        key = _shapes(batch), training
        if key not in self._programs:
            found = self._trace(batch)
            if found.readers != self.program.readers or found.layers != self.program.layers:
                raise UsageError(
                    "the forward pass takes another way for this batch than for the inputs given to apply.",
                    "A pipeline runs models whose layers are called in one order.",
                )
            self._programs[key] = found
        return self._programs[key]

    def _schedule(self, program: Program, count: int) -> tuple[Any, list[Chunk]]:
        if (program, count) not in self._schedules:
            chunks = [Chunk(self, number) for number in stages.numbers(self.plan, self.rank)]
            built = [self._stage(program, chunk) for chunk in chunks]
            options: dict[str, Any] = {"loss_fn": lambda output, _: output[0].sum(), "scale_grads": False}
            kind = self.plan.pipeline.schedule  # type: ignore[union-attr]
            made: Any
            if kind == "interleaved-1f1b":
                made = ScheduleInterleaved1F1B(built, count, **options)  # type: ignore[arg-type]
            elif kind == "zero-bubble":
                made = AnyZeroBubble(built, count, **options)
            elif kind == "gpipe":
                made = AnyGPipe(built[0], count, **options)
            else:
                made = Any1F1B(built[0], count, **options)
            self._schedules[program, count] = made, chunks
        return self._schedules[program, count]

    def _stage(self, program: Program, chunk: Chunk) -> LeanStage:
        last = chunk.number == len(self.plan.stages) - 1
        outputs = tuple(wire.empty() for wire in program.outgoing(chunk.number))
        loss = torch.empty(1, dtype=program.loss, device="meta", requires_grad=True)
        return LeanStage(
            chunk,
            chunk.number,
            len(self.plan.stages),
            self.device,
            input_args=tuple(wire.empty() for wire in program.incoming(chunk.number)),
            output_args=(loss,) if last else outputs,
            group=self.group,
            dw_builder=chunk.weights if self.later is not None else None,
        )


def _shapes(batch: dict[str, Any]) -> tuple[Any, ...]:
    """What decides the shapes inside the model."""
    return tuple(
        (name, tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else (name, repr(value))
        for name, value in sorted(batch.items())
    )
