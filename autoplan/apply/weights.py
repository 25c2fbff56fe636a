"""Whole models as safetensors: a file, or a folder as Hugging Face writes it, with an index of its files.

Of a parameter every rank reads the pieces that it holds (`shards.pieces`) and nothing else. To write, all ranks bring one
tensor after another together, and the first writes a file whenever enough of them have come. Keys are the model's own names; of
names for one parameter it is enough that the file has one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from autoplan.apply.checkpoint import full
from autoplan.errors import UsageError
from autoplan.units import Bytes

if TYPE_CHECKING:
    from autoplan.apply.model import ParallelModel

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
"""Names in a folder: of an index, and of the only file where there is none."""
LARGEST: Bytes = 5e9
"""Of a file that is written, unless one tensor is larger."""


def load(model: ParallelModel, path: Path) -> None:
    """Fill what this rank holds. Raises `UsageError` for what is no such file, or another model's."""
    files = _files(path)
    every = _names(model)
    found = {name: next((other for other in same if other in files), None) for name, same in every.items()}
    missing = [name for name, key in found.items() if key is None]
    if missing:
        raise UsageError(
            f"'{path}' has no '{missing[0]}'"
            + (f", nor {len(missing) - 1} more of the model's tensors." if missing[1:] else "."),
            "It holds another model, or names its tensors otherwise.",
        )
    with torch.no_grad():
        for file in sorted(set(files.values())):
            with _opened(file) as opened:
                for name, tensor in model.module.state_dict().items():
                    key = found[name]
                    if key is not None and files[key] == file and not tensor.is_meta:
                        _fill(model, name, tensor, opened.get_slice(key), path)


def _fill(model: ParallelModel, name: str, tensor: torch.Tensor, slices: Any, path: Path) -> None:
    shape = tuple(slices.get_shape())
    if shape != tuple(tensor.shape):
        raise UsageError(f"'{name}' has the shape {list(tensor.shape)}, and in '{path}' {list(shape)}.", "It is another model's.")
    if not isinstance(tensor, DTensor):
        tensor.copy_(slices[...])
        return
    local = tensor.to_local()
    for piece in model._shards[name].pieces(model._at):
        window = tuple(slice(start, start + size) for start, size in zip(piece.offset, piece.sizes, strict=True))
        piece.of_local(local).copy_(slices[window])


def save(model: ParallelModel, path: Path) -> None:
    """Write all of it into the folder `path`; files of these names that are there are replaced when all is written."""
    writer = _Writer(path) if dist.get_rank() == 0 else None
    state = model.module.state_dict()
    for name, same in _names(model).items():
        if name == same[0]:
            whole = full(model, name, state[name])
            if writer is not None:
                writer.add(name, whole)
    if writer is not None:
        writer.close()
    dist.barrier()


class _Writer:
    """Files of a folder, as many as the tensors need that come one by one."""

    def __init__(self, path: Path) -> None:
        self.path, self.library = path, _library()
        self.drafts: list[tuple[Path, list[str]]] = []
        self.total = 0
        self._group: dict[str, torch.Tensor] = {}
        path.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self._group and sum(each.nbytes for each in self._group.values()) + tensor.nbytes > LARGEST:
            self._write()
        self._group[name] = tensor.contiguous()
        self.total += tensor.nbytes

    def _write(self) -> None:
        draft = self.path / f".{len(self.drafts)}.safetensors"
        self.library.torch.save_file(self._group, draft, metadata={"format": "pt"})
        self.drafts.append((draft, list(self._group)))
        self._group = {}

    def close(self) -> None:
        """Give the files their names: how many there are is known now."""
        self._write()
        number = len(self.drafts)
        names = [WHOLE] if number == 1 else [f"model-{i + 1:05}-of-{number:05}.safetensors" for i in range(number)]
        for (draft, _), name in zip(self.drafts, names, strict=True):
            os.replace(draft, self.path / name)
        if number == 1:
            (self.path / INDEX).unlink(missing_ok=True)
            return
        where = {key: name for (_, keys), name in zip(self.drafts, names, strict=True) for key in keys}
        index = {"metadata": {"total_size": self.total}, "weight_map": where}
        (self.path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _names(model: ParallelModel) -> dict[str, tuple[str, ...]]:
    """Every name of the model's state, with all names of the same tensor."""
    state = model.module.state_dict()
    same = {name: tuple(n for n in group if n in state) for group in model.plan.tied for name in group}
    return {name: same.get(name, (name,)) for name in state}


def _files(path: Path) -> dict[str, Path]:
    """By key: the file that holds it."""
    index = path / INDEX
    if index.is_file():
        try:
            found = {key: path / name for key, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"'{index}' is no index of safetensors files.", "Write the folder anew.") from None
        absent = sorted(str(file) for file in set(found.values()) if not file.is_file())
        if absent:
            raise UsageError(f"'{index}' names '{absent[0]}', which is not there.", "Copy the whole folder.")
        return found
    file = path / WHOLE if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"'{path}' holds no weights.", f"Give a safetensors file, or a folder with {WHOLE} or {INDEX}.")
    with _opened(file) as opened:
        return dict.fromkeys(opened.keys(), file)


def _opened(file: Path) -> Any:
    try:
        return _library().safe_open(file, framework="pt", device="cpu")
    except UsageError:
        raise
    except Exception as error:  # the library's own, which is not always there to be named
        raise UsageError(f"'{file}' is no safetensors file: {error}.") from None


def _library() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise UsageError("safetensors is not installed.", "pip install safetensors") from None
    return safetensors
