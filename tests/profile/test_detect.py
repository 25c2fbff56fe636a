"""What a machine has, from recorded outputs of `nvidia-smi`."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from autoplan.cli import arguments
from autoplan.errors import UsageError
from autoplan.profile import catalog
from autoplan.profile.catalog import find_hardware, hardware_names
from autoplan.profile.detect import choose, clocks, gpus

NVLINK = """\
\x1b[4m\tGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tPXB\t0-51,104-155\t0\t\tN/A
GPU1\tNV18\t X \tNODE\t0-51,104-155\t0\t\tN/A
NIC0\tPXB\tNODE\t X \t\t\t\t

Legend:

  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks
"""
PCIE = """\
\tGPU0\tGPU1\tGPU2\tGPU3\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID
GPU0\t X \tNODE\tSYS\tSYS\t0-31,64-95\t0\t\tN/A
GPU1\tNODE\t X \tSYS\tSYS\t0-31,64-95\t0\t\tN/A
GPU2\tSYS\tSYS\t X \tNODE\t32-63,96-127\t1\t\tN/A
GPU3\tSYS\tSYS\tNODE\t X \t32-63,96-127\t1\t\tN/A
"""
BRIDGED = PCIE.replace("NODE", "NV12")  # pairs are joined, the pairs are not


def machine(*lines: str, topology: str = NVLINK) -> object:
    def ask(command: Sequence[str]) -> str | None:
        return topology if "topo" in command else "\n".join(lines) + "\n"

    return ask


@pytest.mark.parametrize(
    ("lines", "topology", "profile"),
    [
        (["NVIDIA H100 80GB HBM3, 81559"] * 2, NVLINK, "h100-sxm-8x"),
        (["NVIDIA H100 80GB HBM3, 81559"], "", "h100-sxm-8x"),
        (["NVIDIA A100-SXM4-80GB, 81920"] * 2, NVLINK, "a100-80g-sxm-8x"),
        (["NVIDIA A100-SXM4-40GB, 40960"] * 2, NVLINK, "a100-40g-sxm-8x"),
        (["NVIDIA H200, 143771"] * 2, NVLINK, "h200-sxm-8x"),
        (["NVIDIA B200, 183359"] * 2, NVLINK, "b200-sxm-8x"),
        (["NVIDIA L40S, 46068 MiB"] * 4, PCIE, "l40s-pcie-8x"),
    ],
)
def test_a_known_card_is_its_profile(lines: list[str], topology: str, profile: str) -> None:
    found = gpus(machine(*lines, topology=topology))  # type: ignore[arg-type]
    assert found is not None
    assert found.count == len(lines)
    choice = choose(found, shipped())
    assert choice.name == profile
    assert lines[0].split(",")[0] in choice.reason


@pytest.mark.parametrize(
    ("line", "count", "topology", "hint"),
    [
        ("NVIDIA L4, 23034", 4, PCIE, "autoplan profile -o my.yaml."),
        ("NVIDIA A100 80GB PCIe, 81920", 4, BRIDGED, "--hardware a100"),
        ("NVIDIA GeForce RTX 3090, 24576", 1, "", "autoplan profile"),
        ("NVIDIA H100 PCIe, 81559", 1, "", "--hardware h100"),
    ],
)
def test_another_card_is_asked_for_in_one_sentence(line: str, count: int, topology: str, hint: str) -> None:
    found = gpus(machine(*[line] * count, topology=topology))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"there is no profile for") as error:
        choose(found, shipped())
    assert hint in str(error.value)


def test_links_are_nvlink_only_where_every_pair_has_them() -> None:
    matrices = (PCIE, BRIDGED, BRIDGED.replace("SYS", "NV12"), "")
    found = [gpus(machine(*["NVIDIA A100, 81920"] * 4, topology=each)) for each in matrices]  # type: ignore[arg-type]
    assert [each.interconnect for each in found if each] == ["PCIe", "PCIe", "NVLink", "PCIe"]


def test_without_a_gpu_it_is_the_cpu() -> None:
    for answer in (None, "", "No devices were found\n"):
        assert gpus(lambda _, answer=answer: answer) is None  # type: ignore[misc]
    choice = choose(None, shipped())
    assert choice.name == "cpu-gloo"
    assert "no GPU was found" in choice.reason


def test_a_mixed_machine_is_refused() -> None:
    with pytest.raises(UsageError, match=r"several models: NVIDIA A100-SXM4-80GB, NVIDIA T4"):
        gpus(machine("NVIDIA A100-SXM4-80GB, 81920", "NVIDIA T4, 15360"))  # type: ignore[arg-type]


def test_clocks_are_noted() -> None:
    assert clocks(0, lambda _: "1755, 1980, 412.31, 700.00\n") == "1755 MHz of 1980, 412 W of 700"
    assert clocks(0, lambda _: "1755, 1980, [N/A], [N/A]\n") == ""
    assert clocks(0, lambda _: None) == ""


def shipped() -> list:  # type: ignore[type-arg]
    return [find_hardware(name) for name in hardware_names()]


def test_auto_says_what_it_took(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(catalog, "gpus", lambda: None)
    assert arguments.hardware_here("auto") == "cpu-gloo"
    assert capsys.readouterr().err == "hardware: cpu-gloo (no GPU was found here, so this is the profile of a CPU)\n"
    assert find_hardware("auto") == find_hardware("cpu-gloo")
    monkeypatch.setattr(catalog, "gpus", lambda: gpus(machine("NVIDIA H200, 143771")))  # type: ignore[arg-type]
    assert find_hardware("auto").name == "h200-sxm-8x"
    assert arguments.hardware_here("a100") == "a100"
