"""Models of Hugging Face transformers, by the fields of their published config.json."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from autoplan.capture import LoadedModel, huggingface
from tests.models.family import Family

Fields = dict[str, Any]


def load(name: str, fields: Fields, seq_len: int | None) -> LoadedModel:
    from transformers import AutoConfig

    config = AutoConfig.for_model(**fields)
    return LoadedModel(name, partial(huggingface.build, config, name), partial(huggingface.example_inputs, config, name, seq_len))


def family(
    name: str, full: Fields, tiny: Fields, blocks: int, bodies: int, *, seq_len: int = 16, meets: bool = False, **sizes: Fields
) -> Family:
    """`tiny` and `sizes` change fields of `full`."""
    made: dict[str, Callable[[], LoadedModel]] = {
        "tiny": partial(load, f"{name} tiny", merged(full, tiny), seq_len),
        "full": partial(load, name, full, None),
    }
    made |= {size: partial(load, f"{name} {size}", merged(full, fields), None) for size, fields in sizes.items()}
    return Family(name, made, blocks, bodies, meets)


def merged(full: Fields, changes: Fields) -> Fields:
    nested = {key: {**full[key], **value} for key, value in changes.items() if isinstance(full.get(key), dict)}
    return {**full, **changes, **nested}


def small(**changes: Any) -> Fields:
    """The usual names of sizes."""
    return {
        "num_hidden_layers": 3,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        **changes,
    }


ROPE = {"rope_type": "default", "rope_theta": 500000.0}
LLAMA_3 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": ROPE,
    "tie_word_embeddings": False,
}
CLIP_TEXT = {"num_hidden_layers": 12, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048}
CLIP_VISION = {
    "num_hidden_layers": 24,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "patch_size": 14,
    "image_size": 336,
}
TINY_SIDE = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
TINY_VISION = {**TINY_SIDE, "patch_size": 8, "image_size": 16}

HUGGING_FACE = (
    family(
        "gpt2",
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 48, "n_embd": 1600, "n_head": 25},
        {"n_layer": 3, "n_embd": 64, "n_head": 4, "vocab_size": 96, "n_positions": 64},
        3,
        1,
    ),
    family(
        "gpt-neox",
        {
            "model_type": "gpt_neox",
            "architectures": ["GPTNeoXForCausalLM"],
            "num_hidden_layers": 44,
            "hidden_size": 6144,
            "num_attention_heads": 64,
            "intermediate_size": 24576,
            "vocab_size": 50432,
        },
        small(),
        3,
        1,
    ),
    family(
        "opt",
        {
            "model_type": "opt",
            "architectures": ["OPTForCausalLM"],
            "num_hidden_layers": 64,
            "hidden_size": 9216,
            "num_attention_heads": 72,
            "ffn_dim": 36864,
            "word_embed_proj_dim": 9216,
        },
        {**small(), "ffn_dim": 128, "word_embed_proj_dim": 64},
        3,
        1,
    ),
    family(
        "llama-3",
        LLAMA_3,
        small(),
        3,
        1,
        **{
            "70B": {"num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "intermediate_size": 28672},
            "405B": {"num_hidden_layers": 126, "hidden_size": 16384, "num_attention_heads": 128, "intermediate_size": 53248},
        },
    ),
    family(
        "qwen2",
        {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "num_hidden_layers": 28,
            "hidden_size": 3584,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18944,
            "vocab_size": 152064,
        },
        small(),
        3,
        1,
    ),
    family(
        "qwen3",
        {
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "num_hidden_layers": 36,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 12288,
            "vocab_size": 151936,
            "head_dim": 128,
        },
        small(head_dim=16),
        3,
        1,
    ),
    family(
        "mistral",
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 1024},
        small(sliding_window=8),
        3,
        1,
    ),
    family(
        "gemma-2",
        {
            "model_type": "gemma2",
            "architectures": ["Gemma2ForCausalLM"],
            "num_hidden_layers": 42,
            "hidden_size": 3584,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "intermediate_size": 14336,
        },
        small(head_dim=16, sliding_window=8),
        3,
        1,
    ),
    family(
        "gemma-3",
        {
            "model_type": "gemma3_text",
            "architectures": ["Gemma3ForCausalLM"],
            "num_hidden_layers": 34,
            "hidden_size": 2560,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "intermediate_size": 10240,
        },
        small(num_hidden_layers=7, head_dim=16, sliding_window=8),
        7,
        2,
    ),
    family(
        "phi-3",
        {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": 0},
        small(num_key_value_heads=4),
        3,
        1,
    ),
    family(
        "mixtral",
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_hidden_layers": 32},
        small(num_local_experts=4),
        3,
        1,
    ),
    family(
        "qwen3-moe",
        {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "num_hidden_layers": 48,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 151936,
            "head_dim": 128,
        },
        small(head_dim=16, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2),
        3,
        1,
    ),
    family(
        "deepseek-v3",
        {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 61},
        small(
            num_hidden_layers=5,
            num_key_value_heads=4,
            moe_intermediate_size=32,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=2,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
        ),
        5,
        2,
    ),
    family(
        "gpt-oss",
        {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "num_hidden_layers": 36, "num_local_experts": 128},
        small(head_dim=16, num_local_experts=4, sliding_window=8),
        3,
        1,
    ),
    family(
        "t5",
        {
            "model_type": "t5",
            "architectures": ["T5ForConditionalGeneration"],
            "num_layers": 24,
            "num_decoder_layers": 24,
            "d_model": 1024,
            "d_kv": 128,
            "d_ff": 65536,
            "num_heads": 128,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
        },
        {"num_layers": 4, "num_decoder_layers": 4, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "vocab_size": 96},
        8,
        4,
    ),
    family(
        "bert",
        {
            "model_type": "bert",
            "architectures": ["BertForMaskedLM"],
            "num_hidden_layers": 24,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
        small(),
        3,
        1,
    ),
    family(
        "vit",
        {
            "model_type": "vit",
            "architectures": ["ViTForImageClassification"],
            "num_hidden_layers": 32,
            "hidden_size": 1280,
            "num_attention_heads": 16,
            "intermediate_size": 5120,
            "patch_size": 14,
        },
        TINY_VISION,
        3,
        1,
    ),
    family(
        "whisper",
        {
            "model_type": "whisper",
            "architectures": ["WhisperForConditionalGeneration"],
            "encoder_layers": 32,
            "decoder_layers": 32,
            "d_model": 1280,
            "encoder_attention_heads": 20,
            "decoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "decoder_ffn_dim": 5120,
            "num_mel_bins": 128,
            "vocab_size": 51866,
            "pad_token_id": 50256,
            "decoder_start_token_id": 50258,
        },
        {
            "encoder_layers": 3,
            "decoder_layers": 3,
            "d_model": 64,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "num_mel_bins": 8,
            "vocab_size": 96,
            "max_source_positions": 24,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 1,
            "decoder_start_token_id": 1,
        },
        6,
        2,
    ),
    family(
        "clip",
        {
            "model_type": "clip",
            "architectures": ["CLIPModel"],
            "text_config": {**CLIP_TEXT, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
            "vision_config": CLIP_VISION,
            "projection_dim": 768,
        },
        {
            "text_config": {**TINY_SIDE, "vocab_size": 96, "bos_token_id": 0, "eos_token_id": 95, "pad_token_id": 1},
            "vision_config": TINY_VISION,
            "projection_dim": 32,
        },
        6,
        2,
        meets=True,
    ),
    family(
        "llava",
        {
            "model_type": "llava",
            "architectures": ["LlavaForConditionalGeneration"],
            "text_config": {
                "model_type": "llama",
                "num_hidden_layers": 32,
                "hidden_size": 4096,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "intermediate_size": 11008,
                "vocab_size": 32064,
                "max_position_embeddings": 4096,
            },
            "vision_config": {"model_type": "clip_vision_model", **CLIP_VISION, "projection_dim": 768, "vocab_size": 32000},
            "image_token_index": 32000,
        },
        {
            "text_config": small(num_hidden_layers=3),
            "vision_config": TINY_VISION,
            "image_token_index": 90,
        },
        6,
        3,
    ),
    family(
        "mamba-2",
        {
            "model_type": "mamba2",
            "architectures": ["Mamba2ForCausalLM"],
            "num_hidden_layers": 64,
            "hidden_size": 2560,
            "num_heads": 80,
            "head_dim": 64,
            "n_groups": 1,
            "vocab_size": 50288,
        },
        {
            "num_hidden_layers": 4,
            "hidden_size": 64,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 1,
            "state_size": 16,
            "vocab_size": 96,
            "chunk_size": 8,
        },
        4,
        2,
    ),
)
