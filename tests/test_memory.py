"""The memory policy, against what the system's own tools report and what MLX holds after real steps."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_lora import lora, memory
from mlx_lora.batches import Batches
from mlx_lora.config import Lora, Train
from mlx_lora.data import Example
from mlx_lora.head import output_of
from mlx_lora.loss import arrays, batch_score
from mlx_lora.model import can_compile
from mlx_lora.optim import make_optimizer
from mlx_lora.scoring import score
from mlx_lora.step import Outcome, Step

GB = 10**9


@pytest.fixture(autouse=True)
def own_limits() -> Iterator[None]:
    """A known cache limit, and whatever was set before afterwards."""
    before = mx.set_cache_limit(123_456_789)
    mx.clear_cache()
    yield
    mx.set_cache_limit(before)


def cache_limit() -> int:
    limit = mx.set_cache_limit(GB)
    mx.set_cache_limit(limit)
    return limit


def steps(epochs: int) -> Iterator[Outcome]:
    """Real, compiled steps of an adapted tiny model on rows of 3 to 120 tokens, 40 an epoch."""
    random = np.random.default_rng(0)
    rows = [Example(random.integers(1, 128, n).astype(np.int32), np.ones(n, bool), "") for n in range(3, 120, 3)] * 2
    model = tiny.llama()
    lora.attach(model, Lora(rank=4), seed=1)
    mx.eval(model.parameters())
    config = Train()
    batches = Batches(rows, 2, 0)
    step = Step(model, make_optimizer(config), config, can_compile())
    state = step.initial_state()
    for number, micro_batches in enumerate(batches.steps(0, epochs * 39)):
        state, outcome = step(state, micro_batches, 1e-3, number)
        yield outcome


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_the_limits_hold_inside_and_the_old_ones_come_back() -> None:
    with memory.limits(20 * GB) as limits:
        assert limits.cache == cache_limit() == 2 * GB
        assert (limits.wired is not None) == mx.metal.is_available()
    assert cache_limit() == 123_456_789
    with pytest.raises(RuntimeError, match="stop"), memory.limits(20 * GB):
        raise RuntimeError("stop")
    assert cache_limit() == 123_456_789


@pytest.mark.skipif(not mx.metal.is_available(), reason="only Metal wires memory")
def test_less_is_wired_than_macos_recommends() -> None:
    recommended = mx.device_info(mx.gpu)["max_recommended_working_set_size"]
    before = mx.set_wired_limit(0)
    with memory.limits(10**15) as limits:
        assert limits.wired is not None
        assert 0.5 * recommended < limits.wired < recommended
        assert mx.set_wired_limit(limits.wired) == limits.wired
    assert mx.set_wired_limit(before) == 0


def test_the_cache_stays_under_its_limit() -> None:
    largest = 2 * 128 * 128 * 4  # bytes of the widest logits: on a GPU a freed buffer may go beyond the limit by itself
    kept = {}
    for share in (20 * GB, GB // 200):
        mx.clear_cache()
        with memory.limits(share) as limits:
            kept[limits.cache] = max(mx.get_cache_memory() for _ in steps(1))
    roomy, tight = sorted(kept, reverse=True)
    assert kept[roomy] > 4 * tight  # without a limit, steps of many widths leave far more
    assert kept[tight] <= tight + (0 if mx.default_device() == mx.cpu else largest)


def test_active_memory_is_flat() -> None:
    """From the second epoch on, when every shape has been seen, MLX holds the same bytes after each step."""
    mx.set_cache_limit(0)  # else an array may get a freed buffer that is a little larger
    held = [mx.get_active_memory() for _ in steps(6)]
    assert len(held) == 234
    assert set(held[39:]) == {held[39]}


def test_a_leak_of_one_number_a_step_would_show() -> None:
    mx.set_cache_limit(0)
    leak, held = [], []
    for outcome in steps(2):
        leak.append(outcome.loss)
        held.append(mx.get_active_memory())
    assert held[-1] - held[39] >= 4 * 38


# ---- what there is ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("free") or mx.default_device() != mx.cpu, reason="of a Linux CPU, with procps")
def test_available_memory_is_what_free_reports() -> None:
    """Unless a control group leaves less; what MLX holds comes to it. Other programs run too: `free` is asked twice."""

    def reported() -> int:
        lines = subprocess.run(["free", "-b"], capture_output=True, text=True, check=True).stdout.splitlines()
        return int(lines[1].split()[lines[0].split().index("available") + 1])

    ballast = mx.ones((256 << 20,))  # 1 GiB
    mx.eval(ballast)
    group = memory.cgroup_available(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup").read_text()) or 10**18
    before, ours, after = reported(), memory.available(), reported()
    ours -= mx.get_active_memory() + mx.get_cache_memory()
    slack = 512 << 20
    assert min(before, after, group) - slack < ours < min(max(before, after), group) + slack


def test_meminfo() -> None:
    text = (
        "MemTotal:       24684084 kB\nMemFree:        23600292 kB\nMemAvailable:   24209296 kB\nHugePages_Total:  0\n"
    )
    assert memory.meminfo_available(text) == 24209296 * 1024


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def version_2(folder: Path, limit: str, used: int, inactive: int) -> None:
    stat = f"anon 5\nfile 7\ninactive_file {inactive}\nactive_file 3\n"
    group(folder, memory__max=f"{limit}\n", memory__current=f"{used}\n", memory__stat=stat)


def version_1(folder: Path, limit: int, used: int, inactive: int) -> None:
    stat = f"inactive_file 1\nhierarchical_memory_limit 3\ntotal_inactive_file {inactive}\n"
    group(folder, memory__limit_in_bytes=f"{limit}\n", memory__usage_in_bytes=f"{used}\n", memory__stat=stat)


def test_no_control_group_limits(tmp_path: Path) -> None:
    assert memory.cgroup_available(tmp_path, "0::/\n") is None
    version_2(tmp_path / "user", "max", 1000, 10)
    assert memory.cgroup_available(tmp_path, "0::/user\n") is None
    assert memory.cgroup_available(tmp_path, "4:cpu,cpuacct:/\n1:name=systemd:/a:b\n") is None


def test_control_groups_of_version_2(tmp_path: Path) -> None:
    """The root has no limit; of the others, the one that leaves least counts."""
    version_2(tmp_path / "a.slice", "9000", 1500, 500)
    version_2(tmp_path / "a.slice" / "b", "max", 1400, 400)
    version_2(tmp_path / "a.slice" / "b" / "c", "7000", 300, 100)
    assert memory.cgroup_available(tmp_path, "0::/a.slice/b/c\n") == 6800
    assert memory.cgroup_available(tmp_path, "0::/a.slice/b\n") == 8000
    version_2(tmp_path / "a.slice", "1000", 1500, 100)
    assert memory.cgroup_available(tmp_path, "0::/a.slice/b/c\n") == 0


def test_control_groups_of_a_container(tmp_path: Path) -> None:
    """What is mounted is the process's own group, whatever the path that it has outside."""
    version_2(tmp_path, "5000", 1000, 0)
    assert memory.cgroup_available(tmp_path, "0::/\n") == 4000
    assert memory.cgroup_available(tmp_path, "0::/../other\n") == 4000
    version_1(tmp_path / "memory", 3000, 1000, 500)
    membership = "9:name=systemd:/docker/1f\n4:memory:/docker/1f\n0::/docker/1f\n"
    assert memory.cgroup_available(tmp_path, membership) == 2500


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    version_1(tmp_path / "memory", 9223372036854771712, 10**9, 0)  # how no limit is written there
    version_1(tmp_path / "memory" / "jobs" / "7", 8000, 2000, 1000)
    assert memory.cgroup_available(tmp_path, "5:cpu:/\n4:hugetlb,memory:/jobs/7\n0::/\n") == 7000


# ---- running ahead ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="other schedulers are left alone")
def test_nothing_is_allocated_far_ahead_of_its_use() -> None:
    """Sixty chunks of 4 MB one after the other, of which MLX would allocate dozens at once."""
    weights = mx.random.normal((64, 10_000))
    parts = mx.random.normal((60, 100, 64))
    mx.eval(weights, parts)

    @mx.compile
    def total(parts: mx.array, weights: mx.array) -> mx.array:
        found = mx.array(0.0)
        for part in parts:
            found = found + mx.sin(mx.depends(part, found) @ weights).sum()
        return found

    def peaks(around: Callable[[], AbstractContextManager[None]]) -> list[int]:
        found = []
        for size in (30, 30, 60, 60):
            mx.clear_cache()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            with around():
                mx.eval(total(parts[:size], weights))
            found.append(mx.get_peak_memory() - before)
        return found

    limit = mx.get_memory_limit()
    without, within = peaks(nullcontext), peaks(memory.NoFurtherAhead().allowed)
    assert max(within) < 0.5 * max(without)
    assert mx.get_memory_limit() == limit


@pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="other schedulers are left alone")
def test_evaluations_allocate_nothing_far_ahead_either() -> None:
    """A head whose logits come in fifteen parts; what an evaluation took would be given to every update after it."""
    model = tiny.llama(vocab_size=60_000)
    mx.eval(model.parameters())
    random = np.random.default_rng(0)
    rows = [Example(random.integers(0, 60_000, 200).astype(np.int32), np.ones(200, np.bool_), "rows")] * 4
    batches = Batches(rows, 4, 0)

    def peak(compute: Callable[[], object]) -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        compute()
        return mx.get_peak_memory() - before

    [batch] = batches.in_order()
    freely = peak(lambda: mx.eval(batch_score(output_of(model), arrays(batch))))
    assert peak(lambda: score(model, batches)) < 0.7 * freely
