"""capture: a model -> its `Graph`. Two batch sizes recorded on fake tensors, nothing allocated, the module untouched."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autoplan.adapt import adapt
from autoplan.capture.blocks import find_blocks
from autoplan.capture.fake import build_on_meta, fake_copy, fake_inputs
from autoplan.capture.load import LoadedModel, line_of
from autoplan.capture.merge import BATCHES, merge, samples_meet
from autoplan.capture.private import DynamicOutputShapeException, FakeTensorMode
from autoplan.capture.record import NoBlockError, Options, Recorder, TwinsDifferError
from autoplan.errors import UsageError
from autoplan.graph import Graph

ExampleInputs = Callable[[int], Mapping[str, Any]]
LossFunction = Callable[[Any, Mapping[str, Any]], Tensor]


def capture(loaded: LoadedModel, *, compute_dtype: str = "bfloat16", stubs: bool = True) -> Graph:
    """The graph of the model in a user's file. `stubs=False` traces every layer, not only the different ones.

    Raises `UsageError` when the model can't be built, run or understood.
    """
    module = build_on_meta(loaded.build)
    return capture_module(
        module, loaded.example_inputs, loaded.loss_fn, name=loaded.spec, compute_dtype=compute_dtype, stubs=stubs
    )


def capture_module(
    module: nn.Module,
    example_inputs: ExampleInputs,
    loss_fn: LossFunction | None = None,
    *,
    name: str | None = None,
    compute_dtype: str = "bfloat16",
    stubs: bool = True,
    kernels: Literal["cuda", "cpu"] = "cuda",
    batches: tuple[int, int] = BATCHES,
) -> Graph:
    """The graph of a module in hand, real or on meta; it is not touched and its data are not copied.

    `kernels="cpu"` counts what this machine would run, to be compared with it.
    """
    module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    title = name or type(module).__name__
    options = Options(stubs=stubs, kernels=kernels)
    sizes: tuple[int, ...] = batches
    root, recorders = record(module, example_inputs, loss_fn, title, compute_dtype, sizes, options)
    if samples_meet(*recorders):  # then costs are quadratic in the batch, and take a third point
        sizes = (*batches, sum(batches))
        root, recorders = record(module, example_inputs, loss_fn, title, compute_dtype, sizes, options)
    return merge(title, compute_dtype, root, recorders, sizes)


def record(
    module: nn.Module,
    example_inputs: ExampleInputs,
    loss_fn: LossFunction | None,
    title: str,
    compute_dtype: str,
    batches: tuple[int, ...],
    options: Options = Options(),  # noqa: B008
) -> tuple[nn.Module, list[Recorder]]:
    """The fake copy that ran, and one recording of it for each batch size."""
    dtype = getattr(torch, compute_dtype)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    root = fake_copy(module, mode, dtype)
    if not root.training:
        root.train()
    adapt(root)
    samples = [fake_inputs(example_inputs(batch), mode, dtype) for batch in batches]
    excluded: frozenset[str] = frozenset()
    warnings: dict[str, None] = {}
    while True:
        blocks = find_blocks(root, excluded)
        try:
            recorders: list[Recorder] = []
            for inputs in samples:
                now = replace(options, compare=options.compare and not recorders)
                recorders.append(_recording(root, blocks, now, mode, inputs, loss_fn, title))
                recorders[-1].warnings.update(warnings)
            return root, recorders
        except NoBlockError as error:
            excluded |= error.names
        except TwinsDifferError as error:
            options = replace(options, alone=options.alone | error.names)
            warnings |= {error.warning: None} if error.warning else {}
        except UsageError:
            if not options.stubs:
                raise
            # perhaps the code looks for something that a block left behind, and a stub does not
            options = replace(options, stubs=False)


def _recording(
    root: nn.Module,
    blocks: Mapping[str, Hashable],
    options: Options,
    mode: FakeTensorMode,
    inputs: dict[str, Any],
    loss_fn: LossFunction | None,
    title: str,
) -> Recorder:
    recorder = Recorder(root, blocks, options)
    with mode:
        _run(recorder, inputs, loss_fn, title)
    return recorder


def _run(recorder: Recorder, inputs: dict[str, Any], loss_fn: LossFunction | None, title: str) -> None:
    try:
        recorder.run(inputs, lambda output: loss_of(output, inputs, loss_fn, title))
    except (UsageError, NoBlockError, TwinsDifferError):
        raise
    except DynamicOutputShapeException as error:
        raise UsageError(
            f"{title} makes a tensor whose size depends on the values of another ({error.func}){line_of(error)}.",
            "Capture knows shapes only: use a form of fixed size, such as masking instead of selecting.",
        ) from error
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{title} raised while it ran: {type(error).__name__}: {text}{line_of(error)}.",
            "Run one training step of it on the CPU to see the same; capture runs it with the example inputs.",
        ) from error


def loss_of(output: Any, inputs: Mapping[str, Any], loss_fn: LossFunction | None, title: str) -> Tensor:
    """The loss in what the model returned: itself, its `.loss`, its ["loss"], or what `loss_fn` makes of it."""
    loss = loss_fn(output, inputs) if loss_fn is not None else output
    if loss_fn is None and not isinstance(output, Tensor):
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise UsageError(
            f"{title} returns a {type(output).__name__} in which there is no loss.",
            "Return a scalar or an object with .loss, or define loss_fn(output, batch).",
        )
    if loss.numel() != 1 or loss.dim() > 1:
        raise UsageError(
            f"{title} returns a tensor of shape {list(loss.shape)} where a scalar loss is needed.",
            "Define loss_fn(output, batch) -> scalar in the file.",
        )
    if not loss.requires_grad:
        raise UsageError(f"The loss of {title} needs no gradient.", "Set requires_grad=True on some parameter.")
    return loss
