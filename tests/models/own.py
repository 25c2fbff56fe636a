"""Models of our own: the examples, `nn.TransformerEncoder`, a mixture of experts, LoRA adapters, odd inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from autoplan.capture import LoadedModel, load_model
from tests.models.family import Family

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
TINY = {"layers": 3, "hidden": 32, "heads": 4, "ffn": 64, "vocab": 50, "seq_len": 16}


def family(
    path: Path, blocks: int, bodies: int, name: str | None = None, full: dict[str, Any] | None = None, **tiny: Any
) -> Family:
    sizes: dict[str, Callable[[], LoadedModel]] = {
        "tiny": partial(load_model, str(path), {**TINY, **tiny}),
        "full": partial(load_model, str(path), full or {}),
    }
    return Family(name or path.stem, sizes, blocks, bodies)


OWN = (
    family(EXAMPLES / "transformer.py", 6, 2, "nn.Transformer"),
    family(HERE / "encoder.py", 3, 1, "nn.TransformerEncoder"),
    family(EXAMPLES / "gpt.py", 3, 1, "gpt", dropout=0.1),
    family(EXAMPLES / "llama.py", 3, 1, "llama", {"size": "8B"}, kv_heads=2),
    family(HERE / "moe.py", 3, 2, "moe", experts=4, chosen=2, dense=1),
    family(HERE / "lora.py", 3, 2, "lora", rank=4),
)
