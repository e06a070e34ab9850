"""How much memory there is for a run, and how much MLX keeps of what it has freed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

CACHE_SHARE = 0.1
WIRED_SHARE = 0.9


@dataclass(frozen=True)
class Limits:
    """In bytes: of MLX's cache of freed buffers, and of the memory that macOS keeps resident (None elsewhere)."""

    cache: int
    wired: int | None


@contextmanager
def limits(memory: int) -> Iterator[Limits]:
    """Bounds what a run that may use `memory` bytes holds without need; puts the old limits back at the end.

    Cache: a tenth of `memory`. MLX keeps freed buffers for arrays of about their size. On Metal and CUDA it lets them
    fill nearly all memory, which batches of many widths do: 51 GiB were held where 7 were needed (mlx-lm's pull
    request 986). Emptying the cache at every step, as mlx-lm does, makes MLX allocate all buffers of the next step
    anew. On a CPU MLX keeps only 32 MiB, and the system has to clear new pages in every step: with room for all that
    a step frees, steps of a small model took 0.8 to 0.9 of the CPU time.

    Wired (Metal only): nine tenths of `memory`. Memory that stays resident makes training faster, by a seventh in
    MLX's pull request 2006; but it is taken from all other programs, and Macs on which MLX wired the whole recommended
    working set have hung and panicked (mlx-lm's issue 883).

    MLX's memory limit stays as it is: see `NoFurtherAhead`.
    """
    cache = int(memory * CACHE_SHARE)
    wired = int(min(memory, _metal_memory()) * WIRED_SHARE) if mx.metal.is_available() else None
    cache_before = mx.set_cache_limit(cache)
    wired_before = None
    try:
        if wired is not None:
            wired_before = mx.set_wired_limit(wired)
        yield Limits(cache, wired)
    finally:
        mx.set_cache_limit(cache_before)
        if wired_before is not None:
            mx.set_wired_limit(wired_before)


class NoFurtherAhead:
    """Keeps MLX's CPU scheduler from allocating what it cannot compute yet.

    It starts up to a hundred operations at once, all of whose results are allocated: many chunks of logits, where one
    is in use. Above its memory limit it starts none before another has ended. That is slow below what is needed, and
    free from there on. So what comes first runs with no room, in about three times its time, and shows what it needs;
    the rest has as much, and more once something has needed a tenth more.
    """

    def __init__(self) -> None:
        self._room = 0

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Around each update, and each batch of an evaluation."""
        if mx.default_device() != mx.cpu:
            yield
            return
        held = mx.get_active_memory()
        before = mx.set_memory_limit(held + self._room)
        try:
            yield
        finally:
            mx.set_memory_limit(before)
            needed = mx.get_peak_memory() - held
            if needed > 1.1 * self._room:
                self._room = needed


def available(limit: float | None = None) -> int:
    """Bytes that MLX may hold in all on its device, what it holds now included, without swapping; no more than `limit`
    GB.

    Metal: the working set that macOS recommends. CUDA: what is free on the device. CPU on Linux: what the system
    reports as available, and no more than the control groups of this process (a container's) leave; on other systems
    MLX's own limit, 0.8 of the physical memory.
    """
    return _available() if limit is None else min(_available(), int(limit * 1e9))


def _available() -> int:
    held = mx.get_active_memory() + mx.get_cache_memory()
    if mx.metal.is_available():  # MLX then allocates there for the CPU too
        return _metal_memory()
    if mx.default_device() != mx.cpu:
        info = mx.device_info()
        return min(int(info["free_memory"]) + held, int(info["total_memory"]))
    meminfo, membership = Path("/proc/meminfo"), Path("/proc/self/cgroup")
    if not meminfo.exists():
        return mx.get_memory_limit()
    free = meminfo_available(meminfo.read_text())
    group = cgroup_available(Path("/sys/fs/cgroup"), membership.read_text()) if membership.exists() else None
    return held + (free if group is None else min(free, group))


def meminfo_available(text: str) -> int:
    """The bytes that /proc/meminfo says new programs may use without swapping."""
    fields = dict(line.split(":", 1) for line in text.splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def cgroup_available(root: Path, membership: str) -> int | None:
    """The bytes that a process's control groups leave it, or None where they set no limit.

    `root` is where control groups are mounted, `membership` the text of /proc/PID/cgroup. The groups above the
    process's own count too. Of what a group uses, pages of files that were not used lately are free to be taken.
    """
    left = []
    for line in membership.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":  # version 2
            mount, limit, usage, reclaimable = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit, usage, reclaimable = (
                root / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        parts = path.strip("/").split("/")
        for depth in range(len(parts) + 1):  # in a container, the mount is often the process's own group
            group = mount.joinpath(*parts[:depth])
            try:
                most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
                stat = dict(line.split(" ", 1) for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if most != "max":
                left.append(max(0, int(most) - used + int(stat.get(reclaimable, 0))))
    return min(left, default=None)


def _metal_memory() -> int:
    info = mx.device_info(mx.gpu)
    return min(int(info["max_recommended_working_set_size"]), int(info["memory_size"]))
