"""Which trainers a plan can be carried to."""

from __future__ import annotations

from autoplan.errors import UsageError
from autoplan.export import accelerate, deepspeed, huggingface, lightning, megatron, megatron_bridge, torchtitan
from autoplan.export.exported import Exported, Exporter
from autoplan.plan import Plan

TARGETS: dict[str, Exporter] = {
    "torchtitan": torchtitan.registry,
    "torchtitan-toml": torchtitan.toml,
    "megatron": megatron.arguments,
    "megatron-bridge": megatron_bridge.overrides,
    "deepspeed": deepspeed.config,
    "accelerate": accelerate.config,
    "transformers": huggingface.snippet,
    "lightning": lightning.snippet,
}


def export(plan: Plan, to: str) -> Exported:
    """The plan as a configuration of the trainer `to`. Raises `UsageError` when nobody knows it."""
    if to not in TARGETS:
        raise UsageError(f"there is no export to '{to[:80]}'.", f"There are {', '.join(TARGETS)}.")
    return TARGETS[to](plan)
