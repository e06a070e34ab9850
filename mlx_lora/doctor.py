"""python -m mlx_lora.doctor: what this machine is for a run, what is wrong with it, and what to do about it."""

import argparse
import ctypes.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from mlx_lora import blas
from mlx_lora.errors import InputError, exit_code

OLDEST_MACOS = 14  # for which MLX has wheels
EXTRAS = ("completion", "data", "serve", "tensorboard", "wandb")
LOW_DISK = 10e9
LOW_MEMORY = 4e9
MOST_WIRED = 0.9  # of the memory: above it, macOS itself has too little (mlx-lm's issue 883)
POWER_SUPPLIES = Path("/sys/class/power_supply")


@dataclass(frozen=True)
class Finding:
    """A fact about the machine; where something is wrong with it, also what to do. Without `usable` nothing runs."""

    subject: str
    fact: str
    cure: str = ""
    usable: bool = True


def _main() -> None:
    _parser().parse_args()
    findings = list(examine())
    for finding in findings:
        mark = "ok  " if not finding.cure else "note" if finding.usable else "BAD "
        print(f"{mark}  {finding.subject:9} {finding.fact}")
        if finding.cure:
            print(f"{'':16}→ {finding.cure}")
    bad = [finding.subject for finding in findings if not finding.usable]
    if bad:
        raise InputError(f"nothing can be trained on this machine yet: see {', '.join(bad)} above")
    print("This machine can train; a config for a first run: mlx-lora init")


def examine() -> Iterator[Finding]:
    """Everything that is looked at, in the order in which to put it right."""
    yield _system()
    yield from _packages()
    if sys.platform == "darwin":
        yield _wired()
    try:
        yield from _device()
    except Exception as error:  # MLX cannot be imported, or not computed with
        yield Finding("MLX", f"does not work: {error}", "install it again: pip install --force-reinstall mlx", False)
    if sys.platform.startswith("linux"):
        yield _blas()
    yield _disk(Path.cwd())
    yield power(_output("pmset", "-g", "batt"), _output("pmset", "-g")) if sys.platform == "darwin" else linux_power()


def _system() -> Finding:
    if sys.platform == "darwin":
        chip = _output("sysctl", "-n", "machdep.cpu.brand_string").strip()
        return mac(platform.mac_ver()[0], platform.machine(), chip)
    cpus = f"{len(os.sched_getaffinity(0))} CPUs" if sys.platform.startswith("linux") else ""
    fact = f"{platform.system()} {platform.release()}, {platform.machine()}, {cpus}, Python {platform.python_version()}"
    if sys.platform.startswith("linux"):
        return Finding("system", fact)
    return Finding("system", fact, "MLX runs on macOS and Linux; on Windows use WSL", False)


def mac(release: str, machine: str, chip: str) -> Finding:
    """macOS and the chip: MLX needs Apple silicon, a Python that was built for it, and a macOS that is not too old."""
    fact = f"macOS {release}, {chip}, {machine}, Python {platform.python_version()}"
    if machine != "arm64" and "Apple" in chip:
        return Finding("system", fact, "this Python is for Intel Macs: install one for Apple silicon (arm64)", False)
    if machine != "arm64":
        return Finding("system", fact, "MLX needs Apple silicon: use another machine", False)
    if int(release.split(".")[0]) < OLDEST_MACOS:
        return Finding("system", fact, f"MLX needs macOS {OLDEST_MACOS} or later: update it", False)
    return Finding("system", fact)


def _packages() -> Iterator[Finding]:
    """MLX and mlx-lm against what this project says that it needs."""
    try:
        declared = [Requirement(one) for one in requires("mlx-lora") or []]
    except PackageNotFoundError:
        yield Finding("mlx-lora", "is not installed", "pip install .  (in the project's folder)")
        return
    for name in ("mlx", "mlx-lm"):
        yield package(name, next(one for one in declared if one.name == name and one.marker is None))
    yield extras([one for one in declared if one.marker])


def package(name: str, needed: Requirement) -> Finding:
    """An installed version against the range that the tests ran with."""
    cure = f'pip install "{needed}"'
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "is not installed", cure, False)
    return Finding(name, found, "" if needed.specifier.contains(found, prereleases=True) else cure)


def extras(declared: list[Requirement]) -> Finding:
    """Which optional extras are there; a run that needs another says so."""
    there: list[str] = []
    missing: list[str] = []
    for extra in EXTRAS:
        needed = [one.name for one in declared if one.marker and one.marker.evaluate({"extra": extra})]
        (there if needed and all(map(_installed, needed)) else missing).append(extra)
    fact = ", ".join(there) or "none"
    return Finding("extras", f"{fact}; not installed: {', '.join(missing)}" if missing else fact)


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _wired() -> Finding:
    text = _output("sysctl", "-n", "iogpu.wired_limit_mb").strip()
    total = int(_output("sysctl", "-n", "hw.memsize").strip() or 0)
    return wired(int(text or 0), total)


def wired(limit: int, total: int) -> Finding:
    """macOS's own limit of what the GPU may keep in memory, in MB (0: macOS chooses), of `total` bytes."""
    if limit == 0:
        return Finding("wired", "macOS chooses how much memory the GPU may keep (iogpu.wired_limit_mb is 0)")
    fact = f"the GPU may keep {limit * 2**20 / 1e9:.1f} of {total / 1e9:.1f} GB in memory (iogpu.wired_limit_mb)"
    if limit * 2**20 > MOST_WIRED * total:
        return Finding("wired", fact, "macOS is left too little and can hang: sudo sysctl iogpu.wired_limit_mb=0")
    return Finding("wired", fact)


def _device() -> Iterator[Finding]:
    """What MLX computes on, the memory there, and whether it can compile."""
    import mlx.core as mx

    from mlx_lora import memory, model

    free = memory.available()
    yield Finding("device", model.device())
    cure = "close other programs; what a run needs: train.plan: auto" if free < LOW_MEMORY else ""
    yield Finding("memory", f"{free / 1e9:.1f} GB for a run, of {_memory() / 1e9:.1f} GB", cure)
    if not model.can_compile():
        yield Finding("compiler", "there is no g++: steps run uncompiled, and slower", "apt-get install g++")
        return
    value = mx.compile(lambda x: mx.exp(x) * 2 + x)(mx.zeros(8))  # fused, so that a kernel is built
    mx.eval(value)
    yield Finding("compiler", "MLX compiles")


def _blas() -> Finding:
    if blas.loaded:
        return Finding("BLAS", "OpenBLAS is loaded")
    if blas.too_late:
        return Finding("BLAS", "OpenBLAS is not loaded: MLX was imported first", "import mlx_lora before mlx")
    installed = ctypes.util.find_library("openblas")
    return Finding(
        "BLAS",
        f"OpenBLAS {'cannot be loaded' if installed else 'is not there'}: on a CPU, matrix products are 25 to 80 times "
        "slower",
        "apt-get install libopenblas0-pthread (Debian, Ubuntu), dnf install openblas (Fedora)",
    )


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    fact = f"{free / 1e9:.1f} GB free here ({folder})"
    cure = "models take 0.5 to 2 bytes a weight, checkpoints more: make room, or work elsewhere"
    return Finding("disk", fact, cure if free < LOW_DISK else "")


def power(battery: str, settings: str) -> Finding:
    """What macOS's `pmset -g batt` and `pmset -g` say."""
    if "'Battery Power'" in battery:
        return Finding("power", "on battery", "plug it in: macOS slows the chip down, and the run may outlast it")
    if re.search(r"^\s*lowpowermode\s+1\b", settings, re.MULTILINE):
        return Finding("power", "low power mode is on", "switch it off in System Settings, Battery")
    if re.search(r"^\s*sleep\s+[1-9]\d*(?!.*sleep prevented)", settings, re.MULTILINE):
        return Finding("power", "on the mains; the Mac goes to sleep when idle", "caffeinate -i mlx-lora train ...")
    return Finding("power", "on the mains" if battery else "unknown")


def linux_power(supplies: Path = POWER_SUPPLIES) -> Finding:
    """What the kernel says about batteries."""
    states = [path.read_text().strip() for path in supplies.glob("*/status")]
    if "Discharging" in states:
        return Finding("power", "on battery", "plug it in: the machine slows down, and the run may outlast it")
    return Finding("power", "on the mains" if states else "no battery")


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _output(*command: str) -> str:
    """What a program of the system prints; "" where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog="mlx-lora doctor",
        description="Check this machine: system, versions, memory, BLAS, compiler, disk and power. Exit code 2 where "
        "nothing can be trained on it.",
    )


if __name__ == "__main__":
    sys.exit(exit_code(_main))
