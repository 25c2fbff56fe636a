"""Small bodies built by hand, so that cost and search are tested without torch."""

from __future__ import annotations

from dataclasses import replace

from autoplan.graph import Block, Body, Cost, Graph, Op, Parameter, Value


class Builder:
    """Writes the operations of a body one after another; values are named by their ids."""

    def __init__(self, hidden: int, seq: int, dtype: str = "bfloat16") -> None:
        self.hidden, self.seq, self.dtype = hidden, seq, dtype
        self.values: list[Value] = []
        self.ops: list[Op] = []
        self.parameters: list[Parameter] = []
        self.scope: list[str] = []

    def value(
        self, *shape: int, storage: int | None = None, parameter: str | None = None, grad: bool = True, dtype: str | None = None
    ) -> int:
        i = len(self.values)
        batch_dim = None if parameter else 0
        self.values.append(Value(i, shape, dtype or self.dtype, batch_dim, grad, i if storage is None else storage, parameter))
        return i

    def activation(self, features: int) -> int:
        return self.value(1, self.seq, features)

    def parameter(self, name: str, *shape: int) -> int:
        self.parameters.append(Parameter(name, shape, self.dtype))
        return self.value(*shape, parameter=name)

    def op(
        self,
        kind: str,
        name: str,
        inputs: list[int],
        outputs: list[int],
        flops: float = 0.0,
        saved: tuple[int, ...] = (),
        **more: object,
    ) -> int:
        size = sum(self.values[i].bytes_at(1) for i in inputs + outputs)
        moved = Cost() if kind in ("enter", "exit", "view", "call") else Cost(size)
        self.ops.append(
            Op(
                kind, name, self.scope[-1] if self.scope else "", tuple(inputs), tuple(outputs),
                forward_flops=Cost(flops), backward_flops=Cost(2 * flops), forward_bytes=moved, backward_bytes=moved,
                forward_kernels=1, backward_kernels=2, saved=saved, **more,
            )  # type: ignore[arg-type]
        )  # fmt: skip
        return outputs[0]

    def border(self, kind: str, module: str, i: int, leaf: str = "0") -> int:
        value = self.values[i]
        inner = self.value(*value.shape, storage=value.storage, grad=value.requires_grad)
        self.scope.append(module)
        self.op(kind, kind, [i], [inner], leaf=leaf)
        self.scope.pop()
        return inner

    def linear(self, name: str, x: int, features: int) -> int:
        x = self.border("enter", name, x)
        self.scope.append(name)
        width = self.values[x].shape[-1]
        weight = self.parameter(f"{name}.weight", features, width)
        y = self.op("linear", "linear", [x, weight], [self.activation(features)], 2.0 * self.seq * width * features, saved=(x,))
        self.scope.pop()
        return self.border("exit", name, y)

    def norm(self, name: str, x: int) -> int:
        x = self.border("enter", name, x)
        self.scope.append(name)
        weight = self.parameter(f"{name}.weight", self.values[x].shape[-1])
        y = self.op("norm", "rms_norm", [x, weight], [self.activation(self.values[x].shape[-1])], saved=(x,), dims=(1,))
        self.scope.pop()
        return self.border("exit", name, y)

    def pointwise(self, name: str, *inputs: int, linear: bool = False) -> int:
        shape = self.values[inputs[0]].shape
        saved = () if linear else inputs
        return self.op("pointwise", name, list(inputs), [self.value(*shape)], saved=saved, linear=linear)

    def body(self, inputs: list[int], outputs: list[int]) -> Body:
        return Body(
            tuple(self.values), tuple(self.ops), tuple(inputs), tuple(outputs), tuple(self.parameters), ("0",) * len(inputs)
        )


def mlp_block(hidden: int = 64, seq: int = 16, ffn: int = 128, norm: bool = True) -> Body:
    """x + down(gelu(up(norm(x)))), with all its borders."""
    b = Builder(hidden, seq)
    outside = b.activation(hidden)
    x = b.border("enter", "", outside)
    h = b.norm("norm", x) if norm else x
    h = b.linear("up", h, ffn)
    h = b.pointwise("gelu", h)
    h = b.linear("down", h, hidden)
    y = b.pointwise("add", x, h, linear=True)
    return b.body([outside], [b.border("exit", "", y)])


def expert_block(
    hidden: int = 64, seq: int = 16, ffn: int = 128, experts: int = 4, chosen: int = 2, form: str = "chosen", holder: str = "moe"
) -> Body:
    """x + moe(norm(x)), where a router chooses some of `experts` for every token; `holder` is the module that has them."""
    b = Builder(hidden, seq)
    outside = b.activation(hidden)
    x = b.border("enter", "", outside)
    h = b.norm("norm", x)
    rows = b.op("view", "flatten", [h], [b.value(seq, hidden, storage=b.values[h].storage)])
    numbers = seq * chosen
    choice = b.op("opaque", "topk", [rows], [b.value(seq, chosen, grad=False, dtype="int64")])
    weights = b.op("opaque", "gather", [rows, choice], [b.value(seq, chosen)], saved=(choice,))
    if form == "sorted":
        rows = b.op("opaque", "getitem", [rows, choice], [b.value(numbers, hidden)], saved=(choice,))
        counts = b.op("opaque", "bincount", [choice], [b.value(experts, grad=False, dtype="int64")])
        b.values[counts] = replace(b.values[counts], batch_dim=None)
    entering = [rows, choice, weights] if form == "chosen" else [rows, counts]
    given = [b.border("enter", holder, i, str(n)) for n, i in enumerate(entering)]
    b.scope.append(holder)
    h = given[0]
    if form == "chosen":
        h = b.op("opaque", "getitem", [h, given[1]], [b.value(numbers, hidden)], saved=(given[1],))
    for name, width in (("up", ffn), ("down", hidden)):
        weight = b.parameter(f"{holder}.{name}", experts, b.values[h].shape[1], width)
        flops = 2.0 * numbers * b.values[h].shape[1] * width
        h = b.op("opaque", "_grouped_mm", [h, weight], [b.value(numbers, width)], flops, saved=(h,))
    if form == "chosen":
        h = b.op("opaque", "combine", [h, given[2]], [b.value(seq, hidden)], saved=(h, given[2]))
    b.scope.pop()
    h = b.border("exit", holder, h)
    if form == "sorted":
        h = b.op("opaque", "index_add", [h, choice], [b.value(seq, hidden)], saved=(choice,))
    h = b.op("view", "view", [h], [b.value(1, seq, hidden, storage=b.values[h].storage)])
    y = b.pointwise("add", x, h, linear=True)
    return b.body([outside], [b.border("exit", "", y)])


def model(layers: int = 4, hidden: int = 64, seq: int = 16, ffn: int = 128, vocab: int = 256, block: Body | None = None) -> Graph:
    """Embedding, `layers` equal blocks, head and loss."""
    block = block or mlp_block(hidden, seq, ffn)
    b = Builder(hidden, seq)
    tokens = b.value(1, seq, grad=False, dtype="int64")
    b.scope.append("embed")
    table = b.parameter("embed.weight", vocab, hidden)
    x = b.op("embedding", "embedding", [tokens, table], [b.activation(hidden)])
    b.scope.pop()
    x = b.border("exit", "embed", x)
    for layer in range(layers):
        x = b.op("call", f"layers.{layer}", [x], [b.activation(hidden)], block=layer)
    logits = b.linear("head", x, vocab)
    rows = b.op("view", "view", [logits], [b.value(seq, vocab, storage=logits)])
    loss = b.op("cross_entropy", "cross_entropy", [rows, tokens], [b.value()], saved=(rows,))
    b.values[loss] = Value(loss, (), "float32", None, True, loss)
    outer = b.body([], [loss])
    blocks = tuple(Block(f"layers.{i}", 0) for i in range(layers))
    return Graph("model", "bfloat16", outer, (block,), blocks, inputs=(("tokens", (1, seq), "int64"),))
