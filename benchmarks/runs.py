"""A row of a published table -> a run that the cost model can price, or the reason why it can't.

A run is refused, never guessed: what the model does not know (state spaces, 4-bit products, a missing degree), what
is no measurement (failed runs), and what the source's own caveats exclude (README.md: tp above 8 in the nanotron sweep; its
runs under 10 % MFU are priced but told apart). Every refusal is counted under its reason. One thing is assumed: where a
source does not tell what is recomputed, it is what its configurations ask for (torchtitan's) or the least that fits
(`pricing.Pricer`).

Runs are split by *group*, the hash of (model, GPUs, tp, pp): about half of the groups are fitted on, the others
only reported on, so that no held-out run has a sibling of its own shape in the fit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256

from benchmarks.models import Experts, Shape
from benchmarks.rows import Refused, Row, read

VOCABULARY = 51200
"""Of vTrain's GPT runs, which do not tell theirs: Megatron's padded GPT-2 vocabulary."""
LONGEST, DEEPEST = 2**24, 10_000
"""Tokens of a sequence and layers beyond which a row is a slip of the table."""
UNFUSED = ("megatron-2020", "megatron-2020-v100", "megatron-2021", "megatron-2022", "vtrain")
"""Software that writes attention's scores to memory and has dropout."""

MIXTURES = "-moe"
"""At the end of the name of a source's runs of models with experts: they are told apart."""

_IDS = (
    ("narayanan", "megatron-2021"),
    ("megatron-readme-175b-1024", "megatron-2021"),
    ("korthikanti", "megatron-2022"),
    ("megatron2020", "megatron-2020"),
    ("megatron-h100", "megatron-core"),
    ("mbridge", "megatron-bridge"),
    ("vtrain", "vtrain"),
    ("titan", "torchtitan"),
    ("simumax", "simumax"),
    ("foundry", "llm-foundry"),
    ("trl", "trl"),
    ("nanotron", "nanotron"),
    ("llmq-llamafactory", "llama-factory"),
    ("llmq", "llmq"),
)
_APRIL_2025 = re.compile(r"20(25-?(0[4-9]|1[0-2])|2[6-9])")
"""In the name of a page: torchtitan compiles its loss since."""
_FRAMEWORKS = (
    ("megatron-bridge|nemo", "megatron-bridge"),
    ("torchtitan", "torchtitan"),
    ("nanotron", "nanotron"),
    ("composer|foundry|mosaic", "llm-foundry"),
    ("megatron-deepspeed", "vtrain"),
    ("transformerengine|transformer engine", "simumax"),
    (r"llm\.q|llmq", "llmq"),
    ("megatron", "megatron-core"),
)
_GPUS = (
    (r"H100.*(9[0-9] ?GB|HBM2e)", "h100-hbm2e-500w-8x"),
    (r"\bH100(?!.*(PCIe|NVL))", "h100-sxm-8x"),
    (r"\bH200", "h200-sxm-8x"),
    (r"\bGB200", "gb200-nvl72"),
    (r"\bGB300", "gb300-nvl72"),
    (r"\bB300", "b300-sxm-8x"),
    (r"\bB200", "b200-sxm-8x"),
    (r"\bMI300X", "mi300x-8x"),
    (r"RTX 4090", "rtx-4090-pcie-8x"),
    (r"RTX 5090", "rtx-5090-pcie-8x"),
    (r"RTX PRO 6000", "rtx-pro-6000-pcie-8x"),
    (r"\bV100", "v100-sxm2-8x"),
    (r"\bA10G", "a10g-pcie-8x"),
    (r"\bL40S", "l40s-pcie-8x"),
    (r"\bA100(?!.*PCIe).*40", "a100-40g-sxm-8x"),
    (r"\bA100(?!.*PCIe)", "a100-80g-sxm-8x"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A measured step and how it was laid out."""

    id: str
    source: str
    """Key into frameworks.yaml: a file's rows of one software generation."""
    hardware: str
    model: str
    shape: Shape
    layers: int
    gpus: int
    tp: int
    dp: int
    pp: int
    cp: int
    ep: int
    chunks: int
    sequence_parallel: bool
    asynchronous: bool
    zero: int
    stays: bool
    micro_batch: int
    global_batch: int
    recompute: str
    """none, full, "core" (attention's scores), "op" (all but half of the products), "alternate" (every second layer),
    "unknown"."""
    dtype: str
    float8: bool
    seconds: float
    """0 of a run that failed."""
    memory: float | None
    group: str
    single_layer: bool = False
    plain: int = 0
    """First layers without experts, in a model whose others have some."""

    @property
    def held_out(self) -> bool:
        """Nothing is fitted on models with experts: they have the constants of their framework's dense ones."""
        return self.shape.experts is not None or sha256(self.group.encode()).digest()[0] % 2 == 1

    @property
    def compiled(self) -> bool:
        """Where the planner would compile them, layers are priced so (cost.fusion); elsewhere the constants say it."""
        return self.source in ("torchtitan-compile", "torchtitan-2025") and self.tp == self.cp == self.ep == 1

    @property
    def configuration(self) -> tuple[object, ...]:
        """What equal runs share: their differences are noise."""
        return (self.source, self.hardware, self.shape, self.layers, self.gpus, self.tp, self.dp, self.pp, self.cp, self.ep,
                self.chunks, self.sequence_parallel, self.asynchronous, self.zero, self.stays, self.micro_batch,
                self.global_batch, self.recompute, self.float8)  # fmt: skip


def run_of(row: Row, failed: bool = False) -> Run:
    """The run of a row; of one that `failed` too, if that is asked for. Raises `Refused`."""
    source, hardware = _source(row)
    if failed != (row.text("status").lower() not in ("ok", "")):
        raise Refused("no measurement: the run failed" if not failed else "the run did not fail")
    if not hardware:
        raise Refused(f"no hardware profile for {row.text('gpu') or 'a GPU that is not told'}")
    float8 = _modelled(row)
    gpus, tp, pp, cp = row.count("n_gpus"), row.count("tp"), row.count("pp"), row.count("cp", 1)
    dp = row.count("dp", max(1, gpus // (tp * pp * cp)))
    if tp * pp * dp * cp != gpus:
        raise Refused("tp x pp x dp x cp is not the number of GPUs")
    if source == "nanotron":  # runs under 10 % MFU are told apart: the source calls them pathological
        if tp > 8:
            raise Refused("tp > 8: outside the source's caveats (README)")
        if (row.number("mfu") or 1.0) < 0.1 and not failed:
            source = "nanotron-slow"
    shape = _shape(row, source)
    if shape.experts is not None:
        source += MIXTURES
    ep = row.count("ep", 1)
    if ep > 1 and (shape.experts is None or shape.experts.number % ep or (dp * cp * tp) % ep or row.count("etp", 1) > 1):
        raise Refused("experts over ep in a way that is not modelled")
    # torchtitan's pipelines, unless told otherwise: a micro-batch for every stage, two chunks where they are interleaved; and
    # what FSDP has gathered stays, so that gradients are reduced once a step (its pipelining_utils.py, parallelize_llama.py)
    piped = source.startswith("torchtitan") and pp > 1
    batch = row.count("global_batch")
    micro = row.count("micro_batch", max(1, batch // (dp * pp)) if piped else None)
    chunks = row.count("vpp", 2 if piped and row.text("pp_schedule").lower().startswith("interleaved") else 1)
    if batch % (dp * micro):
        raise Refused("the global batch does not divide into the micro-batches told")
    layers = row.count("model_layers", 1 if "single layer" in row.text("other") else None)
    if max(layers, pp * chunks) > DEEPEST:
        raise Refused("layers or stages are beyond all bounds")
    memory = row.number("peak_mem")
    return Run(
        id=row.text("id") or "(no id)",
        source=source,
        hardware=hardware,
        model=row.text("model") or "(no name)",
        shape=shape,
        layers=layers,
        gpus=gpus,
        tp=tp,
        dp=dp,
        pp=pp,
        cp=cp,
        ep=ep,
        chunks=chunks,
        sequence_parallel=tp > 1 and row.flag("sp", default=framework(source) in ("megatron-bridge", "simumax")),
        asynchronous=row.flag("async_tp", default=source == "megatron-bridge"),
        zero=1 if piped and row.number("zero") else 3 if "FULL" in row.text("fsdp") else int(row.number("zero") or 0),
        stays=row.text("fsdp") == "SHARD_GRAD_OP",
        micro_batch=micro,
        global_batch=batch,
        recompute=_recompute(row, source),
        dtype="float16" if row.text("precision").startswith("fp16") else "bfloat16",
        float8=float8,
        seconds=0.0 if failed else _seconds(row, gpus, batch * shape.seq_len),
        memory=memory * _unit(row, source) if memory else None,
        group=f"{row.text('model')}/{gpus}/{tp}/{pp}",
        single_layer="single layer" in row.text("other"),
        plain=_plain(row, shape, layers),
    )


def framework(source: str) -> str:
    """Whose constants a source's runs are priced with."""
    return source.removesuffix(MIXTURES)


def _source(row: Row) -> tuple[str, str]:
    """(source, hardware profile) of a row, "" where there is none."""
    name, told, gpu = row.text("id"), row.text("framework"), row.text("gpu")
    source = next((source for prefix, source in _IDS if name.startswith(prefix)), "")
    source = source or next((source for words, source in _FRAMEWORKS if re.search(words, told, re.IGNORECASE)), "")
    hardware = next((profile for words, profile in _GPUS if re.search(words, gpu, re.IGNORECASE)), "")
    if hardware == "a100-80g-sxm-8x" and row.text("gpu_mem_gb") == "40" and not source.startswith("megatron-2020"):
        hardware = "a100-40g-sxm-8x"
    if source == "megatron-2020" and hardware.startswith("v100"):
        source = "megatron-2020-v100"
    elif source == "torchtitan" and hardware.startswith("a100"):
        source = "torchtitan-a100"
    elif source == "torchtitan" and row.flag("torch_compile"):
        source = "torchtitan-2025" if _APRIL_2025.search(row.text("source_ref")) else "torchtitan-compile"
    return source or "unknown software", hardware


def _modelled(row: Row) -> bool:
    """Whether products are in fp8. Raises `Refused` for what the model does not know."""
    kind = row.text("model_arch").lower() or "dense"
    if kind not in ("dense", "moe"):
        raise Refused(f"{kind[:20]}: state spaces are not modelled")
    if "lora" in row.text("id").lower() or "lora" in row.text("other").lower():
        raise Refused("adapters are trained, not the model")
    if re.search("offload[-_]|_offload", row.text("other")):
        raise Refused("states or activations in the host's memory are not modelled")
    if row.text("zero") == "3" and row.text("id").startswith("narayanan"):
        raise Refused("DeepSpeed ZeRO-3 of 2021: another framework, six rows, no constants")
    told = f"{row.text('precision')} {row.text('float8')}".lower()
    if "fp4" in told or "int8" in told:
        raise Refused("products in 4 bits or whole numbers: no efficiency curve")
    float8 = bool(re.search(r"fp8|float8|f8", told)) or row.flag("float8")
    if float8 and "rowwise" in told:
        raise Refused("fp8 scaled by rows: another kernel, no efficiency curve")
    return float8


def _shape(row: Row, source: str) -> Shape:
    gated, heads, hidden = row.flag("model_gated"), row.count("model_heads"), row.count("model_hidden")
    kv_heads, length = row.count("model_kv_heads", heads), row.count("model_seq_len")
    experts = _experts(row) if row.text("model_arch").lower() == "moe" else None
    if experts is None and (hidden % heads or row.count("model_head_dim", hidden // heads) != hidden // heads):
        raise Refused("heads that do not share out the hidden size are not modelled")
    if heads % kv_heads or (kv_heads != heads and not gated):
        raise Refused("grouped heads of this kind are not modelled")
    if length > LONGEST or max(hidden, row.count("model_ffn")) > LONGEST:
        raise Refused("a model's dimension is beyond all bounds")
    return Shape(
        gated=gated,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        ffn=row.count("model_ffn"),
        vocab=row.count("model_vocab", VOCABULARY if source == "vtrain" else None),
        seq_len=length,
        tied=row.flag("model_tied_embeddings", default=True),
        unfused=source in UNFUSED,
        dropout=0.1 if source in UNFUSED else 0.0,
        experts=experts,
    )


def _experts(row: Row) -> Experts:
    attention = row.text("model_attention")
    if attention not in ("mla", "gqa"):
        raise Refused(f"experts beside attention that is {attention[:40] or 'not told'}: not modelled")
    return Experts(
        latent=attention == "mla",
        head=row.count("model_head_dim", row.count("model_hidden") // row.count("model_heads")),
        number=row.count("model_experts"),
        chosen=row.count("model_topk"),
        ffn=row.count("model_moe_ffn"),
        shared=int(row.number("model_shared_expert_ffn") or 0),
    )


def _plain(row: Row, shape: Shape, layers: int) -> int:
    """DeepSeek's models, told by their attention, begin with layers without experts: one, where a row does not tell."""
    if shape.experts is None or not shape.experts.latent:
        return 0
    return max(0, layers - row.count("model_moe_layers", layers - 1))


def _seconds(row: Row, gpus: int, tokens: int) -> float:
    """Of a step, as told or from the tokens a second."""
    seconds = row.number("step_time_s") or row.number("derived_step_time_s")
    rate = row.number("tokens_per_s_per_gpu") or row.number("derived_tokens_per_s_per_gpu")
    if not seconds and rate:
        seconds = tokens / (rate * gpus)
    if not seconds:
        raise Refused("no step time published")
    return seconds


def _unit(row: Row, source: str) -> float:
    """Bytes of the unit of memory. nanotron's "GB" are GiB: ZeRO-1 saves 12 bytes a parameter of a run's ZeRO-0 sibling then."""
    return 2.0**30 if row.text("peak_mem_unit").startswith("GiB") or source.startswith("nanotron") else 1e9


def _recompute(row: Row, source: str) -> str:
    said = row.text("recompute").lower()
    if source.startswith("nanotron") or said.startswith("none"):
        return "none"
    if said.startswith("full"):
        return "full"
    if "attention core" in said:
        return "core"
    if "selective layer" in said:
        return "alternate"
    if said.startswith("selective"):
        return "op" if source.startswith("torchtitan") else "core"
    if said:
        raise Refused("recomputation of parts is not modelled")
    return "op" if source.startswith("torchtitan") else "unknown"  # what its configurations say (llama3_8b.toml)


__all__ = ["Refused", "Row", "Run", "read", "run_of"]
