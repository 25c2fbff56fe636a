"""capture: a model -> its `Graph`. Two batch sizes recorded on fake tensors, nothing allocated, the module untouched."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autoplan.adapt import adapt
from autoplan.capture.blocks import find_blocks
from autoplan.capture.failures import NoBlockError, TwinsDifferError, refuse, stopped
from autoplan.capture.fake import build_on_meta, fake_copy, fake_inputs, own_buffers
from autoplan.capture.load import LoadedModel
from autoplan.capture.merge import BATCHES, merge, samples_meet
from autoplan.capture.private import FakeTensorMode, fake_mode, no_log_of_fakes
from autoplan.capture.record import Options, Recorder
from autoplan.capture.scope import leaves
from autoplan.errors import UsageError
from autoplan.graph import Graph

ExampleInputs = Callable[[int], Mapping[str, Any]]
LossFunction = Callable[[Any, Mapping[str, Any]], Tensor]


@contextmanager
def _young_garbage_alone() -> Iterator[None]:
    """Python's collector leaves out what is there already: a walk through all of torch takes longer than a layer's recording."""
    ours = not gc.get_freeze_count()
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


def capture(loaded: LoadedModel, *, compute_dtype: str = "bfloat16", stubs: bool = True) -> Graph:
    """The graph of the model in a user's file. `stubs=False` traces every layer, not only the different ones.

    Raises `UsageError` when the model can't be built, run or understood.
    """
    module = build_on_meta(loaded.build)
    return capture_module(
        module, loaded.example_inputs, loaded.loss_fn, name=loaded.spec, compute_dtype=compute_dtype, stubs=stubs
    )


@_young_garbage_alone()
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
    given = (module, example_inputs, loss_fn, title, compute_dtype)
    root, recorders = record(*given, sizes, options)
    if samples_meet(*recorders):  # then costs are quadratic in the batch, and take a third point
        sizes = (*batches, sum(batches))
        root, recorders = record(*given, sizes, options)
    try:
        return merge(title, compute_dtype, root, recorders, sizes)
    except UsageError:  # perhaps the model does something in its first step alone
        pass
    try:
        root, recorders = record(*given, (sizes[0], *sizes), options)
        return merge(title, compute_dtype, root, recorders[1:], sizes)
    except UsageError:  # or in the first step with each batch size
        each = [record(*given, (size,), options) for size in sizes]
        return merge(title, compute_dtype, each[0][0], [recorders[0] for _, recorders in each], sizes)


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
    mode = fake_mode()
    refuse(module, title)
    root = fake_copy(module, mode, dtype)
    if not root.training:
        root.train()
    adapt(root)
    samples = [fake_inputs(example_inputs(batch), mode, dtype) for batch in batches]
    if len(samples) > 1 and _shapes(samples[0]) == _shapes(samples[-1]):
        raise UsageError(
            f"The example inputs of {title} are as large for {batches[0]} samples as for {batches[-1]}.",
            "Make a first dim of batch_size in example_inputs(batch_size).",
        )
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


def _shapes(inputs: Mapping[str, Any]) -> list[torch.Size]:
    return [tensor.shape for _, tensor in leaves(inputs)]


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
    with mode, no_log_of_fakes(), own_buffers(root):
        _run(recorder, inputs, loss_fn, title)
    return recorder


def _run(recorder: Recorder, inputs: dict[str, Any], loss_fn: LossFunction | None, title: str) -> None:
    try:
        with redirect_stdout(sys.stderr):  # stdout is for autoplan's own output
            recorder.run(inputs, lambda output: loss_of(output, inputs, loss_fn, title))
    except (UsageError, NoBlockError, TwinsDifferError):
        raise
    except (Exception, SystemExit) as error:
        raise stopped(title, recorder.where(error), error) from error


def loss_of(output: Any, inputs: Mapping[str, Any], loss_fn: LossFunction | None, title: str) -> Tensor:
    """The loss in what the model returned: itself, its `.loss`, its ["loss"], or what `loss_fn` makes of it."""
    loss = loss_fn(output, inputs) if loss_fn is not None else output
    if loss_fn is None and not isinstance(output, Tensor):
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss_fn is not None and not isinstance(loss, Tensor):
        raise UsageError(f"loss_fn of {title} returns a {type(loss).__name__}.", "It must return a scalar tensor.")
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
