import subprocess
import sys

import pytest

from autoplan.errors import UsageError
from autoplan.files.hardware import dump_hardware
from autoplan.profile.catalog import DEFAULT_HARDWARE, find_hardware, hardware_names


def test_the_default_is_there():
    assert DEFAULT_HARDWARE in hardware_names()
    assert find_hardware(DEFAULT_HARDWARE).name == DEFAULT_HARDWARE


def test_a_path_wins(tmp_path, monkeypatch):
    profile = find_hardware(DEFAULT_HARDWARE)
    (tmp_path / "mine.yaml").write_text(dump_hardware(profile))
    assert find_hardware(str(tmp_path / "mine.yaml")) == profile
    monkeypatch.chdir(tmp_path)
    (tmp_path / DEFAULT_HARDWARE).write_text("not a profile")
    with pytest.raises(UsageError, match="not a hardware profile"):
        find_hardware(DEFAULT_HARDWARE)


def test_the_users_folder_wins_over_the_shipped_one(tmp_path, monkeypatch):
    text = dump_hardware(find_hardware(DEFAULT_HARDWARE)).replace("overlap: 0.2", "overlap: 0.9")
    (tmp_path / "hwprofiles").mkdir()
    (tmp_path / "hwprofiles" / f"{DEFAULT_HARDWARE}.yaml").write_text(text)
    (tmp_path / "hwprofiles" / "mine.yml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert find_hardware(DEFAULT_HARDWARE).overlap == 0.9
    assert {"mine", "a100-80g-sxm-8x"} < set(hardware_names())


def test_an_unknown_name_is_guessed():
    with pytest.raises(UsageError, match=r"no hardware profile 'h100'\. Did you mean h100-sxm-8x or h100-hbm2e-500w-8x\?"):
        find_hardware("h100")
    with pytest.raises(UsageError, match=r"Did you mean a100-40g-sxm-8x or a100-80g-sxm-8x\?"):
        find_hardware("A100-sxm-8x")
    with pytest.raises(UsageError, match=r"Did you mean h200-sxm-8x\?"):
        find_hardware("h20-sxm-8x")


@pytest.mark.parametrize("name", ["", ".", "..", "a\0b", "x" * 5000, "../hwprofiles/h100-sxm-8x", "none.yaml", "/", "hwprofiles"])
def test_odd_names_are_usage_errors(name):
    with pytest.raises(UsageError):
        find_hardware(name)


def test_every_profile_can_price_a_step():
    for name in hardware_names():
        profile = find_hardware(name)
        assert profile.device.peak_of("bfloat16") > 0
        assert profile.links[-1].span == 0
        assert profile.device.reserved < profile.device.memory / 5


def test_no_torch_is_imported():
    code = "import sys, autoplan.profile.catalog as c; c.find_hardware(c.DEFAULT_HARDWARE); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
