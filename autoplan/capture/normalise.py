"""From the function that the user called to the operation's kind: the vocabulary of `autoplan.graph`.

Calls are told apart by the name of the function (`torch.softmax`, `Tensor.softmax` and `F.softmax` are one). For the
many functions that only move, drop or cut dims, no table of their argument conventions is kept: they are run on a
*probe* whose strides are distinct primes, and the strides of the result say where each dim went.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoplan.graph import OpKind


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_VIEW_OF_DIMS = _words(
    "permute transpose swapaxes swapdims t T mT H mH adjoint movedim moveaxis unsqueeze squeeze select getitem narrow "
    "expand expand_as broadcast_to"
)
_VIEWS = _words("view reshape flatten unflatten view_as reshape_as ravel")
_SPLITS = _words("split chunk unbind tensor_split split_with_sizes unsafe_chunk unsafe_split")
_CATS = _words("cat concat concatenate stack")
_ALONG = _words("softmax log_softmax softmin cumsum cumprod logcumsumexp flip roll")
_REDUCE = _words("mean sum")
_REDUCE_KEPT = _words("amax amin var std logsumexp prod argmax argmin all any")
_CASTS = _words("to float half bfloat16 double type_as type int long bool cuda cpu")
_LINEAR = _words("contiguous clone neg negative positive detach data alias")
_POINTWISE = _words(
    "add sub subtract mul multiply div divide true_divide floor_divide remainder fmod pow rsub rdiv rpow square sqrt rsqrt "
    "reciprocal exp exp2 expm1 log log2 log10 log1p sin cos tan sinh cosh tanh asin acos atan atan2 erf erfc sigmoid "
    "logsigmoid relu relu6 leaky_relu elu selu celu gelu silu mish softplus softsign hardtanh hardswish hardsigmoid "
    "tanhshrink threshold abs absolute sign sgn ceil floor round trunc frac clamp clip clamp_min clamp_max minimum maximum "
    "where masked_fill lerp addcmul addcdiv dropout alpha_dropout nan_to_num isnan isinf isfinite logical_and logical_or "
    "logical_not logical_xor bitwise_and bitwise_or bitwise_xor bitwise_not and or xor invert eq ne lt le gt ge equal "
    "zeros_like ones_like full_like softcap logit digamma lgamma heaviside hypot logaddexp xlogy"
)
_ALIASES = {
    "radd": "add",
    "rmul": "mul",
    "rsub": "rsub",
    "rtruediv": "rdiv",
    "truediv": "div",
    "rmatmul": "matmul",
    "rand": "and",
    "ror": "or",
    "rxor": "xor",
    "floordiv": "floor_divide",
    "mod": "remainder",
}
_PRIMES = (1009, 2003, 3001, 4001, 5003, 6007, 7001, 8009, 9001, 10007)


@dataclass(frozen=True)
class Form:
    """A call in the vocabulary of the graph: its tensor inputs in the kind's order, and the kind's attributes."""

    kind: OpKind
    inputs: tuple[Tensor, ...]
    dims: tuple[int, ...] = ()
    dim_map: tuple[int, ...] = ()
    linear: bool = False
    causal: bool = False
    dropout: bool = False


Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


def name_of(func: Any) -> str:
    """The name that a reader knows the function by: "add" for `__radd__`, "T" for the getter of `Tensor.T`."""
    name = str(getattr(func, "__name__", func))
    if name == "__get__":
        return str(func.__self__.__name__)
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
        return _ALIASES.get(name, name)
    return name


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from tensors(item)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from tensors(item)


def classify(func: Any, args: Args, kwargs: Kwargs, outputs: list[Tensor]) -> Form:
    """The form of one call that returned `outputs`. Whatever is not understood is "opaque", never an error."""
    name = name_of(func).rstrip("_")
    everything = tuple(tensors((args, kwargs)))
    rule = _RULES.get(name)
    form = None
    if rule is not None and everything:
        try:
            form = rule(func, name, args, kwargs, outputs)
        except (IndexError, KeyError, TypeError, ValueError, RuntimeError):
            form = None
    return form or Form("opaque", everything)


def _argument(args: Args, kwargs: Kwargs, index: int, name: str, default: Any = None) -> Any:
    if index < len(args):
        return args[index]
    return kwargs.get(name, default)


def _dim(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def _dim_tuple(dim: Any, rank: int) -> tuple[int, ...]:
    if dim is None or dim == ():
        return tuple(range(rank))
    return tuple(sorted(_dim(d, rank) for d in ((dim,) if isinstance(dim, int) else dim)))


def _linear(func: Any, name: str, args: Args, kwargs: Kwargs, outputs: list[Tensor]) -> Form | None:
    inputs = (_argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight"), _argument(args, kwargs, 2, "bias"))
    return Form("linear", tuple(x for x in inputs if x is not None)) if inputs[1].dim() == 2 else None


def _matmul(func: Any, name: str, args: Args, kwargs: Kwargs, outputs: list[Tensor]) -> Form | None:
    a, b = tensors((args, kwargs))
    if name == "matmul" and isinstance(func, type(torch.Tensor.add)) and func.__name__ == "__rmatmul__":
        a, b = b, a
    return Form("matmul", (a, b)) if a.dim() == b.dim() >= 2 else None


def _attention(func: Any, name: str, args: Args, kwargs: Kwargs, outputs: list[Tensor]) -> Form | None:
    names = ("query", "key", "value", "attn_mask")
    inputs = tuple(x for i, n in enumerate(names) if (x := _argument(args, kwargs, i, n)) is not None)
    causal = bool(_argument(args, kwargs, 5, "is_causal"))
    dropout = bool(_argument(args, kwargs, 4, "dropout_p"))
    return Form("attention", inputs, causal=causal, dropout=dropout) if all(x.dim() == 4 for x in inputs[:3]) else None


def _embedding(func: Any, name: str, args: Args, kwargs: Kwargs, outputs: list[Tensor]) -> Form | None:
    indices, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
    if func is torch.embedding:  # its order is the other way round
        indices, weight = weight, indices
    if kwargs.get("max_norm") is not None or (len(args) > 3 and args[3] is not None and func is not torch.embedding):
        return None
    return Form("embedding", (indices, weight))


def _norm(func: Any, name: str, args: Args, kwargs: Kwargs, outputs: list[Tensor]) -> Form | None:
    shape = _argument(args, kwargs, 1, "normalized_shape")
    inputs = (_argument(args, kwargs, 0, "input"), _argument(args, kwargs, 2, "weight"), _argument(args, kwargs, 3, "bias"))
    return Form("norm", tuple(x for x in inputs if isinstance(x, Tensor)), dims=(len(shape),))


def _cross_entropy(func: Any, name: str, args: Args, kwargs: Kwargs, outputs: list[Tensor]) -> Form | None:
    logits, target = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "target")
    plain = (
        _argument(args, kwargs, 2, "weight") is None
        and _argument(args, kwargs, 3, "size_average") is None
        and _argument(args, kwargs, 5, "reduce") is None
        and _argument(args, kwargs, 6, "reduction", "mean") == "mean"
        and _argument(args, kwargs, 7, "label_smoothing", 0.0) == 0.0
    )
    hard = logits.dim() == 2 and target.dim() == 1 and not target.dtype.is_floating_point
    return Form("cross_entropy", (logits, target)) if plain and hard else None


def _pointwise(func: Any, name: str, args: Args, kwargs: Kwargs, outputs: list[Tensor]) -> Form | None:
    inputs = tuple(tensors((args, kwargs)))
    linear = False
    if name in ("add", "sub", "subtract"):
        linear = len(inputs) == 2
    elif name in ("mul", "multiply"):
        linear = len(inputs) == 1
    elif name in ("div", "divide", "true_divide"):
        linear = len(inputs) == 1 and isinstance(args[0], Tensor) and kwargs.get("rounding_mode") is None
    elif name in _CASTS:
        inputs = inputs[:1]
        linear = inputs[0].dtype.is_floating_point and outputs[0].dtype.is_floating_point
    elif name in _LINEAR:
        linear = True
    elif name in ("zeros_like", "ones_like", "full_like"):
        inputs = inputs[:1]
    return Form("pointwise", inputs, linear=linear) if len(outputs) == 1 else None


def _along(func: Any, name: str, args: Args, kwargs: Kwargs, outputs: list[Tensor]) -> Form | None:
    x = args[0] if args else kwargs["input"]
    key, index = ("dims", 2 if name == "roll" else 1) if name in ("flip", "roll") else ("dim", 1)
    dim = args[1:] if name == "flip" and len(args) > 2 else _argument(args, kwargs, index, key)
    return None if dim is None else Form("along", (x,), dims=_dim_tuple(dim, x.dim()))


def _reduce(func: Any, name: str, args: Args, kwargs: Kwargs, outputs: list[Tensor]) -> Form | None:
    x = args[0] if args else kwargs["input"]
    dims = _dim_tuple(_argument(args, kwargs, 1, "dim"), x.dim())
    kept = outputs[0].dim() == x.dim()
    carried = tuple(-1 if d in dims else d for d in range(x.dim()) if kept or d not in dims)
    return Form("dims", (x,), dim_map=carried) if x.dtype.is_floating_point else None


def _reduce_kept(func: Any, name: str, args: Args, kwargs: Kwargs, outputs: list[Tensor]) -> Form | None:
    """Not linear, so no "dims" operation, through which a Partial may pass; the dims stay in place when they are kept."""
    x = args[0] if args else kwargs["input"]
    dims = _dim_tuple(_argument(args, kwargs, 1, "dim"), x.dim())
    return Form("along", (x,), dims=dims) if len(outputs) == 1 and outputs[0].dim() == x.dim() else None


def _view_of_dims(func: Any, name: str, args: Args, kwargs: Kwargs, outputs: list[Tensor]) -> Form | None:
    x, rest = (args[0], args[1:]) if args else (kwargs["input"], ())
    if name == "getitem" and any(isinstance(item, Tensor | list | bool) for item in _items(rest[0])):
        return None
    probe = torch.empty_strided(x.shape, _PRIMES[: x.dim()], dtype=torch.bool)
    moved = func(probe, *rest, **{k: v for k, v in kwargs.items() if k != "input"})
    at = {stride: dim for dim, stride in enumerate(_PRIMES[: x.dim()])}
    carried = []
    for size, stride in zip(moved.shape, moved.stride(), strict=True):
        dim = at.get(stride, -1)
        carried.append(dim if dim >= 0 and x.shape[dim] == size and dim not in carried else -1)
    return Form("dims", (x,), dim_map=tuple(carried))


def _items(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _repeat_interleave(func: Any, name: str, args: Args, kwargs: Kwargs, outputs: list[Tensor]) -> Form | None:
    x, repeats = args[0] if args else kwargs["input"], _argument(args, kwargs, 1, "repeats")
    dim = _argument(args, kwargs, 2, "dim")
    if dim is None or not isinstance(repeats, int):
        return None
    d = _dim(dim, x.dim())
    return Form("dims", (x,), dims=(d,), dim_map=tuple(-1 if i == d else i for i in range(x.dim())))


def _repeat(func: Any, name: str, args: Args, kwargs: Kwargs, outputs: list[Tensor]) -> Form | None:
    x, added = args[0], outputs[0].dim() - args[0].dim()
    carried = [i - added if i >= added and x.shape[i - added] == size else -1 for i, size in enumerate(outputs[0].shape)]
    return Form("dims", (x,), dim_map=tuple(carried))


def _view(func: Any, name: str, args: Args, kwargs: Kwargs, outputs: list[Tensor]) -> Form | None:
    x = args[0] if args else kwargs["input"]
    return Form("view", (x,)) if outputs[0].dtype == x.dtype else None


def _split(func: Any, name: str, args: Args, kwargs: Kwargs, outputs: list[Tensor]) -> Form | None:
    x = args[0] if args else kwargs["input"] if "input" in kwargs else kwargs["tensor"]
    dim = _dim(_argument(args, kwargs, 1 if name == "unbind" else 2, "dim", 0), x.dim())
    carried = tuple(i for i in range(x.dim()) if i != dim) if name == "unbind" else ()
    return Form("split", (x,), dims=(dim,), dim_map=carried)


def _cat(func: Any, name: str, args: Args, kwargs: Kwargs, outputs: list[Tensor]) -> Form | None:
    parts = tuple(args[0] if args else kwargs["tensors"])
    return Form("cat", parts, dims=(_dim(_argument(args, kwargs, 1, "dim", 0), outputs[0].dim()),))


Rule = Callable[[Any, str, Args, Kwargs, list[Tensor]], Form | None]

_RULES: dict[str, Rule] = {
    "linear": _linear,
    "matmul": _matmul,
    "bmm": _matmul,
    "mm": _matmul,
    "scaled_dot_product_attention": _attention,
    "embedding": _embedding,
    "layer_norm": _norm,
    "rms_norm": _norm,
    "cross_entropy": _cross_entropy,
    "repeat_interleave": _repeat_interleave,
    "repeat": _repeat,
    "tile": _repeat,
    **dict.fromkeys(_POINTWISE | _CASTS | _LINEAR, _pointwise),
    **dict.fromkeys(_ALONG, _along),
    **dict.fromkeys(_REDUCE, _reduce),
    **dict.fromkeys(_REDUCE_KEPT, _reduce_kept),
    **dict.fromkeys(_VIEW_OF_DIMS, _view_of_dims),
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys(_SPLITS, _split),
    **dict.fromkeys(_CATS, _cat),
}
