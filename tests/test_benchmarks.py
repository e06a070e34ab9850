"""The benchmarks run and say what they measured on what; how fast is no matter of tests."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_lora import model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(name: str, folder: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """What a benchmark printed, and the figures that it wrote."""
    file = folder / "figures.json"
    command = [sys.executable, str(BENCHMARKS / name), *options, "--json", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert result.returncode == 0, result.stderr
    figures = json.loads(file.read_text())
    assert figures["device"] == model.device()
    assert f"{model.device()}, mlx {mx.__version__}" in result.stdout
    return result.stdout, figures


def positive(*numbers: float) -> bool:
    return all(math.isfinite(number) and number > 0 for number in numbers)


def test_lora_layer(tmp_path: Path) -> None:
    text, figures = run("lora_layer.py", tmp_path, "--sizes", "32", "64", "--tokens", "1", "8", "--repeats", "3")
    assert [(row["tokens"], row["size"]) for row in figures["rows"]] == [(1, 32), (1, 64), (8, 32), (8, 64)]
    for row in figures["rows"]:
        assert positive(*row.values())
        assert row["forward_ratio"] == pytest.approx(row["adapted_forward"] / row["base_forward"])
        assert row["backward_ratio"] == pytest.approx(row["adapted_backward"] / row["base_backward"])
        assert f"{row['base_forward']:.1f}" in text
        assert f"{row['adapted_backward']:.1f}" in text
    heads, *lines = text.splitlines()[2:]
    assert len(lines) == 4
    assert {len(line) for line in lines} == {len(heads)}


@pytest.mark.slow
def test_qwen_step(tmp_path: Path) -> None:
    text, figures = run("qwen_step.py", tmp_path, "--layers", "1", "--tokens", "4", "--repeats", "1")
    assert figures["trainable"] == 540_672 // 24
    assert f"{540_672 // 24:,} of" in text
    assert figures["adapter_bytes"] >= 4 * figures["trainable"]
    assert figures["adapter_bytes"] < 4 * figures["trainable"] + 4096
    times = figures["seconds"]
    assert times.keys() == {"forward", "forward and backward", "update", "step", "mlx-lm step"}
    assert positive(*times.values(), *figures["peak_memory"].values())
    assert figures["ratio"] == pytest.approx(times["step"] / times["mlx-lm step"])
    assert f"{figures['ratio']:.3f}" in text


def test_live_adapters(tmp_path: Path, tiny_model: Path) -> None:
    text, figures = run("live_adapters.py", tmp_path, str(tiny_model), "--repeats", "3", "--cycles", "20")
    assert positive(*figures["milliseconds"].values())
    assert figures["memory"][0] == figures["memory"][1]
    assert f"{figures['milliseconds']['swap']:.2f}" in text
