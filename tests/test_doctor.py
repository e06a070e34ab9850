"""`mlx-lora doctor`: this machine as it is, and what other machines' programs print, as recorded texts."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mlx_lora import doctor

BATTERY = "Now drawing from '{}'\n -InternalBattery-0 (id=4653155)\t87%; discharging; 3:12 remaining present: true\n"
SETTINGS = """System-wide power settings:
Currently in use:
 standby              1
 Sleep On Power Button 1
 powernap             1
 disksleep            10
 sleep                {sleep}
 displaysleep         10
 lowpowermode         {low}
 womp                 1
"""


def test_this_machine_is_examined(run_command):
    ended = run_command("doctor")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    subjects = [line[6:].split()[0] for line in ended.stdout.splitlines() if re.match(r"ok  |note|BAD ", line)]
    expected = ["system", "mlx", "mlx-lm", "extras", "device", "memory", "compiler", "disk", "power"]
    assert [subject for subject in subjects if subject in expected] == expected
    assert version("mlx-lm") in ended.stdout
    if sys.platform.startswith("linux"):
        assert "BLAS" in subjects


def test_extras_are_those_of_the_package():
    """All that the project declares for users, each by whether its packages are installed."""
    with (Path(__file__).parents[1] / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["optional-dependencies"]
    assert set(doctor.EXTRAS) == set(declared) - {"cpu", "cuda", "test"}
    wanted = [Requirement(one) for one in ("pip; extra == 'data'", "no-such-package; extra == 'wandb'")]
    assert doctor.extras(wanted).fact == "data; not installed: completion, serve, tensorboard, wandb"
    wanted.append(Requirement("no-such-package; extra == 'data'"))
    assert doctor.extras(wanted).fact == "none; not installed: completion, data, serve, tensorboard, wandb"


def test_without_a_compiler_it_says_so(run_command, tmp_path):
    """A PATH without programs: nothing is found there, and nothing crashes."""
    ended = run_command("doctor", env={"PATH": str(tmp_path)})
    assert ended.returncode == 0, ended.stderr
    if sys.platform.startswith("linux"):
        assert "there is no g++" in ended.stdout


def test_a_broken_mlx_is_a_finding(tmp_path):
    """A folder named mlx in front of the real one."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('Library not loaded: libmlx')")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
               "from mlx_lora import doctor; from mlx_lora.errors import exit_code; sys.argv = ['doctor']; "
               "sys.exit(exit_code(doctor._main))"]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "Library not loaded: libmlx" in ended.stdout
    assert "see MLX above" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("release", "machine", "chip", "words"),
    [
        ("15.6.1", "arm64", "Apple M3 Pro", None),
        ("26.1", "arm64", "Apple M5", None),
        ("13.7", "arm64", "Apple M1", "update"),
        ("15.6", "x86_64", "Apple M2", "this Python is for Intel Macs"),
        ("15.6", "x86_64", "Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz", "needs Apple silicon"),
    ],
)
def test_macs(release, machine, chip, words):
    found = doctor.mac(release, machine, chip)
    assert (found.cure == "", found.usable) == (words is None, words is None)
    assert (words or "") in found.cure
    assert chip in found.fact


@pytest.mark.parametrize(("limit", "warns"), [(0, False), (12288, False), (15360, True)])
def test_wired_limits_of_a_mac_with_16_gb(limit, warns):
    found = doctor.wired(limit, 16 * 2**30)
    assert bool(found.cure) == warns
    assert found.usable


@pytest.mark.parametrize(
    ("battery", "sleep", "low", "words"),
    [
        (BATTERY.format("AC Power"), "0", "0", None),
        (BATTERY.format("AC Power"), "1 (sleep prevented by caffeinate)", "0", None),
        (BATTERY.format("AC Power"), "1", "0", "caffeinate"),
        (BATTERY.format("Battery Power"), "0", "0", "plug it in"),
        (BATTERY.format("AC Power"), "0", "1", "switch it off"),
        ("", "0", "0", None),
    ],
)
def test_what_pmset_says(battery, sleep, low, words):
    found = doctor.power(battery, SETTINGS.format(sleep=sleep, low=low))
    assert (words or "") in found.cure
    assert bool(found.cure) == (words is not None)


@pytest.mark.parametrize(("status", "warns"), [("Discharging", True), ("Charging", False), (None, False)])
def test_what_linux_says_about_batteries(tmp_path, status, warns):
    if status:
        (tmp_path / "BAT0").mkdir()
        (tmp_path / "BAT0" / "status").write_text(status + "\n")
    assert bool(doctor.linux_power(tmp_path).cure) == warns


def test_versions_are_held_against_what_is_needed():
    assert doctor.package("pip", Requirement("pip>=1")).cure == ""
    assert doctor.package("pip", Requirement("pip>=9999")).cure == 'pip install "pip>=9999"'
    missing = doctor.package("no-such-package-here", Requirement("no-such-package-here>=1"))
    assert (missing.usable, missing.fact) == (False, "is not installed")
