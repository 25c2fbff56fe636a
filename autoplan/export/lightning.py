"""Lightning: a `LightningModule` mix-in that shards the model in `configure_model`, and the `Trainer` that runs it, as Python."""

from __future__ import annotations

from autoplan.export.exported import (
    Choices,
    Exported,
    by_the_book,
    choices,
    header,
    in_full,
    no_context,
    no_experts,
    no_pipeline,
    nodes,
)
from autoplan.plan import Plan

_NAME = "Lightning's ModelParallelStrategy"

STYLES = {0: "ColwiseParallel()", 1: "RowwiseParallel()"}
PRECISION = {("float32", "float32"): "32-true", ("float32", "bfloat16"): "bf16-mixed", ("bfloat16", "bfloat16"): "bf16-true",
             ("float16", "float16"): "16-true"}  # fmt: skip


def snippet(plan: Plan) -> Exported:
    """FSDP2 and tensor parallelism on Lightning's own mesh; DDP where nothing is sharded."""
    made, mesh = choices(plan), plan.mesh
    lost = [*made.lost, *no_pipeline(plan, _NAME), *no_context(plan, _NAME), *no_experts(plan, _NAME)]
    lost += in_full(made, "this code")
    ddp = mesh.tp == 1 and mesh.dp_shard == 1
    styles = _styles(plan, made, lost)
    _told(plan, made, ddp, lost)
    names = ", ".join(repr(name) for name, _ in plan.layers())
    body = _body(made, styles, sharded=mesh.dp > 1 and not ddp)
    strategy = "'ddp'" if ddp else f"ModelParallelStrategy(data_parallel_size={mesh.dp}, tensor_parallel_size={mesh.tp})"
    machines, devices = nodes(mesh.dp * mesh.tp)
    text = (
        f"{header(plan, lost)}{_imports(styles, made.recompute, ddp)}"
        f"\nLAYERS = [{names}]\n\n\nclass Planned(L.LightningModule):\n"
        '    """Mix it into your LightningModule, whose network is `self.model`."""\n\n'
        f"    def configure_model(self):\n{body}\n\n"
        f"strategy = {strategy}\n"
        f"trainer = L.Trainer(\n    accelerator='auto',\n    devices={devices},\n    num_nodes={machines},\n"
        f"    strategy=strategy,\n    precision={_precision(plan)!r},\n"
        f"    accumulate_grad_batches={plan.micro_batches},\n)\n"
    )
    return Exported(text=text, lost=tuple(lost), filename="autoplan_lightning.py")


def _precision(plan: Plan) -> str:
    return PRECISION.get((plan.workload.param_dtype, plan.workload.compute_dtype), "bf16-mixed")


def _told(plan: Plan, made: Choices, ddp: bool, lost: list[str]) -> None:
    mesh, load = plan.mesh, plan.workload
    if mesh.dp_replicate > 1 and not ddp:
        shards = f"the {mesh.dp_replicate} replicas of {mesh.dp_shard} shards" if mesh.dp_shard > 1 else "replicas without shards"
        lost.append(f"{shards}: its mesh has one data-parallel axis, over which everything is sharded")
    if (load.param_dtype, load.compute_dtype) not in PRECISION:
        lost.append(f"parameters in {load.param_dtype} with computation in {load.compute_dtype}: bf16-mixed is used")
    if made.zero == 1:
        lost.append("ZeRO-1 (reduce once a step): FSDP2 reduces gradients in every micro-batch")
    lost.append(f"the DataLoader is yours: batch_size={plan.micro_batch}")


def _imports(styles: dict[str, str], recompute: bool, ddp: bool) -> str:
    lines = ["import lightning as L"]
    if not ddp:
        lines += [
            "from lightning.pytorch.strategies import ModelParallelStrategy",
            "from torch.distributed.fsdp import fully_shard",
        ]
    if styles:
        lines.append("from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module")
    if recompute:
        lines.append("from torch.utils.checkpoint import checkpoint")
    return "".join(f"{line}\n" for line in lines)


def _body(made: Choices, styles: dict[str, str], *, sharded: bool) -> str:
    lines = ["layers = [self.model.get_submodule(name) for name in LAYERS]"]
    if styles:
        rules = [f"        {name!r}: {style}," for name, style in styles.items()]
        lines += [
            "for layer in layers:",
            "    parallelize_module(layer, self.device_mesh['tensor_parallel'], {",
            *rules,
            "    })",
        ]
    if made.recompute:
        lines += [
            "for layer in layers:",
            "    run = layer.forward",
            "    layer.forward = lambda *a, run=run, **k: checkpoint(run, *a, use_reentrant=False, **k)",
        ]
    if sharded:
        options = f"mesh=mesh, reshard_after_forward={made.zero == 3}"
        lines += [
            "mesh = self.device_mesh['data_parallel']",
            "for layer in layers:",
            f"    fully_shard(layer, {options})",
            f"fully_shard(self.model, {options})",
        ]
    return "".join(f"        {line}\n" for line in lines)


def _styles(plan: Plan, made: Choices, lost: list[str]) -> dict[str, str]:
    """The tp plan of one layer, without sequence parallelism: the model's own forward needs no change for it."""
    if plan.mesh.tp == 1:
        return {}
    weights = [(name, layout) for name, layout in made.sharding.parameters if layout.sharded and name.endswith(".weight")]
    if not by_the_book(made.sharding) or any(layout.blocks > 1 for _, layout in weights):
        lost.append("how layers are split over tp: write a plan for parallelize_module, or use autoplan.apply")
        return {}
    if made.sequence_parallel:
        lost.append("activations split along the sequence: they are whole here and need more memory; autoplan.apply splits them")
    lost.append("the number of heads that each device has is the model's to know: view(batch, length, -1, head_dim)")
    return {name.removesuffix(".weight"): STYLES[layout.dim] for name, layout in weights}
