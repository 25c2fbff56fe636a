"""Llama 3 from Hugging Face transformers, by its configuration: nothing is downloaded."""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "1B": {"layers": 16, "hidden": 2048, "heads": 32, "kv_heads": 8, "ffn": 8192, "vocab": 128256, "seq_len": 2048},
    "8B": {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336, "vocab": 128256, "seq_len": 8192},
    "70B": {"layers": 80, "hidden": 8192, "heads": 64, "kv_heads": 8, "ffn": 28672, "vocab": 128256, "seq_len": 8192},
    "405B": {"layers": 126, "hidden": 16384, "heads": 128, "kv_heads": 8, "ffn": 53248, "vocab": 128256, "seq_len": 8192},
}


def build_model(size: str = "8B", **changes: int) -> nn.Module:
    settings = {**SIZES[size], **changes}
    config = LlamaConfig(
        num_hidden_layers=settings["layers"],
        hidden_size=settings["hidden"],
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["kv_heads"],
        intermediate_size=settings["ffn"],
        vocab_size=settings["vocab"],
        max_position_embeddings=settings["seq_len"],
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def example_inputs(batch_size: int, size: str = "8B", **changes: int) -> dict[str, Tensor]:
    settings = {**SIZES[size], **changes}
    tokens = torch.randint(0, settings["vocab"], (batch_size, settings["seq_len"]))
    return {"input_ids": tokens, "labels": tokens}
