"""What was captured, and which machines are known, as tables and as data."""

from __future__ import annotations

import io
import json
from dataclasses import replace

from rich.console import Console, RenderableType

from autoplan.graph import Block, Body, Cost, Graph, Op, Parameter, Value
from autoplan.hardware import Curve, Device, HardwareProfile, Link
from autoplan.report import inspect, machines


def body(name: str) -> Body:
    return Body(
        values=(
            Value(0, (1, 8, 4), "bfloat16", 0, True, 0),
            Value(1, (4, 4), "bfloat16", None, True, 1, "w.weight"),
            Value(2, (1, 8, 4), "bfloat16", 0, True, 2),
        ),
        ops=(
            Op("enter", "enter", name, (0,), (0,)),
            Op("linear", "linear", name, (0, 1), (2,), forward_flops=Cost(256.0), backward_flops=Cost(512.0), saved=(0,)),
        ),
        inputs=(0,),
        outputs=(2,),
        parameters=(Parameter("w.weight", (4, 4), "float32"), Parameter("mask", (8, 8), "bool", buffer=True)),
    )


def graph() -> Graph:
    return Graph(
        model="tiny [red]",
        compute_dtype="bfloat16",
        outer=body("head"),
        bodies=(body("w"),),
        blocks=tuple(Block(f"layers.{i}", 0) for i in range(3)),
        inputs=(("tokens", (1, 8), "int64"),),
        warnings=("careful [bold]",),
    )


def plain(what: RenderableType) -> str:
    out = io.StringIO()
    Console(file=out, width=80, no_color=True).print(what)
    return out.getvalue()


def test_inspect_as_data() -> None:
    data = json.loads(json.dumps(inspect.as_dict(graph())))
    assert data["parameters"] == 64
    assert data["forward_flops_per_sample"] == 1024
    assert data["saved_bytes_per_sample"] == 4 * 64
    (block,) = data["blocks"]
    assert (block["name"], block["repeats"], block["parameters"], block["ops"]) == ("layers.0-2", 3, 16, 1)
    assert block["layers"] == ["layers.0", "layers.1", "layers.2"]
    assert data["warnings"] == ["careful [bold]"]


def test_inspect_in_the_terminal() -> None:
    text = plain(inspect.summary(graph()))
    assert "tiny [red]: 64 parameters in 3 layers." in text
    assert "[1, 8, 4]" in text
    assert "256 FLOP" in text
    assert "enter" not in text
    assert "careful [bold]" in text
    assert "opaque" not in text


def test_inspect_says_what_opaque_means() -> None:
    strange = replace(body("w"), ops=(Op("opaque", "topk", "w", (0, 1), (2,)),))
    text = plain(inspect.summary(replace(graph(), bodies=(strange,))))
    assert "topk (opaque)" in text
    assert "opaque: no rule says how it may be split" in text


def test_hardware_as_data_and_tables() -> None:
    curve = Curve(((1.0, 0.5), (1e12, 0.8)))
    device = Device(
        name="GPU", memory=80 * 2.0**30, reserved=4 * 2.0**30, bandwidth=3.35e12, peak=(("bfloat16", 989e12),), matmul=curve,
        attention=curve, memory_efficiency=curve, launch=5e-6, source="a datasheet",
    )  # fmt: skip
    link = Link(name="nvlink", span=8, bandwidth=450e9, latency=9e-6, efficiency=curve, source="a test")
    profile = HardwareProfile(name="box", device=device, links=(link,), overlap=0.1, backend="nccl")
    (data,) = json.loads(json.dumps(machines.as_dicts([profile])))
    assert data["peak"] == {"bfloat16": 989e12}
    assert data["links"][0]["bandwidth"] == 450e9
    assert "989 TFLOP/s" in plain(machines.catalog([profile]))
    assert "a datasheet" in plain(machines.details(profile))
    assert "450 GB/s" in plain(machines.details(profile))
